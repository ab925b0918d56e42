"""Tokens per second of genkit.generate against transformers and CTranslate2, one after the other.

    pip install "hf-genkit[benchmarks]"
    python benchmarks/generation.py --tokenizer FOLDER_OF_GPT2S_TOKENIZER
    python benchmarks/generation.py --model runs/demo

GPT-2's configuration with random weights, a prompt of 32 tokens; or a model of one's own against
transformers. Median of the repetitions. The share of the memory's bandwidth is that of reading all
weights once a token.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, PreTrainedModel

import genkit
from genkit.text.language_model import LanguageModel

WEIGHTS = 123.7e6  # that are read for a token, the tied head included
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PROMPT = " the" * 32


def measured(write: Callable[[int], int], tokens: int, repeat: int) -> float:
    """Return the median tokens per second of a function that writes so many tokens for each row."""
    write(8)
    rates = []
    for _ in range(repeat):
        start = time.perf_counter()
        written = write(tokens)
        rates.append(written / (time.perf_counter() - start))
    return statistics.median(rates)


def ours(language: LanguageModel, batch: int, beams: int) -> Callable[[int], int]:
    """Greedy, or a beam, by genkit."""
    options = {"strategy": "beam", "beams": beams} if beams > 1 else {"strategy": "greedy"}

    def write(tokens: int) -> int:
        rows = genkit.generate([PROMPT] * batch, model=language, max_new_tokens=tokens, **options)
        return sum(len(row.tokens) for row in rows)

    return write


def by_transformers(
    model: PreTrainedModel, ids: list[int], batch: int, beams: int, sampled: bool = False
) -> Callable[[int], int]:
    """The same by model.generate."""
    rows = torch.tensor([ids] * batch)

    def write(tokens: int) -> int:
        with torch.inference_mode():
            output = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                do_sample=sampled,
                top_k=0 if sampled else None,
                num_beams=beams,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return int(output[:, rows.shape[1] :].numel())

    return write


def by_ctranslate2(
    folder: Path, precision: str, words: list[str], batch: int, beams: int
) -> Callable[[int], int]:
    """The same by CTranslate2, with as many threads."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder), compute_type=precision, intra_threads=torch.get_num_threads()
    )

    def write(tokens: int) -> int:
        results = generator.generate_batch(
            [words] * batch,
            beam_size=beams,
            max_length=tokens,
            min_length=tokens,
            include_prompt_in_result=False,
        )
        return sum(len(result.sequences_ids[0]) for result in results)

    return write


def bandwidth() -> float:
    """Bytes per second that this machine reads from memory, by summing a large array."""
    array = torch.ones(1 << 28)
    array.sum()
    start = time.perf_counter()
    for _ in range(5):
        array.sum()
    return 5 * array.numel() * 4 / (time.perf_counter() - start)


def accuracy(model: GPT2LMHeadModel, quantized: LanguageModel, ids: list[int]) -> float:
    """Mean difference of log-probabilities, teacher forced, over a text of 512 tokens."""
    text = torch.tensor([(ids * 512)[:512]])
    text[0] = torch.randint(0, 50257, (512,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, found = (
            network(text).logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])
            for network in (model, quantized.stepper.model)
        )
    return float((exact - found).abs().mean())


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer")
    parser.add_argument("--model", help="folder of a small model, instead of GPT-2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.model:
        return small(arguments.model, arguments.repeat)
    if not arguments.tokenizer:
        parser.error("give --tokenizer or --model")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.generation_config.eos_token_id = None  # every text gets as long as it may
    tokenizer = GPT2TokenizerFast.from_pretrained(arguments.tokenizer)
    ids, words = tokenizer(PROMPT).input_ids, tokenizer.tokenize(PROMPT)
    reads = bandwidth()
    print(f"{torch.get_num_threads()} threads, {reads / 1e9:.0f} GB/s read from memory")
    with tempfile.TemporaryDirectory() as scratch:
        converted = convert(model, tokenizer, Path(scratch))
        halved = copy.deepcopy(model).bfloat16()
        languages = {p: ready(model, tokenizer, p, ids) for p in BYTES}
        for tokens in arguments.tokens:
            for batch, beams in ((1, 1), (8, 1), (1, 4)):
                writers = {
                    f"genkit {p}": ours(language, batch, beams) for p, language in languages.items()
                } | {
                    "transformers float32": by_transformers(model, ids, batch, beams),
                    "transformers bfloat16": by_transformers(halved, ids, batch, beams),
                    "CTranslate2 float32": by_ctranslate2(
                        converted, "float32", words, batch, beams
                    ),
                    "CTranslate2 int8": by_ctranslate2(converted, "int8", words, batch, beams),
                }
                rates = {n: measured(w, tokens, arguments.repeat) for n, w in writers.items()}
                report(tokens, batch, beams, rates, reads)


def ready(
    model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, precision: str, ids: list[int]
) -> LanguageModel:
    """Pack the matrices."""
    language = LanguageModel(model, tokenizer, "GPT-2", precision)
    start = time.perf_counter()
    assert language.stepper
    seconds, error = time.perf_counter() - start, accuracy(model, language, ids)
    print(
        f"genkit {precision}: ready in {seconds:.1f} s; log-probabilities {error:.4f} off float32"
    )
    return language


def small(folder: str, repeat: int) -> None:
    """Compare a model of one's own at batch 1."""
    language = genkit.load(folder)
    language.model.generation_config.eos_token_id = None  # every text gets as long as it may
    ids = language.tokenizer("The ").input_ids
    for options in ({"strategy": "greedy"}, {"strategy": "stochastic", "seed": 1}):

        def write(tokens: int, options: dict[str, Any] = options) -> int:
            record = genkit.generate("The ", model=language, max_new_tokens=tokens, **options)
            return len(record.tokens)

        sampled = options["strategy"] != "greedy"
        own = measured(write, 200, 3 * repeat)
        peer = measured(by_transformers(language.model, ids, 1, 1, sampled), 200, 3 * repeat)
        ratio = f"transformers {peer:.0f}, {own / peer:.2f} x"
        print(f"{options['strategy']}: {own:.0f} tokens/s, {ratio}")


def convert(model: GPT2LMHeadModel, tokenizer: object, folder: Path) -> Path:
    """Convert the model for CTranslate2."""
    from ctranslate2.converters import TransformersConverter

    model.save_pretrained(folder / "stock")
    tokenizer.save_pretrained(folder / "stock")  # type: ignore[attr-defined]
    TransformersConverter(str(folder / "stock")).convert(str(folder / "converted"))
    return folder / "converted"


def report(tokens: int, batch: int, beams: int, rates: dict[str, float], reads: float) -> None:
    """Print what was measured for one shape, and how ours compares."""
    print(f"\nbatch {batch}, {beams} beams, {tokens} new tokens: tokens per second", flush=True)
    peers = {name: rate for name, rate in rates.items() if not name.startswith("genkit")}
    for name, rate in rates.items():
        line = f"  {name:22}{rate:8.1f}"
        if name not in peers:
            share = rate / batch * WEIGHTS * BYTES[name.split()[1]] / reads
            ratios = ", ".join(f"{rate / peer:.2f} x {other}" for other, peer in peers.items())
            line += f"  {share:4.0%} of the bandwidth limit; {ratios}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
