"""A classifier that gives features gets the pixels of its own image processor."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    MobileViTImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from genkit.data.images import Images
from genkit.metrics.features import Classifier, extract, extract_cached, load_extractor

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NORMAL = {"image_mean": MEAN, "image_std": STD}
PROCESSORS = {
    "efficientnet": EfficientNetImageProcessorPil(
        size={"height": 40, "width": 36},
        do_center_crop=True,
        crop_size={"height": 32, "width": 30},
        include_top=True,
        rescale_offset=True,
        rescale_factor=1 / 127.5,
        resample=0,
        **NORMAL,
    ),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.5, **NORMAL),
    "vit": ViTImageProcessorPil(size={"height": 33, "width": 31}, resample=2, **NORMAL),
    "mobilevit": MobileViTImageProcessorPil(size={"shortest_edge": 40}, crop_size=32),
    "mobilenet": MobileNetV2ImageProcessorPil(size={"shortest_edge": 36}, crop_size=32, **NORMAL),
    "beit": BeitImageProcessorPil(
        size={"height": 40, "width": 40}, do_center_crop=True, crop_size=32, resample=3, **NORMAL
    ),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30, resample=1),
}


def make_model(channels: int = 3) -> ResNetForImageClassification:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(num_channels=channels, id2label={0: "a", 1: "b"}, **shape)
        return ResNetForImageClassification(config).eval()


def make_crops(count: int, height: int = 56, width: int = 64) -> Images:
    """Crops of two photographs, (n, 3, height, width)."""
    rng, crops = np.random.default_rng(0), []
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        top, left = (rng.integers(photo.shape[k] - side) for k, side in enumerate((height, width)))
        crops.append(photo[top : top + height, left : left + width])
    pixels = np.stack(crops).transpose(0, 3, 1, 2)
    return Images(np.ascontiguousarray(pixels), None, [], np.arange(count), f"{count} crops")


def pictures_of(crops: Images) -> list[Image.Image]:
    return [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in crops.pixels]


def pooled(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.resnet(pixels).pooler_output.flatten(1)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_features_are_of_the_processors_own_pixels(kind, tmp_path):
    model, crops = make_model(), make_crops(6)
    model.save_pretrained(tmp_path)
    PROCESSORS[kind].save_pretrained(tmp_path)
    found = extract(crops, load_extractor(tmp_path)).features
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor) is type(PROCESSORS[kind])
    pixels = processor(pictures_of(crops), return_tensors="pt").pixel_values
    assert torch.allclose(torch.from_numpy(found), pooled(model, pixels), atol=1e-5)


def test_grey_images_are_those_of_the_processor_in_colour():
    model, processor = make_model(), PROCESSORS["vit"]
    grey = torch.from_numpy(make_crops(3).pixels[:, :1].copy())
    found, _ = Classifier(model, processor, "tiny")(grey.float() / 127.5 - 1)
    pictures = [Image.fromarray(each[0].numpy()).convert("RGB") for each in grey]
    pixels = processor(pictures, return_tensors="pt").pixel_values
    assert torch.allclose(found, pooled(model, pixels), atol=1e-5)


CHANGES = [
    ("efficientnet", "include_top", False),
    ("efficientnet", "rescale_offset", False),
    ("efficientnet", "do_center_crop", False),
    ("efficientnet", "resample", 3),
    ("mobilevit", "do_flip_channel_order", False),
    ("mobilenet", "crop_size", {"height": 30, "width": 30}),
    ("convnext", "crop_pct", 0.75),
    ("vit", "resample", 3),
    ("vit", "do_rescale", False),
]


@pytest.mark.parametrize(("kind", "setting", "value"), CHANGES)
def test_the_hash_and_the_cache_notice_a_setting(kind, setting, value, monkeypatch, tmp_path):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    model, crops = make_model(), make_crops(2)
    changed = type(PROCESSORS[kind])(**PROCESSORS[kind].to_dict() | {setting: value})
    one, other = (Classifier(model, each, "tiny") for each in (PROCESSORS[kind], changed))
    assert one.sha256 != other.sha256
    assert one.sha256 == Classifier(model, copy.deepcopy(PROCESSORS[kind]), "tiny").sha256
    before, after = (extract_cached(crops, each).features for each in (one, other))
    assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("vit", {"size": {"height": 1 << 20, "width": 8}}, "its size is .*1048576"),
        ("clip", {"crop_size": {"height": 0, "width": 8}}, "its crop_size is .*'height': 0"),
        ("convnext", {"crop_pct": 1e-9}, "its crop_pct must be .*got 1e-09"),
        ("vit", {"image_std": [0.5, 0.5]}, "extractor: .*2"),
        ("vit", {"image_std": [0.0, 0.5, 0.5]}, "image_std"),
        ("vit", {"rescale_factor": float("inf")}, "rescale_factor"),
    ],
)
def test_settings_that_make_no_input_are_refused(kind, settings, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    saved = json.loads(PROCESSORS[kind].to_json_string()) | settings
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        load_extractor(tmp_path)


def test_a_processor_of_unknown_kind_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "OwnProcessor"}')
    with pytest.raises(ValueError, match=r"extractor: .*nrecognized image processor"):
        load_extractor(tmp_path)


@pytest.mark.real
def test_efficientnet_gives_the_features_of_its_processors_pixels(real_model):
    folder, crops = real_model("efficientnet"), make_crops(20, 200, 240)
    found = extract(crops, load_extractor(folder))
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(pictures_of(crops), return_tensors="pt").pixel_values
    with torch.inference_mode():
        features = model.efficientnet(pixels).pooler_output
        classes = model(pixels).logits.argmax(-1)
    assert np.abs(found.features - features.numpy()).max() < 1e-5
    assert np.array_equal(found.classes, classes.numpy())
