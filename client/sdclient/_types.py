"""What the SDK takes, and the engines that it lists: plain, frozen values. No gRPC and no protobuf here.

Whatever is None is left out of the request, and the server chooses it; 0 is a value. The defaults are the server's
alone: `Accepted.options` says what it chose, `Engine.defaults` what it will choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    import os

    from PIL.Image import Image as PILImage

    from ._events import Image

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
class Tls:
    """Whom a client trusts, and how it shows who it is. Files in PEM."""

    authorities: str | os.PathLike[str] | None = None
    """Of the server's certificate. None: the public ones."""
    certificate: str | os.PathLike[str] | None = None
    """This client's own certificate with its chain, for a server that wants one (mutual TLS)."""
    private_key: str | os.PathLike[str] | None = field(default=None, repr=False)
    """Its private key, unencrypted."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("a TLS certificate and its private key go together: give both, or neither")


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
    """Steers by a CLIP model's similarity to the prompt. `ClipGuidance()` turns on the engine's first preset."""

    scale: float | None = None
    """Strength, 0 to 10: the most that a step shifts the latents, in their standard deviations."""
    cutouts: int | None = None
    """Random crops that CLIP looks at in each evaluation, 0 (the whole image) to 64. Time grows with their number."""
    start: float | None = None
    """Fraction of the steps at which it starts, 0 to 1."""
    end: float | None = None
    """Fraction of the steps at which it ends, 0 to 1."""
    prompt: str | None = None
    """What CLIP is asked to see; None: the positive prompts, by weight."""
    preset: str | None = None
    """Name of one of `Engine.clip_guidance.presets`, the values of what is None here; None: the first one."""
    steps_per_gradient: int | None = None
    """Steps, 1 to 16, that one gradient serves; 1: each evaluation of the UNet has its own."""
    exact: bool = False
    """Takes the gradient through the UNet, too: about twice the time, and only where `Engine.clip_guidance.exact`."""


Fit = Literal["cover", "contain", "stretch"]
"""How an initial image or mask of another size becomes as wide and high as asked for: scaled in proportion until it
covers everything, and cut; until all of it is inside, and the rest repainted; or in both directions by themselves."""


@dataclass(frozen=True, slots=True)
class InitImage:
    """The image to start from instead of noise. Its transparent pixels are repainted.

    InitImage.open("lake.jpg", strength=0.5)    # a file
    InitImage.of(image, strength=0.5)           # an image that was generated, or a Pillow image
    """

    data: bytes = field(repr=False)
    """An encoded PNG, JPEG or WebP."""
    strength: float | None = None
    """How much of the schedule is run on it, 0 (keeps the image) to 1 (ignores it)."""
    fit: Fit | None = None
    """How it becomes as wide and high as asked for."""
    sha256: str | None = None
    """SHA-256 of `data` in lower-case hex. Resolved options have it, and no `data`."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, strength: float | None = None, fit: Fit | None = None) -> InitImage:
        """The image in a file."""
        return cls(Path(path).read_bytes(), strength, fit)

    @classmethod
    def of(cls, picture: Image | PILImage, *, strength: float | None = None, fit: Fit | None = None) -> InitImage:
        """A generated image as it is, or a Pillow image as PNG."""
        return cls(_encoded(picture), strength, fit)


@dataclass(frozen=True, slots=True)
class Mask:
    """The part of the initial image to repaint, fitted as that is.

    Mask.open("mask.png")    # a file
    Mask.of(drawing)         # a Pillow image
    """

    data: bytes = field(repr=False)
    """An encoded PNG, JPEG or WebP, read as grey: white is repainted, black is kept."""
    feather: float | None = None
    """Width of the soft border between kept and repainted in pixels, 0 to 64."""
    sha256: str | None = None
    """SHA-256 of `data` in lower-case hex. Resolved options have it, and no `data`."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, feather: float | None = None) -> Mask:
        """The mask in a file."""
        return cls(Path(path).read_bytes(), feather)

    @classmethod
    def of(cls, picture: Image | PILImage, *, feather: float | None = None) -> Mask:
        """A generated image as it is, or a Pillow image as PNG."""
        return cls(_encoded(picture), feather)


@dataclass(frozen=True, slots=True)
class Upscale:
    """How an upscaler enlarges the initial image."""

    noise_level: int | None = None
    """Noise that the image gets before, 0 (none) to `Engine.upscaling.max_noise_level`; None: 20."""


@dataclass(frozen=True, slots=True)
class DepthMap:
    """How far away everything in the result is: bright is near, dark is far; only differences count.

    DepthMap.open("depth.png")    # a file
    DepthMap.of(drawing)          # a Pillow image
    """

    data: bytes = field(repr=False)
    """An encoded PNG, JPEG or WebP, read as grey, of 16 bits where it has them."""
    fit: Fit | None = None
    """How it becomes as wide and high as the result; what `contain` leaves open is far."""
    sha256: str | None = None
    """SHA-256 of `data` in lower-case hex. Resolved options have it, and no `data`."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, fit: Fit | None = None) -> DepthMap:
        """The map in a file."""
        return cls(Path(path).read_bytes(), fit)

    @classmethod
    def of(cls, picture: Image | PILImage, *, fit: Fit | None = None) -> DepthMap:
        """A generated image as it is, or a Pillow image as PNG."""
        return cls(_encoded(picture), fit)


def _encoded(picture: Image | PILImage) -> bytes:
    from io import BytesIO

    from ._events import Image

    if isinstance(picture, Image):
        return picture._file()
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F"):
        # PNG has none of these.
        picture = picture.convert("RGB")
    file = BytesIO()
    # Where a photograph's upper edge is stands in its EXIF alone.
    picture.save(file, "PNG", exif=picture.getexif())
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Outpaint:
    """New margins around the initial image, in pixels of the result."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


@dataclass(frozen=True, slots=True)
class Variation:
    """Makes images that resemble that of the request's seed: image `i` moves towards that of `seed + i`."""

    strength: float
    """How far, 0 (the image of the request's seed) to 1 (the image of this seed)."""
    seed: int | None = None
    """0 to 2**63 - 1."""


@dataclass(frozen=True, slots=True)
class TwoPass:
    """Generates a smaller image first, enlarges it and denoises it again, so that large images stay coherent.

    `TwoPass()` turns it on.
    """

    width: int | None = None
    """Width of the first pass in pixels. None: as many pixels as the engine was trained for, in the request's
    proportions."""
    height: int | None = None
    """Height of the first pass in pixels; as `width`."""
    strength: float | None = None
    """How much of the schedule the second pass runs, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Overlapping windows in which images are denoised that are larger than the engine was trained for."""

    size: int | None = None
    """Width and height in pixels, a multiple of the engine's `size_multiple`; 0 turns windows off."""
    overlap: int | None = None
    """Overlap of neighbours in pixels, at most half of `size`."""


@dataclass(frozen=True, slots=True)
class BlockCache:
    """Block caching (DeepCache, arXiv:2312.00858): less time for a slightly other image.

    The whole UNet runs in the first of every so many steps; the others run its outermost blocks alone. `BlockCache()`
    turns it on. Not together with `ClipGuidance.exact`.
    """

    interval: int | None = None
    """Steps from one whole run to the next; 1 is no caching."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA of the engine."""

    name: str
    """Name of one of `Engine.loras`."""
    weight: float | None = None
    """How strongly it acts, -4 to 4; 0 switches it off, None is 1."""
    sha256: str | None = None
    """`LoraInfo.sha256` that it has to have. Resolved options have it."""


Loras = Sequence[Lora] | Mapping[str, float]
"""LoRAs, or their weights by name."""


@dataclass(frozen=True, slots=True)
class Output:
    """File format of the images."""

    media_type: str | None = None
    """`image/png`, `image/webp`, `image/jpeg` or `image/avif`."""
    quality: int | None = None
    """Quality of a lossy format, 1 to 100."""
    metadata: bool | None = None
    """Whether the files say how they were made (see `read_metadata`). None: they do."""


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
    """Starts from this image instead of pure noise. Without `width` and `height` the result has its size."""
    mask: Mask | None
    """Repaints only a part of `init_image`."""
    outpaint: Outpaint | None
    """Extends `init_image` beyond its borders."""
    upscale: Upscale | None
    """How `init_image` is enlarged; only where `Engine.upscaling`."""
    depth_map: DepthMap | None
    """How far away everything is; only where `Engine.conditioning` is `depth`, and required there unless
    `Engine.estimates_depth` and there is an `init_image`."""
    variation: Variation | None
    """Makes variations of the image of `seed`, which all images then have."""
    two_pass: TwoPass | None
    """Generates a smaller image first and enlarges it."""
    loras: Loras | None
    """LoRAs of `Engine.loras`, at most 8, for all prompts and steps: `{"name": 0.8}`, or `[Lora("name", 0.8)]`."""
    block_cache: BlockCache | None
    """Runs the whole UNet only in some of the steps; only where `Engine.block_cache`."""
    windows: Windows | None
    """Denoises large images in overlapping windows of this size, instead of the engine's."""
    tile_x: bool | None
    """Makes the right border continue at the left one, so that images can be laid side by side without a seam. The
    width is then a multiple of the engine's `size_multiple`."""
    tile_y: bool | None
    """Makes the lower border continue at the upper one; as `tile_x`."""
    output: Output | None
    """File format of the images."""
    preview: PreviewOptions | None
    """Turns on previews while denoising."""
    request_id: str | None
    """Names this request in logs, errors and events; at most 128 printable ASCII characters."""
    timeout: float | None
    """Seconds for the whole call, retries included, instead of the client's `timeout`. None: no limit."""


@dataclass(frozen=True, slots=True)
class ClipGuidancePreset:
    """Values of `ClipGuidance` under a name."""

    name: str
    scale: float
    cutouts: int
    start: float
    end: float
    steps_per_gradient: int


@dataclass(frozen=True, slots=True)
class ClipGuidanceSupport:
    """What CLIP guidance can do with an engine."""

    presets: tuple[ClipGuidancePreset, ...]
    """The default one first."""
    exact: bool
    """Whether it takes `ClipGuidance.exact`."""


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
    max_image_bytes: int
    """Most bytes of an initial image or mask."""
    max_image_pixels: int
    """Most pixels of an initial image or mask."""


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


SafetyMode = Literal["off", "flag", "blur", "block"]
"""What the server's safety check does with an image to which it objects: there is no check, or the image is sent as it
is, sent blurred beyond recognition, or not sent. Previews are unchecked: `blur` blurs them, `block` leaves them out."""


Conditioning = Literal["none", "inpainting", "depth", "upscaling"]
"""What an engine's UNet takes beside noise and prompts: nothing, what is kept of `init_image` and where, `depth_map`,
or `init_image` as the image to enlarge."""


@dataclass(frozen=True, slots=True)
class UpscalingSupport:
    """How an engine enlarges images."""

    factor: int
    """Pixels of the result, in each direction, for one of the initial image."""
    max_noise_level: int
    """Greatest `Upscale.noise_level`."""


@dataclass(frozen=True, slots=True)
class WindowDefaults:
    """How an engine denoises images larger than it was trained for."""

    size: int
    """Width and height of a window, in pixels."""
    overlap: int
    """Overlap of neighbours, in pixels."""


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A LoRA of an engine: small changes to its weights, for a style or a subject."""

    name: str
    """Names it in requests."""
    title: str
    """Name for people. May be empty."""
    description: str
    """What it is for. May be empty."""
    trigger_words: tuple[str, ...]
    """Words for the prompt that it was trained on. May be empty."""
    sha256: str
    """The same engine, request and LoRAs give the same images."""
    text_encoder: bool
    """Whether it changes the text encoder, too."""
    license: License | None = None
    """Under which terms it may be used. None: not known."""


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
    image_to_image: bool = False
    """Whether it takes `init_image`, `mask`, `outpaint` and `two_pass`."""
    windows: WindowDefaults | None = None
    """Its windows for images larger than it was trained for. None: it takes none."""
    clip_guidance: ClipGuidanceSupport | None = None
    """What CLIP guidance can do. None: the engine has none."""
    safety_mode: SafetyMode | None = None
    """What the server's safety check does. None: it does not say."""
    block_cache: bool = False
    """Whether it takes `block_cache`."""
    upscaling: UpscalingSupport | None = None
    """How it enlarges images. None: it does not."""
    estimates_depth: bool = False
    """Whether it estimates the depth of `init_image` where a request has no `depth_map`."""
    conditioning: Conditioning | None = None
    """What its UNet takes beside noise and prompts. None: the server does not say, or this version does not know it."""
    loras: tuple[LoraInfo, ...] = ()
    """What `loras` may name. They come and go while the server runs, and leave `digest` as it is."""
