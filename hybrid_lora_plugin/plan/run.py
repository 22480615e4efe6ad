"""What of a run decides how many bytes it holds and how much it computes; no name here is verl's or Hydra's."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid_lora_plugin.config import HybridLoraConfig

#: how a run trains: under an allocation, LoRA on all linear modules, every weight
HYBRID, LORA, FULL = "hybrid", "lora", "full"
#: how the entropy of [tokens, vocabulary] is computed
EAGER, CHUNKED, COMPILED = "eager", "chunked", "compiled"


@dataclass(frozen=True)
class Pass:
    """One kind of pass over the model.

    Attributes:
        tokens: most tokens of a micro-batch on one GPU.
        entropy: how its entropy is computed, one of ``EAGER``, ``CHUNKED``, ``COMPILED``; "" where it is not.
    """

    tokens: int
    entropy: str = ""


@dataclass(frozen=True)
class RolloutRun:
    """The rollout engine.

    Attributes:
        dtype: of its weights and of keys and values.
        tensor_parallel: workers that hold one copy of the model.
        memory_share: of a GPU's memory that the engine may take, ``gpu_memory_utilization``.
        max_model_len: tokens of the longest sequence.
        max_batched_tokens: tokens of one forward pass at most.
        max_sequences: that generate at once.
        sleeps: whether it gives its memory back while the trainer works.
        sleep_level: 1 keeps the weights in the host's memory, 2 drops them.
        bucket_bytes: of the buffer that weights travel in, at most.
        adapter: whether it runs a LoRA adapter of its own.
    """

    dtype: str
    tensor_parallel: int
    memory_share: float
    max_model_len: int
    max_batched_tokens: int
    max_sequences: int
    sleeps: bool
    sleep_level: int
    bucket_bytes: int
    adapter: bool = False


@dataclass(frozen=True)
class Run:
    """A run as the plan needs it.

    Attributes:
        training: ``HYBRID``, ``LORA`` or ``FULL``.
        nodes, gpus_per_node: of the run.
        shard_ranks: ranks that hold one copy of the model between them.
        strategy: ``fsdp`` or ``fsdp2``.
        stored_dtype: of the checkpoint.
        held_dtype: of weights as they are held: of frozen ones in ``HYBRID``, of all in the others.
        compute_dtype: what is gathered and computed in.
        reduce_dtype: what gradients are reduced in.
        param_offload, optimizer_offload: to the host while they are not in use.
        offload_policy: weights, gradients and optimizer stay in the host (FSDP2's own offloading).
        keeps_gathered: whether layers stay whole between the forward and the backward pass.
        whole_gradients: whether gradients stay whole until the last micro-batch of a mini-batch.
        checkpointing: of activations. activation_offload: what is kept of them lies in the host.
        fused_cross_entropy: flash-attn's, else torch's row by row.
        fused_head: log-probabilities from chunks of hidden states, with no logits of a whole micro-batch.
        unit_temperature: otherwise the scaled logits are another tensor.
        entropy_checkpointing: entropy computed again in the backward pass.
        entropy_chunk: rows of a chunk with ``CHUNKED``.
        update, log_probs, reference: the passes; None where the run has none.
        reference_model: whether the reference policy is a model of its own, in the host, of ``reference_dtype``.
        lora_rank, lora_alpha: of the adapters; 0 without.
        lora_targets: PEFT's ``target_modules`` with ``LORA``.
        hybrid: the options of the plugin with ``HYBRID``.
        sequences: of a step. mini_batches: optimizer steps of a step.
        steps: of the run; None if the command does not say.
        prompt_tokens, response_tokens: of a sequence at most.
        sequence_parallel: GPUs that share one sequence.
        keeps_padding: rows of a micro-batch are computed with their padding (``use_remove_padding=false``).
        padded_by_rows: whether micro-batches are a number of rows, and not of tokens.
        settings: full names of settings by what ``changes`` calls them, and their values.
        notes: what the plan leaves out of this run, each a line for the user.
    """

    training: str
    nodes: int
    gpus_per_node: int
    shard_ranks: int
    strategy: str
    stored_dtype: str
    held_dtype: str
    compute_dtype: str
    reduce_dtype: str
    update: Pass
    sequences: int
    mini_batches: int
    prompt_tokens: int
    response_tokens: int
    steps: int | None = None
    rollout: RolloutRun | None = None
    log_probs: Pass | None = None
    reference: Pass | None = None
    reference_model: bool = False
    reference_dtype: str = "float32"
    param_offload: bool = False
    optimizer_offload: bool = False
    offload_policy: bool = False
    keeps_gathered: bool = False
    whole_gradients: bool = False
    checkpointing: bool = True
    activation_offload: bool = False
    fused_cross_entropy: bool = True
    fused_head: bool = False
    unit_temperature: bool = True
    entropy_checkpointing: bool = False
    entropy_chunk: int = 2048
    lora_rank: int = 0
    lora_alpha: float = 0
    lora_targets: str | tuple[str, ...] = "all-linear"
    hybrid: HybridLoraConfig | None = None
    sequence_parallel: int = 1
    keeps_padding: bool = False
    padded_by_rows: bool = False
    settings: dict[str, tuple[str, object]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """Of the whole run."""
        return self.nodes * self.gpus_per_node

    @property
    def tokens(self) -> int:
        """Of a step, every sequence as long as it may be."""
        return self.sequences * (self.prompt_tokens + self.response_tokens)
