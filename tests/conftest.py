"""Settings that every test shares: one thread, a fixed seed, reproducible examples."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

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
    assert torch.get_default_dtype() is dtype
