"""A network block by block: what each block is called with, while those before it change.

Transformers are a list of alike blocks, each called with what the one before it returns. So one
pass over the calibration batches can stop at every block, let it be factorised, and go on with the
outputs of the factorised block: later layers see the inputs that they will have (Wang et al. 2024,
SVD-LLM, arXiv 2403.07378, section 3.3). No more than one block has to be in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rankprune.calibrate import Stats, mask_of, moved, record, run, sites_to_calibrate
from rankprune.errors import ConfigError, near
from rankprune.factorize import check_plan, factorize
from rankprune.plan import LayerPlan, Plan
from rankprune.profile import count_params, evaluating, uncompiled
from rankprune.recorder import Recorder


@dataclass
class _Call:
    """What a block is called with for one batch; from block to block only `hidden` changes."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None


@dataclass(frozen=True)
class Block:
    """One block of a network.

    Attributes:
        name: qualified name.
        module: its module; layers in it may be replaced between `calibrate` and `advance`.
    """

    name: str
    module: nn.Module
    _calls: list[_Call]

    def calibrate(self, dtype: torch.dtype = torch.float32) -> Stats:
        """Second moments of its layers' inputs, by their names within the block."""
        with evaluating(self.module), uncompiled():
            recorder = Recorder(self.module, sites_to_calibrate(self.module), dtype)
            with recorder:
                for state in self._calls:
                    recorder.mask = state.mask
                    self._run(state)
        return Stats(recorder.moments, len(self._calls), recorder.norms)

    def advance(self) -> None:
        """Go on with what the block returns, as it is now."""
        with evaluating(self.module):
            for state in self._calls:
                output = self._run(state)
                state.hidden = output[0] if isinstance(output, tuple) else output

    def _run(self, state: _Call) -> Any:
        with torch.no_grad():
            # a block may change its input in place, and is called with it twice
            return self.module(state.hidden.clone(), *state.args, **state.kwargs)


def factorize_blocks(
    model: nn.Module, plan: Plan, batches: Iterable[Any], *, blocks: str | None = None
) -> nn.Module:
    """Factorise block by block, so that later layers are fitted to their compressed inputs.

    `calibrate` sees the dense network; here every block is calibrated after those before it have
    been factorised. Planned layers outside of the blocks are calibrated last.

    Args:
        model: the dense model; it is changed in place, since a copy may be too large.
        plan: from `make_plan`.
        batches: as in `calibrate`; their states [B, T, C] are kept for all of them at a time.
        blocks: name of the list of blocks ("model.layers"); None takes the longest list of alike
            modules.

    Returns:
        The model.

    Raises:
        ConfigError: no such list, its blocks are not called one after the other with only their
            state changing, or no batches.
        PlanError: the plan is another model's.

    Example:
        >>> import rankprune as rp
        >>> model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 2))
        >>> model = nn.Sequential(model[:3], model[3])
        >>> plan = rp.make_plan(model, rp.FixedRank(4))
        >>> compact = factorize_blocks(model, plan, [torch.randn(8, 16)], blocks="0")
    """
    batches = list(batches)
    check_plan(model, plan.factorized)
    rest = {layer.name: layer for layer in plan.factorized}
    for block in walk(model, batches, blocks):
        stats = block.calibrate().within(block.name)
        _factorize(model, [rest.pop(name) for name in stats.moments if name in rest], stats)
        block.advance()
    sites = [site for site in sites_to_calibrate(model) if site.name in rest]
    # those that are not called get the plain SVD
    _factorize(model, rest.values(), record(Recorder(model, sites), batches) if sites else None)
    return model


def _factorize(model: nn.Module, layers: Iterable[LayerPlan], stats: Stats | None) -> None:
    plan = Plan(layers=tuple(layers), dense_params=count_params(model))
    factorize(model, plan, stats=stats, inplace=True)


def walk(model: nn.Module, batches: Iterable[Any], blocks: str | None = None) -> Iterator[Block]:
    """The blocks of a network in their order, with what they are called with.

    The first block's calls are recorded by running the model up to it; its later parts may be on
    the meta device. After each block, call `advance` on it.

    Raises:
        ConfigError: as in `factorize_blocks`.
    """
    prefix = blocks if blocks is not None else find_blocks(model)
    modules = dict(model.named_modules())
    if prefix not in modules or not len(list(modules[prefix].children())):
        raise ConfigError(f"blocks={prefix!r}: no list of modules; {near(prefix, modules)}")
    names = [f"{prefix}.{name}" for name, _ in modules[prefix].named_children()]
    calls = _first_calls(model, names, batches)
    for name in names:
        # looked up when it is its turn: it may have been loaded meanwhile
        yield Block(name, model.get_submodule(name), calls)


def find_blocks(model: nn.Module) -> str:
    """Name of the list of alike modules that holds most of the model's parameters.

    Raises:
        ConfigError: there is none.
    """
    found = {
        name: count_params(module)
        for name, module in model.named_modules()
        if name
        and isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and count_params(module)
    }
    if not found:
        raise ConfigError("the model has no list of alike blocks; name one with blocks=…")
    return max(found, key=lambda name: found[name])


class _Stop(BaseException):
    """The first block was reached: nothing behind it is needed. No error, and caught by no one."""


def _first_calls(model: nn.Module, names: list[str], batches: Iterable[Any]) -> list[_Call]:
    """What the first block is called with, for every batch."""
    calls: list[_Call] = []
    mask: Tensor | None = None
    whole = not any(tensor.is_meta for tensor in model.parameters())

    def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_call(args, kwargs, mask, names[0]))
        raise _Stop

    with evaluating(model), uncompiled(), _uncached(model):
        for batch in moved(batches, model):
            mask = mask_of(batch)
            if whole and not calls:
                _check_chain(model, names, batch)
            hook = model.get_submodule(names[0]).register_forward_pre_hook(
                reached, with_kwargs=True
            )
            before = len(calls)
            try:
                run(model, batch)
            except _Stop:
                pass
            finally:
                hook.remove()
            if len(calls) == before:
                raise ConfigError(f"the model does not call its block {names[0]!r}")
    if not calls:
        raise ConfigError("no batches to calibrate with")
    return calls


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None, name: str) -> _Call:
    kwargs = dict(kwargs)
    hidden, *rest = args or (kwargs.pop("hidden_states", None),)
    if not isinstance(hidden, Tensor):
        raise ConfigError(f"block {name!r} is not called with its state as the first argument")
    return _Call(hidden, tuple(rest), kwargs, mask)


def _check_chain(model: nn.Module, names: list[str], batch: Any) -> None:
    """Refuse networks whose blocks get more from each other than their state."""
    seen: list[tuple[str, _Call]] = []
    outputs: list[Any] = []

    with ExitStack() as stack, evaluating(model):
        for name in names:
            block = model.get_submodule(name)

            def enter(_: nn.Module, args: Any, kwargs: Any, *, n: str = name) -> None:
                seen.append((n, _call(args, kwargs, None, n)))

            def leave(_: nn.Module, __: Any, output: Any) -> None:
                outputs.append(output[0] if isinstance(output, tuple) else output)

            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        run(model, batch)
    if [name for name, _ in seen] != names:
        raise ConfigError(
            f"the blocks {names[0]!r} to {names[-1]!r} are not called once each, in their order"
        )
    first = seen[0][1]
    for (name, call), output in zip(seen[1:], outputs, strict=False):
        if call.hidden is not output:
            raise ConfigError(f"block {name!r} is not called with what the one before it returns")
        if not _same(call.args, first.args) or not _same(call.kwargs, first.kwargs):
            raise ConfigError(
                f"block {name!r} is called with other arguments than {names[0]!r}, beside its "
                "state; use calibrate and factorize for this model"
            )


def _same(one: Any, other: Any) -> bool:
    (left, shape), (right, other_shape) = tree_flatten(one), tree_flatten(other)
    return shape == other_shape and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(left, right, strict=True)
    )


@contextmanager
def _uncached(model: nn.Module) -> Iterator[None]:
    """Without Hugging Face's key-value cache, which every further run of a block would extend."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = before  # type: ignore[union-attr]
