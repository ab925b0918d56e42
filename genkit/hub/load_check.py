"""Load a model with genkit, then without it: a program for `genkit.push`.

python -P genkit/hub/load_check.py folder kind
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the folder that the command line names; the last line of an error says what is wrong."""
    folder, kind = sys.argv[1:]
    sys.addaudithook(refuse_network)
    load_with_genkit(folder, kind)
    modules: dict[str, Any] = sys.modules
    for name in [name for name in modules if name.partition(".")[0] == "genkit"]:
        del modules[name]
    modules["genkit"] = None  # importing it fails from here on
    load_without_genkit(folder, kind)


def load_with_genkit(folder: str, kind: str) -> None:
    """Load a model with genkit, which checks its files first."""
    if kind == "text-to-image":
        text2image: Any = importlib.import_module("genkit.vision.text2image")
        text2image.load_text2image(text2image.find_source(folder))
    elif kind == "adapter":
        importlib.import_module("genkit.hub.safety").check(folder)
    elif kind == "reward model":
        importlib.import_module("genkit.text.rewards").load_reward(folder)
    else:
        importlib.import_module("genkit").load(folder)


def refuse_network(event: str, arguments: Any) -> None:
    """Refuse connections: nothing in a model may lead to another machine."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise PermissionError("the model asks for the network")


def load_without_genkit(folder: str, kind: str) -> None:
    """Load a model with stock classes, or with the file of genkit's own class that is beside it."""
    if Path(folder, "model_index.json").exists():
        from diffusers import DiffusionPipeline

        index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
        ours = isinstance(index["_class_name"], list)  # the file of the class, and its name
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=ours, use_safetensors=True)
        return
    if kind == "adapter":
        load_adapter(Path(folder))
        return
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = getattr(transformers, class_name(kind, config))
    _, report = auto.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"]:
        sys.exit(f"the weights lack {sorted(report['missing_keys'])}")
    if kind in ("text", "answers", "text classifier", "reward model"):
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if kind == "classifier":
        transformers.AutoImageProcessor.from_pretrained(
            folder, use_fast=False, trust_remote_code=False
        )


def load_adapter(folder: Path) -> None:
    """Read an adapter, or new words, as the loaders of a pipeline do before they need it."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    for file in folder.glob("*.safetensors"):
        options = {"weight_name": file.name, "use_safetensors": True}
        if file.name.startswith("pytorch_lora"):
            state, *_ = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, **options)
            other = [name for name in state if "lora" not in name]
        else:
            (state,) = load_textual_inversion_state_dicts([folder], **options)
            other = list(state)[1:]
        if other:
            sys.exit(f"{file.name} holds {other[0]}")


def class_name(kind: str, config: Any) -> str:
    """Return the name of the transformers class for a kind of model."""
    if kind == "answers":
        return "AutoModelForQuestionAnswering"
    if kind == "classifier":
        return "AutoModelForImageClassification"
    if kind in ("text classifier", "reward model"):
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"


if __name__ == "__main__":
    main()
