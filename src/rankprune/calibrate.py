"""What layers are really called with: second moments of their inputs, and BatchNorm's statistics.

`calibrate` runs the model once over a few batches and keeps, for every layer that can be
factorised, the sum of x xᵀ of its inputs. With it, `make_plan` chooses ranks by the error of the
layers' outputs, and `factorize` makes that error least.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from rankprune.errors import ConfigError, RankPruneError, near
from rankprune.moments import Moment
from rankprune.profile import call, evaluating, uncompiled
from rankprune.recorder import Recorder, SensitivityRecorder, sampled_loss
from rankprune.survey import Site, survey

_ABOUT_BATCHES = (
    "a batch is what the model is called with: a tensor, a tuple of positional or a mapping of "
    "keyword arguments; of a list, as torch's DataLoader makes it, the first is passed"
)


@dataclass(frozen=True)
class Stats:
    """Moments of layers' inputs, from `calibrate`.

    Attributes:
        moments: by layer name.
        batches: how many batches they are from.
        norms: the BatchNorm that a layer's output goes to, by layer name.
    """

    moments: Mapping[str, Moment]
    batches: int
    norms: Mapping[str, str] = field(default_factory=dict)

    def within(self, prefix: str) -> Stats:
        """The same for a model that holds the present one under a name."""
        moments = {f"{prefix}.{name}": moment for name, moment in self.moments.items()}
        norms = {f"{prefix}.{name}": f"{prefix}.{norm}" for name, norm in self.norms.items()}
        return Stats(moments, self.batches, norms)

    def __str__(self) -> str:
        return f"inputs of {len(self.moments)} layers over {self.batches} batches"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: str | Sequence[str] = "*",
    sensitivity: bool | Callable[[Any], Tensor] = False,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Stats:
    """Sum the second moments of the inputs of every layer that can be factorised.

    The model runs once over the batches in eval mode, without gradients. Transposed convolutions
    are left out; so are layers that are never called. Of padded text, positions that an
    `attention_mask` [B, T] switches off are left out where a layer sees [B, T, C].

    Args:
        model: the dense model, on any device; its batches are moved there.
        batches: what the model is called with: tensors, tuples of positional arguments, mappings
            of keywords. Of a list, as torch's DataLoader makes it, only the first item is passed:
            the others are taken for targets.
        layers: shell-style patterns of the names to look at. A layer with D inputs (C/g times the
            kernel's positions) takes at most D² numbers for each of its groups.
        sensitivity: weigh each input by the squared gradient of a loss by the layer's output. True
            takes the log-likelihood of answers drawn from the model's own (no labels needed); a
            function makes a loss, summed over the batch, of the model's output. `make_plan` then
            compares layers by what their errors do to the answers, which is better than by their
            own size; some sixteen batches are enough for that. Each takes a backward pass too.
        dtype: precision of the sums, torch.float32 or torch.float64.
        progress: called with the number of batches done.

    Returns:
        The moments, for `make_plan(…, stats=…)` and `factorize(…, stats=…)`.

    Raises:
        ConfigError: no batches, a pattern that matches nothing, the model does not run on one, or
            calls none of the layers.
        NumericsError: a layer is called with NaN or infinity.

    Example:
        >>> import rankprune as rp
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> stats = calibrate(model, [torch.randn(16, 32) for _ in range(4)])
        >>> plan = rp.make_plan(model, rp.Energy(0.95), stats=stats)
        >>> compact = rp.factorize(model, plan, stats=stats)
    """
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"dtype={dtype}: torch.float32 or torch.float64")
    sites = _wanted(model, [layers] if isinstance(layers, str) else list(layers))
    kind = SensitivityRecorder if sensitivity else Recorder
    stats = record(kind(model, sites, dtype), batches, sensitivity, progress)
    if not stats.moments:
        raise ConfigError("no layer that can be calibrated is called in the forward pass")
    return stats


def record(
    recorder: Recorder,
    batches: Iterable[Any],
    sensitivity: bool | Callable[[Any], Tensor] = False,
    progress: Callable[[int], None] | None = None,
) -> Stats:
    """What a recorder sees of its model; layers that are not called are missing."""
    model = recorder.model
    generator = torch.Generator().manual_seed(0)
    done = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        if sensitivity:  # whatever the caller is in
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        stack.enter_context(recorder)
        for batch in moved(batches, model):
            mask = mask_of(batch)
            recorder.mask = mask
            output = run(model, batch, gradients=bool(sensitivity))
            if callable(sensitivity):
                sensitivity(output).backward()
            elif sensitivity:
                sampled_loss(output, mask, generator).backward()
            done += 1
            if progress is not None:
                progress(done)
    if not done:
        raise ConfigError(f"no batches to calibrate with; {_ABOUT_BATCHES}")
    return Stats(recorder.moments, done, recorder.norms)


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate BatchNorm's running statistics anew, for a model whose layers have changed.

    They become the plain average over the batches; all other layers stay in eval mode.

    Args:
        model: changed in place.
        batches: as in `calibrate`; larger ones estimate better. Augmented as in training: a network
            that was trained on images with borders of zeros may lose points on plain ones.

    Returns:
        The model.

    Raises:
        ConfigError: no batches, or the model does not run on one. The statistics stay as they were.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return model
    before = [
        (norm.momentum, {key: value.clone() for key, value in norm.named_buffers(recurse=False)})
        for norm in norms
    ]
    done = 0
    finished = False
    with evaluating(model), uncompiled():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches
                norm.train()
            for batch in moved(batches, model):
                run(model, batch)
                done += 1
            if not done:
                raise ConfigError(f"no batches to estimate BatchNorm with; {_ABOUT_BATCHES}")
            finished = True
        finally:
            for norm, (momentum, buffers) in zip(norms, before, strict=True):
                norm.momentum = momentum
                if not finished:
                    for key, value in buffers.items():
                        getattr(norm, key).copy_(value)
    return model


def check_stats(model: nn.Module, stats: Stats | None) -> Stats:
    """The stats, or empty ones.

    Raises:
        ConfigError: they are no `Stats`, or those of another model.
    """
    if stats is None:
        return Stats({}, 0)
    if not isinstance(stats, Stats):
        raise ConfigError(f"stats must come from calibrate, got {type(stats).__name__}")
    names = {name for name, _ in model.named_modules()}
    strange = next(
        (name for name in [*stats.moments, *stats.norms.values()] if name not in names), None
    )
    if strange is not None:
        raise ConfigError(
            f"stats are of another model: they have a layer {strange!r}; {near(strange, names)}; "
            "calibrate this model"
        )
    return stats


def moved(batches: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    """What to call the model with, on its device, one batch after the other."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    held = next((tensor for tensor in tensors if not tensor.is_meta), torch.empty(0))
    for batch in batches:
        if isinstance(batch, list):
            if not batch:
                raise ConfigError(f"a batch is an empty list; {_ABOUT_BATCHES}")
            batch = batch[0]
        if isinstance(batch, Mapping):
            batch = dict(batch)  # such as transformers' BatchEncoding
        yield tree_map_only(Tensor, lambda value: value.to(held.device), batch)


def mask_of(batch: Any) -> Tensor | None:
    """The `attention_mask` [B, T] of a batch of padded text."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def run(model: nn.Module, batch: Any, *, gradients: bool = False) -> Any:
    """Call the model on a batch.

    Raises:
        ConfigError: it does not run.
    """
    try:
        with torch.set_grad_enabled(gradients):
            return call(model, batch)
    except RankPruneError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the model does not run on a batch: {type(error).__name__}: {error}; {_ABOUT_BATCHES}"
        ) from error


def sites_to_calibrate(model: nn.Module) -> list[Site]:
    """Layers whose inputs can be summed: all that can be factorised but transposed convolutions."""
    return [
        site
        for site in survey(model)
        if site.spec is not None and not site.obstacle and site.spec.kind != "conv_transpose"
    ]


def _wanted(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    sites = sites_to_calibrate(model)
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            names = [site.name for site in sites]
            raise ConfigError(f"pattern {pattern!r} matches no layer; {near(pattern, names)}")
    return [site for site in sites if any(fnmatchcase(site.name, p) for p in patterns)]
