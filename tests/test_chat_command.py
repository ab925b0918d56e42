"""genkit chat: a conversation in a terminal, and by a pipe."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from app_models import language, talks

import genkit
from genkit import cli
from genkit.text import chat_history
from genkit.text.language_model import load_language_model

OPTIONS = {"max_new_tokens": 12, "temperature": 0.8}
FLAGS = ("--max-new-tokens", "12", "--temperature", "0.8")
HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "talks"
    talks(folder)
    return folder


@pytest.fixture
def chat(model, monkeypatch, capfd):
    """Give lines to the command by a pipe; return what it prints, and its notes."""

    def run(text: str, *flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capfd.readouterr()
        cli.main(["chat", str(model), *FLAGS, *flags])
        return tuple(capfd.readouterr())

    return run


def replies(model: Path, *contents: str, seed: int, system: str = "") -> list[dict]:
    """The conversation by generate, each reply by the next seed."""
    history = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        asked = [*history, {"role": "user", "content": content}]
        history = genkit.generate(asked, model=model, seed=seed + i, **OPTIONS).messages
    return history


def printed(history: list[dict]) -> str:
    return "".join(m["content"] + "\n" for m in history if m["role"] == "assistant")


def test_a_pipe_prints_the_replies_of_generate_alone(chat, model):
    out, notes = chat("hello\nand a fox\n\n", "--seed", "5")
    assert out == printed(replies(model, "hello", "and a fox", seed=5))
    assert "seed 5" in notes and "seed 6" in notes and "cut off at --max-new-tokens" in notes
    out, _ = chat("hello", "--seed", "5", "--system", "be a fox")
    assert out == printed(replies(model, "hello", seed=5, system="be a fox"))


def test_save_and_history_repeat_a_conversation(chat, model, tmp_path):
    file = tmp_path / "talk.json"
    out, notes = chat(f"hello\nand\n/save {file}\n")
    assert f"saved 4 messages to {file}" in notes
    history = json.loads(file.read_text(encoding="utf-8"))
    assert [entry["role"] for entry in history] == ["user", "assistant"] * 2
    language = load_language_model(model)
    for i in (1, 3):
        messages, reply = chat_history.as_messages(history[:i]), history[i]
        again = genkit.generate(messages, model=language, seed=reply["seed"], **OPTIONS)
        assert again.completion == reply["content"]
    messages = [*chat_history.as_messages(history), {"role": "user", "content": "more"}]
    wanted = genkit.generate(messages, model=language, seed=7, **OPTIONS)
    out, _ = chat("more\n", "--history", str(file), "--seed", "7")
    assert out == wanted.completion + "\n"
    file.write_text(json.dumps(history[:3]), encoding="utf-8")  # the last message has no reply
    out, _ = chat("", "--history", str(file), "--seed", str(history[3]["seed"]))
    assert out == history[3]["content"] + "\n"


def test_commands_change_the_conversation(chat, model, tmp_path):
    file = tmp_path / "talk.json"

    def history(*lines: str) -> list[dict]:
        chat("\n".join([*lines, f"/save {file}"]), "--seed", "1")
        return json.loads(file.read_text(encoding="utf-8"))

    first, second = (entry["seed"] for entry in history("hello", "and")[1::2])
    assert (first, second) == (1, 2)
    assert history("hello", "and", "/undo") == history("hello")
    retried = history("hello", "/retry")
    assert retried[0] == HELLO and len(retried) == 2 and retried[1]["seed"] != 1
    assert history("hello", "/retry", "and")[3]["seed"] == 2
    assert history("hello", "/seed 7", "/retry")[1]["seed"] == 7
    assert history("/seed 40", "hello", "and")[1::2] == history("/seed 40", "hello", "and")[1::2]
    assert [entry["seed"] for entry in history("/seed 40", "hello", "and")[1::2]] == [40, 41]
    assert history("/system be", "hello")[0] == {"role": "system", "content": "be"}
    assert history("/system be", "/system", "hello")[0] == HELLO
    assert history("hello", "/quit", "and") == history("hello", "/quit", "and")
    _, notes = chat("/help\n/quit\nhello\n")
    assert "/retry" in notes and "seed" not in notes.rpartition("/quit")[2]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("/undo", "no reply yet"),
        ("/retry", "no reply yet"),
        ("/nothing", "/nothing is no command"),
        ("/seed x", "/seed takes a whole number, got 'x'"),
        ("/save", "/save takes the name of a file"),
        ("a" * 1100, "context"),
    ],
)
def test_what_cannot_be_done_is_a_line(chat, capfd, lines, words):
    with pytest.raises(SystemExit) as ended:
        chat(lines)
    assert ended.value.code == 2
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("error: ") and words in error


def test_retry_needs_a_strategy_that_draws(model, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/retry\n")))
    own = ["--strategy", "greedy", "--max-new-tokens", "5"]
    with pytest.raises(SystemExit):
        cli.main(["chat", str(model), *own])
    assert "/retry: this strategy draws nothing" in capfd.readouterr().err


@pytest.mark.parametrize(("lines", "flags"), [("", ("--seed", "3")), ("/seed 3\n", ())])
def test_a_seed_needs_a_strategy_that_draws(model, monkeypatch, capfd, lines, flags):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    with pytest.raises(SystemExit):
        cli.main(["chat", str(model), "--strategy", "greedy", *flags])
    assert "seed" in capfd.readouterr().err


def test_a_history_out_of_order_is_named_before_a_model_is_loaded(tmp_path, capfd):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([HELLO, HELLO]))
    with pytest.raises(SystemExit):
        cli.main(["chat", "no/such/model", "--history", str(file)])
    assert "--history[1]: role 'user' is out of order" in capfd.readouterr().err


def test_a_history_whose_last_message_is_not_answered_goes_on(model, monkeypatch, tmp_path):
    """Ctrl-C before the first word: the next message is answered."""
    file, saved = tmp_path / "talk.json", tmp_path / "saved.json"
    file.write_text(json.dumps([HELLO]))
    pressed = iter([KeyboardInterrupt])

    def press(*_):
        for error in pressed:
            raise error

    terminal = io.StringIO(f"and\n/save {saved}\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(press)
    try:
        cli.main(["chat", str(model), *FLAGS, "--history", str(file)])
    finally:
        hook.remove()
    asked, reply = json.loads(saved.read_text())
    assert asked == {"role": "user", "content": "and"} and reply["role"] == "assistant"
    assert next(pressed, None) is None  # it was pressed


def test_a_model_without_a_template_is_named(tmp_path, monkeypatch, capfd):
    language(tmp_path / "letters")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    with pytest.raises(SystemExit):
        cli.main(["chat", str(tmp_path / "letters")])
    assert "no chat template" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no list of messages"),
        ("[3]", "message 0"),
        ('[{"role": "user"}]', "message 0"),
        ('[{"role": "user", "content": 3}]', "content must be str"),
        ('[{"role": "user", "content": "a", "x": 1}]', "'x'"),
        ('[{"role": "assistant", "content": "a", "seed": true}]', "seed must be int"),
    ],
)
def test_read_history_names_what_is_wrong(tmp_path, text, words):
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="--history") as raised:
        chat_history.read_history(file, "--history")
    assert words in str(raised.value)
    with pytest.raises(ValueError, match="--history: cannot read"):
        chat_history.read_history(tmp_path / "gone", "--history")


@pytest.mark.slow
def test_a_terminal_stops_a_reply_and_goes_on(model, tmp_path):
    """Ctrl-C keeps what was written, Ctrl-D ends; prompts are not in a file of the output."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "genkit", "chat", str(model), "--max-new-tokens", "900"]
    command += ["--stop", "a stop that never comes"]  # so that it is slow: token by token
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            command, stdin=slave, stdout=out, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
    os.close(slave)
    shown = b""

    def wait_for(words: bytes, seconds: float = 120) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while words not in shown:
            assert time.monotonic() < end and process.poll() is None, shown.decode()
            if select.select([master], [], [], 0.1)[0]:
                shown += os.read(master, 4096)
        shown = shown.partition(words)[2]

    wait_for(b"> ")
    os.write(master, b"hello\n")
    while not (tmp_path / "out").stat().st_size:
        time.sleep(0.01)
    os.write(master, b"\x03")
    wait_for(b"stopped; what was written is kept")
    os.write(master, f"/nothing\n/save {tmp_path / 'talk.json'}\n".encode())
    wait_for(b"error: /nothing is no command")
    wait_for(b"saved 2 messages")
    os.write(master, b"\x04")
    assert process.wait(60) == 0
    os.close(master)
    hello, reply = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert hello == HELLO and reply["stopped"] is True
    assert (tmp_path / "out").read_text(encoding="utf-8") == reply["content"] + "\n"
