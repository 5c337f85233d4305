"""Which library runs a model on this machine: torch on a GPU, OpenVINO on a CPU where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Predict = Callable[[Floats, Floats, Floats], Floats]

Runtime = Literal["openvino", "torch"]
RUNTIMES: tuple[Runtime, ...] = ("openvino", "torch")

# There with NVIDIA's driver, and in a container that has been given a GPU. Asking torch would take seconds.
NVIDIA_DEVICE = Path("/dev/nvidiactl")


def default_runtime() -> Runtime:
    """torch where there is a GPU or no OpenVINO."""
    return "torch" if NVIDIA_DEVICE.exists() or importlib.util.find_spec("openvino") is None else "openvino"


def load_unet(engine_folder: Path, threads: int, runtime: str = "", precision: str = "fp32") -> Predict:
    """The denoising network of an engine, called as `sdmodels.unet.UNet` is; `threads` of the CPU answer a call.

    `runtime` is one of RUNTIMES, or empty for the best there is. `precision` "bf16" needs OpenVINO and a CPU that
    computes in it. Raises ValueError for what it does not know.
    """
    runtime = runtime or default_runtime()
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; it must be one of {', '.join(RUNTIMES)}")
    if runtime == "openvino":
        from sdmodels.openvino_unet import OpenVinoUNet

        return OpenVinoUNet(engine_folder, threads, precision)
    if precision != "fp32":
        raise ValueError(f"precision is {precision!r}; with torch it must be fp32")
    import torch

    from sdmodels.unet import UNet
    from sdmodels.weights import default_device

    torch.set_num_threads(threads)
    return UNet(engine_folder, default_device())
