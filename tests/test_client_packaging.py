"""What `import sdclient` offers and what it costs."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import sdclient

HEAVY = {"torch", "numpy", "PIL", "rich", "grpc", "google.protobuf", "asyncio", "sdapi"}


def test_every_public_name_is_exported_in_order() -> None:
    public = [
        name
        for name, value in vars(sdclient).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    ]
    assert sdclient.__all__ == sorted(public)


def test_every_public_class_says_what_it_is() -> None:
    for name in sdclient.__all__:
        if isinstance(getattr(sdclient, name), type):
            assert getattr(sdclient, name).__doc__, name


@pytest.mark.parametrize("statement", ["import sdclient", "from sdclient import AsyncClient, Client, Prompt"])
def test_importing_the_sdk_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sdclient" in modules
    assert HEAVY & set(modules) == set()


def test_the_first_client_loads_grpc_and_nothing_else_that_is_heavy() -> None:
    code = "import sys, sdclient; sdclient.Client(); print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "grpc" in modules
    assert {"torch", "numpy", "PIL", "rich"} & set(modules) == set()
