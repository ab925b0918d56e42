"""Reward models and alignment: the recipes learn, go on exactly, and do not depend on processes."""

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ON_CPU, TWO, log_of, run_here, weights_of
from chat_models import save_chat_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import genkit
from genkit.errors import clean_errors
from genkit.hub import kinds, staging
from genkit.text.comparison import wilson_interval
from genkit.text.rewards import load_reward
from genkit.training.rollouts import completion_seed

PROMPTS = ["the ", "a ", "in ", "no ", "to ", "is ", "it ", "as ", "on ", "he "]
TINY = "--batch_size 8 --val_fraction 0.2 --warmup 0 --learning_rate 0.003 --max_new_tokens 6"
LENGTH = "--max_steps 6 --evaluations 2 --save_steps 2 --keep_checkpoints 9"
ONLINE = ("ppo", "grpo", "rloo")
DRAWN, REST = ("grpo", "rloo"), ("ppo", "rloo", "dpo")
SLOW = pytest.mark.slow
REWARD = "rewards_of_this_test:vowels"
VOWELS = """
def vowels(prompts, completions):
    return [sum(letter in "aeio" for letter in text) / 6 for text in completions]
"""


@pytest.fixture(scope="module")
def home(trained, tmp_path_factory):
    """A model to start from, prompts, and pairs of which the one with more a's is preferred."""
    home = tmp_path_factory.mktemp("home")
    unlogged = shutil.ignore_patterns("checkpoints", "samples", "metrics.jsonl", "run.json")
    shutil.copytree(trained, home / "base", ignore=unlogged)
    (home / "rewards_of_this_test.py").write_text(VOWELS)
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_pairs(home / "pairs.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        yield home


def write_pairs(path: Path) -> None:
    rng, lines = np.random.default_rng(0), []
    for i in range(60):
        texts = ["".join(rng.choice(list("aeo"), 5)) for _ in range(2)]
        chosen, rejected = sorted(texts, key=lambda text: (-text.count("a"), text))
        if chosen != rejected:
            row = {"prompt": PROMPTS[i % 10], "chosen": chosen, "rejected": rejected}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def words_for(method: str, home) -> list:
    source = ["--prompts", home / "prompts.txt", "--reward", REWARD]
    if method == "grpo":
        source += ["--group_size", "4"]  # two groups: one for each of two processes
    if method == "dpo":
        source = ["--data", home / "pairs.jsonl"]
    start = ["--method", method, "--init_from", home / "base"]
    return [*TINY.split(), *LENGTH.split(), *start, *source]


@pytest.fixture(scope="module")
def aligned(home, tmp_path_factory):
    """The folder of a finished run of each method, made when it is first asked for."""
    made: dict = {}

    def run(method: str):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("aligned") / method
            run_here("align", *words_for(method, home), "--output_dir", made[method])
        return made[method]

    return run


@pytest.mark.parametrize("method", ["ppo", "dpo", *(pytest.param(m, marks=SLOW) for m in DRAWN)])
def test_a_run_leaves_all_that_it_promises(aligned, method):
    folder = aligned(method)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"}
    pages = sorted((folder / "samples").iterdir())
    assert len(pages) == 3 and "Reference" in pages[-1].read_text()
    steps = [line for line in log_of(folder) if line["step"] and "loss" in line]
    if method != "dpo":
        logged = {"reward", "kl", "kl_k3", "beta", "entropy", "tokens", "ended", "clipped"}
        assert all(line.keys() >= logged | {"groups_alike"} for line in steps)
        assert all(line["kl_k3"] >= 0 for line in steps)
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
        assert "64 completions of validation prompts" in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = model.generate(
        **tokenizer("the ", return_tensors="pt"), do_sample=False, max_new_tokens=6
    )
    own = genkit.generate("the ", model=folder, strategy="greedy", max_new_tokens=6)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == own.text
    assert method.upper() in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", ["ppo", "dpo", *(pytest.param(m, marks=SLOW) for m in DRAWN)])
def test_a_run_goes_on_exactly(aligned, home, tmp_path, method):
    whole, folder = aligned(method), tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-0000000{step}")
    run_here("align", "--output_dir", folder, "--resume")
    assert weights_of(folder) == weights_of(whole)
    assert [without_time(line) for line in log_of(folder)] == [
        without_time(line) for line in log_of(whole)
    ]


def without_time(line: dict) -> dict:
    return {name: value for name, value in line.items() if name != "seconds"}


@pytest.mark.parametrize("method", ["grpo", *(pytest.param(m, marks=SLOW) for m in REST)])
def test_the_reward_rises(home, tmp_path, method):
    length = ["--max_steps", "40", "--evaluations", "1", "--beta", "0.01", "--batch_size", "32"]
    words = [*words_for(method, home), *length, "--learning_rate", "0.005"]
    run_here("align", *words, "--output_dir", tmp_path / "run")
    log = log_of(tmp_path / "run")
    if method == "dpo":
        assert log[-1]["accuracy"] > 0.8 and log[-1]["chosen"] > log[-1]["rejected"]
    else:
        rewards = [line["reward"] for line in log if "reward" in line]  # of 32 completions each
        assert np.mean(rewards[-5:]) > np.mean(rewards[:2]) + 0.2
        assert log[-1]["kl"] > 0


def test_a_run_that_makes_nothing_better_says_so(home, tmp_path, capsys):
    words = ["--max_steps", "1", "--evaluations", "1", "--beta", "10", "--learning_rate", "0.1"]
    run_here("align", *words_for("grpo", home), *words, "--output_dir", tmp_path / "run")
    assert log_of(tmp_path / "run")[-1]["objective"] < log_of(tmp_path / "run")[0]["objective"]
    assert "it is the one that the run began from" in capsys.readouterr().out
    files = [folder / "model.safetensors" for folder in (tmp_path / "run", home / "base")]
    assert len({file.read_bytes() for file in files}) == 1


@SLOW
def test_a_divergence_that_costs_much_stays_small(home, tmp_path):
    """At a large β the policy stays where it was."""
    found = {}
    for beta in ("0.01", "10"):
        words = [*words_for("grpo", home), "--max_steps", "30", "--batch_size", "32"]
        run_here("align", *words, "--beta", beta, "--output_dir", tmp_path / beta)
        found[beta] = log_of(tmp_path / beta)[-1]["kl"]
    assert found["10"] < found["0.01"] / 4


@pytest.mark.slow
def test_the_coefficient_adapts_and_is_restored(home, tmp_path):
    words = [*words_for("ppo", home), "--kl_target", "0.0001", "--learning_rate", "0.01"]
    run_here("align", *words, "--output_dir", tmp_path / "run")
    betas = [line["beta"] for line in log_of(tmp_path / "run") if "beta" in line]
    assert betas[-1] > betas[0] == pytest.approx(0.05)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run_here("align", "--output_dir", tmp_path / "run", "--resume")
    again = [line["beta"] for line in log_of(tmp_path / "run") if "beta" in line]
    assert again == betas


@SLOW
def test_adapters_are_merged_into_what_is_saved(home, tmp_path):
    words = [*words_for("grpo", home), "--lora_rank", "2"]
    run_here("align", *words, "--output_dir", tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_config.json" not in names
    assert genkit.generate("the ", model=tmp_path / "run", seed=1, max_new_tokens=4).tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--method ppo --prompts {home}/prompts.txt",
            "--reward is missing",
        ),
        ("--method dpo", "--data is missing; --method dpo"),
        (
            "--method grpo --group_size 1 --reward length=3 --prompts {home}/prompts.txt",
            "2 or more",
        ),
        (
            "--method dpo --data {home}/pairs.jsonl --prompts x",
            "--prompts x is not for",
        ),
        ("--method dpo --data {home}/none.jsonl", "data: .*none.jsonl"),
        ("--reward length=3 --prompts {home}/none.txt", "prompts: .*none.txt"),
        ("--reward nothing=3 --prompts {home}/prompts.txt", "reward: .*nothing=3"),
        ("--reward length=3 --prompts {home}/prompts.txt --max_new_tokens 99", "max_new_tokens=99"),
        ("--reward length=3 --prompts {home}/prompts.txt --batch_size 6 --updates 4", "8 would"),
        (
            "--init_revision main --reward length=3 --prompts {home}/prompts.txt",
            "--init_revision main .*folder",
        ),
        ("--init_from {home}/none --reward length=3 --prompts {home}/prompts.txt", "init_from"),
    ],
)
def test_bad_input_ends_with_one_clear_line(home, tmp_path, capsys, words, message):
    given = words.format(home=home).split()
    base = [] if "--init_from" in given else ["--init_from", str(home / "base")]
    with pytest.raises(SystemExit) as stopped, clean_errors():
        run_here("align", *base, *given, "--max_steps", "1", "--output_dir", tmp_path / "run")
    assert stopped.value.code == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", [*ONLINE, "dpo"])
def test_two_processes_draw_the_same_and_learn_the_same(aligned, home, train, tmp_path, method):
    done = train(
        *words_for(method, home),
        *("--output_dir", tmp_path / "two"),
        recipe="align",
        launcher=TWO,
        env=ON_CPU | {"PYTHONPATH": str(home)},
    )
    assert done.returncode == 0, done.stderr
    one, two = (log_of(folder) for folder in (aligned(method), tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert without_time(b) == pytest.approx(without_time(a), rel=1e-5, abs=1e-5)
    pages = [sorted((f / "samples").iterdir()) for f in (aligned(method), tmp_path / "two")]
    assert [p.read_text() for p in pages[0]] == [p.read_text() for p in pages[1]]


# ---- reward models


@pytest.fixture(scope="module")
def rewarding(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    words = "--batch_size 8 --max_steps 60 --evaluations 2 --save_steps 20 --keep_checkpoints 9"
    words += " --learning_rate 0.003 --val_fraction 0.3 --mixed_precision no"
    source = ("--init_from", home / "base", "--data", home / "pairs.jsonl")
    run_here("train_reward", *words.split(), *source, "--output_dir", folder)
    return folder


def test_a_reward_model_learns_what_is_preferred(rewarding):
    log = log_of(rewarding)
    assert log[-1]["accuracy"] > 0.8
    reward = load_reward(str(rewarding), "cpu")
    more, less = reward(["the ", "the "], ["aaaaa", "oeoeo"])
    assert more > less
    score = pipeline("text-classification", str(rewarding), function_to_apply="none")
    assert score("the aaaaa")[0]["score"] == pytest.approx(more, abs=1e-5)


@pytest.mark.parametrize(
    "verb",
    [
        genkit.load,
        lambda model: genkit.generate("the ", model=model),
        lambda model: genkit.answer("What?", "the rain", model=model),
        lambda model: genkit.compare(model, model, prompts=["the "], reward=REWARD),
        lambda model: genkit.attack("the rain is on the train", model=model),
    ],
)
def test_a_reward_model_given_as_model_says_what_it_is_for(rewarding, verb):
    with pytest.raises(ValueError, match=r"model.*genkit compare --reward.*align\.py --reward"):
        verb(rewarding)


def test_what_is_no_reward_model_says_what_it_is(home):
    with pytest.raises(ValueError, match=r"reward.*base.*language model.*genkit\.generate"):
        load_reward(str(home / "base"), "cpu")


@pytest.mark.slow
def test_the_check_of_a_push_loads_a_reward_model(rewarding, tmp_path):
    kind = kinds.kind_of(rewarding)
    assert kind == kinds.REWARD
    staging.validate(rewarding, kind)
    headless = tmp_path / "headless"
    shutil.copytree(rewarding, headless, ignore=shutil.ignore_patterns("checkpoints"))
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not load.*score"):
        staging.validate(headless, kind)


def test_training_a_reward_model_goes_on_exactly(rewarding, tmp_path):
    shutil.copytree(rewarding, tmp_path / "run")
    for step in (40, 60):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-000000{step}")
    run_here("train_reward", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(rewarding)


@pytest.mark.slow
def test_a_policy_learns_from_a_reward_model(rewarding, home, tmp_path):
    words = [*words_for("rloo", home), "--reward", rewarding, "--gold", "length=6"]
    run_here("align", *words, "--output_dir", tmp_path / "run")
    assert {"val_reward", "val_gold"} <= log_of(tmp_path / "run")[-1].keys()


# ---- chats


@pytest.fixture(scope="module")
def chatting(home, tmp_path_factory):
    """Folders of a chat model, of a reward model with another template, of a policy by it."""
    folder = tmp_path_factory.mktemp("chats")
    save_chat_model(folder / "base")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    rows = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    rows = [
        json.dumps({"prompt": chat, "chosen": "aaa", "rejected": "ooo" + "e" * (i % 3)})
        for i, chat in enumerate(chats)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    words = "--batch_size 8 --max_steps 10 --evaluations 1 --learning_rate 0.003"
    source = ("--init_from", home / "base", "--data", folder / "pairs.jsonl")
    run_here("train_reward", *words.split(), *source, "--output_dir", folder / "reward")
    words = f"{TINY} --method rloo --max_steps 2 --evaluations 1"
    source = ("--init_from", folder / "base", "--prompts", folder / "prompts.jsonl")
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        run_here(
            *("align", *words.split(), *source, "--reward", folder / "reward"),
            *("--output_dir", folder / "policy"),
        )
    return folder, written.getvalue()


@SLOW
def test_a_reward_model_scores_chats_of_another_model_as_transformers_does(chatting):
    folder, said = chatting
    assert "reward has another chat template" in said
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    assert tokenizer.chat_template not in (
        None,
        AutoTokenizer.from_pretrained(folder / "base").chat_template,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    page = sorted((folder / "policy" / "samples").iterdir())[-1].read_text()
    found = re.findall(r"(Reference|Policy), reward (.*)\n\n~~~text\n((?s:.*?))\n~~~\n", page)
    asked = [prompt for prompt in re.findall(r"^## (.*)$", page, re.M) for _ in range(2)]
    assert len(found) == len(asked) == 4
    for prompt, (_, reward, text) in zip(asked, found, strict=True):
        [asked_of] = [each for each in PROMPTS if each.strip() == prompt]
        chat = [{"role": "user", "content": asked_of}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)[-32:]  # it reads the end
        assert model(torch.tensor([ids])).logits.item() == pytest.approx(float(reward), abs=1e-3)


@SLOW
@pytest.mark.parametrize("name", ["policy", "reward"])
def test_the_usage_on_the_card_of_chats_runs_as_printed(chatting, name, monkeypatch, capsys):
    folder, _ = chatting
    readme = (folder / name / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    assert '"role": "user"' in code or "'role': 'user'" in code
    monkeypatch.chdir(folder)
    exec(code, {})
    printed = capsys.readouterr().out
    if name == "reward":
        assert math.isfinite(float(printed))
    else:
        prompt = ModelCard(readme).data.widget[0]["messages"]
        assert printed.endswith(f"{genkit.generate(prompt, model=folder / name, seed=1)}\n")


# ---- comparing


def test_a_model_is_level_with_itself_and_apart_from_another(home, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
    shutil.copytree(home / "base", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    options = {"prompts": PROMPTS, "reward": REWARD, "max_new_tokens": 6, "seed": 3}
    same = genkit.compare(home / "base", home / "base", **options)
    assert same.win_rate == 0.5 and same.kl == 0.0 and same.reward == same.reference_reward
    found = genkit.compare(tmp_path / "other", home / "base", **options)
    assert found.interval[0] < found.win_rate < found.interval[1]
    assert found.kl != 0 and "nats a completion" in str(found)
    swapped = genkit.compare(home / "base", tmp_path / "other", **options)
    assert swapped.win_rate == pytest.approx(1 - found.win_rate)
    assert [row.text for row in swapped.rows] == [row.reference_text for row in found.rows]


def test_the_interval_of_a_share():
    low, high = wilson_interval(0.8, 100)
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert wilson_interval(1.0, 10)[1] == 1.0 and wilson_interval(1.0, 10)[0] == pytest.approx(
        0.7225, abs=1e-4
    )


def test_seeds_of_completions_are_all_different():
    seeds = {completion_seed(s, p, k) for s in range(3) for p in range(20) for k in range(5)}
    assert len(seeds) == 300 and min(seeds) >= 0 and max(seeds) < 1 << 63
