"""Tokens per second of genkit.generate against transformers and CTranslate2, one after the other.

    pip install ctranslate2
    python benchmarks/generation.py --tokenizer FOLDER_OF_GPT2S_TOKENIZER

GPT-2's configuration with random weights; a prompt of 32 tokens; median of the repetitions. The
share of the memory's bandwidth is that of reading all weights once a token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import genkit
from genkit.language import LanguageModel

WEIGHTS = 123.7e6  # that are read for a token, the tied head included
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PROMPT = " the" * 32


def measured(write: Callable[[int], int], tokens: int, repeat: int) -> float:
    """Tokens per second, median, of a function that writes so many tokens a row."""
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
    model: GPT2LMHeadModel, ids: list[int], batch: int, beams: int
) -> Callable[[int], int]:
    """The same by model.generate."""
    rows = torch.tensor([ids] * batch)

    def write(tokens: int) -> int:
        with torch.inference_mode():
            output = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                do_sample=False,
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
    parser.add_argument("--tokenizer", required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=list(BYTES))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.generation_config.eos_token_id = None  # every text gets as long as it may
    tokenizer = GPT2TokenizerFast.from_pretrained(arguments.tokenizer)
    ids, words = tokenizer(PROMPT).input_ids, tokenizer.tokenize(PROMPT)
    reads = bandwidth()
    print(f"{torch.get_num_threads()} threads, {reads / 1e9:.0f} GB/s read from memory")
    with tempfile.TemporaryDirectory() as scratch:
        converted = convert(model, tokenizer, Path(scratch))
        for precision in arguments.precisions:
            language = LanguageModel(model, tokenizer, "GPT-2", precision, True)
            start = time.perf_counter()
            assert language.stepper
            ready = time.perf_counter() - start
            print(f"\n{precision}: packed and compiled, or read from the cache, in {ready:.1f} s")
            error = accuracy(model, language, ids)
            print(f"log-probabilities are {error:.4f} from float32 on average")
            theirs = GPT2LMHeadModel(GPT2Config()).eval()
            theirs.load_state_dict(model.state_dict())
            theirs.generation_config.eos_token_id = None
            theirs = theirs.bfloat16() if precision == "bfloat16" else theirs
            for tokens in arguments.tokens:
                for batch, beams in ((1, 1), (8, 1), (1, 4)):
                    rates = {
                        "genkit": measured(ours(language, batch, beams), tokens, arguments.repeat)
                    }
                    rates["transformers"] = measured(
                        by_transformers(theirs, ids, batch, beams), tokens, arguments.repeat
                    )
                    rates["CTranslate2"] = measured(
                        by_ctranslate2(converted, precision, words, batch, beams),
                        tokens,
                        arguments.repeat,
                    )
                    report(precision, tokens, batch, beams, rates, reads)


def convert(model: GPT2LMHeadModel, tokenizer: object, folder: Path) -> Path:
    """Convert the model for CTranslate2."""
    from ctranslate2.converters import TransformersConverter

    model.save_pretrained(folder / "stock")
    tokenizer.save_pretrained(folder / "stock")  # type: ignore[attr-defined]
    TransformersConverter(str(folder / "stock")).convert(str(folder / "converted"))
    return folder / "converted"


def report(
    precision: str, tokens: int, batch: int, beams: int, rates: dict[str, float], reads: float
) -> None:
    """Print a line."""
    own = rates["genkit"]
    limit = reads / (WEIGHTS * BYTES[precision]) * batch
    parts = [f"{name} {rate:6.1f}" for name, rate in rates.items()]
    ratios = [f"{own / rate:.2f} x {name}" for name, rate in rates.items() if name != "genkit"]
    print(
        f"{precision:8} batch {batch} beams {beams} {tokens:3} tokens: {', '.join(parts)} "
        f"tokens/s; {', '.join(ratios)}; {own / limit:.0%} of the bandwidth limit",
        flush=True,
    )


if __name__ == "__main__":
    main()
