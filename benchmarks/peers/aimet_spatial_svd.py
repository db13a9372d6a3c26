"""AIMET's spatial SVD, manual mode with one ratio for all convolutions, to a FLOPs budget.

    .venv-aimet/bin/python aimet_spatial_svd.py resnet18 --out resnet18.onnx

Every convolution but the first becomes two, kh × 1 and 1 × kw, of ranks that are multiples of 8
unless told otherwise.
AIMET's automatic mode would choose a ratio per layer by the network's accuracy, which random
weights do not have. The ratio is found by bisection.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from decimal import Decimal

from _common import SHAPE, arguments, build, finish, flops, quiet, search
from torch import nn

with quiet():
    from aimet_torch.common.defs import CompressionScheme, CostMetric
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import ModuleCompRatioPair, SpatialSvdParameters


def decompose(network: str, ratio: float, multiplicity: int) -> nn.Module:
    """The network whose convolutions, all but the first, cost about `ratio` of theirs."""
    model = build(network)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    pairs = [ModuleCompRatioPair(m, Decimal(str(ratio))) for m in convolutions]
    parameters = SpatialSvdParameters(
        SpatialSvdParameters.Mode.manual,
        SpatialSvdParameters.ManualModeParams(pairs),
        multiplicity=multiplicity,
    )
    # AIMET leaves its choice in ./data.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), quiet():
        compact, _ = ModelCompressor.compress_model(
            model,
            eval_callback=lambda *_: 0.0,  # manual mode only reports it
            eval_iterations=None,
            input_shape=SHAPE,
            compress_scheme=CompressionScheme.spatial_svd,
            cost_metric=CostMetric.mac,
            parameters=parameters,
        )
    return compact.eval()


def main() -> None:
    args = arguments(__doc__).parse_args()
    logging.disable(logging.WARNING)
    dense = build(args.network)
    found = search(
        lambda ratio: decompose(args.network, ratio, args.round_to),
        flops(dense),
        args.flops,
        args.tolerance,
        low=0.02,
        high=1.0,
    )
    settings = {
        "scheme": "spatial_svd",
        "mode": "manual, the same comp_ratio for every convolution but the first",
        "cost_metric": "mac",
        "multiplicity": args.round_to,
        "comp_ratio": round(found.knob, 5),
    }
    finish("aimet-torch", args.network, dense, found, settings, args.out)


if __name__ == "__main__":
    main()
