"""How modules and parameters are spelled: in the plain Hugging Face model, by PEFT, by FSDP1 and on the wire of a sync.

    plain     model.layers.0.self_attn.q_proj.weight
    PEFT      base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight    and .lora_A.default.weight
    wire      model.layers.0.self_attn.q_proj.weight                                and .lora_A.weight

Plain names are used everywhere outside the engine. The wire's names of factors are also those of a checkpoint.
"""

from __future__ import annotations

#: PEFT's name of the one adapter
ADAPTER = "default"
PEFT_PREFIX = "base_model.model."
#: what FSDP1 puts between a module and its name
FSDP1_INFIX = "_fsdp_wrapped_module."
BASE_WEIGHT = ".base_layer.weight"


def plain_name(name: str) -> str:
    """Name of a parameter or module in the plain Hugging Face model, without PEFT's and FSDP1's additions."""
    return name.replace(FSDP1_INFIX, "").removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter name, in PEFT's spelling or the wire's, is a LoRA factor."""
    return ".lora_A." in name or ".lora_B." in name


def is_wrapped(name: str) -> bool:
    """Whether this weight, in PEFT's spelling, is the base of a LoRA layer."""
    return name.endswith(BASE_WEIGHT)


def peft_factor(base_weight: str, kind: str) -> str:
    """PEFT's name of factor ``kind``, A or B, of the LoRA layer whose base weight has this name."""
    return f"{base_weight.removesuffix(BASE_WEIGHT)}.lora_{kind}.{ADAPTER}.weight"


def wire_factor(module: str, kind: str) -> str:
    """Name on the wire of factor ``kind``, A or B, of a plain module."""
    return f"{module}.lora_{kind}.weight"


def wire_name(name: str) -> str:
    """Name on the wire and in a checkpoint of a trained parameter in PEFT's spelling."""
    return plain_name(name).replace(f".{ADAPTER}.", ".")


def split_factor(name: str) -> tuple[str, str] | None:
    """(module, "A" or "B") of a LoRA factor's name on the wire, None for any other name."""
    for kind in "AB":
        if name.endswith(f".lora_{kind}.weight"):
            return name.removesuffix(f".lora_{kind}.weight"), kind
    return None
