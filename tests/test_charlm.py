import json
import math

import numpy as np
import pytest
import torch
from builders import recipe_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from genkit.data import character_corpus, characters
from genkit.data.character_corpus import encode_characters, read_characters, survey_corpus
from genkit.models import lm

ODD = [
    "",
    "a\r\nb\r\tc",
    "<eos>",
    "x<eos>y",
    "<0x41>",
    "\N{PILE OF POO}\u200d",
    "e\u0301",
    "\uffff",
]
ODD += ["  two  spaces ", " . , n't 's ?", "\u2581", "\x00\x01", "\U0010ffff"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved and loaded: what users have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lm.save_tokenizer(characters.make_tokenizer("abc <eos>\n\N{SNOWMAN}"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(tokenizer, text):
    for skip in (False, True):
        ids = tokenizer(text).input_ids
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_one_token_a_character(tokenizer):
    assert len(tokenizer("abc\N{SNOWMAN}").input_ids) == 4
    assert characters.is_character_tokenizer(tokenizer)
    assert characters.unknown_characters(tokenizer, "abxc\u20acx") == ["x", "\u20ac"]


def test_extending_keeps_every_id(tokenizer):
    longer = characters.extend_tokenizer(tokenizer, "ab\N{SNOWMAN}xyz")
    assert tokenizer.get_vocab().items() <= longer.get_vocab().items()
    assert len(longer) == len(tokenizer) + 3
    assert longer("abc\n").input_ids == tokenizer("abc\n").input_ids


@given(text=st.text(min_size=1).filter(lambda t: "\0" not in t and t[0] != "\ufeff"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_table_gives_the_tokenizers_ids(tokenizer, tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    ids = encode_characters(str(path), survey_corpus(str(path)), tokenizer)
    assert ids.tolist() == tokenizer(text).input_ids


def test_big_vocabularies_have_wider_ids(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "text.txt").write_text(text)
    corpus = read_characters(str(tmp_path / "text.txt"), "text", None, 0.5, context=10)
    assert corpus.train.dtype == np.uint32
    assert corpus.tokenizer.decode(corpus.val.tolist()) == text[35_000:]


def test_the_cache_follows_the_content(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcabc")
    first = read_characters(str(path), "text", None, 0.5, context=1)
    again = read_characters(str(path), "text", None, 0.5, context=1)
    assert first.train.base.filename == again.train.base.filename
    path.write_text("abcabd")
    changed = read_characters(str(path), "text", None, 0.5, context=1)
    assert changed.facts != first.facts
    assert changed.tokenizer.decode(changed.val.tolist()) == "abd"


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a text of this test alone")
    surveyed = survey_corpus(str(path))
    path.write_text("a text of this test alone, changed")
    with pytest.raises(ValueError, match="changed while it was read"):
        encode_characters(str(path), surveyed, characters.make_tokenizer("abc"))
    left = [file.name for file in character_corpus.cache_folder().glob(".writing-*")]
    assert left == []


def test_documents_are_separated(tmp_path):
    for name, text in {"1.txt": "ab", "2.txt": "cd<eos>"}.items():
        (tmp_path / name).write_text(text)
    corpus = read_characters(str(tmp_path), "text", None, 0.2, context=1)
    ids = [*corpus.train.tolist(), *corpus.val.tolist()]
    eos = corpus.tokenizer.eos_token_id
    assert ids.index(eos) == 2 and ids.count(eos) == 1
    assert corpus.tokenizer.decode(ids, skip_special_tokens=True) == "abcd<eos>"


def test_a_validation_text_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("abababab")
    (tmp_path / "b.txt").write_text("cdcdcd")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    corpus = read_characters(a, "text", b, 0.1, context=2)
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "abababab"
    assert corpus.tokenizer.decode(corpus.val.tolist()) == "cdcdcd"


@pytest.mark.parametrize(
    ("length", "fraction", "message"),
    [
        (0, 0.5, "is empty"),
        (1, 0.5, "text: 0 characters to train on"),
        (16, 0.5, "text: 8 characters to train on are less than one window, 9"),
        (80, 0.1, "val_fraction: 8 characters to validate on .* window, 9 .*about 0.12 would do"),
        (80, 0.95, "val_fraction: 4 characters to train on .* window, 9 .*about 0.88 would do"),
    ],
)
def test_short_texts_are_refused(tmp_path, length, fraction, message):
    (tmp_path / "text.txt").write_text("x" * length)
    with pytest.raises(ValueError, match=message):
        read_characters(str(tmp_path / "text.txt"), "text", None, fraction, context=8)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_transformers_own(architecture):
    torch.manual_seed(0)
    model = lm.make_model(architecture, 300, 17, 1, 32, 2, 0.0)
    ids = torch.randint(300, (3, 17))
    ours = lm.loss(model, ids[:, :-1], ids[:, 1:])
    assert torch.isclose(ours, model(ids, labels=ids).loss, rtol=1e-5)
    logits = model(ids[:, :-1]).logits.log_softmax(-1)
    exact = -logits.gather(-1, ids[:, 1:, None]).mean()
    assert torch.isclose(ours, exact, rtol=1e-5)


def test_evaluation_covers_every_character_once_however_it_is_shared():
    torch.manual_seed(0)
    model = lm.make_model("llama", 300, 16, 1, 32, 2, 0.0).eval()
    ids = np.random.default_rng(0).integers(0, 300, 16 * 70 + 6).astype(np.uint16)
    windows = math.ceil((len(ids) - 1) / 16)
    whole = lm.total_loss(model, ids, 16, range(windows))
    assert whole[1] == len(ids) - 1
    parts = [range(0, 3), range(3, 68), range(68, windows)]
    shared = sum(lm.total_loss(model, ids, 16, part) for part in parts)
    assert torch.allclose(whole, shared, rtol=1e-6)
    by_hand = 0.0
    for first in range(0, len(ids) - 1, 16):
        window = torch.from_numpy(ids[first : first + 17].astype(np.int64))[None]
        by_hand += lm.loss(model, window[:, :-1], window[:, 1:]).item() * (window.numel() - 1)
    assert math.isclose(whole[0].item(), by_hand, rel_tol=1e-6)


@pytest.mark.parametrize("depth", range(1, 25))
def test_choose_shape_fits_every_depth(depth):
    for width_per_layer in (32, 64):
        shape = lm.choose_shape(depth, None, None, width_per_layer)
        width, heads = shape["width"], shape["heads"]
        assert shape["depth"] == depth and width == width_per_layer * depth
        assert width % (2 * heads) == 0
        assert heads == 1 or width // heads >= 64
        for heads in range(1, 9):
            shape = lm.choose_shape(depth, None, heads, width_per_layer)
            assert shape["heads"] == heads and shape["width"] % (2 * heads) == 0
            assert 0 <= shape["width"] - width < 2 * heads
    assert lm.count_heads(64 * depth) == depth


@pytest.mark.parametrize("recipe", ["train_charlm", "train_wordlm", "train_pixels", "train_qa"])
@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_presets_fit_every_depth(recipe, device):
    with recipe_module(recipe) as module:
        for depth in range(1, 25):
            options = {"from_scratch": True} if recipe == "train_qa" else {}
            values = module.preset(module.Settings(depth=depth, **options), device)
            assert values["width"] % values["heads"] == 0
            if recipe != "train_qa":  # whose heads have no rotary positions
                assert values["width"] // values["heads"] % 2 == 0


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"width .*4 heads.* 30"):
        lm.make_model("llama", 300, 16, 1, 30, 4, 0.0)
