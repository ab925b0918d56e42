"""Feed-forward stylizers, one network for one style: network and pipeline.

Images are in [-1, 1], (n, channels, height, width), of any size. The file stands alone: it travels
with every model that it saved, which therefore loads without genkit. Losses are in
genkit/models/style_losses.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

MODES = {1: "L", 3: "RGB"}
FIRST = 9  # side of the first kernels
SMALLEST = 8  # pixels of a side: reflection needs more than it pads

# ---------------------------------------------------------------------------------------------
# Network


class Convolution(torch.nn.Sequential):
    """A convolution that keeps the size, or halves it, over an image reflected at its borders."""

    def __init__(self, inputs: int, outputs: int, side: int = 3, stride: int = 1) -> None:
        super().__init__(
            torch.nn.ReflectionPad2d(side // 2), torch.nn.Conv2d(inputs, outputs, side, stride)
        )


class Normalized(torch.nn.Sequential):
    """A convolution and an instance normalisation.

    Source: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022
    """

    def __init__(self, inputs: int, outputs: int, side: int = 3, stride: int = 1) -> None:
        super().__init__(
            Convolution(inputs, outputs, side, stride),
            torch.nn.InstanceNorm2d(outputs, affine=True),
        )


class Residual(torch.nn.Module):
    """Two convolutions beside an identity path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Normalized(width, width), Normalized(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape."""
        return x + self.second(F.relu(self.first(x)))


class Stylizer(ModelMixin, ConfigMixin):
    """An image in, the same image in one style out.

    Upsampling is nearest neighbour and a convolution, which leaves no checkerboard.

    Args:
        channels: of the images, 1 for grey, 3 for colour.
        widths: of the convolutions; the image is halved between two of them, and grows again.
        blocks: residual blocks at the smallest size.
        stride: of the first convolution; 2 saves most of the work at full size.

    Source: Johnson et al. 2016, https://arxiv.org/abs/1603.08155
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 5,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if channels not in MODES:
            raise ValueError(f"channels must be 1 for grey or 3 for colour, got {channels}")
        pairs = list(itertools.pairwise(widths))
        self.start = Normalized(channels, widths[0], FIRST, stride)
        self.shrink = torch.nn.ModuleList(Normalized(a, b, stride=2) for a, b in pairs)
        self.middle = torch.nn.Sequential(*(Residual(widths[-1]) for _ in range(blocks)))
        self.grow = torch.nn.ModuleList(Normalized(b, a) for a, b in pairs[::-1])
        self.end = Convolution(widths[0], channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images of the same shape."""
        x = F.relu(self.start(images))
        sizes = []
        for layer in self.shrink:
            sizes.append(x.shape[2:])
            x = F.relu(layer(x))
        x = self.middle(x)
        for layer, size in zip(self.grow, sizes[::-1], strict=True):
            x = F.relu(layer(F.interpolate(x, size=size)))
        return self.end(F.interpolate(x, size=images.shape[2:])).tanh()


# ---------------------------------------------------------------------------------------------
# Pipeline


class StylizerPipeline(DiffusionPipeline):
    """Paints images in the style that its network has learnt.

    Args:
        stylizer: a Stylizer.
    """

    def __init__(self, stylizer: Stylizer) -> None:
        super().__init__()
        self.register_modules(stylizer=stylizer)

    @torch.no_grad()
    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | torch.Tensor,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Stylize images, one by one: each depends on itself alone.

        Args:
            images: one or a list, of any sizes, or a tensor in [-1, 1], (n, channels, height,
                width).
            output_type: "pil", "np" for (height, width, channels) in [0, 1], or "pt" for
                (channels, height, width) in [0, 1]; a list of them.
        """
        rows = [images] if isinstance(images, Image.Image) else list(images)
        painted: Any = [(self._paint(row) + 1) / 2 for row in rows]
        if output_type != "pt":
            painted = [row.permute(1, 2, 0).cpu().numpy() for row in painted]
        if output_type == "pil":
            painted = [self.numpy_to_pil(row)[0] for row in painted]
        return ImagePipelineOutput(painted) if return_dict else (painted,)

    def _paint(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        channels = self.stylizer.config.channels
        if isinstance(image, Image.Image):
            values = np.array(image.convert(MODES[channels]), np.float32).reshape(
                image.height, image.width, channels
            )
            image = torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1
        if len(image) != channels or min(image.shape[1:]) < SMALLEST:
            raise ValueError(
                f"images must have {channels} channels and sides of {SMALLEST} pixels or more, got "
                f"{tuple(image.shape)}"
            )
        return self.stylizer(image[None].to(self.device))[0]


def load_stylizer(folder: str | Path) -> StylizerPipeline:
    """Load a saved pipeline without running the code in its folder.

    Raises:
        ValueError: the folder holds no stylizer.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"][-1] != StylizerPipeline.__name__:
            raise ValueError(f"its class is {saved['_class_name']}")
        if list(index.parent.glob("stylizer/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        network, report = Stylizer.from_pretrained(
            str(folder), subfolder="stylizer", use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no stylizer ({error}); give the output folder of "
            "train_stylizer"
        ) from error
    return StylizerPipeline(network.eval())
