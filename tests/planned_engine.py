"""The descriptor of Stable Diffusion 2.1 at 768 x 768, as `sdserver engine add` writes it, without weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdserver.engine_families import defaults_of, limits_of
from sdserver.engines import Engine, load_engine

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 768


def write(repository: Path, shipped: Engine) -> Engine:
    """Writes the descriptor into a model repository; what does not cost time is that of another engine."""
    folder = repository / "engines/stable-diffusion-768-v2-1"
    folder.mkdir(parents=True)
    facts = {
        "id": folder.name,
        "native_width": SIZE,
        "native_height": SIZE,
        "limits": limits_of(SIZE, 64),
        "defaults": defaults_of(SIZE, False),
        "windows": {"size": SIZE, "overlap": SIZE // 2},
        "decode_tile": {"size": SIZE, "overlap": SIZE // 4},
    }
    descriptor = shipped.model_dump(mode="json", exclude={"digest", "source"}) | facts
    (folder / "engine.json").write_text(json.dumps(descriptor), encoding="utf-8")
    return load_engine(folder)
