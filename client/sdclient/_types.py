"""What the SDK takes, and the engines that it lists: plain, frozen values. No gRPC and no protobuf here.

Whatever is None is left out of the request, and the server chooses it; 0 is a value. The defaults are the server's
alone: `Accepted.options` says what it chose, `Engine.defaults` what it will choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

Sampler = Literal[
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "ddpm",
    "dpm2",
    "dpm2_ancestral",
    "lms",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_3m_sde",
    "lcm",
]
"""Integrates the denoising equation from noise to image. `heun`, `dpm2`, `dpm2_ancestral`, `dpmpp_2s_ancestral` and
`dpmpp_sde` take twice the time a step. `lcm` is for engines that were distilled for it."""

Schedule = Literal["native", "karras", "exponential"]
"""Places the steps along the noise levels: evenly spaced training timesteps, Karras et al. 2022 with rho = 7, or evenly
spaced logarithms."""

Blending = Literal["text_encoder", "composable"]
"""How several prompts become one guidance direction: averaged text states (two UNet rows an image and step, however
many prompts there are), or composable diffusion (arXiv:2206.01714, one row a prompt)."""


@dataclass(frozen=True, slots=True)
class Emphasis:
    """Strengthens or weakens the characters `start` to `end` of a prompt's text."""

    start: int
    """The first character, from 0."""
    end: int
    """The character after the last one."""
    factor: float
    """Multiplies the text states of these characters' tokens, 0 to 10. 1 changes nothing."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its share in the image, -10 to 10: negative pushes away, 0 switches the prompt off, None is 1.

    Weights are relative to each other; emphasis is absolute.
    """

    text: str
    """Taken as it is: no syntax here. May be long: nothing is cut off."""
    weight: float | None = None
    emphasis: tuple[Emphasis, ...] = ()
    """Parts of the text, in their order and without overlaps."""


Prompts = str | Prompt | Sequence[str | Prompt | tuple[str, float]]
"""One prompt, or several. A `str` may say them in prompt syntax, `a lake at dusk : 2 | trees : -1` (see
`parse_prompts`); the text of a `Prompt` or of a tuple `(text, weight)` is taken as it is."""


@dataclass(frozen=True, slots=True)
class GuidanceInterval:
    """Restricts classifier-free guidance to a part of the steps, as fractions: 0 is the first step, 1 the end."""

    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class ClipGuidance:
    """Steers by a CLIP model's similarity to the prompt. `ClipGuidance()` turns it on with the engine's defaults."""

    scale: float | None = None
    """Strength, 0 to 10."""
    cutouts: int | None = None
    """Random crops that CLIP looks at in each step, 0 (the whole image) to 64."""
    start: float | None = None
    """Fraction of the steps at which it starts, 0 to 1."""
    end: float | None = None
    """Fraction of the steps at which it ends, 0 to 1."""
    prompt: str | None = None
    """What CLIP is asked to see; None: the positive prompts."""


@dataclass(frozen=True, slots=True)
class InitImage:
    """The image to start from instead of noise."""

    data: bytes = field(repr=False)
    """An encoded PNG, JPEG or WebP."""
    strength: float | None = None
    """How much of the schedule is run on it, 0 (keeps the image) to 1 (ignores it)."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The part of the initial image to repaint."""

    data: bytes = field(repr=False)
    """An encoded PNG, JPEG or WebP, read as grey: white is repainted, black is kept."""


@dataclass(frozen=True, slots=True)
class Output:
    """File format of the images."""

    media_type: str | None = None
    """`image/png`, `image/webp` or `image/jpeg`."""
    quality: int | None = None
    """Quality of a lossy format, 1 to 100."""


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """Turns on previews while denoising."""

    every_steps: int | None = None
    """A preview after every so many steps."""


class GenerateOptions(TypedDict, total=False):
    """The options of `generate` and `stream`. What is left out, or None, is the server's choice."""

    engine: str | None
    """Id of an engine of `engines()`."""
    width: int | None
    """Pixels, any integer within the engine's limits."""
    height: int | None
    """Pixels, any integer within the engine's limits."""
    steps: int | None
    """Denoising steps."""
    sampler: Sampler | None
    """Integrates the denoising equation."""
    schedule: Schedule | None
    """Places the steps along the noise levels."""
    seed: int | None
    """Seed of the first image, 0 to 2**63 - 1; image `i` uses `seed + i`. 0 is a seed like any other."""
    seeds: Sequence[int] | None
    """The seed of each image, instead of `seed`."""
    image_count: int | None
    """Images to generate; with `seeds` their number, or left out."""
    guidance_scale: float | None
    """Classifier-free guidance scale, 0 to 100. 1 turns guidance off and halves the work."""
    guidance_interval: GuidanceInterval | None
    """Restricts classifier-free guidance to a part of the schedule."""
    guidance_rescale: float | None
    """Takes back the contrast that guidance adds, 0 (not at all) to 1 (all): arXiv:2305.08891, section 3.4."""
    eta: float | None
    """Fresh noise in each step, 0 (none) to 1, for the samplers that have it: `ddim` (0 by default), and `ddpm`, the
    ancestral and the SDE ones (1 by default)."""
    churn: float | None
    """Noise added before the steps and removed by them, 0 (none) to 100 over all steps, for `euler`, `heun`, `dpm2`."""
    blending: Blending | None
    """How several prompts become one guidance direction."""
    clip_guidance: ClipGuidance | None
    """Turns on CLIP guidance."""
    init_image: InitImage | None
    """Starts from this image instead of pure noise."""
    mask: Mask | None
    """Repaints only a part of `init_image`."""
    output: Output | None
    """File format of the images."""
    preview: PreviewOptions | None
    """Turns on previews while denoising."""
    request_id: str | None
    """Names this request in logs, errors and events; at most 128 printable ASCII characters."""
    timeout: float | None
    """Seconds for the whole call, retries included, instead of the client's `timeout`. None: no limit."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What requests may ask of an engine."""

    min_size: int
    """Least width and height, in pixels."""
    max_size: int
    """Greatest width and height, in pixels."""
    max_pixels: int
    """Greatest product of width and height, in pixels."""
    size_multiple: int
    """Sizes are generated at the next multiple of this, in pixels, and cropped."""
    max_steps: int
    """Most denoising steps."""
    max_image_count: int
    """Most images of one request."""
    max_prompt_chunks: int
    """Most chunks of one prompt, of 75 tokens or fewer each."""


@dataclass(frozen=True, slots=True)
class EngineDefaults:
    """What an engine does when a request leaves things open."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: Sampler | None
    """None: one that this version of the SDK does not know."""
    schedule: Schedule | None
    """None: one that this version of the SDK does not know."""


@dataclass(frozen=True, slots=True)
class License:
    """Under which terms an engine may be used."""

    name: str
    """SPDX identifier, or the licence's own name."""
    url: str
    """Where its text is. May be empty."""
    use_restrictions: str
    """Restrictions on use, in plain words. Empty: none."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A Stable Diffusion engine of the server."""

    id: str
    """Names it in requests."""
    name: str
    """Name for people."""
    description: str
    """What it makes."""
    ready: bool
    """Whether its models are loaded and answer."""
    digest: str
    """The same digest and the same resolved request give the same images."""
    native_width: int
    """Width that it was trained for, in pixels."""
    native_height: int
    """Height that it was trained for, in pixels."""
    limits: EngineLimits
    defaults: EngineDefaults
    samplers: tuple[Sampler, ...]
    """Samplers that it accepts and this version of the SDK knows."""
    eta_samplers: tuple[Sampler, ...]
    """Those of them that take `eta`."""
    churn_samplers: tuple[Sampler, ...]
    """Those of them that take `churn`."""
    schedules: tuple[Schedule, ...]
    """Schedules that it accepts and this version of the SDK knows."""
    media_types: tuple[str, ...]
    """Formats that it writes."""
    license: License
