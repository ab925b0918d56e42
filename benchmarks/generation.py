"""Tokens per second of genkit.generate and of its peers, each engine in a process of its own.

    pip install "hf-genkit[benchmarks]"
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python gguf
    python benchmarks/generation.py --model path/to/SmolLM2-135M-Instruct
    python benchmarks/generation.py --tokenizer FOLDER_OF_GPT2S_TOKENIZER
    python benchmarks/generation.py --model runs/demo --engines genkit transformers

A Llama of one's own, or GPT-2's shape with random weights; 32 tokens of prompt, then --tokens more.
Median of the repetitions, after a first short call. Engines that share a process slow each other:
their threads spin. Perplexity is that of the first 3,072 tokens of --text, in windows of 512. A
peer that is not installed, or cannot run the model, is named and left out.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)

PROMPT, WINDOW, WINDOWS = 32, 512, 6
WAYS = {  # texts, beams, and whether tokens are drawn
    "1 text": (1, 1, False),
    "8 texts": (8, 1, False),
    "4 beams": (1, 4, False),
    "1 drawn": (1, 1, True),
}
PRECISIONS = {
    "genkit": ("float32", "bfloat16", "int8", "int4"),
    "transformers": ("float32", "bfloat16"),
    "ctranslate2": ("float32", "int8"),
    "llama.cpp": ("Q8_0", "Q4_0"),
}
PACKAGES = {"llama.cpp": "llama-cpp-python"}
Write = Callable[[int], int]  # so many tokens for each text; returns how many were written


def main() -> None:
    """Measure every engine, or one in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; default: GPT-2's shape, random weights")
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer, for its shape")
    parser.add_argument("--text", type=Path, help="a text, to measure perplexity on")
    parser.add_argument("--engines", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # engine and precision
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.one:
        return print(json.dumps(run_engine(arguments)))
    if not (arguments.model or arguments.tokenizer):
        parser.error("give --model or --tokenizer")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or make_gpt2(arguments.tokenizer, Path(scratch))
        print(f"{torch.get_num_threads()} threads, {bandwidth() / 1e9:.0f} GB/s read from memory")
        for engine in arguments.engines:
            for precision in PRECISIONS[engine]:
                print(in_a_process(folder, engine, precision, arguments), flush=True)


def in_a_process(folder: str, engine: str, precision: str, arguments: argparse.Namespace) -> str:
    """Run this file for one engine and return a line of what it measured."""
    words = [sys.executable, __file__, "--model", folder, "--one", engine, precision]
    words += ["--tokens", str(arguments.tokens), "--repeat", str(arguments.repeat)]
    words += ["--text", str(arguments.text)] if arguments.text else []
    done = subprocess.run(words, capture_output=True, text=True)
    name = f"{engine} {precision}"
    if done.returncode:
        return f"{name:22} left out: {done.stderr.strip().splitlines()[-1][:70]}"
    found = json.loads(done.stdout.splitlines()[-1])
    rates = "".join(f"{rate:9.1f}" if rate else f"{'-':>9}" for rate in found["rates"])
    perplexity = f"  perplexity {found['perplexity']:.3f}" if found["perplexity"] else ""
    return f"{name:22}{rates} tokens/s at {', '.join(WAYS)}{perplexity}"


def run_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine: tokens per second of each shape, and perplexity where it gives logits."""
    engine, precision = arguments.one
    importlib.metadata.version(PACKAGES.get(engine, "torch" if engine == "genkit" else engine))
    make: dict[str, Any] = {"genkit": Genkit, "transformers": Transformers}
    make |= {"ctranslate2": CTranslate2, "llama.cpp": LlamaCpp}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        own = make[engine](arguments.model, tokenizer, precision, Path(scratch))
        rates = []
        for way in WAYS.values():
            write = own.writer(*way)
            rates.append(write and measured(write, arguments.tokens, arguments.repeat))
        perplexity = None
        if arguments.text:
            ids = tokenizer(arguments.text.read_text()[:30_000]).input_ids
            perplexity = own.perplexity([ids[i * WINDOW :][:WINDOW] for i in range(WINDOWS)])
    return {"rates": rates, "perplexity": perplexity}


def measured(write: Write, tokens: int, repeat: int) -> float:
    """Return the median of tokens per second."""
    write(8)
    rates = []
    for _ in range(repeat):
        start = time.perf_counter()
        written = write(tokens)
        rates.append(written / (time.perf_counter() - start))
    return statistics.median(rates)


def prompt_of(tokenizer: Any) -> list[int]:
    """Return the tokens of the prompt."""
    return (tokenizer(" the" * PROMPT).input_ids * PROMPT)[:PROMPT]


def mean_nats(logits: torch.Tensor, window: list[int]) -> float:
    """Mean negative log-probability of a window's tokens but the first."""
    targets = torch.tensor(window[1:])
    return float(torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets))


# ---------------------------------------------------------------------------------------------
# Engines


class Genkit:
    """genkit.generate, greedy or with beams."""

    def __init__(self, folder: str, tokenizer: Any, precision: str, _: Path) -> None:
        import genkit

        quantized = precision if precision.startswith("int") else None
        self.generate = genkit.generate
        self.language = genkit.load(
            folder, quantize=quantized, dtype=None if quantized else precision
        )
        self.language.model.generation_config.eos_token_id = None  # as long as a text may get
        self.prompt = tokenizer.decode(prompt_of(tokenizer))

    def writer(self, batch: int, beams: int, drawn: bool) -> Write:
        """Write some texts."""
        how: dict[str, Any] = {"strategy": "beam", "beams": beams}
        if beams == 1:  # no guesses: greedy texts repeat themselves, which a lookup would gain by
            how = {"strategy": "greedy", "lookup": 0}
        if drawn:
            how = {"min_p": 0.1, "seed": 0, "lookup": 0}

        def write(tokens: int) -> int:
            rows = self.generate(
                [self.prompt] * batch, model=self.language, max_new_tokens=tokens, **how
            )
            return sum(len(row.tokens) for row in rows)

        return write

    def perplexity(self, windows: list[list[int]]) -> float:
        """By the steps that write."""
        from genkit.text.kv_cache import Tree

        total = 0.0
        for window in windows:
            reader = Tree(self.language.stepper, [window[:1]])
            logits = reader.step([window[1:]], chain=True)[0]
            first = Tree(self.language.stepper, [window[:1]]).logits[0]
            total += mean_nats(torch.cat([first, logits]), window)
        return math.exp(total / len(windows))


class Transformers:
    """model.generate."""

    def __init__(self, folder: str, tokenizer: Any, precision: str, _: Path) -> None:
        dtype = getattr(torch, precision)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.ids = prompt_of(tokenizer)

    def writer(self, batch: int, beams: int, drawn: bool) -> Write:
        """Write some texts."""
        rows = torch.tensor([self.ids] * batch)
        how: dict[str, Any] = {"do_sample": drawn, "num_beams": beams, "pad_token_id": 0}
        how |= {"min_p": 0.1, "top_k": 0} if drawn else {}

        def write(tokens: int) -> int:
            mask = torch.ones_like(rows)
            output = self.model.generate(rows, attention_mask=mask, max_new_tokens=tokens, **how)
            return int(output[:, rows.shape[1] :].numel())

        return write

    @torch.inference_mode()
    def perplexity(self, windows: list[list[int]]) -> float:
        """Of its own logits."""
        logits = (self.model(torch.tensor([window])).logits[0, :-1] for window in windows)
        nats = [mean_nats(own, window) for own, window in zip(logits, windows, strict=True)]
        return math.exp(sum(nats) / len(nats))


class CTranslate2:
    """CTranslate2 with as many threads."""

    def __init__(self, folder: str, tokenizer: Any, precision: str, scratch: Path) -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        converted = str(scratch / "converted")
        TransformersConverter(folder).convert(converted)
        threads = torch.get_num_threads()
        self.generator = ctranslate2.Generator(
            converted, compute_type=precision, intra_threads=threads
        )
        self.words = tokenizer.convert_ids_to_tokens(prompt_of(tokenizer))

    def writer(self, batch: int, beams: int, drawn: bool) -> Write | None:
        """Write some texts."""
        if drawn:
            return None

        def write(tokens: int) -> int:
            how = {"beam_size": beams, "max_length": tokens, "min_length": tokens}
            results = self.generator.generate_batch(
                [self.words] * batch, include_prompt_in_result=False, **how
            )
            return sum(len(result.sequences_ids[0]) for result in results)

        return write

    def perplexity(self, windows: list[list[int]]) -> None:
        """Not measured."""


class LlamaCpp:
    """llama.cpp by llama-cpp-python; greedy, several texts in one batch, no beams."""

    def __init__(self, folder: str, tokenizer: Any, precision: str, scratch: Path) -> None:
        import llama_cpp
        from gguf_files import write_gguf

        self.c, self.ids = llama_cpp, prompt_of(tokenizer)
        whole, packed = scratch / "whole.gguf", scratch / "packed.gguf"
        write_gguf(Path(folder), whole)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{precision}")
        assert (
            llama_cpp.llama_model_quantize(str(whole).encode(), str(packed).encode(), options) == 0
        )
        model = llama_cpp.llama_model_load_from_file(
            str(packed).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = 8 * 1024, 8, False
        settings.n_batch = settings.n_ubatch = WINDOW
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(WINDOW, 0, 1)

    def decode(self, tokens: list[tuple[int, int, int]], wanted: list[int]) -> torch.Tensor:
        """Read (token, position, text) and return the logits of those that are wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, text) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = text, i in wanted
        assert self.c.llama_decode(self.context, batch) == 0
        size = self.vocabulary * 4
        rows = (self.c.llama_get_logits_ith(self.context, i) for i in wanted)
        read = ctypes.string_at
        return torch.stack(
            [torch.frombuffer(bytearray(read(r, size)), dtype=torch.float32) for r in rows]
        )

    def writer(self, batch: int, beams: int, drawn: bool) -> Write | None:
        """Write some texts."""
        if beams > 1 or drawn:
            return None

        def write(tokens: int) -> int:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
            last = []
            for text in range(batch):
                own = [(token, i, text) for i, token in enumerate(self.ids)]
                last.append(int(self.decode(own, [PROMPT - 1])[0].argmax()))
            for step in range(tokens - 1):
                rows = [(token, PROMPT + step, text) for text, token in enumerate(last)]
                last = self.decode(rows, list(range(batch))).argmax(-1).tolist()
            return batch * tokens

        return write

    def perplexity(self, windows: list[list[int]]) -> float:
        """Of its own logits."""
        total = 0.0
        for window in windows:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
            tokens = [(token, i, 0) for i, token in enumerate(window)]
            total += mean_nats(self.decode(tokens, list(range(WINDOW - 1))), window)
        return math.exp(total / len(windows))


# ---------------------------------------------------------------------------------------------


def make_gpt2(tokenizer: str, folder: Path) -> str:
    """Save GPT-2's shape with random weights."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "gpt2")
    GPT2TokenizerFast.from_pretrained(tokenizer).save_pretrained(folder / "gpt2")
    return str(folder / "gpt2")


def bandwidth() -> float:
    """Bytes per second that this machine reads from memory, by summing a large array."""
    array = torch.ones(1 << 28)
    array.sum()
    start = time.perf_counter()
    for _ in range(5):
        array.sum()
    return 5 * array.numel() * 4 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
