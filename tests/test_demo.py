"""genkit demo: three models, then the page; a run that stopped goes on."""

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from genkit.commands import demo

TINY = "--depth 1 --width 32 --heads 2 --context 32 --batch_size 4 --max_steps 4 --evaluations 1"


@pytest.mark.slow
def test_demo_trains_what_is_not_there_and_resumes(tmp_path, capfd):
    models = {"charlm": f"{TINY} --compile no"}
    demo.train_models(tmp_path, models)
    weights = tmp_path / "charlm" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    demo.train_models(tmp_path, models)
    assert weights.stat().st_mtime_ns == before
    assert capfd.readouterr().err.count("training charlm") == 1
    (tmp_path / "charlm" / demo.DONE).unlink()  # as if it had been stopped
    demo.train_models(tmp_path, models)
    assert (tmp_path / "charlm" / demo.DONE).exists()


@pytest.mark.slow
def test_demo_ends_where_a_run_fails(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        demo.train_models(tmp_path, {"charlm": "--max_steps 0"})
    assert stopped.value.code == 2 and not (tmp_path / "charlm").exists()


@pytest.mark.slow
def test_demo_ends_with_a_page_that_has_three_models(tmp_path):
    pytest.importorskip("gradio")
    hidden = dict.fromkeys(demo.DISPLAYS, "")  # no browser is opened
    command = [sys.executable, "-u", "-m", "genkit", "demo"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | hidden, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            shown = ""
            while "genkit is at" not in shown:
                line = running.stdout.readline()
                assert line, shown
                shown += line
            address = re.search(r"http://\S+", shown)
            assert address is not None
            page = urllib.request.urlopen(address[0], timeout=60).read().decode()
            assert all(name in page for name in demo.MODELS)
        finally:
            running.terminate()
    assert all((tmp_path / "genkit-demo" / name / demo.DONE).exists() for name in demo.MODELS)
    assert all(
        Path(tmp_path, line.split()[-1]).exists() for line in re.findall("Digits: .*", shown)
    )
