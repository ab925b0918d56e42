"""The card of an aligned model: by what method it learned, from what, and its figures."""

from __future__ import annotations

from pathlib import Path

from genkit.data.dialogues import Prompt
from genkit.hub import card
from genkit.training.actors import Actors
from genkit.training.run import Run

NAMES = {
    "ppo": "proximal policy optimisation (PPO)",
    "grpo": "group relative policy optimisation (GRPO)",
    "rloo": "REINFORCE with a leave-one-out baseline (RLOO)",
    "dpo": "direct preference optimisation (DPO)",
}
DRAWN = (
    "{count:,} completions of validation prompts, drawn at temperature 1 from fixed seeds by this "
    "model and by the one that it started from. The divergence val_kl is the mean of "
    "log π - log π_ref over this model's completions (k1), in nats a completion; the objective is "
    "the reward less {beta:g} times it; win_rate counts a tie as half."
)
PAIRED = (
    "All {count:,} validation pairs. Chosen and rejected are the mean changes of an answer's "
    "log-probability from the model that it started from, in nats; the margin is {beta:g} times "
    "their difference, and accuracy the share of pairs where it is above 0."
)


def write_aligned_card(
    folder: Path,
    run: Run,
    actors: Actors,
    *,
    method: str,
    source: str,
    data: str,
    beta: float,
    figures: dict[str, float],
    count: int,
    prompt: Prompt,
) -> None:
    """Write the card of a policy.

    Args:
        folder: of the model.
        method: ppo, grpo, rloo or dpo.
        source: what it learned from, in words.
        data: pairs or prompts: a file's name, or the id of a dataset on the Hub.
        beta: weight of the divergence.
        figures: of the last evaluation, of `count` completions or pairs.
        prompt: one that the policy was evaluated on, for examples.
    """
    origin = actors.before
    card.write_card(
        folder,
        run.folder.path,
        title=f"{Path(origin.name).name}, aligned",
        task="text-generation",
        about=f"{origin.name}, {origin.model.num_parameters():,} parameters, aligned by "
        f"{NAMES[method]} with {source} for {run.progress.step:,} steps.",
        usage=card.TEXT_USAGE.format(prompt=prompt),
        prompt=prompt,
        figures=figures,
        protocol=(PAIRED if method == "dpo" else DRAWN).format(count=count, beta=beta),
        data=data,
    )
