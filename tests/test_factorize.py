"""Dense layers to factors and back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cases import (
    BiasTiedLinears,
    Conv1D,
    SharedModule,
    TiedConvs,
    TiedEmbedding,
    TiedLinears,
    UnequallyTiedConvs,
    cnn_input,
    mobilenet_v2,
    relative_error,
    resnet18,
    resnet20,
    small_cnn,
)
from rankprune import (
    Budget,
    ConfigError,
    FixedRank,
    LowRank,
    NumericsError,
    Plan,
    PlanError,
    Ratio,
    count_params,
    defactorize,
    factorize,
    make_plan,
    plan_of,
)
from rankprune.factorize import factor_skeleton
from rankprune.low_rank import low_rank_layers

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small_cnn": (small_cnn, (2, 3, 12, 12)),
    "tied linears": (TiedLinears, (2, 20)),
    "tied convs": (TiedConvs, (2, 12, 6, 6)),
    "unequally tied convs": (UnequallyTiedConvs, (2, 12, 6, 6)),
    "linears tied but for the bias": (BiasTiedLinears, (2, 20)),
    "shared module": (SharedModule, (2, 20)),
    "resnet20": (resnet20, (2, 3, 32, 32)),
}
networks = pytest.mark.parametrize(
    ("build", "shape"), NETWORKS.values(), ids=[name.replace(" ", "_") for name in NETWORKS]
)


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


@networks
def test_full_rank_network_answers_the_same(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = _built(build).eval(), torch.randn(shape)
    plan = make_plan(model, Ratio(1.0), guard=False)
    compact = factorize(model, plan)
    assert low_rank_layers(compact)
    with torch.no_grad():
        assert relative_error(compact(x), model(x)) <= 1e-5


@networks
def test_defactorize_computes_what_the_factors_do(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = _built(build).double().eval(), torch.randn(shape).double()
    compact = factorize(model, make_plan(model, Ratio(0.4), guard=False))
    dense = defactorize(compact)
    assert not low_rank_layers(dense)
    assert low_rank_layers(compact)
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
    assert dense.state_dict().keys() == model.state_dict().keys()
    # ties are kept
    assert count_params(dense) == count_params(model)
    with torch.no_grad():
        assert relative_error(dense(x), compact(x)) <= 1e-12
    again = factorize(dense, plan_of(compact))
    with torch.no_grad():
        assert relative_error(again(x), compact(x)) <= 1e-12


def test_factors_of_one_weight_are_shared() -> None:
    for model in (TiedLinears(), TiedConvs()):
        compact = factorize(model, make_plan(model, FixedRank(3), guard=False))
        assert compact.a[0].weight is compact.b[0].weight
        assert compact.a[1].weight is compact.b[1].weight
        assert compact.a[1].bias is not compact.b[1].bias
        assert torch.equal(compact.b[1].bias, model.b.bias)


def test_of_one_weight_each_layer_keeps_its_own_bias() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("b", "a", "c", "d")})
    for layer in model.values():
        layer.weight = model["b"].weight
    compact = factorize(model, make_plan(model, FixedRank(3), guard=False))
    for name, layer in model.items():
        assert torch.equal(compact[name][1].bias, layer.bias)
        assert compact[name][0].weight is compact["b"][0].weight
        assert compact[name][1].weight is compact["b"][1].weight


def test_a_skeleton_has_all_but_the_weights() -> None:
    for build in (small_cnn, TiedLinears, TiedConvs, SharedModule):
        model = _built(build).double()
        next(model.parameters()).requires_grad_(False)
        plan = make_plan(model, FixedRank(3), guard=False)
        compact = factorize(model, plan)
        factor_skeleton(model, plan.factorized)
        assert plan_of(model) == plan_of(compact)
        for (name, found), (other, expected) in zip(
            model.named_parameters(), compact.named_parameters(), strict=True
        ):
            assert (name, found.shape, found.dtype) == (other, expected.shape, expected.dtype)
            assert found.requires_grad is expected.requires_grad
        model.load_state_dict(compact.state_dict())
        for name, layer in low_rank_layers(model).items():
            assert torch.equal(layer.dense_weight(), low_rank_layers(compact)[name].dense_weight())


def test_a_shared_module_is_replaced_at_every_place() -> None:
    model = SharedModule()
    compact = factorize(model, make_plan(model, FixedRank(3)))
    assert isinstance(compact.a, LowRank)
    assert compact.b is compact.a
    assert compact.c[1] is compact.a
    assert compact.c[0] is not compact.a


def test_a_tied_head_stays_tied_to_its_embedding() -> None:
    model = TiedEmbedding()
    compact = factorize(model, make_plan(model, FixedRank(3)))
    assert isinstance(compact.body, LowRank)
    assert compact.head.weight is compact.embed.weight


def test_the_original_is_not_touched() -> None:
    model = small_cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = list(model.modules())
    plan = make_plan(model, FixedRank(4))
    compact = factorize(model, plan)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in compact.parameters()}


def test_inplace_changes_the_model_itself() -> None:
    model = small_cnn()
    plan = make_plan(model, FixedRank(4))
    expected = factorize(model, plan)
    norm = model[1]
    assert factorize(model, plan, inplace=True) is model
    assert isinstance(model[0], LowRank)
    assert model[1] is norm
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    assert defactorize(model, inplace=True) is model
    assert isinstance(model[0], nn.Conv2d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_device_dtype_mode_and_requires_grad_are_kept(dtype: torch.dtype) -> None:
    model = small_cnn().to(dtype)
    model[0].eval()
    model[3].weight.requires_grad_(False)
    model[10].bias.requires_grad_(False)
    compact = factorize(model, make_plan(model, FixedRank(4), guard=False))
    assert len(low_rank_layers(compact)) == 5
    for parameter in compact.parameters():
        assert parameter.dtype is dtype
        assert parameter.device.type == "cpu"
    modes = [[m.training for m in compact[i].modules()] for i in (0, 3)]
    assert modes == [[False] * 3, [True] * 3]
    assert not any(p.requires_grad for p in compact[3].parameters())
    assert compact[10][1].weight.requires_grad
    assert not compact[10][1].bias.requires_grad
    assert all(p.requires_grad for p in compact[6].parameters())
    back = defactorize(compact)
    assert [p.requires_grad for p in back.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert not back[0].training


@networks
def test_factors_own_contiguous_memory(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """A view would keep, and save, the whole SVD."""
    model = _built(build)
    compact = factorize(model, make_plan(model, Ratio(0.4), guard=False))
    for low_rank in low_rank_layers(compact).values():
        for parameter in low_rank.parameters():
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
            assert parameter.grad_fn is None


def test_factors_are_balanced() -> None:
    """√σ on each side: both have the same Frobenius norm."""
    model = nn.Sequential(nn.Linear(30, 50, bias=False))
    compact = factorize(model, make_plan(model, FixedRank(5)))
    first, second = compact[0][0].weight, compact[0][1].weight
    assert torch.allclose(first.norm(), second.norm(), rtol=1e-5)
    assert torch.allclose(first @ first.mT, second.mT @ second, atol=1e-5)


@networks
def test_deepcopy_and_pickle_round_trip(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = _built(build).eval(), torch.randn(shape)
    compact = factorize(model, make_plan(model, Ratio(0.4), guard=False))
    stream = io.BytesIO()
    torch.save(compact, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(compact),
        pickle.loads(pickle.dumps(compact)),
        torch.load(stream, weights_only=False),
    ]
    with torch.no_grad():
        for twin in copies:
            assert torch.equal(twin(x), compact(x))
            assert plan_of(twin) == plan_of(compact)
            assert count_params(twin) == count_params(compact)


def test_compact_network_trains() -> None:
    model = small_cnn()
    compact = factorize(model, make_plan(model, FixedRank(4)))
    compact(cnn_input()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in compact[0].parameters())


def test_no_random_numbers_are_drawn() -> None:
    model = small_cnn()
    plan = make_plan(model, FixedRank(4))
    state = torch.get_rng_state()
    defactorize(factorize(model, plan))
    assert torch.equal(torch.get_rng_state(), state)


def test_hugging_face_conv1d_becomes_linear() -> None:
    model, x = nn.Sequential(Conv1D(20, 12)), torch.randn(3, 5, 12)
    compact = factorize(model, make_plan(model, FixedRank(12), guard=False))
    assert [type(m) for m in compact[0]] == [nn.Linear, nn.Linear]
    dense = defactorize(compact)
    assert type(dense[0]) is nn.Linear
    with torch.no_grad():
        assert relative_error(compact(x), model(x)) <= 1e-5
        assert relative_error(dense(x), model(x)) <= 1e-5


def test_a_product_has_gradients_and_a_dense_weight_has_none() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    (layer,) = factorize(model, make_plan(model, FixedRank(3)))
    assert layer.product().requires_grad
    assert not layer.dense_weight().requires_grad
    assert torch.equal(layer.product(), layer.dense_weight())


def test_low_rank_says_what_it_is() -> None:
    model = small_cnn()
    compact = factorize(model, make_plan(model, FixedRank(4)))
    assert "LowRank(\n    scheme=" in str(compact)
    assert f"scheme={compact[0].layer.scheme}, rank=4" in str(compact[0])


class _Reader(nn.Module):
    """Reads what dense layers have beside an answer, as much code around layers does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 12)
        self.conv = nn.Conv1d(12, 8, 3, stride=2)
        self.hf = Conv1D(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.weight.device, self.linear.weight.dtype)
        x = nn.functional.linear(x, self.linear.weight, self.linear.bias)
        x = self.conv(x.mT) * self.conv.stride[0] / self.conv.kernel_size[0]
        weight = self.hf.weight[:, : self.hf.nf]
        return (x.mT @ weight + self.hf.bias) / self.linear.in_features


def test_code_that_reads_a_layer_reads_what_the_dense_layer_had() -> None:
    model, x = _Reader(), torch.randn(2, 9, 20)
    compact = factorize(model, make_plan(model, FixedRank(5), guard=False))
    dense = defactorize(compact)
    # a Conv1D comes back as nn.Linear, with its weight the other way round
    dense.hf = Conv1D(6, 8)
    dense.hf.weight, dense.hf.bias = nn.Parameter(compact.hf.dense_weight()), compact.hf.bias
    compact(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in compact.parameters())
    exported = torch.export.export(compact.eval(), (x,)).module()
    with torch.no_grad():
        assert relative_error(compact(x), dense(x)) <= 1e-5
        assert relative_error(exported(x), compact(x)) <= 1e-6
    with pytest.raises(AttributeError, match="'LowRank' object has no attribute 'stride'"):
        compact.linear.stride  # noqa: B018


def test_a_weight_that_is_only_looked_at_is_not_multiplied_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_cnn()
    compact = factorize(model, make_plan(model, FixedRank(4)))
    monkeypatch.delattr(LowRank, "product")
    for name, low_rank in low_rank_layers(compact).items():
        weight, dense = low_rank.weight, model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert (weight.dtype, weight.device, weight.shape) == (
            dense.dtype,
            dense.device,
            dense.shape,
        )
        with pytest.raises(AttributeError, match="product"):
            weight.sum()


# -- plans of parts and wholes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "scheme"),
    [
        (1, "channel"),
        (1, "decoupled"),
        (2, "spatial"),
        (2, "decoupled"),
        (2, "depthwise"),
        (3, "channel"),
    ],
)
def test_a_transposed_convolution_can_be_asked_for_a_size(dims: int, scheme: str) -> None:
    kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    # an axis that only one factor changes by padding, where there is one
    kernel, stride, padding = (3, 1, 2)[:dims], (2, 1, 3)[:dims], (1, 1, 0)[:dims]
    dense = kinds[dims](4, 6, kernel, stride, padding)
    model = nn.Sequential(dense)
    compact = factorize(model, make_plan(model, Ratio(1.0), scheme=scheme, guard=False))[0]
    assert isinstance(compact, LowRank)
    x = torch.randn(2, 4, *(5, 7, 3)[:dims])
    for size in ((9, 5, 8)[:dims], (10, 5, 10)[:dims]):
        for wanted in (size, (2, 6, *size)):
            with torch.no_grad():
                assert relative_error(compact(x, wanted), dense(x, wanted)) <= 1e-5
    with pytest.raises(ValueError, match="requested an output size"):
        compact(x, (99,) * dims)


def test_hooks_go_over_to_the_factors_and_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    seen: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: seen.append("before")),
        model[0].register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    factorize(model, make_plan(model, FixedRank(2), guard=False), inplace=True)
    assert isinstance(model[0], LowRank)
    everything = ["before", "after", "backward"]
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert seen == everything
    copied = defactorize(model)
    copied(x).sum().backward()
    assert seen == everything * 2
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert seen == everything * 2


def test_plan_of_is_the_plan_that_it_was_made_with() -> None:
    for build in (small_cnn, TiedLinears, TiedConvs, SharedModule):
        model = _built(build)
        plan = make_plan(model, FixedRank(3), guard=False)
        found = plan_of(factorize(model, plan))
        assert found.layers == plan.factorized
        assert (found.dense_params, found.params) == (plan.dense_params, plan.params)


def test_plan_of_a_dense_model_is_empty() -> None:
    assert plan_of(small_cnn()) == Plan(layers=(), dense_params=count_params(small_cnn()))


def test_plan_of_a_part_or_a_whole_has_the_names_that_are_there() -> None:
    """A factorised backbone in a larger model, and a block taken out of a factorised model."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(20, 20), TiedLinears())

    model = Backbone()
    compact = factorize(model, make_plan(model, FixedRank(3)))
    whole = nn.Sequential(nn.ReLU(), compact)
    assert [(x.name, x.tied) for x in plan_of(whole).layers] == [
        ("1.body.0", ()),
        ("1.body.1.a", ("1.body.1.b",)),
    ]
    assert [(x.name, x.tied) for x in plan_of(compact.body).layers] == [
        ("0", ()),
        ("1.a", ("1.b",)),
    ]
    part = factorize(nn.Sequential(nn.ReLU(), Backbone()), plan_of(whole))
    assert count_params(part) == count_params(whole)


# -- plans of other models -------------------------------------------------------------------------


def _plan(model: nn.Module) -> Plan:
    return make_plan(model, FixedRank(2), guard=False)


def _retied() -> nn.Module:
    model = TiedLinears()
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())
    return model


def _weight_normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    from torch.nn.utils import prune

    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


WRONG: dict[str, tuple[nn.Module, nn.Module, str]] = {
    "missing": (
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8)),
        "'1' is not in the model.*made for another model",
    ),
    "near name": (
        nn.ModuleDict({"layer1": nn.Linear(8, 8)}),
        nn.ModuleDict({"layer2": nn.Linear(8, 8)}),
        "did you mean 'layer2'",
    ),
    "shape": (
        nn.Sequential(nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 9)),
        r"planned linear with weight \(8, 8\), the model has linear with weight \(9, 8\)",
    ),
    "bias": (nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8, bias=False)), "no bias"),
    "stride": (
        nn.Sequential(nn.Conv2d(8, 8, 3)),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2)),
        r"stride \(1, 1\).*stride \(2, 2\)",
    ),
    "type": (nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.ReLU()), "the model has ReLU"),
    "factorised already": (
        nn.Sequential(nn.Linear(8, 8)),
        factorize(m := nn.Sequential(nn.Linear(8, 8)), _plan(m)),
        "the model has LowRank",
    ),
    "not tied": (TiedLinears(), _retied(), "'a' and 'b' share one weight in the plan, but not in"),
    "tied but unlike": (
        TiedConvs(),
        UnequallyTiedConvs(),
        "layer 'b' does not fit the plan",
    ),
    "pruned": (nn.Sequential(nn.Linear(8, 8)), _weight_normed(), "not a parameter of its own"),
}


@pytest.mark.parametrize(
    ("planned", "given", "complaint"), WRONG.values(), ids=[key.replace(" ", "_") for key in WRONG]
)
def test_a_plan_of_another_model_is_refused(
    planned: nn.Module, given: nn.Module, complaint: str
) -> None:
    plan = _plan(planned)
    state = [(name, type(module)) for name, module in given.named_modules()]
    for inplace in (False, True):
        with pytest.raises(PlanError, match=complaint):
            factorize(given, plan, inplace=inplace)
    assert [(name, type(module)) for name, module in given.named_modules()] == state


def test_non_finite_weights_are_named_before_anything_is_changed() -> None:
    model = small_cnn()
    plan = make_plan(model, FixedRank(4))
    with torch.no_grad():
        model[10].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="layer '10': the weight holds 1 NaN"):
        factorize(model, plan, inplace=True)
    assert not low_rank_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize("build", [resnet18, mobilenet_v2], ids=["resnet18", "mobilenet_v2"])
def test_full_rank_zoo_network_answers_the_same(build: Callable[[], nn.Module]) -> None:
    model, x = build().eval(), torch.randn(1, 3, 64, 64)
    compact = factorize(model, make_plan(model, Ratio(1.0), guard=False))
    with torch.no_grad():
        assert relative_error(compact(x), model(x)) <= 1e-5


def test_a_plan_without_factors_copies_the_model() -> None:
    model = small_cnn()
    plan = make_plan(model, Budget(params=1.0))
    assert not plan.factorized
    compact = factorize(model, plan)
    assert compact is not model
    x: Tensor = cnn_input()
    with torch.no_grad():
        assert torch.equal(compact.eval()(x), model.eval()(x))


def test_a_model_in_ddp_is_refused() -> None:
    """It would go on to average gradients of the weights that are gone."""

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    model = nn.Sequential(nn.Linear(16, 16))
    plan = make_plan(model, FixedRank(2))
    with pytest.raises(ConfigError, match=r"factorise model\.module, then wrap"):
        factorize(Wrapped(model), plan)


def test_a_bias_that_layers_share_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].bias = model[0].bias
    plan = make_plan(model, FixedRank(2))
    compact = factorize(model, plan)
    assert compact[0].bias is compact[2].bias
    assert compact[0].bias is not model[0].bias
    dense = defactorize(compact)
    assert dense[0].bias is dense[2].bias
    assert count_params(dense) == count_params(model)
