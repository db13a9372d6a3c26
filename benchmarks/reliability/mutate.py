"""Mutation testing of the modules that decide what a network becomes; the score is kept.

    .venv/bin/python -m pip install cosmic-ray
    .venv/bin/python benchmarks/reliability/mutate.py [--sample 40] [--jobs 2] [--again] [MODULE …]

cosmic-ray lists the mutants. A sample of places is drawn for each module (one mutant a place, a
fixed seed, none in annotations, which are never run), and the tests of `TESTS` run against each in
a copy of the tree: the module's own file first, until one fails. `mutation.json` keeps the score
and every mutant that no test noticed; with `--again` only those are tried once more.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

HERE = Path(__file__).parent
RESULTS = HERE / "mutation.json"
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from _harness import conditions  # noqa: E402

#: The tests that use each module, its own first.
TESTS = {
    "schemes": ["test_schemes.py", "test_factorize.py"],
    "linalg": ["test_linalg.py", "test_factorize.py"],
    "ranks": ["test_ranks.py", "test_planner.py"],
    "planner": ["test_planner.py", "test_budget.py", "test_factorize.py"],
    "factorize": ["test_factorize.py", "test_calibrate.py"],
}
CONFIG = """[cosmic-ray]
module-path = "src/rankprune/{module}.py"
timeout = 1200.0
excluded-modules = []
test-command = "{command}"
[cosmic-ray.distributor]
name = "local"
"""


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations lie: ((line, column), (line, column)) from start to end."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for notation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(notation, ast.expr):
                end = (notation.end_lineno or 0, notation.end_col_offset or 0)
                found.append(((notation.lineno, notation.col_offset), end))
    return found


def draw(session: Path, source: str, sample: int) -> int:
    """Leave one mutant in each of at most `sample` places to be run; returns how many places."""
    spans = annotated(source)
    with use_db(session, WorkDB.Mode.open) as db:
        items = sorted(db.pending_work_items, key=lambda item: str(item.mutations))
        random.Random(0).shuffle(items)
        places: dict[Any, str] = {}
        for item in items:
            start = item.mutations[0].start_pos
            if not any(first <= start < last for first, last in spans):
                places.setdefault(start, item.job_id)
        chosen = set(list(places.values())[:sample])
        for item in items:
            if item.job_id not in chosen:
                db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    return len(places)


def redraw(session: Path, lines: list[str], survivors: list[dict[str, Any]]) -> None:
    """Leave the mutants of the lines and operators of earlier survivors to be run."""
    wanted = {(mutant["source"], mutant["operator"]) for mutant in survivors}
    with use_db(session, WorkDB.Mode.open) as db:
        for item in list(db.pending_work_items):
            spec = item.mutations[0]
            place = lines[spec.start_pos[0] - 1].strip(), spec.operator_name.rpartition("/")[2]
            if place not in wanted:
                db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def described(spec: MutationSpec, result: WorkResult, lines: list[str]) -> dict[str, Any]:
    """One surviving mutant: the line as it is, and as it was changed."""
    line = spec.start_pos[0]
    added = [d[1:].strip() for d in (result.diff or "").splitlines() if d[:1] == "+" != d[1:2]]
    return {
        "line": line,
        "operator": spec.operator_name.rpartition("/")[2],
        "source": lines[line - 1].strip(),
        "mutant": " ".join(added),
    }


def mutated(module: str, sample: int, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The row of one module: its sample, or what survived earlier, is run in a copy of the tree."""
    start = time.perf_counter()
    files = " ".join([f"src/rankprune/{module}.py", *(f"tests/{test}" for test in TESTS[module])])
    command = f"{sys.executable} -m pytest -q -x -n 0 -p no:cacheprovider -m 'not slow' {files}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "config.toml").write_text(CONFIG.format(module=module, command=command))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        cosmic_ray = [sys.executable, "-m", "cosmic_ray.cli"]

        def run(action: str, *arguments: str) -> None:
            subprocess.run(
                [*cosmic_ray, action, "config.toml", *arguments],
                cwd=folder,
                env=environment,
                check=True,
            )

        run("baseline")
        run("init", "session.sqlite")
        source = (folder / "src/rankprune" / f"{module}.py").read_text()
        lines = source.splitlines()
        if earlier:
            redraw(folder / "session.sqlite", lines, earlier["survivors"])
        else:
            places = draw(folder / "session.sqlite", source, sample)
        run("exec", "session.sqlite")
        with use_db(folder / "session.sqlite", WorkDB.Mode.open) as db:
            specs = {item.job_id: item.mutations[0] for item in db.work_items}
            results = [(specs[job], result) for job, result in db.results]
    tried = [(s, r) for s, r in results if r.worker_outcome == WorkerOutcome.NORMAL]
    if earlier:
        outcomes: defaultdict[tuple[str, str], set[TestOutcome]] = defaultdict(set)
        for spec, result in tried:
            mutant = described(spec, result, lines)
            outcomes[mutant["source"], mutant["mutant"]].add(result.test_outcome)
        found = [(m, outcomes[m["source"], m["mutant"]]) for m in earlier["survivors"]]
        alive = [mutant for mutant, seen in found if TestOutcome.SURVIVED in seen]
        # the source may have lost some
        count = earlier["tried"] - sum(not seen for _, seen in found)
        return earlier | {"tried": count, "killed": count - len(alive), "survivors": alive}
    alive = [described(s, r, lines) for s, r in tried if r.test_outcome == TestOutcome.SURVIVED]
    return {
        "module": module,
        "places": places,
        "tried": len(tried),
        "killed": len(tried) - len(alive),
        "seconds": round(time.perf_counter() - start),
        "survivors": alive,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="default: all")
    parser.add_argument("--sample", type=int, default=40, help="places tried in each module")
    parser.add_argument("--jobs", type=int, default=2, help="modules at a time")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    options = parser.parse_args()

    def one(module: str) -> dict[str, Any]:
        earlier = {row["module"]: row for row in json.loads(RESULTS.read_text())}
        return mutated(module, options.sample, earlier[module] if options.again else None)

    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(one, options.modules):
            kept = json.loads(RESULTS.read_text())
            kept = [old for old in kept if old["module"] != row["module"]] + [row | conditions()]
            kept.sort(key=lambda row: list(TESTS).index(row["module"]))
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{row['module']:>10}: {row['killed']} of {row['tried']} noticed")
            for mutant in row["survivors"]:
                print(f"    line {mutant['line']}: {mutant['source']}  →  {mutant['mutant']}")


if __name__ == "__main__":
    main()
