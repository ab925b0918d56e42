"""Load a trained folder in plain transformers, and compare sampled rows at two batch sizes.

    python benchmarks/folder.py --model runs/charlm
    python benchmarks/folder.py --model runs/charlm --python other/env/bin/python

Every Python given must have transformers; genkit is blocked in it. All must write the same text.
"""

import argparse
import random
import subprocess
import sys
import time

import genkit
from genkit.text.language_model import LanguageModel

CODE = """
import sys
sys.modules["genkit"] = None
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.utils.logging.set_verbosity_error()
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, do_sample=False, max_new_tokens=60)
print(transformers.__version__, repr(tokenizer.decode(out[0])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--python", nargs="*", default=[])
    arguments = parser.parse_args()
    compare_with_transformers(
        arguments.model, arguments.prompt, [sys.executable, *arguments.python]
    )
    compare_batches(arguments.model, rows=200, batch=64)


def compare_with_transformers(model: str, prompt: str, pythons: list[str]) -> None:
    ours = genkit.generate(prompt, model=model, strategy="greedy", max_new_tokens=60)
    for python in pythons:
        command = [python, "-c", CODE, model, prompt]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        version, text = output.strip().split(" ", 1)
        print(f"transformers {version}: {'the same' if text == repr(str(ours)) else 'OTHER'} text")
    print(repr(str(ours)))


def compare_batches(model: str, rows: int, batch: int) -> None:
    rng, language = random.Random(0), genkit.load(model)
    letters = [token for token in language.tokenizer.get_vocab() if len(token) == 1]
    prompts = ["".join(rng.choices(letters, k=rng.randint(1, 100))) for _ in range(rows)]
    start = time.monotonic()
    together = []
    for first in range(0, rows, batch):
        together += sample_tokens(prompts[first : first + batch], first, language)
    middle = time.monotonic()
    alone = [sample_tokens([prompt], i, language)[0] for i, prompt in enumerate(prompts)]
    end = time.monotonic()
    same = sum(a == t for a, t in zip(alone, together, strict=True))
    print(
        f"{same} of {rows} sampled rows are the same in batches of {batch} "
        f"({middle - start:.1f} s) and alone ({end - middle:.1f} s)"
    )


def sample_tokens(prompts: list[str], seed: int, language: LanguageModel) -> list[list[int]]:
    records = genkit.generate(prompts, model=language, seed=seed, temperature=0.8)
    assert isinstance(records, list)
    return [record.tokens for record in records]


if __name__ == "__main__":
    main()
