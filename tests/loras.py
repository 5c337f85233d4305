"""LoRAs of random but known numbers, in the forms that training tools write.

The names are written out here by rules of their own, so that a test of the conversion does not ask the code that it
tests.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from checkpoints import original_unet
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoints import Model, Tensors

Form = Literal["kohya", "kohya-original", "diffusers", "diffusers-layers", "peft", "peft-adapter"]
ATTENTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$")
TEXT_LAYERS = re.compile(r"layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc\d)$")


@dataclass(frozen=True)
class Lora:
    """A LoRA of rank 4 for a model's UNet, and for its text encoder if `text`.

    `convolutions`: of all its linear layers and convolutions; otherwise of attention alone.
    """

    model: Model
    seed: int
    alpha: float = 4.0
    text: bool = False
    convolutions: bool = False
    rank: int = 4
    strength: float = 0.5

    @cached_property
    def changes(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Down and up by diffusers' and transformers' names, behind `unet.` and `text_encoder.`."""
        generator = torch.Generator().manual_seed(self.seed)

        def change(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out, *rest = weight.shape
            down = torch.randn(self.rank, *rest, generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(out, self.rank, *([1] * len(rest[1:])), generator=generator)
            return down, up * self.strength / self.rank

        weights = {}
        for name, module in self.model.unet.named_modules():
            wanted = self.convolutions or ATTENTION.search(name)
            if wanted and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                weights[f"unet.{name}"] = module.weight
        if self.text:
            for name, module in self.model.transformers_text_encoder.named_modules():
                if TEXT_LAYERS.search(name):
                    weights[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = module.weight
        return {name: change(weight) for name, weight in weights.items()}

    def save(self, path: Path, form: Form = "kohya", header: dict[str, str] | None = None) -> Path:
        """The file; tools write words into its `header`."""
        header = dict(header or {})
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors(form).items()}
        if form == "peft":
            header["lora_adapter_metadata"] = json.dumps(self._adapter_metadata(), sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "peft-adapter":
            (path.parent / "adapter_config.json").write_text(json.dumps({"r": self.rank, "lora_alpha": self.alpha}))
        save_file(tensors, path, {"format": "pt", **header})
        return path

    def _adapter_metadata(self) -> dict[str, Any]:
        """What diffusers' `save_lora_weights` puts into the header."""
        # Only here: it brings in more than all other libraries of the tests.
        from peft import LoraConfig

        said: dict[str, Any] = {}
        for part in ("unet", "text_encoder"):
            modules = [name.split(".", 1)[1] for name in self.changes if name.startswith(f"{part}.")]
            config = LoraConfig(r=self.rank, lora_alpha=int(self.alpha), target_modules=modules)
            said_of_part = {**config.to_dict(), "target_modules": sorted(modules)}  # type: ignore[no-untyped-call]
            said |= {f"{part}.{name}": value for name, value in said_of_part.items() if modules}
        return said

    def _tensors(self, form: Form) -> Tensors:
        found: Tensors = {}
        unet = self.model.unet
        state: Tensors = unet.state_dict()
        # The original names of some modules depend on those beside them.
        originals = dict(zip(state, original_unet(state, unet.config.layers_per_block), strict=True))
        for name, (down, up) in self.changes.items():
            part, module = name.split(".", 1)
            if form.startswith("kohya"):
                if form == "kohya-original" and part == "unet":
                    module = originals[f"{module}.weight"].removesuffix(".weight")
                module = f"lora_{'unet' if part == 'unet' else 'te'}_{module}".replace(".", "_")
                found |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
                found[f"{module}.alpha"] = torch.tensor(self.alpha)
            elif form == "diffusers":
                # Without a place for alpha: it is in the numbers.
                up = up * (self.alpha / self.rank)
                if part == "unet":
                    processor, layer = module.removesuffix(".0").rsplit(".", 1)
                    module = f"unet.{processor}.processor.{layer}_lora"
                else:
                    module = f"{name}.lora_linear_layer"
                found |= {f"{module}.down.weight": down, f"{module}.up.weight": up}
            elif form == "diffusers-layers":
                up = up * (self.alpha / self.rank)
                found |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
            else:
                name = name if form == "peft" else f"base_model.model.{module}"
                found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        return found


TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"


def save_tiny(path: Path, seed: int, unet_weights: Tensors) -> Path:
    """A LoRA for the shipped engine, in PEFT's form: two modules of its UNet, three matrices of its text encoder."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 8

    tensors = {}
    for name in (TO_K, CONV):
        out, inner, *kernel = unet_weights[f"{name}.weight"].shape
        tensors[f"unet.{name}.lora_A.weight"] = random(4, inner, *kernel)
        tensors[f"unet.{name}.lora_B.weight"] = random(out, 4, *([1] * len(kernel)))
    for name, out in (("self_attn.k_proj", 128), ("self_attn.out_proj", 128), ("mlp.fc1", 512)):
        tensors[f"text_encoder.text_model.encoder.layers.0.{name}.lora_A.weight"] = random(4, 128)
        tensors[f"text_encoder.text_model.encoder.layers.0.{name}.lora_B.weight"] = random(out, 4)
    save_file(tensors, path)
    return path
