"""Features of images and predicted classes, cached for real images.

They come from a classifier, or from the Inception network of published figures. Without a network,
pixels are the features.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

from genkit import console, machine
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.engine.summary import summarize
from genkit.files import cache_folder, weights_hash, written_whole
from genkit.hub import download, kinds, model_files, safe_weights, safety

INCEPTION = "inception"
HINT = (
    "Give the folder or the Hub id of an image classifier in safetensors with its "
    f"preprocessor_config.json, or {INCEPTION!r}"
)
VERSION = 2  # of the cache: raised when the input of extractors changes
PIXELS = 16  # longest side of the features of `PixelFeatures`
SIDE = 4096  # largest side of a classifier's input, in pixels
LEAST_CROP = 0.1  # smallest part of a side that a classifier's input may be cropped to
TRIED = 32  # side of the image by which a processor is tried
BATCH, VALUES = 256, 1 << 21  # largest batch: of images, and of their values
NOT_HASHED = ("_name_or_path", "transformers_version", "architectures", "dtype")  # of a config

# ---------------------------------------------------------------------------------------------
# Extractors


class Classifier:
    """An image classifier: features are the input of its last linear layer.

    Args:
        model: of transformers, in evaluation mode.
        processor: its image processor, of the backend that needs Pillow alone.
        name: for messages and protocols.
        argument: the name of the model's argument, for messages.

    Raises:
        ValueError: it has no linear layer for its classes, or its processor makes no input for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        name: str,
        argument: str = "extractor",
    ) -> None:
        self.model, self.name, self.device = model, name, model.device
        self.argument = argument
        self.names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        inputs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        if not layers or layers[-1].out_features != len(self.names) or not inputs:
            raise ValueError(
                f"{argument}: {name!r} needs a convolution first and a linear layer for its "
                f"{len(self.names)} classes last; give a ResNet or a ViT, for example"
            )
        self.head, self.channels = layers[-1], inputs[0].in_channels
        self.processor = processor
        settings = json.loads(processor.to_json_string())
        _check_sizes(settings)
        self.input_size((self.channels, TRIED, TRIED))
        config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_HASHED}
        facts = [config, settings, weights_hash(model)]
        self.sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        precision = str(self.model.dtype).removeprefix("torch.")
        return summarize("Classifier", self.name, [self.model], precision)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extract features and predict classes.

        Args:
            images: in [-1, 1], (n, channels, height, width); they are rounded to the 256 levels of
                image files, and preprocessed by the classifier's own processor.

        Returns:
            Features, (n, d), and classes, (n,), int64; all 0 where `names` is empty.
        """
        captured: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits = self.model(pixel_values=self.preprocess(images).to(self.device)).logits
        finally:
            hook.remove()
        return captured[0].float().cpu(), logits.argmax(-1).cpu()

    def input_size(self, size: tuple[int, int, int]) -> tuple[int, int]:
        """Return the height and width of the input that images of a size become.

        Args:
            size: channels, height and width of the images.
        """
        height, width = self.preprocess(torch.zeros(1, *size)).shape[2:]
        return height, width

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess images as in the classifier's training: float32, (n, channels, …)."""
        if images.shape[1] not in (1, self.channels):
            raise ValueError(
                f"{self.argument}: {self.name!r} takes {self.channels} channels, got images of "
                f"{images.shape[1]}"
            )
        pictures = list(to_uint8(images).cpu().expand(-1, self.channels, -1, -1).numpy())
        with np.errstate(all="ignore"):  # of infinite pixels, which are refused below
            made = self.processor(pictures, return_tensors="pt", input_data_format="channels_first")
        pixels = made["pixel_values"].float()
        if pixels.shape[:2] != (len(pictures), self.channels) or pixels.ndim != 4:
            raise ValueError(
                f"its {type(self.processor).__name__} makes an input of {tuple(pixels.shape)}, not "
                f"(n, {self.channels}, height, width)"
            )
        if not pixels.isfinite().all():
            raise ValueError(
                "its processor's rescale_factor, image_mean and image_std must give finite pixels"
            )
        return pixels


def _check_sizes(settings: dict[str, Any]) -> None:
    """Refuse an image processor's sizes that would fill the memory."""
    for name in ("size", "crop_size", "pad_size"):
        value = settings.get(name) or {}
        for side in value.values() if isinstance(value, dict) else [value]:
            if type(side) is not int or not 0 < side <= SIDE:
                raise ValueError(f"its {name} is {value}; a side must be 1 to {SIDE:,} pixels")
    fraction = settings.get("crop_pct") or 1.0
    if not LEAST_CROP <= fraction <= 1:
        raise ValueError(f"its crop_pct must be {LEAST_CROP} to 1, got {fraction}")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round images in [-1, 1] to the 256 levels of image files, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


class Inception:
    """The Inception network of published figures, by torch-fidelity; it predicts no classes.

    That package downloads and unpickles the weights itself.
    """

    name, names = INCEPTION, list[str]()

    def __init__(self, device: torch.device) -> None:
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError(
                "extractor: 'inception' requires a package: pip install torch-fidelity, or give a "
                "classifier"
            )
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        self.network, self.device = network.eval().to(device), device
        self.sha256 = weights_hash(self.network)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extract features; see `Classifier`."""
        pixels = to_uint8(images).expand(-1, 3, -1, -1).to(self.device)
        features = self.network(pixels)[0].float().cpu()
        return features, torch.zeros(len(features), dtype=torch.int64)

    def input_size(self, size: tuple[int, int, int]) -> tuple[int, int]:
        """Return the height and width of the network's input."""
        return 299, 299


class PixelFeatures:
    """No network: features are pixels, averaged over squares; it predicts no classes."""

    name, names, device = "pixels", list[str](), machine.CPU
    sha256 = hashlib.sha256(f"pixels {PIXELS}".encode()).hexdigest()

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extract features, of at most 16 x 16 squares; see `Classifier`."""
        square = [math.ceil(side / PIXELS) for side in images.shape[2:]]
        features = F.avg_pool2d(images.float().cpu(), square, ceil_mode=True).flatten(1)
        return features, torch.zeros(len(features), dtype=torch.int64)

    def input_size(self, size: tuple[int, int, int]) -> tuple[int, int]:
        """Return the height and width of images of a size: channels, height and width."""
        return size[1:]


Extractor = Classifier | Inception | PixelFeatures


def load_extractor(
    name: str | Path,
    revision: str | None = None,
    device: str | None = None,
    argument: str = "extractor",
) -> Extractor:
    """Load an extractor of features; the last ones are cached.

    Args:
        name: folder or Hub id of an image classifier in safetensors, or "inception".
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        argument: the name of the model's argument, for messages.

    Raises:
        ValueError: there is no such classifier or device, or its files are unsafe or incomplete.
    """
    where = machine.find_device(device)
    if name == INCEPTION:
        return Inception(where)
    folder = download.fetch(name, revision, argument=argument, hint=HINT).resolve()
    kinds.check_kind(folder, str(name), kinds.CLASSIFIER, argument)
    found = _load_classifier(folder, model_files.last_written(folder), where, argument)
    found.name, found.argument = str(name), argument
    return found


@functools.lru_cache(maxsize=4)
def _load_classifier(folder: Path, written: int, device: torch.device, argument: str) -> Classifier:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning of a new head, which is refused below
    try:
        with safety.opened(folder, argument=argument) as private:
            processor = AutoImageProcessor.from_pretrained(
                private, backend="pil", trust_remote_code=False
            )
            model, report = AutoModelForImageClassification.from_pretrained(
                private,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,  # the default asks on the terminal
                output_loading_info=True,
            )
            safe_weights.check_loaded(model, report)
            return Classifier(model.eval().to(device), processor, folder.name, argument)
    finally:
        logging.set_verbosity(verbosity)


# ---------------------------------------------------------------------------------------------
# Extraction


@dataclass(frozen=True)
class Features:
    """Features and predicted classes of images."""

    features: np.ndarray  # (n, d), float32
    classes: np.ndarray  # (n,), int64; all 0 from an extractor without classes

    def __len__(self) -> int:
        return len(self.features)

    def take(self, which: np.ndarray) -> Features:
        """Return those of some images."""
        return Features(self.features[which], self.classes[which])


def extract(images: Images, extractor: Extractor) -> Features:
    """Extract the features of all images, in batches."""
    height, width = extractor.input_size(images.size)
    size = max(1, min(BATCH, VALUES // (3 * height * width)))
    batches = []
    with console.bar(None, "features", len(images), " images") as bar:
        for which in blocks(len(images), size):
            batches.append(extractor(images.batch(which)))
            bar.update(len(which))
    features, classes = zip(*batches, strict=True)
    return Features(torch.cat(features).numpy(), torch.cat(classes).numpy())


def extract_cached(images: Images, extractor: Extractor) -> Features:
    """Extract features, or read them from the cache, by the hashes of images and extractor."""
    device = extractor.device.type
    versions = [torch.__version__, transformers.__version__, PIL.__version__]
    what = json.dumps([VERSION, images.sha256, extractor.sha256, device, *versions])
    path = cache_folder() / f"{hashlib.sha256(what.encode()).hexdigest()}.features.safetensors"
    if not path.exists():
        extracted = extract(images, extractor)
        with written_whole(path, shared=True) as scratch:
            save_file({"features": extracted.features, "classes": extracted.classes}, scratch)
    saved = load_file(path)
    return Features(saved["features"], saved["classes"])
