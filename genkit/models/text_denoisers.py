"""Networks that denoise images under a text, made for training, and their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel

from genkit.models import diffusion_losses
from genkit.models.denoisers import check_halvings
from genkit.models.text_diffusion import encode

OBJECTIVES = ("v", "flow")
HEAD = 32  # width of a head of attention


def make_scheduler(objective: str) -> DPMSolverMultistepScheduler:
    """Build the scheduler that a model is trained, sampled and saved with.

    Args:
        objective: what the network predicts, one of `OBJECTIVES`.
    """
    if objective == "flow":
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, thresholding=True
        )
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        lambda_min_clipped=-5.1,  # at the end of the cosine schedule, all is noise
        thresholding=True,
    )


def make_unet(
    image_size: Sequence[int], widths: Sequence[int], layers: int, text_width: int
) -> UNet2DConditionModel:
    """Build a stock UNet, whose smallest feature map attends to itself and to a text.

    Args:
        image_size: channels, height, width.
        widths: channels, of the largest feature map first.
        layers: residual blocks at each size of the encoder; the decoder has one more.
        text_width: of the text encoder.

    Raises:
        ValueError: the image cannot be halved that often.
    """
    channels, height, width = image_size
    check_halvings(image_size, widths)
    kinds = ["CrossAttn" if i == len(widths) - 1 else "" for i in range(len(widths))]
    return UNet2DConditionModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=layers,
        cross_attention_dim=text_width,
        attention_head_dim=[max(1, each // HEAD) for each in widths],  # diffusers: number of heads
        norm_num_groups=math.gcd(8, *widths),
    )


def make_text_encoder(tokenizer: Any, layers: int, width: int) -> DistilBertModel:
    """Build a new encoder of the tokens that a tokenizer makes of a text."""
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            n_layers=layers,
            n_heads=max(1, width // HEAD),
            dim=width,
            hidden_dim=4 * width,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class TextDenoiser(nn.Module):
    """The networks of a run: a UNet, with the text encoder if it is trained, too.

    Args:
        unet: a UNet2DConditionModel.
        text_encoder: None if prompts are encoded before.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, *prompts: Tensor) -> Any:
        """Return the UNet's output, whose `sample` is its prediction, of the shape of its input.

        Args:
            noisy: x_t, (n, channels, height, width).
            timesteps: (n,).
            prompts: by `text_diffusion.tokenize` if there is an encoder, otherwise by `encode`.
        """
        hidden = prompts[0] if self.text_encoder is None else encode(self.text_encoder, *prompts)
        return self.unet(noisy, timesteps, hidden)


def loss(
    model: nn.Module,
    images: Tensor,
    prompts: Sequence[Tensor],
    noise: Tensor,
    timesteps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    objective: str,
) -> Tensor:
    """Return the mean squared error of a TextDenoiser's prediction; see `diffusion_losses.loss`.

    Args:
        prompts: that it takes, of each image.
    """

    def network(mixed: Tensor, times: Tensor, class_labels: None = None) -> Any:
        return model(mixed, times, *prompts)

    wrapped: Any = network
    levels = timesteps, alpha, sigma
    return diffusion_losses.loss(wrapped, images, noise, None, *levels, objective)
