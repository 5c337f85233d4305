"""What a file says about how it was made: the resolved request as XMP, and as the text that A1111's web UI reads.

Both follow from the request of the one image and from the engine alone, so that equal images are equal files: no time,
no request id, no place in a batch.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from sdserver import xmp
from sdserver.infotext import parameters

if TYPE_CHECKING:
    from sdserver.request import GenerationRequest

SOFTWARE, VERSION = "sd-service", version("sd-service")

# IPTC NewsCodes, Digital Source Type: https://cv.iptc.org/newscodes/digitalsourcetype/
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"

_EXIF = b"Exif\0\0"
# Exif 2.32, 4.6.5, table 9: the character code of a user comment in Unicode.
_UNICODE = b"UNICODE\0"


@dataclass(frozen=True, slots=True)
class Metadata:
    """What one image's file carries."""

    properties: dict[str, str]
    """XMP properties."""
    parameters: str
    """A1111's text."""
    short_parameters: str
    """The same, with prompts shortened where it would not fit the EXIF segment of a JPEG."""


def metadata(request: GenerationRequest, request_json: str) -> Metadata:
    """The metadata of the image of a request of one image; `request_json` is that request on the wire."""
    engine, made_by = request.engine, f"{SOFTWARE} {VERSION}"
    return Metadata(
        {
            "xmp:CreatorTool": made_by,
            "Iptc4xmpExt:DigitalSourceType": digital_source_type(request),
            "Iptc4xmpExt:AISystemUsed": engine.name,
            "Iptc4xmpExt:AISystemVersionUsed": engine.digest,
            "Iptc4xmpExt:AIPromptInformation": "\n".join(
                f"{prompt.weight:.6g}: {prompt.text}" for prompt in request.prompts
            ),
            "sdapi:Engine": engine.id,
            "sdapi:EngineDigest": engine.digest,
            "sdapi:ServerVersion": VERSION,
            "sdapi:Seed": str(request.seeds[0]),
            "sdapi:Request": request_json,
        },
        parameters(request, made_by),
        parameters(request, made_by, _most_units()),
    )


def digital_source_type(request: GenerationRequest) -> str:
    """IPTC's term for how the image came to be: by a model alone, or by a model from another picture."""
    term = "trainedAlgorithmicMedia" if request.init_image is None else "compositeWithTrainedAlgorithmicMedia"
    return f"{_SOURCE_TYPES}{term}"


def exif(text: str) -> bytes:
    """An EXIF block whose UserComment is this text, in UTF-16 as A1111's web UI writes it."""
    comment = _UNICODE + text.encode("utf-16-be")
    # Big-endian TIFF: one directory that points to the Exif directory, with the version and the comment behind it.
    ifd0 = struct.pack(">HHHII", 1, 0x8769, 4, 1, 26) + bytes(4)
    entries = struct.pack(">HHHI4s", 2, 0x9000, 7, 4, b"0232") + struct.pack(">HHII", 0x9286, 7, len(comment), 56)
    return _EXIF + b"MM\0*" + struct.pack(">I", 8) + ifd0 + entries + bytes(4) + comment


def jpeg_segments(metadata: Metadata) -> bytes:
    """The metadata as APP1 segments of a JPEG file, EXIF first as Exif wants it."""
    return xmp.segment(exif(metadata.short_parameters)) + xmp.jpeg_segments(metadata.properties)


def _most_units() -> int:
    return (xmp.MAX_SEGMENT - len(exif(""))) // 2
