import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit import checkpoints, optim
from genkit.progress import Clock
from genkit.settings import RunSettings, parse
from genkit.training import Run, TrainingDivergedError

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


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_weight_has_one_optimizer(architecture):
    from genkit import charlm

    model = charlm.make_model(architecture, 300, 16, 2, 32, 2, 0.0)
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
    from genkit import charlm

    model = charlm.make_model("llama", 96, 16, 1, 32, 2, 0.0)
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
        told = settings(folder, max_steps=6, resume=resume)
        seen = {}
        with Run(told) as run:
            network = torch.nn.Linear(1, 1)
            run.network("model", network, optim.optimizers(network, told))
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
    assert stop.value.code == 0 and "stopped after step 3" in capsys.readouterr().out
    assert checkpoints.newest(tmp_path / "checkpoints")[0].name == "step-00000003"


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
    assert capsys.readouterr().out.count("step skipped") == 3
    assert [line["step"] for line in log_of(tmp_path) if line["loss"] is None] == [5, 6, 7]


def test_more_roll_back_with_half_the_rate(tmp_path, capsys):
    with Run(settings(tmp_path, save_steps=4, warmup=0.0, decay=0.0)) as run:
        linear_run(run, poison={10, 11, 12, 13})
        assert run.progress.rollbacks == 1 and run.progress.rate_scale == 0.5
        assert run.progress.step == 20
        assert run.weights().weight.item() > 1.0  # on its way from 0 to 2
    assert "rolled back to step 8" in capsys.readouterr().out
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 21))


def test_a_hopeless_run_stops_with_a_reason(tmp_path):
    with (
        Run(settings(tmp_path)) as run,
        pytest.raises(TrainingDivergedError, match="learning_rate"),
    ):
        linear_run(run, poison=set(range(1, 1000)))
    found, problems = checkpoints.newest(tmp_path / "checkpoints")
    assert problems == []
    assert torch.isfinite(checkpoints.load(found)["model"]["module"]["weight"]).all()


# ---- settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_steps 0", "max_steps must be above 0, got 0"),
        ("--max_minutes -1", "max_minutes must be above 0"),
        ("--optimizer sgd", "optimizer must be one of adamw, muon, got 'sgd'"),
        ("--mixed_precision fp8", "mixed_precision must be one of no, bf16"),
        ("--warmup 2", "warmup must be a part of the run"),
        ("--ema 1", r"ema must be in \[0, 1\)"),
        ("--clip -1", "clip must be 0 or more"),
        ("--seed -1", "seed must be 0 or more, got -1"),
        ("--report_to trackio", r"report_to: pip install 'genkit\[trackio\]' first"),
        ("--resume", "there is no run to resume"),
    ],
)
def test_bad_settings_are_named(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        parse(RunSettings, no_preset, [*words.split(), "--output_dir", str(tmp_path)])


def test_the_preset_fills_what_was_left_open():
    def preset(told, device):
        assert device == "cpu"
        return {"batch_size": 7, "max_minutes": 3.0, "ema": 0.5}

    assert parse(RunSettings, preset, []).max_minutes == 3.0
    told = parse(RunSettings, preset, ["--max_steps", "5", "--ema", "0"])
    assert (told.batch_size, told.max_steps, told.max_minutes, told.ema) == (7, 5, None, 0.0)


def test_resuming_takes_the_runs_settings_and_refuses_others(tmp_path):
    with Run(settings(tmp_path, seed=7)) as run:
        run.identify(data="abc")
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


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with Run(settings(tmp_path)):
        code = (
            "from pathlib import Path; from genkit.folder import RunFolder\n"
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
