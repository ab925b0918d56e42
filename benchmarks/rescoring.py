"""How many word errors a character model repairs in held-out sentences of the text it learned from.

    python benchmarks/rescoring.py --text tinyshakespeare.txt --minutes 3
    python benchmarks/rescoring.py --text pydoc_data.topics --model runs/demo

The first 90 % of the text teach the model and the lexicon, the next 5 % choose alpha, the last 5 %
are the test; a model that is given must not have learned from the last 10 %. A share of the words
of three letters or more is misspelled by one edit each: a key beside the right one, a letter that
sounds alike, two letters swapped, a letter left out, a letter doubled. The peer has the
frequency of each word in place of the language model, and its alpha is chosen likewise. There is no
beta to choose: words are neither split nor joined.
"""

import argparse
import hashlib
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from genkit.data.text import read_documents
from genkit.text import correction, language_model, rescoring
from genkit.text.lexicon import WORD, Lexicon, words

RECIPE = Path(__file__).parent.parent / "recipes" / "train_charlm.py"
KEEP, EDIT_COST, MAX_EDITS, UNKNOWN = 0.95, 5.0, 2, 0.01  # the defaults of `correct`
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SOUNDS = ("aeiouy", "ckq", "sz", "sc", "fv", "dt", "bp", "gj", "mn", "lr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="file, folder, dataset, embedded corpus")
    parser.add_argument("--model", help="a model of the first 90 %% of the text; else trains one")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--output_dir", type=Path, help="keep the trained model here")
    parser.add_argument("--sentences", type=int, default=150, help="to test on")
    parser.add_argument("--dev_sentences", type=int, default=50, help="to choose alpha on")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--error_rate", type=float, default=0.15, help="share of long words hit")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measure(arguments, Path(work))


def measure(arguments: argparse.Namespace, work: Path) -> None:
    text = "\n".join("".join(document) for document in read_documents(arguments.text))
    borders = [int(len(text) * share) for share in (0.9, 0.95)]
    train, dev, test = text[: borders[0]], text[borders[0] : borders[1]], text[borders[1] :]
    lexicon, rng = Lexicon(words(train)), random.Random(arguments.seed)
    tuned = corrupted(dev, arguments.dev_sentences, arguments.error_rate, rng)
    tested = corrupted(test, arguments.sentences, arguments.error_rate, rng)
    folder = arguments.model or fit(train, arguments, work)
    language = language_model.load_language_model(folder)

    def by_model(texts: list[str], alpha: float) -> list[str]:
        found = correction.correct(
            texts,
            model=language,
            lexicon=lexicon,
            alpha=alpha,
            beams=arguments.beams,
            max_edits=MAX_EDITS,
            candidates=arguments.candidates,
            keep=KEEP,
            edit_cost=EDIT_COST,
            unknown=UNKNOWN,
        )
        assert isinstance(found, list), "a list of texts gives a list of records"
        return [record.text for record in found]

    def by_frequency(texts: list[str], alpha: float) -> list[str]:
        return [most_frequent(text, lexicon, alpha) for text in texts]

    print(
        f"text {hashlib.sha256(text.encode()).hexdigest()}\n"
        f"{len(train):,} characters and {len(lexicon):,} words to learn from; seed "
        f"{arguments.seed}, {arguments.error_rate:.0%} of the words of 3 letters or more hit; "
        f"{len(tuned)} sentences to choose alpha on, {len(tested)} of "
        f"{sum(len(clean.split()) for clean, _ in tested):,} words to test on; "
        f"keep {KEEP}, edit_cost {EDIT_COST}, max_edits {MAX_EDITS}, unknown {UNKNOWN}, "
        f"beams {arguments.beams}, candidates {arguments.candidates}"
    )
    frequencies = [0.25 * i for i in range(1, 13)]
    report("channel and frequency", by_frequency, tuned, tested, frequencies, lexicon)
    repaired = report("channel and model", by_model, tuned, tested, arguments.alphas, lexicon)
    changed = [
        (clean, wrong, found)
        for (clean, wrong), found in zip(tested, repaired, strict=True)
        if clean != wrong or found != wrong
    ]
    for clean, wrong, found in changed[:8]:
        print(f"\n  right   {clean!r}\n  before  {wrong!r}\n  after   {found!r}")


def fit(train: str, arguments: argparse.Namespace, work: Path) -> Path:
    """Train a character model by the recipe, on this text alone."""
    path, folder = work / "train.txt", arguments.output_dir or work / "model"
    path.write_text(train, encoding="utf-8", newline="")
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", str(RECIPE)]
    command += ["--text", str(path), "--max_minutes", str(arguments.minutes)]
    command += ["--val_fraction", "0.05", "--output_dir", str(folder)]
    subprocess.run(command + arguments.recipe_arguments, check=True, stdout=subprocess.DEVNULL)
    return folder


# ---- sentences and errors


def corrupted(part: str, count: int, rate: float, rng: random.Random) -> list[tuple[str, str]]:
    """Draw sentences of prose: pairs of what is right and what is not."""
    pieces = [piece.strip() for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", part)]
    prose = [
        piece
        for piece in pieces
        if len(words(piece)) >= 5
        and len(piece) <= 200
        and sum(c.isalpha() or c.isspace() for c in piece) >= 0.9 * len(piece)
    ]
    chosen = rng.sample(prose, min(count, len(prose)))

    def hit(match: re.Match[str]) -> str:
        word = match[0]
        wanted = len(word) >= 3 and word.isascii() and word.isalpha() and rng.random() < rate
        return misspelled(word, rng) if wanted else word

    return [(clean, WORD.sub(hit, clean)) for clean in chosen]


def misspelled(word: str, rng: random.Random) -> str:
    """Make one edit; a capital stays at the front."""
    changed = word
    while changed == word:
        i, kind = rng.randrange(len(word)), rng.choice(("key", "sound", "swap", "omit", "double"))
        letter = word[i].lower()
        if kind in ("key", "sound"):
            others = beside(letter) if kind == "key" else alike(letter)
            other = rng.choice(others) if others else letter
            changed = word[:i] + (other.upper() if word[i].isupper() else other) + word[i + 1 :]
        elif kind == "swap":
            changed = word[:i] + word[i : i + 2][::-1] + word[i + 2 :]
        else:
            changed = word[:i] + word[i] * (2 if kind == "double" else 0) + word[i + 1 :]
        changed = changed.capitalize() if word.istitle() else changed
    return changed


def beside(letter: str) -> str:
    """List the letters whose keys touch this one's."""
    row = next(i for i, keys in enumerate(KEYS) if letter in keys)
    at = KEYS[row].index(letter)
    near = [(row, at - 1), (row, at + 1), (row - 1, at), (row - 1, at + 1)]
    near += [(row + 1, at - 1), (row + 1, at)]
    return "".join(KEYS[r][i] for r, i in near if 0 <= r < 3 and 0 <= i < len(KEYS[r]))


def alike(letter: str) -> str:
    """List the letters that can sound like this one."""
    return "".join(c for group in SOUNDS if letter in group for c in group if c != letter)


# ---- the peer


def most_frequent(text: str, lexicon: Lexicon, alpha: float) -> str:
    """Correct every word by itself: channel and frequency, one added to each count."""
    total = lexicon.counts.total() + len(lexicon)

    def score(word: str, edits: int) -> float:
        channel = math.log(1 - KEEP) - EDIT_COST * edits if edits else math.log(KEEP)
        prior = math.log(1 - UNKNOWN if word in lexicon else UNKNOWN)
        return channel + prior + alpha * math.log((lexicon.counts[word.lower()] + 1) / total)

    def best(match: re.Match[str]) -> str:
        word = match[0]
        if not (word.islower() or word.isupper() or word.istitle()):
            return word
        choices = [(word, 0), *lexicon.neighbours(word, MAX_EDITS)]
        found = max(choices, key=lambda pair: score(*pair))[0]
        if found == word or word.islower():
            return found
        return found.upper() if word.isupper() and len(word) > 1 else found.capitalize()

    return WORD.sub(best, text)


# ---- figures


def report(
    name: str,
    repair: Callable[[list[str], float], list[str]],
    tuned: list[tuple[str, str]],
    tested: list[tuple[str, str]],
    alphas: list[float],
    lexicon: Lexicon,
) -> list[str]:
    """Choose alpha on one set, print the figures of the other; return the repaired texts."""
    rates = {}
    for alpha in alphas:
        clean, wrong = zip(*tuned, strict=True)
        rates[alpha] = rescoring.word_error_rate(clean, repair(list(wrong), alpha))
    alpha = min(alphas, key=lambda a: rates[a])
    clean, wrong = zip(*tested, strict=True)
    start = time.monotonic()
    found = repair(list(wrong), alpha)
    seconds = time.monotonic() - start
    before = rescoring.word_error_rate(clean, wrong)
    after = rescoring.word_error_rate(clean, found)
    chosen = ", ".join(f"{a:.3g}: {rate:.2%}" for a, rate in rates.items())
    print(f"\n{name}: alpha {alpha:.3g}, chosen among {chosen}")
    print(f"  word error rate {before:.2%} -> {after:.2%}, {1 - after / before:.0%} less")
    print_words(list(clean), list(wrong), found, lexicon)
    print(f"  {seconds / len(tested):.2f} s a sentence")
    return found


def print_words(clean: list[str], wrong: list[str], found: list[str], lexicon: Lexicon) -> None:
    """Print what became of hit and of intact words, by whether the lexicon has the right word."""
    texts = zip(clean, wrong, found, strict=True)
    triples = [each for three in texts for each in zip(*map(words, three), strict=True)]
    for known in (True, False):
        these = [triple for triple in triples if (triple[0] in lexicon) == known]
        hit = [c == f for c, w, f in these if c != w]
        intact = [c == f for c, w, f in these if c == w]
        print(
            f"  words {'in' if known else 'not in'} the lexicon: {sum(hit)} of {len(hit)} hit ones "
            f"repaired, {len(intact) - sum(intact)} of {len(intact)} intact ones spoiled"
        )


if __name__ == "__main__":
    main()
