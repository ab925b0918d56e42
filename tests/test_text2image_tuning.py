"""Fine-tuning of text-to-image pipelines: prompts, new words, what is trained, the loss."""

import numpy as np
import pytest
import torch
from builders import stable_diffusion, stable_diffusion_xl
from diffusers import DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler

from genkit.models import text2image_tuning as tuning
from genkit.vision import text2image

MAKERS = {"sd": stable_diffusion, "xl": stable_diffusion_xl}


def make(name: str):
    with torch.random.fork_rng(), text2image.numpy_as_it_was():
        torch.manual_seed(0)
        return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def pipeline(request):
    return make(request.param)


def trained(tuner: tuning.Tuner) -> set[str]:
    return {name for name, weight in tuner.named_parameters() if weight.requires_grad}


# ---- prompts and words


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(pipeline):
    captions = ["a red fox", "owls", ""]
    ids = tuning.tokenize(pipeline, captions, "prompt")
    found = tuning.encode_prompts(tuning.text_encoders(pipeline), ids)
    expected = pipeline.encode_prompt(
        captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    wanted = (expected[0], expected[2]) if len(found) == 2 else (expected[0],)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_a_caption_longer_than_the_encoder_is_refused(pipeline):
    tuning.tokenize(pipeline, ["a" * 14], "--prompt")
    message = r"--prompt: the caption 'a{15}' has 17 tokens.* reads 16; shorten it"
    with pytest.raises(ValueError, match=message):
        tuning.tokenize(pipeline, ["a", "a" * 15], "--prompt")


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_new_word_starts_as_its_initializer_and_is_all_that_is_trained(pipeline, vectors):
    before = [encoder.get_input_embeddings().weight for encoder in tuning.text_encoders(pipeline)]
    names = tuning.add_words(pipeline, "<it>", "fo" if vectors > 1 else "f", vectors)
    assert names == ["<it>", "<it>_1", "<it>_2"][:vectors]
    tuner = tuning.make_tuner(pipeline, "textual_inversion", 4, False, False, 16)
    assert len(trained(tuner)) == len(before) and all("rows" in name for name in trained(tuner))
    for encoder, table, ids in zip(
        tuner.encoders, before, tuning.tokenize(pipeline, ["a <it> b"], "prompt"), strict=True
    ):
        assert ids[0, 2 : 2 + vectors].tolist() == list(range(54, 54 + vectors))
        found = encoder.get_input_embeddings()(ids)
        start = pipeline.tokenizer("fo" if vectors > 1 else "f").input_ids[1:-1]
        same = ids.clone()
        same[0, 2 : 2 + vectors] = torch.tensor([start[i % len(start)] for i in range(vectors)])
        assert torch.equal(found, table[same])


def test_a_word_that_cannot_be_new_is_refused():
    pipeline = make("sd")
    with pytest.raises(ValueError, match=r"--token a: 'a' is a token of the pipeline already"):
        tuning.add_words(pipeline, "a", "b", 1)
    with pytest.raises(ValueError, match=r"--initializer cat: it is 3 tokens.*--vectors 3"):
        tuning.add_words(pipeline, "<it>", "cat", 1)
    names = tuning.add_words(pipeline, "<it>", "b", 1)
    with pytest.raises(ValueError, match="the caption 'a photo' lacks the new word <it>; put it"):
        tuning.check_words(pipeline, names, ["an <it>", "a photo"], "--images")
    tuning.check_words(pipeline, [], ["a photo"], "--images")


# ---- what is trained


def test_each_method_trains_its_own_parts(pipeline):
    side = {"side": 16}
    lora = tuning.make_tuner(make_like(pipeline), "lora", 4, False, False, **side)
    assert trained(lora) and all("lora" in name and "attn" in name for name in trained(lora))
    every = tuning.make_tuner(make_like(pipeline), "lora", 4, True, False, **side)
    assert {"unet.conv_in.lora_A.default.weight"} <= trained(every) > trained(lora)
    both = tuning.make_tuner(make_like(pipeline), "lora", 4, False, True, **side)
    assert any(name.startswith("encoders.0.") for name in trained(both))
    full = tuning.make_tuner(make_like(pipeline), "full", 4, False, False, **side)
    assert trained(full) == {f"unet.{name}" for name, _ in pipeline.unet.named_parameters()}


def make_like(pipeline):
    return make("xl" if len(tuning.text_encoders(pipeline)) == 2 else "sd")


@pytest.mark.parametrize("method", tuning.METHODS)
def test_each_trained_weight_has_a_gradient(pipeline, method):
    """Else several processes would wait for it."""
    if method == "textual_inversion":
        tuning.add_words(pipeline, "<it>", "f", 1)
    tuner = tuning.make_tuner(pipeline, method, 4, True, method != "textual_inversion", 16)
    ids = tuning.tokenize(pipeline, ["a <it>" if method == "textual_inversion" else "a"], "prompt")
    tuner(torch.randn(1, 4, 8, 8), torch.tensor([5]), *ids).sum().backward()
    missing = [n for n, w in tuner.named_parameters() if w.requires_grad and w.grad is None]
    assert not missing
    assert all(w.grad is None for w in tuner.parameters() if not w.requires_grad)


@torch.no_grad()
def test_an_adapter_changes_nothing_before_it_is_trained():
    batch = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 16, 16)
    before = make("sd").unet(*batch).sample
    tuner = tuning.make_tuner(make("sd"), "lora", 4, True, False, 16)
    assert torch.equal(tuner(*batch), before)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("FluxPipeline", {}, "is a FluxPipeline, which this recipe cannot train; give a Stable"),
        ("StableDiffusionPipeline", {"unet": {"in_channels": 9}}, "9 in_channels for latents of 4"),
        (
            "StableDiffusionPipeline",
            {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
            "trained by flow matching",
        ),
    ],
)
def test_check_pipeline_names_what_would_do(name, settings, message):
    with pytest.raises(ValueError, match=f"--init_from mine.*{message}"):
        tuning.check_pipeline(name, settings, "mine")
    tuning.check_pipeline("StableDiffusionXLPipeline", {"unet": {"in_channels": 4}}, "mine")


# ---- latents and loss


@torch.no_grad()
def test_latents_are_those_that_the_pipeline_decodes(pipeline):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = tuning.encode_images(pipeline, images)
    mode = pipeline.vae.encode(images).latent_dist.mode()
    assert torch.equal(latents, mode * pipeline.vae.config.scaling_factor)
    pipeline.vae.register_to_config(latents_mean=[1.0, 0, 0, 0], latents_std=[2.0, 1, 1, 1])
    latents = tuning.encode_images(pipeline, images) / pipeline.vae.config.scaling_factor
    back = latents * torch.tensor([2.0, 1, 1, 1]).view(4, 1, 1) + torch.eye(4)[0].view(4, 1, 1)
    assert torch.allclose(back, mode, atol=1e-6)


class Zeros(torch.nn.Module):
    def forward(self, noisy, timesteps, *prompts):
        return torch.zeros_like(noisy)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_row_losses_follow_the_schedulers_objective(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    timesteps = torch.tensor([0, 500, 999])
    alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(3, 1, 1, 1)
    sigma = (1 - alpha.square()).sqrt()
    velocity = alpha * noise - sigma * latents
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]
    batch = Zeros(), latents, noise, timesteps, ()
    expected = target.square().mean((1, 2, 3))
    assert torch.allclose(tuning.row_losses(*batch, scheduler), expected, atol=1e-6)
    snr = (alpha / sigma).square().flatten()
    capped = snr.clamp(max=5)
    weight = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]
    weighted = tuning.row_losses(*batch, scheduler, min_snr=5.0)
    assert torch.allclose(weighted, weight * expected, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction", "beta_end": 0.012}])
@pytest.mark.parametrize("kind", [LCMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_the_scheduler_of_training_has_the_pipelines_noise_and_objective(kind, settings):
    pipeline = make("sd")
    with text2image.numpy_as_it_was():
        pipeline.scheduler = kind(**settings)
    scheduler = tuning.make_scheduler(pipeline)
    assert tuning.objective(scheduler) == ("v" if settings else "epsilon")
    assert np.allclose(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
