"""Files that are there whole or not at all, and safetensors written tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import torch

from sdmodels.conversion.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from sdmodels.conversion.tensors import LazyTensor, Tensors

    Progress = Callable[[int], None]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
HASH_BYTES = 4 * 2**20


def sha256(path: Path, progress: Progress = lambda _: None) -> str:
    """The SHA-256 of a file, in hex; `progress` gets how many bytes were read since it was called last."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Writes a file beside its place, brings it to the disk, then puts it there; returns its SHA-256.

    Whatever ends the process, `path` is absent, the former file, or whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    digest = hashlib.sha256()
    try:
        with unfinished.open("wb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)
    return digest.hexdigest()


def size_of(tensors: Tensors, dtype: torch.dtype) -> int:
    """How many bytes of data `write_safetensors` writes for them."""
    return sum(_bytes(tensor, dtype) for tensor in tensors.values())


def write_safetensors(
    path: Path, tensors: Tensors, dtype: torch.dtype | None, progress: Progress = lambda _: None
) -> str:
    """Writes tensors as `dtype`, whole numbers and, without one, all as they are; returns the SHA-256.

    One of them is in memory at a time.

    `progress` gets the number of bytes of each tensor. Raises ConversionError for a value that `dtype` cannot hold.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + _bytes(tensor, dtype)
        header[name] = {
            "dtype": NAMES[_target(tensor, dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name, tensor in sorted(tensors.items()):
            yield _data(name, tensor, _target(tensor, dtype))
            progress(_bytes(tensor, dtype))

    return write_file(path, blocks())


def _target(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return tensor.dtype
    return dtype if tensor.dtype.is_floating_point else torch.int64


def _bytes(tensor: LazyTensor, dtype: torch.dtype | None) -> int:
    numbers = 1
    for length in tensor.shape:
        numbers *= length
    return numbers * _target(tensor, dtype).itemsize


def _data(name: str, tensor: LazyTensor, dtype: torch.dtype) -> memoryview:
    values = tensor.read().to(dtype)
    if dtype.is_floating_point and not values.isfinite().all():
        raise ConversionError(
            f"{name} has values that {NAMES[dtype]} cannot hold, or that are no numbers: use --dtype bf16 or fp32"
        )
    return memoryview(values.reshape(-1).contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
