"""What a run of an adversarial network is watched by."""

from __future__ import annotations

import numpy as np
import torch

from genkit.features import Extractor, load_extractor, look, look_once
from genkit.images import Images
from genkit.judge import Labels, as_images
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.images import class_shares, label_accuracy
from genkit.metrics.neighbours import K, manifold


class Monitor:
    """Compares images drawn in training with real ones."""

    def __init__(self, real: Images, extractor: str | Extractor | None, count: int) -> None:
        assert extractor is not None
        self.extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
        order = np.random.default_rng(0).permutation(len(real))
        self.real = look_once(real.take(order), self.extractor)

    def look(self, images: torch.Tensor, labels: Labels | None = None) -> dict[str, float]:
        """Return figures."""
        fakes = look(as_images(images, None, []), self.extractor)
        some = self.real.features[: len(fakes)]
        figures = {
            "distance": frechet_distance(self.real.features, fakes.features),
            "coverage": manifold(some, fakes.features, K).coverage,
        }
        if self.extractor.names:
            shares = class_shares(fakes.classes, len(self.extractor.names))
            used = shares[shares > 0]
            figures["entropy"] = float(-(used * np.log(used)).sum() / np.log(len(shares)))
            if labels is not None:
                figures["label_accuracy"] = label_accuracy(fakes.classes, np.asarray(labels))
        return figures
