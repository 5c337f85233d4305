"""How many threads a model may well use on this machine, and what its cores compute in."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM = Path("/sys")
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def physical_cores(system: Path = SYSTEM) -> int:
    """Cores, not hyper-threads, that this process may run on; no more than a container's CPU limit. At least 1."""
    allowed = os.sched_getaffinity(0)
    siblings = (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in allowed)
    # A machine that does not tell its topology is taken for one without hyper-threads.
    cores = len({path.read_text() for path in siblings if path.exists()}) or len(allowed)
    return max(1, min(cores, _limit(system) or cores))


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the cores have instructions for bf16, which then takes about 0.6 of float32's time; others emulate it."""
    return cpuinfo.exists() and not BF16_FLAGS.isdisjoint(cpuinfo.read_text(errors="replace").split())


def _limit(system: Path) -> int | None:
    """CPUs that the control group grants, rounded up: cgroup v2's `quota period`, or v1's two files."""
    try:
        quota, period = (system / "fs/cgroup/cpu.max").read_text().split()
    except FileNotFoundError:
        try:
            quota, period = ((system / f"fs/cgroup/cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except FileNotFoundError:
            return None
    if quota == "max" or int(quota) < 0:
        return None
    return -(-int(quota) // int(period))
