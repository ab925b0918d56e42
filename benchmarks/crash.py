"""Kill a training run again and again, resume it each time, and compare it with an unharmed one.

    python benchmarks/crash.py --kills 200                  # SIGKILL at random moments
    python benchmarks/crash.py --kills 200 --processes 2
    python benchmarks/crash.py --stages                     # at every file operation of a save
    python benchmarks/crash.py --recipe train_vae --kills 20

Each attempt is the real recipe in a fork of this process, which has only imported what the unharmed
run did: that saves seconds of imports an attempt, and nothing else. Now and then an attempt is
stopped and continued first, or asked to end by SIGTERM or SIGHUP, which does not count as a kill.
Files of the user's own lie among checkpoints and samples. A run must end with the same bytes in its
last checkpoint and in its model, the same log, and the same files as the run that nobody killed,
and the user's own must be as they were.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import runpy
import secrets
import shutil
import signal
import socket
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401  imported before the first fork

from genkit.data.characters import make_tokenizer
from genkit.models import lm
from genkit.training import run  # noqa: F401

RECIPES = Path(__file__).parent.parent / "recipes"
STEPS = 60
SHAPES = {
    "align": "--reward length=5 --max_new_tokens 4 --updates 2",
    "finetune_text2image": "--prompt digits --train_text_encoder --prior_prompt prior "
    "--prior_images 2 --sample_steps 2 --samples 1 --evaluations 2",
    "train_charlm": "--depth 1 --width 32 --heads 2 --context 32",
    "train_classifier": "--depth 1 --width 4 --shift 1",
    "train_autoencoder": "--network conv --widths 4 --latent_dim 2 --noise salt --head_weight 0.1",
    "train_diffusion": "--widths 8 16 --eval_samples 20 --eval_steps 2 --conditional",
    "train_pixels": "--depth 1 --width 32 --heads 2 --levels 4 --conditional",
    "train_table": "--depth 1 --width 32 --heads 2",
    "train_table_autoencoder": "--widths 16 8",
    "train_seq2seq": "--depth 1 --width 32 --heads 2 --max_length 16 --eval_samples 8",
    "train_gan": "--preset wgan_gp --widths 4 4 4 --discriminator_widths 4 4 4 --latent_dim 4 "
    "--critic_steps 3 --eval_samples 20",
    "train_private": "--method gan --widths 4 4 --critic_widths 4 8 --latent_dim 4 --delta 1e-4 "
    "--accountant rdp",
    "train_vaegan": "--widths 4 --latent_dim 2 --discriminator_widths 4",
    "train_vae": "--widths 16 --latent_dim 2 --binarize --conditional --nll_images 10",
}
EVERY = "--batch_size 4 --compile no --ema 0.9 --mixed_precision no"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=SHAPES, default="train_charlm")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["GENKIT_CACHE"] = str(work / "cache")
        start = time.monotonic()
        crash = Crash(work, arguments.recipe, arguments.processes)
        assert crash.attempt(work / "whole", report=True) == 0, "the unharmed run failed"
        crash.import_all()
        start = time.monotonic()
        assert crash.attempt(work / "again") == 0, "the unharmed run failed"
        whole = time.monotonic() - start
        crash.compare(work / "again")
        print(f"unharmed run: {STEPS} steps in {whole:.1f} s at {arguments.processes} process(es)")
        if arguments.stages:
            stages(crash)
        if arguments.kills:
            random_kills(crash, arguments.kills, whole, random.Random(arguments.seed))


def random_kills(crash: "Crash", kills: int, whole: float, rng: random.Random) -> None:
    start, done, asked, runs = time.monotonic(), 0, 0, 0
    while done < kills:
        folder = crash.work / f"run-{runs}"
        foreign(folder)
        mine = listing(folder)
        while not crash.has_ended(folder):
            by = rng.choices(SIGNALS, (6, 1, 1))[0]
            status = crash.attempt(folder, rng.uniform(0, 1.1 * whole), by, rng.random() < 0.2)
            assert status in (0, -by), f"an attempt ended by itself: {status}"
            done += status == -signal.SIGKILL
            asked += by != signal.SIGKILL
        crash.compare(folder, mine)
        shutil.rmtree(folder)
        runs += 1
        print(f"{done} of {kills} kills", flush=True)
    each = (time.monotonic() - start) / done
    print(
        f"{done} kills over {runs} runs, and {asked} signals to end: all ended bit-identical to "
        f"the unharmed run; {each:.1f} s a kill"
    )


def foreign(folder: Path) -> None:
    """Put files, folders and links of the user's own where a run keeps its own."""
    checkpoints, samples = folder / "checkpoints", folder / "samples"
    for name in ("step-00000010.bak", "step-00000010 (copy)", "step-20", "old"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "manifest.json").write_text("mine")
    samples.mkdir()
    for place in (checkpoints, samples):
        (place / "notes.txt").write_text("mine")
        # the name of a checkpoint that no run writes: at its own step a save sets a link aside
        (place / f"step-{STEPS + 39:08d}").symlink_to(folder)
    for name in ("step-00000010 (copy).md", "step-20.png", "step-00000010.md.bak", "mine.png"):
        (samples / name).write_text("mine")


def listing(folder: Path) -> dict[str, bytes | str]:
    """Return all that lies in a folder: the bytes of files, and where links lead."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else "no file"
    return found


def saved(names: Iterable[str]) -> set[str]:
    """Return the checkpoints among names: a signal to end writes one wherever the run is."""
    return {name for name in names if re.fullmatch(r"checkpoints/step-\d{8}", name)}


def stages(crash: "Crash") -> None:
    """Die at the n-th file operation of one save, for every n."""
    stage = 0
    while True:
        stage += 1
        folder = crash.work / f"stage-{stage}"
        status = crash.attempt(folder, at_event=stage)
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"stage {stage} ended by itself: {status}"
        assert crash.attempt(folder) == 0, f"stage {stage}: the run did not resume"
        crash.compare(folder)
    assert stage > 10, "a save has more file operations than that"
    print(f"{stage - 1} stages of a save: all resumed bit-identical to the unharmed run")


def make_policy(work: Path) -> list[str]:
    """Save a small random model and prompts for it, and return the words that name them."""
    tokenizer = make_tokenizer("abcdefgh \n")
    model = lm.make_model("llama", len(tokenizer), 32, 1, 32, 2, 0.0)
    model.save_pretrained(work / "base")
    lm.save_tokenizer(tokenizer, work / "base")
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(a + b for a in "abcdefgh" for b in "abcdefgh") + "\n")
    return ["--init_from", str(work / "base"), "--prompts", str(prompts)]


def make_pipeline(work: Path) -> list[str]:
    """Save a small random text-to-image pipeline and images; return the words that name them."""
    import diffusers
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    ends = ("<|startoftext|>", "<|endoftext|>")
    pieces = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    words = {piece: i for i, piece in enumerate([*pieces, *ends])}
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "vocab_size": 54}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, **layers, **ids)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    tokenizer = CLIPTokenizer(words, [], model_max_length=16)
    parts = vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None
    diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(
        work / "base"
    )
    (work / "images").mkdir()
    for i in range(4):
        noise = random.Random(i).randbytes(8 * 8 * 3)
        Image.frombytes("RGB", (8, 8), noise).save(work / "images" / f"{i}.png")
    return ["--init_from", str(work / "base"), "--images", str(work / "images")]


def make_pairs(work: Path) -> list[str]:
    """Write letters with the same backwards; return the flags that name them."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(300)]
    rows = [json.dumps({"source": text, "target": text[::-1]}) for text in texts]
    (work / "pairs.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return ["--data", str(work / "pairs.jsonl")]


def make_table(work: Path) -> list[str]:
    """Write numbers, categories and gaps; return the flags that name them."""
    rng = random.Random(0)
    rows = [
        f"{rng.random():.3f},{rng.choice('abc')},{rng.choice(['', '1', '2'])}" for _ in range(200)
    ]
    (work / "rows.csv").write_text("\n".join(["x,y,z", *rows]) + "\n")
    return ["--data", str(work / "rows.csv")]


class Crash:
    def __init__(self, work: Path, recipe: str, processes: int) -> None:
        self.work, self.recipe, self.processes = work, RECIPES / f"{recipe}.py", processes
        self.rng = random.Random(0)
        self.words = [*SHAPES[recipe].split(), *EVERY.split()]
        if recipe == "train_charlm":
            text = work / "text.txt"
            text.write_text("".join(random.Random(0).choices("abcdefgh \n", k=20_000)))
            self.words += ["--text", str(text)]
        elif recipe in ("train_table", "train_table_autoencoder"):
            self.words += make_table(work)
        elif recipe == "train_seq2seq":
            self.words += make_pairs(work)
        elif recipe == "align":
            self.words += make_policy(work)
        else:
            if recipe == "finetune_text2image":
                self.words += make_pipeline(work)
            from diffusers import AutoencoderKL, DiffusionPipeline  # noqa: F401  as above
            from sklearn.datasets import load_digits  # noqa: F401

    def import_all(self) -> None:
        """Import what the unharmed run has imported."""
        for name in (self.work / "modules").read_text().split():
            with contextlib.suppress(Exception):  # parts of others, which do not stand alone
                importlib.import_module(name)

    def has_ended(self, folder: Path) -> bool:
        """Whether the run has saved its last step."""
        return (folder / "checkpoints" / f"step-{STEPS:08d}").exists()

    def attempt(
        self,
        folder: Path,
        after: float | None = None,
        by: int = signal.SIGKILL,
        stop: bool = False,
        at_event: int = 0,
        report: bool = False,
    ) -> int:
        """Start or resume the run in a folder; return 0, or minus the signal that ended it.

        Args:
            after: seconds until the signal `by` is sent, or None for none.
            stop: stop and continue the processes once before.
            at_event: see `stages`.
            report: leave the names of all modules that were imported.
        """
        port = _free_port()
        children = []
        for rank in range(self.processes):
            child = os.fork()
            if child == 0:
                self._train(folder, rank, port, at_event, report)
            children.append(child)
        if after is not None:
            for number in (signal.SIGSTOP, signal.SIGCONT) if stop else ():
                time.sleep(after / 4)
                for child in children:
                    os.kill(child, number)
            time.sleep(after / 2 if stop else after)
            for child in self.rng.sample(children, len(children)):  # one dies before the others
                os.kill(child, by)
                time.sleep(self.rng.choice((0, 0.1)) if len(children) > 1 else 0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return min(codes) if min(codes) < 0 else max(codes)

    def _train(self, folder: Path, rank: int, port: int, at_event: int, report: bool) -> None:
        if hasattr(os, "sched_setaffinity"):  # one thread: so tiny a network gains nothing by two
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[(os.getppid() + rank) % len(cores)]})
        quiet = os.open(self.work / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if self.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            os.environ |= {"WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"LOCAL_WORLD_SIZE": str(self.processes), "ACCELERATE_USE_CPU": "1"}
        if at_event:
            sys.addaudithook(_die_at(at_event, folder / "checkpoints"))
        # the key of private runs, without which no two of them are alike
        secrets.token_hex = lambda nbytes=None: "5a" * (nbytes or 32)
        sys.argv = [str(self.recipe), "--output_dir", str(folder)]
        sys.argv += ["--max_steps", str(STEPS), "--save_steps", "4", "--evaluations", "2"]
        sys.argv += self.words
        if (folder / "run.json").exists():
            sys.argv += ["--resume"]
        status = 1
        try:
            runpy.run_path(str(self.recipe), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            if report:
                (self.work / "modules").write_text("\n".join(sys.modules))
            sys.stdout.flush()
            os._exit(status)

    def compare(self, folder: Path, mine: dict[str, bytes | str] | None = None) -> None:
        """Check that a run has ended as the unharmed one did.

        Args:
            mine: what lay in its folder before it began.
        """
        whole = self.work / "whole"
        model = next(whole.glob("*.safetensors"), None) or next(whole.glob("*/*.safetensors"))
        last = f"checkpoints/step-{STEPS:08d}/tensors.safetensors"
        for name in (last, str(model.relative_to(whole))):
            same = (folder / name).read_bytes() == (whole / name).read_bytes()
            assert same, f"{folder.name}: {name} differs from the unharmed run's"
        assert _log(folder) == _log(whole), f"{folder.name}: the log differs"
        found, own = listing(folder), mine or {}
        lost = [name for name in own if found.get(name) != own[name]]
        assert not lost, f"{folder.name}: what was the user's own has changed: {lost}"
        left, right = (saved(names) for names in (found.keys() - own.keys(), listing(whole)))
        assert len(left) == len(right), f"{folder.name}: its checkpoints are {left}"
        names = {name for name in found if not name.startswith(tuple(left - own.keys()))}
        expected = {name for name in listing(whole) if not name.startswith(tuple(right))}
        odd = names ^ (own.keys() | expected)
        assert not odd, f"{folder.name}: left over, or missing: {odd}"


def _die_at(number: int, folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Kill this process at the n-th file operation of the save of step 8, which deletes step 0."""
    events: list[str] = []
    inside = ("tensors.safetensors", "state.json", "manifest.json")  # as rmtree names them

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event in EVENTS else ""
        ours = path.startswith(str(folder)) or path in inside
        if ours and (events or "step-00000008" in path):
            events.append(path)
            if len(events) == number and "step-00000012" not in "".join(events):
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
