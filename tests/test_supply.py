"""What the package depends on, and what importing it does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    requirement
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    if (requirement := Requirement(text)).name != "rankprune"
]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if line
)
# Releases that were malicious.
BAD = {"pytorch-lightning": {"2.6.2", "2.6.3"}}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_bad_releases_are_excluded_and_not_here() -> None:
    installed = [(_name(found.name), found.version) for found in distributions()]
    assert len(installed) > 20
    for name, version in [*installed, *((_name(n), v) for n, v in PINNED.items())]:
        assert version not in BAD.get(name, ()), (name, version)
    for requirement in REQUIREMENTS:
        for version in BAD.get(_name(requirement.name), ()):
            assert not requirement.specifier.contains(version), requirement


def test_every_dependency_is_pinned_for_development() -> None:
    pinned = {_name(name) for name in PINNED}
    assert {_name(requirement.name) for requirement in REQUIREMENTS} <= pinned
    for requirement in REQUIREMENTS:
        version = {_name(n): v for n, v in PINNED.items()}[_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_every_dependency_has_its_licence_and_its_reason() -> None:
    rows = re.findall(
        r"^\| ([\w-]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs/dependencies.md").read_text(), re.M
    )
    listed = {_name(name): (licence, why) for name, licence, why in rows if name != "package"}
    assert set(listed) == {_name(requirement.name) for requirement in REQUIREMENTS}
    for name, (licence, reason) in listed.items():
        assert len(reason) > 4, name
        assert not re.search(r"\bA?GPL", licence), name


IMPORTING = """
import os, sys, sysconfig
seen = []

def watch(event, arguments):
    if event == "open":
        # an integer is open already; torch's CUDA loader asks ldconfig, by way of /dev/null
        if not isinstance(arguments[0], int) and arguments[0] != os.devnull:
            seen.append((str(arguments[0]), arguments[2]))
    elif event.startswith(("socket.", "subprocess.", "os.system", "urllib.")):
        seen.append((event, 0))

sys.addaudithook(watch)
import rankprune
package = os.path.dirname(rankprune.__file__)
standard = sysconfig.get_path("stdlib")
outside = [name for name, _ in seen if not name.startswith((package, standard))]
assert not outside, outside
seen.clear()
for name in rankprune.__all__:
    getattr(rankprune, name)
strange = [
    (name, flags)
    for name, flags in seen
    if not os.path.isabs(name) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
]
"""


@pytest.mark.parametrize("what", ["network", "files"])
def test_importing_opens_no_connection_and_no_file_elsewhere(what: str) -> None:
    """Bytecode apart, which Python keeps from being written here."""
    check = {
        "network": "bad = [n for n, _ in strange if n.startswith(('socket.', 'urllib.'))]",
        "files": "bad = [n for n, flags in strange if flags]",
    }[what]
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"{IMPORTING}\n{check}\nassert not bad, bad"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_vulnerabilities_have_an_address() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "private" in text
    assert "weights_only" in text
