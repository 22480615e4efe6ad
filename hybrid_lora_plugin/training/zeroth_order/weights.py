"""The frozen weights that move: their float32 masters, and what the model holds, written afresh from these.

Adding εz to a bfloat16 weight and taking it off again does not give the weight back. So nothing is ever taken off:
``master ± εz`` is rounded into the held weights for a measurement, and ``master`` after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.training.dtensor import first_element, local_tensor
from hybrid_lora_plugin.training.rounding import ACCELERATOR_CHUNK, CHUNK
from hybrid_lora_plugin.training.zeroth_order.signs import signs

#: below it, ±ε is lost in the rounding of a bfloat16 weight and c says little of the slope
LEAST_EPSILON = 3e-4
HELD = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Move:
    """One move along one direction: ``w ← w − rate · slope · z(seed)``.

    Attributes:
        step: optimizer step that it belongs to.
        seed: of the direction.
        slope: c, the measured slope of the loss along it.
        rate: learning rate.
    """

    step: int
    seed: int
    slope: float
    rate: float

    @property
    def length(self) -> float:
        """``rate · slope`` as float32, what every element moves by: one number on every machine."""
        return torch.tensor(self.rate * self.slope, dtype=torch.float64).float().item()


class PerturbedWeights:
    """This rank's part of the weights that zeroth order moves.

    Attributes:
        epsilon: ε.
        shapes, dtypes: of the whole parameters, as the model holds them, by plain name.
        masters: this rank's part of each, ``[n]`` float32 (float64 where the model holds that), by plain name.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[tuple[str, Tensor]], epsilon: float) -> None:
        """Take the masters from what the model holds.

        Args:
            parameters: (name, parameter), plain tensors or DTensors whose rows are sharded; they may be gathered for a
                forward pass at no time while a method of this class runs.
            epsilon: how far a weight is moved to measure a slope.

        Raises:
            ConfigurationError: there is none, one is held in a type or sharding in which this cannot be done, or
                ``epsilon`` is too small for one of them.
        """
        self._held: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        for given, parameter in parameters:
            name = plain_name(given)
            _check(name, parameter, epsilon)
            self._held[name] = parameter
            values = local_tensor(parameter).detach().reshape(-1)
            self.masters[name] = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
        if not self._held:
            raise ConfigurationError("zeroth order: no frozen weight is named; name some, or switch it off")
        self.epsilon = epsilon
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._held.items()}
        self.dtypes = {name: parameter.dtype for name, parameter in self._held.items()}

    @property
    def bytes(self) -> int:
        """Bytes of the masters on this rank."""
        return sum(master.nbytes for master in self.masters.values())

    def to(self, device: torch.device | str) -> None:
        """Keep the masters there from now on."""
        # Waits for each copy, so that no host reads one that is on its way.
        self.masters = {name: master.to(device) for name, master in self.masters.items()}

    @torch.no_grad()
    def perturb(self, seed: int, direction: int) -> None:
        """Let the model hold ``master ± εz``, rounded to nearest.

        Args:
            seed: of z.
            direction: +1 or −1.
        """
        for name, held, master, first in self._chunks():
            z = signs(seed, name, first, len(master), master.device)
            # ±ε is exact, so there is one rounding in the master's type and one in the held one.
            held.copy_(torch.add(master, z, alpha=direction * self.epsilon))

    @torch.no_grad()
    def restore(self) -> None:
        """Let the model hold the masters, rounded to nearest: what it held before, where no move was made."""
        for _, held, master, _ in self._chunks():
            held.copy_(master)

    @torch.no_grad()
    def move(self, moves: Sequence[Move]) -> None:
        """Move the masters, one move after the other; the model holds them after ``restore``.

        An element takes one subtraction a move and nothing else, so that its bits depend on its index and on no
        sharding or device.
        """
        lengths = [(move.seed, move.length) for move in moves]
        for name, _, master, first in self._chunks():
            for seed, length in lengths:
                master.sub_(signs(seed, name, first, len(master), master.device), alpha=length)

    def _chunks(self) -> Iterator[tuple[str, Tensor, Tensor, int]]:
        """(name, held, master, index in the whole tensor of the first element) of small parts."""
        for name, parameter in self._held.items():
            master = self.masters[name]
            held = local_tensor(parameter).detach().view(-1)
            size, first = CHUNK if master.device.type == "cpu" else ACCELERATOR_CHUNK, first_element(parameter)
            for at in range(0, len(master), size):
                yield name, held[at : at + size], master[at : at + size], first + at


def require_epsilon(epsilon: float, dtype: torch.dtype) -> None:
    """Refuse an ε that is lost in the rounding of ``dtype``.

    Args:
        epsilon: ε.
        dtype: of the weights, as they are held or computed with, whichever is narrower.

    Raises:
        ConfigurationError: it is, or it is no number above 0.
    """
    if not 0 < epsilon < float("inf"):
        raise ConfigurationError(f"zeroth order: epsilon is {epsilon:g}; give a number above 0, e.g. 1e-3")
    if dtype.itemsize < 4 and epsilon < LEAST_EPSILON:
        raise ConfigurationError(
            f"zeroth order: epsilon is {epsilon:g} with weights in {dtype}, whose rounding hides a change that small; "
            f"give {LEAST_EPSILON:g} or more, e.g. 1e-3, or weights in float32".replace("torch.", "")
        )


def _check(name: str, parameter: Tensor, epsilon: float) -> None:
    if parameter.dtype not in HELD:
        raise ConfigurationError(
            f"zeroth order: {name} is held in {parameter.dtype}, wanted one of float32, float64, bfloat16, float16; "
            "load the model without quantisation".replace("torch.", "")
        )
    require_epsilon(epsilon, parameter.dtype)
    placements = getattr(parameter, "placements", ())
    # By its very type: a strided shard is one of rows too, and of others.
    shards = [one for one in placements if type(one) is Shard and one.dim == 0]
    if len(shards) > 1 or not all(one in shards or isinstance(one, Replicate) for one in placements):
        found = ", ".join(map(str, placements))
        raise ConfigurationError(
            f"zeroth order: {name} is sharded as {found}, wanted whole rows over one dimension of the mesh; use FSDP2 "
            "without tensor parallelism"
        )
    if not local_tensor(parameter).is_contiguous():
        raise ConfigurationError(f"zeroth order: {name} is not contiguous in memory; copy it with .contiguous() first")
