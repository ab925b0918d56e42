"""A critic whose gradients of single rows are quick: every layer is one product of matrices.

A convolution of many rows with a kernel each is slow on CPUs; the product of patches with a matrix
is not. There is no normalisation over a batch, which would mix rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

KERNEL, STRIDE = 6, 2  # of the patches of pixels; further layers join squares of 2 x 2
GRACE = 20  # generator steps after which there may be too few critic steps
REJECTED = 0.6  # of generated images, below which there are too few
AVERAGED = 0.9  # decay of the average of this share
STATE = ("count", "made", "turns", "accuracy")  # of CriticSteps


class Critic(torch.nn.Module):
    """Scores images: a higher score means more probably real.

    Args:
        image_size: channels, height, width.
        widths: features of a patch of pixels, and of the squares of 2 x 2 of each later layer.
        labels: number of classes; 0 for an unconditional critic. The class enters by projection
            (Miyato and Koyama 2018, https://arxiv.org/abs/1802.05637).
        slope: negative slope of the leaky ReLUs.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        widths: Sequence[int] = (32, 64),
        labels: int = 0,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        channels, height, width = image_size
        multiple = STRIDE * 2 ** (len(widths) - 1)
        self.size = tuple(-(-side // multiple) * multiple for side in (height, width))
        inputs = [channels * KERNEL**2, *[4 * features for features in widths[:-1]]]
        pairs = zip(inputs, widths, strict=True)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairs)
        sides = [side // multiple for side in self.size]
        features = widths[-1] * sides[0] * sides[1]
        self.score = torch.nn.Linear(features, 1)
        self.table = torch.nn.Linear(labels, features, bias=False) if labels else None
        self.slope = slope
        if self.table is not None:  # the score does not depend on the class at first
            torch.nn.init.zeros_(self.table.weight)

    def forward(self, images: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """Score images.

        Args:
            images: in [-1, 1], (n, channels, height, width).
            classes: one-hot, (n, labels), if the critic is class-conditional.

        Returns:
            Scores, (n,).
        """
        below, right = (a - b for a, b in zip(self.size, images.shape[2:], strict=True))
        edge = (KERNEL - STRIDE) // 2
        padded = F.pad(images, (edge, edge + right, edge, edge + below), value=-1.0)
        x = F.unfold(padded, KERNEL, stride=STRIDE).transpose(1, 2)  # (n, patches, pixels)
        x = x.unflatten(1, (self.size[0] // STRIDE, self.size[1] // STRIDE))
        for number, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(_join_squares(x) if number else x), self.slope)
        x = x.flatten(1)
        scores: torch.Tensor = self.score(x).squeeze(1)
        if self.table is not None:
            assert classes is not None, "a class-conditional critic needs classes"
            scores = scores + (self.table(classes) * x).sum(1)
        return scores


def _join_squares(x: torch.Tensor) -> torch.Tensor:
    """Join the features of squares of 2 x 2, (n, h, w, f), to (n, h / 2, w / 2, 4 f)."""
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (n, h/2, 2, w/2, 2, f)
    return x.transpose(2, 3).flatten(3)


class CriticSteps:
    """How many critic steps there are for each generator step: twice as many when too few.

    They are too few if the critic takes too many of the generated images for real: noise has
    drowned what it was to learn.

    Args:
        count: a constant number; None starts with one and doubles it.

    Source: Bie et al. 2023, https://arxiv.org/abs/2302.02936; the three numbers are genkit's own
    """

    def __init__(self, count: int | None = None) -> None:
        self.adaptive, self.count = count is None, count or 1
        self.made = 0  # critic steps since the last generator step
        self.turns = 0  # generator steps of this count
        self.accuracy = 1.0  # of the critic at generated images, a moving average

    def is_generators(self) -> bool:
        """Count a critic step; return whether a generator step follows."""
        self.made = (self.made + 1) % self.count
        return self.made == 0

    def record(self, accuracy: float) -> None:
        """Note the share of generated images, of a generator step, that the critic rejects."""
        self.turns += 1
        self.accuracy += (1 - AVERAGED) * (accuracy - self.accuracy)
        if self.adaptive and self.turns >= GRACE and self.accuracy < REJECTED:
            self.count, self.turns, self.accuracy = 2 * self.count, 0, 1.0

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {name: getattr(self, name) for name in STATE}

    def load_state(self, state: dict[str, float]) -> None:
        """Undo `state`."""
        for name in STATE:
            setattr(self, name, state[name])
