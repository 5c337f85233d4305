"""`sdclient reproduce`: an image's metadata -> the request that makes its pixels again, and whether it did."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

from ._errors import InvalidRequestError, MetadataError, ServerError
from ._events import MEDIA_TYPES, Image
from ._metadata import read_metadata
from ._terminal import progress_bar
from ._types import Output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ._metadata import Metadata
    from ._sync import Client
    from ._types import DepthMap, Engine, GenerateOptions, InitImage, Lora, Mask

    P = TypeVar("P", InitImage, Mask, DepthMap)


class Reproduction(TypedDict):
    """What `reproduce` has made."""

    path: Path
    seed: int
    same_pixels: bool | None
    """None: not compared, because the format is another."""
    verdict: str


def reproduce(
    client: Client,
    original: Path,
    made: Path | None,
    *,
    init: Path | None,
    mask: Path | None,
    depth_map: Path | None,
    force: bool,
    timeout: float,
) -> Reproduction:
    """Makes the image of a file again, writes it, and compares.

    Raises MetadataError where the engine is another or the pixels are, unless `force`; InvalidRequestError where the
    initial image, mask or depth map is missing, or is another.
    """
    metadata = read_metadata(original)
    made_as = (metadata.options.get("output") or Output()).media_type or "image/png"
    if made is None:
        suffixes = [suffix for suffix, media_type in MEDIA_TYPES.items() if media_type == made_as] or [".png"]
        suffix = original.suffix if original.suffix.lower() in suffixes else suffixes[0]
        made = original.with_name(f"{original.stem}-again{suffix}")
    if made.exists() and made.samefile(original):
        raise MetadataError(f"{made} is the image itself: choose another --output")
    media_type = MEDIA_TYPES[made.suffix.lower()]
    options = options_again(metadata, media_type, init=init, mask=mask, depth_map=depth_map)
    options["timeout"] = timeout
    if problem := problem_with(metadata, client.engines()):
        if not force:
            raise MetadataError(f"{problem}: the pixels would be others; --force goes on")
        print(f"sdclient: {problem}: the pixels may be others", file=sys.stderr)
        if loras := _loras(options):
            options["loras"] = [replace(lora, sha256=None) for lora in loras]
    image = None
    with progress_bar() as show, client.stream(metadata.prompts, **options) as events:
        for event in events:
            show(event)
            if isinstance(event, Image):
                image = event
    if image is None:
        raise ServerError("the server made no image", code="INTERNAL")
    path = image.save(made)
    same = same_pixels(original.read_bytes(), image.data) if media_type == made_as else None
    if same is False and not force:
        raise MetadataError(f"{path} has other pixels than {original}: was that changed, or made on other hardware?")
    verdict = {True: "the same pixels", False: "other pixels", None: f"not compared: {original} is {made_as}"}[same]
    return {"path": path, "seed": image.seed, "same_pixels": same, "verdict": verdict}


def options_again(
    metadata: Metadata, media_type: str, *, init: Path | None, mask: Path | None, depth_map: Path | None
) -> GenerateOptions:
    """The options that make the image again, as a file of a media type, from files whose SHA-256 the metadata names.

    Raises InvalidRequestError where a file is missing, or is another.
    """
    options = metadata.options.copy()
    violations: dict[str, str] = {}
    init_image, mask_image, depths = options.get("init_image"), options.get("mask"), options.get("depth_map")
    if init_image is not None:
        options["init_image"] = _with_data(init_image, init, "--init", violations)
    if mask_image is not None:
        options["mask"] = _with_data(mask_image, mask, "--mask", violations)
    if depths is not None:
        options["depth_map"] = _with_data(depths, depth_map, "--depth-map", violations)
    for flag, needed, given in (
        ("--init", init_image, init),
        ("--mask", mask_image, mask),
        ("--depth-map", depths, depth_map),
    ):
        if needed is None and given is not None:
            violations[flag] = "the image was made without one; leave it out"
    if violations:
        message = "; ".join(f"{flag}: {problem}" for flag, problem in violations.items())
        raise InvalidRequestError(message, code="INVALID_ARGUMENT", violations=violations)
    output = options.get("output") or Output()
    quality = output.quality if media_type == output.media_type else None
    options["output"] = replace(output, media_type=media_type, quality=quality)
    return options


def problem_with(metadata: Metadata, engines: Sequence[Engine]) -> str | None:
    """Why a server with these engines may make other pixels, if so. Raises MetadataError if it cannot make any."""
    engine = next((engine for engine in engines if engine.id == metadata.engine), None)
    if engine is None:
        raise MetadataError(
            f"the image was made by engine {metadata.engine}; this server has "
            f"{', '.join(engine.id for engine in engines)}: choose another --server"
        )
    if engine.digest != metadata.engine_digest:
        return f"engine {engine.id} is {engine.digest} on this server, and was {metadata.engine_digest}"
    here = {lora.name: lora.sha256 for lora in engine.loras}
    for lora in _loras(metadata.options):
        if lora.name not in here:
            raise MetadataError(
                f"the image was made with the LoRA {lora.name}; engine {engine.id} has {', '.join(here) or 'none'}"
            )
        if here[lora.name] != lora.sha256:
            return f"the LoRA {lora.name} is {here[lora.name]} on this server, and was {lora.sha256}"
    return None


def same_pixels(one: bytes, other: bytes) -> bool:
    """Whether two encoded images decode to the same pixels. Needs Pillow."""
    from io import BytesIO

    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("comparing pixels needs Pillow: pip install 'sd-service[cli]'") from error
    with PIL.Image.open(BytesIO(one)) as first, PIL.Image.open(BytesIO(other)) as second:
        return first.size == second.size and first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


def _loras(options: GenerateOptions) -> tuple[Lora, ...]:
    """The LoRAs of resolved options, which have no other form of them."""
    return cast("tuple[Lora, ...]", options.get("loras") or ())


def _with_data(picture: P, path: Path | None, flag: str, violations: dict[str, str]) -> P:
    """The initial image, mask or depth map with the data of a file; what is wrong is put into the violations."""
    if path is None:
        violations[flag] = f"give the file with SHA-256 {picture.sha256}"
        return picture
    data = path.read_bytes()
    if (sha256 := hashlib.sha256(data).hexdigest()) != picture.sha256:
        violations[flag] = f"{path} has SHA-256 {sha256}; give the file with {picture.sha256}"
    return replace(picture, data=data)
