"""Which library runs a model on this machine: torch on a GPU, OpenVINO on a CPU where it is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from sdmodels.unet_lora import UNetLora

    Floats = NDArray[np.float32]
    Predict = Callable[[Floats, Floats, Floats], Floats]

    class PredictCached(Protocol):
        """`sdmodels.unet_cache.UNetCache`, or what is called like it."""

        def __call__(
            self, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats | None = None
        ) -> Floats: ...


Runtime = Literal["openvino", "torch"]
RUNTIMES: tuple[Runtime, ...] = ("openvino", "torch")

# There with NVIDIA's driver, and in a container that has been given a GPU. To ask torch would take seconds.
NVIDIA_DEVICE = Path("/dev/nvidiactl")

TORCH_ALONE = "row_buckets and compile are torch's: leave them out, or set runtime to torch"


def instance_device(arguments: Mapping[str, str]) -> str:
    """torch's name of the device that Triton gave an instance of a model, by the arguments of its `initialize`.

    KIND_AUTO has become a GPU or the CPU by then. Without any word: the CPU.
    """
    if arguments.get("model_instance_kind") != "GPU":
        return "cpu"
    return f"cuda:{arguments['model_instance_device_id']}"


def default_device() -> str:
    """For those whom no Triton tells: the first GPU, or the CPU where there is none, or none is to be seen."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda:0" if NVIDIA_DEVICE.exists() and not hidden else "cpu"


def default_runtime(device: str) -> Runtime:
    """torch on a GPU, or where there is no OpenVINO."""
    return "torch" if device != "cpu" or importlib.util.find_spec("openvino") is None else "openvino"


def prepare_torch(device: str, threads: int) -> None:
    """Threads of the CPU; on a GPU, the same bytes for the same rows whenever they come, and float32 that is float32.

    Raises RuntimeError where torch cannot use the GPU that there is.
    """
    import torch

    torch.set_num_threads(threads)
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"there is a GPU that torch {torch.__version__} cannot use: its CUDA is {torch.version.cuda or 'missing'}, "
            "which the driver may be too old for; install a torch for the driver's CUDA, or hide the GPU "
            "(CUDA_VISIBLE_DEVICES=), or set the model's instance_group to KIND_CPU. sdserver doctor says more"
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
    is. "bf16" on a CPU needs OpenVINO and a CPU that computes in it, where it is the best. `row_buckets` and `compiled`
    are for GPUs, as `UNet` has them. Raises ValueError for what it does not know or cannot do.
    """
    device = device or default_device()
    if _chosen(runtime, device) == "openvino":
        if row_buckets or compiled:
            raise ValueError(TORCH_ALONE)
        from sdmodels.openvino_unet import OpenVinoUNet

        return OpenVinoUNet(engine_folder, threads, precision)
    prepare_torch(device, threads)

    from sdmodels.precision import chosen, unet_precision
    from sdmodels.unet import UNet

    unet = UNet(engine_folder, device, chosen(precision, device, unet_precision), row_buckets, compiled=compiled)
    if compiled:
        unet.warm_up(engine_folder)
    return unet


def load_unet_cache(
    engine_folder: Path,
    threads: int,
    runtime: str = "",
    precision: str = "",
    *,
    device: str = "",
    row_buckets: Sequence[int] = (),
) -> PredictCached:
    """The network in two parts, called as `sdmodels.unet_cache.UNetCache` is; otherwise as `load_unet`."""
    device = device or default_device()
    if _chosen(runtime, device) == "openvino":
        if row_buckets:
            raise ValueError(TORCH_ALONE)
        from sdmodels.openvino_unet import OpenVinoUNetCache

        return OpenVinoUNetCache(engine_folder, threads, precision)
    prepare_torch(device, threads)

    from sdmodels.precision import chosen, unet_precision
    from sdmodels.unet_cache import UNetCache

    return UNetCache(engine_folder, device, chosen(precision, device, unet_precision), row_buckets)


def load_unet_lora(
    engine_folder: Path,
    threads: int,
    precision: str = "",
    *,
    device: str = "",
    row_buckets: Sequence[int] = (),
    cache_bytes: int | None = None,
) -> UNetLora:
    """The network with LoRAs, always by torch; `cache_bytes` as `UNetLora` has them, otherwise as `load_unet`."""
    device = device or default_device()
    prepare_torch(device, threads)

    from sdmodels.loras import CACHE_BYTES
    from sdmodels.precision import chosen, unet_precision
    from sdmodels.unet_lora import UNetLora

    return UNetLora(
        engine_folder,
        device,
        chosen(precision, device, unet_precision),
        row_buckets,
        CACHE_BYTES if cache_bytes is None else cache_bytes,
    )


def _chosen(runtime: str, device: str) -> str:
    runtime = runtime or default_runtime(device)
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; it must be one of {', '.join(RUNTIMES)}")
    if runtime == "openvino" and device != "cpu":
        raise ValueError("OpenVINO serves CPUs here: set the model's instance_group to KIND_CPU, or runtime to torch")
    return runtime
