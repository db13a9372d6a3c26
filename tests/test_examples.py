"""The examples run, and add no more than three lines to a loop."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))


def test_there_is_one_for_each_framework() -> None:
    expected = ["accelerate_loop.py", "hf_trainer.py", "lightning_trainer.py", "plain_pytorch.py"]
    assert expected == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_at_most_three_lines_are_added(name: str) -> None:
    """Between the markers, every line that is rankprune's is marked as such."""
    lines = [line.strip() for line in (FOLDER / name).read_text("utf-8").splitlines()]
    assert lines.count("# begin") == lines.count("# end") == 1
    loop = lines[lines.index("# begin") + 1 : lines.index("# end")]
    added = [line for line in loop if line.endswith("  # rankprune")]
    assert 1 <= len(added) <= 3
    words = re.compile(r"\b(rp|rankprune|trp|prune|RankPruneCallback)\b")
    assert [line for line in loop if words.search(line)] == added


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_the_compact_model_is_as_accurate(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracies = re.search(r"projected ([\d.]+)%, compact ([\d.]+)%", done.stdout)
    assert accuracies is not None, done.stdout
    projected, compact = map(float, accuracies.groups())
    assert projected >= 90
    # a picture on the brink may tip over
    assert abs(projected - compact) <= 0.2
    flops = re.search(r"^FLOPs +\S+ → \S+ \(([\d.]+)×\)$", done.stdout, re.MULTILINE)
    assert flops is not None, done.stdout
    assert float(flops[1]) >= 2.4
    assert not list(tmp_path.iterdir())
