"""Arguments whose mistakes are one line: the argument, and what would do.

People bring the names of other libraries: `NAMES` has what they are called here.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Of each verb: names that other libraries have, and its own name, or a sentence
_LOADING = {
    "torch_dtype": "dtype",
    "precision": "dtype",
    "load_in_4bit": 'quantize="int4" has the weights of matrices in 4 bits',
    "load_in_8bit": 'quantize="int8" has matrix products in 8 bits',
    "model_id": "model",
    "model_name": "model",
    "pretrained_model_name_or_path": "model",
    "token": "log in by `hf auth login` for private models",
}
_GENERATE = _LOADING | {
    "do_sample": 'strategy="greedy" is do_sample=False, strategy="sample" do_sample=True',
    "num_beams": "beams",
    "beam_size": "beams",
    "beam_width": "beams",
    "num_beam_groups": "groups",
    "diversity_penalty": "diversity",
    "num_return_sequences": "n_best, for beams; to sample several times give the prompt as often",
    "n": "n_best, for beams; to sample several times give the prompt as often",
    "best_of": "n_best",
    "max_length": "max_new_tokens, without those of the prompt",
    "min_length": "min_new_tokens, without those of the prompt",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "max_gen_len": "max_new_tokens",
    "length": "max_new_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "bad_words_ids": "bad_words, which are texts",
    "penalty_alpha": "alpha",
    "presence_penalty": "frequency_penalty=… is similar, and grows with each occurrence",
    "repeat_penalty": "repetition_penalty",
    "typical": "typical_p",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stopping_criteria": "stop, which is a text",
    "eos_token_id": "stop, which is a text; a model's own end tokens always end a text",
    "assistant_model": "draft",
    "prompt_lookup_num_tokens": "lookup",
    "streamer": "genkit.stream yields a text in pieces",
    "stream": "genkit.stream yields a text in pieces",
    "logprobs": "the record has log_probabilities",
    "output_scores": "the record has log_probabilities",
    "return_full_text": "the record has text (with the prompt) and completion",
    "generator": "seed",
    "manual_seed": "seed",
    "random_seed": "seed",
    "text": "prompt",
    "text_inputs": "prompt",
    "inputs": "prompt",
    "input_ids": "prompt, which is a text",
    "messages": "prompt",
    "system": 'give messages that begin with {"role": "system", "content": ...}',
    "system_prompt": 'give messages that begin with {"role": "system", "content": ...}',
}
_DIFFUSION = {
    "num_inference_steps": "steps",
    "sample_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "generator": "seed",
    "manual_seed": "seed",
    "torch_dtype": "dtype",
    "model_id": "model",
    "pretrained_model_name_or_path": "model",
    "output_type": "the record has the images",
}
_TEXT_ATTACK = _LOADING | {
    "model_wrapper": "model",
    "victim": "model",
    "ground_truth_output": "label",
    "target_class": "target",
    "transformation": "candidates",
    "search_method": "importance",
    "wir_method": "importance",
    "max_percent": "max_changed",
    "query_budget": "budget",
    "max_queries": "budget",
    "mlm": 'candidates="mlm", with masked_model=',
    "random_seed": "seed",
}
_CLIMBING = {
    "iterations": "steps",
    "iter_n": "steps",
    "n_steps": "steps",
    "num_steps": "steps",
    "lr": "step_size",
    "learning_rate": "step_size",
    "layer_name": "layer",
    "layers": "layer",
    "image_size": "size",
    "generator": "seed",
    "random_seed": "seed",
    "model_id": "model",
    "pretrained_model_name_or_path": "model",
}
_ATTACK = {
    "eps": "epsilon",
    "epsilons": "epsilon",
    "max_norm": "epsilon",
    "num_steps": "steps",
    "n_iter": "steps",
    "nb_iter": "steps",
    "max_iter": "steps",
    "n_restarts": "restarts",
    "num_random_init": "restarts",
    "random_start": "pgd always starts at random; method=fgsm does not",
    "ord": "norm",
    "target_label": "target",
    "targeted": "target, which is the class to reach",
    "labels": "target is the class to reach; without it, any other than the model's own",
    "patch_size": "share, the diameter over the image's side",
    "scale": "share, the diameter over the image's side",
}
NAMES: dict[str, dict[str, str]] = {
    "search_errors": _LOADING
    | {
        "data": "pairs",
        "num_beams": "beams, which are several widths",
        "beam_size": "beams, which are several widths",
        "max_length": "max_new_tokens",
        "n_samples": "count",
    },
    "attack_text": _TEXT_ATTACK,
    "attack_answer": _TEXT_ATTACK | {"label": "answer"},
    "generate": _GENERATE,
    "stream": _GENERATE,
    "chat": _GENERATE,
    "answer": _LOADING
    | {
        "topk": "top_k",
        "n_best": "top_k",
        "n_best_size": "top_k",
        "num_answers": "top_k",
        "max_length": "max_seq_len",
        "max_seq_length": "max_seq_len",
        "max_answer_length": "max_answer_len",
        "stride": "doc_stride",
        "handle_impossible_answer": "handle_impossible",
        "version_2_with_negative": "handle_impossible",
        "null_score_diff_threshold": "threshold",
        "questions": "question",
        "contexts": "context",
        "text": "context",
    },
    "sample": _DIFFUSION
    | {
        "batch_size": "n",
        "count": "n",
        "num_images": "n",
        "num_images_per_prompt": "n",
        "num_samples": "n",
        "labels": "label",
        "class_label": "label",
        "class_labels": "label",
        "sampler": "scheduler",
        "sampler_name": "scheduler",
        "prompt": "genkit.imagine makes images from a text",
    },
    "imagine": _DIFFUSION
    | {
        "negative_prompt": "negative",
        "width": "size, which is (width, height)",
        "height": "size, which is (width, height)",
        "num_images_per_prompt": "give the prompt as often as you want images of it",
        "n": "give the prompt as often as you want images of it",
    },
    "attribute": {
        "n_steps": "steps",
        "nt_samples": "steps",
        "baselines": "baseline",
        "target_layer": "layer",
        "target_class": "target",
        "class_idx": "target",
        "input_tensor": "image",
        "inputs": "image",
    },
    "dream": _CLIMBING
    | {
        "num_octaves": "octaves",
        "octave_n": "octaves",
        "end": "layer",
        "guide_image": "guide",
    },
    "visualize": _CLIMBING
    | {
        "channel": "unit",
        "objective_f": "unit is a channel, target a class",
        "class_name": "target",
        "label": "target",
    },
    "stylize": {
        "content": "image",
        "content_image": "image",
        "style_image": "style",
        "content_layers": "content_layer",
        "num_steps": "steps",
        "num_iterations": "steps",
        "iterations": "steps",
        "max_iter": "steps",
        "image_size": "size",
        "init": "start",
        "init_image": "start",
        "content_weight": "style_weight, over a content weight of 1",
        "generator": "seed",
    },
    "translate": {
        "condition": "image, of the kind that the model was trained for",
        "seeds": "seed",
        "generator": "seed",
        "num_steps": "steps",
        "num_inference_steps": "steps",
        "mask_image": "mask",
    },
    "attack": _ATTACK,
    "attack_image": _ATTACK,
    "measure_robustness": _ATTACK
    | {
        "alpha": "step_size",
        "eps_iter": "step_size",
        "abs_stepsize": "step_size",
        "images": "data",
        "dataset": "data",
        "n_examples": "count",
        "labels": "data, which have them",
    },
    "train": {
        "lr": "learning_rate",
        "per_device_train_batch_size": "batch_size, of all processes together",
        "train_batch_size": "batch_size",
        "gradient_accumulation_steps": "gradient_accumulation",
        "epochs": "max_steps; --dry_run prints the steps of an epoch",
        "num_train_epochs": "max_steps; --dry_run prints the steps of an epoch",
        "max_train_steps": "max_steps",
        "max_grad_norm": "clip",
        "grad_clip": "clip",
        "warmup_ratio": "warmup",
        "warmup_steps": "warmup, a share of the run",
        "ema_decay": "ema",
        "checkpointing_steps": "save_steps",
        "save_total_limit": "keep_checkpoints",
        "resume_from_checkpoint": "resume",
        "hub_model_id": "push_to_hub",
        "bf16": "mixed_precision=bf16 computes in bfloat16",
        "private": "train_private.py trains under differential privacy, a GAN by --method gan",
    },
}


class UnknownArgumentError(ValueError, TypeError):
    """A name that is no argument: a TypeError in Python, and of one line as other mistakes are."""


def explain_name(written: str, verb: str, known: dict[str, str], what: str) -> str:
    """Say in a line what an unknown argument is called here, or which one is most similar.

    Args:
        written: as the user wrote it, with dashes or underscores.
        verb: whose argument it is not.
        known: the verb's arguments, with underscores, and how each is written here.
        what: "argument" or "flag".
    """
    name = written.lstrip("-").replace("-", "_")
    answer = NAMES.get(verb, {}).get(name, "")
    own = re.split(r"\W", answer)[0]
    if answer and own in known and not answer.startswith(f"{own}="):
        return f"{written} is called {known[own]} here{answer.removeprefix(own)}"
    if answer in ("prompt", "model", "context") and what == "flag":
        return f"{written}: unknown flag; the {answer} is given without a flag"
    if answer:
        return f"{written}: unknown {what}; {answer}"
    near = difflib.get_close_matches(name, known, n=1)
    everything = f"help(genkit.{verb})" if what == "argument" else "--help"
    hint = f"the most similar is {known[near[0]]}" if near else f"{everything} lists all"
    return f"{written}: unknown {what}; {hint}"


def check_unicode(name: str, text: Any) -> None:
    """Raise ValueError for what is no text, or has half a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None


def explain_names(verb: Callable[P, R]) -> Callable[P, R]:
    """Answer unknown keywords of a verb in one line; its signature stays as it is."""
    import inspect  # which the command does without

    known = {name: name for name in inspect.signature(verb).parameters}

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise UnknownArgumentError(explain_name(name, verb.__name__, known, "argument"))
        return verb(*args, **kwargs)

    return call


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ValueError of one line where argparse prints its usage."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse all arguments.

        Raises:
            ValueError: an argument is unknown or missing, or its value cannot be read.
        """
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._describe_unknown(rest, getattr(found, "command", "train")))
        return found

    def error(self, message: str) -> NoReturn:
        """Raise a message of argparse's, with one spelling of the argument that it names."""
        raise ValueError(re.sub(r"\Aargument ([^\s/]+)\S*:", r"\1:", message))

    def _describe_unknown(self, rest: list[str], command: str) -> str:
        """Name the first unknown argument and, for a flag, what it is called here."""
        flag = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
        if flag is None:
            return f"{rest[0]!r}: unexpected argument; flags begin with --"
        known = {name.lstrip("-").replace("-", "_"): own for name, own in self._flags()}
        return explain_name(flag, command.replace("-", "_"), known, "flag")

    def _flags(self) -> Iterator[tuple[str, str]]:
        """Yield each long flag, of subcommands too, with its first spelling."""
        for action in self._actions:
            long = [name for name in action.option_strings if name.startswith("--")]
            yield from ((spelling, long[0]) for spelling in long)
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._flags()
