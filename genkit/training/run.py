"""The run that every recipe shares: checkpoints, resume, guard, averages, log.

The loop stays in the recipe; here is what every loop needs and no reader of a recipe wants to see:

    with Run(settings) as run:
        ...                                         # data and model
        model = run.network("model", model, optimizers)
        run.identify(...)                           # what the run is made of
        run.warm_up(lambda rows: loss(model, rows)) # compiles, ahead of the clock
        run.restore()                               # undoes what warming up did to statistics
        for step in run.steps():                    # counts, seeds, saves, stops
            for rows in run.rows():                 # this process's part of the global batch
                run.backward(loss(model, rows))
            run.update()                            # guard, clip, optimizer step, average
            if run.evaluation_due():
                better = run.report("val_loss", {"val_loss": …})

Random numbers of a step depend on nothing but (seed, step, process): the random state of a run is
its step number, so that it is restored by counting, draws inside libraries included.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import numpy as np
import torch

from genkit import console, machine
from genkit.training import checkpoints
from genkit.training.background_push import Pusher
from genkit.training.folder import RunFolder
from genkit.training.network import Network, Stateful, prepare_loss, prepare_network
from genkit.training.optim import rate_factor
from genkit.training.processes import Processes
from genkit.training.progress import Clock, Progress, estimate_run, read_progress
from genkit.training.settings import RunSettings
from genkit.training.signals import Signals
from genkit.training.tracker import Tracker

T = TypeVar("T")
MAX_SKIPS = 3  # non-finite steps in a row before rolling back
MAX_ROLLBACKS = 3
DRY_STEPS = 10


class TrainingDivergedError(ValueError):
    """The loss stayed non-finite after skipping, rolling back and lowering the rate."""


class Run(Processes):
    """One training run in one folder, the same on a laptop and on many processes.

    Args:
        settings: as `parse` returns them, with the values that the preset chooses.

    Raises:
        ValueError: the batch does not divide among the processes; on entering, the folder cannot
            be used.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        super().__init__(
            accelerate.Accelerator(
                mixed_precision="no",  # `autocast` does it: evaluated, saved weights stay float32
                log_with=settings.report_to,
                project_dir=settings.output_dir,
            )
        )
        self.folder = RunFolder(Path(settings.output_dir))
        self.networks: dict[str, Network] = {}
        self.kept: dict[str, Stateful] = {}  # what else checkpoints hold
        self.progress = Progress()
        self.clock = Clock()
        self.compile_seconds = 0.0
        assert settings.batch_size is not None, "the preset chooses batch_size"
        self.check_divides(settings.batch_size, settings.gradient_accumulation)
        self.batch_size = settings.batch_size
        self.turn = self.first_row = 0  # of the global batch under way: its number, its start
        self._facts: dict[str, Any] = {}  # what the run is made of
        self._metrics: dict[str, float] = {}  # of the last step, for the log
        self._finite = True  # every update of the step under way
        self._logged = 0  # the last step in the log
        self._signals = Signals(self.log)
        self._tracker = Tracker(self.accelerator, self.folder.path, self.log)
        self._stopping = False
        self._pusher: Pusher | None = None
        self._saved_at = 0.0
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Run:
        machine.use_all_cores()
        with contextlib.ExitStack() as stack:
            stack.enter_context(console.quiet(self.settings.quiet or not self.is_main))
            console.silence_libraries()
            if self.device.type == "cpu":  # compiled embeddings add up their gradients in any order
                stack.enter_context(machine.deterministic_algorithms())
            torch.manual_seed(self.settings.seed)  # new networks are the same on every process
            if not self.settings.dry_run:
                self.on_main_process(lambda: self.folder.claim(self.settings.resume))
                stack.callback(self.folder.release)
            stack.enter_context(self._signals.listening())
            stack.enter_context(self._tracker.open())
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.processes > 1 and (kind is None or kind is SystemExit):
            # torch joins gloo's thread while it holds the lock that the thread needs to let go of
            # its last tensors: let it do that first, or the process may never end
            self.accelerator.wait_for_everyone()
            time.sleep(0.2)
        self._exit.close()
        if self._pusher is not None:  # the other processes need not wait for it
            with console.quiet(self.settings.quiet):
                self.result(str(self._pusher.finish())) if kind is None else self._pusher.stop()

    def identify(self, **facts: Any) -> None:
        """Set what the run is made of (data by hash, …), and refuse to resume with anything else.

        Raises:
            ValueError: the run in the folder, or another process, has other facts.
        """
        if self.settings.dry_run:
            return
        if not self.have_equal(json.dumps(facts, sort_keys=True)):
            raise ValueError(f"data: the processes do not read the same; here it is {facts}")
        self._facts = facts
        self.on_main_process(lambda: self.folder.identify(facts, self.settings.accept_changes))
        if repository := self.settings.push_to_hub:
            options = self.folder.path, repository, self.settings.push_private, self.log
            self._pusher = self.on_main_process(lambda: Pusher(*options))
        if self.settings.report_to:
            self._tracker.start(asdict(self.settings))

    def log(self, text: str) -> None:
        """Print how the run goes, once; what a dry run says is its result."""
        if self.settings.dry_run:
            self.result(text)
        else:
            console.say(text)

    def result(self, text: str) -> None:
        """Print a line on standard output, once."""
        if self.is_main:
            console.write(text, sys.stdout)

    # ---- networks -----------------------------------------------------------------------------

    def network(
        self,
        name: str,
        module: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        averaged: bool = True,
    ) -> torch.nn.Module:
        """Add a network to the run and return it as the loss should call it.

        Args:
            averaged: keep an average of its weights, if the settings name a decay.
        """
        ema = self.settings.ema if averaged else None
        self.networks[name] = prepare_network(module, optimizers, ema, self.accelerator)
        return self.networks[name].prepared

    def weights(self, name: str = "model") -> Any:
        """Return the network as it is evaluated and saved: the average if there is one."""
        return self.networks[name].evaluated

    def autocast(self, loss: Callable[..., T]) -> Callable[..., T]:
        """Return a loss that computes in the run's precision, compiled if the settings say so."""
        settings = self.settings
        return prepare_loss(loss, self.device, settings.mixed_precision, settings.compile)

    def warm_up(self, loss: Callable[[np.ndarray], torch.Tensor]) -> None:
        """Compute a loss and its gradient once, so that compilation is over before time counts.

        The batch enters the running statistics of batch normalisation: `restore` comes after.
        """
        start = time.monotonic()
        self._seed_step(0)
        rows = self.batch_size // self.processes // self.settings.gradient_accumulation
        loss(np.arange(rows)).backward()
        for network in self.networks.values():
            network.module.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        self.compile_seconds += seconds
        if self.settings.compile:
            self.log(f"compiled in {seconds:.0f} s")

    # ---- the loop -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the number of each step to do, until the run's length, a signal or no progress.

        Checkpoints are written between steps: every `save_minutes` or `save_steps`, on a signal
        and at the end.
        """
        bar = console.bar(
            doing="training",
            total=1.0,
            initial=min(self.fraction, 1.0),
            delay=0,
            bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}",
        )
        self._saved_at = time.monotonic()
        with bar, self.clock.running():
            while not self._is_over():
                self.progress.step += 1
                self.progress.rows += self.batch_size
                self._seed_step(self.progress.step)
                self._finite = True
                yield self.progress.step
                losses = [f"{k} {v:.3f}" for k, v in self._metrics.items() if k.endswith("loss")]
                bar.set_postfix_str(", ".join(losses), refresh=False)
                bar.update(max(0.0, min(self.fraction, 1.0) - bar.n))
                with self.clock.paused():
                    self._between_steps()
        if self.settings.dry_run:
            self.log(estimate_run(self.progress, self.settings, self.compile_seconds))
        else:
            self.save()
        if self._stopping:
            self.log(
                f"stopped after step {self.progress.step}, and saved; go on with "
                f"--output_dir {self.folder.path} --resume"
            )
            raise SystemExit(0)
        if not self.settings.dry_run:
            self.result(self.progress.describe_best(self.folder.path))

    def _is_over(self) -> bool:
        impatient = 0 < self.settings.patience <= self.progress.stale
        dry = self.settings.dry_run and self.progress.step == DRY_STEPS
        return self.fraction >= 1 or self._stopping or impatient or dry

    @property
    def fraction(self) -> float:
        """How much of the run is done, 0 to 1: the schedule and the evaluations follow it."""
        return self.progress.fraction(self.settings.max_steps, self.settings.max_minutes)

    def rows(self, turn: int = 0, turns: int = 1) -> Iterator[np.ndarray]:
        """Yield this process's part of the step's global batch, as positions in the endless order.

        They go on after those of the step before, at any number of processes, and if a resumed run
        has another batch size. With gradient accumulation there are several parts, and gradients
        are exchanged at the last.

        Args:
            turn, turns: which batch this is of those that every step takes.
        """
        self.turn = (self.progress.step - 1) * turns + turn
        self.first_row = (self.progress.rows - self.batch_size) * turns + turn * self.batch_size
        positions = self.first_row + np.array(self.shard(self.batch_size))
        yield from self.parts(positions)

    def parts(self, mine: np.ndarray) -> Iterator[np.ndarray]:
        """Yield this process's rows of a batch, (n,), in the parts of gradient accumulation.

        Gradients are exchanged at the last.
        """
        *parts, last = np.array_split(mine, self.settings.gradient_accumulation)
        for part in parts:
            with contextlib.ExitStack() as stack:
                for network in self.networks.values():
                    stack.enter_context(self.accelerator.no_sync(network.prepared))
                yield part
        yield last

    @property
    def shares(self) -> int:
        """Into how many parts a batch is divided, of whose losses the mean is taken."""
        return self.processes * self.settings.gradient_accumulation

    def backward(self, loss: torch.Tensor, name: str = "model") -> None:
        """Add a loss's gradient to those of the step."""
        self.networks[name].losses.append(loss.detach())
        (loss / self.settings.gradient_accumulation).backward()

    def update(self, name: str = "model") -> None:
        """Step a network's optimizers, unless its loss or its gradient is not finite.

        Raises:
            TrainingDivergedError: skipping and rolling back did not help.
        """
        network = self.networks[name]
        if not self._finite:  # nothing more of a bad step, nor after a roll-back
            network.clear()
            return
        norm = network.clip_gradients(self.settings.clip)
        loss = self._synchronize(network.mean_loss())
        prefix = "" if name == "model" else f"{name}_"
        self._metrics |= {f"{prefix}loss": loss, f"{prefix}grad_norm": norm}
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._metrics["rate"] = self._rate_factor()
            network.optimize(self._metrics["rate"])
        network.clear()
        if not finite:
            self._skip_step(loss, norm)

    def add_metrics(self, **metrics: float) -> None:
        """Add figures of the step under way to its line in the log."""
        self._metrics |= metrics

    def _synchronize(self, loss: float) -> float:
        """Average the loss over processes; take the time from the main one, a signal from any."""
        stop = float(self._signals.stop_requested)
        continued = float(self._signals.take_continued())
        times = [self.clock.seconds, self.clock.usual]
        if self.processes > 1:
            times = times if self.is_main else [0.0, 0.0]
            mine = [loss / self.processes, stop, continued, *times]
            sums = self.sum(torch.tensor(mine, dtype=torch.float64))
            loss, stop, continued, *times = sums.tolist()
        self.progress.seconds = times[1] if continued else times[0]
        if continued:
            self.clock.set(self.progress.seconds)
        else:
            self.clock.lap(self.progress.seconds)
        self._stopping = self._stopping or stop > 0
        return loss

    def _rate_factor(self) -> float:
        half_step = 0.5 / self.settings.max_steps if self.settings.max_steps else 0.0
        fraction = self.fraction - half_step  # the middle of the step: neither end has rate 0
        factor = rate_factor(fraction, self.settings.warmup, self.settings.decay)
        return factor * self.progress.rate_scale

    def _skip_step(self, loss: float, norm: float) -> None:
        progress, self._finite = self.progress, False
        progress.skips += 1
        event = f"step {progress.step}: the loss is {loss} and the gradient norm {norm}"
        self.log(f"{event}; step skipped")
        if progress.skips <= MAX_SKIPS:
            return
        checkpoint = None if self.settings.dry_run else self._find_newest()
        if progress.rollbacks == MAX_ROLLBACKS or checkpoint is None:
            raise TrainingDivergedError(
                f"{event}, after {progress.rollbacks} roll-backs that each halved the rate. Lower "
                "learning_rate, raise warmup, or check the data"
            )
        self._load_checkpoint(checkpoint)
        self.progress.rollbacks = progress.rollbacks + 1
        self.progress.rate_scale = progress.rate_scale / 2
        self.log(f"rolled back to step {self.progress.step}, and halved the rate")

    def _between_steps(self) -> None:
        settings, step = self.settings, self.progress.step
        if settings.dry_run:
            return
        if self._finite:
            self.progress.skips = 0
        if step != self._logged:
            self.log_metrics(**self._metrics)
        minutes = (time.monotonic() - self._saved_at) / 60
        by_steps = settings.save_steps is not None and step % settings.save_steps == 0
        good = self.progress.skips == 0  # a roll-back must reach behind the first bad step
        if good and (by_steps or minutes >= settings.save_minutes):
            self.save()

    def stop(self) -> None:
        """End the run after this step, as a signal does; to be called on every process."""
        self._stopping = True

    def _seed_step(self, step: int) -> None:
        """Make every global draw of this step a function of (seed, step, process)."""
        machine.seed_all(self.settings.seed, step, self.accelerator.process_index)

    # ---- evaluation and log -------------------------------------------------------------------

    def _evaluations_by_now(self) -> int:
        return int(min(self.fraction, 1.0) * self.settings.evaluations + 1e-9)

    def evaluation_due(self) -> bool:
        """Whether the step just done completes one of the run's `evaluations` equal parts."""
        return not self.settings.dry_run and self._evaluations_by_now() > self.progress.evaluations

    def report(
        self,
        metric: str,
        values: dict[str, float],
        lower_is_better: bool = True,
        curve: Callable[[list[dict[str, Any]], Path], None] | None = None,
    ) -> bool:
        """Log an evaluation and redraw its picture; return whether `values[metric]` is the best.

        Args:
            curve: draws the log into loss.png; default: `loss_curve`.
        """
        progress = self.progress
        progress.evaluations = self._evaluations_by_now()
        better = progress.record_value(values[metric], lower_is_better)
        self.log_metrics(**self._metrics, **values)
        shown = "  ".join(f"{name} {number:.4f}" for name, number in values.items())
        mark = "  best" if better else ""
        self.log(f"step {progress.step:6,}  {progress.seconds:5.0f} s  {shown}{mark}")
        if self.is_main:
            from genkit.training.curves import loss_curve  # matplotlib: --help does not wait for it

            (curve or loss_curve)(self.folder.log(), self.folder.path / "loss.png")
        return better

    def log_metrics(self, **values: float) -> None:
        """Append a line to metrics.jsonl and send it to the tracker."""
        line = {"step": self.progress.step, "seconds": round(self.progress.seconds, 3), **values}
        self._logged = self.progress.step
        if self.is_main:
            self.folder.append(line)
        if self.settings.report_to:
            self._tracker.send(values, self.progress.step)

    # ---- saving and restoring -----------------------------------------------------------------

    def publish(self, write: Callable[[Path], None]) -> None:
        """Put the model into the run's folder; see RunFolder.publish."""
        if self.is_main and not self.settings.dry_run:
            self.folder.sync_log()
            self.folder.publish(write)
            if self._pusher is not None and self.settings.push_often:
                self._pusher.start()

    def save(self) -> None:
        """Write a checkpoint of the step just done."""
        if self.is_main:
            state = {"progress": asdict(self.progress)}
            state |= {name: part.state() for name, part in (self.networks | self.kept).items()}
            keep = self.settings.keep_checkpoints
            self.folder.sync_log()
            checkpoints.save_checkpoint(self.folder.checkpoints, self.progress.step, state, keep)
        self._saved_at = time.monotonic()

    def restore(self, before: Callable[[], None] | None = None) -> None:
        """Go to the newest complete checkpoint when resuming; write the first one otherwise.

        Args:
            before: what to do ahead of the first checkpoint, such as an evaluation.

        Raises:
            ValueError: the checkpoint does not fit this run.
        """
        if self.settings.dry_run:
            return
        checkpoint = self._agree_on_checkpoint(*self.folder.start) if self.settings.resume else None
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
            self._record_settings()
            self.log(f"resumed after step {self.progress.step}")
            return
        self._record_settings()
        if self.settings.resume:
            self.log("the run had not made a step: it starts with the first")
        if self.is_main:
            self.folder.forget_after(-1)
        if before:
            before()
        self.save()

    def _record_settings(self) -> None:
        """Write what the run is made of, now that it goes on."""
        self.on_main_process(lambda: self.folder.record(asdict(self.settings), self._facts))

    def _find_newest(self) -> Path | None:
        """Return the newest complete checkpoint, the same on every process."""
        found = self.on_main_process(self.folder.newest)
        return self._agree_on_checkpoint(*(found or (None, [])))

    def _agree_on_checkpoint(self, found: Path | None, problems: list[str]) -> Path | None:
        """Return the checkpoint that the main process has found, on every process."""
        for problem in problems:
            self.log(problem)
        step = self.broadcast(checkpoints.step_of(found) if found else -1)
        return self.folder.checkpoints / f"step-{step:08d}" if step >= 0 else None

    def _load_checkpoint(self, checkpoint: Path) -> None:
        state = checkpoints.load_checkpoint(checkpoint)
        try:
            for name, part in (self.networks | self.kept).items():
                part.load_state(state[name])
            self.progress = read_progress(state["progress"], self.folder.path)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"resume: {checkpoint} does not fit this run: {reason}") from error
        # a run that has become longer evaluates in what it has before it, too
        self.progress.evaluations = min(self.progress.evaluations, self._evaluations_by_now())
        self.clock.set(self.progress.seconds)
        self._logged = self.progress.step
        self._saved_at = time.monotonic()
        if self.is_main:
            self.folder.forget_after(self.progress.step)
