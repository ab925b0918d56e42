"""One rule for special tokens: texts are text, prompts are read as their tokenizer reads them."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import BERT, bert_pair, random_reader, wordpiece, wrap
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import genkit
from genkit.data import characters, corpus, tokens, words
from genkit.qa import windows
from genkit.text import chats, scoring, task
from genkit.text.language_model import LanguageModel
from genkit.text.samples import sample_page

STORY = "The end of text: a cat, the dog; 12 |> <| </s> s> [SEP] eos im_end.\n"
END = "<|endoftext|>"
KINDS = ("bytes", "wordpiece", "unigram", "letters", "characters", "wordlevel", "slow")

# ---------------------------------------------------------------------------------------------
# Tokenizers, each with its own spellings


def byte_level():
    """Byte-level BPE, in the shape of GPT-2, with merges and added tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator([STORY * 3], trainers.BpeTrainer(vocab_size=300, **options))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    made.add_tokens(["covid", "<|user|>"])
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    made.chat_template = "{{ '<|user|>' + messages[0]['content'] + '<|im_end|>' }}"
    return made


def unigram():
    """SentencePiece's Unigram with Metaspace: its vocabulary holds "</s>" as a likely piece."""
    letters = [*"abcdefghijklmnopqrstuvwxyzTE<>/|[]SP_:;.,12\n", "\u2581"]
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -4.0) for letter in letters] + [("\u2581the", -3.0), ("nd", -3.5)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return wrap(backend, ("<s>", "<unk>", "<s>", "</s>"))


def letters():
    """One token a character, by WordLevel; it has no special token but the end."""
    listed = dict.fromkeys(STORY + "abcdefghijklmnopqrstuvwxyzE<>/|[]_")
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<eos>", *listed])}, "e"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def wordlevel():
    """Words between spaces: "[SEP]" between spaces is a word of the vocabulary."""
    listed = [*BERT, *dict.fromkeys(STORY.split()), "x"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(bert_pair(backend))


MADE = {
    "bytes": byte_level,
    "wordpiece": functools.partial(wordpiece, lower=False),
    "unigram": unigram,
    "letters": letters,
    "characters": functools.partial(characters.make_tokenizer, sorted(set(STORY))),
    "wordlevel": wordlevel,
    "slow": ByT5Tokenizer,
}
tokenizer = functools.cache(lambda kind: MADE[kind]())


def plain(kind, ids):
    """The text of tokens, special ones left out, with what the kind does not keep normalised."""
    text = tokenizer(kind).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return normal(kind, text)


def normal(kind, text):
    if kind in ("wordpiece", "wordlevel"):
        return re.sub(r"\s", "", text)
    return text.lstrip(" ") if kind == "unigram" else text


def spellings(kind):
    names = list(tokens.control_tokens(tokenizer(kind)))
    assert names
    return st.lists(st.sampled_from([*names, " ", "end", "a", "the", "\n"]), max_size=8).map(
        "".join
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_encode_text_keeps_what_spells_special_tokens(kind, data):
    text = data.draw(spellings(kind))
    found = tokens.encode_text(tokenizer(kind), text)
    unknown = {tokenizer(kind).unk_token_id} if kind in ("wordpiece", "wordlevel") else set()
    assert not (set(tokens.control_tokens(tokenizer(kind)).values()) - unknown) & set(found)
    if kind not in ("wordpiece", "wordlevel"):  # which know few characters
        assert plain(kind, found) == normal(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=st.lists(st.sampled_from([*STORY.split(), " ", "\n", "é"]), max_size=8).map(" ".join))
def test_encode_text_changes_no_other_text(kind, text):
    own = tokenizer(kind)
    if any(name in text for name in tokens.control_tokens(own)):
        return
    for ends in (False, True):
        expected = own(text, add_special_tokens=ends).input_ids
        assert tokens.encode_text(own, text, ends=ends) == expected


def test_added_words_stay_words_and_tokens_of_the_template_do_not():
    own = tokenizer("bytes")
    added = own.get_added_vocab()
    assert tokens.control_tokens(own).keys() == {END, "<|user|>", "<|im_end|>"}
    assert added["covid"] in tokens.encode_text(own, "a covid test")
    assert added["<|user|>"] not in tokens.encode_text(own, "<|user|>")
    assert own("<|user|>").input_ids == [added["<|user|>"]]  # nor is the tokenizer changed


def test_a_token_that_is_added_later_is_found():
    own = byte_level()
    assert len(tokens.encode_text(own, "<new>")) > 1
    own.add_tokens([AddedToken("<new>", special=False)])
    assert len(tokens.encode_text(own, "<new>")) == 1
    own.add_special_tokens({"additional_special_tokens": ["<later>"]})
    assert len(tokens.encode_text(own, "<later>")) > 1


def test_split_at_control_tokens():
    split = tokens.split_at_control_tokens(tokenizer("bytes"), f"a{END}b<|im_end|>")
    assert split == ["a", "b", ""]
    assert tokens.split_at_control_tokens(tokenizer("bytes"), "abc") == ["abc"]


# ---------------------------------------------------------------------------------------------
# Verbs


@pytest.fixture(scope="module")
def language():
    """A random model over the bytes of texts, in the shape of GPT-2."""
    abc = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(abc)} | {END: 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=256, eos_token_id=256, **shape)).eval()
    return LanguageModel(model, own, "bytes")


def test_perplexity_scores_every_character(language):
    text = f"Docs say {END} ends a text. More."
    record = genkit.perplexity(text, model=language)
    assert record.tokens_scored == len(text) - 1 == 40


def test_a_corpus_learns_special_tokens_as_text(language, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(f"one{END}two " * 20)
    ids, count = corpus.encode_corpus(corpus.measure_corpus(str(file)), language.tokenizer)
    assert language.tokenizer.eos_token_id not in ids and count == len(ids) == 20 * 20


def test_words_and_corpora_of_several_documents_have_ends_between_them(language, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{END} {name}")
    ids, _ = corpus.encode_corpus(corpus.measure_corpus(str(tmp_path)), language.tokenizer)
    assert ids.tolist().count(language.tokenizer.eos_token_id) == 1


def test_rescore_reads_every_character(language):
    spelled, apart = scoring.encode_after_start([END, "<|end"], language)
    assert len(spelled) == 1 + len(END) and spelled[: len(apart)] == apart
    ranked = genkit.rescore([(f"a{END}", -1.0)], model=language)
    assert ranked[0].text == f"a{END}"


def test_alternatives_has_a_choice_for_every_character(language):
    record = genkit.alternatives(f"a{END}b", model=language)
    assert record.text == f"a{END}b" and len(record.choices) == len(END) + 2
    prompted = genkit.alternatives(f"{END}b", prompt=f"say{END}", model=language)
    assert prompted.text == f"{END}b" and len(prompted.choices) == len(END) + 1


def test_a_prompt_is_read_as_its_tokenizer_reads_it_or_as_text(language):
    end = language.tokenizer.eos_token_id
    assert task.encode_prompt(END, language) == [end]
    assert len(task.encode_prompt(END, language, parse_special=False)) == len(END)
    options = {"model": language, "max_new_tokens": 4, "strategy": "greedy"}
    parsed = genkit.generate(END, **options)
    as_text = genkit.generate(END, parse_special=False, **options)
    assert "parse_special" not in parsed.options and not as_text.options["parse_special"]
    assert len(genkit.alternatives(as_text, model=language).choices) == len(as_text.tokens)
    logs = [
        choice.log_probability for choice in genkit.alternatives(as_text, model=language).choices
    ]
    assert logs == pytest.approx(as_text.log_probabilities, abs=1e-4)
    pieces = list(genkit.stream(END, parse_special=False, **options))
    assert pieces[-1].record.tokens == as_text.tokens


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_a_prefix_is_in_the_completion_whatever_it_spells(language, strategy):
    record = genkit.generate("a", model=language, prefix=END, strategy=strategy, max_new_tokens=16)
    assert record.completion.startswith(END)


def test_contexts_and_questions_are_text():
    reader = random_reader("cased")
    context = "The fox [SEP] is lazy. [CLS] Where is the dog?"
    record = genkit.answer("Where is [SEP] it?", context, model=reader, max_seq_len=60)
    assert record.window == (0, len(context))
    special = {reader.tokenizer.sep_token_id, reader.tokenizer.cls_token_id}
    found = windows.tokenize(context, reader.tokenizer)
    assert not special & set(found.ids.tolist())


def test_samples_of_a_run_take_their_prompt_as_text(language):
    page = sample_page(1, END, language.model, language.tokenizer, 2)
    assert END in page


def test_our_tokenizers_read_all_as_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a <eos> <unk> " * 9)
    made = words.make_tokenizer(corpus.measure_corpus(str(file)), 99, lower=False)
    assert made.decode(tokens.encode_text(made, "a <eos> <unk>")) == "a <eos> <unk>"
    own = characters.make_tokenizer("<eos> 0x41")
    assert own.decode(tokens.encode_text(own, "<eos> <0x41>")) == "<eos> <0x41>"


def test_a_chat_that_spells_a_piece_of_the_vocabulary_is_refused_for_that_reason(language):
    made = MADE["unigram"]()
    made.chat_template = "{{ messages[0]['content'] }}</s>"
    spoken = LanguageModel(language.model, made, "tiny")
    message = [{"role": "user", "content": "the </s> end"}]
    with pytest.raises(ValueError, match="prompt: a content spells a control token"):
        chats.read_chat(message, "prompt", spoken)
