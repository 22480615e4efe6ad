"""What a probe holds on each device and on the host, from shapes: by moment, for every method.

Every row is taken to be as long as it may be, and every one of its tokens to be trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid_lora_plugin.candidates import Candidate, find_candidates, meta_model
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.model_families import recurrent_layers
from hybrid_lora_plugin.plan.model import layer_of, text_config
from hybrid_lora_plugin.plan.probe_passes import DELTA, NORM, NOTHING, SKETCH, SVD, ProbePass, probe_activations
from hybrid_lora_plugin.probing.forward import MICRO_BATCH_TOKENS
from hybrid_lora_plugin.probing.method import warmup_steps
from hybrid_lora_plugin.probing.methods.lookahead import SUMMED_BYTES
from hybrid_lora_plugin.probing.sketch import WIDTH
from hybrid_lora_plugin.scoring import get_criterion

GIB = 1 << 30
#: float32, in which all of a probe's own is held
_WIDE = 4
#: tensors of [tokens, vocabulary] in float32 at the loss's backward pass: log-probabilities, and two gradients; without
#: a backward pass the logits and their logarithm
_LOGITS = {True: 3, False: 2}
_TRAINED = {"svd_lora": ("A", "B", "e", "alpha"), "adalora": ("A", "B", "e"), "full_delta": ("D",)}
#: bytes for each parameter of the probe beside its value, gradient and both moments
_MORE = {"adalora": 8, "autolora": 8}


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a stage, on the fullest device.

    Attributes:
        stage: of the probe.
        parts: bytes by what they are.
    """

    stage: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class ProbeMemory:
    """What a probe needs.

    Attributes:
        parameters: of the base. dtype: of the base. ranks: that share it.
        moments: in order.
        host: bytes on the first rank's machine by what they are, where devices have memory of their own.
    """

    parameters: int
    dtype: str
    ranks: int
    moments: list[Moment]
    host: dict[str, float]

    @property
    def fullest(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def needed(self) -> float:
        """Bytes of it."""
        return self.fullest.total

    def line(self, device_bytes: float | None, device: str = "GPU") -> str:
        """All of it in one line; ``device_bytes`` is the memory of one device, None where that is not known."""
        parts = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in self.fullest.parts.items() if size >= 0.005 * GIB
        )
        of = "" if device_bytes is None else f" of {device_bytes / GIB:.1f}"
        host = sum(self.host.values())
        return (
            f"{_count(self.parameters)} parameters in {self.dtype} on {self.ranks} × {device}: "
            f"{self.needed / GIB:.2f}{of} GiB on each by the formula, in {self.fullest.stage}"
            + (f" ({parts})" if parts else "")
            + (f"; {host / GIB:.2f} GiB of the host ({', '.join(self.host)})" if host and device != "cpu" else "")
        )


def _count(parameters: int) -> str:
    size, unit = next((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if parameters >= s or s == 1)
    return f"{parameters / size:.1f}{unit}"


def known_beforehand(model_config: Any) -> bool:
    """Whether ``probe_memory`` speaks of this model: recurrent layers hold very different states with fused kernels and
    without.
    """
    return not recurrent_layers(text_config(model_config))


def probe_memory(model_config: Any, config: ProbeCommandConfig, dtype: str, ranks: int) -> ProbeMemory:
    """Bytes of a probe with objective ``sft``.

    Args:
        model_config: the Hugging Face config.
        config: of the command, or what a run would give it; its criterion has a method.
        dtype: of the base, as it is held and computed in.
        ranks: processes that share the base.

    Raises:
        ConfigurationError: the model is one that is not probed.
    """
    return _Formula(model_config, config, dtype, ranks).memory()


class _Formula:
    def __init__(self, model_config: Any, config: ProbeCommandConfig, dtype: str, ranks: int) -> None:
        self._model_config, self._config, self._dtype, self._ranks = model_config, config, dtype, ranks
        self._probe, self._method = config.probe, get_criterion(config.criterion).method
        self._trust = config.model.trust_remote_code
        self._model = meta_model(model_config, self._trust)
        self._candidates = find_candidates(self._model)
        self._width = getattr(torch, dtype).itemsize
        self._rank = config.probe.adalora.initial_rank if self._method == "adalora" else config.lora.rank
        longest, self._rows = self._probe.max_length, -(-self._probe.batch_size // ranks)
        if self._probe.micro_batch_tokens:
            tokens = max(self._probe.micro_batch_tokens, longest)
        else:
            tokens = longest * (self._probe.micro_batch_size or max(1, MICRO_BATCH_TOKENS // longest))
        self._tokens = min(tokens, self._rows * longest)

    def memory(self) -> ProbeMemory:
        parameters = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        total = sum(map(math.prod, parameters.values()))
        moments = [self._loading(parameters)]
        if warmup_steps(self._config):
            moments += self._warm_up()
        moments += self._scoring()
        base = self._base(parameters)
        moments = [Moment(one.stage, base | one.parts) for one in moments]
        return ProbeMemory(total, self._dtype, self._ranks, moments, self._host(total))

    # -- the base -----------------------------------------------------------------------------------------------

    def _base(self, parameters: dict[str, torch.Size]) -> dict[str, float]:
        """Each parameter's rows on the first rank."""
        shares = (-(-shape[0] // self._ranks) * math.prod(shape[1:]) for shape in parameters.values())
        return {"base": self._width * sum(shares)}

    def _loading(self, parameters: dict[str, torch.Size]) -> Moment:
        """On several ranks a unit of FSDP is whole on the first while it is cut, and a tensor while it travels."""
        whole = 0 if self._ranks == 1 else self._width * max(*self._units().values(), self._outside())
        return Moment("loading", {"on its way": whole})

    def _units(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, parameter in self._model.named_parameters():
            if (layer := layer_of(name)) is not None:
                sizes[layer] = sizes.get(layer, 0) + parameter.numel()
        return sizes

    def _outside(self) -> int:
        return sum(parameter.numel() for name, parameter in self._model.named_parameters() if layer_of(name) is None)

    def _gathered(self) -> dict[str, float]:
        """Whole on each rank in a pass: what is in no decoder layer, the layer that computes, and the next."""
        if self._ranks == 1:
            return {}
        return {"gathered": self._width * (self._outside() + 2 * max(self._units().values()))}

    # -- stages -------------------------------------------------------------------------------------------------

    @property
    def _kind(self) -> str:
        return {"full_delta": DELTA, "features": NOTHING}.get(self._method, SVD)

    def _own(self) -> float:
        """Parameters of the probe."""
        if self._kind == NOTHING:
            return 0
        if self._kind == DELTA:
            return float(sum(map(_entries, self._candidates)))
        return float(sum(one.lora_parameters(self._rank) + self._rank + 1 for one in self._candidates))

    def _warm_up(self) -> Iterator[Moment]:
        own = self._own()
        held = {
            "the probe's parameters": _WIDE * own,
            "AdamW's moments": 2 * _WIDE * own,
            "averages and copies": _MORE.get(self._method, 0) * own,
        }
        trained = _TRAINED.get(self._method, _TRAINED["svd_lora"])
        yield Moment("the warm-up", held | self._pass(trained, gradients=_WIDE * own))
        # The root of the second moment; on several ranks the sums of gradients travel in one piece before.
        step = {"their gradients": _WIDE * own, "optimizer step": _WIDE * own}
        yield Moment("the optimizer's step", held | step)

    def _scoring(self) -> Iterator[Moment]:
        method, probe = self._method, self._probe
        if method in ("adalora", "autolora"):
            return
        own = {"the probe's parameters": _WIDE * self._own()}
        if method == "features":
            # Inputs and outputs of one module, and its weight, in float32.
            largest = max(self._candidates, key=_entries)
            wide = _WIDE * (self._tokens * (largest.in_features + 2 * largest.out_features) + _entries(largest))
            yield Moment("scoring", own | self._pass((), beside_a_layer={"one module": wide}))
            return
        if method == "full_delta":
            # Both masked passes add to one gradient.
            yield Moment("scoring", own | self._pass(("D",), gradients=_WIDE * self._own(), again=True))
            return
        if method == "weight_gradient":
            entries = min(WIDTH, max(map(_entries, self._candidates)))
            # Sketches and samples in float32; which entries are sampled, and their signs.
            sketches = len(self._candidates) * entries * (2 * _WIDE + 8 + 1)
            yield Moment("scoring", own | {"sketches": sketches} | self._pass(("e",), SKETCH))
            return
        yield Moment("scoring", own | self._pass(("e",)))
        if probe.controls:
            yield Moment("the controls", own | self._earlier() | self._pass(("e",), NORM))
        if method == "lookahead":
            sums = min(_WIDE * sum(map(_entries, self._candidates)), SUMMED_BYTES)
            sums = max(sums, _WIDE * max(map(_entries, self._candidates)))
            yield Moment("summing gradients", own | {"sums of gradients": sums} | self._pass(("e",), NORM))
            moved = (self._width + 2 * _WIDE) * max(map(_entries, self._candidates)) / self._ranks
            yield Moment("looking ahead", own | {"the moved weight": moved} | self._pass(()))

    @property
    def _several(self) -> bool:
        """Whether a batch takes more than one pass."""
        return self._rows * self._probe.max_length > self._tokens

    def _earlier(self) -> dict[str, float]:
        """Gradients of the weights that wait for the last micro-batch, shared by the ranks."""
        return {"sums of gradients": self._several * _WIDE * sum(map(_entries, self._candidates)) / self._ranks}

    def _pass(
        self,
        trained: tuple[str, ...],
        weight_gradients: str = "",
        gradients: float = 0,
        again: bool = False,
        beside_a_layer: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Activations and logits at the fuller of two moments, the loss and a layer's backward pass.

        Args:
            trained: parameters of a layer that get a gradient.
            weight_gradients: as of ``ProbePass``.
            gradients: bytes of all that get one, there from the first backward pass on.
            again: whether a pass of the same batch went before.
            beside_a_layer: what else is there while a layer is computed.
        """
        of = ProbePass(
            self._kind, self._rank, trained, self._tokens, self._dtype, self._probe.gradient_checkpointing,
            weight_gradients,
        )  # fmt: skip
        layers = probe_activations(self._model_config, of, self._trust)
        logits = self._tokens * self._vocabulary * _WIDE * _LOGITS[bool(trained)]
        # Of rows with padding: a bool for each two tokens of a row, and the same in the type that is computed in.
        parts = {"attention mask": (1 + self._width) * self._tokens * self._probe.max_length} | self._gathered()
        earlier = gradients if again or self._several else 0
        loss = {"their gradients": earlier, "activations": layers.kept, "logits and loss": logits} | parts
        layer = {"their gradients": gradients, "activations": layers.peak} | parts | (beside_a_layer or {})
        return max(loss, layer, key=lambda one: sum(one.values()))

    @property
    def _vocabulary(self) -> int:
        head: nn.Module = self._model.get_output_embeddings()
        return head.weight.shape[0]

    # -- host ---------------------------------------------------------------------------------------------------

    def _host(self, total: int) -> dict[str, float]:
        parts = {"the base as it is read": float(self._width * total)}
        if self._method == "lookahead":
            parts["signs"] = float(sum(map(_entries, self._candidates)))
        if self._method == "weight_gradient":
            each = 9 if self._config.criterion == "residual_gradient" else 5
            batches = -(-self._probe.most_partitions // self._probe.partitions_per_batch)
            parts["sketches"] = float(each * WIDTH * len(self._candidates) * batches)
        return parts


def _entries(candidate: Candidate) -> int:
    return candidate.in_features * candidate.out_features


#: what lowers the memory of a probe, in the order of what it costs
_CHANGES = (
    ("probe.gradient_checkpointing=true", lambda probe: {"gradient_checkpointing": True}),
    (
        "probe.micro_batch_size=1",
        lambda probe: {} if probe.micro_batch_tokens else {"micro_batch_size": 1},
    ),
    ("probe.controls=false", lambda probe: {"controls": False}),
)


def what_fits(model_config: Any, config: ProbeCommandConfig, dtype: str, ranks: int, device_bytes: float) -> str | None:
    """The options, in the order of what they cost, with which a probe fits on its devices; None if none of them do."""
    given: list[str] = []
    for words, change in _CHANGES:
        changed = dataclasses.replace(config.probe, **change(config.probe))
        if changed == config.probe:
            continue
        given.append(words)
        config = dataclasses.replace(config, probe=changed)
        found = probe_memory(model_config, config, dtype, ranks)
        if found.needed <= device_bytes:
            return f"{' '.join(given)} ({found.needed / GIB:.2f} GiB)"
    return None
