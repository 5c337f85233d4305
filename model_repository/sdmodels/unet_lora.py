"""The denoising network with LoRAs: each row brings its own, so that rows with different ones share a call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import conv2d, linear

from sdmodels.batching import check_rows
from sdmodels.loras import CACHE_BYTES, UNET, LoraFiles
from sdmodels.precision import DTYPES, InRange
from sdmodels.row_buckets import in_buckets
from sdmodels.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from sdmodels.loras import Delta, Loras
    from sdmodels.precision import Precision, Rows


class UNetLora:
    """By torch, from `engine_folder/unet` and `engine_folder/loras`; precision and buckets as `sdmodels.unet.UNet`.

    What LoRAs add is computed row by row beside the weights, which stay as they are: y + sum of weight * scale *
    up(down(x)). On a CPU without `row_buckets` the whole network is, because torch there has other last digits for
    other numbers of rows, and a row's bytes are not to depend on its company. `cache_bytes` of LoRAs stay on the
    device.
    """

    def __init__(
        self,
        engine_folder: Path,
        device: str = "cpu",
        precision: Precision = "fp32",
        row_buckets: Sequence[int] = (),
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._device = device
        self._unet = UNet(engine_folder, device, precision)
        self._files = LoraFiles(engine_folder, UNET, device, DTYPES[precision], cache_bytes)
        self._rows: list[Loras] = []
        for name, module in self._unet.module.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.register_forward_hook(partial(self._add, name))
        buckets = row_buckets or ((1,) if device == "cpu" else ())
        self._predict: Rows = in_buckets(self.forward, buckets) if buckets else self.forward
        if precision != "fp32":
            self._predict = InRange("unet_lora", self._predict, lambda: UNetLora(engine_folder, device).forward)

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_states: torch.Tensor,
        digests: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The float32 prediction of tensors on the device, digests [B, K, 32] and weights [B, K] on the CPU."""
        self._rows = [self._files.used(*row) for row in zip(digests.numpy(), weights.numpy(), strict=True)]
        return self._unet.forward(latents, timesteps, text_states)

    @torch.inference_mode()
    def __call__(
        self,
        latents: NDArray[np.float32],
        timesteps: NDArray[np.float32],
        text_states: NDArray[np.float32],
        digests: NDArray[np.uint8],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """[B, 4, h, w] prediction as `sdmodels.unet.UNet.__call__`, with the LoRAs that have the SHA-256 digests
        [B, K, 32] by weights [B, K]; 0 is none.

        Raises `InvalidInput` where the numbers of rows disagree, or for a LoRA that is not there.
        """
        check_rows(latents, timesteps, text_states, digests, weights)
        rows = (torch.from_numpy(array).to(self._device) for array in (latents, timesteps, text_states))
        made = self._predict(*rows, torch.from_numpy(digests), torch.from_numpy(weights))
        prediction: NDArray[np.float32] = made.cpu().numpy()
        return prediction

    def _add(self, name: str, module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for row, loras in enumerate(self._rows):
            for deltas, weight in loras:
                if (delta := deltas.get(name)) is not None:
                    one = slice(row, row + 1)
                    output[one].add_(_added(module, delta, arguments[0][one]), alpha=weight * delta.scale)


def _added(module: Any, delta: Delta, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, torch.nn.Linear):
        return linear(linear(x, delta.down), delta.up)
    down = conv2d(x, delta.down, None, module.stride, module.padding, module.dilation)
    return conv2d(down, delta.up)
