"""What is shown while work goes on: bars, lines in a log, and nothing with --quiet."""

import ast
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from builders import ROOT, SHORT, run_here

from genkit import cli, console
from genkit.training.run import Run
from genkit.training.settings import RunSettings

FILLED = {"batch_size": 4, "ema": 0.0, "mixed_precision": "no", "compile": False}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves on, in seconds."""
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.time))
    return now


def settings(folder, **changes) -> RunSettings:
    return RunSettings(output_dir=str(folder), **(FILLED | changes))


def short_run(given: RunSettings, each=lambda: None) -> None:
    """Train one weight; call `each` in every step."""
    with Run(given) as run:
        network = torch.nn.Linear(1, 1)
        run.network("model", network, [torch.optim.SGD(network.parameters(), lr=0.1)])
        run.identify()
        run.restore()
        for _ in run.steps():
            run.backward(network(torch.ones(2, 1)).square().mean())
            run.update()
            each()


# ---- lines of a log


def test_log_lines_are_rare_and_say_what_is_left(clock, capsys):
    with console.bar(None, "decoding", 3000, " images") as bar:
        for _ in range(3000):
            clock.time += 0.1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 10 < len(lines) < 30  # of five minutes
    assert lines[0] == "decoding: 3%, 0:00:10 gone, 0:04:50 left"
    for _ in console.bar(range(2), "reading"):  # a bar of items, whose number is known
        clock.time += 15
    assert capsys.readouterr().err == "reading: 50%, 0:00:15 gone, 0:00:15 left\n" * 1 + (
        "reading: 100%, 0:00:30 gone, 0:00:00 left\n"
    )


def test_a_day_is_a_hundred_lines(clock, capsys):
    with console.bar(None, "training", 1.0, initial=0.5) as bar:
        bar.set_postfix_str("loss 1.234")
        for _ in range(24 * 60):
            clock.time += 60
            bar.update(0.5 / (24 * 60))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 110
    assert lines[0] == "training: 50%, 0:01:00 gone, 23:59:00 left, loss 1.234"


def test_short_work_and_hidden_bars_say_nothing(clock, capsys):
    assert list(console.bar(range(3), "reading")) == [0, 1, 2]
    for _ in console.bar(range(3), "reading", hidden=True):
        clock.time += 100
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_a_notebook_has_its_own(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.bar(None, "reading", 3) as bar:
        assert type(bar) is console.tqdm and bar.desc == "reading" and bar.delay == console.DELAY
    with console.quiet():
        assert type(console.bar(None, "reading", 3)) is console.LogLines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert not console.shows_bars()
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert console.shows_bars()


def test_quiet_shows_nothing_and_ends(capsys):
    with console.quiet():
        console.say("a line")
        with console.quiet(False):
            assert console.is_quiet()
    assert capsys.readouterr().err == "" and not console.is_quiet()
    console.say("a line")
    assert capsys.readouterr().err == "a line\n"


@pytest.mark.parametrize(
    ("terminal", "variables", "colours"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, terminal, variables, colours):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert console.has_colours(SimpleNamespace(isatty=lambda: terminal)) is colours


def test_one_module_makes_all_bars_and_decides_on_colours():
    for path in (ROOT / "genkit").rglob("*.py"):
        if path.name != "console.py":
            text = path.read_text()
            assert not re.search(r"\btqdm\b|set_progress_bar_config|[\"']NO_COLOR", text), path


def test_commands_and_the_page_alone_print_to_standard_output():
    printing = set()
    for path in [*(ROOT / "genkit").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            if call and not any(keyword.arg == "file" for keyword in node.keywords):
                printing.add(str(path.relative_to(ROOT)))
    shells = ("genkit/commands/", "genkit/app/")
    others = {name for name in printing if not name.startswith(shells)}
    assert others == {"genkit/text/alternatives.py"}  # whose `show` prints in colours


# ---- runs


def test_a_training_of_five_minutes_logs_few_whole_lines(tmp_path, clock, capsys):
    def each():
        clock.time += 1.0

    short_run(settings(tmp_path, max_steps=300), each)
    shown = capsys.readouterr()
    assert "\r" not in shown.err and 10 < len(shown.err.splitlines()) <= 60
    assert re.match(r"training: 3%, 0:00:10 gone, 0:04:\d\d left, loss \d", shown.err)
    assert shown.out == f"the best model is in {tmp_path}\n"


def test_a_quiet_run_prints_its_result_alone(tmp_path, clock, capsys):
    def each():
        clock.time += 100.0

    short_run(settings(tmp_path / "run", max_steps=5, quiet=True), each)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"the best model is in {tmp_path / 'run'}\n", "")
    short_run(settings(tmp_path / "run", max_steps=9, resume=True), each)  # it is of one start
    assert "resumed after step 5" in capsys.readouterr().err


def test_what_a_dry_run_says_is_its_result(tmp_path, capsys):
    short_run(settings(tmp_path / "run", max_steps=5, dry_run=True))
    shown = capsys.readouterr()
    assert "ms a step" in shown.out and "the best model" not in shown.out and shown.err == ""


def test_recipes_take_quiet(tmp_path, text_file, capsys):
    words = ("--depth", "1", "--width", "32", "--heads", "2", "--context", "32", *SHORT)
    words += ("--max_steps", "2", "--evaluations", "1", "--text", text_file, "--quiet")
    run_here("train_charlm", *words, "--output_dir", tmp_path / "run")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"the best model is in {tmp_path / 'run'}\n", "")


# ---- commands


def test_every_command_takes_quiet(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert "--quiet" in capsys.readouterr().out


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "a"])
    assert stopped.value.code == 130 and capsys.readouterr().err == ""


def test_a_reader_of_a_pipe_that_is_gone_is_no_error():
    command = f"{sys.executable} -m genkit recipe charlm | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
