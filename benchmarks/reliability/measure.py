"""Run the reliability tests as often as docs/reliability.md says, and keep what they count.

    .venv/bin/python benchmarks/reliability/measure.py [-k EXPRESSION]

Each test counts its trials, and those that held; parametrised ones are added up. A test that is
chosen replaces its row in `results.json`; a failure stops nothing and is a row with fewer held than
tried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from _harness import conditions  # noqa: E402


def measured(log: Path) -> dict[str, dict[str, Any]]:
    """Rows by title, out of pytest's JUnit file."""
    rows: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(log).iter("testcase"):
        found = {p.get("name"): p.get("value") or "" for p in case.iter("property")}
        if "title" not in found or case.find("skipped") is not None:
            continue
        theme = case.get("classname", "").rpartition("test_")[2].removeprefix("reliability_")
        row = rows.setdefault(
            found["title"],
            {"test": found["title"], "theme": theme, "tried": 0, "held": 0, "seconds": 0.0},
        )
        row["tried"] += int(found["tried"])
        row["held"] += int(found["held"])
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 1)
        if found["note"]:
            row["note"] = found["note"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-k", default="", help="choose tests, as pytest does")
    options = parser.parse_args()
    tests = sorted(map(str, (ROOT / "tests").glob("test_reliability_*.py")))
    tests.append(str(ROOT / "tests" / "test_zoo.py::test_plan_factorise_copy_save_and_load"))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "--full", *tests]
        command += ["-k", options.k, f"--junitxml={log}", "-o", "junit_family=xunit1"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows = measured(log)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [row for row in kept if row["test"] not in rows]
    kept += [row | conditions() for row in rows.values()]
    kept.sort(key=lambda row: (row["theme"], row["test"]))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    for row in rows.values():
        print(f"{row['held']:>7} of {row['tried']:<7} {row['seconds']:>8} s  {row['test']}")
    sys.exit(code)


if __name__ == "__main__":
    main()
