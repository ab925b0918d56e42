"""Sequence to sequence: the data, the tokenizers, the loss, and the recipe."""

import datetime
import itertools
import json
import shutil

import pytest
import torch
from builders import ON_CPU, TWO, benchmark, log_of, run_here, seq2seq_model, weights_of
from hub_server import serve
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import genkit
from genkit.data import parallel, seq2seq_tokenizers
from genkit.data.parallel import Example
from genkit.metrics import outputs
from genkit.models import lm, seq2seq
from genkit.text.language_model import LanguageModel
from genkit.text.parallel_tokens import encode_source, encode_target
from genkit.training.network import prepare_loss

ARCHITECTURES = ("bart", "t5")
PAIRS = [(f"{a} + {b}", f"is {a + b}.") for a in range(12) for b in range(12)]
SHAPE = ("--depth", "1", "--width", "32", "--heads", "2")
SHORT = ("--batch_size", "8", "--compile", "no", "--mixed_precision", "no")
TINY = (*SHAPE, *SHORT)


def write_pairs(path, pairs=PAIRS):
    rows = (json.dumps({"source": source, "target": target}) for source, target in pairs)
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


TEXTS = [text for pair in PAIRS for text in pair]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def language(request):
    with torch.random.fork_rng():
        return seq2seq_model(request.param, TEXTS)


# ---- data


def test_read_examples_reads_tables_of_every_kind(tmp_path):
    expected = [Example("NA", "007"), Example("a\nb", "c")]
    csv = tmp_path / "pairs.csv"
    csv.write_bytes(b'\xef\xbb\xbfsource,note,target\nNA,x,007\n"a\nb",,c\n')
    rows = [{"source": e.source, "target": e.target} for e in expected]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    lines = write_pairs(tmp_path / "pairs.jsonl", [("NA", "007"), ("a\nb", "c")])
    for path in (csv, tmp_path / "pairs.json", lines):
        assert parallel.read_examples(str(path)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a"}, "row 1 has no 'target'"),
        ({"source": "", "target": "b"}, "row 1: source is empty"),
        ({"source": "a", "target": " "}, "row 1: target is empty"),
        ({"source": 3, "target": "b"}, "row 1: source must be a text, got 3"),
        ({"source": "a", "target": "\ud800"}, "row 1: target"),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"data: {message}"):
        parallel.read_examples(str(path))


def test_read_turns_pairs_each_speech_with_the_next(tmp_path):
    play = "ANNE:\nGood morrow,\nsir.\r\n\r\nBEN:\nAy.\n \n\nANNE: aside\n\nNote: no name.\n"
    (tmp_path / "play.txt").write_text(play, newline="")
    speeches = ["Good morrow,\nsir.", "Ay.", "ANNE: aside", "Note: no name."]
    assert parallel.split_speeches(play) == speeches
    turns = parallel.read_turns(str(tmp_path / "play.txt"))
    assert turns == [Example(*both) for both in itertools.pairwise(speeches)]
    (tmp_path / "two.txt").write_text("No reply.")
    with pytest.raises(ValueError, match=r"dialogue: .*two\.txt.* has no two speeches"):
        parallel.read_turns(str(tmp_path / "two.txt"))


def test_hold_out_end_keeps_both_parts():
    items = [Example(str(i), "x") for i in range(10)]
    assert parallel.hold_out_end(items, 0.2, "dialogue") == (items[:8], items[8:])
    assert parallel.hold_out_end(items, 0.999, "dialogue") == (items[:1], items[1:])
    with pytest.raises(ValueError, match="dialogue: 1 pairs"):
        parallel.hold_out_end(items[:1], 0.5, "dialogue")


# ---- tokenizers


@pytest.mark.parametrize("size", [0, 320])
def test_tokenizers_come_back_and_end_their_texts(tmp_path, size):
    texts = ["the <eos> cat", "the <pad> hat\n"] * 3
    made = seq2seq_tokenizers.make_tokenizer(texts, size)
    lm.save_tokenizer(made, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(made) and loaded.padding_side == "right"
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert size == 0 or len(loaded) <= size
    for text in (*texts, "", "\N{SNOWMAN}"):
        ids = loaded(text).input_ids
        assert ids == made(text).input_ids and ids.count(loaded.eos_token_id) == 1
        assert ids[-1] == loaded.eos_token_id
        assert loaded.decode(ids, skip_special_tokens=True) == text
    padded = loaded(["the", "the cat"], padding=True)
    assert padded.input_ids[0][-1] == loaded.pad_token_id and padded.attention_mask[0][0] == 1


def test_make_tokenizer_makes_the_same_one_each_time():
    first, second = (seq2seq_tokenizers.make_tokenizer(TEXTS, 300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_encode_target_begins_as_the_settings_force_it(language):
    settings, known = language.model.generation_config, language.tokenizer.get_vocab()
    end, text = language.tokenizer.eos_token_id, [known[c] for c in "is 3."]
    assert encode_target("is 3.", language) == [*text, end]
    assert encode_source("is 3.", language) == language.tokenizer("is 3.").input_ids
    settings.forced_bos_token_id = known["+"]
    try:
        assert encode_target("is 3.", language) == [known["+"], *text, end]
        assert encode_target("+ 3.", language) == [*map(known.get, "+ 3."), end]
    finally:
        settings.forced_bos_token_id = None


def test_encode_target_keeps_what_the_tokenizer_puts_before(language):
    """As BART's does, whose targets begin with <s>."""
    tokenizer = seq2seq_tokenizers.make_tokenizer("is 3+.")
    known, ends = tokenizer.get_vocab(), [("<eos>", tokenizer.eos_token_id), ("+", 3)]
    ends[1] = ("+", known["+"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="+ $A <eos>", special_tokens=ends
    )
    like_bart = LanguageModel(language.model, tokenizer, "bart")
    expected = [*map(known.get, "+is"), tokenizer.eos_token_id]
    assert encode_target("is", like_bart) == expected == encode_source("is", like_bart)


# ---- the loss


def batch_of(language, pairs):
    rows = [(encode_source(a, language), encode_target(b, language)) for a, b in pairs]
    start = language.model.config.decoder_start_token_id
    return seq2seq.make_batch(*zip(*rows, strict=True), start, language.tokenizer.pad_token_id)


def test_loss_is_that_of_transformers(language):
    """Decoder start and label shift are ours; with labels, transformers makes its own."""
    batch = batch_of(language, PAIRS[5:25])
    real = batch.targets != seq2seq.IGNORED
    shifted = language.model.prepare_decoder_input_ids_from_labels(labels=batch.targets)
    assert torch.equal(batch.inputs[real], shifted[real])
    own = seq2seq.loss(language.model, batch, int(real.sum()))
    theirs = language.model(
        input_ids=batch.sources, attention_mask=batch.mask, labels=batch.targets
    ).loss
    assert own.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_padding_changes_no_loss(language):
    pairs = [("1 + 1", "is 2."), ("11 + 11", "is 22."), ("10 + 1", "2")]
    together = seq2seq.loss(language.model, batch_of(language, pairs), 1.0).item()
    alone = [seq2seq.loss(language.model, batch_of(language, [pair]), 1.0).item() for pair in pairs]
    assert together == pytest.approx(sum(alone), rel=1e-5)


# ---- the figures


def test_exact_match_leaves_out_space_around_texts():
    assert outputs.exact_match(["a", " b", "c d"], ["a", "b ", "cd"]) == pytest.approx(2 / 3)


def test_chrf_is_whole_where_all_is_right_and_has_a_signature():
    pytest.importorskip("sacrebleu")
    score, signature = outputs.chrf(["the cat", "a"], ["the cat", "a"])
    assert score == pytest.approx(100) and "nc:6" in signature and "version:" in signature
    assert outputs.chrf(["xyz"], ["the cat"])[0] < 5


# ---- the recipe

LENGTH = ("--max_steps", "20", "--evaluations", "2", "--save_steps", "8", "--eval_samples", "6")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained_pairs(request, pairs_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    words = (*TINY, *LENGTH, "--architecture", request.param, "--max_length", "16")
    run_here("train_seq2seq", *words, "--data", pairs_file, "--output_dir", folder)
    return folder


def test_a_run_leaves_all_that_it_promises(trained_pairs):
    names = {path.name for path in trained_pairs.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "run.json", "loss.png", "samples"}
    measured = [line for line in log_of(trained_pairs) if "val_loss" in line]
    assert len(measured) == 2 and measured[1]["val_loss"] < measured[0]["val_loss"]
    assert all(0 <= line["exact_match"] <= 1 for line in measured)
    assert ("chrf" in measured[0]) == outputs.has_chrf()
    card = (trained_pairs / "README.md").read_text()
    assert f"{measured[1]['val_loss']:.4f}" in card and "text2text-generation" in card
    assert f"source = {genkit.hub.card.example_prompt(trained_pairs)!r}" in card
    assert "sacrebleu's signature" in card or not outputs.has_chrf()
    page = next((trained_pairs / "samples").iterdir()).read_text()
    assert "Given:" in page and "The model's own:" in page


def test_texts_are_those_of_transformers(trained_pairs):
    """Greedy and by beams, token by token, from the saved folder."""
    model = AutoModelForSeq2SeqLM.from_pretrained(trained_pairs)
    tokenizer = AutoTokenizer.from_pretrained(trained_pairs)
    sources = [source for source, _ in PAIRS[::10]]
    batch = tokenizer(sources, return_tensors="pt", padding=True)
    for beams in (1, 4):
        options = {"strategy": "beam", "beams": beams} if beams > 1 else {"strategy": "greedy"}
        found = genkit.generate(sources, model=trained_pairs, max_new_tokens=12, **options)
        theirs = model.generate(**batch, do_sample=False, num_beams=beams, max_new_tokens=12)
        for own, row in zip(found, theirs[:, 1:].tolist(), strict=True):
            assert own.tokens == row[: len(own.tokens)]
            assert set(row[len(own.tokens) :]) <= {tokenizer.pad_token_id}


def test_every_strategy_answers(trained_pairs):
    for options in (
        {"strategy": "sample", "seed": 1},
        {"strategy": "stochastic", "seed": 1},
        {"strategy": "diverse_beam"},
        {"strategy": "contrastive"},
    ):
        record = genkit.generate("3 + 4", model=trained_pairs, max_new_tokens=8, **options)
        assert record.tokens and record.text == record.completion


def test_length_penalty_divides_the_log_probability(trained_pairs):
    """0 compares whole sequences, 1 their means; more than 0 favours long ones."""
    common = {"model": trained_pairs, "strategy": "beam", "max_new_tokens": 8}
    for power in (0.0, 1.0, 2.0):
        record = genkit.generate("3 + 4", length_penalty=power, **common)
        total = sum(record.log_probabilities)
        assert record.score == pytest.approx(total / len(record.tokens) ** power, rel=1e-4)


def test_a_run_goes_on_exactly(trained_pairs, tmp_path):
    shutil.copytree(trained_pairs, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    (tmp_path / "run" / "model.safetensors").unlink()
    run_here("train_seq2seq", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained_pairs)
    assert log_of(tmp_path / "run") == log_of(trained_pairs)


def test_accumulated_gradients_weigh_tokens_alike(trained_pairs, pairs_file, tmp_path):
    architecture = ("--architecture", trained_pairs.name, "--max_length", "16")
    words = (*TINY, *LENGTH, *architecture, "--data", pairs_file)
    run_here("train_seq2seq", *words, "--gradient_accumulation", "4", "--output_dir", tmp_path)
    one, four = log_of(trained_pairs), log_of(tmp_path)
    assert four[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert four[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_see_the_same_batches(train, trained_pairs, pairs_file, tmp_path):
    words = [*TINY, *LENGTH, "--architecture", trained_pairs.name, "--max_length", "16"]
    words += ["--data", pairs_file, "--output_dir", tmp_path / "run"]
    done = train(*words, recipe="train_seq2seq", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    one, two = log_of(trained_pairs), log_of(tmp_path / "run")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-3)
    assert two[-1]["exact_match"] == one[-1]["exact_match"]


def test_a_dialogue_of_byte_pairs(tmp_path, capsys):
    speeches = [f"ANNE:\nIs it {i}?\n\nBEN:\nAy, it is {i}.\n\n" for i in range(40)]
    (tmp_path / "play.txt").write_text("".join(speeches) + "A:\n" + "long " * 60)
    words = (*TINY, "--vocab_size", "300", "--max_steps", "2", "--evaluations", "1")
    words += ("--dialogue", tmp_path / "play.txt", "--output_dir", tmp_path / "run")
    run_here("train_seq2seq", *words)
    assert "1 pairs are longer than 128 tokens, and left out" in capsys.readouterr().err
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == 300


def test_a_model_is_fine_tuned(trained_pairs, pairs_file, trained, tmp_path):
    common = ("--batch_size", "8", "--compile", "no", "--data", pairs_file, "--max_steps", "2")
    common += ("--evaluations", "1", "--init_from")
    run_here("train_seq2seq", *common, trained_pairs, "--output_dir", tmp_path / "run")
    before, after = (genkit.load(folder).model for folder in (trained_pairs, tmp_path / "run"))
    assert type(before) is type(after)
    elsewhere = ("--output_dir", tmp_path / "other")
    with pytest.raises(ValueError, match=r"init_from: .* is a causal model; give an encoder-dec"):
        run_here("train_seq2seq", *common, trained, *elsewhere)
    other = write_pairs(tmp_path / "other.jsonl", [("\N{SNOWMAN}", "is 1."), ("1", "is 1.")])
    with pytest.raises(ValueError, match="--init_from has never seen '\N{SNOWMAN}'"):
        run_here("train_seq2seq", *common, trained_pairs, *elsewhere, "--data", other)


def test_a_dry_run_tells_and_writes_nothing(pairs_file, tmp_path, capsys):
    words = (
        *TINY,
        "--max_minutes",
        "2",
        "--dry_run",
        "--data",
        pairs_file,
        "--output_dir",
        tmp_path / "dry",
    )
    run_here("train_seq2seq", *words, "--output_dir", tmp_path / "dry")
    assert "130 pairs with" in capsys.readouterr().out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--data or --dialogue is required"),
        ("--data {pairs} --dialogue {pairs}", "--data or --dialogue is required"),
        ("--data {tmp}/no.jsonl", "data: .*no.jsonl"),
        ("--dialogue {tmp}/no.txt", "dialogue: .*no.txt"),
        ("--data {pairs} --vocab_size 299", "vocab_size must be 0, or 300 or more, got 299"),
        ("--data {pairs} --max_length 3", "max_length 3 leaves no pair to train: all 130"),
        ("--data {pairs} --architecture gpt2", "architecture.*got 'gpt2'"),
        ("--data {pairs} --init_from {tmp} --depth 1", "depth is fixed by the model of --init_fr"),
    ],
)
def test_bad_settings_are_named(pairs_file, tmp_path, words, message):
    given = words.format(tmp=tmp_path, pairs=pairs_file).split()
    shape = SHORT if "--init_from" in words else TINY
    with pytest.raises(ValueError, match=message):
        run_here("train_seq2seq", *shape, "--output_dir", tmp_path / "run", *given)


# ---- shared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the Hub's own
def test_a_pushed_model_comes_back(trained_pairs, monkeypatch, tmp_path):
    options = {"strategy": "greedy", "max_new_tokens": 8}
    with serve() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        genkit.push(trained_pairs, "user/pairs")
        there = genkit.generate("3 + 4", model="user/pairs", **options)
    assert there.tokens == genkit.generate("3 + 4", model=trained_pairs, **options).tokens


def test_a_source_longer_than_the_encoder_is_refused(language):
    if language.name == "t5":  # it has no limit
        assert genkit.generate("1" * 30, model=language, max_new_tokens=2, seed=0).tokens
        return
    with pytest.raises(ValueError, match="prompt: 31 tokens are more than the model's context of"):
        genkit.generate("1" * 30, model=language)


def test_perplexity_is_of_causal_models(language):
    with pytest.raises(ValueError, match=r"model: .* is an encoder-decoder; give a causal model"):
        genkit.perplexity("3 + 4", model=language)


def test_bfloat16_changes_a_loss_by_its_rounding_alone(language):
    """T5 overflows in float16; no recipe computes in it."""
    batch = batch_of(language, PAIRS[:8])
    lowered = prepare_loss(seq2seq.loss, torch.device("cpu"), "bf16", False)
    whole, half = (own(language.model, batch, 1.0).item() for own in (seq2seq.loss, lowered))
    assert half == pytest.approx(whole, rel=0.02)


def test_pairs_of_the_benchmark_are_right_and_new(tmp_path):
    known = benchmark("seq2seq")
    for task in known.TASKS:
        fresh = known.make_data(task, tmp_path, 300, 50)
        seen = parallel.read_examples(str(tmp_path / f"{task}.jsonl"))
        assert len(seen) == 300 and len(fresh) == 50
        assert not {each.source for each in seen} & {source for source, _ in fresh}
        for source, target in fresh:
            if task == "reversal":
                assert target == source[::-1]
            else:
                day = datetime.date.fromisoformat(target)
                assert str(day.year) in source and str(day.day) in source
