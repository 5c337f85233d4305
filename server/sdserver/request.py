"""A generation request and its events as the server's own, valid, frozen values. `wire` makes and reads them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from sdserver.observation import ANONYMOUS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdserver.canvas import Canvas, Fit, Outpaint
    from sdserver.engines import Engine, LoraInfo, Windows

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
class ClipGuidance:
    """Steers by CLIP between those fractions of the steps, 0 <= start < end <= 1; `clip_guidance` says how."""

    scale: float
    """0 to 10."""
    cutouts: int
    """Random crops that CLIP looks at in each step; 0: the whole image."""
    start: float
    end: float
    steps_per_gradient: int
    """Steps that one gradient serves; 1: each evaluation of the UNet has its own."""
    prompt: str
    """What CLIP is asked to see; empty: the positive prompts, by weight."""
    exact: bool
    """Whether the gradient goes through the UNet, too."""


@dataclass(frozen=True, slots=True)
class InitImage:
    """The image that a generation starts from: the SHA-256 of its file, and what became of it and of the mask."""

    sha256: str
    strength: float
    """How much of the schedule is run on it, 0 to 1."""
    fit: Fit
    canvas: Canvas = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which part of the initial image is repainted: the SHA-256 of its file, and its soft border in pixels."""

    sha256: str
    feather: float


@dataclass(frozen=True, slots=True)
class DepthMap:
    """How far away everything of the result is: the SHA-256 of its file, and what became of it."""

    sha256: str
    fit: Fit
    depths: NDArray[np.float32] = field(compare=False, repr=False)
    """[H, W] of the result's size, more being nearer."""


@dataclass(frozen=True, slots=True)
class Variation:
    """The noise of image `i` is moved towards that of `seed + i`, by `strength`, 0 to 1."""

    seed: int
    strength: float


@dataclass(frozen=True, slots=True)
class TwoPass:
    """A first pass of so many pixels, and how much of the schedule the second one runs, 0 to 1."""

    width: int
    height: int
    strength: float


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA of the engine, and the factor of what it adds to the weights, -4 to 4."""

    info: LoraInfo
    weight: float


@dataclass(frozen=True, slots=True)
class Output:
    """File format; `quality` 1 to 100 for lossy formats, None otherwise; whether the file says how it was made."""

    media_type: str
    quality: int | None
    metadata: bool = True


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
    clip_guidance: ClipGuidance | None = None
    """None: classifier-free guidance alone."""
    output: Output
    init_image: InitImage | None = None
    """None: starts from pure noise."""
    mask: Mask | None = None
    """None: nothing but what has no content is repainted by itself."""
    outpaint: Outpaint | None = None
    noise_level: int | None = None
    """Of the noise that an upscaler's initial image gets; None: the engine is none."""
    depth_map: DepthMap | None = None
    """None: the engine takes none, or estimates that of the initial image."""
    variation: Variation | None = None
    two_pass: TwoPass | None = None
    """None: one pass."""
    loras: tuple[Lora, ...] = ()
    block_cache_interval: int = 1
    """Steps from one run of the whole UNet to the next; 1: each evaluation is one."""
    windows: Windows | None = None
    """In which the UNet sees the image one by one; None: as a whole."""
    tile_x: bool = False
    """Whether the right border continues at the left one."""
    tile_y: bool = False
    """Whether the lower border continues at the upper one."""
    preview_every_steps: int | None
    """A preview after every so many steps; None: no previews."""
    tenant: str = field(default=ANONYMOUS, compare=False)
    """Whose API key the call had; no part of what the images look like."""

    @property
    def image_count(self) -> int:
        """Images to generate."""
        return len(self.seeds)

    def alone(self, index: int) -> GenerationRequest:
        """The request of which image `index` is the only image."""
        variation = self.variation and replace(self.variation, seed=self.variation.seed + index)
        return replace(self, seeds=(self.seeds[index],), variation=variation)


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


SafetyOutcome = Literal["passed", "flagged", "blurred", "blocked"]


@dataclass(frozen=True, slots=True)
class SafetyScore:
    """How far an image belongs to a class of the safety check, 0 to 1, and from which score on the check acts."""

    label: str
    score: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Safety:
    """What the safety check made of an image."""

    outcome: SafetyOutcome
    scores: tuple[SafetyScore, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image as an encoded file; its size in pixels, and whether it is signed."""

    index: int
    seed: int
    data: bytes
    media_type: str
    width: int
    height: int
    signed: bool = False
    safety: Safety | None = None
    """None: there was no safety check. A blocked image has no data."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What was computed; `pixel_steps` are the pixels that the UNet saw, summed over its rows, and `cached_rows` those
    rows of which block caching left out the inner blocks."""

    image_count: int
    unet_rows: int
    pixel_steps: int
    clip_gradients: int
    cached_rows: int


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
