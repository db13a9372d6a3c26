"""Other libraries' compression, then the same training as everyone's.

A peer compresses in an environment of its own (`../../peers`), once for the dense weights and the
target; the file that it leaves is all that the training needs, so this can go on where the peer is
not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from case import Case, Method, Result
from compressed import fingerprint, load, location
from loop import labels_only, train
from safetensors.torch import save_model
from torch import nn

BENCHMARKS = Path(__file__).parent.parent.parent
FOLDER = BENCHMARKS / "cifar10" / "compressed"
#: A peer's name to that of its environment, and to its script.
PEERS = {
    "aimet-spatial-svd": ("aimet", "cifar10_aimet.py"),
    "torch-pruning": ("torch-pruning", "cifar10_torch_pruning.py"),
}


def peer(case: Case, *, name: str, soft: bool = False) -> Result:
    """`soft` learns from the dense network's answers too."""
    compact = compressed(case, name)
    train(compact, case.data, case.training, loss=case.taught() if soft else labels_only)
    return Result(compact)


def compressed(case: Case, name: str) -> nn.Module:
    """What the peer makes of the dense network: from its file, which is made if it is missing."""
    dense = fingerprint(case.trained)
    path = location(FOLDER, name, case.network, case.target, dense)
    if not path.exists():
        _compress(case, name)
    model, about = load(path)
    if about["dense"] != dense or about["target"] != case.target:
        # of other weights with the same name, or of a target that differs past what names show
        path.unlink()
        _compress(case, name)
        model, _ = load(path)
    return model.to(next(case.trained.parameters()).device)


def _compress(case: Case, name: str) -> None:
    environment, script = PEERS[name]
    python = BENCHMARKS / "peers" / f".venv-{environment}" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"{name}: no network for {case.target} in {FOLDER}, and no environment to make it in: "
            f"benchmarks/peers/make_env.sh {environment}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "dense.safetensors"
        save_model(case.dense().cpu(), str(weights))
        command = [python, BENCHMARKS / "peers" / script, "--weights", weights]
        command += ["--model", case.network, "--target", str(case.target), "--data", case.source]
        # the peer's environment has its own packages, and stdout is for rows
        alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([*command, "--out", FOLDER], check=True, stdout=sys.stderr, env=alone)


METHODS: dict[str, Method] = {
    f"{name}{suffix}": partial(peer, name=name, soft=soft)
    for name in PEERS
    for suffix, soft in (("", False), ("-distilled", True))
}
