"""Engines put into a model repository and taken out of it, so that each is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdserver.engine_families import defaults_of, is_distilled, license_of, limits_of
from sdserver.engines import DESCRIPTOR, Engine, EngineError, load_engine
from sdserver.triton_models import model_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sdserver.triton_models import Placement

MAX_BATCH_ROWS = 16
# Those of sdmodels.conversion, which has no further use for them once the descriptor is written.
WORKING_FILES = (".unfinished.json", ".lock")
# For the descriptions of engines, by what their UNets take.
PURPOSES = {
    "none": "",
    "inpainting": " for inpainting",
    "depth": " that follows a depth map",
    "upscaling": " that enlarges images",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What `add` has done."""

    engine: Engine
    written: tuple[str, ...]
    """Files that were written or written anew, below the model repository."""
    ignored: tuple[str, ...]
    """Parts of the checkpoint that an engine has no use for."""


class EngineStore:
    """The engines of one model repository."""

    def __init__(self, model_repository: Path) -> None:
        self._repository = model_repository
        self._folder = model_repository / "engines"

    def folder(self, engine_id: str) -> Path:
        """Where an engine lies, or would lie."""
        return self._folder / engine_id

    def find(self, engine_id: str) -> Engine | None:
        """The engine of that id, or None. Raises EngineError for a descriptor that is wrong."""
        return load_engine(self.folder(engine_id)) if (self.folder(engine_id) / DESCRIPTOR).is_file() else None

    def engines(self) -> list[Engine]:
        """All engines, by id. Raises EngineError for a descriptor that is wrong."""
        return [load_engine(path.parent) for path in sorted(self._folder.glob(f"*/{DESCRIPTOR}"))]

    def unfinished(self) -> list[str]:
        """The ids of engines that `add` has begun and not finished."""
        journals = self._folder.glob(f"*/{WORKING_FILES[0]}")
        return sorted(path.parent.name for path in journals if not (path.parent / DESCRIPTOR).exists())

    def complete(
        self,
        engine_id: str,
        title: str,
        license_name: str,
        facts: Mapping[str, Any],
        placement: Placement | None = None,
        *,
        block_cache: bool = False,
        decode_tile: int | None = None,
    ) -> Report:
        """Makes an engine of the files that `sdmodels.conversion` has written below its folder.

        With `block_cache`, or if it has been there with it, it takes block caching, for which its UNet is loaded a
        second time. `decode_tile` is the side of the squares, in pixels, in which larger images are decoded; 0: none;
        None: the native size. Its Triton models come first and its descriptor last: only then there is an engine.
        Raises EngineError.
        """
        descriptor = _descriptor(engine_id, title, license_name, facts)
        if decode_tile is not None:
            descriptor["decode_tile"] = {"size": decode_tile, "overlap": decode_tile // 4} if decode_tile else None
        before = self.find(engine_id)
        if before and before.preview_map:
            # Perhaps fitted to the engine's own images, and still right for the same weights.
            descriptor["preview_map"] = before.model_dump(mode="json")["preview_map"]
        elif found := facts.get("preview_map"):
            descriptor["preview_map"] = {"matrix": found["matrix"], "bias": found["bias"]}
        if block_cache or (before and before.block_cache):
            descriptor["block_cache"] = {"channels": facts["unet_channels"][1]}
            descriptor["optional_roles"].append("unet_cache")
        engine = Engine.model_validate(descriptor | {"loras": before.loras if before else ()})
        tower = facts["image_tower"]
        texts = model_files(engine, tower["features"] if tower else None, placement)
        texts[f"engines/{engine_id}/{DESCRIPTOR}"] = json.dumps(descriptor, indent=2) + "\n"
        written = [name for name, text in texts.items() if self._write(name, text)]
        for name in WORKING_FILES:
            (self.folder(engine_id) / name).unlink(missing_ok=True)
        return Report(load_engine(self.folder(engine_id)), tuple(written), tuple(facts["ignored"]))

    def remove(self, engine_id: str) -> None:
        """Deletes an engine, or what `add` has left of one: the descriptor first, so that no half of it is an engine.

        Raises EngineError if there is neither.
        """
        folder = self.folder(engine_id)
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", engine_id) or not folder.is_dir():
            raise EngineError(f"there is no engine {engine_id!r} in {self._folder}")
        (folder / DESCRIPTOR).unlink(missing_ok=True)
        for path in self._repository.glob(f"{engine_id}.*/config.pbtxt"):
            shutil.rmtree(path.parent)
        shutil.rmtree(folder)

    def problems(self, engine: Engine, on_bytes: Callable[[int], None] = lambda _: None) -> list[str]:
        """What differs between an engine's files and its descriptor; `on_bytes` gets how much was read each time."""
        folder = self.folder(engine.id)
        found = []
        for name, digest in engine.files.items():
            if not (folder / name).is_file():
                found.append(f"{name} is missing")
            elif _sha256(folder / name, on_bytes) != digest:
                found.append(f"{name} is not what it was when the engine was made")
        for model in engine.models:
            found += [
                f"{model}/{name} is missing"
                for name in ("config.pbtxt", "1/model.py")
                if not (self._repository / model / name).is_file()
            ]
        return found

    def size(self, engine: Engine) -> int:
        """Bytes of the engine's files that are there."""
        paths = (self.folder(engine.id) / name for name in engine.files)
        return sum(path.stat().st_size for path in paths if path.is_file())

    def _write(self, name: str, text: str) -> bool:
        return write_text(self._repository / name, text)


def write_text(path: Path, text: str) -> bool:
    """Makes a file hold a text, at once; returns whether it has not before."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return True


def engine_id_of(source: str) -> str:
    """An id from the name of a file, folder or repository: `v2-1-768-ema` of `v2-1_768-ema.safetensors`."""
    name = re.sub(r"\.(safetensors|ckpt|bin|pt|pth)$", "", source.rstrip("/").rsplit("/", 1)[-1].lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:64].rstrip("-")


def _descriptor(engine_id: str, title: str, license_name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    size, source, tower = facts["native_size"], facts["source"], facts["image_tower"]
    distilled = is_distilled(engine_id, source["name"])
    purpose = PURPOSES[facts["conditioning"]]
    license_ = license_of(license_name or facts["license"], facts["family"], distilled)
    # Original files do not say it. A single step has to begin at the noisy end, and only this spacing does.
    spacing = {"timestep_spacing": "trailing"} if distilled else {}
    descriptor = {
        "id": engine_id,
        "name": title or engine_id,
        "description": f"Stable Diffusion {facts['family']}.x{purpose} at {size} x {size} pixels, from "
        f"{source['name']}.",
        "prediction_type": facts["prediction_type"],
        "noise_schedule": facts["noise_schedule"] | spacing,
        "latents": facts["latents"],
        "text_encoder": facts["text_encoder"],
        "native_width": size,
        "native_height": size,
        "limits": limits_of(size, facts["size_multiple"]),
        "defaults": defaults_of(size, distilled),
        "max_batch_rows": MAX_BATCH_ROWS,
        # UNets repeat themselves in images that are much larger than those of their training; decoders need memory.
        "windows": {"size": size, "overlap": size // 2},
        "decode_tile": {"size": size, "overlap": size // 4},
        "optional_roles": [
            # An upscaler is shown its image as it is.
            *([] if facts["upscaling"] else ["vae_encoder"]),
            *(["depth_estimator"] if facts["estimates_depth"] else []),
            *(["clip_guidance"] if tower else []),
        ],
        "weights": dict(sorted(facts["files"].items())),
        "license": license_.model_dump(),
        "source": source,
    }
    if facts["conditioning"] != "none":
        # Left out of all others, so that what was made before has the same descriptor, and digest, as ever.
        descriptor["conditioning"] = facts["conditioning"]
    if facts["upscaling"]:
        descriptor["upscaling"] = facts["upscaling"]
        # Images of the native size are what it enlarges, rather than what it makes.
        descriptor["limits"]["max_pixels"] = descriptor["limits"]["max_size"] ** 2
    if tower:
        image_size = tower["image_size"]
        descriptor["clip_guidance"] = {
            "presets": [
                {"name": "standard", "scale": 0.6, "cutouts": 0, "start": 0.0, "end": 1.0, "steps_per_gradient": 2}
            ],
            "cutout_size": image_size if isinstance(image_size, int) else max(image_size),
            "max_batch_rows": 1,
        }
    return descriptor


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
