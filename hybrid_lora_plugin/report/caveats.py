"""What may be believed of a choice: one honest paragraph for each criterion, for ``report.md``."""

from __future__ import annotations

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.allocation.schema import Allocation

_TOY = "a toy: a Qwen2 of 0.6 M parameters, six seeds, 10 % budget"
_COMPARE = "Compare with random allocations of the same budget before you rely on it."
_ORIGIN = {
    "full_pruning": "The paper names this variant (Hybrid-LoRA-4) and defines no score for it; this one is our reading",
    "alpha": "The paper describes this score beside its own (Eq. 8)",
    "perturbation": "The paper describes this score beside its own (Eq. 9)",
    "adalora": "AdaLoRA was made to share out the ranks of adapters",
    "autolora": "AutoLoRA was made to choose the ranks of adapters",
    "lora_drop": "LoRA-Drop was made to leave out adapters",
    "snip": "SNIP was made to prune weights, and serves as a control without an established direction",
}
#: Criteria that measure nothing of the model.
CONTROLS = ("random", "lora_ffn", "explicit", "spread")


def caveats_title(allocation: Allocation) -> str:
    """Title of the section: a control has no score to trust."""
    return "What this choice is" if allocation.selection.criterion in CONTROLS else "How far to trust it"


def caveats_text(allocation: Allocation) -> str:
    """The paragraph for this allocation's criterion, direction and normalisation."""
    selection = allocation.selection
    name = selection.criterion
    if name == "hybrid":
        return _hybrid(selection.direction, selection.normalise)
    if name.startswith("hybrid_"):
        return (
            "This is a variant of the paper's Hybrid-Score, and like it unproven: in the study behind this project "
            f"({_TOY}) the score itself, lowest first, did worse than choosing modules at random, and that study says "
            f"nothing about the variant. {_COMPARE}"
        )
    if name == "random":
        return (
            "A control: the scores are seeded random numbers, which know nothing of the model. One draw may be lucky; "
            "draw five or more, each with its own seed, before you compare another criterion with them."
        )
    if name == "lora_ffn":
        return "A control chosen by rule: which modules are full follows from their type; nothing was measured."
    if name == "spread":
        return _spread(allocation)
    if name == "trial":
        return _trial(allocation)
    if name == "explicit":
        return "The fully fine-tuned modules were listed by the user; nothing was measured to choose them."
    if name == "gradient_norm":
        return (
            f"Gradients of the untouched weights are a control; no direction is established for them. In the study "
            f"behind this project ({_TOY}) choosing by gradient norm failed. That refutes nothing at your scale. "
            f"{_COMPARE}"
        )
    origin = _ORIGIN.get(name, f"'{name}' is unproven here")
    return f"{origin}; that its order tells which modules gain from full fine-tuning is an assumption. {_COMPARE}"


def _hybrid(direction: str, normalise: str) -> str:
    if direction == "lowest" and normalise == "none":
        finding = (
            "choosing the lowest scores did worse than choosing modules at random at the same budget (on fresh seeds "
            "the difference could not be told from none)"
        )
    elif direction == "highest":
        finding = "which end of the score was the better one to fully fine-tune changed with the learning rate"
    elif normalise == "type_zscore":
        finding = "the score in units of its type's spread did better than the raw score, which did worse than random"
    else:
        finding = "the raw score, lowest first, did worse than random; this normalisation is another choice"
    return (
        f"The Hybrid-Score is the paper's criterion, and it is unproven: in the study behind this project ({_TOY}) "
        f"{finding}. That refutes nothing at your scale, and it is no evidence in favour. {_COMPARE}"
    )


def _trial(allocation: Allocation) -> str:
    if allocation.trial is None:
        return "All candidates chose the same modules, so that nothing was trained and nothing compared."
    return (
        "Each candidate was trained for a short while under the rates of the run, and the best one on held-out rows is "
        "used. What leads after so few steps need not lead at the end of a run, one run of each says nothing of "
        "another seed, and the best of several is better here than it will be on other rows. Whether such a trial "
        "chooses better than a random draw has not been measured."
    )


def _spread(allocation: Allocation) -> str:
    text = "A control chosen by rule: modules of one type, spread evenly over the depth, without a measurement."
    if {module.type for module in allocation.modules if module.assignment == FULL} == {"o_proj"}:
        text += (
            f" In the first study behind this project ({_TOY}) o_proj of every layer beat random choices in all six "
            "seeds; on another base model, in twelve, it did not."
        )
    return text
