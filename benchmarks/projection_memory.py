"""Peak memory of projecting all layers, beyond what the model holds: `svd` against rankprune."""

from __future__ import annotations

from typing import Any

import torch
from _harness import arguments, finish, peak_memory, say
from _networks import NETWORKS, Training
from projection import Projection


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for name in options.networks or (("resnet18",) if options.quick else ("resnet18", "resnet50")):
        found[name] = {}
        for scheme in NETWORKS[name].schemes:
            projection = Projection(Training(NETWORKS[name], batch=1, size=(3, 32, 32)), scheme)
            peaks: dict[str, int] = {}
            # the controller's first call is cold; svd in the middle leaves it weights at low rank
            for kind, call in (
                ("cold", projection.controller.project),
                ("svd", projection.by_svd),
                ("steady", projection.controller.project),
            ):
                peaks[kind] = peak_memory(call)
            found[name][scheme] = peaks
            text = ", ".join(f"{kind} {peak / 2**20:.0f} MiB" for kind, peak in peaks.items())
            say(options, f"{name} {scheme}: {text}")
    finish("projection_memory", {"peak_bytes": found}, options)


if __name__ == "__main__":
    main()
