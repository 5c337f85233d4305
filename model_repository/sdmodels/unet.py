"""The denoising network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdmodels.class_labels import apart, row_channels
from sdmodels.errors import InvalidInput
from sdmodels.precision import DTYPES, InRange, UpcastAttention
from sdmodels.row_buckets import ROW_BUCKETS, in_buckets
from sdmodels.weights import DIFFUSERS_WEIGHTS, read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sdmodels.precision import Precision

# Shapes that torch compiles before it gives up: buckets times sizes of latents times lengths of texts.
MOST_COMPILED_SHAPES = 64


class UNet:
    """A diffusers UNet2DConditionModel from `engine_folder/unet`.

    In half precision, which is for GPUs, rows that leave its range are computed again in float32. With `row_buckets`
    (see `sdmodels.row_buckets`) the network sees these numbers of rows alone. `compiled`: by torch.compile as CUDA
    graphs, one for each shape, which takes a minute or so at a shape's first call.
    """

    def __init__(
        self,
        engine_folder: Path,
        device: str = "cpu",
        precision: Precision = "fp32",
        row_buckets: Sequence[int] = (),
        *,
        compiled: bool = False,
    ) -> None:
        folder = engine_folder / "unet"
        config = read_config(folder / "config.json")
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        if precision == "fp16" and config.get("upcast_attention"):
            unet.set_attn_processor(UpcastAttention())
        self._device, self._dtype = device, DTYPES[precision]
        # Tensor cores want the channels last; a CPU gains nothing from it.
        self._layout = torch.channels_last if device.startswith("cuda") else torch.preserve_format
        weights = read_weights(folder / DIFFUSERS_WEIGHTS, dtype=self._dtype, device=device, layout=self._layout)
        unet.load_state_dict(weights, assign=True)
        self.module = unet.eval().requires_grad_(False)
        self._compiled = compiled
        self._network = _compiled(self.module) if compiled else self.module
        self._row_buckets = row_buckets or (ROW_BUCKETS if compiled else ())
        self._predict = in_buckets(self.forward, self._row_buckets) if self._row_buckets else self.forward
        if precision != "fp32":
            self._predict = InRange("unet", self._predict, lambda: UNet(engine_folder, device).forward)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor) -> torch.Tensor:
        """The float32 prediction of tensors on the device, as `__call__` has it of arrays."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        rows, labels = apart(latents, self.module.config)
        x = rows.to(self._dtype, memory_format=self._layout)
        # diffusers makes the timesteps' sinusoid in float32, for which bfloat16 had no digits.
        labelled = {} if labels is None else {"class_labels": labels.long()}
        prediction = self._network(x, timesteps, text_states.to(self._dtype), return_dict=False, **labelled)[0]
        # The next call overwrites what a CUDA graph returns.
        result: torch.Tensor = prediction.to(torch.float32, copy=self._compiled)
        return result

    def warm_up(self, engine_folder: Path) -> None:
        """Makes a prediction of the engine's native size for each bucket, so that no request waits for a compiler."""
        engine = read_config(engine_folder / "engine.json")
        height, width = (engine[f"native_{side}"] // engine["latents"]["downsampling"] for side in ("height", "width"))
        text = engine["text_encoder"]
        for rows in self._row_buckets or (1,):
            self(
                np.zeros((rows, row_channels(self.module.config), height, width), np.float32),
                np.zeros(rows, np.float32),
                np.zeros((rows, text["context_length"], text["width"]), np.float32),
            )

    @torch.inference_mode()
    def __call__(
        self, latents: NDArray[np.float32], timesteps: NDArray[np.float32], text_states: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """[B, 4, h, w] prediction for latents [B, U, h, w], timesteps [B] and text states [B, T, D].

        U is 4 and, in UNets that take more than noisy latents, the channels of that after them (an upscaler's label is
        one, too: `class_labels`). T may be any number of text states: the UNet attends to all of them. Timesteps count
        from 0 to 999 and may lie between two. Whether noise or velocity is predicted is the engine's matter. Raises
        `InvalidInput` where the numbers of rows disagree.
        """
        if not len(latents) == len(timesteps) == len(text_states):
            raise InvalidInput(
                f"a row is one latent, one timestep and one text: "
                f"got {len(latents)} latents, {len(timesteps)} timesteps and {len(text_states)} texts"
            )
        x, t, c = (torch.from_numpy(array).to(self._device) for array in (latents, timesteps, text_states))
        prediction: NDArray[np.float32] = self._predict(x, t, c).cpu().numpy()
        return prediction


def _compiled(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor]]:
    """As CUDA graphs, which belong to the thread that makes them: Triton's Python backend has one."""
    from torch._dynamo import config

    # Of 8 shapes, torch's default, the ninth would run uncompiled.
    config.recompile_limit = MOST_COMPILED_SHAPES
    compiled: Callable[..., tuple[torch.Tensor]] = torch.compile(module, mode="reduce-overhead", dynamic=False)
    return compiled
