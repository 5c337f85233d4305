"""Checkpoints as single files, under the names of the original code (CompVis, Stability AI)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open

from sdmodels.conversion.clip import from_transformers, text_tower
from sdmodels.conversion.components import Checkpoint, Component, completed, component_problems
from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.tensors import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from sdmodels.conversion.clip import Family
    from sdmodels.conversion.tensors import LazyTensor, Tensors

UNET, EMA, VAE = "model.diffusion_model.", "model_ema.", "first_stage_model."
TEXT = {"1": "cond_stage_model.transformer.", "2": "cond_stage_model.model."}
# What 1.x and 2.x were trained with, and what diffusers' own configurations of them sample with.
NOISE_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "rescale_zero_terminal_snr": False,
}
SCALING_FACTOR = 0.18215
# Of the x4 upscaler: both its own noise and that of the image that it enlarges.
UPSCALING_NOISE = {"beta_start": 0.0001, "beta_end": 0.02}
UPSCALING_MAX_NOISE_LEVEL = 350
UPSCALING_SCALING_FACTOR = 0.08333
UPSCALING_NATIVE_SIZE = 512
HEADS = 8
HEAD_WIDTH = 64
NATIVE_SIZES = {"epsilon": 512, "v_prediction": 768}


def read_original(path: Path, prediction_type: str | None) -> Checkpoint:
    """The checkpoint in a file; `prediction_type` says what cannot be told from tensors. Raises ConversionError.

    Where the file has averaged weights (EMA) beside the trained ones, those are taken: samples are made with them.
    """
    tensors = read_tensors(path)
    family, text_tensors = _text_encoder(tensors)
    unet_tensors = _averaged(tensors)
    # Known before the shapes are looked at: a family that is ambiguous is so whatever else is wrong.
    prediction_type = prediction_type or _prediction_type(path, family)
    upscales = "label_emb.weight" in unet_tensors
    native_size = NATIVE_SIZES["epsilon" if family == "1" else prediction_type]
    if upscales:
        native_size = UPSCALING_NATIVE_SIZE
    try:
        vae_tensors = _below(tensors, VAE, without=("loss.", "model_ema."))
        vae_config = vae_configuration(
            vae_tensors, native_size, UPSCALING_SCALING_FACTOR if upscales else SCALING_FACTOR
        )
        downsampling = 2 ** (len(vae_config["block_out_channels"]) - 1)
        unet_config = unet_configuration(unet_tensors, native_size // downsampling)
    except KeyError as error:
        raise ConversionError(f"{path} is no checkpoint of Stable Diffusion 1.x or 2.x: {error} is missing") from error
    unet = Component(
        completed(UNet2DConditionModel, unet_config),
        _converted(unet_tensors, UNET, convert_ldm_unet_checkpoint, unet_config),
    )
    vae = Component(
        completed(AutoencoderKL, vae_config), _converted(vae_tensors, VAE, convert_ldm_vae_checkpoint, vae_config)
    )
    # 2.x conditions on the last layer but one, 1.x on the last.
    clip, problems = text_tower(text_tensors, family)
    if family == "2":
        clip, problems = text_tower(text_tensors, family, clip.text_config["layers"] - 1)
    problems += component_problems(unet, vae)
    if problems:
        raise ConversionError(f"{path} is not a checkpoint that can be served", problems)
    noise_schedule = NOISE_SCHEDULE | (UPSCALING_NOISE if upscales else {})
    upscaling = {"noise_schedule": noise_schedule, "max_noise_level": UPSCALING_MAX_NOISE_LEVEL}
    return Checkpoint(
        family,
        unet,
        vae,
        clip,
        prediction_type,
        noise_schedule,
        "end" if family == "1" else "zero",
        "",
        (path,),
        upscaling=upscaling if upscales else None,
        ignored=_others(tensors),
    )


def unet_configuration(tensors: Tensors, sample_size: int) -> dict[str, Any]:
    """diffusers' configuration of a UNet from the shapes under its original names. Raises KeyError."""
    channels: list[int] = []
    attention: list[bool] = []
    layers = 0
    index, begins = 1, True
    while f"input_blocks.{index}.0.op.weight" in tensors or f"input_blocks.{index}.0.in_layers.0.weight" in tensors:
        if f"input_blocks.{index}.0.op.weight" in tensors:
            begins = True
        else:
            if begins:
                channels.append(tensors[f"input_blocks.{index}.0.out_layers.3.weight"].shape[0])
                attention.append(f"input_blocks.{index}.1.proj_in.weight" in tensors)
            layers += len(channels) == 1
            begins = False
        index += 1
    attended = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    context = tensors[attended].shape[1]
    # 2.x has linear projections and 64 channels a head, 1.x convolutions and 8 heads at every width.
    linear = tensors["middle_block.1.proj_in.weight"].ndim == 2
    if "label_emb.0.0.weight" in tensors:
        raise ConversionError("the UNet takes embeddings of images: this service does not serve unCLIP")
    # The upscaler's levels attend to the text alone, and it has 8 heads at every width.
    alone = [_attends_to_the_text_alone(tensors, 1 + level * (layers + 1), context) for level in range(len(channels))]
    upscaling: dict[str, Any] = {}
    if "label_emb.weight" in tensors:
        labels = tensors["label_emb.weight"].shape[0]
        upscaling = {"num_class_embeds": labels, "only_cross_attention": alone, "attention_head_dim": HEADS}
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": context,
        "attention_head_dim": [width // HEAD_WIDTH for width in channels] if linear else HEADS,
        "use_linear_projection": linear,
        # 2.1's attention leaves the range of fp16 otherwise.
        "upcast_attention": linear,
        **upscaling,
    }


def _attends_to_the_text_alone(tensors: Tensors, block: int, context: int) -> bool:
    keys = tensors.get(f"input_blocks.{block}.1.transformer_blocks.0.attn1.to_k.weight")
    # A level without attention is counted to those that do, as diffusers has it.
    return keys is None or (keys.shape[1] == context and keys.shape[0] != context)


def vae_configuration(tensors: Tensors, sample_size: int, scaling_factor: float = SCALING_FACTOR) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder from the shapes under its original names. Raises KeyError."""
    channels: list[int] = []
    while (name := f"encoder.down.{len(channels)}.block.0.conv2.weight") in tensors:
        channels.append(tensors[name].shape[0])
    layers = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv2\.weight", name) is not None for name in tensors)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "layers_per_block": layers,
        "scaling_factor": scaling_factor,
    }


def _text_encoder(tensors: Tensors) -> tuple[Family, Tensors]:
    if two := _below(tensors, TEXT["2"]):
        return "2", two
    if one := _below(tensors, TEXT["1"]):
        return "1", from_transformers(one)
    raise ConversionError(
        "the file has no text encoder under cond_stage_model.: it is no whole checkpoint of Stable Diffusion 1.x or "
        "2.x. A UNet, VAE or LoRA alone cannot be served"
    )


def _averaged(tensors: Tensors) -> dict[str, LazyTensor]:
    unet = _below(tensors, UNET)
    return {
        name: tensors.get(f"{EMA}{('diffusion_model.' + name).replace('.', '')}", tensor)
        for name, tensor in unet.items()
    }


def _below(tensors: Tensors, prefix: str, without: tuple[str, ...] = ()) -> dict[str, LazyTensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(without)
    }


def _converted(tensors: Tensors, prefix: str, convert: Any, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """The tensors under diffusers' names, and those that have none under their own, so that they are reported."""
    converted: dict[str, LazyTensor] = convert({prefix + name: tensor for name, tensor in tensors.items()}, config)
    used = {tensor.name for tensor in converted.values()}
    return converted | {prefix + name: tensor for name, tensor in tensors.items() if tensor.name not in used}


def _prediction_type(path: Path, family: Family) -> str:
    if family == "1":
        return "epsilon"
    said = _said_by_metadata(path) or _said_by_yaml(path) or _said_by_name(path)
    if said:
        return said
    raise ConversionError(
        f"{path.name} is a Stable Diffusion 2.x, and its tensors do not say what its UNet predicts: add "
        "--prediction-type v_prediction (2.0 and 2.1 at 768 pixels) or --prediction-type epsilon (base, 512 pixels)"
    )


def _said_by_metadata(path: Path) -> str | None:
    """The model specification that training tools write into a safetensors header."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    said = {"v": "v_prediction", "epsilon": "epsilon"}
    return said.get(metadata.get("modelspec.prediction_type", ""))


def _said_by_yaml(path: Path) -> str | None:
    """The original code's configuration, which tools keep beside the file under its name."""
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return None
    v = re.search(r"^\s*parameterization:\s*[\"']?v[\"']?\s*$", config.read_text(encoding="utf-8"), re.MULTILINE)
    return "v_prediction" if v else "epsilon"


def _said_by_name(path: Path) -> str | None:
    """The publisher's own file names: v2-1_768-ema-pruned, 768-v-ema, x4-upscaler-ema, v2-1_512-ema-pruned,
    512-base-ema, 512-inpainting-ema, 512-depth-ema."""
    if re.match(r"(v2-1_768|768-v|x4-upscaler)-", path.name):
        return "v_prediction"
    if re.match(r"(v2-1_512|512-base|512-inpainting|512-depth)-", path.name):
        return "epsilon"
    return None


def _others(tensors: Tensors) -> tuple[str, ...]:
    """The modules of the file that are no component of an engine; what is no module's is a buffer of training."""
    parts = {name.split(".")[0] for name in tensors if "." in name and not name.startswith((UNET, VAE, *TEXT.values()))}
    return tuple(sorted(parts - {"model_ema"}))
