"""Generates the Python stubs of the contract into a folder; the repository's is `proto`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTO = Path(__file__).parents[1] / "proto"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(folder: Path) -> None:
    """Writes messages with `.pyi` for every file, and the typed gRPC stubs for the one that has a service."""
    # protoc finds the plugin protoc-gen-mypy_grpc on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    _run(f"--python_out={folder}", f"--pyi_out={folder}", *files)
    _run(f"--grpc_python_out={folder}", f"--mypy_grpc_out=quiet:{folder}", "sdapi/v1/generation.proto")


def _run(*arguments: str) -> None:
    if protoc.main(["protoc", f"-I{PROTO}", f"-I{WELL_KNOWN}", *arguments]) != 0:
        raise SystemExit("protoc failed; its message above says why")


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve())
