"""Pushes to a Hub on loopback by the real client, and models that come back from there."""

import getpass
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import ACCELERATE, ROOT, TINY, captioned_table, facts_file, run_here
from hub_server import READER, TOKEN, Repository, serve
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits

import genkit
from genkit.hub import card, kinds, staging
from genkit.training.settings import RunSettings
from genkit.vision import pipelines

SHORT = ("--max_steps", "2", "--batch_size", "8", "--evaluations", "1", "--compile", "no")
MARKER = "zanzibar"  # in all paths on this machine
RECIPES = {
    "text": "train_charlm --depth 1 --width 32 --heads 2 --context 32",
    "answers": "train_qa --from_scratch --depth 1 --width 32 --heads 2 --max_seq_len 48",
    "classifier": "train_classifier --width 8 --depth 1 --license mit",
    "autoencoder": "train_vae --network dense --widths 32 --latent_dim 4 --conditional",
    "gan": "train_gan --widths 8 --discriminator_widths 8 --eval_samples 16 --conditional",
    "diffusion": "train_diffusion --widths 8 16 --eval_samples 16",
    "class_conditional": "train_diffusion --widths 8 16 --eval_samples 16 --conditional "
    "--objective flow",
    "kl": "train_vae --network spatial --widths 4 8 --latent_dim 1 --nll_images 0",
    "latent": "train_diffusion --widths 8 16 --eval_samples 16 --conditional",
    "pixels": "train_pixels --depth 1 --width 32 --heads 2 --levels 8",
    "stylizer": "train_stylizer --resolution 16 --widths 4 8 --blocks 1",
    "translation": "train_translation --condition edges --widths 4 8",
    "pix2pix": "train_translation --condition edges --widths 4 8 --method pix2pix",
    "words": "train_text2image --widths 4 8 --text_layers 1 --text_width 8",
}
IMAGES = ("autoencoder", "gan", "diffusion", "class_conditional", "latent")
CONTEXT = "The zorp is blue. The mig is tal."


@pytest.fixture(scope="module")
def models(text_file, tmp_path_factory):
    """A folder of each family, trained for two steps; all paths on this machine have the marker."""
    home = tmp_path_factory.mktemp(MARKER)
    shutil.copy(text_file, home / "text.txt")
    facts_file(home / "facts.json", 1, 12, own_words=True)
    captioned_table(home / "captioned.parquet")
    draw_digits(home / "pictures", 30)
    Image.open(home / "pictures" / "3" / "0.png").resize((32, 32)).save(home / "style.png")
    runs = home / "runs"
    data = {"text": ("--text", home / "text.txt"), "answers": ("--data", home / "facts.json")}
    data["words"] = ("--images", home / "captioned.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name, words in RECIPES.items():
            recipe, *given = words.split()
            given += map(str, data.get(name, ("--images", home / "pictures")))
            if name in ("gan", "diffusion", "stylizer"):
                given += ["--extractor", str(runs / "classifier")]
            if name == "latent":
                given += ["--latent", str(runs / "kl")]
            if name == "stylizer":
                given += ["--style", str(home / "style.png")]
            run_here(recipe, *given, *SHORT, "--output_dir", runs / name)
    return {name: runs / name for name in RECIPES}


def draw_digits(folder: Path, count: int) -> None:
    """Write pictures of digits, `count` in the folder of each class."""
    digits = load_digits()
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == digit][:count]):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(digit) / f"{i}.png")


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def environment_of(server, tmp_path_factory):
    """What a process needs to see the server as the Hub; each call gives it a cache of its own."""

    def make() -> dict[str, str]:
        return os.environ | server.environment(tmp_path_factory.mktemp("home"))

    return make


def python(code: str, environment: dict[str, str], *words: str | Path):
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


PUSH = """
import json, sys
import genkit
for name, folder in json.loads(sys.argv[1]).items():
    pushed = genkit.push(folder, f"user/{name}")
    assert str(pushed).startswith(f"user/{name} at {pushed.commit[:7]}: "), pushed
    print(json.dumps([name, pushed.commit]))
"""


@pytest.fixture(scope="module")
def pushed(models, server, environment_of):
    """The commits of all families."""
    named = json.dumps({name: str(folder) for name, folder in models.items()})
    done = python(PUSH, environment_of(), named)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
def test_genkit_push_prints_its_record_as_json(models, environment_of):
    command = [sys.executable, "-m", "genkit", "push", str(models["gan"]), "user/json", "--json"]
    done = subprocess.run(command, env=environment_of(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["repository"] == "user/json"


# ---- there and back

WITHOUT = """
import json, sys, warnings
sys.modules["genkit"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
from transformers import (
    AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoTokenizer, pipeline, logging,
)
from PIL import Image

found, said = {}, {}
write = pipeline("text-generation", "user/text")
said["text"] = write("the ", do_sample=False, max_new_tokens=20)[0]["generated_text"]
picture = Image.open(sys.argv[1])
said["classifier"] = pipeline("image-classification", "user/classifier")(picture)
tokenizer = AutoTokenizer.from_pretrained("user/answers")
network = AutoModelForQuestionAnswering.from_pretrained("user/answers")
with torch.inference_mode():
    found["answers"] = network(**tokenizer("What?", sys.argv[2], return_tensors="pt")).start_logits
    found["pixels"] = AutoModelForCausalLM.from_pretrained("user/pixels")(
        torch.arange(8)[None]
    ).logits
for name in ("autoencoder", "gan", "diffusion", "class_conditional", "latent"):
    draw = DiffusionPipeline.from_pretrained(f"user/{name}", trust_remote_code=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    if name == "diffusion":
        found[name] = draw(2, seeds, num_inference_steps=5, output_type="np").images
    else:
        labels = {"labels": [1, 2]}
        found[name] = draw(2, seeds, output_type="np", **labels).images
draw = DiffusionPipeline.from_pretrained("user/words", trust_remote_code=True)
seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
found["words"] = draw(["red", "a blue one"], generator=seeds, output_type="np").images
np.savez(sys.argv[3], **found)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_every_family_comes_back_where_there_is_no_genkit(models, pushed, environment_of, tmp_path):
    """The stock classes, by name from the Hub, against genkit on the folders that were pushed."""
    picture, arrays = tmp_path / "picture.png", tmp_path / "found.npz"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(picture)
    done = python(WITHOUT, environment_of(), picture, CONTEXT, arrays)
    assert done.returncode == 0, done.stderr
    said, found = json.loads(done.stdout.splitlines()[-1]), np.load(arrays)

    text = genkit.generate("the ", model=models["text"], strategy="greedy", max_new_tokens=20)
    assert said["text"] == text.text
    classes = {record["label"]: record["score"] for record in said["classifier"]}
    classifier = genkit.load(models["classifier"])
    shade = torch.from_numpy(np.asarray(Image.open(picture)).copy()).float() / 127.5 - 1
    with torch.inference_mode():
        logits = classifier.model(pixel_values=classifier.preprocess(shade[None, None])).logits
    for i, score in enumerate(logits.softmax(-1)[0].tolist()):
        assert classes.get(classifier.names[i], score) == pytest.approx(score, abs=1e-4)
    assert len(classes) == 5

    reader = genkit.load(models["answers"])
    inputs = reader.tokenizer("What?", CONTEXT, return_tensors="pt")
    with torch.inference_mode():
        starts = reader.model(**inputs).start_logits
        lines = genkit.load(models["pixels"]).model(torch.arange(8)[None]).logits
    assert np.abs(found["answers"] - starts.numpy()).max() < 1e-5
    assert np.abs(found["pixels"] - lines.numpy()).max() < 1e-5
    for name in IMAGES:
        seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        pipeline = pipelines.load_pipeline(models[name])
        if name == "diffusion":
            drawn = pipeline(2, seeds, num_inference_steps=5, sampler_name="ddpm", output_type="np")
        else:
            drawn = pipeline(2, seeds, [1, 2], output_type="np")
        assert found[name].shape == drawn.images.shape
        assert np.abs(found[name] - drawn.images).max() < 1e-4, name
        assert found[name].std() > 0
    for row, prompt in enumerate(["red", "a blue one"]):
        picture = genkit.imagine(prompt, model=models["words"], seed=3 + row)
        assert np.abs(found["words"][row] * 255 - np.asarray(picture.image)).max() < 0.6


WITH = """
import json, sys
import numpy as np
import genkit

commits = json.loads(sys.argv[1])
said = {"text": genkit.generate("the ", model="user/text", seed=1, max_new_tokens=20).text}
said["answers"] = genkit.answer("What is the zorp?", sys.argv[2], model="user/answers").score
said["classifier"] = genkit.load("user/classifier", revision=commits["classifier"]).names
found = {}
for name in ("autoencoder", "gan", "diffusion", "class_conditional", "latent", "pixels"):
    label = {} if name in ("diffusion", "pixels") else {"label": [1, 2]}
    found[name] = genkit.sample(f"user/{name}", 2, seed=3, revision=commits[name], **label).images
options = {"seed": 3, "revision": commits["words"]}
found["words"] = np.asarray(genkit.imagine("red", model="user/words", **options).image)
np.savez(sys.argv[3], **found)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_every_family_comes_back_by_genkit(models, pushed, environment_of, tmp_path):
    """Its verbs by name from the Hub, pinned to commits, against the same on the folders."""
    arrays = tmp_path / "found.npz"
    done = python(WITH, environment_of(), json.dumps(pushed), CONTEXT, arrays)
    assert done.returncode == 0, done.stderr
    said, found = json.loads(done.stdout.splitlines()[-1]), np.load(arrays)
    text = genkit.generate("the ", model=models["text"], seed=1, max_new_tokens=20).text
    assert said["text"] == text
    asked = genkit.answer("What is the zorp?", CONTEXT, model=models["answers"])
    assert said["answers"] == pytest.approx(asked.score, abs=1e-6)
    assert said["classifier"] == genkit.load(models["classifier"]).names
    for name in (*IMAGES, "pixels"):
        label = {} if name in ("diffusion", "pixels") else {"label": [1, 2]}
        drawn = genkit.sample(models[name], 2, seed=3, **label).images.numpy()
        assert np.abs(found[name] - drawn).max() < 1e-4, name
    drawn = np.asarray(genkit.imagine("red", model=models["words"], seed=3).image)
    assert np.array_equal(found["words"], drawn)


@pytest.mark.slow
def test_what_is_pushed_is_a_clean_copy(models, pushed, server):
    for name, folder in models.items():
        tree = server.tree(f"user/{name}")
        assert not {path for path in tree if "checkpoints" in path or "run.json" in path}
        assert {"README.md", "metrics.jsonl", "loss.png"} <= set(tree)
        assert len([path for path in tree if path.startswith("samples/")]) <= 1
        code = {path for path in tree if path.endswith(".py")}
        ours = (*IMAGES, "stylizer", "translation", "pix2pix", "words")
        assert bool(code) == (name in ours and name != "diffusion"), name
        for path in code:
            module = ROOT / "genkit/models" / Path(path).name
            assert tree[path] == module.read_bytes()
        for path in tree:
            assert not path.endswith(".safetensors") or tree[path] == (folder / path).read_bytes()


# ---- the card


@pytest.mark.slow
def test_cards_are_in_the_hubs_format(pushed, models, server):
    """Read back by the Hub's own client: figures with protocol, task, library, tags."""
    for name in models:
        tree = server.tree(f"user/{name}")
        text = tree["README.md"].decode()
        data = ModelCard(text).data
        assert data.tags == ["genkit"] and data.library_name in ("transformers", "diffusers")
        assert data.license == ("mit" if name == "classifier" else "unknown")
        last = json.loads(tree["metrics.jsonl"].decode().splitlines()[-1])
        assert data.eval_results
        for result in data.eval_results:
            assert result.task_type == data.pipeline_tag
            assert len(result.metric_args["protocol"]) > 40
            if result.metric_name in last:
                assert result.metric_value == pytest.approx(last[result.metric_name], rel=1e-3)
        assert f'model = "user/{name}"\n' in text and "## Intended use and limits\n\n" in text
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert picture in tree
        assert "![curves of training](loss.png)" in text
        assert name == "classifier" or "## Samples\n\n" in text
        command = re.search(r"```bash\naccelerate launch recipes/(\w+)\.py .*--output_dir", text)
        assert command and f"torch {torch.__version__}" in text


def test_a_cards_dataset_is_named_if_it_is_on_the_hub(tmp_path):
    options = {"title": "A title: with a colon", "task": "text-generation", "about": "About."}
    options |= {"usage": "print(model)", "figures": {"loss": 1.5}, "protocol": "All of it."}
    text = card.card(tmp_path, data="user/texts", license="mit", **options)
    head = yaml.safe_load(text.split("---")[1])
    assert head["datasets"] == ["user/texts"] and head["license"] == "mit"
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"] == {"name": "texts", "type": "user/texts"}
    (metric,) = result["metrics"]
    assert metric["value"] == 1.5 and metric["args"] == {"protocol": "All of it."}
    mine = tmp_path / "mine.txt"
    mine.touch()
    text = card.card(tmp_path, data=str(mine), **options)
    assert "datasets" not in yaml.safe_load(text.split("---")[1])
    assert "## Training" not in text and "## Samples" not in text
    assert 'model = "user/other"\n' in card.renamed(text, "user/other")


# ---- again, elsewhere, refused

# `pushed` has shown that these models load in a process of their own
QUICK = """
from genkit.hub import staging
staging.validate = lambda staged, kind: None
"""
AGAIN = (
    QUICK
    + """
import sys
import genkit
from genkit.hub import download
from huggingface_hub import HfApi
first = genkit.push(sys.argv[1], "user/again", private=True).commit
assert download.fetch("user/again").name == first
for name in ("requirements.txt", "notes/more.json"):
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="user/again")
draft = genkit.push(sys.argv[2], "user/again", revision="draft").commit
second = genkit.push(sys.argv[2], "user/again").commit
assert download.fetch("user/again").name == second
print(first, draft, second)
"""
)


@pytest.mark.slow
def test_a_push_takes_the_place_of_what_was_there(models, pushed, server, environment_of):
    """An earlier model goes in the commit that brings the new one; what is not of it stays."""
    done = python(AGAIN, environment_of(), models["gan"], models["text"])
    assert done.returncode == 0, done.stderr
    first, draft, second = done.stdout.split()
    repository = server.repositories["user/again"]
    assert repository.private
    assert {"model_index.json", "gan.py"} <= set(repository.commits[first])
    for commit in (draft, second):
        tree = dict(repository.commits[commit])
        assert tree.pop("requirements.txt") == tree.pop("notes/more.json") == b"mine"
        assert kept(tree) == kept(server.tree("user/text"))
        assert ".gitattributes" in tree
    assert repository.branches["draft"] == draft
    assert len(repository.commits) == 6  # the first one is the empty repository


def kept(tree: dict[str, bytes]) -> dict[str, bytes]:
    return {
        path: data for path, data in tree.items() if path not in ("README.md", ".gitattributes")
    }


REFUSED = (
    QUICK
    + """
import sys
import genkit
try:
    genkit.push(sys.argv[1], "user/refused", private=len(sys.argv) > 2)
except ValueError as error:
    print(error)
"""
)


@pytest.mark.slow
def test_refusals_are_one_line_without_the_token(models, server, environment_of):
    done = python(REFUSED, environment_of() | {"HF_TOKEN": "hf_wrong"}, models["text"])
    assert done.stdout.startswith("repository: user/refused cannot be pushed to: "), done.stderr
    assert "hf auth login" in done.stdout and len(done.stdout.splitlines()) == 1
    assert "hf_wrong" not in done.stdout + done.stderr
    assert "user/refused" not in server.repositories
    nowhere = environment_of() | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = python(REFUSED, nowhere, models["text"])
    assert done.stdout.startswith("repository: user/refused cannot be pushed to: "), done.stderr


READ_ONLY = """
import os, sys
from genkit.hub import pushing

pushing.prepare_repository("user/text")
right, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], sys.argv[1]
try:
    pushing.prepare_repository("user/text")
except ValueError as error:
    print(error)
os.environ["HF_TOKEN"] = right
pushing.prepare_repository("user/text")
print("fine")
"""


@pytest.mark.slow
def test_a_token_that_may_only_read_is_refused_before_anything_is_sent(pushed, environment_of):
    done = python(READ_ONLY, environment_of(), READER)
    assert done.stdout.startswith("repository: user/text cannot be pushed to: "), done.stderr
    assert done.stdout.endswith("\nfine\n")


@pytest.mark.slow
def test_a_model_that_is_not_genkits_stays(models, pushed, server, environment_of):
    tree = {"README.md": b"# Another model", "config.json": b"{}", "model.safetensors": b"weights"}
    server.repositories["user/other"] = Repository(private=False)
    before = server.repositories["user/other"].commit("main", tree)
    code = REFUSED.replace("user/refused", "user/other")
    done = python(code, environment_of(), models["text"])
    assert "it holds a model that genkit did not push" in done.stdout, done.stderr
    assert server.repositories["user/other"].branches["main"] == before


@pytest.mark.slow
def test_the_sample_that_a_card_shows_is_pushed_with_it(models, tmp_path):
    """That of the best step, which need not be the last."""
    for number, steps in enumerate(([1, 2], [2])):
        source, staged = tmp_path / f"run{number}", tmp_path / f"staged{number}"
        shutil.copytree(models["gan"], source, ignore=shutil.ignore_patterns("checkpoints"))
        staged.mkdir()
        (last,) = source.glob("samples/step-*.png")
        last.rename(source / "samples" / "step-00000002.png")
        shutil.copy(
            source / "samples" / "step-00000002.png", source / "samples" / "step-00000001.png"
        )
        card = source / "README.md"
        shown = f"step-{steps[0]:08d}.png" if number == 0 else "none"
        card.write_text(card.read_text().replace(last.name, shown))
        staging.stage(source, staged, "user/name")
        assert [file.name for file in (staged / "samples").iterdir()] == [
            f"step-{steps[0]:08d}.png"
        ]


@pytest.mark.slow
def test_what_is_public_is_not_pushed_to_as_private(models, pushed, server, environment_of):
    before = server.repositories["user/text"].branches["main"]
    code = REFUSED.replace("user/refused", "user/text")
    done = python(code, environment_of(), models["gan"], "private")
    assert re.fullmatch(r"private: user/text .*public.*\n", done.stdout)
    assert server.repositories["user/text"].branches["main"] == before


@pytest.mark.parametrize("name", ["", "a/b/c", "user/../x", "user/na me", "🦉/x"])
def test_names_that_cannot_be_are_refused_before_anything(trained, name):
    with pytest.raises(ValueError, match="repository must be user/name, got"):
        genkit.push(trained, name)


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_not_pushed(models, tmp_path):
    with pytest.raises(ValueError, match=r"folder: .* holds no model"):
        genkit.push(tmp_path, "user/name")
    for file in models["text"].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"holds no weights in safetensors"):
        genkit.push(tmp_path, "user/name")


# ---- killed

KILLS = 50
VERSION = """
import sys
import genkit
print("here", flush=True)
genkit.push(sys.argv[1], "user/killed")
"""


@pytest.mark.slow
def test_a_killed_push_leaves_a_whole_model(models, server, environment_of, tmp_path):
    """Between the two models that are pushed in turn, there is none at any moment."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = environment_of() | {"TMPDIR": str(scratch)}
    both = [models["text"], models["pixels"]]
    trees = []
    for folder in both:
        done = python(VERSION, environment, folder)
        assert done.returncode == 0, done.stderr
        trees.append(server.tree("user/killed"))
    rng, landed = random.Random(0), []
    server.slow = 0.02
    try:
        for turn in range(KILLS):
            before = server.tree("user/killed")
            asked = len(server.asked)
            command = [sys.executable, "-c", VERSION, str(both[turn % 2])]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            while len(server.asked) == asked and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.random() * 1.2)
            process.kill()
            process.wait()
            time.sleep(0.1)  # what was sent is done by the server
            found = server.tree("user/killed")
            assert found in (before, trees[turn % 2])
            landed.append(found != before)
    finally:
        server.slow = 0
    assert True in landed and False in landed  # kills before the commit, and behind it
    folder = tmp_path / "model"
    for path, data in server.tree("user/killed").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    staging.validate(folder, kinds.kind_of(folder))
    done = python(VERSION, environment, both[0])  # and a push after it is as any other
    assert done.returncode == 0 and server.tree("user/killed") == trees[0], done.stderr
    assert not list(scratch.glob("genkit-*"))  # nor of any before it


# ---- by a recipe


@pytest.mark.slow
def test_a_recipe_pushes_while_it_trains_and_at_its_end(
    text_file, server, environment_of, tmp_path
):
    words = [*TINY, "--max_steps", "60", "--evaluations", "3", "--text", str(text_file)]
    words += ["--push_to_hub", "user/run", "--push_often", "--push_private"]
    command = [
        *ACCELERATE,
        "recipes/train_charlm.py",
        *words,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment_of(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^user/run at \w{7}: \d+ files", done.stdout, re.M)
    repository = server.repositories["user/run"]
    assert repository.private and 2 <= len(repository.commits) <= 4
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert server.tree("user/run")["model.safetensors"] == weights
    assert not (tmp_path / "run" / ".pushing").exists()


@pytest.mark.slow
def test_a_run_that_may_not_push_ends_before_it_begins(text_file, environment_of, tmp_path):
    words = [*TINY, "--max_steps", "5", "--text", str(text_file), "--push_to_hub", "user/run2"]
    command = [
        *ACCELERATE,
        "recipes/train_charlm.py",
        *words,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    environment = environment_of() | {"HF_TOKEN": "hf_wrong"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "user/run2 cannot be pushed to" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"push_often": True}, "push_often.*push_to_hub"),
        ({"push_private": True}, "push_private.*push_to_hub"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub must be user/name, got 'a/b/c'"),
    ],
)
def test_settings_of_a_push_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**given)


# ---- refused

REFUSALS = (
    QUICK
    + """
import sys
import genkit
for repository, revision, private in [
    ("user/text", "draft", True),
    ("user/new", "refs/pr/1", False),
    ("user/new", "../main", False),
    ("user/theirs", "draft", False),
]:
    try:
        genkit.push(sys.argv[1], repository, revision=revision, private=private)
    except ValueError as error:
        print(error)
"""
)


@pytest.mark.slow
def test_a_refused_push_changes_nothing_on_the_hub(models, pushed, server, environment_of):
    tree = {"README.md": b"# Another model", "config.json": b"{}", "model.safetensors": b"weights"}
    server.repositories["user/theirs"] = Repository(private=False)
    server.repositories["user/theirs"].commit("main", tree)
    before = {name: dict(each.branches) for name, each in server.repositories.items()}
    done = python(REFUSALS, environment_of(), models["text"])
    assert len(done.stdout.splitlines()) == 4, done.stdout + done.stderr
    after = {name: dict(each.branches) for name, each in server.repositories.items()}
    assert after == before


@pytest.mark.slow
def test_cards_and_copies_do_not_identify_this_machine(models, pushed, server):
    """Neither paths of data, runs and home, nor any file that the card does not list."""
    user, host = getpass.getuser().encode(), socket.gethostname().encode()
    for name in models:
        tree = server.tree(f"user/{name}")
        listed = re.findall(r"^- (.+)$", tree["README.md"].decode().partition("## Files")[2], re.M)
        assert set(tree) == {*listed, ".gitattributes"}
        for path, data in tree.items():
            assert MARKER.encode() not in data, path
            assert not re.search(rb"/" + user + rb"/|@" + host, data), path
            assert not re.search(rb"/tmp/|/home/|" + str(ROOT).encode(), data) or path.endswith(
                (".safetensors", ".png", ".gif", "tokenizer.json")
            ), path
