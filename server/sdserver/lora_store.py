"""LoRAs put beside an engine and taken away again, while servers and models use what lies there."""

from __future__ import annotations

import os
import re
import shutil
import time
from typing import TYPE_CHECKING, Any

from sdserver.engine_families import LICENSES
from sdserver.engine_store import write_text
from sdserver.engines import DESCRIPTOR, LORA_ROLE, LORAS, EngineError, License, LoraInfo, load_engine, load_lora
from sdserver.triton_models import lora_model_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Tensors outlive their description by so much: servers do not see at once that it is gone, and generations that have
# begun go on to their end.
GRACE_SECONDS = 3600.0


class LoraStore:
    """The LoRAs of one engine of a model repository."""

    def __init__(self, model_repository: Path, engine_id: str) -> None:
        """Raises EngineError if there is no such engine."""
        self._repository = model_repository
        self.engine_folder = model_repository / "engines" / engine_id
        self._folder = self.engine_folder / LORAS
        if not (self.engine_folder / DESCRIPTOR).is_file():
            raise EngineError(f"there is no engine {engine_id!r}; sdserver engine list shows them")

    def loras(self) -> tuple[LoraInfo, ...]:
        """All of them, by name."""
        return load_engine(self.engine_folder).loras

    def find(self, name: str) -> LoraInfo | None:
        """The LoRA of that name, or None."""
        return load_lora(path) if (path := self._description(name)).is_file() else None

    def complete(self, name: str, facts: Mapping[str, Any], license_name: str = "") -> LoraInfo:
        """Makes a LoRA of the tensors that `sdmodels.conversion` has written: its description, and with the first one
        its Triton model, come last."""
        license_name = license_name or facts["license"]
        license_ = LICENSES.get(license_name.lower(), License(name=license_name)) if license_name else None
        lora = LoraInfo.model_validate({**facts, "name": name, "license": license_})
        engine = load_engine(self.engine_folder)
        unet = self._repository / engine.model("unet") / "config.pbtxt"
        engine = engine.model_copy(update={"loras": (*engine.loras, lora)})
        for path, text in lora_model_files(engine, unet.read_text(encoding="utf-8")).items():
            write_text(self._repository / path, text)
        write_text(self._description(name), lora.model_dump_json(indent=2) + "\n")
        self._sweep()
        return lora

    def remove(self, name: str) -> None:
        """Takes a LoRA away, and with the last one the Triton model. Raises EngineError if there is none of that name.

        Its tensors are deleted by the next command after `GRACE_SECONDS`.
        """
        lora = self.find(name)
        if lora is None:
            there = ", ".join(each.name for each in self.loras())
            raise EngineError(f"there is no LoRA {name!r} of {self.engine_folder.name}, which has {there or 'none'}")
        self._description(name).unlink()
        tensors = self.engine_folder / lora.file
        if tensors.is_file():
            os.utime(tensors)
        if not (engine := load_engine(self.engine_folder)).loras:
            shutil.rmtree(self._repository / engine.model(LORA_ROLE), ignore_errors=True)
        self._sweep()

    def _description(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _sweep(self) -> None:
        wanted = {self.engine_folder / lora.file for lora in self.loras()}
        for path in set(self._folder.glob("*.safetensors")) - wanted:
            if path.stat().st_mtime < time.time() - GRACE_SECONDS:
                path.unlink()


def lora_name_of(source: str) -> str:
    """A name from that of a file: `Add-Detail_v2` of `Add Detail_v2.safetensors`."""
    name = source.rsplit("/", 1)[-1].removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64]
