"""Pixels -> the file that a caller gets: encoded, with metadata, and signed last."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sdserver import images
from sdserver.errors import GenerationFailed
from sdserver.metadata import digital_source_type, metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.images import Pixels
    from sdserver.request import GenerationRequest
    from sdserver.signing import Signer


class ImageWriter:
    """Writes files on threads of their own. `to_json` is a request on the wire; without a signer nothing is signed."""

    def __init__(self, to_json: Callable[[GenerationRequest], str], signer: Signer | None = None) -> None:
        self._to_json = to_json
        self._signer = signer

    @property
    def signs(self) -> bool:
        """Whether the files carry a signed C2PA manifest."""
        return self._signer is not None

    async def write(self, pixels: Pixels, request: GenerationRequest, index: int) -> bytes:
        """The file of image `index` of a request from its [H, W, 3] pixels.

        Raises GenerationFailed where it cannot be signed.
        """
        return await asyncio.to_thread(self._write, pixels, request.alone(index))

    def _write(self, pixels: Pixels, request: GenerationRequest) -> bytes:
        output = request.output
        data = images.encode(pixels, output, metadata(request, self._to_json(request)) if output.metadata else None)
        if self._signer is None:
            return data
        try:
            engine = request.engine
            return self._signer.sign(data, output.media_type, digital_source_type(request), engine.id, engine.digest)
        except Exception as error:
            raise GenerationFailed("the image cannot be signed; the server's log says why", "NOT_SIGNED") from error
