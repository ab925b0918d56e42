"""What genkit.load returns prints on one line."""

import gc

import pytest
import torch
from builders import (
    reader,
    text_model,
    tiny_autoencoder,
    tiny_denoiser,
    tiny_gan,
    tiny_pixels,
    tiny_stylizer,
    tiny_table_autoencoder,
    tiny_translator,
)
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import genkit


def classifier(folder):
    shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(num_channels=1, **shape)).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)


FAMILIES = {
    "LanguageModel": text_model,
    "Reader": reader,
    "Classifier": classifier,
    "AutoencoderPipeline": tiny_autoencoder,
    "GANPipeline": tiny_gan,
    "DenoisingPipeline": tiny_denoiser("epsilon"),
    "PixelPipeline": tiny_pixels,
    "StylizerPipeline": tiny_stylizer,
    "TranslationPipeline": tiny_translator,
    "TableAutoencoderPipeline": tiny_table_autoencoder,
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_loaded_model_prints_name_parameters_precision_and_device(tmp_path, kind):
    FAMILIES[kind](tmp_path / "model")
    loaded = genkit.load(tmp_path / "model")
    networks = [m for m in vars(loaded).values() if isinstance(m, torch.nn.Module)]
    count = sum(p.numel() for p in networks[0].parameters()) if kind != "Classifier" else 0
    count = count or sum(p.numel() for p in loaded.model.parameters())
    expected = f"{kind} {tmp_path / 'model'}: {count:,} parameters, float32, cpu"
    assert str(loaded) == repr(loaded) == expected


def test_load_pauses_the_collection_of_garbage(tmp_path):
    """While the network is built; then it is as it was, on or off, also after an error."""
    text_model(tmp_path / "model")
    collects: set[bool] = set()
    hook = register_module_parameter_registration_hook(lambda *_: collects.add(gc.isenabled()))
    try:
        genkit.load(tmp_path / "model")
    finally:
        hook.remove()
    assert collects == {False} and gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="model"):
            genkit.load(tmp_path / "missing")
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="model"):
        genkit.load(tmp_path / "missing")
    assert gc.isenabled()
