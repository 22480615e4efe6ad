"""The probing run of criterion ``lookahead``: the loss saved by moving one weight as full fine-tuning would.

After the warm-up of the paper's probe the validation batches are cut into two halves. The gradients of a frozen weight
are summed over one half, the weight is moved by ``steps · lr`` along minus the sign of that sum, which is where Adam
would be if the gradient stayed, and the loss is taken on each batch of the other half. Then the halves change roles, so
that every batch has a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import SvdLoraLinear
from hybrid_lora_plugin.probing.measure import prepare_scoring
from hybrid_lora_plugin.probing.methods.svd_lora import SvdLoraMethod
from hybrid_lora_plugin.probing.weight_gradients import weight_gradients

#: Of the float32 gradients that a rank sums up at a time.
SUMMED_BYTES = 4 * 2**30


class LookaheadMethod(SvdLoraMethod):
    """Serves ``lookahead``, and all that ``SvdLoraMethod`` measures.

    State beside that, for P entries in the weights of all candidates and R ranks: the signs of one half, P / R bytes
    on the host (they are sharded as the weights are), and while they are made the gradient sums of as many modules as
    hold 4 GiB in float32, at least one. A group of modules takes one forward and backward pass over the half. Of 7
    billion entries on one GPU the signs are 7 GB, made in 7 groups; on 8 GPUs 0.9 GB each.

    A batch then costs 1 + M forward passes.
    """

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        super().__init__(model, candidates, config)
        self._length = config.probe.lookahead.length
        self._batches = -(-self.rows // self._probe.partitions_per_batch)

    def begin_scoring(self, validation_batch: Callable[[int], Batch]) -> None:
        self._validation_batch = validation_batch
        self._signs: list[Tensor] = []
        self._signs_of: range | None = None

    def score(self, row: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """What ``SvdLoraMethod`` measures, and once a batch ``lookahead``: ``L − L(weight moved)``, ``[M]``.

        Raises:
            ProbeError: no weight moves at all in the dtype of the model.
        """
        measured, loss = super().score(row, batch)
        index, again = divmod(row, self._probe.partitions_per_batch)
        if not again:
            self._look_at(other_half(index, self._batches))
            measured["lookahead"] = loss_saved(self.layers, self._signs, self._length, self._passes, batch)
        return measured, loss

    def _look_at(self, half: range) -> None:
        """Have the signs of the gradients over the batches of ``half``."""
        if self._signs_of == half:
            return
        # Gone before others are made.
        self._signs.clear()
        layers = list(self.layers.values())
        batches = [self._validation_batch(index) for index in half]
        for group in groups_of(layers, SUMMED_BYTES):
            self._signs += gradient_signs(layers, group, self._passes, batches)
        prepare_scoring(self._model, self.layers)
        pairs = zip(layers, self._signs, strict=True)
        moves = any(_moves(layer.base.weight, sign, self._length) for layer, sign in pairs)
        # On all ranks alike: one alone may hold no rows of any weight.
        if not self._passes.ranks.largest(int(moves)):
            raise ProbeError(
                f"probe.lookahead.steps: no weight moves, for steps × lr = {self._length:g} is lost in "
                f"{layers[0].base.weight.dtype} or every gradient is 0; give more probe.lookahead.steps, a higher "
                f"probe.lookahead.lr, or model.dtype=float32"
            )
        self._signs_of = half


def other_half(index: int, batches: int) -> range:
    """The batches whose gradients move the weights for batch ``index``: the half that it is not in."""
    middle = batches // 2
    return range(middle, batches) if index < middle else range(middle)


def groups_of(layers: Sequence[SvdLoraLinear], limit: int) -> Iterator[range]:
    """Consecutive layers whose weights in float32 hold at most ``limit`` bytes, or one layer."""
    start, held = 0, 0
    for index, layer in enumerate(layers):
        size = 4 * layer.base.in_features * layer.base.out_features
        if index > start and held + size > limit:
            yield range(start, index)
            start, held = index, 0
        held += size
    yield range(start, len(layers))


def gradient_signs(
    layers: Sequence[SvdLoraLinear], group: range, passes: Passes, batches: Sequence[Batch]
) -> list[Tensor]:
    """Sign of each weight's gradient, summed over the mean losses of the batches.

    Args:
        layers: the M layers, all active; afterwards the ``e`` of those in ``group`` alone requires a gradient.
        group: which of them; the backward pass ends at the first.
        passes: how to run a batch.
        batches: ``[B, S]`` each.

    Returns:
        int8 in the shape of what this rank holds of each weight of the group, on the CPU.
    """
    for index, layer in enumerate(layers):
        for parameter in (layer.A, layer.B, layer.e, layer.alpha):
            parameter.requires_grad_(False)
        layer.e.requires_grad_(index in group)
    chosen = [layers[index] for index in group]
    sums: dict[int, Tensor] = {}

    def add(index: int, delta: Tensor, x: Tensor) -> None:
        if index in sums:
            sums[index].addmm_(delta.T, x)
        else:
            sums[index] = delta.T @ x

    with weight_gradients(chosen, add):
        for batch in batches:
            passes.backward(batch, ())
    signs = []
    for index, layer in enumerate(chosen):
        layer.e.grad = None
        # Before the sign: a sum of signs is none.
        total = passes.ranks.sum_(sums.pop(index))
        signs.append(_own_part(total.sign_().to(torch.int8), layer.base.weight).cpu())
    return signs


def loss_saved(
    layers: dict[str, SvdLoraLinear], signs: Sequence[Tensor], length: float, passes: Passes, batch: Batch
) -> Tensor:
    """``L − L(weight of m moved by −length · sign)`` of each module, by 1 + M forward passes and no backward.

    Args:
        layers: the M layers, all active.
        signs: what ``gradient_signs`` gave, of all modules.
        length: how far each entry moves.
        passes: how to run a batch on the model the layers are attached to.
        batch: validation batch ``[B, S]``.

    Returns:
        ``[M]`` float64 on the CPU; positive where the move helps.
    """
    before, saved = passes.loss(batch), []
    for layer, sign in zip(layers.values(), signs, strict=True):
        with _moved(layer.base.weight, sign, length):
            saved.append(before - passes.loss(batch))
    return torch.tensor(saved, dtype=torch.float64)


@contextmanager
def _moved(weight: nn.Parameter, sign: Tensor, length: float) -> Iterator[None]:
    """The weight at ``weight − length · sign``, and then its own bits again."""
    local = _local(weight)
    before = local.clone()
    try:
        local.copy_(_step(before, sign, length))
        yield
    finally:
        local.copy_(before)


def _step(local: Tensor, sign: Tensor, length: float) -> Tensor:
    # In at least float32, and rounded to nearest once: what a forward pass in bfloat16 sees of float32 weights.
    wide = local.to(torch.promote_types(local.dtype, torch.float32))
    return torch.add(wide, sign.to(local.device), alpha=-length).to(local.dtype)


def _moves(weight: nn.Parameter, sign: Tensor, length: float) -> bool:
    local = _local(weight)
    return not torch.equal(_step(local, sign, length), local)


def _local(weight: nn.Parameter) -> Tensor:
    """What this rank holds of a weight; shares its storage."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _own_part(whole: Tensor, weight: nn.Parameter) -> Tensor:
    """The part of ``whole`` that this rank holds of ``weight``, without the rest of it; no rank is asked for it."""
    if not isinstance(weight, DTensor):
        return whole
    replicated = DTensor.from_local(whole, weight.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=weight.placements).to_local().clone()
