"""What DPO learns from pairs of answers: their tokens, their log-probabilities, their figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from genkit.data.dialogues import Pair
from genkit.models import alignment_losses, completions
from genkit.models.completions import Rows
from genkit.text.dialogue_tokens import Row, encode_dialogue
from genkit.text.language_model import LanguageModel
from genkit.training.actors import Actors
from genkit.training.processes import Processes


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as rows of tokens, the chosen one and the rejected one."""

    pairs: list[tuple[Row, Row]]

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, which: np.ndarray, device: torch.device) -> Rows:
        """Return the chosen rows of some pairs, then the rejected ones, as one batch."""
        rows = [self.pairs[i][side] for side in (0, 1) for i in which]
        whole = completions.pad_rows([row.ids for row in rows], [row.answers for row in rows])
        return whole.to(device)


def encode_pairs(pairs: list[Pair], language: LanguageModel) -> list[tuple[Row, Row]]:
    """Encode both sides of each pair.

    Raises:
        ValueError: one is longer than the model's context; its row is named.
    """
    found = []
    for i, pair in enumerate(pairs):
        name = f"data: row {i}"
        chosen = encode_dialogue(pair.prompt, pair.chosen, language, f"{name}: chosen")
        rejected = encode_dialogue(pair.prompt, pair.rejected, language, f"{name}: rejected")
        found.append((chosen, rejected))
    return found


@dataclass(frozen=True)
class PairLogs:
    """Log-probabilities of the answers of pairs under policy and reference, (n,) each."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor

    def loss(self, beta: float, label_smoothing: float) -> torch.Tensor:
        """Return the loss of DPO."""
        return alignment_losses.dpo_loss(
            self.chosen,
            self.rejected,
            self.reference_chosen,
            self.reference_rejected,
            beta,
            label_smoothing,
        )

    def figures(self, beta: float) -> dict[str, float]:
        """Return how pairs are ordered, and how far answers have moved from the reference."""
        chosen = self.chosen - self.reference_chosen
        rejected = self.rejected - self.reference_rejected
        margins = beta * (chosen - rejected)
        return {
            "accuracy": (margins > 0).double().mean().item(),
            "margin": margins.mean().item(),
            "chosen": chosen.mean().item(),
            "rejected": rejected.mean().item(),
        }


def pair_logs(actors: Actors, normalize_length: bool, rows: Rows) -> PairLogs:
    """Compute the log-probabilities of pairs, with gradients for the policy.

    Args:
        normalize_length: divide by the numbers of tokens.
        rows: as `EncodedPairs.take` returns them.
    """

    def sum_up(logs: torch.Tensor) -> torch.Tensor:
        whole = logs.sum(1)
        return whole / rows.mask.sum(1) if normalize_length else whole

    under_policy = sum_up(actors.policy(rows)[0])
    with torch.no_grad():
        under_reference = sum_up(actors.reference(rows)[0])
    return PairLogs(*under_policy.chunk(2), *under_reference.chunk(2))


@torch.no_grad()
def all_pair_logs(
    processes: Processes, pairs: EncodedPairs, score: Callable[[Rows], PairLogs], batch_size: int
) -> PairLogs:
    """Compute the log-probabilities of pairs, of which each process reads its part.

    Args:
        score: gives those of some pairs, whose rows are as `EncodedPairs.take` returns them.
        batch_size: pairs at once.
    """
    mine = np.array(processes.shard(len(pairs)), int)
    found = []
    for which in np.array_split(mine, -(-len(mine) // batch_size)):
        columns = vars(score(pairs.take(which, processes.device))).values()
        found.append(torch.stack(list(columns), 1).cpu().numpy())
    (every,) = processes.gather_arrays(np.concatenate(found))
    return PairLogs(*torch.from_numpy(every).T)
