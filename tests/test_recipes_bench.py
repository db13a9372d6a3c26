"""Dense against compact on the installed runtimes: what is reported is what was timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import cnn_input, small_cnn
from rankprune import BACKENDS, ConfigError, FixedRank, factorize, make_plan
from rankprune.recipes import bench as module
from rankprune.recipes.bench import bench, bench_table


def _compact() -> nn.Module:
    model = small_cnn().eval()
    return factorize(model, make_plan(model, FixedRank(2), example_inputs=cnn_input()))


def test_figures_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": [0.004, 0.006, 0.005], "compact": [0.002, 0.002, 0.002]}
    monkeypatch.setattr(module, "timings", lambda calls, seconds, **_: times)
    result = bench(_compact(), example_inputs=cnn_input(3), backends=["eager"], memory=False)
    row = result["backends"]["eager"]
    assert result["batch"] == 3
    assert (row["dense_ms"], row["compact_ms"]) == (pytest.approx(5), pytest.approx(2))
    assert row["speedup"] == pytest.approx(2.5)
    assert row["realised"] == pytest.approx(2.5 / result["flops_reduction"])
    assert row["compact"]["examples_per_second"] == pytest.approx(1500)
    assert row["spread"]["p20"] < 2.5 < row["spread"]["p80"]
    assert "2.50× faster" in bench_table(result)


def test_both_networks_give_the_same_answers_on_every_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is timed as dense and as compact computes the same."""
    seen = {}

    def keep(calls: dict, seconds: float, **_: object) -> dict[str, list[float]]:
        def first(value: object) -> torch.Tensor:
            if isinstance(value, torch.Tensor):
                return value
            values = value if isinstance(value, list) else list(value.values())  # type: ignore[attr-defined]
            return torch.as_tensor(values[0])

        seen.update({kind: first(run()).clone() for kind, run in calls.items()})
        return {kind: [1.0, 1.0] for kind in calls}

    monkeypatch.setattr(module, "timings", keep)
    compact = _compact()
    with torch.no_grad():
        expected = compact(cnn_input())
    names = [name for name, b in BACKENDS.items() if b.installed() and name != "compile"]
    for name in names:
        bench(compact, example_inputs=cnn_input(), backends=[name], memory=False)
        for kind in ("dense", "compact"):
            torch.testing.assert_close(seen[kind], expected, rtol=1e-4, atol=1e-4)


def test_a_dense_model_has_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="no factorised layer"):
        bench(small_cnn(), example_inputs=cnn_input())


def test_a_backend_that_fails_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(BACKENDS["eager"]), "model", broken)
    notes: list[str] = []
    result = bench(
        _compact(), example_inputs=cnn_input(), backends=["eager"], memory=False, note=notes.append
    )
    assert result["backends"] == {}
    assert any("no such kernel" in note for note in notes)


@pytest.mark.slow
def test_peak_memory_is_that_of_the_network() -> None:
    """A layer of 64 MB needs at least that; its factors a fraction of it."""
    model = nn.Sequential(nn.Linear(4096, 4096)).eval()
    compact = factorize(model, make_plan(model, FixedRank(16)))
    result = bench(
        compact,
        example_inputs=torch.randn(1, 4096),
        backends=["onnxruntime", "eager"],
        seconds=0.1,
    )
    for row in result["backends"].values():
        dense, small = row["dense"]["peak_bytes"], row["compact"]["peak_bytes"]
        if dense is None:
            pytest.skip("peak memory is only known on Linux")
        assert dense > 60e6
        assert small < 0.5 * dense
