"""Whether the Triton of the wheel `nvidia-pytriton` runs on a machine, and if not, what is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

STUB = "triton_python_backend_stub"
SYSTEM_LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


@dataclass(frozen=True, slots=True)
class Host:
    """What decides whether the wheel's Triton runs on a machine."""

    system: str
    machine: str
    glibc: tuple[int, int] | None
    python: tuple[int, int]
    wheel: Path | None
    """The folder `pytriton/tritonserver` of the wheel `nvidia-pytriton`."""
    stub: Path | None
    """The process of the wheel's Python backend for this Python."""
    libpython: Path | None
    """The shared library that the stub links to."""
    numpy: str | None

    @classmethod
    def this(cls) -> Host:
        """The machine and the Python environment that run this code."""
        python = sys.version_info[:2]
        package = importlib.util.find_spec("pytriton")
        wheel = Path(package.origin).parent / "tritonserver" if package and package.origin else None
        stub = wheel / "python_backend_stubs" / "{}.{}".format(*python) / STUB if wheel else None
        return cls(
            platform.system(),
            platform.machine(),
            _glibc(),
            python,
            wheel,
            stub if stub and stub.exists() else None,
            _libpython(python, wheel),
            next((each.version for each in importlib.metadata.distributions(name="numpy")), None),
        )


def why_not(host: Host | None = None) -> str | None:
    """One sentence that says what keeps the wheel's Triton from running here; None: it runs."""
    host = Host.this() if host is None else host
    version = "{}.{}".format(*host.python)
    if (host.system, host.machine) != ("Linux", "x86_64"):
        return f"the Triton wheel runs on x86-64 Linux only, and this is {host.system} on {host.machine}"
    if host.glibc is None or host.glibc < (2, 35):
        found = "another C library" if host.glibc is None else "glibc {}.{}".format(*host.glibc)
        return f"Triton needs glibc 2.35 or newer, and this system has {found}: use Debian 12, Ubuntu 22.04 or newer"
    if host.wheel is None:
        return "the Triton wheel is not installed: pip install 'sd-service[triton]'"
    if host.stub is None:
        return f"the Triton wheel has no Python backend for Python {version}: use Python 3.11, 3.12 or 3.13"
    if host.libpython is None:
        return f"Triton's Python backend needs a shared libpython: apt-get install libpython{version}"
    if host.numpy is None or int(host.numpy.split(".")[0]) >= 2:
        found = "is missing" if host.numpy is None else f"{host.numpy} gives empty answers there"
        return f"Triton's Python backend needs numpy 1, and numpy {found}: pip install 'numpy<2'"
    return None


def _glibc() -> tuple[int, int] | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        if name == "glibc":
            major, minor = version.split(".")[:2]
            return int(major), int(minor)
    return None


def _libpython(python: tuple[int, int], wheel: Path | None) -> Path | None:
    # The wheel brings one for Python 3.13 alone. An interpreter that was moved names a folder of where it was built.
    major, minor = python
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", *SYSTEM_LIBRARIES]
    candidates = [Path(folder) / f"libpython{major}.{minor}.so.1.0" for folder in folders if folder]
    if wheel:
        candidates += (wheel.parents[1] / "nvidia_pytriton.libs").glob(f"libpython{major}-*.{minor}.so.1.0")
    return next((path for path in candidates if path.exists()), None)
