"""Names that people bring from other libraries, and names that are nearly right."""

import inspect

import pytest

import genkit
from genkit import arguments, cli
from genkit.commands import flags

VERBS = {
    "generate": "genkit.text.generation",
    "stream": "genkit.text.generation",
    "answer": "genkit.qa.answering",
    "sample": "genkit.vision.sampling",
    "imagine": "genkit.vision.imagining",
}


@pytest.mark.parametrize(
    ("verb", "name", "message"),
    [
        ("generate", "num_beams", "num_beams is called beams here"),
        ("stream", "num_beams", "num_beams is called beams here"),
        ("generate", "max_length", "max_length is called max_new_tokens here, without those of"),
        ("generate", "num_return_sequences", "num_return_sequences is called n_best here"),
        ("generate", "do_sample", 'do_sample: unknown argument; strategy="greedy" is do_sample=F'),
        ("generate", "system", 'system: unknown argument; .*"role": "system"'),
        ("generate", "temprature", "temprature: unknown argument; the most similar is temperature"),
        ("generate", "xyz", r"xyz: unknown argument; help\(genkit.generate\) lists all"),
        ("sample", "num_inference_steps", "num_inference_steps is called steps here"),
        ("sample", "guidance_scale", "guidance_scale is called guidance here"),
        ("sample", "generator", "generator is called seed here"),
        ("sample", "num_images", "num_images is called n here"),
        ("imagine", "negative_prompt", "negative_prompt is called negative here"),
        ("imagine", "num_images_per_prompt", "num_images_per_prompt: unknown argument; give the"),
        ("answer", "topk", "topk is called top_k here"),
        ("answer", "max_seq_length", "max_seq_length is called max_seq_len here"),
        ("next_tokens", "temperature", "the most similar is temperatures"),
        ("perplexity", "strid", "strid: unknown argument; the most similar is stride"),
    ],
)
def test_names_of_other_libraries_are_answered_in_a_line(verb, name, message):
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=message) as caught:
            getattr(genkit, verb)("x", **{name: 1})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_names_of_other_libraries_are_none_of_ours(verb):
    own = inspect.signature(getattr(genkit, verb)).parameters
    assert not arguments.NAMES[verb].keys() & own.keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --num_beams 4", "--num-beams is called --beams here"),
        ("generate x --num-return-sequences 4", "--num-return-sequences is called --n-best here"),
        ("generate x --do_sample", 'unknown flag; strategy="greedy"'),
        ("generate x --temprature 1", "--temprature: unknown flag; the most similar is --temper"),
        ("sample x --num_inference_steps 4", "--num-inference-steps is called --steps here"),
        ("answer x --context y --n_best_size 4", "--n-best-size is called --top-k here"),
        ("imagine x --guidance-scale 4", "--guidance-scale is called --guidance here"),
        ("train charlm --lr 1", "--lr is called --learning_rate here"),
        ("generate --text x", "--text: unknown flag; the prompt is given without a flag"),
        ("chat x --max-tokens 4", "--max-tokens is called --max-new-tokens here"),
        ("generate x --presence-penalty 1", "frequency_penalty=… is similar"),
        ("train charlm --bf16", "--bf16: unknown flag; mixed_precision=bf16"),
        ("train charlm --save-total-limit 1", "--save-total-limit is called --keep_checkpoints"),
    ],
)
def test_flags_of_other_libraries_are_answered_in_a_line(line, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(line.split())
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_taken_with_dashes_and_underscores(verb):
    if verb == "stream":
        return
    for flag in flags.from_verb(VERBS[verb], verb):
        dashed = f"--{flag.name.replace('_', '-')}"
        assert flags.with_dashes([f"--{flag.name}", dashed]) == [dashed, dashed]


def test_recipes_take_settings_with_dashes_and_underscores(tmp_path):
    from genkit.training.settings import RunSettings, parse

    words = ["--max-steps", "3", "--max_minutes", "2", "--keep-checkpoints=5"]
    found = parse(RunSettings, lambda settings, device: {}, words)
    assert (found.max_steps, found.max_minutes, found.keep_checkpoints) == (3, 2.0, 5)
