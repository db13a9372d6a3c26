"""The layers in training: what each is projected to, and how all are, by one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rankprune import engine
from rankprune.distributed import Team
from rankprune.engine import Job, Projected
from rankprune.errors import NumericsError
from rankprune.layers import LayerSpec
from rankprune.linalg import check_finite
from rankprune.schemes import Scheme
from rankprune.sharded import full_tensor, is_sharded, local_part, spread_like


@dataclass
class Target:
    """A layer in training.

    Attributes:
        name: in the model.
        module: whose `weight` is projected.
        spec: the layer in numbers.
        scheme: how its weight is a batch of matrices.
        rank: to which it was last projected, or is to be first.
        energy: share that the last projection kept.
        polar: U Vᵀ, shaped and sharded as the weight is; None where this step has none.
        start: what the next projection starts from.
    """

    name: str
    module: nn.Module
    spec: LayerSpec
    scheme: Scheme
    rank: int
    energy: float | None = None
    polar: Tensor | None = None
    start: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def matrices(self) -> Tensor:
        """[batch, rows, cols]; all processes must ask for a sharded weight's."""
        return self.scheme.to_matrix(self.spec, full_tensor(self.weight.detach()))

    def spread(self, matrices: Tensor) -> Tensor:
        """Matrices in the weight's shape, sharded as the weight is."""
        return self.like_weight(self.scheme.from_matrix(self.spec, matrices))

    def like_weight(self, full: Tensor) -> Tensor:
        """A tensor of the weight's shape, sharded as the weight is."""
        return spread_like(self.weight.detach(), full)

    def apply(self, done: Projected) -> None:
        """Put a projection into the weight, and keep what comes with it."""
        if done.nearest is not None:
            nearest = self.spread(done.nearest)
            # the engine works in the place of matrices that are views of the weight
            if is_sharded(nearest) or nearest.data_ptr() != self.weight.data_ptr():
                self.weight.copy_(nearest)
        self.rank, self.energy, self.start = done.rank, done.energy, done.start
        self.polar = None if done.polar is None else self.spread(done.polar)


def check_weights(targets: Sequence[Target], team: Team) -> None:
    """Refuse weights that hold NaN or infinity, in one look at all of them."""
    if not targets:
        return
    device = targets[0].weight.device
    weights = [target.weight.detach() for target in targets]
    # a norm is finite only where everything is, and needs no memory
    norms = torch._foreach_norm([local_part(weight) for weight in weights])
    flags = torch.isfinite(torch.stack([norm.float().to(device) for norm in norms]))
    finite = flags.tolist()
    if not all(finite):  # a norm overflows before its weight does
        exact = [torch.isfinite(local_part(weight)).all() for weight in weights]
        flags = torch.stack([flag.to(device) for flag in exact])
        finite = flags.tolist()
    if team.size > 1:
        finite = team.all_true(flags).tolist()
    if not all(finite):
        index = finite.index(False)
        name = targets[index].name
        check_finite(full_tensor(weights[index]), name)
        raise NumericsError(
            f"layer {name!r}: the weight holds NaN or infinity in another process and not in "
            "this one; the processes have drifted apart: go back to the last good checkpoint"
        )


def carry_out(
    targets: Sequence[Target], jobs: Sequence[Job], team: Team
) -> Iterator[tuple[Target, Projected]]:
    """One job a target, together with the other processes."""
    sharded = any(is_sharded(target.weight) for target in targets)
    for wave in team.waves([job.cost() for job in jobs], sharded=sharded):
        own = [index for index, owner in wave if owner == team.rank]
        todo = [jobs[index] for index in own]
        if sharded and team.size > 1:
            for index, _ in wave:  # all processes gather every matrix, its owner keeps it
                matrices = targets[index].matrices()
                if index in own:
                    todo[own.index(index)] = replace(jobs[index], load=_Gathered(matrices))
            del matrices
        done = engine.project(todo)
        del todo  # and what it keeps, as soon as the engine is done
        if team.size == 1:
            yield from ((targets[own[i]], result) for i, result in done)
            continue
        results: dict[int, Projected | Exception] = {}
        try:
            results.update((own[i], result) for i, result in done)
        except Exception as failure:  # the others must not wait for what does not come
            results.update((index, failure) for index in own if index not in results)
        for index, result in team.share(jobs, wave, results, sharded=sharded):
            yield targets[index], result


@dataclass(frozen=True)
class _Gathered:
    """Loads matrices that are here already."""

    matrices: Tensor

    def __call__(self) -> Tensor:
        return self.matrices
