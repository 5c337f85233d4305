"""What a generation yields: plain, frozen values, made for `match`. No gRPC and no protobuf here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ._errors import BlockedImageError

if TYPE_CHECKING:
    import os

    from PIL.Image import Image as PILImage

    from ._metadata import Metadata
    from ._types import GenerateOptions, Prompt

MEDIA_TYPES = {
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".avif": "image/avif",
}
"""File suffix -> the media type that it promises."""


@dataclass(frozen=True, slots=True)
class PromptUsage:
    """How long a prompt is for the text encoder."""

    tokens: int
    """Tokens of the text."""
    chunks: int
    """Chunks that they were encoded in; 1 unless the prompt is long."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is valid and has its place. Always the first event.

    `client.generate(accepted.prompts, **accepted.options)` makes the same images again.
    """

    request_id: str
    """The request's name in logs and errors."""
    prompts: tuple[Prompt, ...]
    """The prompts with their weights."""
    options: GenerateOptions
    """Everything else that makes the images what they are, resolved: engine, size, seed, sampler and so on."""
    queue_position: int
    """Requests that have to finish before this one starts; 0 when it starts at once."""
    prompt_usage: tuple[PromptUsage, ...] = ()
    """What the text encoder made of each prompt, in their order; empty from a server that does not say it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """All images of the request have completed `step` of `steps` denoising steps."""

    step: int
    """0 when the request has left the queue and its denoising begins, then 1 to `steps`."""
    steps: int
    """Steps in all."""


@dataclass(frozen=True, slots=True)
class _Picture:
    data: bytes = field(repr=False)
    """The encoded file."""
    media_type: str
    """Its format, such as `image/png`."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    index: int
    """Which image of the request, from 0."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the encoded file as it is, over any file that is there, and return its path.

        Raises ValueError where the suffix promises another format: nothing is encoded again here.
        """
        path, data = Path(path), self._file()
        promised = MEDIA_TYPES.get(path.suffix.lower(), self.media_type)
        if promised != self.media_type:
            raise ValueError(
                f"{path.name} promises {promised}, but this image is {self.media_type}: choose another suffix, or ask "
                f"for output=Output({promised!r})"
            )
        path.write_bytes(data)
        return path

    def to_pil(self) -> PILImage:
        """The decoded picture as a Pillow image. Needs Pillow."""
        from io import BytesIO

        try:
            import PIL.Image
        except ImportError as error:
            raise ImportError("to_pil() and show() need Pillow: pip install 'sd-service[cli]'") from error
        with PIL.Image.open(BytesIO(self._file())) as image:
            image.load()
            return image

    def _file(self) -> bytes:
        return self.data

    def show(self) -> None:
        """Open the picture in this machine's viewer. Needs Pillow."""
        self.to_pil().show()

    def _repr_png_(self) -> bytes | None:
        return self.data if self.data and self.media_type == "image/png" else None

    def _repr_jpeg_(self) -> bytes | None:
        return self.data if self.data and self.media_type == "image/jpeg" else None


@dataclass(frozen=True, slots=True)
class Preview(_Picture):
    """A small picture of an unfinished image; only when asked for."""

    step: int
    """Denoising steps behind this picture."""


SafetyOutcome = Literal["passed", "flagged", "blurred", "blocked"]
"""What the server's safety check did with an image: nothing, for no class reached its threshold; sent it as it is, sent
it blurred beyond recognition, or did not send it, though one did."""


@dataclass(frozen=True, slots=True)
class SafetyScore:
    """How far an image belongs to a class of the safety check."""

    label: str
    """Name of the class."""
    score: float
    """0 to 1."""
    threshold: float
    """From which score on the check acts."""


@dataclass(frozen=True, slots=True)
class Safety:
    """What the server's safety check made of an image."""

    outcome: SafetyOutcome | None
    """None: one that this version of the SDK does not know."""
    scores: tuple[SafetyScore, ...]
    """Of all its classes."""

    @property
    def reached(self) -> tuple[SafetyScore, ...]:
        """The scores that reached their thresholds."""
        return tuple(each for each in self.scores if each.score >= each.threshold)


@dataclass(frozen=True, slots=True)
class Image(_Picture):
    """A finished image. It shows itself in a notebook.

    One that the server's safety check has blocked has no data: `blocked` says so, and whatever needs the picture raises
    BlockedImageError.
    """

    seed: int
    """The seed that reproduces this image alone."""
    signed: bool = False
    """Whether the file carries a signed C2PA manifest."""
    safety: Safety | None = None
    """What the server's safety check made of it. None: it has none."""

    @property
    def blocked(self) -> bool:
        """Whether the safety check has withheld it."""
        return self.safety is not None and self.safety.outcome == "blocked"

    def _file(self) -> bytes:
        if self.safety is not None and self.blocked:
            reached = [f"{each.label} {each.score:.2f}" for each in self.safety.reached]
            raise BlockedImageError(
                f"image {self.index} was blocked by the server's safety check ({', '.join(reached)}): look at "
                "image.blocked first, and try another prompt or seed",
                code="OK",
                reason="IMAGE_BLOCKED",
            )
        return self.data

    @property
    def metadata(self) -> Metadata:
        """How it was made, as its file says. Raises MetadataError where that was not asked for."""
        from ._metadata import read_metadata

        return read_metadata(self._file())


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation cost."""

    image_count: int
    """Images made."""
    unet_rows: int
    """UNet rows computed: one latent under one condition at one noise level."""
    pixel_steps: int
    """Pixels of the generated size, summed over the UNet rows."""
    clip_gradients: int = 0
    """Gradients of CLIP guidance computed: one for each evaluation in which it acts."""
    cached_rows: int = 0
    """Those of `unet_rows` of which block caching left out the inner blocks."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a generation went, in seconds on the server's clock."""

    queue: float
    """Waiting for a place."""
    encode: float
    """Encoding the prompts."""
    denoise: float
    """Denoising, waiting for shared UNet calls included."""
    decode: float
    """Decoding latents and writing files."""
    total: float
    """All of it, from arrival to the last image."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Every image has been sent. Always the last event."""

    usage: Usage
    timings: Timings


Event = Accepted | Progress | Preview | Image | Finished
"""What a stream yields; made for `match`. Later versions may add members."""
