"""Chats: messages in, replies out, as transformers reads and writes them."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chat_models import (
    CONVERSATIONS,
    SPECIAL,
    TEMPLATES,
    WITH_SYSTEM,
    chat_model,
    save_chat_model,
)

import genkit
from genkit.data import messages
from genkit.engine import decoder
from genkit.hub.card import TEXT_USAGE
from genkit.text import chats, kept_keys, kv_cache
from genkit.text.kept_keys import KeptText, KeptTexts
from genkit.text.language_model import LanguageModel, load_language_model

PIECES = (
    *("the ", "the", "\n", " ", "user", "ing", "an a", "."),
    *("é", "日本", "🙂", "<", "|>", "x\n\n"),
)
HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def made_up(rng: random.Random, longest: int = 8) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, longest)))


def made_up_chat(rng: random.Random, turns: int, system: bool) -> list[dict[str, str]]:
    """A chat of so many messages of the user, the last of which is to be answered."""
    roles = ["system"] * system + ["user", "assistant"] * turns
    return [{"role": role, "content": made_up(rng)} for role in roles[:-1]]


def by_transformers(language: LanguageModel, chat: list[dict[str, str]]) -> list[int]:
    return language.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )


def tokens_of(language: LanguageModel, chat: list[dict[str, str]]) -> list[int]:
    return chats.read_chat(messages.check_chat(chat, "prompt"), "prompt", language).tokens


@contextlib.contextmanager
def counted(language: LanguageModel) -> Iterator[list[int]]:
    """List how many tokens the model reads in each call."""
    widths: list[int] = []

    whole = decoder.Stepper.__call__

    def count(stepper: decoder.Stepper, ids: torch.Tensor, *step: Any, **options: Any) -> Any:
        if stepper is language.stepper:
            widths.append(ids.numel())
        return whole(stepper, ids, *step, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.Stepper, "__call__", count)
        yield widths


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    return chat_model()


# ---- tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_read_chat_gives_the_tokens_of_transformers(name):
    language, rng = chat_model(TEMPLATES[name]), random.Random(0)
    for _ in range(100):
        chat = made_up_chat(rng, rng.randint(1, 3), name in WITH_SYSTEM and rng.random() < 0.5)
        assert tokens_of(language, chat) == by_transformers(language, chat)


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_come_from_the_template_alone(name):
    """A content that spells them is text: as many control tokens as with any other content."""
    language, rng = chat_model(TEMPLATES[name]), random.Random(0)
    control = language.tokenizer.convert_tokens_to_ids(SPECIAL)
    for _ in range(50):
        chat = made_up_chat(rng, 2, name in WITH_SYSTEM)
        plain = [{**m, "content": "abc"} for m in chat]
        for message in rng.sample(chat, 2):
            spelled = rng.choice(SPECIAL)
            message["content"] += spelled + made_up(rng)
        found = tokens_of(language, chat)
        assert [t for t in found if t in control] == [
            t for t in by_transformers(language, plain) if t in control
        ]
        assert spelled in language.tokenizer.decode([t for t in found if t not in control])


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", ["</s>", "<|im_end|>"]),
        ("llama2", ["</s>"]),
        ("mistral", ["</s>"]),
        ("gemma", ["</s>", "<end_of_turn>"]),
        ("zephyr", ["</s>"]),
    ],
)
def test_end_of_turn_is_what_the_template_writes_after_a_reply(name, ends):
    language = chat_model(TEMPLATES[name])
    assert chats.end_of_turn(language) == set(language.tokenizer.convert_tokens_to_ids(ends))


def test_end_of_turn_of_a_template_that_refuses_other_chats_is_the_tokenizers():
    refuses = "{{ raise_exception('no') if messages | length > 1 }}{{ messages[0]['content'] }}"
    language = chat_model(refuses)
    assert chats.end_of_turn(language) == {language.tokenizer.eos_token_id}
    assert genkit.generate([HELLO], model=language, max_new_tokens=2).finish


# ---- replies


def transformers_reply(
    language: LanguageModel, chat: list[dict[str, str]], count: int
) -> list[int]:
    ids = torch.tensor([by_transformers(language, chat)])
    output = language.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=sorted(chats.end_of_turn(language)),
    )
    return output[0, ids.shape[1] :].tolist()


def test_greedy_replies_are_those_of_transformers_alone_and_in_a_batch(language):
    """Ten conversations of three turns, each answered by what came before."""
    rng = random.Random(0)
    batch = [made_up_chat(rng, 1, i % 2 == 0) for i in range(10)]
    options = {"model": language, "strategy": "greedy", "max_new_tokens": 12}
    finishes = set()
    for turn in range(3):
        together = genkit.generate(batch, **options)
        for i, record in enumerate(together):
            assert record.tokens == transformers_reply(language, batch[i], 12)
            assert genkit.generate(batch[i], **options).tokens == record.tokens
            assert record.messages == [*batch[i], record.message]
            finishes.add(record.finish)
            batch[i] = [*record.messages, user(made_up(rng))]
        assert turn or len(batch) == 10
    assert finishes == {"eos", "length"}


OPTIONS = [
    {"strategy": "greedy"},
    {"strategy": "sample", "temperature": 0.9, "top_p": 0.95, "seed": 3},
    {"strategy": "sample", "seed": 3, "lookup": 4},
    {"strategy": "stochastic", "seed": 4},
    {"strategy": "beam", "beams": 3, "n_best": 2},
    {"strategy": "diverse_beam", "beams": 4},
    {"strategy": "contrastive"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["strategy"]))
def test_a_reply_does_not_depend_on_what_was_kept(language, options):
    keeping, rng = (
        LanguageModel(language.model, language.tokenizer, "keeping"),
        random.Random(1),
    )
    chat = made_up_chat(rng, 1, True)
    for _ in range(3):
        fresh = LanguageModel(language.model, language.tokenizer, "fresh")
        options = {"max_new_tokens": 10} | options
        record, again = (genkit.generate(chat, model=m, **options) for m in (keeping, fresh))
        assert record.tokens == again.tokens and record.finish == again.finish
        assert record.log_probabilities == pytest.approx(again.log_probabilities, abs=1e-4)
        for own, other in zip(record.alternatives, again.alternatives, strict=True):
            assert own.tokens == other.tokens
            assert own.message == {"role": "assistant", "content": own.completion}
        chat = [*record.messages, user(made_up(rng))]


@pytest.mark.parametrize("options", [{"strategy": "greedy"}, {"strategy": "beam"}])
def test_a_second_turn_reads_only_what_is_new(language, options):
    mine = LanguageModel(language.model, language.tokenizer, "mine")
    options |= {"model": mine, "max_new_tokens": 8}
    first = genkit.generate([SYSTEM, user("the the " * 20)], **options)
    chat = [*first.messages, user("And then?")]
    tokens = tokens_of(mine, chat)
    read = tokens_of(mine, first.messages[:-1]) + first.tokens[:-1]  # the last one was not
    with counted(mine) as widths:
        genkit.generate(chat, **options)
    new = len(tokens) - kept_keys.shared_length(tokens, read)
    assert new <= widths[0] <= new + len(first.tokens) * (options["strategy"] == "beam")
    assert len(tokens) > 60 and new < 60


def test_a_retry_and_a_stopped_reply_read_nothing_twice(language):
    mine = LanguageModel(language.model, language.tokenizer, "mine")
    chat = [SYSTEM, user("the the " * 20)]
    pieces = genkit.stream(chat, model=mine, max_new_tokens=8, seed=1)
    next(pieces)
    pieces.close()
    with counted(mine) as widths:
        genkit.generate(chat, model=mine, max_new_tokens=8, seed=2)
    assert widths[0] == 1


def test_several_chats_are_kept(language):
    mine = LanguageModel(language.model, language.tokenizer, "mine")
    batch = [[user(word * 30)] for word in ("the ", "user ", "ing ")]
    options = {"model": mine, "strategy": "greedy", "max_new_tokens": 4}
    rows = genkit.generate(batch, **options)
    with counted(mine) as widths:
        genkit.generate([[*row.messages, user("More")] for row in rows], **options)
    assert all(width < 40 for width in widths[:3])


def test_changed_weights_or_precision_are_read_anew(language):
    mine = chat_model()
    chat = [user("the the " * 20)]
    options = {"model": mine, "strategy": "greedy", "max_new_tokens": 4}
    genkit.generate(chat, **options)
    with torch.no_grad():
        mine.model.lm_head.weight.mul_(-1)
    with counted(mine) as widths:
        changed = genkit.generate(chat, **options)
    assert widths[0] == len(tokens_of(mine, chat))
    assert changed.tokens == transformers_reply(mine, chat, 4)
    mine.precision = "bfloat16"
    assert mine.kept.find(tokens_of(mine, chat)) is None


def test_keys_that_depend_on_the_length_are_not_kept():
    mine = chat_model()
    mine.model.config.rope_parameters["rope_type"] = "dynamic"
    genkit.generate([HELLO], model=mine, max_new_tokens=4)
    assert mine.kept.find(tokens_of(mine, [HELLO])) is None


def test_texts_are_not_kept(language):
    mine = LanguageModel(language.model, language.tokenizer, "mine")
    genkit.generate("the the", model=mine, max_new_tokens=4)
    assert mine.kept.find(mine.tokenizer("the the the").input_ids) is None


def test_a_plain_text_stays_a_plain_prompt(language):
    record = genkit.generate("Hello", model=language, strategy="greedy", max_new_tokens=4)
    assert record.text == "Hello" + record.completion
    assert record.messages is None and record.message is None and record.dropped == []


# ---- what is kept


def kept(tokens: list[int], layers: int = 2) -> KeptText:
    def pool(sign: int) -> list[torch.Tensor]:
        own = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
        return [sign * own.repeat(2, 1, 3) for _ in range(layers)]

    return KeptText(tokens, pool(1), pool(-1))


def test_kept_texts_find_the_longest_beginning():
    rng, texts, everything = random.Random(0), KeptTexts(), []
    for _ in range(200):
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
        expected = max((kept_keys.shared_length(x, tokens[:-1]) for x in everything), default=0)
        found = texts.find(tokens)
        assert (0 if found is None else len(found.tokens)) == expected
        if found is not None:
            assert found.tokens == tokens[:expected]
            assert found.keys[1][0, :, 0].tolist() == found.tokens
            assert (found.values[0] == -found.keys[0]).all()
        texts.add(kept(tokens))
        everything.append(tokens)


def test_kept_texts_are_bounded(monkeypatch):
    size = kept([0] * 10).size
    monkeypatch.setattr(kept_keys, "KEPT", 3 * size)
    texts = KeptTexts()
    for i in range(3):
        texts.add(kept([i] * 10))
    assert texts.find([0] * 11)  # now used last
    texts.add(kept([3] * 10))
    assert [bool(texts.find([i] * 11)) for i in range(4)] == [True, False, True, True]
    texts.add(kept([4] * 100))
    assert not texts.find([3] * 11) and len(texts.find([4] * 99).tokens) == 98


def test_copied_keys_are_those_of_a_branch():
    """After branches, chains and endings, a copy goes on as the text itself would."""
    language, rng = chat_model(), random.Random(0)
    stepper = decoder.Stepper(language.model, "float32")
    prompts = [[rng.randrange(250) for _ in range(rng.randint(2, 9))] for _ in range(4)]
    reader = kv_cache.Tree(stepper, prompts)
    for step in range(6):
        reader.branch([[rng.randrange(len(own)) for _ in range(3)] for own in reader.lines])
        reader.step([[rng.randrange(250) for _ in range(3)] for _ in reader.lines])
        if step == 2:
            reader.keep([0, 2, 3])
    assert reader.texts == [0, 2, 3]
    for text, lines in enumerate(reader.lines):
        for line in lines:
            texts = KeptTexts()
            texts.add(reader.copy_keys(text, [*line, 7, 8]))
            assert len(texts.find([*line, 1]).tokens) == len(line)
            again = kv_cache.Tree(stepper, [[*line, 5, 6]], kept=texts)
            assert (again.logits[0, 0] - again.read_alone(0, 0)).abs().max() < 1e-4


# ---- records


def test_one_chat_gives_a_record_and_several_a_list(language):
    options = {"model": language, "max_new_tokens": 4, "seed": 1}
    record, rows = genkit.generate([HELLO], **options), genkit.generate([[HELLO]], **options)
    assert isinstance(rows, list) and [row.tokens for row in rows] == [record.tokens]
    assert record.text == str(record) == record.completion == record.message["content"]
    assert record.messages == [HELLO, {"role": "assistant", "content": record.completion}]
    assert record.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert genkit.generate((HELLO,), **options).tokens == record.tokens


def test_stream_gives_the_pieces_and_records_of_generate(language):
    batch, options = [[HELLO], [SYSTEM, HELLO]], {"model": language, "seed": 2, "max_new_tokens": 9}
    rows, written = genkit.generate(batch, **options), ["", ""]
    for piece in genkit.stream(batch, **options):
        written[piece.row] += piece.text
        if piece.record:
            assert piece.record.messages == rows[piece.row].messages
    assert written == [row.completion for row in rows]


def test_prefix_and_stop_hold_in_a_reply(language):
    options = {"model": language, "strategy": "greedy", "max_new_tokens": 30}
    record = genkit.generate([HELLO], prefix="the user", min_new_tokens=30, **options)
    assert record.message["content"].startswith("the user")
    stop = record.completion[10:11]
    stopped = genkit.generate([HELLO], prefix="the user", stop=stop, **options)
    assert (
        stopped.completion == record.completion[: record.completion.index(stop, 8)]
    )  # after the prefix


def test_an_end_of_turn_that_is_not_marked_special_is_no_part_of_the_reply():
    language = chat_model("{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}")
    language.tokenizer.add_tokens("<turn>")
    end = language.tokenizer.convert_tokens_to_ids("<turn>")
    language.model.resize_token_embeddings(end + 1)
    with torch.no_grad():
        language.model.lm_head.weight[end] = 0  # a logit of 0: some replies end so
        language.model.lm_head.weight[language.tokenizer.all_special_ids] = 0
    options = {"model": language, "seed": 0, "temperature": 3.0, "max_new_tokens": 40}
    batch = [[HELLO]] * 30
    written = [""] * len(batch)
    for piece in genkit.stream(batch, bad_words="turn", **options):
        written[piece.row] += piece.text
    rows = genkit.generate(batch, bad_words="turn", **options)
    assert written == [row.completion for row in rows]
    assert any(row.tokens[-1] == end and row.finish == "eos" for row in rows)
    assert not any("<turn>" in row.completion for row in rows)


def test_alternatives_read_a_reply_after_its_chat(language):
    chat = [user("Say <|im_end|>")]
    record = genkit.generate(chat, model=language, strategy="greedy", max_new_tokens=5)
    colours = genkit.alternatives(record, model=language)
    logs = [choice.log_probability for choice in colours.choices]
    assert logs == pytest.approx(record.log_probabilities, abs=1e-4)
    assert all(choice.rank == 1 for choice in colours.choices)


def test_a_saved_model_brings_its_template(tmp_path):
    save_chat_model(tmp_path)
    record = genkit.generate([HELLO], model=tmp_path, max_new_tokens=3, seed=1)
    assert record == genkit.generate([HELLO], model=chat_model(), max_new_tokens=3, seed=1)


# ---- chats that are too long


def test_overflow_is_an_error_with_numbers():
    language, chat = chat_model(context=64), [user("the " * 30), HI, user("Hello")]
    count = len(by_transformers(language, chat))
    wanted = rf"prompt: .* {count} tokens; with max_new_tokens=30 .* context of 64;.*drop_oldest"
    with pytest.raises(ValueError, match=wanted):
        genkit.generate(chat, model=language, max_new_tokens=30)
    with pytest.raises(ValueError, match=r"prompt\[1\]: "):
        genkit.generate([[HELLO], chat], model=language, max_new_tokens=30)
    room = genkit.generate([HELLO], model=language, strategy="greedy", max_new_tokens=44)
    assert room.dropped == []


def test_overflow_drops_the_oldest_turns_and_says_which():
    language, rng = chat_model(context=96), random.Random(0)
    for turns in range(1, 8):
        for system in (False, True):
            chat = made_up_chat(rng, turns, system)
            options = {"model": language, "strategy": "greedy", "max_new_tokens": 20}
            record = genkit.generate(chat, overflow="drop_oldest", **options)
            read, split = record.messages[:-1], system + len(record.dropped)
            assert record.dropped == chat[system:split] and len(record.dropped) % 2 == 0
            assert read == [*chat[:system], *chat[split:]]
            assert record.tokens == genkit.generate(read, **options).tokens
            if record.dropped:  # one turn more would not have fitted
                more = [*chat[:system], *chat[split - 2 :]]
                assert len(by_transformers(language, more)) > 96 - 20


def test_overflow_never_drops_the_last_turn():
    language = chat_model(context=64)
    chat = [HELLO, HI, user("the " * 60)]
    with pytest.raises(ValueError, match=r"prompt: the last turn alone is \d+ tokens"):
        genkit.generate(chat, model=language, overflow="drop_oldest", max_new_tokens=10)


def test_overflow_is_for_chats(language):
    with pytest.raises(ValueError, match="overflow='drop_oldest' is for chats"):
        genkit.generate("Hello", model=language, overflow="drop_oldest")
    with pytest.raises(ValueError, match=r"overflow .* got 'drop'"):
        genkit.generate([HELLO], model=language, overflow="drop")
    with pytest.raises(ValueError, match="parse_special=False is for texts"):
        genkit.generate([HELLO], model=language, parse_special=False)


# ---- bad chats


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], r"prompt: \[\] is empty"),
        ([[]], r"prompt\[0\]: the chat has no message"),
        (HELLO, "prompt: .* is one message"),
        ([HELLO, "Hi"], r"prompt\[1\] must be a message"),
        (["Hi", HELLO], r"prompt\[1\] must be a text"),
        ([[HELLO], "Hi"], r"prompt\[1\] must be a chat"),
        ([[HELLO], [HELLO, "Hi"]], r"prompt\[1\]\[1\] must be a message"),
        ([{"content": "Hi"}], r"prompt\[0\]: 'role' is missing"),
        ([HELLO, HI, {"role": "user"}], r"prompt\[2\]: 'content' is missing"),
        ([{"role": "robot", "content": "Hi"}], r"prompt\[0\]: role .*'robot'"),
        ([{"role": "tool", "content": "Hi"}], r"prompt\[0\]: role .*'tool'"),
        ([HELLO | {"tool_calls": []}], r"prompt\[0\]: 'tool_calls'"),
        ([user([{"type": "image", "url": "x.png"}])], r"prompt\[0\]: content .*images"),
        ([user(None)], r"prompt\[0\]: content must be a text, got None"),
        ([HELLO, HELLO], r"prompt\[1\]: role 'user' is out of order"),
        ([HI, HELLO], r"prompt\[0\]: role 'assistant' is out of order"),
        ([HELLO, SYSTEM], r"prompt\[1\]: role 'system' is out of order"),
        ([SYSTEM, SYSTEM, HELLO], r"prompt\[1\]: role 'system' is out of order"),
        ([SYSTEM, HELLO, HI, HI], r"prompt\[3\]: role 'assistant' is out of order"),
        ([HELLO, HI], r"prompt\[1\]: the last message must be the user's, .* prefix"),
        ([HELLO, HI, user("\ud800")], r"prompt\[2\]: content is not valid Unicode"),
        ("\ud800", "prompt is not valid Unicode"),
        ([SYSTEM], r"prompt\[0\]: the last message must be the user's"),
    ],
)
def test_bad_chats_are_named_before_a_model_is_loaded(chat, message):
    with pytest.raises(ValueError, match=message) as error:
        genkit.generate(chat, model="no/such/model")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        genkit.stream(chat, model="no/such/model")


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, [HELLO], "prompt: tiny-chat has no chat template"),
        (TEMPLATES["gemma"], [SYSTEM, HELLO], "prompt .*System role not supported"),
        (
            TEMPLATES["mistral"],
            [[HELLO], [SYSTEM, HELLO]],
            r"prompt\[1\] .*Only user and assistant",
        ),
        ("{{ messages[0].content[:3] / 2 }}", [HELLO], "prompt .*unsupported operand"),
        ("{% for m in %}", [HELLO], "prompt .*tiny-chat: "),
        ("{{ messages.__class__.mro() }}", [HELLO], "prompt .*unsafe"),
        ("{% if messages | length > 5 %}x{% endif %}", [HELLO], "prompt: .* writes nothing"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            [SYSTEM, HELLO],
            r"prompt\[0\]: .* leaves out system messages",
        ),
    ],
)
def test_chats_that_the_template_cannot_write_are_errors(template, chat, message):
    with pytest.raises(ValueError, match=message) as error:
        genkit.generate(chat, model=chat_model(template))
    assert "\n" not in str(error.value)


# ---- a real model


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_replies_of_a_real_model_are_those_of_transformers(real_model):
    """Ten conversations of three turns, in a batch; later turns read only what is new."""
    language = load_language_model(real_model("smollm2"))
    batch = [[user(asked[0])] for asked in CONVERSATIONS]
    read: list[list[int]] = [[] for _ in batch]
    for turn in range(3):
        with counted(language) as widths:
            rows = genkit.generate(batch, model=language, strategy="greedy", max_new_tokens=40)
        for i, record in enumerate(rows):
            tokens = by_transformers(language, batch[i])
            assert widths[i] == len(tokens) - kept_keys.shared_length(tokens[:-1], read[i])
            assert not turn or widths[i] < 40
            check_greedy(
                language, tokens, record.tokens, transformers_reply(language, batch[i], 40)
            )
            read[i] = tokens + record.tokens[:-1]
            if turn < 2:
                batch[i] = [*record.messages, user(CONVERSATIONS[i][turn + 1])]


def check_greedy(
    language: LanguageModel, prompt: list[int], found: list[int], expected: list[int]
) -> None:
    """Check that two completions are the same, or part where two tokens are equally likely."""
    if found == expected:
        return
    same = kept_keys.shared_length(found, expected)
    with torch.inference_mode():
        logits = language.model(torch.tensor([prompt + found[:same]])).logits[0, -1]
    assert abs(logits[found[same]] - logits[expected[same]]) < 1e-3


@pytest.mark.parametrize("prompt", ["Once", [{"role": "user", "content": "Hi {there}"}]])
def test_the_usage_of_a_card_runs_as_printed(tmp_path, capsys, monkeypatch, prompt):
    save_chat_model(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    names = {"model": "tuned"}
    exec(TEXT_USAGE.format(prompt=prompt), names)
    written = genkit.generate(prompt, model=tmp_path / "tuned", seed=1)
    assert capsys.readouterr().out.endswith(f"{written}\n") and names["prompt"] == prompt
