"""Runs of several processes, and runs that are killed."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from builders import ON_CPU, PORT, ROOT, STEPPING, TINY, TWO, wait_for_steps


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", pytest.param("4", marks=pytest.mark.slow)])
def test_several_processes_are_one_run(text_file, tmp_path, processes):
    command = [sys.executable, "benchmarks/processes.py", "--processes", "1", processes]
    command += ["--", "--text", str(text_file), *TINY]
    command += ["--optimizer", "adamw", "--mixed_precision", "no"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    gaps = [float(gap) for gap in re.findall(r"over 50 steps ([\d.e+-]+)", done.stdout)]
    assert len(gaps) == 1 and gaps[0] < 1e-5


@pytest.mark.slow
def test_the_readmes_two_process_launch(train, trained, text_file, tmp_path):
    config = ("--config_file", "accelerate_config.yaml", "--num_processes", "2")
    words = [*TINY, "--text", text_file, "--output_dir", tmp_path / "run", "--max_steps", "8"]
    done = train(*words, launcher=config, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the best model is in") == 1
    done = train(*words[-4:], "--resume", "--accept_changes", launcher=config, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 8" in done.stderr


@pytest.mark.slow
def test_a_stop_of_any_process_is_no_training(tmp_path):
    """The main process waits for the other one meanwhile, and its clock goes on."""
    both = ON_CPU | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", STEPPING, str(tmp_path)]
    main, other = (
        subprocess.Popen(command, cwd=ROOT, env=os.environ | both | {"RANK": n, "LOCAL_RANK": n})
        for n in "01"
    )
    wait_for_steps(tmp_path, main, 10)
    other.send_signal(signal.SIGSTOP)
    time.sleep(3)
    other.send_signal(signal.SIGCONT)
    wait_for_steps(tmp_path, main, 10)
    other.send_signal(signal.SIGHUP)  # ends both
    assert (main.wait(60), other.wait(60)) == (0, 0)
    assert float((tmp_path / "lost").read_text()) > 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("--cpu", "--num_processes", "2"), TWO])
def test_a_launch_that_gets_fewer_processes_is_refused(train, tmp_path, launcher):
    done = train("--output_dir", tmp_path / "run", launcher=launcher)
    assert done.returncode != 0
    assert "2 processes were asked for and 1 is connected" in done.stderr
    assert "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


RECIPES = ("train_vae", "train_autoencoder", "train_gan", "train_diffusion", "train_pixels")
LONG = ["--stages", "--kills 5"]
LONG += [f"--recipe align --kills {n}" for n in ("20", "10 --processes 2")]
LONG += [f"--recipe finetune_text2image --kills 20 --processes {n}" for n in (1, 2)]
LONG += [f"--recipe {name} --kills 10 --processes {n}" for name in RECIPES for n in (1, 2)]
LONG += ["--recipe train_private --kills 50"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [*LONG, "--kills 2 --processes 2"])
def test_killed_runs_lose_nothing(words):
    command = [sys.executable, "benchmarks/crash.py", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bit-identical to the unharmed run" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_two_hundred_kills_lose_nothing(processes):
    command = [sys.executable, "benchmarks/crash.py", "--kills", "200", "--processes", processes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bit-identical to the unharmed run" in done.stdout


AGREEING = """
import sys, accelerate
from genkit.training.processes import Processes

run = Processes(accelerate.Accelerator())
assert all(run.have_equal(f"text {i}") for i in range(20))
assert not run.have_equal(f"text {run.is_main}")
run.accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_have_equal_at_a_number_of_processes_that_is_no_power_of_two():
    all_of_them = ON_CPU | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": "3"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", AGREEING],
            cwd=ROOT,
            env=os.environ | all_of_them | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "012"
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
