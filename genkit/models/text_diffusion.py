"""Diffusion from words: a text encoder, and a UNet whose smallest feature map attends to it.

Images are in [-1, 1], (n, channels, height, width). All parts are stock classes. The file stands
alone: it travels with every model that it saved, which therefore loads without genkit. Networks and
their loss are in genkit/models/text_denoisers.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

STEPS, GUIDANCE = 20, 3.0


def tokenize(
    tokenizer: Any, texts: Sequence[str], argument: str = "prompt"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens of texts, and which of them are no padding, (n, length) each, int64.

    Args:
        tokenizer: whose `model_max_length` is the length.
        argument: where the texts are from, for messages.

    Raises:
        ValueError: a text has more tokens than that.
    """
    most = tokenizer.model_max_length
    found = tokenizer(list(texts), padding="max_length", max_length=most, verbose=False)
    for text, row in zip(texts, found.input_ids, strict=True):
        if len(row) > most:
            raise ValueError(
                f"{argument}: {text!r:.60} has {len(row)} tokens, its end among them, and the "
                f"text encoder reads {most}; shorten it"
            )
    return torch.tensor(found.input_ids), torch.tensor(found.attention_mask)


def encode(text_encoder: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what the UNet attends to, (n, length, width), of texts by `tokenize`."""
    hidden: torch.Tensor = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden


class TextDiffusionPipeline(DiffusionPipeline):
    """Draws images of prompts, each from its own noise.

    Args:
        tokenizer: of the text encoder.
        text_encoder: of transformers.
        unet: a UNet2DConditionModel.
        scheduler: a DPMSolverMultistepScheduler.
    """

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(self, tokenizer: Any, text_encoder: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it was trained on."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        negative_prompt: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw an image of each prompt.

        Args:
            prompt: one, or several.
            height, width: in pixels; default: of the images that it was trained on.
            num_inference_steps: of the scheduler.
            guidance_scale: of classifier-free guidance, which takes a second evaluation for each
                step; 1 or less for none (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598).
            negative_prompt: what to draw away from; default: images without a caption.
            generator: one, or one for each prompt, whose image then depends on these alone.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].

        Raises:
            ValueError: a prompt is too long, or the number of generators is another.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise ValueError(
                f"generator must be one or a list of {len(prompts)}, got {len(generator)}"
            )
        hidden, avoided = self.encode(prompts), None
        if guidance_scale > 1:
            avoided = self.encode([negative_prompt or ""]).expand_as(hidden)
        size = height or self.image_size[0], width or self.image_size[1]
        shape = (len(prompts), self.unet.config.in_channels, *size)
        noise = randn_tensor(shape, generator, self.device, self.unet.dtype)
        made = self.denoise(noise, hidden, avoided, num_inference_steps, guidance_scale)
        images: Any = (made.float() + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Encode prompts, (n, length, width)."""
        ids, mask = tokenize(self.tokenizer, prompts)
        return encode(self.text_encoder, ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def denoise(
        self,
        noise: torch.Tensor,
        hidden: torch.Tensor,
        avoided: torch.Tensor | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> torch.Tensor:
        """Denoise noise, (n, channels, height, width), to images in [-1, 1].

        Args:
            hidden: encoded prompts, (n, length, width).
            avoided: what guidance draws away from, likewise; None for no guidance.
            steps, guidance: of the scheduler, and of classifier-free guidance.
        """
        with warnings.catch_warnings():  # NumPy 2 complains to torch of how diffusers makes arrays
            message = "__array__ implementation doesn't accept a copy keyword"
            warnings.filterwarnings("ignore", message, DeprecationWarning)
            self.scheduler.set_timesteps(steps)
        texts = hidden if avoided is None else torch.cat([hidden, avoided])
        x = noise
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = x if avoided is None else x.repeat(2, 1, 1, 1)
            prediction = self.unet(inputs, t.to(x.device), texts).sample
            if avoided is not None:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            x = self.scheduler.step(prediction, t, x).prev_sample
        return x.clamp(-1, 1)
