"""Stable Diffusion 2.1 at its full size with random weights, as a folder of diffusers.

The published configurations and weights of a fixed seed in half precision (2.6 GB). The last layers of UNet and decoder
are scaled so that predictions and pictures spread as trained ones do: differences then show.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.full_size import CONFIG

if TYPE_CHECKING:
    from pathlib import Path

UNET: dict[str, Any] = CONFIG
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@torch.inference_mode()
def write(folder: Path) -> None:
    """Writes the folder, one model at a time; takes about 6 GB of memory."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNET).eval()
    prediction = unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 77, 1024)).sample
    unet.conv_out.weight /= prediction.std()
    _save(unet, folder / "unet")
    del unet
    torch.manual_seed(1)
    vae = AutoencoderKL.from_config(VAE).eval()
    picture = vae.decode(torch.randn(1, 4, 16, 16) / vae.config.scaling_factor).sample
    vae.decoder.conv_out.weight *= 0.4 / picture.std()
    _save(vae, folder / "vae")
    torch.manual_seed(2)
    _save(CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)), folder / "text_encoder")
    _write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    _write(folder / "scheduler/scheduler_config.json", SCHEDULER)


def _save(module: Any, folder: Path) -> None:
    module.half().save_pretrained(folder, max_shard_size="20GB")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
