"""Settings of a run: one flat dataclass a recipe, the command line derived from it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from genkit import machine
from genkit.arguments import Parser
from genkit.hub.download import check_name
from genkit.training import launch
from genkit.training.folder import ELSEWHERE, RUN_FILE, read_record

UNSET = object()  # a setting that the command line does not give
TRANSIENT = (  # of one start, not of the run
    "output_dir", "resume", "accept_changes", "dry_run", "device", "quiet",
)  # fmt: skip
HARMLESS = (
    *TRANSIENT, "save_minutes", "save_steps", "keep_checkpoints", "report_to",
    "license", "push_to_hub", "push_private", "push_often",
)  # fmt: skip


CHOSEN: Any = None  # default of a setting whose value the preset chooses


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Values that a setting takes: one of some choices, or a finite number in a range."""

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] | None = None

    def includes(self, value: Any) -> bool:
        """Whether a setting may have this value."""
        if self.choices is not None:
            return value in self.choices
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.choices is not None:
            *others, last = map(str, self.choices)
            return f"{', '.join(others)} or {last}" if others else last
        bounds = [
            f"{self.least} or more" if self.least is not None else "",
            f"above {self.above}" if self.above is not None else "",
            f"below {self.below}" if self.below is not None else "",
            f"{self.most} or less" if self.most is not None else "",
        ]
        return " and ".join(filter(None, bounds)) or "finite"


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """Declare one setting of a run.

    Args:
        default: its value if none is given; CHOSEN leaves it to the recipe's preset.
        help: its line in --help, to which the range or the choices and the default are added.
        least, above, below, most: bounds of a number, or of each number of a list.
        choices: the values that it takes, or that each item of a list takes.
    """
    bounded = any(bound is not None for bound in (least, above, below, most, choices))
    allowed = Allowed(least, above, below, most, tuple(choices) if choices is not None else None)
    metadata = {"help": help, "allowed": allowed if bounded else None}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class RunSettings:
    """Settings that every recipe has; a recipe adds its own, and redefines a default by its field.

    After `parse`, the type of a field holds: the preset has replaced each CHOSEN.
    """

    output_dir: str = setting("runs/model", "folder of the run and of the model")
    resume: bool = setting(False, "continue the run in output_dir")
    accept_changes: bool = setting(
        False, "resume although settings that alter the run have changed"
    )
    dry_run: bool = setting(
        False, "print parameters, memory, tokens per epoch and ETA; write nothing"
    )
    device: str | None = setting(None, "cpu, or a GPU as torch names it; a GPU if there is one")
    quiet: bool = setting(False, "print nothing but results and errors")
    seed: int = setting(0, "seed of all random numbers of the run", least=0)
    max_steps: int | None = setting(None, "optimizer steps; exact resume holds for these", least=1)
    max_minutes: float | None = setting(
        None, "minutes of training, compilation not counted", above=0
    )
    batch_size: int = setting(CHOSEN, "rows per optimizer step, over all processes", least=1)
    gradient_accumulation: int = setting(
        1, "micro-batches into which a process divides its rows", least=1
    )
    optimizer: str = setting(CHOSEN, "optimizer of the network", choices=("adamw", "muon"))
    learning_rate: float = setting(CHOSEN, "peak learning rate of AdamW", above=0)
    muon_learning_rate: float = setting(CHOSEN, "peak learning rate of Muon", above=0)
    weight_decay: float = setting(CHOSEN, "decoupled weight decay of matrices", least=0)
    warmup: float = setting(
        0.02, "part of the run over which the rate rises from 0", least=0, most=1
    )
    decay: float = setting(
        1.0, "part of the run, at its end, over which the rate falls to 0", least=0, most=1
    )
    clip: float = setting(1.0, "largest norm of the gradient; 0 for no limit", least=0)
    ema: float = setting(
        CHOSEN,
        "decay of the averaged weights, which are evaluated and saved; 0 for none",
        least=0,
        below=1,
    )
    mixed_precision: str = setting(CHOSEN, "precision of the training step", choices=("no", "bf16"))
    compile: bool = setting(CHOSEN, "compile the training step")
    evaluations: int = setting(10, "number of evaluations, evenly over the run", least=1)
    patience: int = setting(
        0, "stop after this many evaluations without improvement; 0 for never", least=0
    )
    save_minutes: float = setting(0.5, "minutes between checkpoints", least=0)
    save_steps: int | None = setting(None, "steps between checkpoints", least=1)
    keep_checkpoints: int = setting(2, "number of checkpoints to keep", least=1)
    license: str | None = setting(
        None, "license of the model, for its card, as the Hub names it, such as mit"
    )
    push_to_hub: str | None = setting(None, "push the model to this repository, at the end")
    push_private: bool = setting(False, "create the repository as a private one, if it is new")
    push_often: bool = setting(False, "push each model that is the best so far, in the background")
    report_to: str | None = setting(
        None, "tracker of the metrics", choices=("tensorboard", "trackio", "wandb")
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        for field in dataclasses.fields(self):
            _check_allowed(field, getattr(self, field.name))
        for name in ("push_private", "push_often"):
            if getattr(self, name) and self.push_to_hub is None:
                raise ValueError(f"--{name} requires --push_to_hub USER/NAME")
        if self.push_to_hub is not None:
            check_name(self.push_to_hub, "push_to_hub")
        if self.report_to and importlib.util.find_spec(self.report_to) is None:
            raise ValueError(
                f"--report_to {self.report_to}: pip install 'hf-genkit[{self.report_to}]' first"
            )


def _check_allowed(field: dataclasses.Field[Any], value: Any) -> None:
    allowed = field.metadata.get("allowed")
    for item in value if isinstance(value, list | tuple) else [value]:
        if allowed is not None and item is not None and not allowed.includes(item):
            one_of = "one of " if allowed.choices else ""
            raise ValueError(f"--{field.name} must be {one_of}{allowed}, got {item!r}")


S = TypeVar("S", bound=RunSettings)
Preset = Callable[[S, machine.Kind], dict[str, Any]]  # settings as given, device -> values


def parse(cls: type[S], preset: Preset[S], argv: list[str] | None = None) -> S:
    """Read the command line; with --resume, on top of the settings that the run was started with.

    Args:
        preset: gives the values of settings that are CHOSEN, for the kind of device.
        argv: the arguments of the command line; default: those of sys.argv.

    Raises:
        ValueError: an argument is unknown, a value cannot work here, the launch is not what was
            asked for, there is nothing to resume, or a setting that alters the run differs from the
            run's own and --accept_changes was not given.
    """
    arguments = argparse.Namespace(help=False, **{f.name: UNSET for f in dataclasses.fields(cls)})
    values = vars(_parser(cls, {}).parse_args(argv, arguments))
    help_wanted = values.pop("help")
    given = {name: value for name, value in values.items() if value is not UNSET}
    machine.start(given.get("device"))
    kind = machine.kind(machine.state().device)
    if help_wanted:
        settings = cls(**given)
        filled = dataclasses.asdict(_fill(settings, preset(settings, kind)))
        _parser(cls, {n: v for n, v in filled.items() if n not in given}).print_help()
        raise SystemExit(0)
    settings = _resumed(cls, given) if given.get("resume") else cls(**given)
    launch.check_launch()
    settings = _fill(settings, preset(settings, kind))
    _check_device(settings)
    return settings


def _check_device(settings: RunSettings) -> None:
    """Refuse what this device cannot do, such as the precision of a run that began on another."""
    device, again = machine.state().device, "(and --accept_changes to resume)"
    if settings.mixed_precision == "bf16" and not machine.has_bf16(device):
        raise ValueError(
            f"--mixed_precision bf16: {device} does not have it; give --mixed_precision no {again}"
        )
    if settings.compile and not machine.can_compile(device):
        raise ValueError(
            f"--compile: torch cannot compile for {device} here (a CPU needs a C++ compiler and "
            f"the headers of Python); give --compile no {again}"
        )


class _Parser(HfArgumentParser, Parser):
    """A parser of a dataclass's fields, whose errors are one line."""


def _parser(cls: type[S], chosen: dict[str, Any]) -> argparse.ArgumentParser:
    """Make the parser of a recipe's settings.

    Args:
        chosen: defaults to show in --help instead of the fields' own.
    """
    hints = get_type_hints(cls)
    flags = [
        (
            field.name,
            hints[field.name],
            dataclasses.field(
                default=field.default,
                metadata={
                    "help": _help(field, chosen.get(field.name, field.default)),
                    "metavar": "VALUE",
                },
            ),
        )
        for field in dataclasses.fields(cls)
    ]
    parser = _Parser(
        dataclasses.make_dataclass(cls.__name__, flags),  # type: ignore[arg-type]
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s [--SETTING VALUE ...]",
        description=(sys.modules[cls.__module__].__doc__ or "").partition("\n")[0],
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    return parser


def _help(field: dataclasses.Field[Any], default: Any) -> str:
    """Return a setting's line in --help: what it is, what it takes, its default."""
    if isinstance(default, bool):
        default = "yes" if default else "no"
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    allowed = field.metadata["allowed"]
    takes = f"{allowed}; " if allowed else ""
    text = f"{field.metadata['help']} ({takes}default: {'none' if shown is None else shown})"
    return text.replace("%", "%%")


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
        unchosen = value is None and getattr(cls, name) is CHOSEN
        if not unchosen and not _fits(value, hints[name]):
            raise ValueError(f"{record} is damaged (its {name} is {value!r}); {ELSEWHERE}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a setting's type."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if get_args(hint):  # a union
        return any(_fits(value, each) for each in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _fill(settings: S, values: dict[str, Any]) -> S:
    """Replace each setting that is CHOSEN; the run's length only if none was given."""
    if settings.max_steps or settings.max_minutes:
        values = {n: v for n, v in values.items() if n not in ("max_steps", "max_minutes")}
    missing = {n: v for n, v in values.items() if getattr(settings, n) is None}
    return dataclasses.replace(settings, **missing)
