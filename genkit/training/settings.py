"""Settings of a run: one flat dataclass a recipe, the command line derived from it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from genkit import machine
from genkit.hub.download import check_name
from genkit.training import launch
from genkit.training.folder import ELSEWHERE, RUN_FILE, read_record

UNSET = object()  # what the command line did not say
TRANSIENT = ("output_dir", "resume", "accept_changes", "dry_run")  # of one start, not of the run
HARMLESS = (
    *TRANSIENT, "save_minutes", "save_steps", "keep_checkpoints", "report_to",
    "license", "push_to_hub", "push_private", "push_often",
)  # fmt: skip


def setting(default: Any, help: str) -> Any:
    """Declare one setting: its default and its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class RunSettings:
    """What every recipe can be told. A recipe adds its own; None is filled in by its preset."""

    output_dir: str = setting("runs/model", "folder of the run and of the model")
    resume: bool = setting(False, "go on with the run in output_dir")
    accept_changes: bool = setting(
        False, "resume although settings that alter the run have changed"
    )
    dry_run: bool = setting(
        False, "print parameters, memory, tokens per epoch and ETA; write nothing"
    )
    seed: int = setting(0, "seed of everything the run draws")
    max_steps: int | None = setting(None, "optimizer steps; exact resume holds for these")
    max_minutes: float | None = setting(None, "minutes of training, compilation not counted")
    batch_size: int | None = setting(None, "rows per optimizer step, over all processes")
    gradient_accumulation: int = setting(1, "parts in which a process takes its rows")
    optimizer: str | None = setting(None, "muon or adamw")
    learning_rate: float | None = setting(None, "peak rate of AdamW")
    muon_learning_rate: float | None = setting(None, "peak rate of Muon")
    weight_decay: float | None = setting(None, "decoupled weight decay of matrices")
    warmup: float = setting(0.02, "part of the run over which the rate rises from 0")
    decay: float = setting(1.0, "part of the run over which the rate falls to 0, at its end")
    clip: float = setting(1.0, "largest norm of the gradient; 0 for no limit")
    ema: float | None = setting(None, "decay of the averaged weights, judged and saved; 0 for none")
    mixed_precision: str | None = setting(None, "no or bf16")
    compile: bool | None = setting(None, "compile the training step")
    evaluations: int = setting(10, "evaluations, evenly over the run")
    patience: int = setting(0, "stop after so many evaluations without improvement; 0 for never")
    save_minutes: float = setting(0.5, "minutes between checkpoints")
    save_steps: int | None = setting(None, "steps between checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints to keep")
    license: str | None = setting(None, "of the model, for its card: the Hub's name, such as mit")
    push_to_hub: str | None = setting(None, "push the model to this repository, at the end")
    push_private: bool = setting(False, "in a repository that nobody else sees, if it is new")
    push_often: bool = setting(False, "push every model that is the best so far, in the background")
    report_to: str | None = setting(None, "a tracker: tensorboard, trackio or wandb")

    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("adamw", "muon")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        positive = "max_steps max_minutes batch_size gradient_accumulation evaluations"
        positive += " keep_checkpoints save_steps learning_rate muon_learning_rate"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("seed", "patience", "clip", "save_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup", "decay"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(
                    f"{name} must be a part of the run, 0 to 1, got {getattr(self, name)}"
                )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        for name, allowed in {
            "optimizer": (None, *self.OPTIMIZERS),
            "mixed_precision": (None, "no", "bf16"),
            "report_to": (None, "tensorboard", "trackio", "wandb"),
        }.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed[1:])
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("push_private", "push_often"):
            if getattr(self, name) and self.push_to_hub is None:
                raise ValueError(f"{name}: say where to by push_to_hub user/name")
        if self.push_to_hub is not None:
            check_name(self.push_to_hub, "push_to_hub")
        if self.report_to and importlib.util.find_spec(self.report_to) is None:
            raise ValueError(f"report_to: pip install 'genkit[{self.report_to}]' first")


S = TypeVar("S", bound=RunSettings)
Preset = Callable[[S, str], dict[str, Any]]  # settings as given, "cuda" or "cpu" -> values


def parse(cls: type[S], preset: Preset[S], argv: list[str] | None = None) -> S:
    """Read the command line; with --resume, on top of the settings that the run was started with.

    Args:
        preset: gives the values of settings that are None, for the kind of machine.
        argv: the words of the command line; sys.argv's unless given.

    Raises:
        ValueError: a value cannot work, the launch is not what was asked for, there is nothing to
            resume, or a setting that alters the run differs from the run's own and
            --accept_changes was not given.
    """
    parser = HfArgumentParser(cls, allow_abbrev=False)
    unset = argparse.Namespace(**{f.name: UNSET for f in dataclasses.fields(cls)})
    words = vars(parser.parse_args(argv, unset))
    given = {name: value for name, value in words.items() if value is not UNSET}
    settings = _resumed(cls, given) if given.get("resume") else cls(**given)
    launch.check()
    device = "cuda" if machine.state().device.type == "cuda" else "cpu"
    return _fill(settings, preset(settings, device))


def _resumed(cls: type[S], given: dict[str, Any]) -> S:
    output_dir = given.get("output_dir", cls.output_dir)
    saved = read_record(Path(output_dir))["settings"]
    _check_saved(cls, saved, Path(output_dir) / RUN_FILE)
    changed = [n for n in given if n not in HARMLESS and n in saved and given[n] != saved[n]]
    if changed and not given.get("accept_changes"):
        listed = ", ".join(f"{n} {saved[n]!r} -> {given[n]!r}" for n in changed)
        raise ValueError(
            f"resume: these settings would alter the run in {output_dir}: {listed}. "
            "Leave them out, or pass --accept_changes to go on with the new values"
        )
    return cls(**({n: v for n, v in saved.items() if n not in TRANSIENT} | given))


def _check_saved(cls: type[S], saved: dict[str, Any], record: Path) -> None:
    """Refuse settings that this recipe cannot have written."""
    hints = get_type_hints(cls)
    unknown = [name for name in saved if name not in hints]
    if unknown:
        raise ValueError(
            f"resume: {record} has the setting {unknown[0]}, which this recipe does not have; go "
            "on with the recipe that started the run"
        )
    for name, value in saved.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{record} is damaged (its {name} is {value!r}); {ELSEWHERE}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a setting's type."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if get_args(hint):  # a union
        return any(_fits(value, each) for each in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _fill(settings: S, values: dict[str, Any]) -> S:
    """Give every setting that is None its value; the run's length only if none was asked for."""
    if settings.max_steps or settings.max_minutes:
        values = {n: v for n, v in values.items() if n not in ("max_steps", "max_minutes")}
    missing = {n: v for n, v in values.items() if getattr(settings, n) is None}
    return dataclasses.replace(settings, **missing)
