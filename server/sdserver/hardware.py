"""What a machine has for models: processors, memory, GPUs. Read from Linux's files and from nvidia-smi."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path("/")
# Units that decide how fast a model runs on a CPU, by their names in /proc/cpuinfo.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
# From Ampere on, as `sdmodels.precision` has it.
BF16_CAPABILITY = (8, 0)
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,name,compute_cap,memory.total,memory.free,driver_version",
    "--format=csv,noheader,nounits",
)
SMI_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Cpu:
    """`cores` and `threads` are those that this process may use, by a container's limit, too."""

    model: str
    cores: int
    threads: int
    flags: tuple[str, ...]

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bf16."""
        return any(flag in self.flags for flag in BF16_FLAGS)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU; memory in bytes, None where nvidia-smi does not say it."""

    index: int
    name: str
    capability: tuple[int, int] | None
    memory: int | None
    free: int | None
    driver: str

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16; otherwise UNets compute in fp16."""
        return self.capability is not None and self.capability >= BF16_CAPABILITY


@dataclass(frozen=True, slots=True)
class Torch:
    """A torch that is installed here, which the server does not import; `cuda` is None for one without GPUs."""

    version: str
    cuda: str | None


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine; memory in bytes, that of a container's limit where there is one."""

    cpu: Cpu
    memory: int
    available: int
    shared_memory: int
    shared_memory_free: int
    gpus: tuple[Gpu, ...]
    gpu_problem: str
    """Why there may be GPUs that cannot be used; mostly empty."""
    torch: Torch | None


def nvidia_smi() -> str | None:
    """What nvidia-smi prints, None where there is none. Raises OSError or subprocess.SubprocessError for a failure."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return None
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    if done.returncode:
        raise OSError(" ".join((done.stdout + done.stderr).split()) or f"nvidia-smi ended with {done.returncode}")
    return done.stdout


def read(
    root: Path = ROOT,
    ask_gpus: Callable[[], str | None] = nvidia_smi,
    disk_usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage,
    torch: Path | None = None,
) -> Hardware:
    """This machine, or one whose files lie below `root`. `torch` is the folder of a torch; None: the installed one."""
    memory, available = _memory(root)
    gpus: tuple[Gpu, ...] = ()
    problem = ""
    try:
        said = ask_gpus()
        gpus = parse_gpus(said or "")
        if said is None and (root / "dev/nvidiactl").exists():
            problem = "there is an NVIDIA device and no nvidia-smi: install the driver's tools"
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        problem = f"nvidia-smi fails: {error}"
    shared_total, _, shared_free = disk_usage(root / "dev/shm")
    return Hardware(
        _cpu(root), memory, available, shared_total, shared_free, gpus, problem, read_torch(torch or _installed_torch())
    )


def parse_gpus(said: str) -> tuple[Gpu, ...]:
    """The GPUs of nvidia-smi's lines. Raises ValueError for others."""
    gpus = []
    for line in said.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 6 or not fields[0].isdecimal():
            raise ValueError(f"it says {line!r}")
        index, name, capability, total, free, driver = fields
        numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
        gpus.append(
            Gpu(
                int(index),
                name,
                (int(numbers[1]), int(numbers[2])) if numbers else None,
                _mebibytes(total),
                _mebibytes(free),
                driver,
            )
        )
    return tuple(gpus)


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdecimal() else None


def read_torch(folder: Path | None) -> Torch | None:
    """The torch in a folder, from its version.py; None if there is none."""
    if folder is None or not (folder / "version.py").is_file():
        return None
    text = (folder / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
    return Torch(version[1] if version else "?", cuda[1] if cuda else None)


def _installed_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _cpu(root: Path) -> Cpu:
    # One paragraph for each thread; a virtual machine may not say which ones share a core.
    threads = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in paragraph.splitlines())}
        for paragraph in (root / "proc/cpuinfo").read_text(encoding="utf-8").strip().split("\n\n")
    ]
    cores = {(each.get("physical id"), each["core id"]) for each in threads if "core id" in each}
    has = set(threads[0].get("flags", "").split())
    limit = _cpu_limit(root) or len(threads)
    return Cpu(
        threads[0].get("model name", "unknown"),
        min(len(cores) or len(threads), limit),
        min(len(threads), limit),
        tuple(flag for flag in CPU_FLAGS if flag in has),
    )


def _cpu_limit(root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        # Rounded up; "max" is no number.
        return -(-int(quota) // int(period))
    return None


def _memory(root: Path) -> tuple[int, int]:
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    said = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    total, available = said["MemTotal:"], said["MemAvailable:"]
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that were read count as used, and are given up for the asking.
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available
