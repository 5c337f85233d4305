"""Tensors of checkpoint files, by name, that are read one at a time when they are wanted."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from sdmodels.conversion.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Tensors = Mapping[str, "LazyTensor"]

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Names of tensors in the order of the reports: as many as help, and no screen full.
MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor on disk: what it is called there, its shape and type, and how to read it.

    It can be indexed like a tensor; nothing is read before `read` is called, nor kept afterwards.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> LazyTensor:
        shape = torch.empty(self.shape, device="meta")[index].shape
        return LazyTensor(self.name, tuple(shape), self.dtype, lambda: self.read()[index])


def concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The parts one after the other along the first axis; they agree in all others and in their type."""
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(
        parts[0].name,
        (rows, *parts[0].shape[1:]),
        parts[0].dtype,
        lambda: torch.cat([part.read() for part in parts]),
    )


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, or of all shards that an index file names.

    safetensors hold nothing but tensors. Of other files only those are read that are plain tensors for torch's
    weights-only loading, which runs no code of theirs. Raises ConversionError.
    """
    if path.name.endswith(".json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLES:
        return _read_pickle(path)
    raise ConversionError(f"{path} is no checkpoint: it must end in .safetensors, {', '.join(PICKLES)}")


def shards(index: Path) -> list[Path]:
    """The files that an index names, all beside it. Raises ConversionError."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ConversionError(f"{index} is not an index of shards: download it again") from error
    # An index comes from outside, too: it must not lead out of its folder.
    if outside := [name for name in names if PurePosixPath(name).name != name or "\\" in name]:
        raise ConversionError(f"{index} names files outside of its folder", outside)
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ConversionError(f"{index} names shards that are missing: download them", missing)
    return [index.parent / name for name in names]


def shape_problems(part: str, found: Tensors, expected: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps tensors from being those of a module, tensor by tensor; nothing if all names and shapes agree."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{part}: {name} is {list(found[name].shape)} and must be {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    return [
        *_shortened([f"{part}: {name} {list(expected[name])} is missing" for name in missing]),
        *_shortened([f"{part}: {name} {list(found[name].shape)} is unexpected" for name in unexpected]),
        *_shortened(misshapen),
    ]


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what a module is loaded from, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - MOST_NAMES
    return [*lines[:MOST_NAMES], f"... and {rest} more like it"] if rest > 0 else lines


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path in shards(index):
        found = read_tensors(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ConversionError(f"{index} has the same tensors in two shards", _shortened(twice))
        tensors |= found
    return tensors


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    def read(name: str) -> torch.Tensor:
        # Opened for each tensor, so that the pages of those before are not held by the mapping.
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: LazyTensor(
                    name,
                    tuple(file.get_slice(name).get_shape()),
                    _DTYPES[file.get_slice(name).get_dtype()],
                    partial(read, name),
                )
                for name in file.keys()  # noqa: SIM118 (no mapping)
            }
    except KeyError as error:
        raise ConversionError(f"{path} holds numbers of type {error}, which no engine is made from") from error
    except SafetensorError as error:
        raise ConversionError(f"{path} is damaged or no safetensors file ({error}): download it again") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}


def _read_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        content = _load_weights_only(path)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is a pickle that holds more than plain tensors, and loading it could run any code: it is refused. "
            "Use the .safetensors file of the same checkpoint"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ConversionError(f"{path} is damaged or no checkpoint: download it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ConversionError(f"{path} holds no tensors by name")
    if others := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f"{path} holds more than tensors: it is refused", _shortened(sorted(others)))
    # A tensor that is mapped from the file takes no memory before it is used; detaching gives the tensor itself.
    return {
        str(name): LazyTensor(str(name), tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in state.items()
    }


def _load_weights_only(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # Files of torch before 1.6 are no zip archives, and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
