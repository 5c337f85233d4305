"""What of a machine and its engines works, what does not, and what to do then. Says it of facts, and asks nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sdserver.engine_memory import EngineMemory
    from sdserver.hardware import Gpu, Hardware

State = Literal["ok", "note", "wrong"]

# Of the Python backend: 4 MiB for each model at the start, the same again when a batch needs more.
SHARED_BYTES_A_MODEL = 8 * 2**20
# The oldest driver that runs programs of a CUDA version (NVIDIA's CUDA compatibility guide); the wheel's Triton has 12.
CUDA_DRIVERS = {"11": 450, "12": 525, "13": 580}
TRITON_CUDA = "12"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` says what to do where its state is "wrong"."""

    name: str
    state: State
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """An engine of the repository. `kind` is that of its UNet's instances; `step_seconds` a UNet call of two rows."""

    id: str
    models: int
    kind: Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU"]
    on_cpu: EngineMemory
    on_gpu: EngineMemory
    is_served: bool
    step_seconds: float | None


def findings(
    hardware: Hardware, why_no_triton: str | None, triton_url: str, triton_answers: bool, engines: Sequence[EngineFacts]
) -> Iterator[Finding]:
    """All that there is to say, in the order of its causes."""
    yield _cpu(hardware)
    yield Finding("memory", "ok", f"{_gb(hardware.available)} of {_gb(hardware.memory)} are free")
    yield _shared_memory(hardware, engines)
    yield from _gpus(hardware)
    yield _triton(why_no_triton, triton_url, triton_answers)
    if not engines:
        advice = "sdserver engine add makes one; --model-repository says where"
        yield Finding("engines", "wrong", "the model repository has none", advice)
    for engine in engines:
        yield _engine(engine, hardware)
    yield from _together(engines, hardware)


def runs_on_gpu(engine: EngineFacts, hardware: Hardware) -> bool:
    """Where Triton puts an engine's models."""
    return engine.kind == "KIND_GPU" or (engine.kind == "KIND_AUTO" and bool(hardware.gpus))


def kind_of(configuration: str) -> Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU"]:
    """The instance group of a `config.pbtxt`; Triton takes one without for KIND_AUTO."""
    match re.search(r"\bKIND_(CPU|GPU)\b", re.sub(r"#.*", "", configuration)):
        case None:
            return "KIND_AUTO"
        case found:
            return "KIND_CPU" if found[1] == "CPU" else "KIND_GPU"


def _cpu(hardware: Hardware) -> Finding:
    cpu = hardware.cpu
    bf16 = "computes in bf16" if cpu.has_bf16 else "no bf16: the UNet computes in fp32"
    text = f"{cpu.model}, {cpu.cores} cores, {cpu.threads} threads; {' '.join(cpu.flags) or 'no AVX2'}; {bf16}"
    return Finding("cpu", "ok" if "avx2" in cpu.flags else "note", text)


def _shared_memory(hardware: Hardware, engines: Sequence[EngineFacts]) -> Finding:
    needs = SHARED_BYTES_A_MODEL * sum(engine.models for engine in engines if not engine.is_served)
    text = f"/dev/shm has {_gb(hardware.shared_memory_free)} of {_gb(hardware.shared_memory)} free"
    if hardware.shared_memory_free >= needs:
        return Finding("shared memory", "ok", text)
    advice = "docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    return Finding("shared memory", "wrong", f"{text}, and Triton's models want {_gb(needs)}", advice)


def _gpus(hardware: Hardware) -> Iterator[Finding]:
    if hardware.gpu_problem:
        advice = "install or restart NVIDIA's driver; in a container, NVIDIA's container toolkit and --gpus all"
        yield Finding("gpu", "wrong", hardware.gpu_problem, advice)
        return
    if not hardware.gpus:
        yield Finding("gpu", "ok", "no NVIDIA GPU: models run on the CPU")
        return
    for gpu in hardware.gpus:
        yield _gpu(gpu)
    driver = hardware.gpus[0].driver
    yield _driver("driver", driver, TRITON_CUDA, f"Triton's wheel has CUDA {TRITON_CUDA}")
    if hardware.torch is None:
        return
    if hardware.torch.cuda is None:
        advice = "install a torch with CUDA in the environment of Triton's models, from PyTorch's own instructions"
        yield Finding("torch", "wrong", f"torch {hardware.torch.version} has no CUDA and runs on the CPU alone", advice)
        return
    cuda = hardware.torch.cuda
    yield _driver("torch", driver, cuda.split(".")[0], f"torch {hardware.torch.version} has CUDA {cuda}")


def _gpu(gpu: Gpu) -> Finding:
    name = f"gpu {gpu.index}"
    if gpu.capability is None:
        return Finding(name, "note", f"{gpu.name}: nvidia-smi does not say its compute capability; a newer driver does")
    memory = (
        "memory unknown" if gpu.memory is None or gpu.free is None else f"{_gb(gpu.free)} of {_gb(gpu.memory)} free"
    )
    precision = "UNets in bf16" if gpu.has_bf16 else "no bf16: UNets in fp16"
    text = "{}, compute capability {}.{}, {}; {}, autoencoders in fp16"
    return Finding(name, "ok", text.format(gpu.name, *gpu.capability, memory, precision))


def _driver(name: str, driver: str, cuda: str, text: str) -> Finding:
    least = CUDA_DRIVERS.get(cuda)
    major = int(driver.split(".")[0]) if driver.split(".")[0].isdecimal() else None
    if least is None or major is None:
        return Finding(name, "note", f"{text}; whether driver {driver} is new enough is not known here")
    if major >= least:
        return Finding(name, "ok", f"{text}, for which driver {driver} is new enough")
    advice = f"install driver {least} or newer, or an older CUDA's build"
    return Finding(name, "wrong", f"{text}, which needs driver {least} or newer, and this one is {driver}", advice)


def _triton(why_no_triton: str | None, url: str, answers: bool) -> Finding:
    if answers:
        return Finding("triton", "ok", f"answers at {url}")
    if why_no_triton is None:
        return Finding("triton", "ok", f"its wheel runs here: sdserver up; none answers at {url}")
    advice = "mend that, or start Triton elsewhere and say --triton-url; NVIDIA's own with --triton-executable"
    return Finding("triton", "wrong", f"none answers at {url}, and {why_no_triton}", advice)


def _engine(engine: EngineFacts, hardware: Hardware) -> Finding:
    name = f"engine {engine.id}"
    on_gpu = runs_on_gpu(engine, hardware)
    if engine.is_served:
        step = "" if engine.step_seconds is None else f"; a step of two rows takes {engine.step_seconds * 1000:.1f} ms"
        return Finding(name, "ok", f"is served{step}")
    if on_gpu and not hardware.gpus:
        advice = "the same sdserver engine add with --device auto or cpu, or a machine with a GPU"
        return Finding(name, "wrong", "its models are for GPUs (KIND_GPU), and there is none", advice)
    need = engine.on_gpu if on_gpu else engine.on_cpu
    free, where = _free(hardware, on_gpu=on_gpu)
    text = (
        f"needs about {_gb(need.total)} on {where}: weights {_gb(need.weights)}, an image of its native size "
        f"{_gb(need.activations)}, processes {_gb(need.processes)}"
    )
    if free is None or need.total <= free:
        return Finding(name, "ok", text)
    advice = "free some, take a larger machine, leave optional roles out of its engine.json"
    advice += ", or --device cpu" if on_gpu else ", or use a GPU"
    return Finding(name, "wrong", f"{text}; {_gb(free)} are free", advice)


def _together(engines: Sequence[EngineFacts], hardware: Hardware) -> Iterator[Finding]:
    """All engines of a repository are loaded at once."""
    for on_gpu in (False, True):
        waiting = [each for each in engines if not each.is_served and runs_on_gpu(each, hardware) == on_gpu]
        need = sum((each.on_gpu if on_gpu else each.on_cpu).total for each in waiting)
        free, where = _free(hardware, on_gpu=on_gpu)
        if len(waiting) > 1 and free is not None and need > free:
            text = f"together need about {_gb(need)} on {where}, of which {_gb(free)} are free"
            yield Finding("engines", "wrong", text, "sdserver engine remove those that nobody asks for")


def _free(hardware: Hardware, *, on_gpu: bool) -> tuple[int | None, str]:
    if not on_gpu:
        return hardware.available, "the CPU"
    # Each GPU gets all models: the fullest decides.
    known = [gpu.free for gpu in hardware.gpus if gpu.free is not None]
    return min(known, default=None), "the GPU" if len(hardware.gpus) == 1 else "each GPU"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
