"""Training characters per second of a stock Llama in genkit's step, and of nanoGPT, in turn.

    python benchmarks/throughput.py --nanogpt path/to/nanoGPT

The shape is that of nanoGPT's CPU recipe (config/train_shakespeare_char.py with the flags of its
README): 4 layers, 4 heads, width 128, context 64, batch 12, no dropout, AdamW. nanoGPT runs as it
comes, eager and compiled, and the faster one counts.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from genkit.data.order import Windows
from genkit.models import lm
from genkit.training import optim
from genkit.training.settings import RunSettings

VOCABULARY, CONTEXT, BATCH, BLOCK = 65, 64, 12, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--blocks", type=int, default=8, help=f"of {BLOCK} steps, each, in turn")
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 1_000_000).astype(np.uint16)
    steps = {
        "genkit, bf16, compiled": genkit_step(ids, half=True),
        "genkit, float32, compiled": genkit_step(ids, half=False),
        "nanoGPT, eager": nanogpt_step(arguments.nanogpt, ids, compiled=False),
        "nanoGPT, compiled": nanogpt_step(arguments.nanogpt, ids, compiled=True),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # compile and warm up
        run(step)
    for _ in range(arguments.blocks):
        for name, step in steps.items():
            times[name].append(run(step))
    each = {name: statistics.median(values) for name, values in times.items()}
    peer = min(each["nanoGPT, eager"], each["nanoGPT, compiled"])
    for name, seconds in each.items():
        print(
            f"{name:28} {1000 * seconds:6.1f} ms a step  {BATCH * CONTEXT / seconds:8,.0f} "
            f"characters/s  {peer / seconds:.2f} times the faster nanoGPT"
        )


def run(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(BLOCK):
        step()
    return (time.perf_counter() - start) / BLOCK


def genkit_step(ids: np.ndarray, half: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = lm.make_model("llama", VOCABULARY, CONTEXT, 4, 128, 4, 0.0)
    model.set_attn_implementation("eager" if half else "sdpa")
    settings = RunSettings(
        optimizer="adamw", learning_rate=1e-3, muon_learning_rate=1e-3, weight_decay=0.1
    )
    (optimizer,) = optim.optimizers(model, settings)
    windows = Windows(ids, CONTEXT, seed=0)
    count = [0]

    @torch.compile
    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return lm.loss(model, inputs, targets)

    def step() -> None:
        positions = count[0] * BATCH + np.arange(BATCH)
        count[0] += 1
        loss(*windows.batch(positions)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def nanogpt_step(checkout: Path, ids: np.ndarray, compiled: bool) -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("nanogpt", checkout / "model.py")
    assert spec is not None and spec.loader is not None, f"no model.py in {checkout}"
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": CONTEXT, "bias": False}
    gpt = peer.GPT(peer.GPTConfig(vocab_size=VOCABULARY, dropout=0.0, **shape))
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    model = torch.compile(gpt) if compiled else gpt

    def step() -> None:
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        rows = torch.stack(
            [torch.from_numpy(ids[s : s + CONTEXT + 1].astype(np.int64)) for s in starts]
        )
        model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
