"""ONNX files: the same answers as torch, standard operators, whole or not there."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from cases import (
    Conv1D,
    SharedModule,
    TiedConvs,
    TiedEmbedding,
    cnn_input,
    mlp,
    small_cnn,
)
from rankprune import (
    ConfigError,
    ExportError,
    FileError,
    FixedRank,
    MissingExtraError,
    Ratio,
    export,
    export_onnx,
    factorize,
    make_plan,
)
from rankprune.export import onnx_difference, with_batch
from rankprune.low_rank import LowRank, low_rank_layers

EXACT = 1e-5


def _answers(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """What plain ONNX Runtime says, with nothing of ours in between."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def _distance(path: Path, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model.eval()(x)
    (received,) = _answers(path, x)
    assert received.shape == expected.shape
    largest = float(expected.abs().max())
    assert largest > 1e-3
    return float((torch.from_numpy(received) - expected).abs().max()) / largest


def _check(path: Path, model: nn.Module, x: Tensor, opset: int = 20) -> None:
    """Three batches, which share no example; operators of the standard alone."""
    generator = torch.Generator().manual_seed(5)
    for batch in (1, 2, 7):
        fresh = x[torch.arange(batch) % len(x)]
        if x.is_floating_point():
            fresh = torch.randn(fresh.shape, generator=generator)
        assert _distance(path, model, fresh) <= EXACT
    document = onnx.load(path)
    onnx.checker.check_model(document, full_check=True)
    assert [(item.domain, item.version) for item in document.opset_import] == [("", opset)]
    assert {node.domain for node in document.graph.node} == {""}
    assert not document.functions


# -- networks, dense and factorised ----------------------------------------------------------------


def _two_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, (3, 2), padding="same"),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", stride=(2, 1)),
        nn.Tanh(),
        nn.Conv2d(8, 6, 3, groups=2, dilation=(1, 2), padding=(1, 2), bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 4, (2, 3), stride=(1, 2)),
    )


def _one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Conv1d(8, 8, 4, padding="same", groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(8, 4, 3, stride=2, output_padding=1),
    )


def _three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(4, 8, 3, padding="same"),
        nn.BatchNorm3d(8),
        nn.Tanh(),
        nn.Conv3d(8, 8, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode="circular"),
        nn.Tanh(),
        nn.ConvTranspose3d(8, 4, 2, stride=2, groups=2),
    )


def _linear() -> nn.Module:
    return nn.Sequential(Conv1D(20, 12), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 9, bias=False))


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "small_cnn": (small_cnn, (2, 3, 12, 12), ("auto", "decoupled", "depthwise")),
    "2-d": (_two_dimensional, (2, 4, 9, 8), ("channel", "spatial", "decoupled", "depthwise")),
    "1-d": (_one_dimensional, (2, 4, 15), ("channel", "decoupled", "depthwise")),
    "3-d": (_three_dimensional, (2, 4, 4, 5, 4), ("channel", "decoupled", "depthwise")),
    "linear": (_linear, (2, 5, 12), ("auto",)),
    "tied": (TiedConvs, (2, 12, 6, 6), ("auto",)),
    "shared": (SharedModule, (2, 20), ("auto",)),
}
# what the others show too
_SLOW = ("small_cnn", "tied", "shared")
NETWORKS = [
    pytest.param(
        build,
        shape,
        scheme,
        id=f"{name}-{scheme or 'dense'}",
        marks=[pytest.mark.slow] * (name in _SLOW or (scheme is None and name != "2-d")),
    )
    for name, (build, shape, schemes) in _NETWORKS.items()
    for scheme in (None, *schemes)
]


def _perturbed(model: nn.Module) -> nn.Module:
    """Weights, biases and statistics that are no longer those of a fresh network."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                spread = float(tensor.std(correction=0)) or 0.05
                tensor.add_(0.3 * spread * torch.randn_like(tensor).abs())
    return model


def _compact(model: nn.Module, scheme: str | None) -> nn.Module:
    if scheme is None:
        return model
    compact = factorize(model, make_plan(model, Ratio(0.5), scheme=scheme, guard=False))
    assert len(low_rank_layers(compact)) >= 2
    return compact


@pytest.mark.parametrize(("build", "shape", "scheme"), NETWORKS)
def test_onnx_runtime_answers_as_torch_does(
    tmp_path: Path, build: Callable[[], nn.Module], shape: tuple[int, ...], scheme: str | None
) -> None:
    model, x = _compact(_perturbed(build()), scheme), torch.randn(shape)
    difference = export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert difference is not None
    assert difference <= EXACT
    _check(tmp_path / "m.onnx", model, x)
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "BatchNormalization" not in operators
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("opset", [18, pytest.param(21, marks=pytest.mark.slow)])
def test_the_opset_is_the_one_asked_for(tmp_path: Path, opset: int) -> None:
    model, x = small_cnn(), cnn_input()
    export_onnx(model, tmp_path / "m.onnx", example_inputs=x, opset=opset)
    _check(tmp_path / "m.onnx", model, x, opset)


def test_a_batch_of_one_is_enough_to_open_it(tmp_path: Path) -> None:
    model = small_cnn()
    export_onnx(model, tmp_path / "m.onnx", example_inputs=cnn_input(1))
    _check(tmp_path / "m.onnx", model, cnn_input(1))


def test_a_fixed_batch_is_the_examples(tmp_path: Path) -> None:
    model, x = small_cnn(), cnn_input(3)
    difference = export_onnx(
        model, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False, check=True
    )
    assert difference is not None
    assert difference <= EXACT
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [item.dim_value for item in shape.dim] == [3, 3, 12, 12]
    assert _distance(tmp_path / "m.onnx", model, x) <= EXACT
    with pytest.raises(Exception, match="Got: 2 Expected: 3"):
        _answers(tmp_path / "m.onnx", cnn_input(2))


@pytest.mark.usefixtures("quick")
def test_without_a_check_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "onnx_difference", lambda *_: pytest.fail("compared"))
    model, x = mlp(), torch.randn(2, 16)
    assert export_onnx(model, tmp_path / "m.onnx", example_inputs=x, check=False) is None
    _check(tmp_path / "m.onnx", model, x)


# -- inputs and outputs ----------------------------------------------------------------------------


class _Two(nn.Module):
    """Two inputs that must not be taken for each other, a number, and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor, scale: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        return self.layer(a) * scale - b, {"b": b.exp(), "sign": b > 0}


_A, _B = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 2, 12).view(3, 4)


@pytest.mark.parametrize(
    "inputs",
    [
        (_A, _B),
        (_A, _B, 5.0),
        {"a": _A, "b": _B},
        {"b": _B, "a": _A},
        {"b": _B, "scale": 3.0, "a": _A},
    ],
    ids=["tuple", "number", "mapping", "reordered", "reordered_number"],
)
def test_several_inputs_and_outputs(
    tmp_path: Path, inputs: tuple[Any, ...] | Mapping[str, Any]
) -> None:
    model = _Two()
    path = tmp_path / "m.onnx"
    difference = export_onnx(model, path, example_inputs=inputs)
    assert difference is not None
    assert difference <= EXACT
    session = onnxruntime.InferenceSession(str(path))
    assert {item.name for item in session.get_inputs()} >= {"a", "b"}
    scale = inputs[2] if isinstance(inputs, tuple) and len(inputs) > 2 else 2.0
    scale = inputs.get("scale", 2.0) if isinstance(inputs, Mapping) else scale
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    received = session.run(None, {"a": a.numpy(), "b": b.numpy()})
    with torch.no_grad():
        first, others = model(a, b, scale)
    expected = [first, *others.values()]
    assert len(received) == 3
    for ours, theirs in zip(expected, received, strict=True):
        assert np.allclose(ours.numpy(), theirs, atol=1e-5)


def test_tokens(tmp_path: Path) -> None:
    model, x = TiedEmbedding(), torch.arange(8).view(2, 4)
    difference = export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert difference is not None
    assert difference <= EXACT
    _check(tmp_path / "m.onnx", model, x)


class _Anchored(nn.Module):
    """One input has the batch, the other has two rows whatever the batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
        return self.layer(x).unsqueeze(1) * anchors.view(1, 2, 4)


def test_an_input_of_other_length_is_no_batch(tmp_path: Path) -> None:
    inputs = (torch.randn(5, 4), torch.randn(2, 4))
    export_onnx(_Anchored(), tmp_path / "m.onnx", example_inputs=inputs)
    dims = [
        [item.dim_param or item.dim_value for item in x.type.tensor_type.shape.dim]
        for x in onnx.load(tmp_path / "m.onnx").graph.input
    ]
    assert dims == [["batch", 4], [2, 4]]


@pytest.mark.parametrize("example", [torch.randn(1, 1), torch.zeros(3, 1), torch.ones(1, 1)])
def test_examples_of_no_variation_are_varied(tmp_path: Path, example: Tensor) -> None:
    model = nn.Sequential(nn.Linear(1, 4))
    difference = export_onnx(model, tmp_path / "m.onnx", example_inputs=example)
    assert difference is not None
    assert difference <= EXACT
    rows = with_batch(example, 7)
    assert torch.isfinite(rows).all()
    assert len(rows.unique()) == 7


def test_batches_are_made_of_the_examples() -> None:
    inputs = {
        "x": torch.arange(6.0).view(2, 3),
        "tokens": torch.tensor([[1], [2]]),
        "weights": torch.ones(5),
        "flag": True,
    }
    made = with_batch(inputs, 3)
    assert made["tokens"].tolist() == [[1], [2], [1]]
    assert made["x"].shape == (3, 3)
    assert not torch.equal(made["x"][0], made["x"][2])
    assert (made["x"] - inputs["x"][[0, 1, 0]]).abs().max() < 1
    assert torch.equal(made["weights"], inputs["weights"])
    assert made["flag"] is True


def test_inputs_without_a_batch_are_refused(tmp_path: Path) -> None:
    for inputs in (torch.tensor(1.0), (1, 2), {}):
        with pytest.raises(ConfigError, match="no tensor with a batch dimension"):
            export_onnx(mlp(), tmp_path / "m.onnx", example_inputs=inputs)
    assert not list(tmp_path.iterdir())


# -- failures leave everything as it was -----------------------------------------------------------


class _DataDependent(nn.Module):
    """Its control flow follows its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


class _FixedReshape(nn.Module):
    """Takes any batch for one of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) if len(x) == 2 else x


class _Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today\nnor tomorrow")


@pytest.fixture(params=[True, False], ids=["old", "new"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file's name; in half of the tests there is an older file, whose content must stay."""
    if request.param:
        (tmp_path / "m.onnx").write_bytes(b"older")
    return tmp_path / "m.onnx"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network does not matter, one of them is exported once for all."""
    monkeypatch.setattr(export, "onnx_program", lambda *args, **kwargs: _mlp_program())


_export = export.onnx_program


@functools.cache
def _mlp_program() -> Any:
    return _export(mlp(), torch.zeros(2, 16), dynamic_batch=True)


def _untouched(path: Path) -> bool:
    names = [item.name for item in path.parent.iterdir()]
    return names in ([], [path.name]) and (not names or path.read_bytes() == b"older")


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            _DataDependent(),
            r"torch cannot export _DataDependent to ONNX: .*try dynamic_batch=False",
        ),
        (_FixedReshape(), "ONNX Runtime cannot run what torch exported on a batch of 1: "),
        (_Broken(), "torch cannot export _Broken to ONNX: RuntimeError: not today"),
    ],
    ids=["data_dependent", "batch_dependent", "broken"],
)
def test_what_cannot_be_exported_is_named(target: Path, model: nn.Module, complaint: str) -> None:
    before = target.exists()
    with pytest.raises(ExportError, match=complaint) as caught:
        export_onnx(model, target, example_inputs=torch.randn(3, 4))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert _untouched(target)
    assert target.exists() == before


@pytest.mark.usefixtures("quick")
def test_other_answers_are_not_written(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of three is enough."""
    differences = {1: 1e-7, 2: 2e-4, 7: 1e-7}
    monkeypatch.setattr(export, "onnx_difference", lambda *args: differences[args[3]])
    with pytest.raises(
        ExportError, match=r"m\.onnx: not written: ONNX Runtime's outputs differ .* by 2\.0e-04"
    ):
        export_onnx(mlp(), target, example_inputs=torch.randn(2, 16))
    assert _untouched(target)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_no_agreement(
    target: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(export, "onnx_difference", lambda *_: value)
    with pytest.raises(ExportError, match="not written"):
        export_onnx(mlp(), target, example_inputs=torch.randn(2, 16))
    assert _untouched(target)


def test_the_difference_is_measured(tmp_path: Path) -> None:
    """Of the worst output, relative to that output's largest value."""
    model, x, path = _Two(), (_A, _B), tmp_path / "m.onnx"
    export_onnx(model, path, example_inputs=x)
    assert onnx_difference(model, path, x, None) <= EXACT
    with torch.no_grad():
        model.layer.bias += 0.5
        largest = float(model(*x)[0].abs().max())
    assert onnx_difference(model, path, x, None) == pytest.approx(1.0 / largest, rel=1e-4)
    with torch.no_grad():
        model.layer.bias[0] = float("nan")
    assert onnx_difference(model, path, x, None) == float("inf")


class _Fewer(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class _Narrower(nn.Module):
    """Broadcasts to the shape of `_Two`'s outputs."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a[:, :1], b, b


@pytest.mark.parametrize(
    ("other", "complaint"),
    [(_Fewer(), "3 outputs in ONNX, 1 in torch"), (_Narrower(), r"is \(3, 4\) in ONNX, \(3, 1\)")],
)
def test_outputs_of_another_kind_are_no_match(
    tmp_path: Path, other: nn.Module, complaint: str
) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(_Two(), path, example_inputs=(_A, _B))
    with pytest.raises(ExportError, match=complaint):
        onnx_difference(other, path, (_A, _B), None)


def test_a_file_that_the_runtime_refuses_is_an_export_error(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(2, 16)
    export_onnx(model, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False)
    with pytest.raises(ExportError, match="cannot run what torch exported on a batch of 7: "):
        onnx_difference(model, tmp_path / "m.onnx", x, 7)
    (tmp_path / "m.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ExportError, match="cannot run what torch exported on a batch of 2: "):
        onnx_difference(model, tmp_path / "m.onnx", x, None)


def test_an_old_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"older")
    model, x = mlp(), torch.randn(2, 16)
    export_onnx(model, path, example_inputs=x)
    _check(path, model, x)
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.usefixtures("quick")
def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "m.onnx"
    export_onnx(mlp(), os.fspath(path), example_inputs=torch.randn(2, 16))
    assert [item.name for item in path.parent.iterdir()] == ["m.onnx"]


@pytest.mark.usefixtures("quick")
def test_paths_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(2, 16)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_bytes(b"older")
    for path in (
        tmp_path / "folder.onnx",
        tmp_path / "file" / "m.onnx",
        Path("/proc/rankprune/m.onnx"),
    ):
        with pytest.raises(FileError, match=r"\.onnx: cannot write: \w+") as caught:
            export_onnx(model, path, example_inputs=x)
        assert str(path) in str(caught.value)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder.onnx"]
    assert (tmp_path / "file").read_bytes() == b"older"
    assert not list((tmp_path / "folder.onnx").iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match=r"cannot write: Permission denied"):
        export_onnx(mlp(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 16))
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_weights_beside_the_file_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch writes them beyond 2 GB; here it is made to."""
    made = export.onnx_program

    def outside(*args: Any, **kwargs: Any) -> Any:
        program = made(*args, **kwargs)
        save = program.save
        monkeypatch.setattr(program, "save", functools.partial(save, external_data=True))
        return program

    monkeypatch.setattr(export, "onnx_program", outside)
    model, x = mlp(), torch.randn(2, 16)
    export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    names = ["m.onnx", "m.onnx.data"]
    assert sorted(item.name for item in tmp_path.iterdir()) == names
    _check(tmp_path / "m.onnx", model, x)


@pytest.mark.parametrize("model", [small_cnn(), _DataDependent()], ids=["exported", "refused"])
def test_modes_and_weights_are_put_back(tmp_path: Path, model: nn.Module) -> None:
    """Also where modules differ in mode, and where the export fails."""
    model.train()
    children = list(model.children())
    children[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = cnn_input() if len(children) > 1 else torch.randn(2, 4)
    if len(children) > 1:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    else:
        with pytest.raises(ExportError):
            export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert [module.training for module in model.modules()] == modes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(
    target: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*rankprune\[onnx\]"):
        export_onnx(mlp(), target, example_inputs=torch.randn(2, 16))
    assert _untouched(target)


# -- real networks ---------------------------------------------------------------------------------

ZOO: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "vgg11_bn": (32, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "efficientnet_b0": (64, {}),
    "densenet121": (64, {}),
    "squeezenet1_1": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "regnet_y_400mf": (64, {}),
    "mnasnet0_5": (64, {}),
    "convnext_tiny": (64, {}),
    "vit_b_16": (32, {"image_size": 32, "num_layers": 3}),
    "swin_t": (64, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_networks_of_the_zoo(tmp_path: Path, name: str) -> None:
    import torchvision

    size, options = ZOO[name]
    build = getattr(torchvision.models, name)
    if name == "vit_b_16":
        options = {"patch_size": 16, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072, **options}
        build = torchvision.models.VisionTransformer
    model = build(weights=None, **options) if name != "vit_b_16" else build(**options)
    if name == "vgg11_bn":  # its head has more parameters than all the other networks
        model.classifier[0], model.classifier[3] = nn.Linear(25088, 64), nn.Linear(64, 4096)
    x = torch.randn(2, 3, size, size)
    _settle(model, x)
    # channel's matrices are the quickest to decompose
    plan = make_plan(model, FixedRank(12), scheme="channel", guard=False, example_inputs=x)
    compact = factorize(model, plan)
    assert len(low_rank_layers(compact)) >= 5
    difference = export_onnx(compact, tmp_path / "m.onnx", example_inputs=x)
    assert difference is not None
    assert difference <= EXACT
    _check(tmp_path / "m.onnx", compact, x)


def _settle(model: nn.Module, x: Tensor) -> None:
    """Statistics of real activations, and no head that is zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.cat([x, torch.randn_like(x)]))
    model.eval()


def test_the_file_is_compared_with_what_is_given(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    other = nn.Sequential(nn.Linear(8, 4))
    path, x = tmp_path / "m.onnx", torch.randn(1, 8)
    with pytest.raises(ExportError, match="outputs differ"):
        export_onnx(model, path, example_inputs=x, reference=other)
    assert not path.exists()
    assert export_onnx(model, path, example_inputs=x, reference=model) < 1e-5  # type: ignore[operator]


# -- separable layers ------------------------------------------------------------------------------


class _Between(nn.Module):
    """Calls the layers of a Sequential one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.pair:
            x = layer(x).relu()
        return x


class _Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[0]).relu()


class _ReadsItsLayers(nn.Module):
    """As code that asks a layer for its dtype, its channels, or for an output size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.in_channels == 8
        x = self.conv(x.to(self.conv.weight.dtype))
        return self.up(x, output_size=[16, 16])


@pytest.mark.parametrize("scheme", ["decoupled", "depthwise"])
@pytest.mark.parametrize("kind", [_Between, _Unbatched, _ReadsItsLayers])
def test_separable_layers_are_exported_however_they_are_called(
    tmp_path: Path, kind: type[nn.Module], scheme: str
) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(1, 8, 8, 8)
    plan = make_plan(model, FixedRank(2), scheme=scheme, guard=False)
    compact = model if kind is _Between else factorize(model, plan)
    compact.eval()
    difference = export_onnx(
        compact, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=kind is not _Unbatched
    )
    assert difference is not None
    assert difference <= EXACT


@pytest.mark.parametrize("scheme", ["decoupled", "depthwise"])
def test_separable_layers_have_one_kernel_a_channel(tmp_path: Path, scheme: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    compact = factorize(model, make_plan(model, FixedRank(3), scheme=scheme, guard=False))
    x = torch.zeros(1, 8, 7, 7)
    export_onnx(compact, tmp_path / "m.onnx", example_inputs=x)
    graph = onnx.load(tmp_path / "m.onnx").graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    groups = [next(a.i for a in node.attribute if a.name == "group") for node in convs]
    assert sorted(groups) == [1, 24]
    kernels = next(shapes[node.input[1]] for node, g in zip(convs, groups, strict=True) if g > 1)
    assert kernels == [24, 1, 3, 3]
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert type(compact[0]) is LowRank
    assert len(compact[0]) == 2
