"""Which library runs a model on this machine: torch on a GPU, OpenVINO on a CPU where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Predict = Callable[[Floats, Floats, Floats], Floats]
    PredictCached = Callable[[Floats, Floats, Floats, Floats | None], Floats]

Runtime = Literal["openvino", "torch"]
RUNTIMES: tuple[Runtime, ...] = ("openvino", "torch")

# There with NVIDIA's driver, and in a container that has been given a GPU. To ask torch would take seconds.
NVIDIA_DEVICE = Path("/dev/nvidiactl")


def instance_device(arguments: Mapping[str, str]) -> str:
    """torch's name of the device that Triton gave an instance of a model, by the arguments of its `initialize`.

    KIND_AUTO has become a GPU or the CPU by then. Without any word: the CPU.
    """
    if arguments.get("model_instance_kind") != "GPU":
        return "cpu"
    return f"cuda:{arguments['model_instance_device_id']}"


def default_device() -> str:
    """For those whom no Triton tells: the first GPU, or the CPU where there is none."""
    return "cuda:0" if NVIDIA_DEVICE.exists() else "cpu"


def default_runtime(device: str) -> Runtime:
    """torch on a GPU, or where there is no OpenVINO."""
    return "torch" if device != "cpu" or importlib.util.find_spec("openvino") is None else "openvino"


def prepare_torch(device: str, threads: int) -> None:
    """Threads of the CPU; on a GPU, the same bytes for the same rows whenever they come, and float32 that is float32.

    Raises RuntimeError where torch does not see the GPU that Triton sees.
    """
    import torch

    torch.set_num_threads(threads)
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"Triton sees a GPU and torch {torch.__version__} does not: its CUDA is {torch.version.cuda or 'missing'}, "
            "which the driver may be too old for; install a torch for the driver's CUDA, or set the model's "
            "instance_group to KIND_CPU. sdserver doctor says more"
        )
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    # Sums of products in half precision would overflow sooner, and be less exact.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def load_unet(
    engine_folder: Path,
    threads: int,
    runtime: str = "",
    precision: str = "",
    *,
    device: str = "",
    row_buckets: Sequence[int] = (),
    compiled: bool = False,
) -> Predict:
    """The denoising network of an engine, called as `sdmodels.unet.UNet` is; `threads` of the CPU answer a call.

    `runtime` is one of RUNTIMES, `device` torch's name of one, `precision` fp32, bf16 or fp16: empty for the best there
    is. "bf16" on a CPU needs OpenVINO and one that computes in it. `row_buckets` and `compiled` are for GPUs, as
    `UNet` has them. Raises ValueError for what it does not know or cannot do.
    """
    device = device or default_device()
    runtime = runtime or default_runtime(device)
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; it must be one of {', '.join(RUNTIMES)}")
    if runtime == "openvino":
        if device != "cpu" or row_buckets or compiled:
            raise ValueError("OpenVINO serves CPUs, without row_buckets and compile: leave these out or take torch")
        from sdmodels.openvino_unet import OpenVinoUNet

        return OpenVinoUNet(engine_folder, threads, precision or "fp32")
    if device == "cpu" and precision not in ("", "fp32"):
        raise ValueError(f"precision is {precision!r}; with torch it must be fp32 on a CPU")
    prepare_torch(device, threads)

    from sdmodels.precision import capability, parse_precision, unet_precision
    from sdmodels.unet import UNet

    chosen = parse_precision(precision or unet_precision(capability(device)))
    unet = UNet(engine_folder, device, chosen, row_buckets, compiled=compiled)
    if compiled:
        unet.warm_up(engine_folder)
    return unet
