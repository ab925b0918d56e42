"""The run that every recipe shares: checkpoints, resume, guard, averages, log.

The loop stays in the recipe; here is what every loop needs and nobody wants to read:

    with Run(settings) as run:
        ...                                         # data and model
        model = run.network("model", model, optimizers)
        run.restore()
        for step in run.steps():                    # counts, seeds, saves, stops
            for rows in run.rows():                 # this process's part of the global batch
                run.backward(loss(model, rows))
            run.update()                            # guard, clip, optimizer step, average
            if run.evaluation_due():
                better = run.report("val_loss", {"val_loss": …})

What a step draws depends on nothing but (seed, step, process): the random state of a run is its
step number, so that it is restored by counting, draws inside libraries included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import accelerate
import numpy as np
import psutil
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from genkit import files, machine
from genkit.training import checkpoints, curves, launch
from genkit.training.background_push import Pusher
from genkit.training.folder import RunFolder
from genkit.training.network import Network
from genkit.training.optim import averaging, rate_factor
from genkit.training.progress import Clock, Progress
from genkit.training.settings import RunSettings

MAX_SKIPS = 3  # non-finite steps in a row before rolling back
MAX_ROLLBACKS = 3
DRY_STEPS = 10


class TrainingDivergedError(ValueError):
    """The loss stayed non-finite after skipping, rolling back and lowering the rate."""


class Run:
    """One training run in one folder, the same on a laptop and on many processes.

    Args:
        settings: with every None already filled in.

    Raises:
        ValueError: the batch does not divide among the processes; on entering, the folder cannot
            be used.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.accelerator = accelerate.Accelerator(
            mixed_precision="no",  # `lower` does it, so that judged and saved weights stay float32
            log_with=settings.report_to,
            project_dir=settings.output_dir,
        )
        self.device = self.accelerator.device
        self.processes = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.folder = RunFolder(Path(settings.output_dir))
        self.networks: dict[str, Network] = {}
        self.progress = Progress()
        self.clock = Clock()
        self.compile_seconds = 0.0
        self._facts: dict[str, Any] = {}  # what the run is made of
        self._numbers: dict[str, float] = {}  # of the last step, for the log
        self._finite = True  # every update of the step under way
        self._launcher = launch.launcher()
        self._logged = 0  # the last step in the log
        self._signal = 0
        self._signal_time = 0.0
        self._continued = False  # after it was stopped, since the last update
        self._stopping = False
        self._pusher: Pusher | None = None
        self._saved_at = 0.0
        self._exit = contextlib.ExitStack()
        self._check_batch()

    def _check_batch(self) -> None:
        batch, accumulation = self.settings.batch_size, self.settings.gradient_accumulation
        assert batch is not None, "the preset fills in batch_size"
        parts = self.processes * accumulation
        if batch % parts:
            raise ValueError(
                f"batch_size: {batch} rows do not divide among {self.processes} processes times "
                f"{accumulation} gradient_accumulation; {-(-batch // parts) * parts} would"
            )
        self.batch_size = batch

    def __enter__(self) -> Run:
        machine.use_all_cores()
        disable_progress_bar()  # of transformers' own loading and saving
        if self.device.type == "cpu":  # compiled embeddings add up their gradients in any order
            self._exit.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
            deterministic = torch.utils.deterministic  # a module whose attributes set switches
            filled = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
            self._exit.callback(setattr, deterministic, "fill_uninitialized_memory", filled)
            deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(self.settings.seed)  # new networks are the same on every process
        if not self.settings.dry_run:
            self.on_main_process(lambda: self.folder.claim(self.settings.resume))
            self._exit.callback(self.folder.release)
        self._listen()
        self._exit.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = self._on_thread_error
        self._exit.callback(self._end_training)
        if self.settings.push_to_hub and not self.settings.dry_run:
            self.on_main_process(self._prepare_push)
        return self

    def _on_thread_error(self, told: threading.ExceptHookArgs) -> None:
        """Say in one line that the disk refused what a tracker's own thread writes."""
        if isinstance(told.exc_value, OSError):
            self.log(f"the tracker lost figures: {files.reason(told.exc_value)}")
            return
        threading.__excepthook__(told)

    def _end_training(self) -> None:
        with self._tracking():
            self.accelerator.end_training()

    def _listen(self) -> None:
        """Let signals end the run after a step, and tell when the process was stopped."""
        handlers: dict[int, Any] = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
        if hasattr(signal, "SIGHUP"):  # of a terminal that is closed; not on Windows
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
                handlers[signal.SIGHUP] = self._on_signal
            handlers[signal.SIGCONT] = self._on_continue
        for number, handler in handlers.items():
            self._exit.callback(signal.signal, number, signal.signal(number, handler))

    def _prepare_push(self) -> None:
        settings = self.settings
        assert settings.push_to_hub is not None
        self._pusher = Pusher(
            self.folder.path, settings.push_to_hub, settings.push_private, self.log
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.processes > 1 and (kind is None or kind is SystemExit):
            # torch joins gloo's thread while it holds the lock that the thread needs to let go of
            # its last tensors: let it do that first, or the process may never end
            self.accelerator.wait_for_everyone()
            time.sleep(0.2)
        self._exit.close()
        if self._pusher is not None:  # the other processes need not wait for it
            self._pusher.finish() if kind is None else self._pusher.stop()

    def identify(self, **facts: Any) -> None:
        """Say what the run is made of (data by hash, …); refuse to resume with anything else."""
        if self.settings.dry_run:
            return
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        mine = torch.tensor([int(digest[:6], 16)], dtype=torch.float32, device=self.device)
        if self.sum(mine.clone()).item() != self.processes * mine.item():
            raise ValueError(f"data: the processes do not read the same; here it is {facts}")
        self._facts, settings = facts, asdict(self.settings)
        self.on_main_process(lambda: self.folder.identify(facts, self.settings.accept_changes))
        if self.settings.report_to:
            plain = {name: value for name, value in settings.items() if value is not None}
            with self._tracking():
                self.accelerator.init_trackers("genkit", plain)

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[None]:
        """Name the folder when the disk refuses what a tracker writes."""
        with files.named_write_errors(self.folder.path, "what the tracker keeps in "):
            yield

    def log(self, text: str) -> None:
        """Print a line, once, above the progress bar; a terminal that is gone ends no run."""
        if not self.is_main:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # ---- networks -----------------------------------------------------------------------------

    def network(
        self,
        name: str,
        module: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        averaged: bool = True,
    ) -> torch.nn.Module:
        """Put a network under the run's care and return it as the loss should call it.

        Args:
            averaged: keep an average of its weights, if the settings name a decay.
        """
        module.to(self.device).train()
        decay = self.settings.ema if averaged else None
        average = AveragedModel(module, multi_avg_fn=averaging(decay)) if decay else None
        prepared = self.accelerator.prepare_model(module)
        if isinstance(prepared, torch.nn.parallel.DistributedDataParallel):
            # a network with batch normalisation may be called twice before its gradient is taken
            prepared.forward_sync_buffers = False
            # what it warns of in a matrix of one row is a stride that is never used
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.networks[name] = Network(module, prepared, optimizers, average)
        return prepared

    def weights(self, name: str = "model") -> Any:
        """Return the network as it is judged and saved: the average if there is one."""
        network = self.networks[name]
        return network.average.module if network.average is not None else network.module

    def autocast(self, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return a loss that computes in the run's precision, compiled if the settings say so."""
        half = self.settings.mixed_precision == "bf16"

        def lowered(*arguments: Any) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                return loss(*arguments)

        if not self.settings.compile:
            return lowered
        # diffusers' layers ask for torch's version, whose answer is kept
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache")
        return torch.compile(lowered)

    def warm_up(self, loss: Callable[[np.ndarray], torch.Tensor]) -> None:
        """Compute a loss and its gradient once, so that compilation is over before time counts."""
        start = time.monotonic()
        self._seed(0)
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
        bar = tqdm(
            total=1.0,
            initial=min(self.fraction, 1.0),
            disable=None if self.is_main else True,
            bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}",
        )
        self._saved_at = time.monotonic()
        with bar, self.clock.running():
            while not self._over():
                self.progress.step += 1
                self._seed(self.progress.step)
                self._finite = True
                yield self.progress.step
                losses = [f"{k} {v:.3f}" for k, v in self._numbers.items() if k.endswith("loss")]
                bar.set_postfix_str(", ".join(losses), refresh=False)
                bar.update(max(0.0, min(self.fraction, 1.0) - bar.n))
                with self.clock.paused():
                    self._between_steps()
        if self.settings.dry_run:
            self._estimate()
        else:
            self.save()
        if self._stopping:
            self.log(
                f"stopped after step {self.progress.step}, and saved; go on with "
                f"--output_dir {self.folder.path} --resume"
            )
            raise SystemExit(0)

    def _over(self) -> bool:
        impatient = 0 < self.settings.patience <= self.progress.stale
        dry = self.settings.dry_run and self.progress.step == DRY_STEPS
        return self.fraction >= 1 or self._stopping or impatient or dry

    @property
    def fraction(self) -> float:
        """How much of the run is done, 0 to 1: the schedule and the evaluations follow it."""
        return self.progress.fraction(self.settings.max_steps, self.settings.max_minutes)

    def rows(self, turn: int = 0, turns: int = 1) -> Iterator[np.ndarray]:
        """Yield this process's part of the step's global batch, as positions in the endless order.

        Row r of step s is position (s - 1) * batch_size + r at any number of processes. With
        gradient accumulation there are several parts, and gradients are exchanged at the last.

        Args:
            turn, turns: which batch this is of those that every step takes.
        """
        first = ((self.progress.step - 1) * turns + turn) * self.batch_size
        positions = first + np.array(self.shard(self.batch_size))
        *parts, last = np.split(positions, self.settings.gradient_accumulation)
        for part in parts:
            with contextlib.ExitStack() as stack:
                for network in self.networks.values():
                    stack.enter_context(self.accelerator.no_sync(network.prepared))
                yield part
        yield last

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
            network.losses.clear()
            network.module.zero_grad(set_to_none=True)
            return
        gradients = [p.grad for p in network.module.parameters() if p.grad is not None]
        norms = torch.nn.utils.get_total_norm(gradients)
        if self.settings.clip:
            torch.nn.utils.clip_grads_with_norm_(
                network.module.parameters(), self.settings.clip, norms
            )
        norm = norms.item()
        loss = self._agree(torch.stack(network.losses).mean().item())
        network.losses.clear()
        prefix = "" if name == "model" else f"{name}_"
        self._numbers |= {f"{prefix}loss": loss, f"{prefix}grad_norm": norm}
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._optimize(network)
        network.module.zero_grad(set_to_none=True)
        if not finite:
            self._not_finite(loss, norm)

    def _agree(self, loss: float) -> float:
        """Average the loss over processes; take the time from the main one, a signal from any."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        stop, stopped = float(self._signal != 0 or orphaned), float(self._continued)
        times = [self.clock.seconds, self.clock.usual]
        self._continued = False
        if self.processes > 1:
            times = times if self.is_main else [0.0, 0.0]
            mine = [loss / self.processes, stop, stopped, *times]
            told = torch.tensor(mine, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(told)
            loss, stop, stopped, *times = told.tolist()
        self.progress.seconds = times[1] if stopped else times[0]
        if stopped:
            self.clock.set(self.progress.seconds)
        else:
            self.clock.lap(self.progress.seconds)
        self._stopping = self._stopping or stop > 0
        return loss

    def _optimize(self, network: Network) -> None:
        half_step = 0.5 / self.settings.max_steps if self.settings.max_steps else 0.0
        fraction = self.fraction - half_step  # the middle of the step: neither end has rate 0
        factor = rate_factor(fraction, self.settings.warmup, self.settings.decay)
        factor *= self.progress.rate_scale
        for optimizer in network.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
        if network.average is not None:
            network.average.update_parameters(network.module)
        self._numbers["rate"] = factor

    def _not_finite(self, loss: float, norm: float) -> None:
        progress, self._finite = self.progress, False
        progress.skips += 1
        what = f"step {progress.step}: the loss is {loss} and the gradient norm {norm}"
        self.log(f"{what}; step skipped")
        if progress.skips <= MAX_SKIPS:
            return
        checkpoint = None if self.settings.dry_run else self._look_for_newest()
        if progress.rollbacks == MAX_ROLLBACKS or checkpoint is None:
            raise TrainingDivergedError(
                f"{what}, after {progress.rollbacks} roll-backs that each halved the rate. Lower "
                "learning_rate, raise warmup, or look at the data"
            )
        self._load(checkpoint)
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
            self.log_metrics(**self._numbers)
        minutes = (time.monotonic() - self._saved_at) / 60
        by_steps = settings.save_steps is not None and step % settings.save_steps == 0
        good = self.progress.skips == 0  # a roll-back must reach behind the first bad step
        if good and (by_steps or minutes >= settings.save_minutes):
            self.save()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on a signal that the terminal has already sent: that is not a second one
        if self._signal and time.monotonic() - self._signal_time > 1:
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._signal_time = number, time.monotonic()
            self.log("stopping after this step; once more to stop at once, without saving")

    def _on_continue(self, number: int, frame: FrameType | None) -> None:
        self._continued = True

    def stop(self) -> None:
        """End the run after this step, as a signal does; to be said on every process."""
        self._stopping = True

    def _seed(self, step: int) -> None:
        """Make every global draw of this step a function of (seed, step, process)."""
        process = self.accelerator.process_index
        words = np.random.SeedSequence((self.settings.seed, step, process)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.default_generator.manual_seed(int(words[2]))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(int(words[2]))

    def _estimate(self) -> None:
        """Say what a dry run found out."""
        each = self.progress.seconds / self.progress.step
        settings, cuda = self.settings, self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        eta = each * settings.max_steps if settings.max_steps else math.inf
        eta = min(eta, 60 * settings.max_minutes if settings.max_minutes else math.inf)
        self.log(
            f"memory {peak / 2**30:.2f} GB · {1000 * each:.1f} ms a step · compiled in "
            f"{self.compile_seconds:.0f} s · {eta / each:,.0f} steps in {eta / 60:.1f} minutes"
        )

    # ---- several processes --------------------------------------------------------------------

    def shard(self, count: int) -> range:
        """Return this process's contiguous part of `count` things."""
        index = self.accelerator.process_index
        return range(count * index // self.processes, count * (index + 1) // self.processes)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes."""
        return self.accelerator.reduce(values.to(self.device), reduction="sum")

    def on_main_process(self, work: Callable[[], None]) -> None:
        """Do something on the main process; if it fails there, raise everywhere."""
        problem = ""
        if self.is_main:
            try:
                work()
            except (ValueError, OSError) as error:
                problem = str(error)
        failed = torch.tensor([float(bool(problem))], device=self.device)
        if self.sum(failed).item():
            raise ValueError(problem or "the main process stopped; its message says why")

    def broadcast(self, figures: dict[str, float]) -> dict[str, float]:
        """Return on every process what the main one has found."""
        if self.processes == 1:
            return figures
        words = json.dumps(figures).encode() if self.is_main else b""
        length = torch.tensor([len(words)], device=self.device)
        torch.distributed.broadcast(length, src=0)
        written = torch.frombuffer(bytearray(words.ljust(int(length))), dtype=torch.uint8)
        told = written.to(self.device)
        torch.distributed.broadcast(told, src=0)
        return json.loads(told.cpu().numpy().tobytes())

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
        curve: Callable[[list[dict[str, Any]], Path], None] = curves.loss_curve,
    ) -> bool:
        """Log an evaluation and redraw its picture; return whether `values[metric]` is the best.

        Args:
            curve: draws the log into loss.png.
        """
        progress, value, sign = self.progress, values[metric], 1 if lower_is_better else -1
        progress.evaluations = self._evaluations_by_now()
        better = progress.best is None or sign * value < sign * progress.best
        better = better and math.isfinite(value)
        if better:
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
        else:
            progress.stale += 1
        self.log_metrics(**self._numbers, **values)
        told = "  ".join(f"{name} {number:.4f}" for name, number in values.items())
        mark = "  best" if better else ""
        self.log(f"step {progress.step:6,}  {progress.seconds:5.0f} s  {told}{mark}")
        if self.is_main:
            curve(self.folder.log(), self.folder.path / "loss.png")
        return better

    def log_metrics(self, **values: float) -> None:
        """Append a line to metrics.jsonl and tell the tracker."""
        line = {"step": self.progress.step, "seconds": round(self.progress.seconds, 3), **values}
        self._logged = self.progress.step
        if self.is_main:
            self.folder.append(line)
        if self.settings.report_to:
            with self._tracking():
                self.accelerator.log(values, step=self.progress.step)

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
            state |= {name: network.state() for name, network in self.networks.items()}
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
        checkpoint = self._agree_on(*self.folder.start) if self.settings.resume else None
        if checkpoint is not None:
            self._load(checkpoint)
            self._record()
            self.log(f"resumed after step {self.progress.step}")
            return
        self._record()
        if self.settings.resume:
            self.log("the run had not made a step: it starts with the first")
        if self.is_main:
            self.folder.forget_after(-1)
        if before:
            before()
        self.save()

    def _record(self) -> None:
        """Write down what the run is made of, now that it goes on."""
        settings, facts = asdict(self.settings), self._facts
        self.on_main_process(lambda: self.folder.record(settings, facts))

    def _look_for_newest(self) -> Path | None:
        found: list[tuple[Path | None, list[str]]] = []
        self.on_main_process(lambda: found.append(self.folder.newest()))
        return self._agree_on(*(found[0] if found else (None, [])))

    def _agree_on(self, found: Path | None, problems: list[str]) -> Path | None:
        """Return the checkpoint that the main process has found, on every process."""
        for problem in problems:
            self.log(problem)
        step = checkpoints.step_of(found) if found else -1
        if self.processes > 1:
            told = torch.tensor([step], device=self.device)
            torch.distributed.broadcast(told, src=0)
            step = int(told.item())
        return self.folder.checkpoints / f"step-{step:08d}" if step >= 0 else None

    def _load(self, checkpoint: Path) -> None:
        state = checkpoints.load_checkpoint(checkpoint)
        try:
            for name, network in self.networks.items():
                network.load(state[name])
            self.progress = Progress(**state["progress"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"resume: {checkpoint} does not fit this run: {told}") from error
        self.clock.set(self.progress.seconds)
        self._logged = self.progress.step
        self._saved_at = time.monotonic()
        if self.is_main:
            self.folder.forget_after(self.progress.step)
