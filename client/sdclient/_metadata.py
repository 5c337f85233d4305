"""What an image file says about how it was made. No gRPC here; protobuf only when a file is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._containers import ContainerError, xmp_packets
from ._errors import MetadataError

if TYPE_CHECKING:
    import os

    from ._types import GenerateOptions, Prompt

_NAMESPACE = "urn:sdapi:v1#"
_DESCRIPTION = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"


@dataclass(frozen=True, slots=True)
class Metadata:
    """How an image was made.

    `client.generate(metadata.prompts, **metadata.options)` makes it again on a server whose engine has the same digest.
    An initial image or a mask is named by its `sha256`, and its data has to be put in.
    """

    engine: str
    """Id of the engine."""
    engine_digest: str
    """Digest of the engine, as `Engine.digest`: the same digest and the same request give the same pixels."""
    server_version: str
    """Version of the server."""
    prompts: tuple[Prompt, ...]
    """The prompts with their weights."""
    options: GenerateOptions
    """Everything else, resolved, for this image alone: `seed` is its own, `image_count` is 1."""


def read_metadata(file: bytes | str | os.PathLike[str]) -> Metadata:
    """What a PNG, JPEG, WebP or AVIF file says about how it was made; `file` is its path or its bytes.

    Raises MetadataError where it says nothing, or nothing that can be read, and OSError for a path that cannot be read.
    """
    data, name = (file, "the image") if isinstance(file, bytes) else (Path(file).read_bytes(), str(Path(file)))
    try:
        return _parse(xmp_packets(data))
    except ContainerError as error:
        raise MetadataError(f"cannot read how {name} was made: {error}") from None


def _parse(packets: list[bytes]) -> Metadata:
    from . import _wire

    properties: dict[str, str] = {}
    for packet in packets:
        properties |= _properties(packet)
    try:
        request = properties["Request"]
        engine, digest, version = (properties[name] for name in ("Engine", "EngineDigest", "ServerVersion"))
    except KeyError:
        raise ContainerError(
            "it carries no metadata of sdserver; another program has taken it out, or made it"
        ) from None
    try:
        prompts, options = _wire.from_json(request)
    except ValueError as error:
        raise ContainerError(
            f"its request is not one that this sdclient knows; install a newer one ({error})"
        ) from None
    return Metadata(engine, digest, version, prompts, options)


def _properties(packet: bytes) -> dict[str, str]:
    """The packet's properties of our namespace, as elements or as attributes."""
    from xml.etree import ElementTree

    try:
        text = packet.decode()
        if "<!DOCTYPE" in text:
            raise ContainerError("its XMP declares entities, which XMP has none of")
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise ContainerError(f"its XMP is damaged: {error}") from None
    prefix = f"{{{_NAMESPACE}}}"
    found: dict[str, str] = {}
    for description in root.iter(_DESCRIPTION):
        values = {**description.attrib, **{child.tag: child.text or "" for child in description}}
        found |= {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return found
