"""The class label of a row, which upscaling UNets take beside latents: the noise level of the image that they enlarge.

It travels as one more plane after the UNet's own channels, the same number at every place, so that rows have the same
parts with every engine. It is taken off before anything is rounded: bfloat16 has no digits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

    Rows = TypeVar("Rows", torch.Tensor, NDArray[Any])


def row_channels(config: Mapping[str, Any]) -> int:
    """Channels of a row for a UNet of that configuration: its own, and the plane if it takes labels."""
    channels: int = config["in_channels"]
    return channels + (config.get("num_class_embeds") is not None)


def apart(rows: Rows, config: Mapping[str, Any]) -> tuple[Rows, Rows | None]:
    """The UNet's own channels of rows [B, U, h, w], and their labels [B], still floats; None: it takes none."""
    if config.get("num_class_embeds") is None:
        return rows, None
    channels = config["in_channels"]
    return rows[:, :channels], rows[:, channels, 0, 0].round()
