"""What an engine's first start, and its first preview, would have to make of its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmodels.runtimes import default_device, default_runtime

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Preparation:
    """What to make, for an engine whose files lie in `folder` and whose descriptor is still to come."""

    folder: str
    weights: dict[str, str]
    """Its files and their SHA-256."""
    device: str = "auto"
    runtime: str = ""
    block_cache: bool = False
    preview: bool = True


def prepare(preparation: Preparation, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Fits the preview map, and converts the UNet where OpenVINO would run it on this machine.

    `report` gets events as `convert` sends them. Returns facts: `preview_map`, or None, and `networks`, the files of
    OpenVINO below the folder that were written.
    """
    facts: dict[str, Any] = {"preview_map": None, "networks": []}
    folder = Path(preparation.folder)
    if preparation.preview:
        report({"event": "stage", "stage": "fitting the preview map"})
        from sdmodels.preview_map import of_autoencoder
        from sdmodels.vae import VaeDecoder, VaeEncoder

        facts["preview_map"] = asdict(of_autoencoder(VaeEncoder(folder), VaeDecoder(folder)))
    if _is_for_openvino(preparation):
        from sdmodels import openvino_unet

        def tell(name: str) -> None:
            report({"event": "stage", "stage": f"converting {name} for OpenVINO, which takes minutes for a large one"})

        made = openvino_unet.prepare(
            folder, preparation.weights, block_cache=preparation.block_cache, on_conversion=tell
        )
        facts["networks"] = [str(path.relative_to(folder)) for path in made]
    return facts


def _is_for_openvino(preparation: Preparation) -> bool:
    device = {"cpu": "cpu", "gpu": "cuda:0"}.get(preparation.device) or default_device()
    return (preparation.runtime or default_runtime(device)) == "openvino"
