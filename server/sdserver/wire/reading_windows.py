"""Windows and seamless tiling in: what a request asks for, and whatever is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdserver.engines import Windows

if TYPE_CHECKING:
    from sdapi.v1 import generation_pb2

    from sdserver.engines import Engine
    from sdserver.request import TwoPass


def read_windows(message: generation_pb2.GenerateRequest, engine: Engine, violations: dict[str, str]) -> Windows | None:
    """The windows of a request, None if it is denoised as a whole; what is wrong is put into the violations."""
    default, given, multiple = engine.windows, message.windows, engine.limits.size_multiple
    if default is None or (given.HasField("size") and given.size == 0):
        return None
    size = given.size if given.HasField("size") else default.size
    # Nobody means an overlap in proportion to the engine's windows to stay as it is in smaller ones.
    overlap = given.overlap if given.HasField("overlap") else min(default.overlap, max(size, 0) // 2)
    if size < 0 or size % multiple:
        violations["windows.size"] = f"{size} is not a multiple of {multiple}, or 0, which turns windows off"
        return default
    if not 0 <= overlap <= size // 2:
        violations["windows.overlap"] = f"{overlap} is not an integer from 0 to {size // 2}, half of the size"
        return default
    return Windows(size=size, overlap=overlap)


def check_tiling(
    message: generation_pb2.GenerateRequest,
    engine: Engine,
    width: int,
    height: int,
    two_pass: TwoPass | None,
    violations: dict[str, str],
) -> None:
    """Puts into the violations which sizes cannot be tiled: what padding adds and cropping takes away is the seam."""
    multiple = engine.limits.size_multiple
    sizes = [("width", width, message.tile_x), ("height", height, message.tile_y)]
    if two_pass is not None:
        sizes.append(("two_pass.width", two_pass.width, message.tile_x))
        sizes.append(("two_pass.height", two_pass.height, message.tile_y))
    for name, size, tiled in sizes:
        if tiled and size % multiple and name not in violations:
            near = size // multiple * multiple
            sizes_near = f"{near} or {near + multiple}" if near else f"{multiple}"
            violations[name] = f"{size} cannot be tiled; engine {engine.id} tiles multiples of {multiple}: {sizes_near}"
