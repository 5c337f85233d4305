"""An engine's UNet or VAE decoder as ONNX, from which TensorRT builds a plan for one kind of GPU (docs/engines.md).

    python -m sdmodels.onnx_export model_repository/engines/ENGINE unet unet.onnx --precision fp16

Inputs and outputs have the names and types of the engine's Triton model, so that the plan can take its place. Precision
is in the graph, as TensorRT's strongly typed networks have it: what is upcast in torch stays so. Needs
pip install 'sd-service[onnx]'.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from sdmodels.class_labels import apart, row_channels
from sdmodels.precision import DTYPES, Precision
from sdmodels.unet import UNet
from sdmodels.vae import VaeDecoder
from sdmodels.weights import read_config

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS = 77
# Latents that are no square, rows and tokens that are not 1: nothing of the example becomes a rule.
ROWS, HEIGHT, WIDTH = 2, 16, 24
# The first with bfloat16 in convolutions.
OPSET = 22


class _UNet(torch.nn.Module):
    """`latents` [B, U, h, w], `timestep` [B, 1] and `text_states` [B, T, D] to `prediction`, all float32."""

    def __init__(self, engine_folder: Path, precision: Precision) -> None:
        super().__init__()
        self.network = UNet(engine_folder, precision=precision).module
        self._dtype = DTYPES[precision]

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text_states: torch.Tensor) -> torch.Tensor:
        rows, labels = apart(latents, self.network.config)
        labelled = {} if labels is None else {"class_labels": labels.long()}
        inputs = rows.to(self._dtype), timestep[:, 0], text_states.to(self._dtype)
        prediction: torch.Tensor = self.network(*inputs, return_dict=False, **labelled)[0]
        return prediction.float()


class _VaeDecoder(torch.nn.Module):
    """`latents` [B, 4, h, w] float32 to `image` [B, 8h, 8w, 3] uint8."""

    def __init__(self, engine_folder: Path, precision: Precision) -> None:
        super().__init__()
        self._decoder = VaeDecoder(engine_folder, precision=precision)
        # So that the exporter finds the weights.
        self.network = self._decoder.module

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self._decoder.pixels(self._decoder.image(latents))


def export(engine_folder: Path, role: str, target: Path, precision: Precision) -> None:
    """Writes `target`, and its weights beside it in `<target>.data`. `role` is "unet" or "vae_decoder".

    Raises ModuleNotFoundError where onnx or onnxscript is not installed.
    """
    dynamic = torch.export.Dim.DYNAMIC
    rows_and_size = {0: dynamic, 2: dynamic, 3: dynamic}
    config = read_config(engine_folder / "unet/config.json")
    latents = torch.zeros(ROWS, config["out_channels"], HEIGHT, WIDTH)
    if role == "unet":
        latents = torch.zeros(ROWS, row_channels(config), HEIGHT, WIDTH)
        states = torch.zeros(ROWS, TOKENS, config["cross_attention_dim"])
        module: torch.nn.Module = _UNet(engine_folder, precision)
        inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {
            "latents": (latents, rows_and_size),
            "timestep": (torch.zeros(ROWS, 1), {0: dynamic}),
            "text_states": (states, {0: dynamic, 1: dynamic}),
        }
        output = "prediction"
    else:
        module, inputs, output = _VaeDecoder(engine_folder, precision), {"latents": (latents, rows_and_size)}, "image"
    with warnings.catch_warnings(), torch.inference_mode():
        # What torch says of its own plans, and of diffusers' checks of sizes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(example for example, _ in inputs.values()),
            target,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple(dimensions for _, dimensions in inputs.values()),
            opset_version=OPSET,
            dynamo=True,
            # Beyond 2 GB a file of ONNX cannot hold its weights.
            external_data=True,
            verbose=False,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports one model of an engine."""
    parser = argparse.ArgumentParser(prog="python -m sdmodels.onnx_export", description="An engine's model as ONNX.")
    parser.add_argument("engine", type=Path, help="the engine's folder, <model repository>/engines/<engine>")
    parser.add_argument("role", choices=("unet", "vae_decoder"))
    parser.add_argument("target", type=Path, help="file to write; the weights come beside it")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp16", help="default: fp16")
    options = parser.parse_args(arguments)
    try:
        export(options.engine, options.role, options.target, options.precision)
    except ModuleNotFoundError as error:
        parser.exit(1, f"{error}: pip install 'sd-service[onnx]'\n")
    except OSError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
