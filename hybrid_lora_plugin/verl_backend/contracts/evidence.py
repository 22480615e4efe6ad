"""What ``hybrid-lora-evidence`` uses besides: the class of its small bases."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Subject, rows

_BASE = "evidence/replicas/base.py"

EVIDENCE = Subject(
    "Comparisons of selections",
    (
        *rows(
            "evidence",
            "transformers",
            "",
            ("", "evidence/replicas/sft.py", "its version is part of what results depend on"),
            ("Qwen2Config", _BASE, "shape of a small base"),
            ("Qwen2Config.from_pretrained", _BASE, "shape of one that is kept"),
            ("Qwen2ForCausalLM", _BASE, "a small base"),
        ),
    ),
    (),
)
