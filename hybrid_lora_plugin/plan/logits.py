"""What the loss holds of [tokens, vocabulary]: in most runs the largest tensor of all.

Read in verl 0.9.1 (``workers/engine/fsdp/transformer_impl.py:prepare_model_outputs``, ``utils/torch_functional.py``)
and counted on its functions: logits stay in the type that is computed in, and what comes on top are tensors of their
size.
"""

from __future__ import annotations

from hybrid_lora_plugin.plan.run import CHUNKED, COMPILED, EAGER, Pass, Run

#: rows that verl's fused head computes at once
FUSED_ROWS = 512
#: tensors of the logits' size at the peak of a pass without a gradient, in two bytes and in four, by how its entropy
#: is computed; compiled, one of fp32 is written out (seen in the code that inductor makes for a CPU)
_INFERENCE = {"": (1, 1), COMPILED: (3, 2), EAGER: (3, 3), CHUNKED: (1, 1)}
#: the same with a gradient and torch's cross entropy, row by row
_ROW_BY_ROW = {"": (3, 4), COMPILED: (4, 4), EAGER: (7, 7), CHUNKED: (8.5, 5)}
#: with flash-attn's cross entropy, which writes its gradient over the logits where no entropy needs them
_FUSED = {"": (1, 1), COMPILED: (4, 4), EAGER: (7, 7), CHUNKED: (8.5, 5)}
#: the same with rows that keep their padding: verl copies the tokens out of them, without a gradient and with one.
#: It computes the entropy of the padded rows, by its plain function whatever is set
_PADDED = {False: {"": (3, 3), EAGER: (3, 3)}, True: {"": (5, 6), EAGER: (7, 7)}}


def logits_bytes(run: Run, of: Pass, vocabulary: int, itemsize: int, gradient: bool) -> float:
    """Bytes of everything with a column for each token of the vocabulary, at the peak of a pass.

    Args:
        run: how the loss is computed.
        of: the pass.
        vocabulary: columns.
        itemsize: bytes of an element of the logits.
        gradient: whether a backward pass follows.
    """
    if run.fused_head:
        # One chunk in fp32, its softmax and, backwards, its gradient.
        return (3 if gradient else 2) * 4 * min(of.tokens, FUSED_ROWS) * vocabulary
    if run.keeps_padding:
        tensors = float(_PADDED[gradient][EAGER if of.entropy else ""][itemsize > 2])
        if gradient:
            tensors += bool(of.entropy and run.entropy_checkpointing)
        elif not run.unit_temperature:  # with a gradient the unscaled ones are gone before the peak
            tensors += 1
        return tensors * of.tokens * vocabulary * itemsize
    table = _INFERENCE if not gradient else _FUSED if run.fused_cross_entropy else _ROW_BY_ROW
    wide = itemsize > 2
    tensors = float(table[of.entropy][wide])
    if gradient and of.entropy and run.entropy_checkpointing:
        tensors += 1
    if not run.unit_temperature:
        # The unscaled ones are still there; where the gradient was written over the scaled ones, theirs is new.
        tensors += 2 if gradient and run.fused_cross_entropy and not of.entropy else 1
    chunk = 0
    if of.entropy == CHUNKED and not gradient:
        # In fp32 the softmax and its product, and of two bytes also the chunk itself.
        chunk = (2 if wide else 3) * 4 * min(of.tokens, run.entropy_chunk) * vocabulary
    return tensors * of.tokens * vocabulary * itemsize + chunk
