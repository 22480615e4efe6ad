"""Save the text model of a multimodal checkpoint alone, with its tokenizer, under the names of a causal language model.

Multimodal models are refused: the probe, verl and vLLM would each load another class of them. transformers loads the
text model of Qwen3.5 from the multimodal checkpoint, and writes the multimodal names again unless it is told not to.

From the command line: ``python -m recipes.text_model MODEL FOLDER``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybrid_lora_plugin.files import complete_folder


def save_text_model(model: str | Path, folder: str | Path) -> Path:
    """Write ``folder``, whole or not at all.

    Args:
        model: Hugging Face folder or name of the checkpoint; its weights keep their types.
        folder: where to.

    Raises:
        OSError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with complete_folder(folder) as unfinished:
        text.save_pretrained(unfinished, save_original_format=False)
        tokenizer.save_pretrained(unfinished)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.text_model", description="Save the text model of a multimodal checkpoint alone."
    )
    parser.add_argument("model", help="Hugging Face folder or name of the checkpoint")
    parser.add_argument("folder", type=Path, help="where to")
    options = parser.parse_args(arguments)
    print(f"{save_text_model(options.model, options.folder)}: the text model and its tokenizer")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
