"""Log-probabilities of a few rows of tokens under the weights that a verl engine holds (verl 0.9.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import get_ulysses_sequence_parallel_group, set_ulysses_sequence_parallel_group
from verl.workers.utils.padding import no_padding_2_padding


def row_log_probs(engine, rows: Sequence[Sequence[int]], *, packed: bool, at_once: bool = True) -> list[list[float]]:
    """Of every token but the first of each row, nats; the same on all ranks.

    With shards a forward pass is a collective: every rank must call this with the same rows.

    Args:
        engine: verl's FSDP engine, in its ``eval_mode``.
        rows: at least two tokens each.
        packed: the rows one behind the other, as ``use_remove_padding=true`` has them, and split over the ranks of
            Ulysses; otherwise each with padding, whole on every rank.
        at_once: in one forward pass; otherwise one for each row.
    """
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    whole = [torch.tensor(tokens) for tokens in rows]
    ones = [torch.ones(len(tokens) - 1, dtype=torch.int64) for tokens in whole]
    batch = tu.get_tensordict(
        {
            "prompts": nested([tokens[:1] for tokens in whole]),
            "responses": nested([tokens[1:] for tokens in whole]),
            "input_ids": nested(whole),
            "position_ids": nested([torch.arange(len(tokens)) for tokens in whole]),
            "response_mask": nested(ones),
            "loss_mask": nested(ones),
        },
        non_tensor_dict=dict(
            temperature=1.0,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=len(whole) if at_once else 1,
            use_remove_padding=packed,
            use_fused_kernels=bool(engine.model_config.use_fused_kernels),
            global_batch_size=len(whole),
            calculate_entropy=False,
        ),
    )
    group = get_ulysses_sequence_parallel_group()
    if not packed:
        # A row that is not split has nothing to exchange.
        set_ulysses_sequence_parallel_group(None)
    try:
        output = engine.infer_batch(batch, loss_function=None)
    finally:
        set_ulysses_sequence_parallel_group(group)
    answer: list[list[list[float]]] = [[]]
    if "model_output" in output:  # with sequence parallelism only one rank of a group has the outputs
        padded = no_padding_2_padding(output["model_output"]["log_probs"], batch).float()
        answer = [[row[: len(mask)].tolist() for row, mask in zip(padded, ones, strict=True)]]
    if torch.distributed.is_initialized():
        # One answer on all ranks: what follows from it must be the same everywhere.
        torch.distributed.broadcast_object_list(answer)
    return answer[0]
