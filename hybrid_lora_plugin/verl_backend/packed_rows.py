"""Whether packed rows (verl's ``use_remove_padding=true``) are computed as rows by themselves: asked at a run's start.

verl packs rows one behind the other and tells their boundaries by the position ids alone. What does not look at these,
a recurrent state, a convolution or an attention kernel, carries one row on into the next, without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from verl.utils.torch_dtypes import PrecisionType

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.verl_backend.row_log_probs import row_log_probs
from hybrid_lora_plugin.verl_backend.run_kinds import MODEL, kind_of_model

#: tokens of a row before another, and of that other
BEFORE, AFTER = 24, 16
#: how far packed rows may be from rows by themselves, nats, by the type that is computed in. On SmolLM2-135M they were
#: at most 3.1e-5 and 0.22.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1.0}
#: how far a row may move with what stands before it, in multiples of what a repeated pass moves, and nats beside that
_REPEATED, _NOTHING = 4.0, 1e-6


@dataclass(frozen=True)
class PackedRows:
    """What the check measures, in nats, the largest of all tokens.

    Attributes:
        difference: of packed rows from rows by themselves; the noise of the type is in it.
        carried: how far a row moves when another of the same length stands before it in the pack. The shapes are the
            same, so it is 0 where nothing is carried over.
        repeated: how far a repeated pass moves the same row; 0 unless a kernel adds up in no fixed order. Measured
            where ``carried`` is not 0.
    """

    difference: float
    carried: float
    repeated: float = 0.0

    @property
    def leaks(self) -> bool:
        """Whether what stands in one row reaches the next."""
        return not self.carried <= _REPEATED * self.repeated + _NOTHING


def measure(engine) -> PackedRows:
    """Two short rows packed and by themselves, and the second with another one before it.

    Every rank must call this; all get the same.

    Args:
        engine: verl's FSDP engine, initialised.
    """
    generator = torch.Generator().manual_seed(0)
    before, other, after = (
        torch.randint(engine.model_config.hf_config.get_text_config().vocab_size, (length,), generator=generator)
        for length in (BEFORE, BEFORE, AFTER)
    )
    with engine.eval_mode():
        packed = row_log_probs(engine, [before, after], packed=True)
        alone = row_log_probs(engine, [before, after], packed=False, at_once=False)
        moved = row_log_probs(engine, [other, after], packed=True)
        difference, carried = _farthest(packed, alone), _farthest(packed[1:], moved[1:])
        if carried == 0:
            return PackedRows(difference, carried)
        again = row_log_probs(engine, [before, after], packed=True)
    return PackedRows(difference, carried, _farthest(packed[1:], again[1:]))


def check_packed_rows(engine) -> str | None:
    """Refuse a run whose packed rows are not what rows by themselves are; every rank must call this.

    Args:
        engine: a ``HybridLoraEngine``, initialised, before its first step.

    Returns:
        What was measured, in a line; None of a run that does not pack.

    Raises:
        ConfigurationError: on every rank. One row reaches the next, or packed rows differ by more than the noise of the
            type that is computed in.
    """
    model = engine.model_config
    if not model.use_remove_padding:
        return None
    dtype = PrecisionType.to_dtype((engine.engine_config.mixed_precision or {}).get("param_dtype", "bf16"))
    found, limit = measure(engine), LIMITS[dtype]
    place = kind_of_model(model).place(MODEL + "use_remove_padding")
    kernel = getattr(engine.module.config, "_attn_implementation", None)
    where = f"{engine.module.config.model_type}, attn_implementation={kernel}, {str(dtype).removeprefix('torch.')}"
    if found.leaks:
        raise ConfigurationError(
            f"{place}: True, but packed rows leak into each other in this model ({where}): what stands in one row "
            f"moves log-probabilities of the next by {found.carried:.1e} nats, wanted 0; give {place}=false",
            see="packed-rows-differ",
        )
    if not found.difference <= limit:
        raise ConfigurationError(
            f"{place}: True, but packed rows have log-probabilities {found.difference:.1e} nats from those of rows by "
            f"themselves ({where}), wanted at most {limit:g}; give {place}=false",
            see="packed-rows-differ",
        )
    return (
        f"packed rows: log-probabilities at most {found.difference:.1e} nats from those of rows by themselves, and "
        f"nothing of one row in the next ({found.carried:.1e}; {where})"
    )


def _farthest(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    one, other = (
        torch.tensor([value for row in each for value in row], dtype=torch.float64) for each in (rows, others)
    )
    # torch's maximum keeps what is no number.
    return (one - other).abs().max().item()
