"""Fine-tuning on demonstrations: answers alone are learnt, of texts and of chats."""

import json
import shutil

import pytest
import torch
from builders import ON_CPU, TWO, log_of, run_here, weights_of
from huggingface_hub import ModelCard
from test_finetune import byte_level_tokenizer, small_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import genkit
from genkit.data import dialogues
from genkit.text.dialogue_tokens import encode_dialogue
from genkit.text.language_model import load_language_model

WORDS = (
    "--batch_size 4 --compile no --mixed_precision no --max_steps 100 --evaluations 2 --warmup 0"
)
WORDS += " --learning_rate 0.01 --save_steps 50 --keep_checkpoints 9 --val_fraction 0.2"


@pytest.fixture(scope="module")
def home(text_file, tmp_path_factory):
    """A model to start from, and questions with answers of several lengths, as texts and chats."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = byte_level_tokenizer(text_file.read_text())
    small_gpt2(len(tokenizer), context=96).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    texts, chats = [], []
    for number in range(20):
        question, answer = f"{number % 7} to {number}?", "yes no yes" if number % 6 == 5 else "yes"
        texts.append({"prompt": question, "completion": answer})
        user, assistant = ({"role": r} for r in ("user", "assistant"))
        again = [user | {"content": "Hi"}, assistant | {"content": "Hi"}] * (number % 2)
        asked = [*again, user | {"content": question}]
        chats.append({"messages": [*asked, assistant | {"content": answer}]})
    for name, rows in (("texts", texts), ("chats", chats)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="module", params=["texts", "chats"])
def tuned(request, home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    source = ("--init_from", home / "base", "--data", home / f"{request.param}.jsonl")
    run_here("finetune_gpt2", *WORDS.split(), *source, "--output_dir", folder)
    return folder


def test_the_loss_is_that_of_transformers_with_labels_on_answers(tuned, home):
    log = [line for line in log_of(tuned) if "val_loss" in line]
    best = min(line["val_loss"] for line in log)
    assert best < log[0]["val_loss"] / 2
    found = dialogues.read_demonstrations(str(home / f"{tuned.name}.jsonl"))
    _, held = dialogues.split(found, 0.2, "data")
    language = load_language_model(str(tuned), device="cpu")
    nats = tokens = 0
    for each in held:
        row = encode_dialogue(each.prompt, each.answer, language, "row")
        labels = [t if answer else -100 for t, answer in zip(row.ids, row.answers, strict=True)]
        ids = torch.tensor([row.ids])
        loss = language.model(input_ids=ids, labels=torch.tensor([labels])).loss
        nats, tokens = nats + loss.item() * row.count, tokens + row.count
    assert nats / tokens == pytest.approx(best, rel=1e-4)


def test_it_answers_in_plain_transformers_as_here(tuned, home):
    found = dialogues.read_demonstrations(str(home / f"{tuned.name}.jsonl"))
    prompt = found[0].prompt
    own = genkit.generate(prompt, model=tuned, strategy="greedy", max_new_tokens=12)
    assert own.completion
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    assert (tokenizer.chat_template is not None) == (tuned.name == "chats")
    if tuned.name == "chats":
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    out = model.generate(**ids, do_sample=False, max_new_tokens=12)
    answer = out[0][ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == own.completion
    assert pipeline("text-generation", str(tuned))(prompt, max_new_tokens=2)


def test_the_example_on_the_card_is_a_prompt_of_the_data(tuned, home):
    readme = (tuned / "README.md").read_text()
    (example,) = ModelCard(readme).data.widget
    prompt = example["text" if tuned.name == "texts" else "messages"]
    found = dialogues.read_demonstrations(str(home / f"{tuned.name}.jsonl"))
    assert prompt in [each.prompt for each in found] and f"\nprompt = {prompt!r}\n" in readme


def test_a_run_goes_on_exactly(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000100")
    run_here("finetune_gpt2", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(tuned)
    assert log_of(tmp_path / "run") == log_of(tuned)


def test_a_batch_in_parts_is_the_same_batch(home, tmp_path):
    """Parts have different numbers of tokens: the loss is divided by those of the whole batch."""
    source = ("--init_from", home / "base", "--data", home / "texts.jsonl")
    losses = []
    for parts in ("1", "4"):
        words = (
            *WORDS.split(),
            *source,
            "--max_steps",
            "2",
            "--evaluations",
            "1",
            "--gradient_accumulation",
            parts,
        )
        run_here("finetune_gpt2", *words, "--output_dir", tmp_path / parts)
        losses.append([line["loss"] for line in log_of(tmp_path / parts) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_two_processes_learn_the_same(tuned, home, train, tmp_path):
    source = ("--init_from", home / "base", "--data", home / f"{tuned.name}.jsonl")
    words = (*WORDS.split(), *source, "--output_dir", tmp_path / "run")
    done = train(*words, recipe="finetune_gpt2", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    pairs = zip(log_of(tuned), log_of(tmp_path / "run"), strict=True)
    for one, two in [pair for pair in pairs if "loss" in pair[0]]:
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data {home}/texts.jsonl --text mine.txt", "text: 'mine.txt' is no file"),
        ("--data {home}/texts.jsonl --val_text {home}/texts.jsonl", "excludes --text and"),
        ("--data {home}/texts.jsonl --context 8", "--context 8 is of windows"),
        ("--data {home}/none.jsonl", "data: .*none.jsonl"),
        ("--data {home}/long.jsonl", "data: row 1: prompt and answer are"),
    ],
)
def test_bad_settings_are_named(home, tmp_path, words, message):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 200}]
    (home / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = words.format(home=home).split()
    with pytest.raises(ValueError, match=message):
        run_here(
            "finetune_gpt2", "--init_from", home / "base", *given, "--output_dir", tmp_path / "run"
        )
