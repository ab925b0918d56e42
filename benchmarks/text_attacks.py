"""Attacks on a classifier of texts and on a reader, trained here, and TextAttack's greedy search.

    python benchmarks/text_attacks.py --output_dir runs/attacked --text input.txt
    python benchmarks/text_attacks.py --output_dir runs/attacked --text input.txt \\
        --peer path/to/packages                       # with TextAttack, by pip install --target

The classifier, a DistilBERT of two layers, learns from scratch whether a passage is of the first or
the second half of a text, tinyshakespeare's histories and comedies; every tenth passage is held
out. The reader is trained by recipes/train_qa.py on made-up encyclopedia articles. Both tables
print accuracy, or exact match and F1, before and after, and queries a text.

TextAttack's GreedyWordSwapWIR gets the same candidates for each word, the same budget and the same
share of words. Its packages for languages and constraints that this search does not use need not be
installed: empty modules stand for those that are missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from genkit.data.squad import Example, read_examples
from genkit.qa.attacks import Method
from genkit.qa.model import make_tokenizer
from genkit.qa.robustness import measure_answer_attacks
from genkit.text.attacks import ClassGoal, attack_text
from genkit.text.candidates import Vocabulary, typing_errors, words_by_gradient
from genkit.text.classifiers import TextClassifier, load_text_classifier
from genkit.text.edits import has_letters, split_words
from genkit.text.robustness import SHARES, mean, measure_text_attacks
from genkit.text.word_search import Candidates, words_allowed

ROOT = Path(__file__).parents[1]
WORDS = 30  # of a passage, about
POSITIONS, STEPS, ROWS = 96, 300, 32  # of the classifier: tokens, steps, texts a step
CLASSES = {0: "first half", 1: "second half"}
CITIES = [
    "Vienna",
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Quito",
    "Turin",
    "Basel",
    "Dublin",
    "Seville",
    "Kyoto",
    "Porto",
]
FIRST = [
    "Ada",
    "Otto",
    "Nora",
    "Hugo",
    "Clara",
    "Felix",
    "Irma",
    "Bruno",
    "Edith",
    "Oscar",
    "Paula",
    "Victor",
]
LAST = [
    "Mills",
    "Brandt",
    "Keller",
    "Santos",
    "Novak",
    "Larsen",
    "Moretti",
    "Duval",
    "Petrov",
    "Okafor",
]
THINGS = ["bridge", "tower", "museum", "library", "harbour", "theatre", "station", "palace"]
FIELDS = ["physics", "botany", "music", "history", "painting", "geometry", "medicine", "astronomy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path, help="of both models")
    parser.add_argument("--text", required=True, type=Path, help="tinyshakespeare's input.txt")
    parser.add_argument("--texts", type=int, default=200, help="held-out passages and questions")
    parser.add_argument("--budget", type=int, default=300, help="queries a text")
    parser.add_argument("--peer", type=Path, help="folder of packages with TextAttack")
    arguments = parser.parse_args()
    train, held_out = read_passages(arguments.text)
    folder = arguments.output_dir / "classifier"
    if not folder.exists():
        train_classifier(train, folder)
    random.Random(0).shuffle(held_out)
    texts, labels = map(list, zip(*held_out[: arguments.texts], strict=True))
    classifier = load_text_classifier(folder)
    print(attack_text(texts[0], model=classifier, max_changed=0.2, budget=arguments.budget))
    ways: tuple[Candidates, ...] = ("gradient", "characters")
    for candidates in ways:
        start = time.perf_counter()
        found = measure_text_attacks(
            texts, labels, model=classifier, candidates=candidates, budget=arguments.budget
        )
        print(f"\n{found}\n{time.perf_counter() - start:.0f} s", flush=True)
    if arguments.peer:
        compare_with_textattack(arguments.peer, classifier, texts, labels, arguments.budget)
    attack_reader(arguments.output_dir, arguments.texts // 2, arguments.budget)


# ---------------------------------------------------------------------------------------------
# The classifier


def read_passages(path: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Cut a text into passages of whole lines without names of speakers, with their halves.

    Returns:
        Passages to train on, and every tenth, held out.
    """
    lines = [line for line in path.read_text().splitlines() if line and not line.endswith(":")]
    passages, lately, words = [], [], 0
    for i, line in enumerate(lines):
        lately.append(line)
        words += len(split_words(line).words)
        if words >= WORDS:
            passages.append((" ".join(lately), int(i >= len(lines) / 2)))
            lately, words = [], 0
    held_out = [passage for i, passage in enumerate(passages) if i % 10 == 0]
    return [passage for i, passage in enumerate(passages) if i % 10], held_out


def train_classifier(passages: list[tuple[str, int]], folder: Path) -> None:
    """Train a small DistilBERT from scratch."""
    torch.manual_seed(0)
    examples = [Example(str(i), "", "", text, []) for i, (text, _) in enumerate(passages)]
    tokenizer = make_tokenizer(examples, 6000, POSITIONS)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
        dropout=0.3,
        pad_token_id=tokenizer.pad_token_id,
        id2label=CLASSES,
        label2id={name: i for i, name in CLASSES.items()},
    )
    model = DistilBertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1)
    draws = random.Random(0)
    for step in range(STEPS):
        texts, labels = zip(*draws.sample(passages, ROWS), strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"classifier: step {step}, loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# The reader


def write_articles(path: Path, count: int, seed: int) -> None:
    """Write articles about people and buildings that are made up, with questions, as SQuAD does."""
    draws = random.Random(seed)
    data = []
    for number in range(count):
        sentences, questions = [], []
        for name, thing in zip(draws.sample(FIRST, 2), draws.sample(THINGS, 2), strict=True):
            who = f"{name} {draws.choice(LAST)}"
            city, field = draws.choice(CITIES), draws.choice(FIELDS)
            year, built = draws.randint(1700, 1890), draws.randint(1700, 1890)
            sentences.append(f"{who} was born in {city} in {year} and later studied {field}.")
            sentences.append(f"The old {thing} near the river was built in {built}.")
            questions += [(f"Where was {who} born?", city), (f"What did {who} study?", field)]
            questions += [(f"When was the old {thing} built?", str(built))]
        context, qas = " ".join(draws.sample(sentences, len(sentences))), []
        for i, (question, text) in enumerate(questions):
            answer = {"text": text, "answer_start": context.index(text)}
            qas.append({"id": f"{number}-{i}", "question": question, "answers": [answer]})
        paragraphs = [{"context": context, "qas": qas}]
        data.append({"title": f"article {number}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "made up", "data": data}))


def attack_reader(folder: Path, count: int, budget: int) -> None:
    """Train a reader by the recipe, and attack it."""
    data, reader = folder / "articles.json", folder / "reader"
    write_articles(data, 1200, seed=0)
    if not (reader / "model.safetensors").exists():
        command = [
            str(Path(sys.executable).with_name("accelerate")),
            "launch",
            str(ROOT / "recipes/train_qa.py"),
            "--from_scratch",
        ]
        command += ["--depth", "2", "--width", "64", "--heads", "4", "--max_seq_len", "96"]
        command += ["--data", str(data), "--output_dir", str(reader), "--epochs", "6"]
        subprocess.run(command, check=True, cwd=ROOT)
    write_articles(folder / "held_out.json", count // 6 + 1, seed=1)
    examples = read_examples(str(folder / "held_out.json"))[0][:count]
    ways: list[tuple[Method, Candidates]]
    ways = [("words", "gradient"), ("words", "characters"), ("distractor", "gradient")]
    for method, candidates in ways:
        start = time.perf_counter()
        found = measure_answer_attacks(
            examples, model=reader, method=method, candidates=candidates, budget=budget
        )
        print(f"\n{found}\n{time.perf_counter() - start:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------
# The peer


class _Anything(type):
    """A class whose attributes are classes like it; a call of one returns an empty tuple."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return ()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type.__call__(_Anything, name, (), {})


class _EmptyModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type.__call__(_Anything, name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes empty modules of some names."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


UNUSED = (  # what TextAttack imports and its greedy search does not use
    "flair jieba Levenshtein langdetect pinyin OpenHowNet more_itertools num2words word2number "
    "language_tool_python bert_score nltk lemminflect"
)


def import_textattack(folder: Path, cache: Path) -> Any:
    """Import TextAttack from a folder; it downloads nothing."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "post_install_check_3").touch()  # it would download data for other attacks
    os.environ["TA_CACHE_DIR"] = str(cache)
    sys.path.append(str(folder))
    missing = {name for name in UNUSED.split() if name == "nltk" or not _is_installed(name)}
    sys.meta_path.insert(0, _StandIns(missing))
    textattack = importlib.import_module("textattack")
    print(f"TextAttack with empty modules for {', '.join(sorted(missing))}")
    return textattack


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def compare_with_textattack(
    folder: Path, classifier: TextClassifier, texts: list[str], labels: list[int], budget: int
) -> None:
    """Attack the same texts by both searches: the same candidates, budget and share of words."""
    textattack = import_textattack(folder, folder.parent / "textattack_cache")
    right = classifier.log_probabilities(texts).argmax(-1).tolist()
    rows = [
        (text, label)
        for text, label, seen in zip(texts, labels, right, strict=True)
        if label == seen
        and tuple(textattack.shared.AttackedText(text).words) == split_words(text).words
    ]
    print(f"\n{len(rows)} texts that both cut into the same words, {budget} queries at most")
    ways: tuple[Candidates, ...] = ("gradient", "characters")
    for candidates, share in itertools.product(ways, SHARES):
        compare_searches(textattack, classifier, rows, candidates, share, budget)


def compare_searches(
    textattack: Any,
    classifier: TextClassifier,
    rows: list[tuple[str, int]],
    candidates: Candidates,
    share: float,
    budget: int,
) -> None:
    """Attack texts by both searches; those of which the share is no word are left out."""
    rows = [row for row in rows if words_allowed(share, len(split_words(row[0]).words))]
    line = [f"{candidates}, {share:.0%} of words, {len(rows)} texts:"]
    start = time.perf_counter()
    options: dict[str, Any] = {"candidates": candidates, "max_changed": share, "budget": budget}
    found = [attack_text(text, model=classifier, label=label, **options) for text, label in rows]
    line.append(describe("genkit", [(each.success, each.queries) for each in found], start))
    for method in ("delete", "unk"):
        start = time.perf_counter()
        # its own share of words is rounded up, genkit's down: it gets the number of words
        limit = textattack.constraints.overlap.MaxWordsPerturbed(max_num_words=1)
        attack = make_peer(textattack, classifier, candidates, limit, budget, method)
        results = []
        for text, label in rows:
            limit.max_num_words = words_allowed(share, len(split_words(text).words))
            results.append(attack.attack(text, label))
        success = textattack.attack_results.SuccessfulAttackResult
        both = [(isinstance(each, success), each.num_queries) for each in results]
        line.append(describe(f"TextAttack {method}", both, start))
    print("  ".join(line), flush=True)


def describe(name: str, results: list[tuple[bool, int]], start: float) -> str:
    """Write success, mean queries and time in short."""
    success = mean([float(each) for each, _ in results])
    queries = mean([float(count) for _, count in results])
    return f"{name} {success:.1%} in {queries:.0f} queries, {time.perf_counter() - start:.0f} s;"


def make_peer(
    textattack: Any,
    classifier: TextClassifier,
    candidates: str,
    limit: Any,
    budget: int,
    method: str,
) -> Any:
    """Make TextAttack's greedy search by word importance with genkit's candidates.

    Args:
        limit: its constraint of the words that may be changed.
    """
    vocabulary = Vocabulary(classifier.model, classifier.tokenizer)

    class Wrapper(textattack.models.wrappers.ModelWrapper):
        model = classifier.model

        def __call__(self, inputs: list[str]) -> torch.Tensor:
            return classifier.log_probabilities(inputs).exp()

    class Swaps(textattack.transformations.WordSwap):
        def _get_transformations(self, current: Any, indices_to_modify: Any) -> list[Any]:
            draft, found = split_words(current.text), []
            positions = [i for i in indices_to_modify if has_letters(draft.words[i])]
            if candidates == "gradient":  # of a text that still has its label
                label = int(classifier.log_probabilities([current.text])[0].argmax())
                gradients = ClassGoal(classifier, label).gradients(draft)
            for i in positions:
                if candidates == "gradient":
                    ranked = words_by_gradient(draft, i, gradients, vocabulary)
                    words = [word for _, word in ranked]
                else:
                    words = typing_errors(draft, i, 0)
                found += [current.replace_word_at_index(i, word) for word in words]
            return found

    return textattack.Attack(
        textattack.goal_functions.UntargetedClassification(Wrapper(), query_budget=budget),
        [
            limit,
            textattack.constraints.pre_transformation.RepeatModification(),
        ],
        Swaps(),
        textattack.search_methods.GreedyWordSwapWIR(wir_method=method),
    )


if __name__ == "__main__":
    main()
