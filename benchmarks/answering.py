"""genkit.answer against the question-answering pipeline of transformers 4.57, in one run.

    python benchmarks/answering.py --python path/to/python/with/transformers/4.57 \\
        --squad xquad.en.json --model FOLDER                   # answers and speed
    python benchmarks/answering.py --python … --squad … --model FOLDER --document book.txt

The folder is an ordinary model for question answering, such as one by recipes/train_qa.py; of
DistilBERT's size, random weights do for speed. The pipeline runs at each batch size, and the best
one counts. Rates are questions in a second of CPU time on each thread, so that other work on the
machine does not count; the first call of genkit is what one waits for. With --document,
questions are asked about a text cut or repeated to a million characters; the pipeline, whose time
is proportional to the number of questions, gets --peer_questions of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import genkit
from genkit.qa import answering
from genkit.qa.reader import load_reader

PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers import pipeline
transformers.utils.logging.set_verbosity_error()
model, batches = sys.argv[1], json.loads(sys.argv[2])
questions, contexts = json.load(sys.stdin)
answer = pipeline("question-answering", model=model, device="cpu")
answer(question=questions[0], context=contexts[0][:500])
for batch in batches:
    start = time.process_time()
    rows = answer(question=questions, context=contexts, batch_size=batch)
    seconds = (time.process_time() - start) / torch.get_num_threads()
    rows = [rows] if isinstance(rows, dict) else rows
    print(json.dumps([transformers.__version__, batch, seconds, rows]), flush=True)
"""
DEFAULTS: dict[str, Any] = {"max_seq_len": 384, "doc_stride": 128, "max_answer_len": 15}
PRECISIONS: tuple[dict[str, Any], ...] = ({}, {"dtype": "bfloat16"}, {"quantize": "int8"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="with transformers 4.57")
    parser.add_argument("--squad", required=True, type=Path, help="questions, in SQuAD's format")
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=int, help="default: all, or 20 about a document")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--repeat", type=int, default=2, help="number of runs; the best counts")
    parser.add_argument("--document", type=Path, help="a long text to ask the questions of")
    parser.add_argument("--peer_questions", type=int, default=1, help="about the long text")
    arguments = parser.parse_args()
    pairs = [
        (question["question"], paragraph["context"])
        for article in json.loads(arguments.squad.read_text())["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    if arguments.document:
        count = arguments.questions or 20
        compare_document(
            arguments, [question for question, _ in pairs[:: len(pairs) // count][:count]]
        )
    else:
        compare_short(arguments, pairs[: arguments.questions])


def clock() -> float:
    """Return seconds of CPU time on each thread."""
    return time.process_time() / torch.get_num_threads()


def compare_short(arguments: argparse.Namespace, pairs: list[tuple[str, str]]) -> None:
    """Compare answers and speed on contexts of a paragraph."""
    questions, contexts = map(list, zip(*pairs, strict=True))
    peer, best = run_pipeline(arguments, questions, contexts, arguments.batches)
    exact: list[answering.Answer] = []
    for precision in PRECISIONS:
        reader = load_reader(arguments.model, **precision)
        began = time.perf_counter()
        genkit.answer(questions[0], contexts[0], model=reader)
        waited = time.perf_counter() - began
        seconds: list[float] = []
        rows: list[answering.Answer] = []
        for _ in range(arguments.repeat):
            start = clock()
            rows = genkit.answer(questions, contexts, model=reader, **DEFAULTS)
            seconds.append(clock() - start)
        exact = exact or rows
        rate, name = len(pairs) / min(seconds), next(iter(precision.values()), "float32")
        unchanged = sum(a.answer == b.answer for a, b in zip(rows, exact, strict=True))
        print(
            f"genkit {name}: {rate:.1f} questions/s, {rate / best:.2f} times the pipeline; "
            f"{unchanged} of {len(pairs)} answers as in float32; first call {waited:.1f} s",
            flush=True,
        )
    compare_answers(exact, peer)


def compare_answers(ours: list[answering.Answer], peers: list[dict[str, Any]]) -> None:
    """Print the answers that differ from the pipeline's, and both scores."""
    same = 0
    for mine, its in zip(ours, peers, strict=True):
        equal = (mine.answer, mine.start, mine.end) == (its["answer"], its["start"], its["end"])
        if equal and abs(mine.score - its["score"]) < 1e-5:
            same += 1
            continue
        parts = " · several windows" if mine.window != (0, len(mine.context)) else ""
        print(
            f"  {mine.question[:60]!r}: {mine.answer!r} {mine.start} {mine.score:.6f}, "
            f"pipeline {its['answer']!r} {its['start']} {its['score']:.6f}{parts}"
        )
    print(f"{same} of {len(ours)} ({same / len(ours):.1%}) equal the pipeline's, scores to 1e-5")


def compare_document(arguments: argparse.Namespace, questions: list[str]) -> None:
    """Compare speed and memory on questions about a million characters."""
    text = arguments.document.read_text()
    text = (text * (1 + 1_000_000 // len(text)))[:1_000_000]
    few = questions[: arguments.peer_questions]
    _, rate = run_pipeline(arguments, few, [text] * len(few), arguments.batches)
    for precision in PRECISIONS:
        reader = load_reader(arguments.model, **precision)
        genkit.answer(questions[0], text[:10_000], model=reader)
        for stride in (128, 32):
            with Memory() as memory:
                start = clock()
                sizes = DEFAULTS | {"doc_stride": stride}
                genkit.answer(questions, text, model=reader, **sizes)
                mine = len(questions) / (clock() - start)
            name = next(iter(precision.values()), "float32")
            print(
                f"genkit {name}, doc_stride {stride}: {1 / mine:.1f} s a question of "
                f"{len(text):,} characters, {mine / rate:.2f} times the pipeline; "
                f"{memory.peak / 2**30:.2f} GB at most",
                flush=True,
            )


def run_pipeline(
    arguments: argparse.Namespace, questions: list[str], contexts: list[str], batches: list[int]
) -> tuple[list[dict[str, Any]], float]:
    """Run the peer at each batch size; return its answers at the first and its best rate."""
    command = [arguments.python, "-c", PEER, arguments.model, json.dumps(batches)]
    pairs = json.dumps([questions, contexts])
    peer = subprocess.run(command, input=pairs, check=True, stdout=subprocess.PIPE, text=True)
    rates, answers = [], []
    for line in peer.stdout.splitlines():
        version, batch, seconds, rows = json.loads(line)
        rates.append(len(questions) / seconds)
        answers.append(rows)
        print(f"transformers {version}, batch {batch}: {rates[-1]:.3g} questions/s", flush=True)
    return answers[0], max(rates)


class Memory:
    """The most memory that this process has inside a `with` block."""

    def __enter__(self) -> Memory:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, psutil.Process().memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    main()
