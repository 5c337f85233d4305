"""What the tensors of LoRA files are called, by whom they were written, and which modules of an engine they change."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdmodels.loras import TEXT_ENCODER, UNET
from sdmodels.text_encoder import LORA_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Kind = Literal["down", "up", "alpha"]
Shape = tuple[int, ...]

_FORMS = (
    # diffusers before PEFT: in attention processors, and in layers of its own.
    r"(?P<module>.+)\.processor\.(?P<part>to_q|to_k|to_v|to_out)_lora\.(?P<kind>down|up)\.weight",
    r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<kind>down|up)\.weight",
    # kohya and PEFT, the latter with or without the adapter's name.
    r"(?P<module>.+)\.lora_(?P<kind>down|up)\.weight",
    r"(?P<module>.+)\.lora_(?P<kind>A|B)(?:\.\w+)?\.weight",
    r"(?P<module>.+?)(?:\.lora_linear_layer)?\.(?P<kind>alpha)",
)
_KINDS: dict[str, Kind] = {"A": "down", "B": "up", "down": "down", "up": "up", "alpha": "alpha"}
# What only other methods have.
_OTHER_METHODS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.(oft_|boft_)": "OFT",
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.lora_mid\.": "LoCon in Tucker's form",
    r"\.(diff|diff_b|w_norm|b_norm)$": "whole differences of weights",
    r"\.lora_B\.bias|\.lora_up\.bias": "LoRA with biases",
    r"^lora_te[12]_|^text_encoder_2\.": "Stable Diffusion XL",
}
PEFT_PREFIX = "base_model.model."

_TEXT_PARTS = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.out",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def parsed(key: str) -> tuple[str, Kind] | None:
    """The module that a tensor belongs to, as the file calls it, and what it is there; None for an unknown name."""
    for form in _FORMS:
        if matched := re.fullmatch(form, key):
            found = matched.groupdict()
            module, part = found["module"], found.get("part")
            if part is not None:
                module = f"{module}.{part}.0" if part == "to_out" else f"{module}.{part}"
            return module, _KINDS[found["kind"]]
    return None


def other_method(key: str) -> str | None:
    """The method that a tensor's name belongs to, if that is another one than LoRA."""
    return next((method for pattern, method in _OTHER_METHODS.items() if re.search(pattern, key)), None)


def modules_of(unet_config: Mapping[str, Any], clip_config: Mapping[str, Any], blocks: int) -> dict[str, Shape]:
    """The shapes of all weights of an engine that LoRAs may change; `blocks` of its text tower make text states."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    found = {
        UNET + name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    width = clip_config["model_cfg"]["text_cfg"]["width"]
    inner = int(width * clip_config["model_cfg"]["text_cfg"].get("mlp_ratio", 4.0))
    shapes = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for block in range(blocks):
        for part in LORA_PARTS:
            found[f"{TEXT_ENCODER}{block}.{part}"] = shapes.get(part, (width, width))
    return found


def names_of(modules: Iterable[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Our name of each module by all that files call it."""
    names: dict[str, str] = {}
    for ours in modules:
        if ours.startswith(UNET):
            path = ours.removeprefix(UNET)
            original = original_path(path, unet_config)
            for name in (ours, path, f"diffusion_model.{original}"):
                names[name] = ours
            for each in (path, original):
                names[f"lora_unet_{each}".replace(".", "_")] = ours
        else:
            block, part = re.fullmatch(rf"{re.escape(TEXT_ENCODER)}(\d+)\.(.+)", ours).groups()  # type: ignore[union-attr]
            theirs = next(name for name, each in _TEXT_PARTS.items() if each == part)
            layer = f"encoder.layers.{block}.{theirs}"
            # transformers 5 calls its modules without `text_model`.
            for path in (f"text_model.{layer}", layer):
                for name in (f"{TEXT_ENCODER}{path}", path, f"lora_te_{path}".replace(".", "_")):
                    names[name] = ours
    return names


def original_path(path: str, config: Mapping[str, Any]) -> str:
    """What the original code calls a module of diffusers' UNet."""
    if path in _TOP:
        return _TOP[path]
    matched = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path)
    if matched is None:
        return path
    side, block, kind, index, rest = matched[1], int(matched[2] or 0), matched[3], int(matched[4]), matched[5]
    layers = config["layers_per_block"]
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{place}.conv"
    number = block * (layers + 1) + index + (1 if side == "down_blocks" else 0)
    return f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"
