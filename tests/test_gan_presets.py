"""Presets of GANs: what has precedence over what."""

import pytest

from genkit.models.gan_presets import PRESETS, choose_values


def chosen(name, **given):
    none = {"loss": None, "weight_clip": None, "learning_rate": None, "conditional": False}
    return choose_values(name, **none | given)


@pytest.mark.parametrize("name", PRESETS)
def test_choose_values_returns_the_preset(name):
    values, preset = chosen(name, conditional=True), PRESETS[name]
    assert not {"generator", "discriminator", "std"} & set(values)
    rate = preset.discriminator_learning_rate or preset.learning_rate
    assert values.pop("discriminator_learning_rate") == rate
    assert values.pop("betas") == list(preset.betas)
    assert values == {field: getattr(preset, field) for field in values}


def test_choose_values_switches_off_what_a_given_loss_excludes():
    assert chosen("dcgan")["label_noise"] == 0.05
    assert chosen("dcgan", loss="least_squares")["label_noise"] == 0.05
    assert chosen("dcgan", loss="hinge")["label_noise"] == 0
    assert chosen("wgan_gp")["gradient_penalty"] == 10
    assert chosen("wgan_gp", loss="hinge")["gradient_penalty"] == 0
    assert chosen("ac_wgan", loss="minimax")["weight_clip"] == 0


def test_choose_values_switches_off_penalties_if_a_weight_limit_is_given():
    assert chosen("wgan_gp", weight_clip=0.1)["gradient_penalty"] == 0
    values = chosen("modern", weight_clip=0.1)
    assert values["r1"] == values["r2"] == 0


def test_choose_values_gives_a_learning_rate_to_both_networks():
    assert chosen("dcgan")["discriminator_learning_rate"] == 3e-4
    assert chosen("dcgan", learning_rate=1e-5)["discriminator_learning_rate"] == 1e-5
    assert chosen("modern")["discriminator_learning_rate"] == 1e-3


def test_choose_values_has_conditioning_in_a_conditional_model_only():
    assert "generator_conditioning" not in chosen("modern")
    assert chosen("modern", conditional=True)["generator_conditioning"] == "concat"
    values = chosen("ac_wgan", conditional=True)
    assert values["generator_conditioning"] == "embedding_product"
    assert values["discriminator_conditioning"] == "auxiliary"
