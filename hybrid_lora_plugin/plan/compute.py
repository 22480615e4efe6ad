"""Operations of a step and of the probe, and the time of the trainer under an assumed share of the peak.

A product with P parameters takes 2·P operations for each token forward, 2·P for gradients of activations and 2·P for
those of the weights that train; where activations are computed again, the decoder layers take another forward pass.
Attention's products of two activations are counted beside them, causal, for sequences as long as they may be. Norms,
biases and the loss are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.plan.model import PlannedModel, text_config
from hybrid_lora_plugin.plan.run import HYBRID, Run


def update_flops(counts: ParameterCounts, embedding: int, head: int, checkpointing: bool) -> int:
    """Operations of an update for each token, attention's left out.

    Args:
        counts: of the model as it trains.
        embedding: parameters of the embedding, and of the head where that has its own.
        head: parameters of the product that gives the logits.
        checkpointing: whether activations are computed again.
    """
    inside, again = counts.frozen + counts.full - embedding, int(checkpointing)
    if counts.frozen == 0:
        return 2 * ((3 + again) * inside + 3 * head)
    return 2 * ((2 + again) * (inside + counts.lora) + 2 * head + counts.full + counts.lora)


def forward_flops(counts: ParameterCounts, embedding: int, head: int, adapters: bool = True) -> int:
    """Operations of a forward pass for each token, attention's left out."""
    return 2 * (counts.frozen + counts.full - embedding + head + (counts.lora if adapters else 0))


def attention_flops(config, tokens: int) -> int:
    """Operations of attention's two products for each token of a sequence, one forward pass, causal."""
    text = text_config(config)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_attention_heads * size * tokens


@dataclass(frozen=True)
class Compute:
    """Operations, over all GPUs.

    Attributes:
        update, log_probs, reference, generation: of one step; generation is of its products alone, and is bound by
            memory on a GPU, so no time follows from it.
        probe: of the whole probe; 0 where the run does not probe. probe_tokens: that it reads.
        tokens: of one step.
        steps: of the run, None if not known.
    """

    update: float
    log_probs: float
    reference: float
    generation: float
    probe: float
    probe_tokens: int
    tokens: int
    steps: int | None

    @property
    def step(self) -> float:
        """Of one step."""
        return self.update + self.log_probs + self.reference + self.generation

    @property
    def trainer(self) -> float:
        """Of one step, without generation."""
        return self.step - self.generation

    @property
    def probe_in_steps(self) -> float:
        """How many steps of the run the probe takes as many operations as."""
        return self.probe / self.step

    @property
    def probe_share(self) -> float | None:
        """The probe against the run; None where nobody said how long the run is."""
        return self.probe / (self.steps * self.step) if self.steps else None


def compute(model: PlannedModel, run: Run) -> Compute:
    """Operations of a run."""
    counts, embedding, head = model.counts, model.embedding, model.head
    length = run.prompt_tokens + run.response_tokens
    attention = attention_flops(model.config, length)
    again = 1 + run.checkpointing
    update = run.tokens * (update_flops(counts, embedding, head, run.checkpointing) + (2 + again) * attention)
    forward = run.tokens * (forward_flops(counts, embedding, head) + attention)
    bare = run.tokens * (forward_flops(counts, embedding, head, adapters=False) + attention)
    probe, probe_tokens = probe_flops(model, run)
    return Compute(
        update=update,
        log_probs=forward if run.log_probs else 0,
        reference=bare if run.reference else 0,
        generation=(bare if run.rollout else 0),
        probe=probe,
        probe_tokens=probe_tokens,
        tokens=run.tokens,
        steps=run.steps,
    )


def probe_flops(model: PlannedModel, run: Run) -> tuple[float, int]:
    """Operations of the probe, and tokens that it reads, every row as long as it may be.

    Of an SVD-LoRA on every candidate: a warm-up that trains the adapters, then two masked passes for each partition.
    A probe of the run's own objective ``policy`` also generates what it reads, as the run's steps do.
    """
    if run.training != HYBRID or not model.drawn or run.hybrid.criterion == "random":
        return 0.0, 0
    probe: ProbeConfig = run.hybrid.probe
    adapters = sum(candidate.lora_parameters(run.hybrid.lora.rank) for candidate in model.candidates)
    if probe.objective == "policy":
        length, rows = run.prompt_tokens + run.response_tokens, run.sequences
    else:
        length, rows = probe.max_length, probe.batch_size
    inside, head = model.counts.frozen + model.counts.full - model.embedding, model.head
    attention = attention_flops(model.config, length)
    # Forward and gradients of activations, and in the warm-up those of the adapters.
    through = 2 * (2 * (inside + adapters + head)) + 3 * attention
    warm_up = probe.most_warmup_steps * rows * length
    scored = probe.most_partitions * rows * length
    generated = 2 * (inside + head) if probe.objective == "policy" else 0
    operations = warm_up * (through + 2 * adapters + generated) + scored * (2 * through + generated)
    return float(operations), warm_up + scored


def seconds(operations: float, gpus: int, teraflops: float, share: float) -> float:
    """Time at a share of the peak of every GPU."""
    return operations / (gpus * teraflops * 1e12 * share)
