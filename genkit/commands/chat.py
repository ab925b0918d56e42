"""genkit chat: talk with a language model in the terminal, or by a pipe."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit import console, garbage
from genkit.commands import common, flags

if TYPE_CHECKING:
    from genkit.text.chat_history import Entry
    from genkit.text.generation import Generation
    from genkit.text.language_model import LanguageModel

EXAMPLES = """\
  genkit chat user/model
  genkit chat runs/tuned --system "You answer in one sentence." --temperature 0.5 --seed 1
  genkit chat user/model --history talk.json
  printf 'Hello\\nAnd in French?\\n' | genkit chat user/model  # a turn a line; prints replies alone

Ctrl-C stops a reply and keeps what was written; Ctrl-D ends. These lines are commands:
  /undo         forget the last message and its reply
  /retry        replace the last reply by one of a new seed, or of that of a /seed before it
  /seed N       draw the next reply by seed N, the ones after it by N + 1, ...
  /system TEXT  set the system message; without TEXT: remove it
  /save FILE    write the conversation to a JSON file, with the seed of each reply
  /help         list the commands
  /quit         end
A message that begins with / is written with two: //etc is a folder.
"""
# arguments of generate that a conversation does not take, or that are added below
OWN = ("model", "trust_remote_code", "n_best", "parse_special")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="folder or Hub id of a model with a chat template")
    text = "go on with a conversation, in a file that /save wrote"
    parser.add_argument("--history", type=Path, metavar="FILE", help=text)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    flags.add(parser, flags.from_verb("genkit.text.generation", "generate", skip=OWN))
    common.add_loading(parser)


def run(arguments: dict[str, Any]) -> None:
    """Talk until the input ends."""
    options = common.written_options(arguments)
    with garbage.paused():
        from genkit.data import messages
        from genkit.text import chat_history
        from genkit.text.language_model import load_language_model
        from genkit.text.options import LOAD, GenerationOptions, check_options

    history: list[Entry] = []
    if "history" in options:
        history = chat_history.read_history(options.pop("history"), "--history")
        messages.check_turns(chat_history.as_messages(history), "--history")
    if "system" in options:
        history = chat_history.with_system(history, options.pop("system"))
    seed = options.pop("seed", None)
    if isinstance(seed, list):
        raise ValueError(f"--seed: give one number; the replies have it and those after it: {seed}")
    console.silence_libraries()
    loading = {name: options.pop(name) for name in LOAD if name in options}
    name = options.pop("model")
    check_options(GenerationOptions(seed=seed, **options))
    language = load_language_model(name, **loading)
    if "draft" in options:
        loading.pop("revision", None)
        options["draft"] = load_language_model(options["draft"], **loading, argument="draft")
    asked = bool(history) and history[-1]["role"] == "user"
    conversation = Conversation(language, options, history[:-1] if asked else history, seed)
    if asked:
        conversation.answer(history)
    if sys.stdin.isatty():
        _talk(conversation)
    else:
        sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        for line in sys.stdin:
            conversation.take(line)
            if conversation.ended:
                break


def _talk(conversation: Conversation) -> None:
    """Answer lines of a terminal; an error leaves the conversation as it was."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines
    _note("Ctrl-C stops a reply, Ctrl-D ends, /help lists the commands.")
    while not conversation.ended:
        try:
            conversation.take(_read_line())
        except KeyboardInterrupt:
            _note("\nCtrl-D ends")
        except EOFError:
            _note("")
            return
        except (ValueError, OSError) as error:
            _note(f"error: {' '.join(str(error).split())}")


def _read_line() -> str:
    """Read a line of a terminal; the prompt is never part of what standard output is sent to."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Conversation:
    """A conversation with a model, and what its next reply is written by."""

    language: LanguageModel
    options: dict[str, Any]  # of generate
    history: list[Entry]
    seed: int | None = None  # of the next reply; None: a random one
    seed_is_new: bool = False  # set by /seed, and no reply has it yet
    ended: bool = False

    def take(self, line: str) -> None:
        """Answer a message, or obey a command.

        Raises:
            ValueError: it cannot be done; nothing has changed.
        """
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            self._obey(*text[1:].split(maxsplit=1))
        elif text:
            self.answer([*self.history, {"role": "user", "content": text.removeprefix("/")}])

    def _obey(self, name: str = "", value: str = "") -> None:
        commands = {
            "undo": self._undo,
            "retry": self._retry,
            "seed": self._set_seed,
            "system": self._set_system,
            "save": self._save,
            "help": self._help,
            "quit": self._quit,
        }
        if name not in commands:
            raise ValueError(
                f"/{name} is no command; /help lists them; a message that begins with / is written "
                "with two"
            )
        commands[name](value.strip())

    def answer(self, history: list[Entry], seed: int | None = None) -> None:
        """Write the reply to a history that ends with the user's message.

        Args:
            seed: of this reply alone; default: the next one.
        """
        options = dict(self.options)
        if self._draws():
            following = self.seed if self.seed is not None else secrets.randbits(31)
            options["seed"] = following if seed is None else seed
        reply = _write(history, self.language, options)
        if seed is None and self.seed is not None:
            self.seed += 1
        self.seed_is_new = False
        if reply is not None:
            self.history = [*history, reply]

    def _draws(self) -> bool:
        from genkit.text.options import DRAWS, GenerationOptions

        return self.options.get("strategy", GenerationOptions.strategy) in DRAWS

    def _undo(self, _value: str) -> None:
        from genkit.text.chat_history import without_reply

        self.history = without_reply(self.history)[:-1]
        _note("forgotten: the last message and its reply")

    def _retry(self, _value: str) -> None:
        from genkit.text.chat_history import without_reply

        if not self._draws():
            raise ValueError("/retry: this strategy draws nothing, so the reply would be the same")
        seed = None if self.seed_is_new else secrets.randbits(31)
        self.answer(without_reply(self.history), seed)

    def _set_seed(self, value: str) -> None:
        if not value.isdecimal():
            raise ValueError(f"/seed takes a whole number, got {value!r}")
        if not self._draws():
            raise ValueError(f"/seed {value}: this strategy draws nothing")
        self.seed, self.seed_is_new = int(value), True

    def _set_system(self, value: str) -> None:
        from genkit.text.chat_history import with_system

        self.history = with_system(self.history, value)
        _note("the system message is set" if value else "there is no system message now")

    def _save(self, value: str) -> None:
        from genkit.files import write_text
        from genkit.text.chat_history import as_json

        if not value:
            raise ValueError("/save takes the name of a file")
        write_text(Path(value), as_json(self.history))
        _note(f"saved {len(self.history)} messages to {value}")

    def _help(self, _value: str) -> None:
        _note(EXAMPLES.partition("\n\n")[2].rstrip())

    def _quit(self, _value: str) -> None:
        self.ended = True


def _write(history: list[Entry], language: LanguageModel, options: dict[str, Any]) -> Entry | None:
    """Print a reply while it is written, and return it; in a terminal, Ctrl-C stops it.

    Returns:
        None if it was stopped before anything was written.
    """
    from genkit.text.chat_history import as_messages
    from genkit.text.generation import stream

    pieces = stream(as_messages(history), model=language, **options)
    written, record, stopped = "", None, False
    try:
        for piece in pieces:
            written, record = written + piece.text, piece.record
            _show(piece.text)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stopped = True
    print(flush=True)
    own = {"seed": options["seed"]} if "seed" in options else {}
    own |= {"stopped": True} if stopped else {}
    _note(_describe(record, own, bool(written)))
    nothing = stopped and not written
    return None if nothing else {"role": "assistant", "content": written, **own}


def _show(text: str) -> None:
    """Print a piece of a reply; what would steer a terminal is shown as marks."""
    from genkit.text.token_names import printable

    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _describe(record: Generation | None, own: dict[str, Any], written: bool) -> str:
    """Write in one line what the user may want to know of a reply."""
    facts = [f"seed {own['seed']}"] if "seed" in own else []
    if record:
        facts.append(f"{len(record.tokens)} tokens")
        facts += ["cut off at --max-new-tokens"] if record.finish == "length" else []
        dropped = len(record.dropped)
        facts += [f"without the oldest {dropped} messages"] if dropped else []
    elif written:
        facts.append("stopped; what was written is kept")
    else:
        facts.append("stopped before a word was written; the conversation is as it was before")
    return f"({', '.join(facts)})"
