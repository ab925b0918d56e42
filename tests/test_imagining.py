import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from builders import stable_diffusion, text_config, tiny_text_diffusion, tokenizer, vae
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextModelWithProjection,
)

from genkit import machine
from genkit.vision import text2image
from genkit.vision.imagining import Picture, imagine
from genkit.vision.text2image import needs_tiles

GIB = 1 << 30
FAST = {"steps": 2, "seed": 3}


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    encoders = [CLIPTextModelWithProjection(text_config()) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),  # draws from the global state
        vae(4),
        encoders[0],
        tokenizer(),
        encoders[1],
        tokenizer(),
        None,
        None,
    )


FAMILIES = {"sd": stable_diffusion, "sd3": stable_diffusion_3}
EVERY = (*FAMILIES, "own")  # and the pipeline of train_text2image


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(), text2image.numpy_as_it_was():
        torch.manual_seed(0)
        for name, make in FAMILIES.items():
            pipeline = make()
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    with torch.no_grad():
                        for weight in part.parameters():
                            weight.mul_(2)  # that what is asked for shows
            pipeline.save_pretrained(root / name)
    tiny_text_diffusion(root / "own")
    return {name: root / name for name in EVERY}


@pytest.fixture(params=EVERY)
def folder(folders, request) -> Path:
    return folders[request.param]


@pytest.fixture
def sd(folders) -> Path:
    return folders["sd"]


@pytest.fixture
def copy(sd, tmp_path) -> Path:
    return Path(shutil.copytree(sd, tmp_path / "copy"))


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def same(one: Picture, other: Picture) -> bool:
    return np.array_equal(pixels(one), pixels(other))


# ---- what is drawn


def test_a_picture_is_that_of_diffusers_own_pipeline(sd):
    picture = imagine("a red fox", model=sd, seed=5, steps=3, guidance=4.0, negative="blue")
    with text2image.numpy_as_it_was():
        pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": generator}
    with text2image.numpy_as_it_was():
        theirs = pipeline("a red fox", negative_prompt="blue", **options).images[0]
    assert np.array_equal(pixels(picture), np.asarray(theirs)) and picture.image.size == (16, 16)


def test_a_picture_is_the_same_alone_and_among_others(folder):
    prompts = ["a fox", "two owls and a very long tail", "c"]
    rows = imagine(prompts, model=folder, seed=3, steps=2)
    assert [row.seed for row in rows] == [3, 4, 5] and [row.prompt for row in rows] == prompts
    for row in rows:
        assert same(row, imagine(row.prompt, model=folder, seed=row.seed, steps=2))
    reversed_rows = imagine(prompts[::-1], model=folder, seed=[5, 4, 3], steps=2)
    assert all(same(*pair) for pair in zip(rows, reversed_rows[::-1], strict=True))
    assert not same(rows[0], imagine("a fox", model=folder, seed=4, steps=2))
    assert not same(rows[0], imagine("an owl", model=folder, seed=3, steps=2))


def test_global_random_state_is_neither_read_nor_changed(folder):
    pictures = []
    with torch.random.fork_rng():
        for state in (1, 2):
            torch.manual_seed(state)
            before = torch.get_rng_state()
            text2image._load.cache_clear()
            pictures.append(imagine("a fox", model=folder, **FAST))
            assert torch.equal(torch.get_rng_state(), before)
    assert same(*pictures)


def test_imagine_records_a_random_seed(sd):
    first, second = (imagine("a fox", model=sd, steps=2) for _ in range(2))
    assert first.seed != second.seed and not same(first, second)
    assert same(first, imagine("a fox", model=sd, steps=2, seed=first.seed))


def test_what_is_to_be_avoided_changes_the_picture(folder):
    plain, other = (imagine("a fox", model=folder, negative=n, **FAST) for n in (None, "a house"))
    assert not same(plain, other) and other.negative == "a house" and plain.negative is None


def test_guidance_of_one_is_none(folder):
    rows = {g: imagine("a fox", model=folder, guidance=g, **FAST) for g in (0, 0.5, 1, 3)}
    assert same(rows[0], rows[1]) and same(rows[0.5], rows[1]) and not same(rows[1], rows[3])
    assert [row.evaluations for row in rows.values()] == [2, 2, 2, 4]


@pytest.mark.parametrize("size", [8, (8, 24), (24, 16)])
def test_a_picture_has_the_size_that_was_asked_for(folder, size):
    picture = imagine("a fox", model=folder, size=size, **FAST)
    assert picture.image.size == ((size, size) if size == 8 else size)


def test_a_model_of_images_of_unequal_sides_draws_these(folders, tmp_path):
    shutil.copytree(folders["own"], tmp_path / "wide")
    path = tmp_path / "wide" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [8, 24]}))
    source = text2image.find_source(str(tmp_path / "wide"))
    assert source.default_size == (24, 8) and source.multiple == 2
    assert imagine("a fox", model=tmp_path / "wide", **FAST).image.size == (24, 8)


def test_a_prompt_longer_than_the_encoder_is_refused(folders):
    with pytest.raises(ValueError, match=r"prompt: 'a fox, a fox, .* has \d+ tokens.* reads 32;"):
        imagine("a fox, " * 9, model=folders["own"], **FAST)


def test_evaluations_are_those_of_the_network(copy):
    with text2image.numpy_as_it_was():  # a scheduler of two evaluations a step, but the last
        HeunDiscreteScheduler(steps_offset=1).save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "HeunDiscreteScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    rows = []
    pipeline = text2image.load_text2image(text2image.find_source(str(copy)))
    pipeline.unet.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    picture = imagine("a fox", model=copy, steps=4, seed=1, guidance=3)
    assert picture.evaluations == sum(rows) == 14 and picture.scheduler == "HeunDiscreteScheduler"


def test_imagine_records_default_steps_and_guidance(folders):
    source = text2image.find_source(str(folders["sd3"]))
    assert source.parameters["num_inference_steps"].default == 28
    picture = imagine("a fox", model=folders["sd3"], seed=1)
    assert (picture.steps, picture.guidance, picture.evaluations) == (28, 7.0, 56)


def test_a_model_is_loaded_once_and_again_when_it_was_written(copy):
    first = text2image.load_text2image(text2image.find_source(str(copy)))
    assert text2image.load_text2image(text2image.find_source(str(copy))) is first
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    before = imagine("a fox", model=copy, **FAST)
    save_file({k: -v for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    assert not same(before, imagine("a fox", model=copy, **FAST))
    assert text2image.load_text2image(text2image.find_source(str(copy))) is not first


# ---- the record


def test_a_record_prints_well_and_is_saved(sd, tmp_path):
    picture = imagine("a fox", model=sd, guidance=3, **FAST)
    text = "'a fox': 16 x 16, seed 3, 2 steps of EulerAncestralDiscreteScheduler at guidance 3, 4 "
    assert str(picture).startswith(text) and "PIL" not in repr(picture)
    assert picture.model == str(sd) and picture.seconds > 0 and not picture.blanked
    picture.save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as again:
        assert np.array_equal(np.asarray(again), np.asarray(picture.image))
    picture.save(str(tmp_path / "fox.JPG"))
    for name in ("fox", "fox.pkl"):
        with pytest.raises(ValueError, match=rf"path: .*{name}' must end in one of .png"):
            picture.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.JPG", "fox.png"]


def test_no_bar_is_shown_for_short_work(sd, capfd):
    text2image._load.cache_clear()
    imagine(["a fox", "an owl"], model=sd, **FAST)
    assert "%" not in capfd.readouterr().err


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt must be a text .* got ''"),
        ({"prompt": " \n"}, "prompt must be a text"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", ""]}, r"prompt\[1\] must be a text"),
        ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, .* got 0"),
        ({"steps": 1001}, "steps .*the scheduler's training steps, got 1001"),
        ({"steps": 2.5}, "steps must be a whole number .* got 2.5"),
        ({"steps": True}, "steps must be a whole number .* got True"),
        ({"guidance": -1}, "guidance must be a number, 0 or more, got -1"),
        ({"guidance": float("nan")}, "guidance must be a number, 0 or more, got nan"),
        ({"guidance": "7"}, "guidance must be a number, 0 or more, got '7'"),
        (
            {"guidance": 1, "negative": "x"},
            "negative='x' requires a guidance above 1, got guidance=1",
        ),
        ({"negative": ["x"]}, "negative must be a text, got"),
        ({"size": 15}, "size must be multiples of 2 pixels for .*, got 15; give .16, 16."),
        ({"size": (16, 7)}, r"size .*got \(16, 7\); give \(16, 8\)"),
        ({"size": 0}, "size must be .width, height. in pixels, or a side, got 0"),
        ({"size": (8, 8, 8)}, "size must be .width, height. in pixels"),
        ({"size": "16"}, "size must be .width, height. in pixels"),
        ({"size": 4098}, "size must be at most 16,777,216 pixels, got 4098 x 4098"),
        ({"seed": -1}, "seed must be 0 or more and less than 2^63, got -1".replace("^", r"\^")),
        ({"seed": [1, 2]}, "seed: 2 seeds for 1 prompts"),
        ({"seed": 1.5}, "seed must be a whole number, or one a prompt, got 1.5"),
        ({"seed": "12"}, "seed must be a whole number, or one a prompt, got '12'"),
        ({"revision": "main"}, "revision: 'main' .* on the Hub"),
        ({"model": "nobody/nothing"}, "model: cannot load 'nobody/nothing', neither from a folder"),
        ({"model": "a/b/c"}, "model: cannot load 'a/b/c'"),
    ],
)
def test_arguments_that_cannot_work_are_named_before_anything_is_loaded(
    sd, monkeypatch, options, message
):
    monkeypatch.setattr(text2image, "_load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=message):
        imagine(**({"prompt": "a fox", "model": sd} | options))


def test_a_distilled_network_takes_no_negative(copy, monkeypatch):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_cond_proj_dim": 8}))
    monkeypatch.setattr(text2image, "_load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"negative='x': .* no negative prompt"):
        imagine("a fox", model=copy, negative="x")


def test_a_transformers_patch_counts_in_the_size(folders):
    with pytest.raises(ValueError, match=r"size must be multiples of 4 .* give \(16, 16\)"):
        imagine("a fox", model=folders["sd3"], size=(14, 16))


def test_packed_latents_count_in_the_size():
    settings = {
        "vae": {"block_out_channels": [1] * 4, "latent_channels": 16},
        "transformer": {"in_channels": 64, "patch_size": 1},
    }
    known = text2image.text_to_image()
    flux = text2image.Source("flux", Path(), known["FluxPipeline"], settings)
    assert flux.multiple == 16 and flux.guidance == "true_cfg_scale"


def test_pipelines_that_need_more_than_words_are_not_known():
    known = text2image.text_to_image()
    assert {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"} <= known.keys()
    assert not any("Control" in name or "Combined" in name for name in known)
    assert not {"HeliosPipeline", "StableDiffusionImg2ImgPipeline"} & known.keys()


# ---- where it runs


def test_large_pictures_are_decoded_in_tiles():
    assert not needs_tiles(512, 512, 8 * GIB)
    assert needs_tiles(2048, 2048, 8 * GIB) and not needs_tiles(2048, 2048, 80 * GIB)
    assert needs_tiles(1024, 1024, 7 * GIB) and not needs_tiles(1024, 1024, 7 * GIB, itemsize=2)


def test_tiles_are_turned_on_and_off(sd, monkeypatch):
    for free, wanted in ((1, True), (GIB, False)):
        monkeypatch.setattr(machine, "free_memory", lambda _, free=free: free)
        imagine("a fox", model=sd, **FAST)
        assert text2image.load_text2image(text2image.find_source(str(sd))).vae.use_tiling == wanted


def test_parameters_are_counted_by_the_heads_of_the_files(sd):
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    assert text2image._count(sd / "unet") == unet.num_parameters()


def test_where_memory_is_short_weights_are_in_16_bits(copy, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda _: 1)
    picture = imagine("a fox", model=copy, **FAST)
    pipeline = text2image.load_text2image(text2image.find_source(str(copy)))
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert picture.image.size == (16, 16)


# ---- what can be trusted


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def refused(folder: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        imagine("a fox", model=folder, **FAST, **options)


def change_index(folder: Path, **facts) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize(
    ("part", "safe", "unsafe"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_weights_in_pickles_are_refused(copy, tmp_path, part, safe, unsafe):
    (copy / part / safe).unlink()
    (copy / part / unsafe).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    refused(copy, f"model: cannot load '{copy}': .*safetensors")
    assert not (tmp_path / "canary").exists()


def test_code_beside_a_model_is_not_run(copy, tmp_path):
    canary = f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
    code = canary + "from diffusers import UNet2DConditionModel as Mine\n"
    code += "from diffusers import StableDiffusionPipeline as Other\n"
    for name in ("pipeline.py", "None.py", "mine.py", "unet/mine.py", "unet/diffusers.py"):
        (copy / name).write_text(code)
    kinds = {
        "_class_name": ["mine", "Other"],
        "unet": ["mine", "Mine"],
        "vae": ["os", "system"],
        "scheduler": ["diffusers", "StableDiffusionPipeline"],
        "tokenizer": ["auto_pipeline", "AutoPipelineForText2Image"],
        "text_encoder": ["transformers", "AutoModel"],
    }
    index = json.loads((copy / "model_index.json").read_text())
    for name, kind in kinds.items():
        change_index(copy, **index | {name: kind})
        what = "is a .*" if name == "_class_name" else f"the {name} is of"
        for trusted in (False, True) if name == "_class_name" else (False,):
            refused(copy, rf"model: .*{what}", trust_remote_code=trusted)
    change_index(copy, **index)
    imagine("a fox", model=copy, **FAST)  # what is not asked for is not in the way
    assert not (tmp_path / "canary").exists()


def test_code_is_run_by_those_who_trust_it(copy, tmp_path, sd):
    canary = f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
    code = canary + "from diffusers import UNet2DConditionModel\n\n\n"
    code += "class Mine(UNet2DConditionModel):\n    pass\n"
    (copy / "unet" / "mine.py").write_text(code)
    change_index(copy, unet=["mine", "Mine"])
    refused(copy, "the unet is of the class .*mine.*Mine.* trust_remote_code=True")
    assert not (tmp_path / "canary").exists()
    trusted = imagine("a fox", model=copy, trust_remote_code=True, **FAST)
    assert same(trusted, imagine("a fox", model=sd, **FAST)) and (tmp_path / "canary").exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_shards_outside_the_folder_are_refused(copy, part):
    name = "diffusion_pytorch_model" if part == "unet" else "model"
    index = {"metadata": {}, "weight_map": {"a": f"../{name}.safetensors"}}
    (copy / part / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "names a shard outside its folder: '../")


@pytest.mark.parametrize("what", ["unet", "unet/diffusion_pytorch_model.safetensors"])
def test_links_out_of_the_folder_are_refused(copy, tmp_path, what):
    shutil.move(copy / what, tmp_path / "elsewhere")
    (copy / what).symlink_to(tmp_path / "elsewhere")
    refused(copy, f"model: {copy / what}.* is a link that leads out of its folder")


def test_a_snapshot_of_the_hubs_cache_is_a_folder(copy, tmp_path):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0a1b2c"
    blobs = tmp_path / "models--me--mine" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.move(copy, snapshot)
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, blobs / "0f")
    weights.symlink_to("../../../blobs/0f")
    assert imagine("a fox", model=snapshot, **FAST).image.size == (16, 16)


def test_an_adapter_that_leads_elsewhere_is_refused(copy):
    (copy / "text_encoder" / "adapter_config.json").write_text("{}")
    refused(copy, "adapter_config.json leads to weights elsewhere")


def test_find_source_refuses_other_pipelines(copy, tmp_path):
    refused(tmp_path, "model: .* holds no pipeline")
    (copy / "model_index.json").write_text("no JSON")
    refused(copy, "model: .*model_index.json cannot be read as JSON")
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    refused(tmp_path / "ddpm", "is a DDPMPipeline; give a text-to-image")


def test_imagine_refuses_damaged_settings(copy):
    for damaged in ("no JSON", "[1]"):
        (copy / "unet" / "config.json").write_text(damaged)
        refused(copy, f"model: {copy / 'unet' / 'config.json'} ")


def test_imagine_refuses_damaged_weights(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], b"", whole[:8] + b"\xff" * 40 + whole[48:]):
        weights.write_bytes(damaged)
        refused(copy, f"model: {weights} is not in the safetensors format")
    shutil.rmtree(copy / "unet")
    refused(copy, "names a component that has no folder: 'unet'")


def test_importing_genkit_imports_no_diffusers():
    code = "import sys, genkit; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- on the Hub


def test_a_model_of_the_hub_is_pinned_to_a_commit(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--me--mine"
    commits = {"sd": "a" * 40, "sd3": "b" * 40, "own": "d" * 40}
    for name, commit in commits.items():
        shutil.copytree(folders[name], home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commits["sd"])
    newest = imagine("a fox", model="me/mine", **FAST)
    assert same(newest, imagine("a fox", model=folders["sd"], **FAST))
    assert newest.model == "me/mine"
    for name in ("sd3", "own"):
        other = imagine("a fox", model="me/mine", revision=commits[name], **FAST)
        assert same(other, imagine("a fox", model=folders[name], **FAST))
    source = text2image.find_source("me/mine")
    assert source.folder.name == commits["sd"]
    assert text2image.load_text2image(source) is text2image.load_text2image(
        text2image.find_source("me/mine")
    )
    with pytest.raises(ValueError, match="model: cannot load 'me/mine'"):
        imagine("a fox", model="me/mine", revision="c" * 40)


@pytest.mark.hub
def test_stable_diffusion_draws_a_red_square():
    options = {"seed": 1, "steps": 12, "size": 256}
    picture = imagine("a plain bright red background", negative="blue, green", **options)
    red, green, blue = pixels(picture).mean((0, 1))
    assert red > green + 40 and red > blue + 40 and picture.evaluations >= 24
