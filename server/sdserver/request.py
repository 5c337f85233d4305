"""A generation request and its events as the server's own, valid, frozen values. `wire` makes and reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sdserver.engines import Engine

Blending = Literal["text_encoder", "composable"]
BLENDINGS: tuple[Blending, ...] = ("text_encoder", "composable")


@dataclass(frozen=True, slots=True)
class Emphasis:
    """The factor, 0 to 10, of the characters `start` to `end`, exclusive, of a prompt's text."""

    start: int
    end: int
    factor: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its share; a negative weight makes a negative prompt. Emphasis is in order and does not overlap."""

    text: str
    weight: float
    emphasis: tuple[Emphasis, ...] = ()


@dataclass(frozen=True, slots=True)
class GuidanceInterval:
    """Fractions of the steps between which classifier-free guidance acts, 0 <= start < end <= 1."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Output:
    """File format; `quality` 1 to 100 for lossy formats, None otherwise."""

    media_type: str
    quality: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request with everything resolved. Two equal requests give equal images."""

    request_id: str
    engine: Engine
    prompts: tuple[Prompt, ...]
    blending: Blending
    width: int
    height: int
    steps: int
    sampler: str
    schedule: str
    eta: float | None
    """None where the sampler has none."""
    churn: float | None
    """None where the sampler has none."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    guidance_scale: float
    guidance_interval: GuidanceInterval
    guidance_rescale: float
    output: Output
    preview_every_steps: int | None
    """A preview after every so many steps; None: no previews."""

    @property
    def image_count(self) -> int:
        """Images to generate."""
        return len(self.seeds)


@dataclass(frozen=True, slots=True)
class PromptUsage:
    """Tokens of a prompt without start and end, and the chunks that they were encoded in."""

    tokens: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request has its place; `queue_position` requests have to finish first. One usage for each prompt."""

    request: GenerationRequest
    queue_position: int
    prompt_usage: tuple[PromptUsage, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Every image has completed `step` of `steps` denoising steps."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A small picture of an unfinished image after `step` steps, as an encoded file; its size in pixels."""

    index: int
    step: int
    data: bytes
    media_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image as an encoded file; its size in pixels."""

    index: int
    seed: int
    data: bytes
    media_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Usage:
    """`unet_rows` computed, and `pixel_steps`: pixels of the generated size summed over those rows."""

    image_count: int
    unet_rows: int
    pixel_steps: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each stage took."""

    queue: float
    encode: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything was sent."""

    usage: Usage
    timings: Timings


Event = Accepted | Progress | Preview | Image | Finished
