"""Hooks that sum up what layers are called with, and how much the answers depend on it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankprune.errors import ConfigError, NumericsError
from rankprune.linalg import full_precision, in_safe_range
from rankprune.moments import Moment, Rows, input_patches
from rankprune.profile import first_tensor
from rankprune.survey import Site

# Numbers in the patches of some examples that are made at a time.
MOST = 2**25


class Recorder:
    """Second moments of the inputs of layers, while it is open.

    Args:
        model: that is called.
        sites: layers that can be calibrated.
        dtype: precision of the sums.

    Attributes:
        moments: by layer name; layers that were not called are missing.
        norms: the BatchNorm that a layer's output goes to, by layer name.
        mask: of the present batch, [B, T]; None takes all positions.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.sites = sites
        self.dtype = dtype
        self.moments: dict[str, Moment] = {}
        self.mask: Tensor | None = None
        self.norms: dict[str, str] = {}
        self._output: tuple[str, Tensor, int | None] | None = None
        self._calls: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._last: tuple[Tensor, int | None, Rows] | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        for site in self.sites:
            # a weight that several layers share is called with the inputs of all
            for module in {self.model.get_submodule(name) for name in (site.name, *site.tied)}:
                self._hooks.callback(self._register(site, module))
        self._watch_norms()
        return self

    def __exit__(self, *_: object) -> None:
        self._last = self._output = None
        self._hooks.close()
        # of a layer or a BatchNorm with other calls, too, there is no one mean to put right
        self.norms = {
            name: norm
            for (name, norm), count in self._pairs.items()
            if count == self._calls[name] == self._calls[norm]
        }
        for site in self.sites:
            if site.spec is not None and site.name in self.moments:
                self.moments[site.name].centred = site.spec.bias or site.name in self.norms

    def _watch_norms(self) -> None:
        """Find the BatchNorms that are called with the very output of a layer."""
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                enter = functools.partial(self._enter_norm, name)
                self._hooks.callback(module.register_forward_pre_hook(enter).remove)
        for site in self.sites:
            # a tied weight has several outputs, and one mean of all inputs
            if site.spec is not None and not site.spec.bias and not site.tied:
                leave = functools.partial(self._leave, site.name, site.spec.dims)
                self._hooks.callback(site.module.register_forward_hook(leave).remove)

    def _leave(self, name: str, dims: int, _: nn.Module, __: Any, output: Tensor) -> None:
        self._calls[name] += 1
        # of [B, T, C] BatchNorm takes the T for channels
        if dims or output.dim() == 2:
            self._output = name, output, _version(output)

    def _enter_norm(self, norm: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls[norm] += 1
        if self._output is not None and args:
            name, output, version = self._output
            # an activation in place would return the very same tensor
            if args[0] is output and _unchanged(output, version):
                self._pairs[name, norm] += 1
        self._output = None

    def _register(self, site: Site, module: nn.Module) -> Callable[[], None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            if inputs is not None:
                with torch.no_grad():
                    for part in _parts(site, inputs):
                        self._add(site, self._shared_rows(site, part))

        return module.register_forward_pre_hook(record, with_kwargs=True).remove

    def _shared_rows(self, site: Site, inputs: Tensor) -> Rows:
        """Query, key and value are called with the very same tensor."""
        assert site.spec is not None
        version = _version(inputs)
        if not site.spec.dims and self._last is not None:
            tensor, before, rows = self._last
            if tensor is inputs and _unchanged(inputs, before):
                return rows
        rows = Rows(self._patches(site, inputs))
        self._last = None if site.spec.dims else (inputs, version, rows)
        return rows

    def _patches(self, site: Site, inputs: Tensor) -> Tensor:
        assert site.spec is not None
        inputs = self._unmasked(site, inputs)
        largest = torch.linalg.vector_norm(inputs, torch.inf).double() if inputs.numel() else None
        if largest is not None and not torch.isfinite(largest):
            raise NumericsError(
                f"layer {site.name!r} is called with NaN or infinity: look at the batch, and at "
                "what the layers before it make of it"
            )
        dtype = self.dtype
        if largest and not in_safe_range(largest.square()):
            dtype = torch.float64
            if not 1e-140 < largest < 1e140:
                raise NumericsError(
                    f"layer {site.name!r} is called with numbers up to {largest.item():.3g}, whose "
                    "squares cannot be summed; scale the batch"
                )
        return input_patches(site.spec, inputs.to(dtype))

    def _unmasked(self, site: Site, values: Tensor) -> Tensor:
        """Without padding, where a layer sees [B, T, C]."""
        assert site.spec is not None
        mask = self.mask
        if site.spec.dims or mask is None or values.shape[:-1] != mask.shape:
            return values
        return values[mask.to(values.device).bool()]

    def _add(self, site: Site, rows: Rows, *, weighted: bool = False) -> None:
        moment = self.moments.get(site.name)
        if moment is None:
            groups, _, features = rows.values.shape
            moment = self.moments[site.name] = Moment(groups, features, weighted=weighted)
        with full_precision():
            moment.update(rows)


def _parts(site: Site, values: Tensor, like: Tensor | None = None) -> Sequence[Tensor]:
    """Some examples at a time, where a convolution's patches of all would take much memory."""
    spec, inputs = site.spec, values if like is None else like
    assert spec is not None
    if not spec.dims or inputs.dim() == spec.dims + 1 or not inputs.numel():
        return [values]
    each = inputs[0].numel() * math.prod(spec.kernel_size)
    return values.split(max(1, MOST // each))


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; of inference tensors torch does not count it."""
    return None if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, before: int | None) -> bool:
    return before is not None and _version(tensor) == before


class SensitivityRecorder(Recorder):
    """The same, each input times the norm of the gradient of a loss by the layer's output.

    Run the model with gradients, and the loss backward, while it is open. No gradients of weights
    are computed.
    """

    def __enter__(self) -> SensitivityRecorder:
        super().__enter__()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._hooks.callback(parameter.requires_grad_)
        return self

    def _register(self, site: Site, module: nn.Module) -> Callable[[], None]:
        def record(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            inputs = first_tensor(args, kwargs)
            if inputs is None or not torch.is_grad_enabled():
                return None
            if not output.requires_grad:
                # from here on there is a graph; a clone may be changed in place
                output = output.detach().requires_grad_().clone()
            # the layer's input may be changed in place before the gradient is known
            kept = inputs.detach().clone()
            output.register_hook(lambda gradient: self._weigh(site, kept, gradient))
            return output

        return module.register_forward_hook(record, with_kwargs=True).remove

    @torch.no_grad()
    def _weigh(self, site: Site, inputs: Tensor, gradient: Tensor) -> None:
        parts = zip(_parts(site, inputs), _parts(site, gradient, like=inputs), strict=True)
        for some, gradients in parts:
            self._weigh_part(site, some, gradients)

    def _weigh_part(self, site: Site, inputs: Tensor, gradient: Tensor) -> None:
        spec = site.spec
        assert spec is not None
        gradient = self._unmasked(site, gradient).to(self.dtype)
        if spec.dims:  # [B, N, *] → [g, B · positions]
            batch = gradient.shape[0] if gradient.dim() == spec.dims + 2 else 1
            positions = math.prod(gradient.shape[-spec.dims :])
            grouped = gradient.reshape(batch, spec.groups, -1, positions)
            squares = grouped.square().sum(2).transpose(0, 1).flatten(1)
        else:
            squares = gradient.square().sum(-1).reshape(1, -1)
        if not torch.isfinite(squares.sum()):
            raise NumericsError(f"layer {site.name!r}: the gradient of its output is not finite")
        roots = squares.sqrt()
        patches = self._patches(site, inputs) * roots.unsqueeze(-1)
        self._add(site, Rows(patches, roots), weighted=True)


def sampled_loss(output: Any, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """A loss whose expected squared gradients are those of the model's own answers.

    For logits [B, *, classes], or [B, classes, *] of images and volumes, the negative
    log-likelihood of classes drawn from them, summed over positions: its squared gradients are the
    Fisher information, and need no labels. For a hidden state a random
    direction: squared gradients of ½‖Δh‖².

    Args:
        output: logits, or an output with `logits` or `last_hidden_state`.
        mask: [B, T], to leave padding out.
        generator: on the CPU.

    Raises:
        ConfigError: an output of another kind.
    """
    hidden: Any = None
    logits: Any = output if isinstance(output, Tensor) else _field(output, "logits")
    if not isinstance(logits, Tensor):
        hidden = _field(output, "last_hidden_state")
    values = logits if isinstance(logits, Tensor) else hidden
    if not isinstance(values, Tensor):
        raise ConfigError(
            f"sensitivity needs an output with logits or last_hidden_state, the model returns "
            f"{type(output).__name__}; give sensitivity=… a function of it that returns a loss"
        )
    if mask is not None and values.shape[:2] == mask.shape:
        values = values[mask.to(values.device).bool()]
    values = values.float()
    if hidden is not None:
        directions = torch.randn(values.shape, generator=generator, device="cpu")
        return (values * directions.to(values)).sum()
    if values.dim() > 3:
        values = values.movedim(1, -1)
    flat = values.flatten(0, -2) if values.dim() > 1 else values.unsqueeze(0)
    shares = flat.detach().softmax(-1).cpu()
    classes = torch.multinomial(shares, 1, generator=generator).squeeze(1).to(flat.device)
    return nn.functional.cross_entropy(flat, classes, reduction="sum")


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
