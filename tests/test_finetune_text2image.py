"""The recipe that fine-tunes text-to-image pipelines: it learns, goes on exactly, and diffusers
draws with what it leaves.
"""

import json
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import (
    ON_CPU,
    TWO,
    listing,
    log_of,
    run_here,
    stable_diffusion,
    stable_diffusion_xl,
    weights_of,
)
from diffusers import DDPMPipeline, DiffusionPipeline
from hub_server import serve
from PIL import Image
from safetensors.torch import load_file, save_file

import genkit
from genkit.hub import kinds
from genkit.models import denoisers, diffusion
from genkit.training import captioned_images
from genkit.vision import text2image
from genkit.vision.adapters import NOTES

SHORT = "--batch_size 2 --mixed_precision no --warmup 0 --sample_steps 2 --samples 1"
TWO_STEPS = "--max_steps 2 --evaluations 1"
LENGTH = "--max_steps 8 --evaluations 2 --save_steps 4 --keep_checkpoints 9"
METHODS = {
    "lora": "--prompt cat --learning_rate 0.05 --lora_layers all --train_text_encoder",
    "textual_inversion": "--prompt a_<it> --token <it> --initializer cat --vectors 3 "
    "--method textual_inversion --learning_rate 2",
    "full": "--prompt cat --method full --learning_rate 0.01",
}
WORDS = {"lora": "cat", "textual_inversion": "a <it>", "full": "cat"}


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two pipelines, a folder of four pictures, and a table of them with captions."""
    home = tmp_path_factory.mktemp("data")
    with torch.random.fork_rng(), text2image.numpy_as_it_was():
        torch.manual_seed(0)
        for name, make in {"sd": stable_diffusion, "xl": stable_diffusion_xl}.items():
            pipeline = make()
            pipeline.save_pretrained(home / f"{name}-small")  # latents smaller than noise
            pipeline.vae.register_to_config(scaling_factor=4.0)  # latents as large as noise
            pipeline.save_pretrained(home / name)
    (home / "cats").mkdir()
    cells = []
    for i in range(4):
        picture(i).save(home / "cats" / f"{i}.png")
        cells.append({"bytes": (home / "cats" / f"{i}.png").read_bytes(), "path": None})
    write_table(home / "table.parquet", cells, ["a", "b", "c", "d"])
    write_table(home / "empty.parquet", cells, ["a", "b", " ", "d"])
    write_table(home / "long.parquet", cells, ["a", "b" * 40, "c", "d"])
    return home


def write_table(path, cells, captions):
    pq.write_table(pa.table({"image": cells, "text": captions}), path)


def words_of(home, method: str, base: str = "sd") -> list[str]:
    words = f"--init_from {home}/{base} --images {home}/cats {METHODS[method]}".split()
    return [word.replace("_<it>", " <it>") for word in words]


def train_here(home, method: str, folder, *more: str, base: str = "sd", length: str = LENGTH):
    words = (*words_of(home, method, base), *SHORT.split(), *length.split(), *more)
    run_here("finetune_text2image", *words, "--output_dir", folder)


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    train_here(home, "lora", folder)
    return folder


def losses(folder) -> list[float]:
    return [line["val_loss"] for line in log_of(folder) if "val_loss" in line]


def best_sample(folder) -> np.ndarray:
    """Return the picture that was drawn when the best was saved: the sheet has it enlarged."""
    values = losses(folder)
    steps = [line["step"] for line in log_of(folder) if "val_loss" in line]
    step = steps[int(np.argmin(values))]
    sheet = np.asarray(Image.open(folder / "samples" / f"step-{step:08d}.png").convert("RGB"))
    return sheet[2:-2:4, 2:-2:4]


def draw(home, base: str, prompt: str, load=None, folder=None) -> np.ndarray:
    """Draw a picture as plain diffusers does."""
    with text2image.numpy_as_it_was():
        pipeline = DiffusionPipeline.from_pretrained(folder or home / base)
        if load is not None:
            load(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}
        return np.asarray(pipeline(prompt, **options).images[0])


def imagined(prompt: str, model, adapter) -> np.ndarray:
    return np.asarray(genkit.imagine(prompt, model=model, adapter=adapter, seed=0, steps=2).image)


# ---- what a run leaves


def test_a_run_leaves_all_that_it_promises(trained, home):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"pytorch_lora_weights.safetensors", "README.md", "run.json", "loss.png"}
    assert {path.name for path in (trained / "samples").iterdir()} == {
        f"step-{step:08d}.png" for step in (0, 4, 8)
    }
    values = losses(trained)
    assert len(values) == 3 and min(values) < values[0]
    card = (trained / "README.md").read_text()
    facts = json.loads((trained / "run.json").read_text())["facts"]
    assert set(facts) == {"model_sha256", "data_sha256"}
    assert all(digest in card for digest in facts.values()) and str(home) not in card
    assert f"| val_loss | {min(values):.4f} |" in card and "load_lora_weights(model)" in card
    state = load_file(trained / "pytorch_lora_weights.safetensors")
    assert {name.partition(".")[0] for name in state} == {"unet", "text_encoder"}


def test_a_run_goes_on_exactly(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    run_here("finetune_text2image", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)
    assert log_of(tmp_path / "run") == log_of(trained)
    for step in (0, 4, 8):
        name = f"samples/step-{step:08d}.png"
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("base", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_diffusers_draws_the_same_picture_with_an_adapter(trained, home, tmp_path, base):
    folder = trained if base == "sd" else tmp_path / "run"
    if base == "xl":
        train_here(home, "lora", folder, base="xl")
    drawn = draw(home, base, "cat", lambda pipeline: pipeline.load_lora_weights(folder))
    assert np.array_equal(drawn, best_sample(folder))
    assert np.array_equal(drawn, imagined("cat", home / base, folder))
    assert not np.array_equal(drawn, draw(home, base, "cat"))


@pytest.mark.parametrize("base", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_diffusers_draws_the_same_picture_with_a_new_word(home, tmp_path, base):
    folder = tmp_path / "run"
    train_here(home, "textual_inversion", folder, base=base)
    before, tables = [], []

    def load(pipeline) -> None:
        for name in ("text_encoder", "text_encoder_2")[: 1 + (base == "xl")]:
            encoder = getattr(pipeline, name)
            before.append(encoder.get_input_embeddings().weight.detach().clone())
            pipeline.load_textual_inversion(
                folder,
                weight_name=f"learned_embeds{name.removeprefix('text_encoder')}.safetensors",
                text_encoder=encoder,
                tokenizer=getattr(pipeline, name.replace("text_encoder", "tokenizer")),
            )
            tables.append(encoder.get_input_embeddings().weight.detach())

    drawn = draw(home, base, "a <it>", load)
    assert np.array_equal(drawn, best_sample(folder))
    assert np.array_equal(drawn, imagined("a <it>", home / base, folder))
    ids = [2, 0, 45]  # c, a, t</w>
    for old, new in zip(before, tables, strict=True):
        assert len(new) == len(old) + 3 and torch.equal(new[: len(old)], old)
        assert (new[len(old) :] != old[ids]).any(1).all()


def test_of_a_new_word_only_its_rows_are_saved(home, tmp_path):
    train_here(home, "textual_inversion", tmp_path / "run", "--samples", "0")
    state = load_file(tmp_path / "run" / "learned_embeds.safetensors")
    assert {name: rows.shape for name, rows in state.items()} == {"<it>": (3, 16)}
    last = tmp_path / "run" / "checkpoints" / "step-00000008" / "tensors.safetensors"
    sizes = [weights.numel() for weights in load_file(last).values()]
    assert max(sizes) == 3 * 16 and len(sizes) <= 5
    assert kinds.kind_of(tmp_path / "run") == kinds.ADAPTER


def test_the_folder_of_a_full_run_is_a_pipeline(home, tmp_path):
    folder = tmp_path / "run"
    train_here(home, "full", folder)
    drawn = draw(home, "sd", "cat", folder=folder)
    assert np.array_equal(drawn, best_sample(folder))
    assert not np.array_equal(drawn, draw(home, "sd", "cat"))
    again = genkit.imagine("cat", model=folder, seed=0, steps=2).image
    assert np.array_equal(np.asarray(again), drawn)
    assert json.loads((folder / "model_index.json").read_text())["_name_or_path"] == "sd"
    for part in ("vae", "text_encoder"):
        file = next((folder / part).glob("*.safetensors"))
        assert file.read_bytes() == (home / "sd" / part / file.name).read_bytes()


def test_an_adapter_is_answered_with_what_takes_it(trained):
    with pytest.raises(ValueError, match=r"is an adapter .* which genkit\.imagine takes as"):
        genkit.load(trained)


def rewritten(trained, folder, **notes):
    """Write an adapter with settings of peft in its notes, as diffusers does."""
    folder.mkdir()
    file = "pytorch_lora_weights.safetensors"
    save_file(load_file(trained / file), folder / file, {NOTES: json.dumps(notes)})
    return folder


def test_imagine_scales_an_adapter_by_the_alpha_that_it_was_saved_with(trained, home, tmp_path):
    names = {name: 8 for part in ("unet", "text_encoder") for name in (f"{part}.r",)}
    alphas = {"unet.lora_alpha": 2, "text_encoder.lora_alpha": 2}
    weights = load_file(trained / "pytorch_lora_weights.safetensors")
    layers = {
        f"{part}.target_modules": sorted(
            {
                name.removeprefix(f"{part}.").partition(".lora_")[0]
                for name in weights
                if name.startswith(f"{part}.")
            }
        )
        for part in ("unet", "text_encoder")
    }
    folder = rewritten(trained, tmp_path / "scaled", **names, **alphas, **layers)
    theirs = draw(home, "sd", "cat", lambda pipeline: pipeline.load_lora_weights(folder))
    mine = imagined("cat", home / "sd", folder).astype(int)
    assert np.abs(mine - theirs).max() <= 1
    assert not np.array_equal(theirs, imagined("cat", home / "sd", trained))


def test_notes_of_an_adapter_import_nothing(trained, home, tmp_path):
    notes = {"unet.megatron_config": {"a": 1}, "unet.megatron_core": "antigravity", "unet.r": 9}
    folder = rewritten(trained, tmp_path / "odd", **notes)
    assert np.array_equal(imagined("a", home / "sd", folder), imagined("a", home / "sd", trained))
    assert "antigravity" not in sys.modules
    folder = rewritten(trained, tmp_path / "refused", **{"unet.use_dora": True})
    with pytest.raises(ValueError, match=r"was saved with unet\.use_dora = True; save it without"):
        imagined("a", home / "sd", folder)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("{home}/sd", "adapter: '.*sd' holds none of pytorch_lora_weights"),
        ("{home}/missing", "adapter: .*missing"),
        ("{tmp}/text", "adapter: .*not in the safetensors format"),
        ("{tmp}/other", "adapter: its layers are not those of the model"),
        ("{tmp}/pattern", r"adapter: .*weights of the name 'unet\.\(a\+\)\+\.lora"),
        ("{tmp}/infinite", "adapter: .*not finite"),
        ("{tmp}/long", r"adapter: .*'<it>' has embeddings of the shape \(99, 16\)"),
        ("{tmp}/narrow", "adapter: .*embeddings are of incorrect shape"),
    ],
)
def test_imagine_refuses_what_is_no_adapter_of_the_model(home, trained, tmp_path, adapter, message):
    file = tmp_path / "text" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    file.write_text("no weights")
    for name in ("other", "narrow", "pattern", "infinite", "long"):
        (tmp_path / name).mkdir()
    save_file({"unet.(a+)+.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pattern" / file.name)
    weights = load_file(trained / file.name)
    infinite = {name: weight / 0 for name, weight in weights.items()}
    save_file(infinite, tmp_path / "infinite" / file.name)
    save_file({"<it>": torch.zeros(99, 16)}, tmp_path / "long" / "learned_embeds.safetensors")
    parts = [f"transformer.to_q.lora_{part}.weight" for part in "AB"]
    save_file({part: torch.zeros(2, 2) for part in parts}, tmp_path / "other" / file.name)
    save_file({"<it>": torch.zeros(1, 2)}, tmp_path / "narrow" / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match=message):
        imagined("a", home / "sd", adapter.format(home=home, tmp=tmp_path))


# ---- data


def test_captions_of_a_table_are_learned_each_with_its_image(home, tmp_path):
    words = f"--init_from {home}/sd --images {home}/table.parquet --caption_column text"
    words += f" --val_fraction 0.25 --cond_dropout 0.5 --min_snr 5 {SHORT} --samples 3 {LENGTH}"
    run_here("finetune_text2image", *words.split(), "--output_dir", tmp_path / "run")
    assert "1 images held out" in (tmp_path / "run" / "README.md").read_text()
    with Image.open(tmp_path / "run" / "samples" / "step-00000008.png") as drawn:
        assert drawn.width > 3 * 16


def test_prior_is_drawn_once_and_weighed(home, tmp_path, monkeypatch):
    prior = ("--prior_prompt", "dog", "--prior_images", "3", "--samples", "0")
    train = partial(train_here, home, "lora", length=TWO_STEPS)
    train(tmp_path / "one", *prior)
    drawn = []
    monkeypatch.setattr(text2image, "draw_latents", lambda *_, **__: drawn.append(1))
    train(tmp_path / "two", *prior)
    assert not drawn and weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    train(tmp_path / "three", *prior, "--prior_weight", "0.5")
    assert log_of(tmp_path / "three")[1]["loss"] < log_of(tmp_path / "one")[1]["loss"]


def test_a_row_has_its_own_noise_at_any_division(home, tmp_path):
    """With a rate of next to nothing, the loss of a batch is the mean of its parts' losses."""
    found = []
    for parts in ("1", "2"):
        more = ("--gradient_accumulation", parts, "--learning_rate", "1e-9", "--samples", "0")
        train_here(home, "lora", tmp_path / parts, *more, length=TWO_STEPS)
        found.append([line["loss"] for line in log_of(tmp_path / parts) if "loss" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][0] != found[0][1]


def test_a_dry_run_tells_parameters_and_memory_and_writes_nothing(home, tmp_path, capsys):
    cache = captioned_images.cache_folder()
    before = set(cache.glob("*.safetensors"))
    train_here(home, "lora", tmp_path / "run", "--dry_run", "--prior_prompt", "owl")
    told = capsys.readouterr().out
    for what in ("parameters in the denoiser", "to train", "MB of latents", "memory", "ms a step"):
        assert what in told
    assert not (tmp_path / "run").exists() and set(cache.glob("*.safetensors")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt cat --images {tmp}/nothing", "images: .*nothing.* no image"),
        ("--prompt cat --images {tmp}/missing", "images: .*missing"),
        ("", "--prompt None and --caption_column None: give one"),
        ("--prompt cat --caption_column text", "--prompt cat and --caption_column text: give one"),
        ("--prompt ''", "--prompt is ''"),
        ("--caption_column text", "--caption_column text: --images .*cats has no columns"),
        ("--caption_column no --images {home}/table.parquet", "--caption_column no: .* no such"),
        ("--caption_column text --images {home}/empty.parquet", "the caption of row 2 is empty"),
        ("--caption_column text --images {home}/long.parquet", "'b+' has 42 tokens.* reads 16"),
        ("--prompt cat --init_from {tmp}/missing", "--init_from: .*missing"),
        ("--prompt cat --init_from {tmp}/ddpm", "--init_from: .*ddpm' is a DDPMPipeline"),
        ("--prompt cat --init_from {tmp}/nothing", "--init_from: .*nothing"),
        ("--prompt cat --resolution 9", "--resolution must be a multiple of 2 .*got 9"),
        ("--prompt cat --sample_steps 2000", "--sample_steps 2000: .*1 to 1000"),
        ("--prompt cat --channels 1", "--channels"),
        ("--prompt cat --sample_prompts a {long}", "--sample_prompts: the caption 'b+' has 42"),
        ("--prompt cat --val_images {home}/cats", "--val_images"),
        ("--prompt cat --token <it>", "--token <it> is for --method textual_inversion"),
        ("--prompt cat --prior_prompt ''", "--prior_prompt is ''"),
        ("--prompt cat --method textual_inversion", "--token is missing"),
        ("--prompt cat --method textual_inversion --token <it>", "--initializer is missing"),
        ("{ti} --token a --initializer b", "--token a: 'a' is a token of the pipeline already"),
        ("{ti} --token <it> --initializer cat", "--initializer cat: it is 3 tokens"),
        ("{ti} --token <it> --initializer a", "the caption 'cat' lacks the new word <it>"),
        ("{ti} --token <it> --initializer a --prior_prompt dog", "--prior_prompt is not for"),
        ("{ti} --token <it> --initializer a --optimizer muon", "--optimizer muon"),
    ],
)
def test_bad_input_is_refused_before_any_long_work(home, tmp_path, words, message):
    (tmp_path / "nothing").mkdir()
    DDPMPipeline(
        denoisers.make_unet((1, 8, 8), (8,)), diffusion.make_scheduler("epsilon")
    ).save_pretrained(tmp_path / "ddpm")
    methods = {"ti": "--prompt cat --method textual_inversion"}
    given = words.format(tmp=tmp_path, home=home, long="b" * 40, **methods)
    base = ["--init_from", str(home / "sd"), "--images", str(home / "cats")]
    run = [*base, *SHORT.split(), *(word.replace("''", "") for word in given.split())]
    with pytest.raises(ValueError, match=message):
        run_here("finetune_text2image", *run, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


# ---- how far it learns


@pytest.mark.slow
def test_lora_takes_the_loss_of_four_images_below_a_tenth(home, tmp_path):
    more = ("--lora_rank", "8", "--batch_size", "4", "--learning_rate", "5e-3", "--samples", "0")
    more += ("--train_text_encoder", "no")
    length = "--max_steps 600 --evaluations 4"
    train_here(home, "lora", tmp_path / "run", *more, base="sd-small", length=length)
    first, *_, last = losses(tmp_path / "run")
    assert last < first / 10, losses(tmp_path / "run")


@pytest.mark.slow
def test_a_new_word_learns_nine_tenths_of_what_a_known_word_knows(home, tmp_path):
    """A few numbers cannot make a random denoiser predict noise: the pipeline learns four pictures
    by four words first. Then a new word that starts as one of them is to mean the picture of the
    next; what counts is the loss beyond that of the word which the pipeline has for it.
    """
    words = f"--init_from {home}/sd --images {home}/table.parquet --caption_column text"
    words += f" --method full --learning_rate 5e-3 {SHORT} --batch_size 8 --samples 0"
    words += " --max_steps 600 --evaluations 4"
    run_here("finetune_text2image", *words.split(), "--output_dir", tmp_path / "known")

    def learn(start: str, image: int, steps: int) -> list[float]:
        folder = tmp_path / f"{start}{image}"
        source = tmp_path / f"picture{image}"
        source.mkdir(exist_ok=True)
        picture(image).save(source / "0.png")
        words = f"--init_from {tmp_path}/known --images {source} --prompt <it> --token <it>"
        words += f" --initializer {start} --method textual_inversion --learning_rate 0.05 {SHORT}"
        words += f" --batch_size 8 --samples 0 --max_steps {steps} --evaluations {min(steps, 4)}"
        run_here("finetune_text2image", *words.split(), "--output_dir", folder)
        return losses(folder)

    for image, (own, other) in enumerate(zip("abcd", "bcda", strict=True)):
        floor = learn(own, image, 1)[0]
        values = learn(other, image, 160)
        assert min(values) - floor < (values[0] - floor) / 10, (values, floor)


# ---- processes, and the Hub


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_does_and_go_on_exactly(train, home, tmp_path, method):
    launch = {"recipe": "finetune_text2image", "launcher": TWO, "env": ON_CPU}
    rate = ("--learning_rate", "1e-3")  # which does not amplify the last bits of gradients
    train_here(home, method, tmp_path / "one", *rate)
    words = (*words_of(home, method), *SHORT.split(), *LENGTH.split(), *rate)
    done = train(*words, "--output_dir", tmp_path / "two", **launch)
    assert done.returncode == 0, done.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "val_loss"):
        mine, theirs = (
            [line[name] for line in log if line.get(name) is not None] for log in (one, two)
        )
        assert mine == pytest.approx(theirs, rel=1e-3)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    done = train("--output_dir", tmp_path / "again", "--resume", **launch)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "two")
    assert log_of(tmp_path / "again") == log_of(tmp_path / "two")


THERE_AND_BACK = """
import sys, warnings
import genkit
from diffusers import StableDiffusionPipeline
from genkit.vision import text2image
from genkit.vision.adapters import NOTES
folder, base = sys.argv[1:]
genkit.push(folder, "user/cat")
with text2image.numpy_as_it_was():
    pipeline = StableDiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights("user/cat")
print(pipeline.get_list_adapters())
"""


@pytest.mark.slow
def test_an_adapter_is_pushed_and_comes_back_by_its_name(trained, home, tmp_path):
    import os

    with serve() as server:
        environment = os.environ | server.environment(tmp_path / "hub")
        command = [sys.executable, "-c", THERE_AND_BACK, str(trained), str(home / "sd")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'unet': ['default_0']" in done.stdout


@pytest.mark.hub
@pytest.mark.parametrize("method", ["lora", "textual_inversion"])
def test_stable_diffusion_itself_is_fine_tuned(home, tmp_path, method):
    words = [word for word in words_of(home, method) if word not in ("--vectors", "3")]
    words = words[2:]  # the default pipeline
    short = "--batch_size 1 --resolution 256 --max_steps 4 --evaluations 1 --sample_steps 2"
    run = (*words, *short.split(), "--samples", "1", "--output_dir", tmp_path / "run")
    run_here("finetune_text2image", *run)
    values = losses(tmp_path / "run")
    assert np.isfinite(values).all() and 0 < values[0] < 1
    assert listing(tmp_path / "run").keys() & {
        "pytorch_lora_weights.safetensors",
        "learned_embeds.safetensors",
    }
