"""Settings that every test shares: one thread, a fixed seed, reproducible examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

try:
    import hypothesis
except ImportError:  # a bare machine with a GPU runs test_cuda.py without it
    pass
else:
    # Examples come from the test's name, not from chance or from an earlier run.
    hypothesis.settings.register_profile(
        "rankprune", deadline=None, derandomize=True, database=None, print_blob=False
    )
    hypothesis.settings.load_profile("rankprune")
torch.set_num_threads(1)
# transformers asks the Hub also about folders; no test needs an answer
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype as it was."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    found = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or all other tests would run in it
    assert found is dtype


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="as many trials as docs/reliability.md says, large networks too",
    )


class Trials:
    """Attempts at something, counted; those that raise are not held.

    Attributes:
        note: a further figure, for the docs.
    """

    def __init__(self, full: bool) -> None:
        self.full = full
        self.tried = self.held = 0
        self.note = ""

    def count(self, full: int, quick: int) -> range:
        """As many as asked for: all with --full, fewer in the ordinary slow tests."""
        return range(full if self.full else quick)

    @contextmanager
    def one(self) -> Iterator[None]:
        self.tried += 1
        yield
        self.held += 1


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Counts that benchmarks/reliability/measure.py reads from the test's properties."""
    found = Trials(request.config.getoption("--full"))
    yield found
    title = (request.function.__doc__ or request.node.name).splitlines()[0].rstrip(".")
    request.node.user_properties += [
        ("title", title),
        ("tried", found.tried),
        ("held", found.held),
        ("note", found.note),
    ]
