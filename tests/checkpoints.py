"""Checkpoints of SD 1.x's and 2.x's own configurations at reduced width, from random but known tensors.

The original names are written out here by rules of their own, so that a test of the conversion does not ask the code
that it tests.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip import CLIP
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, DPTConfig, DPTForDepthEstimation

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

VOCABULARY = 49408
TEXT_WIDTH = 64
TEXT_BLOCKS = 4
FURTHER_CHANNELS = {"none": 0, "inpainting": 5, "depth": 1, "upscaling": 3}
PIPELINES = {
    "none": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "depth": "StableDiffusionDepth2ImgPipeline",
    "upscaling": "StableDiffusionUpscalePipeline",
}
# As that of SD 2.0 depth, but for the sizes.
DEPTH_PREPROCESSOR: dict[str, Any] = {
    "feature_extractor_type": "DPTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": 64,
}
VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Model:
    """The modules of a small Stable Diffusion; `family` is 1 or 2, `prediction_type` what its UNet is taken for."""

    family: Literal["1", "2"]
    prediction_type: str
    conditioning: Literal["none", "inpainting", "depth", "upscaling"] = "none"

    @property
    def scheduler(self) -> dict[str, Any]:
        """diffusers' configuration of the noise that it was trained with."""
        betas = {"beta_start": 0.0001, "beta_end": 0.02} if self.conditioning == "upscaling" else {}
        return {**SCHEDULER, **betas, "prediction_type": self.prediction_type}

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        two = self.family == "2"
        if self.conditioning == "upscaling":
            torch.manual_seed(1)
            # As that of the x4 upscaler: its last level, which is as wide as the text states, attends to itself, too.
            return UNet2DConditionModel(
                sample_size=128,
                in_channels=7,
                block_out_channels=(32, 32, 32, TEXT_WIDTH),
                down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
                up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
                only_cross_attention=[True, True, True, False],
                attention_head_dim=8,
                cross_attention_dim=TEXT_WIDTH,
                use_linear_projection=True,
                num_class_embeds=1000,
            ).eval()
        channels = (64, 64, 128, 128) if two else (32, 32, 64, 64)
        torch.manual_seed(1)
        return UNet2DConditionModel(
            sample_size=96 if self.prediction_type == "v_prediction" else 64,
            in_channels=4 + FURTHER_CHANNELS[self.conditioning],
            block_out_channels=channels,
            attention_head_dim=[width // 64 for width in channels] if two else 8,
            cross_attention_dim=TEXT_WIDTH,
            use_linear_projection=two,
            upcast_attention=two,
        ).eval()

    @cached_property
    def vae(self) -> AutoencoderKL:
        torch.manual_seed(2)
        channels = (32, 32, 64) if self.conditioning == "upscaling" else (32, 32, 64, 64)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=2,
            sample_size=768 if self.prediction_type == "v_prediction" else 512,
            scaling_factor=0.08333 if self.conditioning == "upscaling" else 0.18215,
        ).eval()
        with torch.no_grad():
            # A posterior without spread: diffusers' pipelines take a sample of it, and the service its mean.
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = -30
        return vae

    @cached_property
    def depth_estimator(self) -> DPTForDepthEstimation:
        """A hybrid as MiDaS' own: a transformer on the features of a residual network."""
        torch.manual_seed(5)
        module: DPTForDepthEstimation = DPTForDepthEstimation(
            DPTConfig(
                is_hybrid=True,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=64,
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[16, 24, 32, 32],
                fusion_hidden_size=16,
                backbone_featmap_shape=[1, 64, 4, 4],
                backbone_config={
                    "model_type": "bit",
                    "global_padding": "same",
                    "layer_type": "bottleneck",
                    "depths": [1, 1, 1],
                    "out_features": ["stage1", "stage2", "stage3"],
                    "embedding_dynamic_padding": True,
                    "embedding_size": 16,
                    "hidden_sizes": [16, 24, 64, 64],
                    "num_groups": 4,
                },
            )
        )
        with torch.no_grad():
            # transformers' own initialisation gives depths that are all but the same.
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1 and not name.startswith("dpt.embeddings"):
                    torch.nn.init.kaiming_uniform_(parameter, a=1)
        module.requires_grad_(False).train(False)
        return module

    @cached_property
    def clip(self) -> CLIP:
        """open_clip's module of 2.x, of which the last text block is left out."""
        torch.manual_seed(3)
        text = {"context_length": 77, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 1, "layers": TEXT_BLOCKS}
        clip = CLIP(embed_dim=32, vision_cfg=VISION, text_cfg=text).eval()
        _stir(clip)
        return clip

    @cached_property
    def transformers_text_encoder(self) -> CLIPTextModel:
        """transformers' module: 1.x's own, or 2.x's blocks but the last, as diffusers' folders have them."""
        two = self.family == "2"
        torch.manual_seed(4)
        model: CLIPTextModel = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                num_hidden_layers=TEXT_BLOCKS - 1,
                num_attention_heads=1,
                hidden_act="gelu" if two else "quick_gelu",
                vocab_size=VOCABULARY,
            )
        )
        model.requires_grad_(False).train(False)
        if two:
            model.load_state_dict(_as_transformers(self.clip.state_dict(), model.state_dict()))
        else:
            _stir(model)
        return model

    def original(self) -> Tensors:
        """All tensors under the original code's names, with the buffers that its files carry along."""
        unet = original_unet(self.unet.state_dict(), self.unet.config.layers_per_block)
        vae = original_vae(self.vae.state_dict(), len(self.vae.config.block_out_channels))
        if self.family == "2":
            text = {f"model.{name}": tensor for name, tensor in _text_part(self.clip.state_dict()).items()}
        else:
            text = {
                f"transformer.text_model.{name.removeprefix('text_model.')}": tensor
                for name, tensor in self.transformers_text_encoder.state_dict().items()
            }
            text["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return {
            **{f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()},
            **{f"first_stage_model.{name}": tensor for name, tensor in vae.items()},
            **{f"cond_stage_model.{name}": tensor for name, tensor in text.items()},
            "betas": torch.linspace(0, 1, 1000),
            "alphas_cumprod": torch.linspace(1, 0, 1000),
        }

    def save_original(self, path: Path, **changes: torch.Tensor) -> Path:
        """One file; ending in .ckpt, a pickle as the original training code writes it."""
        tensors = {name: tensor.contiguous() for name, tensor in (self.original() | changes).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save({"state_dict": tensors, "global_step": 7}, path)
        return path

    def save_diffusers(self, folder: Path, **options: Any) -> Path:
        """A folder; `options` go to `save_pretrained`, such as `variant` and `max_shard_size`."""
        self.unet.save_pretrained(folder / "unet", **options)
        self.vae.save_pretrained(folder / "vae", **options)
        self.transformers_text_encoder.save_pretrained(folder / "text_encoder", **options)
        if self.conditioning == "depth":
            self.depth_estimator.save_pretrained(folder / "depth_estimator", **options)
            _write(folder / "feature_extractor/preprocessor_config.json", DEPTH_PREPROCESSOR)
        _write(folder / "model_index.json", {"_class_name": PIPELINES[self.conditioning]})
        _write(folder / "scheduler/scheduler_config.json", self.scheduler)
        if self.conditioning == "upscaling":
            _write(
                folder / "low_res_scheduler/scheduler_config.json",
                {**self.scheduler, "_class_name": "DDPMScheduler", "prediction_type": "epsilon"},
            )
        (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A model card\n")
        return folder

    def save_clip(self, folder: Path) -> Path:
        """open_clip's files of the whole CLIP."""
        text = {"context_length": 77, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 1, "layers": TEXT_BLOCKS}
        model = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": text}
        _write(
            folder / "open_clip_config.json",
            {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3}},
        )
        save_file(
            {name: tensor.contiguous() for name, tensor in self.clip.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
        return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _stir(module: torch.nn.Module) -> None:
    """Moves what is initialised to 0 and 1, biases and norms, where a mistake would not show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or "ln_" in name or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _text_part(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}


def _as_transformers(clip: Tensors, like: Tensors) -> Tensors:
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    found: Tensors = {
        "embeddings.token_embedding.weight": clip["token_embedding.weight"],
        "embeddings.position_embedding.weight": clip["positional_embedding"],
        "final_layer_norm.weight": clip["ln_final.weight"],
        "final_layer_norm.bias": clip["ln_final.bias"],
    }
    for block in range(TEXT_BLOCKS - 1):
        old, new = f"transformer.resblocks.{block}.", f"encoder.layers.{block}."
        for kind in ("weight", "bias"):
            for before, after in (*parts.items(), ("attn.out_proj", "self_attn.out_proj")):
                found[f"{new}{after}.{kind}"] = clip[f"{old}{before}.{kind}"]
            for name, part in zip("qkv", clip[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                found[f"{new}self_attn.{name}_proj.{kind}"] = part
    prefix = "text_model." if next(iter(like)).startswith("text_model.") else ""
    return {prefix + name: tensor for name, tensor in found.items()}


_TOP = {
    "class_embedding": "label_emb",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet(tensors: Tensors, layers: int) -> Tensors:
    """A UNet's tensors under the original names; `layers` are its `layers_per_block`."""

    def named(name: str) -> str:
        top, _, kind = name.rpartition(".")
        if top in _TOP:
            return f"{_TOP[top]}.{kind}"
        matched = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
        assert matched, name
        side, block, kind, index, rest = matched[1], int(matched[2] or 0), matched[3], int(matched[4]), matched[5]
        if kind == "resnets":
            part, _, end = rest.rpartition(".")
            rest = f"{_RESNET[part]}.{end}"
        if side == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            attends = f"up_blocks.{block}.attentions.0.norm.weight" in tensors
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends else 1}.{rest}"
        number = block * (layers + 1) + index + (1 if side == "down_blocks" else 0)
        return f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"

    return {named(name): tensor for name, tensor in tensors.items()}


def original_vae(tensors: Tensors, levels: int) -> Tensors:
    """An autoencoder's tensors under the original names; it has `levels` resolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def named(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if matched := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            half, part, kind = matched.groups()
            convolution = kind == "weight" and part != "group_norm"
            return f"{half}.mid.attn_1.{attention[part]}.{kind}", tensor[:, :, None, None] if convolution else tensor
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name
        )
        return name, tensor

    return dict(named(name, tensor) for name, tensor in tensors.items())
