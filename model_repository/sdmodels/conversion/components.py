"""UNet and VAE of a checkpoint as diffusers' modules have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.tensors import shape_problems, shapes_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdmodels.conversion.clip import Clip, Family
    from sdmodels.conversion.tensors import Tensors

# What a UNet of 4 latent channels takes as further ones, by their number; and what no server of ours would give it.
CONDITIONINGS = {0: "none", 1: "depth", 3: "upscaling", 5: "inpainting"}
OTHER_INPUTS = {4: "an image to edit"}


@dataclass(frozen=True, slots=True)
class Component:
    """A module's configuration and its tensors under diffusers' names."""

    config: dict[str, Any]
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class DepthEstimator:
    """A depth checkpoint's DPT: configurations of the module and of what it is shown, and its tensors."""

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that an engine needs of a checkpoint. `noise_schedule` has the names of an engine's descriptor."""

    family: Family
    unet: Component
    vae: Component
    clip: Clip
    prediction_type: str
    noise_schedule: dict[str, Any]
    padding: str
    """What fills a chunk of tokens up: `zero` for token 0, `end` for the end token."""
    license: str
    """The licence that its model card names, as the hub calls it, or nothing."""
    source_files: tuple[Path, ...]
    """The files that it was read from."""
    depth_estimator: DepthEstimator | None = None
    upscaling: dict[str, Any] | None = None
    """Of upscalers, with the names of an engine's descriptor."""
    ignored: tuple[str, ...] = ()
    """What the source has beside them and an engine has no use for."""

    @property
    def conditioning(self) -> str:
        """What the UNet takes beside noisy latents, in the words of an engine's descriptor."""
        return CONDITIONINGS[_further_channels(self.unet, self.vae)]

    @property
    def downsampling(self) -> int:
        """Pixels of a place of the latents, in each direction."""
        return _halved(len(self.vae.config["block_out_channels"]))

    @property
    def size_multiple(self) -> int:
        """Width and height of an image, in pixels, are multiples of this."""
        return self.downsampling * _halved(len(self.unet.config["block_out_channels"]))

    @property
    def native_size(self) -> int:
        """Width and height, in pixels, that the UNet was trained on."""
        size: int = self.unet.config["sample_size"] * self.downsampling
        return size


def completed(module_class: type[UNet2DConditionModel | AutoencoderKL], config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with all that it leaves to the module's own defaults, without traces of where it comes from."""
    with torch.device("meta"):
        module = module_class.from_config(dict(config))
    kept = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return {"_class_name": module_class.__name__, **kept}


def component_problems(unet: Component, vae: Component) -> list[str]:
    """Names and shapes of tensors that are not those of the modules, and inputs that no server of ours would give."""
    further = _further_channels(unet, vae)
    if further not in CONDITIONINGS:
        what = OTHER_INPUTS.get(further, "something that is not known here")
        raise ConversionError(
            f"the UNet takes {unet.config['in_channels']} channels: beside latents it wants {what}, and this service "
            "does not serve such engines yet"
        )
    labels = unet.config.get("num_class_embeds") is not None, unet.config.get("class_embed_type") is not None
    if labels != (CONDITIONINGS[further] == "upscaling", False):
        raise ConversionError("the UNet takes labels or embeddings that no server of ours would give it")
    if not isinstance(unet.config.get("sample_size"), int):
        raise ConversionError("the UNet's config.json has no sample_size: the native size cannot be known")
    with torch.device("meta"):
        modules = (
            ("unet", unet, UNet2DConditionModel.from_config(unet.config)),
            ("vae", vae, AutoencoderKL.from_config(vae.config)),
        )
    return [
        problem
        for name, component, module in modules
        for problem in shape_problems(name, component.tensors, shapes_of(module))
    ]


def _further_channels(unet: Component, vae: Component) -> int:
    channels: int = unet.config["in_channels"] - vae.config["latent_channels"]
    return channels


def _halved(levels: int) -> int:
    return int(2 ** (levels - 1))
