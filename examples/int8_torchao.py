"""int8 after factorisation: linear layers, quantised in PyTorch by torchao."""

import copy
import tempfile
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
from sklearn.datasets import load_digits
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import rankprune as rp

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[600:], order[:600]


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return float((model(images[test]).argmax(1) == labels[test]).float().mean())


@torch.no_grad()
def seconds(models: dict[str, nn.Module]) -> dict[str, float]:
    """The fastest of some passes over the test images; the models take turns."""
    passes = {label: partial(model, images[test]) for label, model in models.items()}
    rounds = [{label: timeit(call, number=1) for label, call in passes.items()} for _ in range(20)]
    return {label: min(times[label] for times in rounds) for label in models}


def saved(model: nn.Module) -> tuple[int, dict]:
    """Size of the weights' file in bytes, and what is read from it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.pt")
        torch.save(model.state_dict(), file)
        return file.stat().st_size, torch.load(file, weights_only=True)


model = nn.Sequential(
    nn.Linear(64, 512),
    nn.ReLU(),
    nn.Linear(512, 512),
    nn.ReLU(),
    nn.Linear(512, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for _ in range(20):
    for batch in train[torch.randperm(len(train))].split(64):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()

# first the factors, while the weights are floating point
compact = rp.factorize(model, rp.make_plan(model, rp.Budget(params=0.5)))

# then int8: torchao sees the factors, which are ordinary nn.Linear layers
weights8, dynamic8 = copy.deepcopy(compact), copy.deepcopy(compact)
quantize_(weights8, Int8WeightOnlyConfig())
quantize_(dynamic8, Int8DynamicActivationInt8WeightConfig())

models = {
    "fp32 dense": model,
    "fp32 compact": compact,
    "int8 weights": weights8,
    "int8 dynamic": dynamic8,
}
times = seconds(models)
print(f"{'':13} accuracy    file   time")
for label, network in models.items():
    size, state = saved(network)
    # the weights from the file, quantised or not, take the place of those that were there
    loaded = copy.deepcopy(model if network is model else compact)
    loaded.load_state_dict(state, assign=True)
    time = times[label] / times["fp32 dense"]
    print(f"{label:13} {accuracy(loaded):8.2%} {size / 1000:5.0f}kB {time:5.2f}×")
