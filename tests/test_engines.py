"""Engines as data: the shipped descriptor stands for its weights, and a wrong one says what is wrong."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from sdserver.engines import EngineError, load_catalog, load_engine

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.settings import ServeSettings


def shipped(settings: ServeSettings) -> Path:
    return settings.model_repository / "engines/tiny-landscape"


def test_the_descriptor_lists_every_weight_file_with_its_digest(settings: ServeSettings) -> None:
    folder = shipped(settings)
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("clip", "unet", "vae")
        for path in (folder / part).iterdir()
    }
    assert load_engine(folder).weights == files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction_type": "x0"}, "prediction_type"),
        ({"native_width": 0}, "native_width"),
        ({"surprise": 1}, "surprise"),
        ({"defaults": {"sampler": "nope"}}, "it must be one of ddim"),
        ({"defaults": {"schedule": "nope"}}, "defaults.schedule"),
        ({"limits": {"size_multiple": 12}}, "multiple of latents.downsampling"),
        ({"limits": {"max_steps": 1000}}, "steps_offset"),
        ({"noise_schedule": {"rescale_zero_terminal_snr": True}, "prediction_type": "epsilon"}, "v_prediction"),
        ({"weights": {"unet/x": "not a digest"}}, "weights"),
        ({"windows": {"size": 520}}, "windows.size"),
        ({"windows": {"overlap": 264}}, "half of size"),
        ({"decode_tile": {"overlap": 20}}, "latents.downsampling"),
        ({"id": "other"}, "make them equal"),
    ],
)
def test_a_wrong_descriptor_is_refused_with_the_field_that_is_wrong(
    settings: ServeSettings, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    descriptor = json.loads((shipped(settings) / "engine.json").read_text())
    # Only the leading spacing moves its timesteps by the offset, and so can run out of them.
    descriptor["noise_schedule"]["timestep_spacing"] = "leading"
    for name, value in change.items():
        descriptor[name] = {**descriptor[name], **value} if isinstance(value, dict) else value
    folder = tmp_path / "engines/tiny-landscape"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(json.dumps(descriptor))
    with pytest.raises(EngineError, match=said):
        load_catalog(tmp_path)


def test_a_change_of_the_descriptor_changes_the_digest(settings: ServeSettings, tmp_path: Path) -> None:
    text = (shipped(settings) / "engine.json").read_text()
    folder = tmp_path / "tiny-landscape"
    folder.mkdir()
    (folder / "engine.json").write_text(text.replace("Tiny Landscape", "Tiny Landscapes"))
    assert load_engine(folder).digest != load_engine(shipped(settings)).digest
