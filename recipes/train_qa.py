"""Train an encoder to find answers in texts.

    accelerate launch recipes/train_qa.py --data rajpurkar/squad
    accelerate launch recipes/train_qa.py --data train-v2.0.json --val_data dev-v2.0.json
    accelerate launch recipes/train_qa.py --output_dir runs/qa --resume
    accelerate launch recipes/train_qa.py --init_from path/to/encoder --data questions.json
    accelerate launch recipes/train_qa.py --from_scratch --data questions.json

The output folder is an ordinary transformers model, at any time the best one so far; what its
validation taught about its scores is in its config.json.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from genkit import files, machine
from genkit.data import squad, tables
from genkit.data.corpus import tokenizer_hash
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.metrics.calibration import fit_temperature, reliability
from genkit.models import lm
from genkit.qa import reader, training
from genkit.qa.model import load_extractor, make_model, make_tokenizer
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting

# ---- settings

DEFAULT = "distilbert/distilbert-base-cased"


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/qa", "folder of the run and of the model")
    data: str = setting("rajpurkar/squad", "questions: a file in SQuAD's format, or a dataset")
    val_data: str | None = setting(None, "to validate on; or the dataset's own, or last articles")
    val_fraction: float = setting(0.1, "part of the articles, the last ones, to validate on")
    table_memory: int = setting(tables.MEMORY, "MiB of the process that reads a file")
    init_from: str = setting(DEFAULT, "encoder to start from: a folder or a Hub id")
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    from_scratch: bool = setting(False, "start from random weights and a tokenizer of the data")
    depth: int | None = setting(None, "from scratch, layers: the one dial of the model's size")
    width: int | None = setting(None, "from scratch, size of a layer's vectors")
    heads: int | None = setting(None, "from scratch, attention heads")
    vocab_size: int | None = setting(None, "from scratch, the most tokens there may be")
    max_seq_len: int | None = setting(None, "tokens seen at once; 384, or fewer if it sees less")
    doc_stride: int | None = setting(None, "of these, shared by windows; 128, or up to a half")
    max_answer_len: int = setting(30, "the most tokens of an answer, in validation")
    epochs: float | None = setting(None, "times through the data, if max_steps is not fewer steps")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        shape = ("depth", "width", "heads", "vocab_size")
        for name in (*shape, "max_seq_len", "max_answer_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
            if value is not None and name in shape and not self.from_scratch:
                raise ValueError(f"{name}: {self.init_from} has its own; add --from_scratch")
        if self.doc_stride is not None and self.doc_stride < 0:
            raise ValueError(f"doc_stride must be 0 or more, got {self.doc_stride}")
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"width: {self.width} does not divide into {self.heads} heads")
        if self.from_scratch and self.init_from != DEFAULT:
            raise ValueError(f"init_from: {self.init_from} or from_scratch, not both")
        if self.init_revision and (self.from_scratch or Path(self.init_from).is_dir()):
            start = "from_scratch" if self.from_scratch else f"the folder {self.init_from}"
            raise ValueError(f"init_revision: {start} has none; leave it out")


SAMPLES = 12


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"batch_size": 32 if device == "cuda" else 16}
    rates = {"learning_rate": 4e-5, "muon_learning_rate": 2e-3, "weight_decay": 0.01}
    if settings.from_scratch:
        depth = settings.depth or (6 if device == "cuda" else 4)
        width = settings.width or (64 if device == "cuda" else 32) * depth
        run |= {"depth": depth, "width": width, "vocab_size": 8000}
        run |= {"heads": math.gcd(width, max(4, width // 64))}
        rates |= {"learning_rate": 1e-3, "muon_learning_rate": 0.02}
    elif not Path(settings.init_from).is_dir():
        run |= {"init_revision": "main"}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        if settings.from_scratch:
            run |= {"epochs": 20.0} if device == "cuda" else {"max_minutes": 10.0}
        else:
            run |= {"epochs": 2.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # windows differ in length, and each length would be compiled
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.0, "compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            parts = squad.split(
                settings.data, settings.val_data, settings.val_fraction, settings.table_memory
            )
            check_count(run, len(parts[1]))
            network, tokenizer = start(settings, parts[0])
            settings.max_seq_len, settings.doc_stride = choose_size(settings, tokenizer)
            size = settings.max_seq_len, settings.doc_stride
            train = training.Questions(parts[0], tokenizer, *size)
            part = [parts[1][i] for i in run.shard(len(parts[1]))]
            mine = training.Questions(part, tokenizer, *size)
        order = Order(len(train.windows), settings.seed)
        known = facts(settings, parts, network, tokenizer)
        corpus = Corpus(tokenizer, parts[1], mine, squad.has_impossible(parts[0]), known)

        # ---- model
        network.set_attn_implementation(
            machine.attention(run.device.type, settings.mixed_precision)
        )
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(training.loss)
        run.log(
            f"{network.num_parameters():,} parameters · {len(parts[0]):,} questions to train on, "
            f"{len(parts[1]):,} to validate · {len(train.windows):,} windows of up to "
            f"{settings.max_seq_len} tokens an epoch"
        )

        # ---- loop
        run.identify(**corpus.facts)
        if settings.epochs:
            steps = math.ceil(settings.epochs * len(train.windows) / settings.batch_size)
            settings.max_steps = min(steps, settings.max_steps or steps)
        run.restore()
        run.warm_up(lambda rows: loss(model, *train.batch(order(rows)[1], network)))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *train.batch(order(rows)[1], network)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, corpus)
                    if run.report("f1", metrics.figures, lower_is_better=False):
                        run.publish(partial(save, run, settings, corpus, metrics))
        run.log(f"the best model is in {run.folder.path}")


@dataclass(frozen=True)
class Corpus:
    """What the model is judged on, and saved with."""

    tokenizer: Any
    val: list[squad.Example]
    mine: training.Questions  # this process's part of them
    impossible: bool  # it was trained on questions without an answer
    facts: dict[str, str]  # which data and which start it is, by content hash


def check_count(run: Run, count: int) -> None:
    """Refuse too few questions: a half of them calibrates the other."""
    least = max(2, run.processes)
    if count < least:
        raise ValueError(f"data: {count} questions to validate on; give {least} or more")


def start(settings: Settings, examples: list[squad.Example]) -> tuple[PreTrainedModel, Any]:
    """Return the model to start from, and its tokenizer."""
    if not settings.from_scratch:
        return load_extractor(settings.init_from, settings.init_revision)
    positions = settings.max_seq_len or reader.MAX_SEQ_LEN
    tokenizer = make_tokenizer(examples, settings.vocab_size, positions)
    shape = settings.depth, settings.width, settings.heads
    return make_model(len(tokenizer), positions, *shape), tokenizer


def choose_size(settings: Settings, tokenizer: Any) -> tuple[int, int]:
    """Return the tokens of a window, and those of its context that the next one shares."""
    most = tokenizer.model_max_length
    if settings.max_seq_len and settings.max_seq_len > most:
        raise ValueError(
            f"max_seq_len: {settings.max_seq_len} is more than the model's own, {most}"
        )
    length = settings.max_seq_len or min(reader.MAX_SEQ_LEN, most)
    stride = (
        min(reader.DOC_STRIDE, length // 2) if settings.doc_stride is None else settings.doc_stride
    )
    return length, stride


def facts(
    settings: Settings,
    parts: tuple[list[squad.Example], list[squad.Example]],
    network: PreTrainedModel,
    tokenizer: Any,
) -> dict[str, str]:
    """Name what the run is made of by content hash."""
    known = {"train_sha256": squad.content_hash(parts[0])}
    known |= {"val_sha256": squad.content_hash(parts[1])}
    known |= {"tokenizer_sha256": tokenizer_hash(tokenizer)}
    return known | ({} if settings.from_scratch else {"model_sha256": files.weights_hash(network)})


# ---- evaluate


@dataclass(frozen=True)
class Judged:
    """What an evaluation found out."""

    figures: dict[str, float]
    calibration: reader.Calibration
    verdict: training.Verdict


def evaluate(run: Run, settings: Settings, corpus: Corpus) -> Judged:
    """Judge the model on all validation questions, and write some of its answers."""
    network = run.weights().eval()
    logits, nats = training.predict(network, corpus.mine)
    network.train()
    total = torch.tensor([nats, len(logits)], dtype=torch.float64)
    nats, windows = run.sum(total).tolist()
    half = training.halves(len(corpus.val))[list(run.shard(len(corpus.val)))]
    temperature, *of_half = temperatures(logits, corpus.mine, half)
    others = np.array(of_half)[1 - half]  # what one half taught judges the other
    mine = training.readings(logits, corpus.mine, settings.max_answer_len, others)
    verdict = training.judge(gather_object(mine), corpus.val)
    figures = {"val_loss": nats / windows, **verdict.figures, "temperature": temperature}
    if run.is_main:
        write_samples(run, corpus, verdict)
    learnt = reader.Calibration(
        temperature,
        verdict.threshold,
        corpus.impossible,
        settings.max_seq_len,
        settings.doc_stride,
        settings.max_answer_len,
    )
    return Judged(figures, learnt, verdict)


def temperatures(logits: np.ndarray, part: training.Questions, half: np.ndarray) -> list[float]:
    """Fit a temperature to the questions of all processes, and to each half of them."""
    mine = logits, training.gold_classes(part), half[part.windows.row]
    logits, classes, of = (
        np.concatenate(each) for each in zip(*gather_object([mine]), strict=True)
    )
    return [
        fit_temperature(logits[chosen].reshape(-1, logits.shape[-1]), classes[chosen].flatten())
        for chosen in (of >= 0, of == 0, of == 1)
    ]


def write_samples(run: Run, corpus: Corpus, verdict: training.Verdict) -> None:
    """Show what was answered to some of the questions."""
    lines = [f"# Step {run.progress.step}\n", "| | question | answer | confidence | gold |"]
    lines.append("|---|---|---|---|---|")
    for i in np.unique(np.linspace(0, len(corpus.val) - 1, SAMPLES, dtype=int)).tolist():
        example, mark = corpus.val[i], "right" if verdict.right[i] else "wrong"
        golds = " / ".join(dict.fromkeys(text for text, _ in example.answers))
        cells = (example.question, verdict.given[i] or "(none)", golds or "(none)")
        question, answer, gold = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
        lines.append(f"| {mark} | {question} | {answer} | {verdict.confidences[i]:.2f} | {gold} |")
    run.folder.write(f"samples/step-{run.progress.step:08d}.md", "\n".join(lines) + "\n")


# ---- save


USAGE = """
import genkit
answer = genkit.answer("Who wrote it?", "It was written by Ada Lovelace.", model=model)
print(answer, answer.confidence)

from transformers import AutoModelForQuestionAnswering
network = AutoModelForQuestionAnswering.from_pretrained(model)
"""


def save(run: Run, settings: Settings, corpus: Corpus, metrics: Judged, folder: Path) -> None:
    """Write the model as transformers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    network.config.calibration = asdict(metrics.calibration)
    network.save_pretrained(folder)
    lm.save_tokenizer(corpus.tokenizer, folder)
    verdict = metrics.verdict
    reliability(verdict.confidences, verdict.right, folder / "calibration.png")
    origin = "a new encoder" if settings.from_scratch else settings.init_from
    rules = "2.0" if squad.has_impossible(corpus.val) else "1.1"
    text = card.card(
        run.folder.path,
        title="A model that finds answers in texts",
        task="question-answering",
        about=f"{network.num_parameters():,} parameters, trained from {origin} on the questions "
        f"of {settings.data} for {run.progress.step:,} steps.",
        usage=USAGE,
        figures=metrics.figures,
        protocol=f"All {len(corpus.val):,} validation questions, by the rules of SQuAD {rules}; "
        f"windows of {settings.max_seq_len} tokens that share {settings.doc_stride}, answers of "
        f"up to {settings.max_answer_len} tokens in whole words. Expected calibration error of "
        "the answer's probability, 15 bins, before and after temperature scaling; temperature and "
        "threshold that judge a question come from the other half of the questions, those in "
        f"config.json from all. {weights.capitalize()} weights, float32; data {corpus.facts}; "
        f"seed {settings.seed}.",
        data=settings.data,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
