"""The report as a page: what stands in it, what it must never do, and how it looks on a phone."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import rankprune as rp
from cases import cnn_input, small_cnn
from rankprune import cli
from rankprune.html import to_html
from rankprune.report import Cost, LatencyReport, LayerReport, Report

HOSTILE = "<script>alert(1)</script>\"'&lt;x"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page(HTMLParser):
    """A page's elements, with the text inside each, and whether they nest properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag != "meta":
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def texts(self, *tags: str) -> list[str]:
        return [" ".join("".join(texts).split()) for tag, _, texts in self.elements if tag in tags]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def layer(name: str = "conv", values: int = 64, **changes: Any) -> LayerReport:
    factorized = LayerReport(
        name=name,
        type="Conv2d",
        scheme="spatial",
        matrix=f"{values}×192",
        rank=values // 4,
        energy=0.93,
        params=1000,
        dense_params=3000,
        flops=2000,
        dense_flops=5000,
        reason="budget",
        error=0.26,
        singular_values=tuple(0.9**n for n in range(values)),
    )
    return replace(factorized, **changes)


DENSE = layer(
    "head",
    scheme=None,
    rank=None,
    energy=None,
    error=None,
    singular_values=(),
    reason="too small to pay",
)


def made(
    *layers: LayerReport, accuracy: float | None = 0.9, flops: int = 40, **changes: Any
) -> Any:
    report = Report(
        dense=Cost(1000, 100, 4000, None if accuracy is None else 0.92),
        compact=Cost(400, flops, 1600, accuracy),
        layers=layers or (layer("stem"), DENSE),
        max_logit_error=0.01,
        projected_accuracy=accuracy,
        environment={"torch": "2.14", "device": "cpu"},
    )
    return replace(report, **changes)


LATENCY = (
    LatencyReport("onnxruntime", 1, 2, 18.2, 9.9, 9.1, 1.84, 0.74),
    LatencyReport("eager", 64, 1, 300.0, 200.0, None, 1.5, 0.6),
)


def test_one_run_has_totals_layers_and_spectra() -> None:
    page = Page(to_html([("mine", made(latency=LATENCY))]))
    assert page.texts("h1", "h2", "h3") == ["mine", "Totals", "Latency", "Layers", "Spectra"]
    rows = page.texts("tr")
    assert "Parameters1k4002.50× fewer" in rows
    assert "Accuracy92.00%90.00%−2.00 points" in rows
    assert "Accuracy, projected90.00%90.00%0.00 points" in rows
    assert "Latency: onnxruntime, batch 1, 2 threads18.2 ms9.9 ms1.84× as fast" in rows
    assert "onnxruntime1218.2 ms9.9 ms9.1 ms1.84×74%" in rows
    assert "eager641300 ms200 ms–1.50×60%" in rows
    stem = "stemConv2dspatial64×192160.93000.263k → 1k (3.00×)5k → 2k (2.50×)budget"
    assert stem in rows
    assert any(row.startswith("headConv2ddense") and "too small to pay" in row for row in rows)
    assert page.texts("summary") == ["stem rank 16 of 64"]
    labels = [attributes["aria-label"] or "" for attributes in page.attributes("svg")]
    assert [label.split()[0] for label in labels] == ["Latency.", "Energy", "Singular"]


def test_several_runs_are_compared() -> None:
    runs = [("half", made(flops=50)), ("third", made(flops=33, accuracy=0.88))]
    page = Page(to_html(runs))
    headings = page.texts("h1", "h2")
    assert headings == ["2 runs compared", "Trade-off", "half", "third"]
    rows = page.texts("tr")
    assert any(row.startswith("half50.00%40.00%") for row in rows)
    label = page.attributes("svg")[0]["aria-label"] or ""
    assert "half: 90.00% at 50.00%" in label
    assert "third: 88.00% at 33.00%" in label
    targets = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    links = [str(attributes["href"]) for attributes in page.attributes("a")]
    assert len(links) == 5
    assert {link[1:] for link in links} <= targets


@pytest.mark.parametrize(
    ("layers", "accuracy", "measure"),
    [((), 0.9, "Accuracy"), ((), None, "Energy kept"), ((DENSE,), None, "Output difference")],
    ids=["accuracy", "energy", "difference"],
)
def test_the_trade_off_shows_the_best_measure_there_is(
    layers: tuple[LayerReport, ...], accuracy: float | None, measure: str
) -> None:
    runs = [(f"at {n}", made(*layers, flops=n, accuracy=accuracy)) for n in (30, 60)]
    label = Page(to_html(runs)).attributes("svg")[0]["aria-label"] or ""
    assert label.startswith(f"{measure} against the share of FLOPs left. at 30: ")


def test_a_run_without_the_measure_is_named_and_not_drawn() -> None:
    lost = made(DENSE, accuracy=None, max_logit_error=None)
    page = Page(to_html([("a", made()), ("lost", lost)]))
    assert "lost" not in (page.attributes("svg")[0]["aria-label"] or "")
    assert "Without this measure: lost." in page.texts("figcaption")[0]
    nothing = Page(to_html([("a", lost), ("b", lost)]))
    assert nothing.attributes("svg") == []


def test_a_report_without_accuracy_latency_or_spectra_is_shorter() -> None:
    old = layer(singular_values=(), error=None, energy=None)
    page = Page(to_html([("old", made(old, accuracy=None, max_logit_error=None))]))
    assert page.texts("h1", "h2") == ["old", "Totals", "Layers"]
    assert "ccuracy" not in " ".join(page.texts("body"))
    assert page.attributes("svg") == []


def test_predicted_times_have_a_column_where_a_plan_has_them() -> None:
    timed = layer(latency_ms=0.5, dense_latency_ms=1.25)
    rows = Page(to_html([("timed", made(timed, DENSE))])).texts("tr")
    assert any("1.25 → 0.5 msbudget" in row for row in rows)
    assert "Predicted time" not in to_html([("untimed", made())])


def test_the_page_loads_and_runs_nothing() -> None:
    text = to_html([("a", made(latency=LATENCY)), ("b", made())])
    page = Page(text)
    policies = [a for a in page.attributes("meta") if a.get("http-equiv")]
    assert [policy["content"] for policy in policies] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes, _ in page.elements:
        assert not {"src", "srcset", "xlink:href", "style", "data"} & set(attributes)
        assert not [key for key in attributes if key.startswith("on")]
        assert str(attributes.get("href", "#")).startswith("#"), (tag, attributes)
    assert not re.search(r"https?:|//|url\(|@import|@font-face", text)


def test_names_are_text_wherever_they_stand() -> None:
    hostile = layer(HOSTILE, type=HOSTILE, scheme=HOSTILE, matrix=HOSTILE, reason=HOSTILE)
    report = made(
        hostile,
        latency=(replace(LATENCY[0], backend=HOSTILE),),
        environment={HOSTILE: HOSTILE},
    )
    for text in (to_html([(HOSTILE, report)]), to_html([(HOSTILE, report), ("b", report)])):
        page = Page(text)
        assert "<script" not in text
        assert HOSTILE in page.texts("h1", "h2")
        assert HOSTILE in page.texts("th")
        assert [a for _, a, _ in page.elements if any("alert" in key for key in a)] == []
        allowed = {"class", "id", "role", "aria-label", "tabindex", "scope", "href", "lang", "open"}
        for tag, attributes, _ in page.elements:
            if tag in ("th", "td", "section", "details", "svg", "a", "h2", "div"):
                assert set(attributes) <= allowed | {"viewbox"}


def test_a_name_that_is_no_text_is_written_all_the_same() -> None:
    assert "<h1>a?b</h1>" in to_html([("a\udcffb", made())])


def test_everything_can_be_reached_and_is_announced() -> None:
    page = Page(to_html([("a", made(latency=LATENCY)), ("b", made())]))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    first = next(a for tag, a, _ in page.elements if tag == "a")
    assert first == {"class": "skip", "href": "#main"}
    assert all(a["role"] == "img" and a["aria-label"] for a in page.attributes("svg"))
    assert all(a.get("scope") in ("row", "col") for a in page.attributes("th"))
    assert len(page.texts("caption")) == len(page.texts("table")) == len(page.texts("thead"))
    assert all(page.texts("caption"))
    scrolling = [a for a in page.attributes("div") if "scroll" in str(a.get("class"))]
    assert len(scrolling) == len(page.texts("table"))
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolling)
    identifiers = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert page.attributes("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in page.attributes("meta"))


def test_many_layers_with_long_spectra_stay_a_small_page() -> None:
    layers = [
        layer(f"encoder.blocks.{n}.attention.projection", 4096, reason="r" * 60) for n in range(150)
    ]
    text = to_html([("large", made(*layers))])
    assert len(text.encode()) < 600_000
    page = Page(text)
    assert len(page.texts("details")) == 150
    for attributes in page.attributes("polyline"):
        assert 1 <= len(str(attributes["points"]).split()) <= 64
    assert not any("open" in attributes for attributes in page.attributes("details"))


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 1), (64, 64), (65, 1), (5000, 4999)])
def test_both_sides_of_the_cut_are_drawn(count: int, rank: int) -> None:
    values = tuple(0.999**n for n in range(count))
    page = Page(to_html([("x", made(layer(singular_values=values, rank=rank)))]))
    rest, kept = (str(a["points"]).split() for a in page.attributes("polyline"))
    assert kept[-1] == rest[0]
    assert len(kept) + len(rest) - 1 <= 64
    assert len(rest) == 1 or rank < count


def test_odd_numbers_are_drawn_at_the_edge_or_not_at_all() -> None:
    odd = [
        layer("zero", singular_values=(0.0, 0.0)),
        layer("negative", singular_values=(1.0, -3.0, 0.0, 1e-300)),
        layer("rank", rank=10**12),
        layer("huge", energy=1e299, error=-1e299, params=0, dense_params=2**62, flops=0),
        layer("nan", energy=math.nan, error=math.inf, singular_values=(math.nan, 1.0)),
    ]
    latency = [
        LatencyReport("x" * 4000, 0, 0, value, 0.0, value, value, value)
        for value in (0.0, -1.0, 1e299, math.nan)
    ]
    for report in (
        made(*odd, latency=tuple(latency), accuracy=1e299),
        made(*odd, accuracy=-5.0, flops=0, max_logit_error=math.nan),
        made(*odd, dense=Cost(0, 0, 0, math.nan), compact=Cost(0, 0, 0, 0.5)),
    ):
        for text in (to_html([("x", report)]), to_html([("x", report), ("y", report)])):
            drawn = Page(text)
            for tag in ("polyline", "rect", "circle", "line"):
                for attributes in drawn.attributes(tag):
                    assert not re.search("nan|inf|e[+]", str(attributes.values()))


def test_nothing_to_write_is_an_error() -> None:
    with pytest.raises(rp.ConfigError, match="no report"):
        to_html([])


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two finished runs of one name in different folders."""
    model = small_cnn()
    folders = []
    for name, rank in (("a/run", 8), ("b/run", 4)):
        compact = rp.factorize(model, rp.make_plan(model, rp.FixedRank(rank)))
        found = rp.report(model, compact, example_inputs=cnn_input())
        folders.append(tmp_path / name)
        folders[-1].mkdir(parents=True)
        (folders[-1] / "report.json").write_text(json.dumps(found.to_dict()))
    return folders


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr("sys.argv", ["rankprune", "report", *map(str, args)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert isinstance(done.value.code, int | None)
    return done.value.code or 0


def test_the_command_writes_a_page_and_still_prints(
    runs: list[Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    out = tmp_path / "out.html"
    assert call(monkeypatch, runs[0], "--html", out, "--json") == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out) == json.loads((runs[0] / "report.json").read_text())
    assert str(out) in shown.err.replace("\n", "")
    assert Page(out.read_text()).texts("h1") == ["run"]
    assert call(monkeypatch, runs[0]) == 0
    assert capfd.readouterr().out.startswith("layer ")


def test_the_command_overwrites_only_when_forced(
    runs: list[Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    out = tmp_path / "out.html"
    out.write_text("mine")
    assert call(monkeypatch, runs[0], "--html", out) == 3
    assert "--force" in capfd.readouterr().err
    assert out.read_text() == "mine"
    assert call(monkeypatch, runs[0], "--html", out, "--force") == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert call(monkeypatch, runs[0], "--html", tmp_path / "none" / "out.html") == 3
    assert call(monkeypatch, runs[0], "--html", tmp_path, "--force") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out.html"]


def test_several_runs_are_printed_and_compared_under_their_own_names(
    runs: list[Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    copy = tmp_path / "third.json"
    shutil.copy(runs[0] / "report.json", copy)
    out = tmp_path / "out.html"
    given = [runs[0], runs[1] / "report.json", copy, runs[0], runs[0]]
    assert call(monkeypatch, *given, "--html", out, "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert list(document) == ["runs"]
    first, second = str(runs[0]), str(runs[1] / "report.json")
    assert list(document["runs"]) == [first, second, "third", f"{first} (2)", f"{first} (3)"]
    assert document["runs"][second] == json.loads((runs[1] / "report.json").read_text())
    assert Page(out.read_text()).texts("h2")[1:] == list(document["runs"])
    assert call(monkeypatch, runs[0], copy) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("run\n\nlayer ")
    assert "\nthird\n\nlayer " in printed


def test_a_broken_report_leaves_no_page(
    runs: list[Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    document = json.loads((runs[1] / "report.json").read_text())
    document["layers"][0]["singular_values"] = ["<script>"]
    (runs[1] / "report.json").write_text(json.dumps(document))
    out = tmp_path / "out.html"
    assert call(monkeypatch, *runs, "--html", out) == 3
    shown = capfd.readouterr()
    assert "singular_values[0] must be a finite number" in shown.err.replace("\n", " ")
    assert shown.out == ""
    assert not out.exists()


# -- in a browser ---------------------------------------------------------------------------------

# Every stop of the Tab key, in the order of the document: none has a positive tabindex.
PROBE = """<script>
const stops = [...document.querySelectorAll("a[href], summary, [tabindex='0']")];
const takesFocus = stop => (stop.focus(), document.activeElement === stop && stop.tabIndex === 0);
const seen = stops.filter(takesFocus);
const wide = [...document.body.querySelectorAll("*")].filter(element =>
    !element.closest("table, svg, .skip")
    && element.getBoundingClientRect().right > innerWidth + 1);
const boxes = [...document.querySelectorAll(".scroll")];
stops[1].focus();
const outline = getComputedStyle(stops[1]).outlineStyle;
stops[0].focus();
document.title = JSON.stringify({
    viewport: innerWidth,
    scroll: document.documentElement.scrollWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 80)),
    stops: stops.length,
    order: seen.map(stop => stop.tagName),
    outline: outline,
    skip: stops[0].getBoundingClientRect().left >= 0,
    scrolling: boxes.filter(box => box.scrollWidth > box.clientWidth).length,
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not seen rendered")
@pytest.mark.parametrize("size", [(360, 740), (1280, 900)], ids=["phone", "desktop"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_nothing_overflows_and_the_keyboard_reaches_all(
    size: tuple[int, int], several: bool, tmp_path: Path
) -> None:
    layers = [layer(f"encoder.blocks.{n}.attention.projection" * 3) for n in range(30)]
    report = made(*layers, DENSE, latency=LATENCY)
    names = ["a" * 300, "b b" * 90] if several else ["a" * 300]
    text = to_html([(name, report) for name in names])
    text = re.sub("<meta http-equiv=[^>]*>", "", text).replace("</body>", PROBE + "</body>")
    (tmp_path / "page.html").write_text(text)
    # a window cannot be as narrow as a phone everywhere; a frame can
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="page.html" width="{size[0]}" height="{size[1]}" '
        'style="border:0" onload="document.title = this.contentDocument.title"></iframe>'
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={max(size[0], 800)},{size[1]}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(Page(done.stdout).texts("title")[0])
    assert seen["viewport"] <= size[0]
    assert seen["scroll"] <= seen["viewport"]
    assert seen["wide"] == []
    assert len(seen["order"]) == seen["stops"]
    assert seen["outline"] == "solid"
    assert seen["skip"]
    contents = 2 if several else 4
    assert seen["order"][: contents + 2] == ["A"] * (contents + 1) + ["DIV"]
    assert seen["order"].count("SUMMARY") == 30 * len(names)
    assert seen["scrolling"] or size[0] > 1000  # on a phone the tables are what scrolls
