import contextlib
import dataclasses
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT, STEPPING, full_disk, listing, wait_for_steps
from torch.optim.swa_utils import AveragedModel

from genkit.training import checkpoints, curves, optim
from genkit.training.folder import RunFolder
from genkit.training.network import update_average
from genkit.training.progress import Clock
from genkit.training.run import Run, TrainingDivergedError
from genkit.training.settings import RunSettings, parse
from genkit.vision import image_grid

FILLED = {
    "batch_size": 4,
    "max_steps": 20,
    "learning_rate": 0.1,
    "muon_learning_rate": 0.1,
    "weight_decay": 0.0,
    "optimizer": "adamw",
    "ema": 0.0,
    "mixed_precision": "no",
    "compile": False,
}


def no_preset(settings, device):
    return {}


def settings(folder, **changes) -> RunSettings:
    return RunSettings(output_dir=str(folder), **(FILLED | changes))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def linear_run(run: Run, poison=frozenset()) -> list[int]:
    """Fit y = 2x with one weight; in poisoned steps the loss is not finite."""
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1, bias=False)
    model = run.network("model", network, optim.optimizers(network, run.settings))
    run.restore()
    done = []
    for call, _ in enumerate(run.steps(), start=1):
        for rows in run.rows():
            x = torch.from_numpy(rows % 7).float()[:, None]
            loss = (model(x) - 2 * x).square().mean()
            run.backward(loss * (math.nan if call in poison else 1.0))
        run.update()
        done.append(run.progress.step)
    return done


# ---- the schedule and the averages


def test_the_rate_rises_holds_and_falls():
    factor = [optim.rate_factor(f, warmup=0.1, decay=0.5) for f in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
    assert factor == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0])
    assert optim.rate_factor(0.3, 0.0, 0.0) == 1.0


def test_the_average_is_the_closed_form(tmp_path):
    with Run(settings(tmp_path, ema=0.7, max_steps=12)) as run:
        network = torch.nn.Linear(1, 1, bias=False)
        run.network("model", network, optim.optimizers(network, run.settings))
        average = 0.0
        run.restore()
        for updates, _ in enumerate(run.steps()):
            for rows in run.rows():
                run.backward(network(torch.ones(len(rows), 1)).square().mean())
            run.update()
            decay = min(0.7, (1 + updates) / (10 + updates)) if updates else 0.0
            average = decay * average + (1 - decay) * network.weight.item()
            assert run.weights().weight.item() == pytest.approx(average, rel=1e-5)


def test_update_average_averages_running_statistics_as_weights():
    torch.manual_seed(0)
    spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 3))
    module = torch.nn.Sequential(spectral, torch.nn.BatchNorm1d(3))
    average = AveragedModel(module, multi_avg_fn=optim.averaging(0.7))
    expected = None
    for updates in range(9):
        module(torch.randn(8, 2) + updates)
        with torch.no_grad():
            module[1].weight.add_(1)
        update_average(average, module)
        now = [module[1].weight, module[1].running_mean, module[1].running_var]
        now = [each.detach().clone() for each in now]
        decay = min(0.7, (1 + updates) / (10 + updates))
        pairs = zip(expected or now, now, strict=True)
        expected = [decay * old + (1 - decay) * new for old, new in pairs]
        norm = average.module[1]
        found = [norm.weight, norm.running_mean, norm.running_var]
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True))
    assert norm.num_batches_tracked == 9
    vectors = [each[0].parametrizations.weight[0]._u for each in (module, average.module)]
    assert torch.equal(*vectors)  # an average of unit vectors would be shorter


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_weight_has_one_optimizer(architecture):
    from genkit.models import lm

    model = lm.make_model(architecture, 300, 16, 2, 32, 2, 0.0)
    for name in ("adamw", "muon"):
        rules = optim.optimizers(model, settings("x", optimizer=name))
        owned = [p for rule in rules for group in rule.param_groups for p in group["params"]]
        assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    muon, _ = rules
    assert isinstance(muon, optim.BatchedMuon)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert not tables & {id(p) for group in muon.param_groups for p in group["params"]}
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])


def test_muon_by_batches_is_torchs_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16)]
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    rate = {"lr": 0.02, "weight_decay": 0.1}
    rules = optim.BatchedMuon(ours, **rate), torch.optim.Muon(theirs, **rate)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for rule in rules:
            rule.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-3)  # a step's bfloat16 rounding of 0.02
        assert not torch.equal(a, torch.zeros_like(a))
    assert rules[0].state_dict()["state"].keys() == rules[1].state_dict()["state"].keys()


def test_muon_takes_a_kernel_as_a_matrix():
    kernel = torch.randn(4, 3, 2, 2).requires_grad_()
    matrix = kernel.detach().flatten(1).requires_grad_()
    rate = {"lr": 0.02, "weight_decay": 0.1}
    rules = optim.BatchedMuon([kernel], **rate), optim.BatchedMuon([matrix], **rate)
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1)
        for rule in rules:
            rule.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_a_feed_forward_as_wide_as_the_vocabulary_is_no_embedding():
    from genkit.models import lm

    model = lm.make_model("llama", 96, 16, 1, 32, 2, 0.0)
    assert model.config.intermediate_size == 96
    muon, _ = optim.optimizers(model, settings("x", optimizer="muon"))
    assert len(muon.param_groups[0]["params"]) == 7


def test_accumulation_changes_nothing_but_memory(tmp_path):
    weights = []
    for parts in (1, 2, 4):
        with Run(settings(tmp_path / str(parts), gradient_accumulation=parts)) as run:
            linear_run(run)
            weights.append(run.weights().weight.item())
    assert weights == pytest.approx([weights[0]] * 3, rel=1e-5)
    assert weights[0] != pytest.approx(0.0, abs=0.1)


# ---- stopping and going on


def test_a_clock_stands_still_when_paused():
    clock = Clock()
    with clock.running():
        clock.set(5.0)
        with clock.paused():
            before = clock.seconds
            assert clock.seconds == before >= 5.0
        assert clock.seconds >= before
    assert clock.seconds == clock.seconds


def test_minutes_end_a_run_and_drive_the_schedule(tmp_path):
    with Run(settings(tmp_path, max_steps=None, max_minutes=0.01)) as run:
        steps = linear_run(run)
        assert len(steps) > 10
        assert 0.6 <= run.progress.seconds < 1.2
    rates = [line["rate"] for line in log_of(tmp_path)]
    assert max(rates) > 0.9 and rates[-1] < 0.1


def test_a_step_draws_the_same_whenever_it_is_done(tmp_path):
    def draws(folder, stop_at, resume=False):
        given = settings(folder, max_steps=6, resume=resume)
        seen = {}
        with Run(given) as run:
            network = torch.nn.Linear(1, 1)
            run.network("model", network, optim.optimizers(network, given))
            run.restore()
            for step in run.steps():
                seen[step] = (torch.rand(1).item(), np.random.rand(), next(run.rows()).tolist())
                run.backward(network(torch.ones(1, 1)).sum())
                run.update()
                if step == stop_at:
                    break
            run.save()
        return seen

    whole = draws(tmp_path / "a", None)
    first = draws(tmp_path / "b", 3)
    assert list(first) == [1, 2, 3]
    rest = draws(tmp_path / "b", None, resume=True)
    assert first | rest == whole
    assert len({value[0] for value in whole.values()}) == 6


def test_two_networks_share_a_run(tmp_path):
    """A step whose first update is finite and whose second is not is a bad step."""
    with Run(settings(tmp_path, save_steps=2)) as run:
        for name in ("generator", "discriminator"):
            network = torch.nn.Linear(1, 1)
            run.network(name, network, optim.optimizers(network, run.settings))
        run.restore()
        for call, _ in enumerate(run.steps(), start=1):
            for name in ("discriminator", "generator"):
                loss = run.networks[name].prepared(torch.ones(2, 1)).square().mean()
                poisoned = name == "generator" and call in (10, 11, 12, 13)
                run.backward(loss * (math.nan if poisoned else 1.0), name)
                run.update(name)
        assert run.progress.rollbacks == 1 and run.progress.step == 20
    last = log_of(tmp_path)[-1]
    assert {"generator_loss", "discriminator_loss"} <= last.keys()


def test_nothing_of_a_bad_step_follows_its_bad_update(tmp_path):
    """Five updates a step; a bad one is one bad step, and what follows a roll-back waits."""
    with Run(settings(tmp_path, save_steps=2, max_steps=12)) as run:
        network = torch.nn.Linear(1, 1)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
        skips = []
        for call, _ in enumerate(run.steps(), start=1):
            for turn in range(5):
                bad = call in (5, 6, 7, 8)
                poison = math.nan if bad and turn == 1 else 1.0
                run.backward(network(torch.ones(2, 1)).square().mean() * poison)
                before = network.weight.detach().clone()
                run.update()
                if bad and turn > 1:
                    assert torch.equal(network.weight, before)
            skips.append(run.progress.skips)
            assert run.progress.step == (call if call < 8 else call - 4)
        assert skips == [0, 0, 0, 0, 1, 2, 3, *[0] * 9] and run.progress.rollbacks == 1


def test_several_batches_a_step_go_through_the_order_once(tmp_path):
    with Run(settings(tmp_path, max_steps=5, gradient_accumulation=2)) as run:
        network = torch.nn.Linear(1, 1)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
        taken = []
        for _ in run.steps():
            for turn in range(3):
                for rows in run.rows(turn, 3):
                    run.backward(network(torch.ones(len(rows), 1)).square().mean())
                    taken += rows.tolist()
                run.update()
        assert taken == list(range(5 * 3 * 4))


def test_another_batch_size_goes_on_with_the_next_row(tmp_path):
    taken, turns = [], []
    for size, steps, resume in ((4, 3, False), (6, 5, True), (2, 6, True)):
        changed = settings(tmp_path, max_steps=steps, batch_size=size, resume=resume)
        with Run(changed) as run:
            network = torch.nn.Linear(1, 1)
            run.network("model", network, optim.optimizers(network, run.settings))
            run.restore()
            for _ in run.steps():
                for turn in range(2):
                    for rows in run.rows(turn, 2):
                        run.backward(network(torch.ones(len(rows), 1)).square().mean())
                        assert (rows - run.first_row).tolist() == list(range(size))
                        taken += rows.tolist()
                    turns.append(run.turn)
                    run.update()
    assert turns == list(range(2 * 6))
    assert taken == list(range(2 * (3 * 4 + 2 * 6 + 1 * 2)))


def test_a_run_that_becomes_longer_evaluates_to_its_end(tmp_path):
    evaluated = []
    for steps, resume in ((4, False), (8, True)):
        changed = settings(tmp_path, max_steps=steps, evaluations=4, resume=resume)
        with Run(changed) as run:
            network = torch.nn.Linear(1, 1)
            run.network("model", network, optim.optimizers(network, run.settings))
            run.restore()
            for step in run.steps():
                run.backward(network(torch.ones(1, 1)).sum())
                run.update()
                if run.evaluation_due():
                    run.report("val_loss", {"val_loss": 1.0})
                    evaluated.append(step)
    assert evaluated == [1, 2, 3, 4, 6, 8]


def test_only_what_is_averaged_has_an_average(tmp_path):
    with Run(settings(tmp_path, ema=0.9)) as run:
        one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        run.network("one", one, optim.optimizers(one, run.settings))
        run.network("other", other, optim.optimizers(other, run.settings), averaged=False)
        assert run.weights("one") is not one and run.weights("other") is other


def test_a_run_that_is_stopped_has_saved(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, Run(settings(tmp_path)) as run:
        network = torch.nn.Linear(1, 1)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
        for step in run.steps():
            for rows in run.rows():
                run.backward(network(torch.ones(len(rows), 1)).square().mean())
            run.update()
            if step == 3:
                run.stop()
    assert stop.value.code == 0 and "stopped after step 3" in capsys.readouterr().err
    assert checkpoints.find_newest(tmp_path / "checkpoints")[0].name == "step-00000003"


def test_patience_ends_a_run(tmp_path):
    with Run(settings(tmp_path, max_steps=100, evaluations=50, patience=3)) as run:
        network = torch.nn.Linear(1, 1)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
        for step in run.steps():
            run.backward(network(torch.ones(1, 1)).sum())
            run.update()
            if run.evaluation_due():
                run.report("val_loss", {"val_loss": 1.0 if step < 10 else 2.0})
        assert run.progress.best == 1.0 and run.progress.best_step == 2
        assert run.progress.step == 8


# ---- losses that are not finite


def test_a_few_bad_steps_are_skipped(tmp_path, capsys):
    with Run(settings(tmp_path)) as run:
        linear_run(run, poison={5, 6, 7})
        assert math.isfinite(run.weights().weight.item())
        assert run.progress.rollbacks == 0 and run.progress.step == 20
    assert capsys.readouterr().err.count("step skipped") == 3
    assert [line["step"] for line in log_of(tmp_path) if line["loss"] is None] == [5, 6, 7]


def test_more_roll_back_with_half_the_rate(tmp_path, capsys):
    with Run(settings(tmp_path, save_steps=4, warmup=0.0, decay=0.0)) as run:
        linear_run(run, poison={10, 11, 12, 13})
        assert run.progress.rollbacks == 1 and run.progress.rate_scale == 0.5
        assert run.progress.step == 20
        assert run.weights().weight.item() > 1.0  # on its way from 0 to 2
    assert "rolled back to step 8" in capsys.readouterr().err
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 21))


def test_a_hopeless_run_stops_with_a_reason(tmp_path):
    with (
        Run(settings(tmp_path)) as run,
        pytest.raises(TrainingDivergedError, match="learning_rate"),
    ):
        linear_run(run, poison=set(range(1, 1000)))
    found, problems = checkpoints.find_newest(tmp_path / "checkpoints")
    assert problems == []
    assert torch.isfinite(checkpoints.load_checkpoint(found)["model"]["module"]["weight"]).all()


# ---- settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_steps 0", "max_steps.* 0$"),
        ("--max_minutes -1", "max_minutes.* -1"),
        ("--learning_rate nan", "learning_rate.* nan"),
        ("--max_minutes inf", "max_minutes.* inf"),
        ("--optimizer sgd", "optimizer.*adamw or muon.*'sgd'"),
        ("--mixed_precision fp8", "mixed_precision.*no or bf16.*'fp8'"),
        ("--warmup 2", "warmup.* 2"),
        ("--ema 1", "ema.* 1"),
        ("--clip -1", "clip.* -1"),
        ("--seed -1", "seed.* -1"),
        ("--seed a", "seed.* 'a'"),
        ("--sed 1", "--sed"),
        ("--report_to trackio", r"report_to.*pip install 'hf-genkit\[trackio\]'"),
        ("--resume", "there is no run to resume"),
    ],
)
def test_bad_settings_are_named(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        parse(RunSettings, no_preset, [*words.split(), "--output_dir", str(tmp_path)])


def test_the_preset_fills_what_was_left_open():
    def preset(given, device):
        assert device == "cpu"
        return {"batch_size": 7, "max_minutes": 3.0, "ema": 0.5}

    assert parse(RunSettings, preset, []).max_minutes == 3.0
    filled = parse(RunSettings, preset, ["--max_steps", "5", "--ema", "0"])
    assert (filled.batch_size, filled.max_steps, filled.max_minutes, filled.ema) == (
        7,
        5,
        None,
        0.0,
    )


def test_resuming_takes_the_runs_settings_and_refuses_others(tmp_path):
    with Run(settings(tmp_path, seed=7)) as run:
        run.identify(data="abc")
        run.restore()
    words = ["--output_dir", str(tmp_path), "--resume"]
    assert parse(RunSettings, no_preset, words).seed == 7
    assert parse(RunSettings, no_preset, [*words, "--seed", "7"]).seed == 7
    assert parse(RunSettings, no_preset, [*words, "--save_minutes", "9"]).save_minutes == 9
    with pytest.raises(ValueError, match=r"seed 7 -> 8.*--accept_changes"):
        parse(RunSettings, no_preset, [*words, "--seed", "8"])
    changed = parse(RunSettings, no_preset, [*words, "--seed", "8", "--accept_changes"])
    assert changed.seed == 8 and changed.batch_size == 4
    with Run(dataclasses.replace(changed, accept_changes=False)) as run:  # noqa: SIM117
        with pytest.raises(ValueError, match="data 'abc' -> 'abd'"):
            run.identify(data="abd")


def test_changed_rates_take_effect_when_accepted(tmp_path):
    with Run(settings(tmp_path, max_steps=10)) as run:
        linear_run(run)
    slower = settings(tmp_path, max_steps=20, learning_rate=1e-9, resume=True)
    with Run(slower) as run:
        before = None
        network = torch.nn.Linear(1, 1, bias=False)
        run.network("model", network, optim.optimizers(network, slower))
        run.restore()
        before = network.weight.item()
        for _ in run.steps():
            run.backward(network(torch.ones(1, 1)).sum())
            run.update()
        assert network.weight.item() == pytest.approx(before, abs=1e-6)


# ---- the folder


def test_batches_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size: 4 rows .* 6 would"):
        Run(settings(tmp_path, gradient_accumulation=3))


@pytest.mark.slow
def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with Run(settings(tmp_path)):
        code = (
            "from pathlib import Path; from genkit.training.folder import RunFolder\n"
            f"RunFolder(Path({str(tmp_path)!r})).claim(resume=True)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert "another process is training" in done.stderr and "accelerate launch" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(settings(tmp_path)) as run:
        run.identify(data="abc")
        network = torch.nn.Linear(1, 1)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
        raise ZeroDivisionError
    with Run(settings(tmp_path)) as run:
        linear_run(run)
    assert run.progress.step == 20


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_files_that_are_not_a_runs_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"holds {name}, which a run would overwrite"):
        Run(settings(tmp_path)).__enter__()
    assert (tmp_path / name).read_text() == "precious"


def test_folders_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir: cannot write"):
        Run(settings(tmp_path / "file")).__enter__()
    with pytest.raises(ValueError, match="output_dir: cannot write"):
        Run(settings(tmp_path / "file" / "below")).__enter__()
    with Run(settings(tmp_path / "run")) as run:
        run.identify(data="abc")
        linear_run(run)
    with pytest.raises(ValueError, match="holds another run"):
        Run(settings(tmp_path / "run")).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="output_dir: cannot write"):
        Run(settings(tmp_path / "run")).__enter__()


def test_publishing_is_all_or_nothing(tmp_path):
    with Run(settings(tmp_path)) as run:
        run.publish(lambda folder: (folder / "a.txt").write_text("old"))

        def fail(folder):
            (folder / "a.txt").write_text("new")
            raise OSError("the disk is full")

        with pytest.raises(OSError, match="full"):
            run.publish(fail)
        assert (tmp_path / "a.txt").read_text() == "old"
        assert not (tmp_path / ".publishing").exists()


# ---- what makes a folder a run, and what is damaged in it


def finished_run(folder: Path) -> None:
    """Leave a run of 20 steps, its model, a sample, and files of the user's own."""
    (folder / "checkpoints" / "step-00000010.bak").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "samples" / "step-00000010 (copy).md").write_text("mine")
    (folder / "samples" / "step-99.md").write_text("mine")
    (folder / "samples" / "step-00000030.md").symlink_to("step-99.md")
    with Run(settings(folder, save_steps=10)) as run:
        run.identify(data="abc")
        linear_run(run)
        run.folder.write("samples/step-00000020.md", "the newest")
        run.publish(lambda place: (place / "model.safetensors").write_bytes(b"the best"))


def resume(folder: Path, **changes) -> Run:
    """Go on with it for ten steps more."""
    saved = parse(RunSettings, no_preset, ["--output_dir", str(folder), "--resume"])
    with Run(dataclasses.replace(saved, max_steps=30, **changes)) as run:
        run.identify(data="abc")
        linear_run(run)
    return run


def test_the_users_own_files_are_left_alone(tmp_path):
    finished_run(tmp_path)
    for name in ("step-00000019.md", "step-00000021.png"):
        (tmp_path / "samples" / name).write_text("the run's, and of a step to come")
    before = listing(tmp_path)
    assert resume(tmp_path).progress.step == 30
    after = listing(tmp_path)
    own = [name for name in before if "copy" in name or "bak" in name or "99" in name]
    own += ["samples/step-00000030.md", "samples/step-00000019.md", "samples/step-00000020.md"]
    assert len(own) == 6 and all(after[name] == before[name] for name in own)
    assert "samples/step-00000021.png" not in after


@pytest.mark.parametrize("kept", ["metrics.jsonl", "checkpoints", "model.safetensors"])
@pytest.mark.parametrize("record", [True, False])
def test_a_part_of_a_run_is_a_run(tmp_path, kept, record):
    """Whatever else is missing, a new one is refused, and all that there was is still there."""
    finished_run(tmp_path)
    for name in {"metrics.jsonl", "checkpoints", "model.safetensors"} - {kept}:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not record:
        (tmp_path / "run.json").unlink()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"^output_dir: .* holds (another run|model\.safetensors)"):
        Run(settings(tmp_path)).__enter__()
    assert listing(tmp_path) == before
    if not record:
        with pytest.raises(ValueError, match=r"run.json is missing.*put back a copy"):
            resume(tmp_path)
        assert listing(tmp_path) == before


def test_a_start_that_failed_keeps_what_is_not_its_own(tmp_path):
    with Run(settings(tmp_path)) as run:
        run.identify(data="abc")
        network = torch.nn.Linear(1, 1)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    with Run(settings(tmp_path, seed=1)) as run:
        linear_run(run)
    assert run.progress.step == 20
    assert (tmp_path / "checkpoints" / "notes.txt").read_text() == "mine"


def test_a_run_killed_before_its_first_step_starts_again(tmp_path, capsys):
    finished_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.0, "val_loss": 1.0}\n')
    assert resume(tmp_path).progress.step == 30
    assert "had not made a step" in capsys.readouterr().err


def damage_all(folder: Path) -> None:
    for checkpoint in checkpoints.list_checkpoints(folder / "checkpoints"):
        (checkpoint / checkpoints.TENSORS).write_bytes(b"short")


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def lose_the_log_too(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()


def empty(folder: Path) -> None:
    lose_all(folder)
    (folder / "checkpoints").mkdir()


def take_away(folder: Path) -> None:
    lose_all(folder)
    (folder / "checkpoints").symlink_to("/mnt/away")


def make_unreadable(folder: Path) -> None:
    manifest = checkpoints.list_checkpoints(folder / "checkpoints")[0] / checkpoints.MANIFEST
    manifest.unlink()
    manifest.symlink_to(checkpoints.MANIFEST)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_all, r"step-00000020 is damaged.*step-00000010 is damaged.*start in another fol"),
        (lose_all, "checkpoints holds no checkpoint.*is a disk away"),
        (lose_the_log_too, "checkpoints holds no checkpoint.*is a disk away"),
        (empty, "checkpoints holds no checkpoint.*is a disk away"),
        (take_away, "checkpoints cannot be read.*make its disk readable"),
        (make_unreadable, "step-00000020 cannot be read.*or move it elsewhere"),
    ],
)
def test_a_run_whose_checkpoints_are_lost_is_not_begun_again(tmp_path, harm, message):
    finished_run(tmp_path)
    harm(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        resume(tmp_path)
    assert "\n" not in str(refused.value) and listing(tmp_path) == before


def test_a_damaged_checkpoint_is_kept_for_who_wants_to_look(tmp_path, capsys):
    finished_run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000020"
    (newest / checkpoints.TENSORS).write_bytes(b"short")
    assert resume(tmp_path).progress.step == 30
    log = capsys.readouterr().err
    assert "step-00000020 is damaged" in log and "it is now step-00000020.aside-1" in log
    assert "resumed after step 10" in log
    aside = newest.with_name("step-00000020.aside-1")
    assert (aside / checkpoints.TENSORS).read_bytes() == b"short"


RECORD = {"settings": {}, "facts": {}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"", "run.json is damaged .*put back a copy of it"),
        ("run.json", b"\xf8{}", "run.json is damaged"),
        ("run.json", b'{"settings": {"seed": 0', "run.json is damaged"),
        ("run.json", b"[" * 100_000, "run.json is damaged"),
        ("run.json", b"[1]", "run.json is damaged .it is no JSON object"),
        ("run.json", {"facts": {}}, "run.json is damaged .it holds no settings"),
        ("run.json", {"settings": {}}, "run.json is damaged .it holds no facts"),
        ("run.json", {"settings": [], "facts": {}}, "it holds no settings"),
        ("run.json", {"settings": {"seed": "0"}, "facts": {}}, "damaged .its seed is '0'"),
        ("run.json", {"settings": {"depth": 2}, "facts": {}}, "has the setting depth, which this"),
        ("run.json", None, "run.json cannot be read"),
        ("metrics.jsonl", b"3\n", "metrics.jsonl is damaged: line 1 .*delete that line"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 2}\n', "is damaged: line 2 "),
        ("metrics.jsonl", b'{"step": 1}\n{"\xff": 2}\n', "is damaged: line 2 "),
        ("metrics.jsonl", b'{"step": 1}\n{}\n', "is damaged: line 2 "),
        ("metrics.jsonl", b'{"step": 1}\n\n', "is damaged: line 2 "),
        ("metrics.jsonl", b'{"step": "1"}\n', "is damaged: line 1 "),
        ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n', "is damaged: line 1 "),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    finished_run(tmp_path)
    file = tmp_path / name
    file.unlink()
    if content is None:
        os.mkfifo(file)  # which nobody waits for
    else:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        resume(tmp_path)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "odd",
    [
        {"progress": 3},
        {"progress": {"step": "20"}},
        {"progress": {"step": 20, "pace": 1}},
        {"progress": {"step": 20}, "model": 3},
        {"progress": {"step": 20}, "model": {"module": {"weight": torch.ones(7)}}},
        {"progress": {"step": 20}, "model": {"module": {"weight": torch.ones(1, 1)},
         "average": None, "optimizers": ["x"]}},
    ],
)  # fmt: skip
def test_a_checkpoint_of_odd_shape_is_named(tmp_path, odd):
    finished_run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000020"
    shutil.rmtree(newest)
    checkpoints.save_checkpoint(newest.parent, 20, odd, keep=2)
    with pytest.raises(ValueError, match="step-00000020 does not fit this run") as refused:
        resume(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cut", "kept"), [('{"step": 2, "lo', 1), ('{"step": 2}', 2), ("\0\0\0", 1), ("", 1)]
)
def test_a_last_line_that_was_cut_is_not_glued_to_the_next(tmp_path, cut, kept):
    log = RunFolder(tmp_path)
    log.log_file.write_text('{"step": 1}\n' + cut)
    assert [line["step"] for line in log.log()] == [1, 2][:kept]
    log.append({"step": 3})
    assert [line["step"] for line in log_of(tmp_path)] == [*[1, 2][:kept], 3]


def test_a_log_goes_on_after_a_resume_without_it(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    resume(tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(21, 31))


# ---- a disk that is full


def picture(path: Path) -> None:
    image_grid.grid(torch.zeros(4, 3, 8, 8), path)


def curve(path: Path) -> None:
    curves.loss_curve([{"step": 1, "loss": 1.0}], path)


def model(path: Path) -> None:
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        save_file({"weights": torch.zeros(100)}, folder / path.name)

    RunFolder(path.parent).publish(write)


def tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    RunFolder(path.parent).publish(lambda folder: made.save(str(folder / path.name)))


WRITTEN: dict[str, Callable[[Path], None]] = {
    "run.json": lambda path: RunFolder(path.parent).record({"seed": 1}, {"data": "abc"}),
    "metrics.jsonl": lambda path: RunFolder(path.parent).append({"step": 1, "loss": 1.0}),
    "samples.md": lambda path: RunFolder(path.parent).write("samples.md", "a sample of text"),
    "samples.png": picture,
    "loss.png": curve,
    "model.safetensors": model,
    "tokenizer.json": tokenizer,
}


@pytest.mark.parametrize("limit", [0, 10])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, name, limit):
    file, write = tmp_path / name, WRITTEN[name]
    write(file)
    before = listing(tmp_path)
    with full_disk(limit), pytest.raises(OSError, match="could not write") as refused:
        write(file)
    message = str(refused.value)
    assert str(tmp_path) in message and "as it was; make room" in message and "\n" not in message
    assert listing(tmp_path) == before
    write(file)
    if name == "metrics.jsonl":
        assert [line["step"] for line in log_of(tmp_path)] == [1, 1]


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(tmp_path):
    def train_until_it_is_full() -> None:
        with Run(settings(tmp_path, save_steps=2)) as run, contextlib.ExitStack() as disk:
            run.identify(data="abc")
            network = torch.nn.Linear(1, 1, bias=False)
            run.network("model", network, optim.optimizers(network, run.settings))
            run.restore()
            for step in run.steps():
                run.backward(network(torch.ones(1, 1)).square().mean())
                run.update()
                if step == 4:
                    disk.enter_context(full_disk(600))

    with pytest.raises((OSError, ValueError), match="make room"):
        train_until_it_is_full()
    assert checkpoints.find_newest(tmp_path / "checkpoints")[1] == []
    assert resume(tmp_path).progress.step == 30


def test_a_tracker_on_a_full_disk_is_one_line(tmp_path, capsys):
    with (
        pytest.raises(OSError, match="could not write what the tracker keeps"),
        Run(settings(tmp_path, report_to="tensorboard")) as run,
    ):
        run.identify(data="abc")
        with full_disk(2000):
            for _ in range(10_000):
                run.log_metrics(loss=1.0)
    assert "the tracker lost figures: File too large" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_model_has_the_modes_that_the_umask_says(tmp_path, umask):
    old = os.umask(umask)
    try:
        for name, write in WRITTEN.items():
            write(tmp_path / name)
        resumed = RunFolder(tmp_path)
        resumed.publish(lambda place: (place / "unet").mkdir() or model(place / "unet" / "x"))
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= len(WRITTEN)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


# ---- signals


def newest_is_last(folder: Path) -> bool:
    """Whether a run that ended has saved its last step."""
    found, _ = checkpoints.find_newest(folder / "checkpoints")
    return checkpoints.step_of(found) == log_of(folder)[-1]["step"] > 0


@pytest.mark.slow
def test_a_closed_terminal_saves(tmp_path):
    """The hang-up comes, and from then on nothing can be printed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", STEPPING, str(tmp_path)]
    # these tests may run under nohup themselves, whose children ignore a hang-up
    lead = "import os, fcntl, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    lead += "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY); "
    lead += "os.execv(sys.argv[1], sys.argv[1:])"
    running = subprocess.Popen(
        [sys.executable, "-c", lead, *command], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    wait_for_steps(tmp_path, running, 3)
    os.close(ours)
    assert running.wait(60) == 0
    assert newest_is_last(tmp_path)


@pytest.mark.slow
def test_nohup_is_heeded_and_a_stop_is_no_training(tmp_path):
    """SIGHUP ends nothing that was started under nohup; SIGSTOP counts no minutes."""
    command = ["nohup", sys.executable, "-c", STEPPING, str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for_steps(tmp_path, running, 3)
    running.send_signal(signal.SIGHUP)
    wait_for_steps(tmp_path, running, 20)
    running.send_signal(signal.SIGSTOP)
    time.sleep(3)
    running.send_signal(signal.SIGCONT)
    wait_for_steps(tmp_path, running, 3)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0 and newest_is_last(tmp_path)
    assert float((tmp_path / "lost").read_text()) > 2
    seconds = [line["seconds"] for line in log_of(tmp_path)]
    assert seconds == sorted(seconds) and seconds[-1] > 0.2


def test_a_lap_in_which_the_process_was_stopped_is_as_long_as_the_one_before():
    clock = Clock()
    clock.set(10.0)
    clock.lap(10.5)
    clock.set(100.0)  # as if a clock that ran had come there
    assert clock.usual == 100.0  # no lap begins before a time that was set
    with clock.running():
        clock.set(10.0)
        clock.lap(10.5)
        clock._sum += 90  # the process was stopped so long
        assert clock.seconds > 100 and clock.usual == 11.0


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "loss.png", "model.safetensors"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_the_place_of_a_file_is_refused_before_a_step(tmp_path, name, resume):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"output_dir: .*{name} is a folder"):
        RunFolder(tmp_path).claim(resume)
    assert [file.name for file in tmp_path.iterdir()] == [name]
