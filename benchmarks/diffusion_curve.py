"""Distance by network evaluations, for every sampler that fits a diffusion model.

    python benchmarks/diffusion_curve.py runs/diffusion --mnist mnist --extractor runs/classifier

One set of weights, the same seeds and labels everywhere: what differs is the sampler and how often
it asks the network for an image. The distance is Frechet's between features of the images drawn
and of all training images. The last lines compare the best at 10 evaluations with as many steps as
samplers without chance need to lead where ever smaller steps would, and with ddpm at 1,000, whose
chance also mends some of the network's errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.figure

from genkit.data import images
from genkit.data.images import Images, proportional_labels
from genkit.metrics.features import Extractor, Features, extract, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.models import diffusion
from genkit.vision import sampling

EVALUATIONS = (5, 10, 20, 50)
MANY, FINE = 1000, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a diffusion model or a flow")
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--samplers", nargs="+", default=None)
    parser.add_argument("--many", type=int, default=2000, help="images of the longest walk")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("runs/diffusion_curve.png"))
    arguments = parser.parse_args()
    train = images.load_images(arguments.mnist / "train-00000-of-00001.parquet")
    extractor = load_extractor(arguments.extractor)
    judge = Bench(
        arguments.model, train, extractor, extract_cached(train, extractor), arguments.dtype
    )
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in arguments.samplers or diffusion.compatible_samplers(judge.scheduler):
        for asked in arguments.evaluations:
            steps = (asked + 1) // 2 if name == "heun" else asked
            point = judge.distance(name, steps, arguments.count)
            curves.setdefault(name, []).append(point)
            print(f"{name:6} {point[0]:5} evaluations  distance {point[1]:.4f}", flush=True)
    draw(curves, arguments.output)
    if arguments.many:
        compare(judge, curves, arguments.many)
    print(f"picture: {arguments.output}")


class Bench:
    """Draws from one model, and measures distances."""

    def __init__(
        self, model: Path, train: Images, extractor: Extractor, real: Features, dtype: str
    ) -> None:
        self.model, self.train, self.extractor, self.real = model, train, extractor, real
        self.dtype = dtype
        self.pipeline = sampling.load_image_model(str(model))
        self.scheduler = self.pipeline.scheduler

    def distance(self, name: str, steps: int, count: int) -> tuple[int, float]:
        """Return evaluations of the network for an image, and the distance."""
        labels = proportional_labels(self.train, count).tolist() if self.pipeline.labels else None
        drawn = sampling.sample(
            self.model, count, label=labels, seed=0, steps=steps, scheduler=name, dtype=self.dtype
        )
        seen = extract(as_images(drawn.images, None, []), self.extractor)
        return drawn.evaluations, frechet_distance(self.real.features, seen.features)


def compare(judge: Bench, curves: dict[str, list[tuple[int, float]]], count: int) -> None:
    """Set the best sampler of about ten evaluations beside long walks, of as many images."""
    near = {name: min(points, key=lambda p: abs(p[0] - 10)) for name, points in curves.items()}
    best = min(near, key=lambda name: near[name][1])
    steps = (near[best][0] + 1) // 2 if best == "heun" else near[best][0]
    few = judge.distance(best, steps, count)
    print(f"{count:,} images: {best} {few[0]:,} evaluations, distance {few[1]:.4f}", flush=True)
    flow = diffusion.objective_of(judge.scheduler) == "flow"
    walks = {"heun": MANY // 2} if flow else {"ddim": FINE, "ddpm": MANY}
    for name, steps in walks.items():
        asked, distance = judge.distance(name, steps, count)
        words = f"distance {distance:.4f}, that of few over it {few[1] / distance:.3f}"
        print(f"{count:,} images: {name} {asked:,} evaluations, {words}", flush=True)


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="evaluations of the network an image", ylabel="Frechet distance")
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
