r"""Train sequence-to-sequence models where the answers are known, and count what beams miss.

    python benchmarks/seq2seq.py --output_dir runs/known --minutes 5
    python benchmarks/seq2seq.py --output_dir runs/unsure --tasks reversal --architecture t5 \
        --minutes 1 --picture errors.png

Two tasks, whose pairs are made here: `dates`, a date in one of eight forms, to ISO 8601, and
`reversal`, 3 to 12 letters backwards. Each model is trained by the recipe, from
scratch. Then genkit's greedy texts and beams are compared with transformers' own, token by token,
and `genkit.search_errors` compares beams of several widths with exact search.
"""

from __future__ import annotations

import argparse
import calendar
import datetime
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import genkit
from genkit.text.language_model import LanguageModel

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIRST, DAYS = datetime.date(1900, 1, 1), 73_049  # 1900 to 2099
Pair = tuple[str, str]


def make_date(rng: random.Random) -> Pair:
    """Return a date as people write it, and in ISO 8601."""
    day = FIRST + datetime.timedelta(days=rng.randrange(DAYS))
    month, short = calendar.month_name[day.month], calendar.month_abbr[day.month]
    forms = (
        f"{month} {day.day}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"{day.day} {short} {day.year}",
        f"{short} {day.day}, {day.year}",
        f"{calendar.day_name[day.weekday()]}, {day.day} {month} {day.year}",
        f"{day.day:02}.{day.month:02}.{day.year}",
        f"{day.month}/{day.day}/{day.year}",
        f"{day.year}, day {day.day} of {month}",
    )
    return rng.choice(forms), day.isoformat()


def make_reversal(rng: random.Random) -> Pair:
    """Return letters, and the same backwards."""
    text = "".join(rng.choices(LETTERS, k=rng.randint(3, 12)))
    return text, text[::-1]


TASKS: dict[str, Callable[[random.Random], Pair]] = {
    "dates": make_date,
    "reversal": make_reversal,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--pairs", type=int, default=50_000, help="to train and to validate on")
    parser.add_argument("--tests", type=int, default=1000, help="new pairs, which no run has seen")
    parser.add_argument("--searched", type=int, default=200, help="of these, searched exactly")
    parser.add_argument("--picture", type=Path, help="a PNG, of the last task's search errors")
    parser.add_argument("--architecture", default="bart", choices=("bart", "t5"))
    words = parser.parse_args()
    words.output_dir.mkdir(parents=True, exist_ok=True)
    for task in words.tasks:
        tests = make_data(task, words.output_dir, words.pairs, words.tests)
        folder = train(task, words.output_dir, words.minutes, words.architecture)
        measure(task, folder, tests, words.searched, words.picture)


def make_data(task: str, folder: Path, count: int, tests: int) -> list[Pair]:
    """Write pairs for a run, and return others, none of whose sources it has."""
    rng = random.Random(task)
    pairs = [TASKS[task](rng) for _ in range(count)]
    rows = (json.dumps({"source": source, "target": target}) for source, target in pairs)
    (folder / f"{task}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    seen = {source for source, _ in pairs}
    drawn = (TASKS[task](rng) for _ in iter(int, 1))
    fresh = (pair for pair in drawn if pair[0] not in seen)
    return [next(fresh) for _ in range(tests)]


def train(task: str, folder: Path, minutes: float, architecture: str) -> Path:
    """Run the recipe, unless it has run."""
    run = folder / task
    if not (run / "README.md").exists():
        command = [sys.executable, str(ROOT / "recipes" / "train_seq2seq.py")]
        command += ["--data", str(folder / f"{task}.jsonl"), "--output_dir", str(run)]
        command += ["--max_minutes", str(minutes), "--val_fraction", "0.02"]
        subprocess.run([*command, "--architecture", architecture], check=True)
    return run


def measure(
    task: str, folder: Path, tests: list[Pair], searched: int, picture: Path | None
) -> None:
    """Print exact matches, how far texts are transformers' own, and search errors."""
    language = genkit.load(folder)
    sources, targets = [source for source, _ in tests], [target for _, target in tests]
    for beams in (1, 4):
        options = {"strategy": "greedy"} if beams == 1 else {"strategy": "beam", "beams": beams}
        found = genkit.generate(sources, model=language, max_new_tokens=40, **options)
        right = sum(own.completion == target for own, target in zip(found, targets, strict=True))
        equal = sum(
            own.tokens == by_transformers(language, own.prompt, beams) for own in found[:searched]
        )
        print(
            f"{task}, {beams} beams: {right / len(tests):.2%} of {len(tests):,} new pairs exact; "
            f"{equal} of {len(found[:searched])} are transformers' own, token by token"
        )
    record = genkit.search_errors(language, tests[:searched], count=searched)
    print(f"\n{record}\n")
    if picture:
        record.save(picture)


def by_transformers(language: LanguageModel, source: str, beams: int) -> list[int]:
    """Return the tokens that model.generate writes."""
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 40}
    inputs = language.tokenizer(source, return_tensors="pt")
    row: list[int] = language.model.generate(**inputs, **options)[0, 1:].tolist()
    return row


if __name__ == "__main__":
    main()
