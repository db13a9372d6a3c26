"""Fills the tables of docs/*.md from the results; run after measuring."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _harness import RESULTS
from cifar10.means import ONE_VIEW, means

DOCS = Path(__file__).parent.parent / "docs"


def _results(prefix: str, suffix: str = "") -> dict[str, dict[str, Any]]:
    order = (
        "resnet20",
        "resnet18",
        "resnet50",
        "vit_b_16",
        "llama_7b_block",
        "llama_7b_down",
        "llama_7b_up",
    )
    paths = {name: RESULTS / f"{prefix}-{name}{suffix}.json" for name in order}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}


def _range(ratio: dict[str, float]) -> str:
    low, high = ratio["min"], ratio["max"]
    return f"{ratio['median']:.1f}" + ("" if low == high else f" ({low:.1f} to {high:.1f})")


def projection(suffix: str = "") -> str:
    lines = [
        "| network | scheme | `svd`, all layers | cold | steady |",
        "|---|---|---|---|---|",
    ]
    for name, result in _results("projection", suffix).items():
        for scheme, entry in result["networks"][name]["schemes"].items():
            cold, steady = entry["cold"], entry["steady"]
            lines.append(
                f"| {name} | {scheme} | {1e3 * cold['seconds']['svd']['median']:,.0f} ms "
                f"| {_range(cold['speedup'])} × | {_range(steady['speedup'])} × |"
            )
    return "\n".join(lines)


def overhead(suffix: str = "") -> str:
    lines = [
        "| network | plain step | TRP, m = 20 | TRP, m = 1 | authors' algorithm |",
        "|---|---|---|---|---|",
    ]
    for name, result in _results("training_overhead", suffix).items():
        entry = result[name]
        plain = entry["spread"]["seconds_a_step"]["plain"]["median"]
        cells = " | ".join(f"{entry[key]:.3f} ×" for key in ("m20", "m1", "authors"))
        lines.append(f"| {name} | {1e3 * plain:,.{0 if plain > 0.1 else 1}f} ms | {cells} |")
    return "\n".join(lines)


def shared() -> str:
    lines = ["| network | phase | one | two | two / one |", "|---|---|---|---|---|"]
    for name, result in _results("projection_shared").items():
        for phase in ("cold", "steady"):
            seconds = {k: 1e3 * v["median"] for k, v in result[phase]["seconds"].items()}
            lines.append(
                f"| {name} | {phase} | {seconds['one']:.0f} ms | {seconds['two']:.0f} ms "
                f"| {result[phase]['two_by_one']['median']:.2f} |"
            )
    return "\n".join(lines)


def memory() -> str:
    path = RESULTS / "projection_memory.json"
    lines = ["| network | scheme | `svd` | cold | steady |", "|---|---|---|---|---|"]
    for name, schemes in json.loads(path.read_text())["peak_bytes"].items():
        for scheme, peaks in schemes.items():
            cells = " | ".join(f"{peaks[k] / 2**20:.0f} MiB" for k in ("svd", "cold", "steady"))
            lines.append(f"| {name} | {scheme} | {cells} |")
    return "\n".join(lines)


def _latency(part: str) -> list[dict[str, Any]]:
    path = RESULTS / "latency.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()).get(part, []) if path.exists() else []
    return rows


def latency_budget() -> str:
    lines = [
        "| network | batch | threads | dense | compact | of the dense time | FLOPs | realised |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _latency("budget"):
        if "refused" in row:
            lines.append(
                f"| {row['network']} | {row['batch']} | {row['threads']} | refused | | | | |"
            )
            continue
        lines.append(
            f"| {row['network']} | {row['batch']} | {row['threads']} | {row['dense_ms']:,.1f} ms "
            f"| {row['compact_ms']:,.1f} ms | {row['latency']:.3f} "
            f"| {row['flops_reduction']:.2f} × fewer | {row['realised']:.2f} |"
        )
    return "\n".join(lines)


def flops_budget() -> str:
    lines = [
        "| network | of the dense time | FLOPs | layers factorised |",
        "|---|---|---|---|",
    ]
    for row in _latency("zoo"):
        if "left_dense" in row:
            closest = ", ".join(f"{key} {value:.2f}" for key, value in row["closest"].items())
            lines.append(f"| {row['network']} | refused: closest {closest} | | |")
            continue
        lines.append(
            f"| {row['network']} | {row['latency']:.3f} | {row['flops_reduction']:.2f} × fewer "
            f"| {row['factorised']} of {row['layers']} |"
        )
    return "\n".join(lines)


def realised() -> str:
    backends = ("onnxruntime", "openvino", "compile", "eager")
    lines = [
        "| network | chosen by | FLOPs | " + " | ".join(backends) + " |",
        "|---|---|---|" + "---|" * len(backends),
    ]
    names = {"flops": "flops=0.5", "flops_and_latency": "flops=0.5, latency=0.54"}
    for row in _latency("realised"):
        for key, label in names.items():
            if "backends" not in row.get(key, {}):
                continue
            cells = [
                f"{found['speedup']:.2f} × ({found['realised']:.2f})"
                if (found := row[key]["backends"].get(backend))
                else ""
                for backend in backends
            ]
            lines.append(
                f"| {row['network']} | {label} | {row[key]['flops_reduction']:.2f} × "
                f"| {' | '.join(cells)} |"
            )
        for peer, found in row.get("peers", {}).items():
            speed = f"{found['speedup']['median']:.2f} × ({found['realised']:.2f})"
            lines.append(
                f"| {row['network']} | {peer} {found['version']} "
                f"| {found['flops_reduction']:.2f} × | {speed} | | | |"
            )
    return "\n".join(lines)


def _pretrained() -> list[dict[str, Any]]:
    path = Path(__file__).parent / "pretrained" / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def by_kept(model: str) -> Callable[[], str]:
    """Methods by the share of the linear layers' parameters that they keep."""

    def table() -> str:
        rows = [r for r in _pretrained() if r["model"] == model and "kept_exactly" in r]
        if not rows:
            return ""
        shares = sorted({row["kept_params"] for row in rows}, reverse=True)
        names = list(dict.fromkeys(row["method"] for row in rows))
        names.sort(key=lambda name: max(r["tokens_or_images"] for r in rows if r["method"] == name))
        found = {(r["method"], r["kept_params"]): r for r in rows}
        lines = [
            f"| {rows[0]['metric']}; dense {rows[0]['dense']} | "
            + " | ".join(f"{share:.0%}" for share in shares)
            + " | tokens or sentences |",
            "|---|" + "---|" * (len(shares) + 1),
        ]
        for name in names:
            own = [found.get((name, share)) for share in shares]
            cells = " | ".join("" if r is None else f"{r['value']:,}" for r in own)
            seen = max(r["tokens_or_images"] for r in own if r is not None)
            lines.append(f"| {name} | {cells} | {seen:,} |")
        return "\n".join(lines)

    return table


def efficientnet() -> str:
    rows = [r for r in _pretrained() if r["model"] == "EfficientNet-Lite0"]
    methods = ("svd", "svd+bn", "aware+bn", "sensitive+bn")
    lines = ["| FLOPs | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for flops in sorted({row["flops"] for row in rows}, reverse=True):
        cells = []
        for method in methods:
            own = {r["metric"]: r for r in rows if r["flops"] == flops and r["method"] == method}
            values = [f"{found['value']:.1f}" for found in own.values()]
            cells.append(" / ".join(reversed(values)))
        lines.append(f"| {flops:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _note(row: dict[str, Any]) -> str:
    return f" ({row['note']})" if "note" in row else ""


def reliability(theme: str) -> Callable[[], str]:
    """Trials of one theme."""

    def table() -> str:
        rows = json.loads((DOCS.parent / "benchmarks/reliability/results.json").read_text())
        lines = ["| what | held | of | seconds |", "|---|---|---|---|"]
        lines += [
            f"| {row['test']}{_note(row)} "
            f"| {row['held']:,} | {row['tried']:,} | {row['seconds']:,.0f} |"
            for row in rows
            if row["theme"] == theme
        ]
        return "\n".join(lines)

    return table


def _cifar10(file: str, model: str) -> list[dict[str, Any]]:
    path = DOCS.parent / "benchmarks/cifar10" / file
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return means([row for row in rows if row["model"] == model])


def cifar10(model: str, *, trained: bool = True) -> Callable[[], str]:
    """Methods by the FLOPs reduction that they were asked for: means over seeds."""

    def table() -> str:
        rows = [r for r in _cifar10("results.json", model) if (r["epochs"] > 0) == trained]
        rows = [r for r in rows if r["start"] not in ("random", "resnet56-cifar10-original")]
        rows.sort(key=lambda r: (r["epochs"], r["target"] or 0, -r["accuracy"]))
        lines = [
            "| epochs | asked for | method | FLOPs | parameters | accuracy (− dense) "
            "| factors − dense layers | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            target = "" if row["target"] is None else f"{row['target']:g} ×"
            projected, dense = row["projected_accuracy"], row["dense_accuracy"]
            lost = "" if projected is None else f"{row['accuracy'] - projected:.2f}"
            below = f" ({row['accuracy'] - dense:+.2f})"
            if dense is None or row["method"] == "dense":
                below = ""
            lines.append(
                f"| {row['epochs']} | {target} | {row['method']} | {row['flops_reduction']:.2f} × "
                f"| {row['params_reduction']:.2f} × | {row['accuracy']:.2f}{below} | {lost} "
                f"| {row['seeds']} |"
            )
        return "\n".join(lines)

    return table


def ablations(model: str) -> Callable[[], str]:
    """What the recipe is without each piece, on the images kept back: means over seeds."""

    def table() -> str:
        rows = _cifar10("validation.json", model)
        alike = ("method", "start", "target", "epochs", "lr")
        by_key = {tuple(row[name] for name in alike): row for row in rows}
        rows.sort(key=lambda r: (r["epochs"], r["target"], -r["accuracy"]))
        lines = [
            "| epochs | asked for | method | FLOPs | accuracy | against `ours` | seeds |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            recipe = "ours" + ONE_VIEW * row["method"].endswith(ONE_VIEW)
            other = by_key.get((recipe, *(row[name] for name in alike[1:])))
            gain = "" if other is None else f"{row['accuracy'] - other['accuracy']:+.2f}"
            lines.append(
                f"| {row['epochs']} | {row['target']:g} × | {row['method']} "
                f"| {row['flops_reduction']:.2f} × | {row['accuracy']:.2f} | {gain} "
                f"| {row['seeds']} |"
            )
        return "\n".join(lines)

    return table


def separable() -> str:
    """Speed-ups over the dense layer, as torch's exporter writes it in brackets."""
    lines = [
        "| runtime | layer | rank | `decoupled` | `depthwise` | `spatial`, as many FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads((RESULTS / "separable.json").read_text())["layers"]:
        speed = {name: f"{value['median']:.2f}" for name, value in row["speedups"].items()}
        channels, side = row["channels"], row["side"]
        both = " | ".join(
            f"{speed[form]} ×" + (f" ({speed[torchs]} ×)" if torchs in speed else "")
            for form, torchs in (
                ("decoupled", "decoupled by torch"),
                ("depthwise", "depthwise by torch"),
            )
        )
        lines.append(
            f"| {row['backend']} | {channels} → {channels} on {side} × {side} | {row['rank']} "
            f"| {both} | {speed['spatial']} × |"
        )
    return "\n".join(lines)


def mutation() -> str:
    """How many mutants of each module the tests notice."""
    rows = json.loads((DOCS.parent / "benchmarks/reliability/mutation.json").read_text())
    lines = ["| module | noticed | of | places |", "|---|---|---|---|"]
    lines += [
        f"| `{row['module']}` | {row['killed']} | {row['tried']} | {row['places']} |"
        for row in rows
    ]
    return "\n".join(lines)


PAGES = {
    "cifar10.md": {
        "resnet20": cifar10("resnet20"),
        "resnet20 untrained": cifar10("resnet20", trained=False),
        "resnet56": cifar10("resnet56"),
        "vgg": cifar10("vgg"),
        "ablations": ablations("resnet20"),
    },
    "projection.md": {
        "projection": projection,
        "memory": memory,
        "overhead": overhead,
        "projection on a GPU": partial(projection, "-cuda"),
        "overhead on a GPU": partial(overhead, "-cuda"),
        "shared": shared,
    },
    "deployment.md": {
        "latency budget": latency_budget,
        "flops budget": flops_budget,
        "realised": realised,
        "separable": separable,
    },
    "pretrained.md": {
        "smollm2": by_kept("SmolLM2-135M-Instruct"),
        "minilm": by_kept("all-MiniLM-L6-v2"),
        "efficientnet": efficientnet,
    },
    "reliability.md": {
        theme: reliability(theme)
        for theme in ("crashes", "resume", "files", "numbers", "long", "concurrency", "zoo")
    }
    | {"mutation": mutation},
}


def main() -> None:
    for name, tables in PAGES.items():
        page = DOCS / name
        text = page.read_text()
        for title, table in tables.items():
            mark = f"<!-- table: {title} -->"
            filled = f"{mark}\n{table()}\n<!-- end -->"
            text = re.sub(
                rf"{mark}(\n(?:(?!<!-- table).)*?<!-- end -->)?",
                lambda _, f=filled: f,
                text,
                flags=re.DOTALL,
            )
        page.write_text(text)


if __name__ == "__main__":
    main()
