"""LoRA files of kohya's scripts, diffusers and PEFT to the one form that an engine's models read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.lora_names import PEFT_PREFIX, modules_of, names_of, other_method, parsed
from sdmodels.conversion.tensors import MOST_NAMES, LazyTensor, read_tensors
from sdmodels.conversion.writing import sha256, write_safetensors
from sdmodels.loras import FOLDER, TEXT_ENCODER, UNET
from sdmodels.weights import read_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sdmodels.conversion.lora_names import Kind, Shape

# Bounds for texts that come from a file's header.
MOST_CHARACTERS = 1000
MOST_TRIGGERS = 8
STORED = (torch.float16, torch.bfloat16, torch.float32)
# Beside a file of PEFT's own, which says no alpha.
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Which file becomes a LoRA of which engine."""

    lora: str
    """The file."""
    engine: str
    """The engine's folder."""


@dataclass(slots=True)
class _Change:
    """A module's tensors as they were found."""

    called: str
    """As the file calls the module."""
    tensors: dict[Kind, LazyTensor] = field(default_factory=dict)


def add_lora(options: LoraOptions) -> dict[str, Any]:
    """Writes `<engine>/loras/<SHA-256>.safetensors`; returns facts for its description. Raises ConversionError."""
    path, folder = Path(options.lora), Path(options.engine)
    if path.suffix != ".safetensors":
        raise ConversionError(
            f"{path} is no .safetensors file: others can run code when they are loaded, and are refused. Take the LoRA "
            "in that format"
        )
    if not path.is_file():
        raise ConversionError(f"{path} does not exist")
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        header: dict[str, str] = file.metadata() or {}
    unet_config = read_config(folder / "unet/config.json")
    clip_config = read_config(folder / "clip/open_clip_config.json")
    engine = read_config(folder / "engine.json")
    blocks = clip_config["model_cfg"]["text_cfg"]["layers"]
    blocks -= engine["text_encoder"].get("layer", "penultimate") == "penultimate"
    modules = modules_of(unet_config, clip_config, blocks)
    changes, problems = _changes(tensors, names_of(modules, unet_config))
    kept: dict[str, LazyTensor] = {}
    alphas = _Alphas(path, header, tensors)
    for ours, change in sorted(changes.items()):
        found, wrong = _fitted(ours, change, modules[ours], alphas)
        kept |= found
        problems += wrong
    if problems:
        raise ConversionError(_refusal(path, header), _shortened(problems))
    if not kept:
        raise ConversionError(f"{path} holds no tensors")
    written = folder / FOLDER / f"{path.stem}.unfinished"
    digest = write_safetensors(written, kept, None)
    written.replace(written.with_name(f"{digest}.safetensors"))
    return {
        "sha256": digest,
        "source": {"file": path.name, "sha256": sha256(path)},
        "unet_modules": sum(name.startswith(UNET) for name in changes),
        "text_encoder_modules": sum(name.startswith(TEXT_ENCODER) for name in changes),
        "rank": max(tensor.shape[0] for name, tensor in kept.items() if name.endswith(".down")),
        **said_by_header(header),
    }


def said_by_header(header: Mapping[str, str]) -> dict[str, Any]:
    """Title, description, trigger words and licence, as training tools write them into a file's header."""
    return {
        "title": _text(header.get("modelspec.title") or header.get("ss_output_name") or ""),
        "description": _text(header.get("modelspec.description") or ""),
        "trigger_words": _trigger_words(header),
        "license": _text(header.get("modelspec.license") or ""),
    }


def _trigger_words(header: Mapping[str, str]) -> list[str]:
    """The trigger phrase; without one, the tags that every caption of a training set has."""
    if phrase := _text(header.get("modelspec.trigger_phrase") or ""):
        words = [word.strip() for word in phrase.split(",")]
    else:
        try:
            sets = json.loads(header.get("ss_tag_frequency") or "{}").values()
            words = [tag for tags in sets for tag, count in tags.items() if count == max(tags.values())]
        except (ValueError, AttributeError, TypeError):
            return []
    return list(dict.fromkeys(filter(None, map(_text, words))))[:MOST_TRIGGERS]


def _text(text: str) -> str:
    """A header's text on one line, without what no terminal should get."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:MOST_CHARACTERS]).strip()


def _changes(tensors: Mapping[str, LazyTensor], names: Mapping[str, str]) -> tuple[dict[str, _Change], list[str]]:
    """The tensors by the modules that they change, and what is wrong with their names."""
    changes: dict[str, _Change] = {}
    unknown, methods = [], set()
    for key, tensor in tensors.items():
        found = parsed(key.removeprefix(PEFT_PREFIX))
        ours = None if found is None else names.get(found[0])
        if method := other_method(key):
            methods.add(method)
        elif found is None or ours is None:
            unknown.append(f"{key} {list(tensor.shape)} belongs to no module of the engine")
        else:
            called, kind = found
            change = changes.setdefault(ours, _Change(called))
            if kind in change.tensors:
                unknown.append(f"{key} and {change.tensors[kind].name} are for the same module")
            change.tensors[kind] = tensor
    other = [
        f"it is {method}: only LoRA, of linear layers and of convolutions, is served" for method in sorted(methods)
    ]
    return changes, [*other, *sorted(unknown)]


def _fitted(ours: str, change: _Change, shape: Shape, alphas: _Alphas) -> tuple[dict[str, LazyTensor], list[str]]:
    """A change's tensors in the shapes that its module takes, and what is wrong with them."""
    if missing := [f"{change.called}: its {kind} is missing" for kind in ("down", "up") if kind not in change.tensors]:
        return {}, missing
    down, up = change.tensors["down"], change.tensors["up"]
    out, *rest = shape
    rank = down.shape[0] if down.shape else 0
    expected = {"down": (down, (rank, *rest)), "up": (up, (out, rank, *([1] * len(rest[1:]))))}
    # A 1 x 1 convolution is a linear layer; files have either form.
    problems = [
        f"{change.called}: {kind} is {list(tensor.shape)} and must be {list(wanted)}"
        for kind, (tensor, wanted) in expected.items()
        if _flat(tensor.shape) != _flat(wanted)
    ]
    if rank == 0 or problems:
        return {}, problems or [f"{change.called}: has rank 0"]
    alpha = change.tensors.get("alpha")
    if alpha is not None and math.prod(alpha.shape) != 1:
        return {}, [f"{change.called}: alpha is {list(alpha.shape)} and must be one number"]
    scale = alphas.scale(ours, change.called, rank) if alpha is None else float(alpha.read()) / rank
    if not math.isfinite(scale):
        return {}, [f"{change.called}: alpha is {scale * rank}"]
    kept = {f"{ours}.{kind}": _reshaped(tensor, wanted) for kind, (tensor, wanted) in expected.items()}
    name = f"{ours}.scale"
    return {**kept, name: LazyTensor(name, (1,), torch.float32, lambda: torch.tensor([scale]))}, []


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the sides of a 1 x 1 kernel."""
    return tuple(shape[:2]) if tuple(shape[2:]) in ((), (1, 1)) else tuple(shape)


def _reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    dtype = tensor.dtype if tensor.dtype in STORED else torch.float32

    def read() -> torch.Tensor:
        values = tensor.read().to(dtype)
        if not values.isfinite().all():
            raise ConversionError(f"{tensor.name} has values that are no numbers: the file is damaged")
        return values.reshape(shape)

    return LazyTensor(tensor.name, shape, dtype, read)


class _Alphas:
    """Scales of files that have no alpha for each module: PEFT's, which say it once, and diffusers' old ones."""

    def __init__(self, path: Path, header: Mapping[str, str], tensors: Iterable[str]) -> None:
        self._said: dict[str, Any] = {}
        if any(name.startswith(PEFT_PREFIX) for name in tensors):
            config = path.with_name(ADAPTER_CONFIG)
            if not config.is_file():
                raise ConversionError(
                    f"{path} is an adapter of PEFT: put its {ADAPTER_CONFIG}, which says alpha, beside it"
                )
            said = read_config(config)
            self._said = {f"{part}{name}": value for name, value in said.items() for part in (UNET, TEXT_ENCODER)}
        elif "lora_adapter_metadata" in header:
            try:
                self._said = dict(json.loads(header["lora_adapter_metadata"]))
            except (ValueError, TypeError) as error:
                raise ConversionError(f"{path}: its header's lora_adapter_metadata cannot be read ({error})") from error

    def scale(self, ours: str, called: str, rank: int) -> float:
        """alpha / rank of a module; 1 where nothing is said."""
        part = UNET if ours.startswith(UNET) else TEXT_ENCODER
        alpha = self._said.get(f"{part}lora_alpha")
        # As PEFT has it: a key is a name, or ends one.
        for pattern, value in (self._said.get(f"{part}alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", called):
                alpha = value
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self._said.get(f"{part}use_rslora") else rank)


def _refusal(path: Path, header: Mapping[str, str]) -> str:
    said = _text(header.get("modelspec.architecture") or header.get("ss_base_model_version") or "")
    made_for = f", and says that it was made for {said}" if said else ""
    return f"{path.name} is no LoRA for this engine{made_for}"


def _shortened(problems: list[str]) -> list[str]:
    rest = len(problems) - MOST_NAMES
    return [*problems[:MOST_NAMES], f"... and {rest} more like it"] if rest > 0 else problems
