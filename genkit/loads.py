"""Load a model as somebody without genkit does, then as genkit does: a program for `genkit.push`.

python -P genkit/loads.py folder kind
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    """Load the folder that the command line names, or end with what is wrong."""
    folder, kind = sys.argv[1:]
    modules: dict[str, Any] = sys.modules
    modules["genkit"] = None  # whoever imports it fails
    without(folder, kind)
    del modules["genkit"]
    if kind != "text-to-image":
        import genkit

        genkit.load(folder)


def without(folder: str, kind: str) -> None:
    """Load a model by stock classes, and the code beside it where the class is ours."""
    if kind in ("autoencoder", "gan", "diffusion", "text-to-image"):
        from diffusers import DiffusionPipeline

        ours = kind != "text-to-image"
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=ours, use_safetensors=True)
        return
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = getattr(transformers, head(kind, config))
    _, told = auto.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if told["missing_keys"]:
        sys.exit(f"the weights lack {sorted(told['missing_keys'])}")
    if kind in ("text", "answers"):
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if kind == "classifier":
        transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)


def head(kind: str, config: Any) -> str:
    """Return transformers' class for a kind of model."""
    if kind == "answers":
        return "AutoModelForQuestionAnswering"
    if kind == "classifier":
        return "AutoModelForImageClassification"
    return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"


if __name__ == "__main__":
    main()
