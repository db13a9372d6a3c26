"""int8 after factorisation: a small CNN, exported and quantised by ONNX Runtime's own tools."""

import tempfile
from functools import partial
from pathlib import Path
from timeit import timeit

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rankprune as rp

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[600:], order[:600]


class Calibration(CalibrationDataReader):
    """Batches of training images, from which the ranges of the activations are read."""

    def __init__(self, images: Tensor, name: str) -> None:
        self.batches = iter([{name: batch.numpy()} for batch in images.split(32)])

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def accuracy(file: Path) -> float:
    answers = session(file).run(None, {input_name: images[test].numpy()})[0]
    return float((torch.tensor(answers).argmax(1) == labels[test]).float().mean())


def seconds(files: dict[str, Path]) -> dict[str, float]:
    """The fastest of some passes over the test images; the files take turns."""
    inputs = {input_name: images[test].numpy()}
    passes = {label: partial(session(file).run, None, inputs) for label, file in files.items()}
    rounds = [{label: timeit(call, number=1) for label, call in passes.items()} for _ in range(20)]
    return {label: min(times[label] for times in rounds) for label in files}


model = nn.Sequential(
    block(1, 32),
    block(32, 64),
    block(64, 96, stride=2),
    block(96, 128),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(128, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
options = rp.TRP(rank=rp.Budget(flops=0.5), descent=100)
trp = rp.attach(model, optimizer, options, example_inputs=images[:1])
for _ in range(8):
    for batch in train[torch.randperm(len(train))].split(64):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# first the factors, while the weights are floating point
compact = rp.factorize(model, trp.finish())

with tempfile.TemporaryDirectory() as folder:
    dense32, compact32, prepared, compact8 = (
        Path(folder, f"{name}.onnx") for name in ("dense", "compact", "prepared", "int8")
    )
    rp.export_onnx(model, dense32, example_inputs=images[:1])
    rp.export_onnx(compact, compact32, example_inputs=images[:1])
    input_name = session(compact32).get_inputs()[0].name

    # then int8, on the factors: every one is a Conv or Gemm with scales of its own
    quant_pre_process(compact32, prepared)
    quantize_static(
        prepared,
        compact8,
        Calibration(images[train[:256]], input_name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
    )

    files = {"fp32 dense": dense32, "fp32 compact": compact32, "int8 compact": compact8}
    times = seconds(files)
    print(f"{'':13} accuracy    file   time")
    for label, file in files.items():
        size, time = file.stat().st_size / 1000, times[label] / times["fp32 dense"]
        print(f"{label:13} {accuracy(file):8.2%} {size:5.0f}kB {time:5.2f}×")
