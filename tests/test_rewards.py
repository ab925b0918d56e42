"""Rewards: built in, functions, and models that plain transformers scores alike."""

import pytest
import torch
from builders import byte_model, small_model
from chat_models import TEMPLATES, chat_model, chat_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import genkit
from genkit.models import lm
from genkit.models.reward_model import make_reward_model, rewards
from genkit.text.rewards import Reward, check_chats, describe_reading, load_reward

FUNCTIONS = """
import numpy

def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]

def of_numpy(prompts, completions):
    return list(numpy.ones(len(completions), "float32"))

def broken(prompts, completions):
    return [float("nan")] * len(completions)

def short(prompts, completions):
    return [0.0]

number = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_built_in_rewards():
    prompts = ["a", "b"]
    assert load_reward("length=4")(prompts, ["abcd", "ab"]) == [0.0, -0.5]
    assert load_reward(r"format=[a-z]+")(prompts, ["ab\ncd\n1", ""]) == [2 / 3, 0.0]
    longest = load_reward("format=" + "a?" * 200)  # no name of a file
    assert longest(prompts, ["aa", "b"]) == [1.0, 0.0]
    good, bad = load_reward("sentiment")(prompts, ["What a wonderful day!", "I hate this."])
    assert -1 <= bad < 0 < good <= 1


def test_a_function_of_the_users(functions):
    reward = load_reward("my_rewards:vowels")
    assert reward(["x", "y"], ["abe", "xyz"]) == [2 / 3, 0.0]
    assert load_reward("my_rewards:of_numpy")(["x"], ["y"]) == [1.0]
    assert reward.sha256 != load_reward("my_rewards:broken").sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards:broken", "reward: my_rewards:broken gave nan for 'a'"),
        ("my_rewards:short", "reward: my_rewards:short gave 1 numbers for 2"),
        ("my_rewards:number", "reward: my_rewards:number is no function"),
        ("my_rewards:none", "reward: cannot import my_rewards:none"),
        ("length=0", "reward: length=N takes a number of characters, got length=0"),
        ("length", "reward: length=N takes a number"),
        ("format=(", "reward: format='\\(' is no regular expression"),
        ("sentiment=1", "reward: sentiment takes no value"),
        ("no/such/reward", "reward"),
    ],
)
def test_what_is_no_reward(functions, name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)(["p", "q"], ["a", "b"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_reward_model_scores_as_transformers_does(tmp_path, architecture):
    language = small_model(architecture)
    network = make_reward_model(language.model, language.tokenizer).eval()
    assert network.config.pad_token_id != language.tokenizer.eos_token_id
    torch.nn.init.normal_(network.score.weight)
    network.save_pretrained(tmp_path)
    lm.save_tokenizer(language.tokenizer, tmp_path)

    prompts, texts = ["the ", "a ", "in "], ["cat", "house by the sea", ""]
    found = load_reward(str(tmp_path), "cpu")(prompts, texts)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.padding_side = "right"
    for prompt, text, score in zip(prompts, texts, found, strict=True):
        alone = model(**tokenizer(prompt + text, return_tensors="pt")).logits
        assert alone.shape == (1, 1) and alone.item() == pytest.approx(score, abs=1e-5)
    batch = tokenizer([p + t for p, t in zip(prompts, texts, strict=True)], padding=True)
    together = model(**{k: torch.tensor(v) for k, v in batch.items()}).logits[:, 0]
    torch.testing.assert_close(together, torch.tensor(found), rtol=1e-4, atol=1e-5)


def test_the_reward_is_read_at_the_last_token_even_if_it_ends_the_text():
    language = byte_model()
    end = language.tokenizer.eos_token_id
    network = make_reward_model(language.model, language.tokenizer).eval()
    torch.nn.init.normal_(network.score.weight)
    rows = [[1, 2, 3, end], [4, 5]]
    together = rewards(network, network.config.pad_token_id, rows, network.device)
    for row, score in zip(rows, together, strict=True):
        states = network.transformer(torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(network.score(states)[0, -1, 0], score)


def test_a_reward_that_is_loaded_is_returned():
    reward = Reward("mine", lambda prompts, texts: [1.0] * len(texts), "0")
    assert load_reward(reward) is reward and reward(["p"], ["a"]) == [1.0]


# ---- chats

HELLO = [{"role": "user", "content": "is it so"}]
LONGER = [*HELLO, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why <s>"}]
SYSTEM = [{"role": "system", "content": "be brief"}, *HELLO]
PLAIN = "{% for m in messages %}{{ '#' + m['role'][0] + ' ' + m['content'] + '\n' }}{% endfor %}"


def chat_reward(folder, template, tokenizer=None):
    """Save a reward model that reads chats by a template, by characters or a tokenizer."""
    language = small_model("llama")
    tokenizer = tokenizer or language.tokenizer
    language.model.resize_token_embeddings(len(tokenizer))
    network = make_reward_model(language.model, tokenizer)
    torch.nn.init.normal_(network.score.weight)
    tokenizer.chat_template = template
    network.save_pretrained(folder)
    lm.save_tokenizer(tokenizer, folder)
    return load_reward(str(folder), "cpu")


def test_a_reward_model_reads_chats_by_its_own_template(tmp_path):
    reward = chat_reward(tmp_path, PLAIN)
    prompts, texts = [HELLO, LONGER, SYSTEM, HELLO], ["no.", "", "</s> a", " as i am\n"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for prompt, text, found in zip(prompts, texts, reward(prompts, texts), strict=True):
        chat = [*prompt, {"role": "assistant", "content": text}]
        rows = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        assert model(**rows).logits.item() == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize(
    ("template", "prompts", "message"),
    [
        (None, [HELLO], "prompts: prompt 0: .* has no chat template"),
        (TEMPLATES["mistral"], [HELLO, SYSTEM], "prompts: prompt 1 .*Only user and assistant"),
    ],
)
def test_chats_that_a_reward_model_cannot_read_are_named(tmp_path, template, prompts, message):
    reward = chat_reward(tmp_path, template, chat_tokenizer())
    for prompt in ("a text", *prompts[:-1]):
        check_chats(reward, [prompt])
    with pytest.raises(ValueError, match=message):
        check_chats(reward, prompts)
    policy = chat_model()
    with pytest.raises(ValueError, match=message):
        genkit.compare(policy, policy, prompts=prompts, reward=reward)
    check_chats(load_reward("length=3"), prompts)


def test_describe_reading_names_what_is_another(tmp_path):
    reward = chat_reward(tmp_path, TEMPLATES["chatml"], chat_tokenizer())
    alike, other = chat_tokenizer(), chat_tokenizer(TEMPLATES["zephyr"])
    assert "<pad>" in reward.language.tokenizer.get_vocab().keys() - alike.get_vocab().keys()
    for prompts in (["a"], [HELLO]):
        assert describe_reading(reward, prompts, alike) is None
        assert describe_reading(load_reward("length=3"), prompts, other) is None
    assert describe_reading(reward, ["a"], other) is None
    assert "chat template" in describe_reading(reward, [HELLO], other)
    assert "tokenizer" in describe_reading(reward, ["a"], small_model("llama").tokenizer)
