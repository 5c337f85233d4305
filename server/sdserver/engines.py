"""Engines as data: a folder below `<model repository>/engines/` with a descriptor, `engine.json`, and the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdserver.samplers import SAMPLERS
from sdserver.schedules import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DESCRIPTOR = "engine.json"
# Below an engine's folder: for each LoRA a `LoraInfo`, `<name>.json`, and its tensors, `<sha256>.safetensors`.
LORAS = "loras"
# Of one request, and of one row of the UNet.
MAX_LORAS = 8
SCHEDULES = ("native", "karras", "exponential")
# The models that every engine has, and those that it may have.
ROLES = ("text_encoder", "unet", "vae_decoder")
OPTIONAL_ROLES = ("vae_encoder", "clip_guidance", "unet_gradient", "unet_cache", "depth_estimator")
# The model that an engine has as soon as it has LoRAs.
LORA_ROLE = "unet_lora"

# No more than a file's name can be on every system.
LORA_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Positive = Annotated[int, Field(gt=0)]
Conditioning = Literal["none", "inpainting", "depth", "upscaling"]
# Of a picture.
COLOURS = 3


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latents(_Data):
    """Shape of the UNet's space: `channels` at 1 / `downsampling` of the image's width and height."""

    channels: Positive
    downsampling: Positive


class TextEncoder(_Data):
    """Text states are [context_length, width] a chunk; start and end take two of its tokens."""

    context_length: Positive
    width: Positive
    # After which block of the tower they are taken: SD 2 leaves out the last one that it has.
    layer: Literal["penultimate", "last"] = "penultimate"
    # What fills a chunk up: token 0, as in SD 2, or the end token, as in SD 1.
    padding: Literal["zero", "end"] = "zero"


class PreviewMap(_Data):
    """Linear map from latents to RGB, 0 to 1: `rgb = matrix @ latents + bias` at each place of the latents."""

    matrix: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    bias: tuple[float, float, float]


class Limits(_Data):
    """What requests may ask for. Sizes in pixels."""

    min_size: Positive
    max_size: Positive
    max_pixels: Positive
    size_multiple: Positive
    max_steps: Positive
    max_image_count: Positive
    max_prompt_chunks: Positive
    max_image_bytes: Positive
    max_image_pixels: Positive


class Defaults(_Data):
    """What holds when a request leaves things open. Sizes in pixels."""

    width: Positive
    height: Positive
    steps: Positive
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    sampler: str
    schedule: str


class ClipGuidancePreset(_Data):
    """Values of CLIP guidance under a name; `request.ClipGuidance` says what they mean."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    scale: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
    cutouts: Annotated[int, Field(ge=0, le=64)]
    start: Annotated[float, Field(ge=0, le=1)]
    end: Annotated[float, Field(ge=0, le=1)]
    steps_per_gradient: Annotated[int, Field(ge=1, le=16)]

    @model_validator(mode="after")
    def _consistent(self) -> ClipGuidancePreset:
        if self.start >= self.end:
            raise ValueError(f"preset {self.name} ends at {self.end:g}, which must be after its start, {self.start:g}")
        return self


class ClipGuidance(_Data):
    """What CLIP guidance can do with the engine: its presets, the default one first."""

    presets: Annotated[tuple[ClipGuidancePreset, ...], Field(min_length=1)]
    # To how many pixels in each direction a cutout is decoded at most: bounds time and memory at any image size.
    cutout_size: Positive
    # The most rows of one call. They are computed one by one, so that few rows cost little, and the images that have
    # their answer take their next UNet step while the others wait for theirs.
    max_batch_rows: Positive

    def preset(self, name: str) -> ClipGuidancePreset | None:
        """The preset of that name, for an empty name the default one; None if there is none."""
        return next((preset for preset in self.presets if name in ("", preset.name)), None)


class BlockCache(_Data):
    """What the role `unet_cache` hands over between steps."""

    # Of the last up block's input: the second of the UNet's `block_out_channels`.
    channels: Positive


class Windows(_Data):
    """Overlapping squares in which an image is worked on. Sizes in pixels."""

    size: Positive
    overlap: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _consistent(self) -> Windows:
        if self.overlap > self.size // 2:
            raise ValueError(f"overlap is {self.overlap}; it must be at most half of size, {self.size}")
        return self


class Upscaling(_Data):
    """How an upscaler takes the image that it enlarges, which has as many pixels as the latents have places.

    It gets noise of one of the levels of `noise_schedule`, counted by training timesteps, and the UNet is told which.
    """

    noise_schedule: NoiseSchedule
    max_noise_level: Annotated[int, Field(ge=0)]


class License(_Data):
    """Under which terms the engine may be used."""

    name: str
    url: str = ""
    use_restrictions: str = ""


class LoraSource(_Data):
    """The file that a LoRA was made from."""

    file: str
    sha256: str


class LoraInfo(_Data):
    """A LoRA of an engine, as its `loras/<name>.json` describes it. `sdserver lora add` writes it."""

    name: Annotated[str, Field(pattern=LORA_NAME)]
    title: str = ""
    description: str = ""
    trigger_words: tuple[str, ...] = ()
    # None: nothing is known of it.
    license: License | None = None
    # Of its tensors.
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    # How many it changes.
    unet_modules: Annotated[int, Field(ge=0)]
    text_encoder_modules: Annotated[int, Field(ge=0)]
    # The greatest of all modules.
    rank: Positive
    source: LoraSource

    @property
    def file(self) -> str:
        """Its tensors, below the engine's folder."""
        return f"{LORAS}/{self.sha256}.safetensors"


class Source(_Data):
    """The checkpoint that `sdserver engine add` made the engine from."""

    name: str
    # Commit of the hub's repository; empty for files of this machine.
    revision: str = ""
    dtype: Literal["fp16", "bf16", "fp32"]
    # File -> SHA-256.
    files: dict[str, str]
    # Of sources and options together: the same plan makes the same engine.
    plan: str


class Engine(_Data):
    """One engine, as its `engine.json` describes it."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    name: str
    description: str
    prediction_type: Literal["epsilon", "v_prediction"]
    noise_schedule: NoiseSchedule
    latents: Latents
    # What the UNet takes beside the noisy latents, as channels after theirs: see `conditioning`.
    conditioning: Conditioning = "none"
    text_encoder: TextEncoder
    native_width: Positive
    native_height: Positive
    limits: Limits
    defaults: Defaults
    license: License
    # Fitted by `scripts/fit_preview.py`. None: the engine has no previews.
    preview_map: PreviewMap | None = None
    # The most rows of one UNet call; `max_batch_size` of the engine's UNet in Triton is at least this.
    max_batch_rows: Positive
    # Those of OPTIONAL_ROLES that the engine has a model for.
    optional_roles: tuple[str, ...] = ()
    # For engines with the role `clip_guidance`; `unet_gradient` adds the exact mode.
    clip_guidance: ClipGuidance | None = None
    # For engines with the role `unet_cache`.
    block_cache: BlockCache | None = None
    # For engines whose conditioning is upscaling.
    upscaling: Upscaling | None = None
    # In which images are denoised that are larger than one of them and an overlap. None: always as a whole.
    windows: Windows | None = None
    # In which latents are decoded that are larger than one of them: bounds the decoder's memory. None: as a whole.
    decode_tile: Windows | None = None
    # File below the engine's folder -> SHA-256. Because they stand in the descriptor, its digest covers the weights.
    weights: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    # None: the engine was not made by `sdserver engine add`.
    source: Source | None = None
    # Not of the descriptor: what lies in `loras/`. They come and go without a change of the engine.
    loras: tuple[LoraInfo, ...] = ()
    digest: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Engine:
        if self.defaults.sampler not in SAMPLERS:
            raise ValueError(f"defaults.sampler is {self.defaults.sampler!r}; it must be one of {', '.join(SAMPLERS)}")
        if self.defaults.schedule not in SCHEDULES:
            raise ValueError(
                f"defaults.schedule is {self.defaults.schedule!r}; it must be one of {', '.join(SCHEDULES)}"
            )
        if unknown := set(self.optional_roles) - set(OPTIONAL_ROLES):
            raise ValueError(
                f"optional_roles has {', '.join(sorted(unknown))}; it may have {', '.join(OPTIONAL_ROLES)}"
            )
        if (self.clip_guidance is None) == ("clip_guidance" in self.optional_roles):
            raise ValueError("an engine has clip_guidance and its optional role of that name, or neither")
        if "unet_gradient" in self.optional_roles and self.clip_guidance is None:
            raise ValueError("the optional role unet_gradient is for clip_guidance, which the engine has not")
        if self.clip_guidance and len({p.name for p in self.clip_guidance.presets}) < len(self.clip_guidance.presets):
            raise ValueError("two presets of clip_guidance have the same name")
        if (self.block_cache is None) == ("unet_cache" in self.optional_roles):
            raise ValueError("an engine has block_cache and the optional role unet_cache, or neither")
        if (self.upscaling is None) == (self.conditioning == "upscaling"):
            raise ValueError("an engine has upscaling and the conditioning of that name, or neither")
        if self.upscaling and self.upscaling.max_noise_level >= self.upscaling.noise_schedule.train_timesteps:
            raise ValueError("upscaling.max_noise_level must be less than its noise_schedule.train_timesteps")
        if "depth_estimator" in self.optional_roles and self.conditioning != "depth":
            raise ValueError("the optional role depth_estimator is for engines whose conditioning is depth")
        if self.conditioning == "inpainting" and "vae_encoder" not in self.optional_roles:
            raise ValueError("an inpainting engine needs the optional role vae_encoder, for what it is to keep")
        if self.limits.size_multiple % self.latents.downsampling:
            raise ValueError("limits.size_multiple must be a multiple of latents.downsampling")
        if self.windows and self.windows.size % self.limits.size_multiple:
            raise ValueError("windows.size must be a multiple of limits.size_multiple")
        for windows in filter(None, (self.windows, self.decode_tile)):
            if windows.size % self.latents.downsampling or windows.overlap % self.latents.downsampling:
                raise ValueError("windows and decode_tile must be in multiples of latents.downsampling")
        if self.preview_map and any(len(row) != self.latents.channels for row in self.preview_map.matrix):
            raise ValueError("each row of preview_map.matrix needs latents.channels numbers")
        if self.noise_schedule.rescale_zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("rescale_zero_terminal_snr needs v_prediction: pure noise says nothing about its epsilon")
        # Fails now, and not in a request, if the schedule has no room for so many steps.
        self.noise_schedule.native(self.limits.max_steps)
        return self

    def model(self, role: str) -> str:
        """Name of the engine's Triton model for a role, such as `tiny-landscape.unet`."""
        return f"{self.id}.{role}"

    @property
    def unet_channels(self) -> int:
        """Channels that the UNet takes: the noisy latents, then those of the conditioning."""
        further = {
            "none": 0,
            "inpainting": 1 + self.latents.channels,
            "depth": 1,
            # The image and, the same number everywhere, its noise level.
            "upscaling": COLOURS + 1,
        }
        return self.latents.channels + further[self.conditioning]

    @property
    def roles(self) -> tuple[str, ...]:
        """What the engine has models for."""
        return (*ROLES, *self.optional_roles, *((LORA_ROLE,) if self.loras else ()))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all Triton models of the engine."""
        return tuple(self.model(role) for role in self.roles)

    @property
    def files(self) -> dict[str, str]:
        """All files with weights, those of LoRAs included, below the engine's folder -> SHA-256."""
        return {**self.weights, **{lora.file: lora.sha256 for lora in self.loras}}

    def lora(self, name: str) -> LoraInfo | None:
        """The LoRA of that name, if there is one."""
        return next((lora for lora in self.loras if lora.name == name), None)

    def sigmas(self, schedule: str, steps: int) -> tuple[float, ...]:
        """[steps + 1] noise levels of a generation by one of SCHEDULES, decreasing to 0."""
        levels = self.noise_schedule
        return {"native": levels.native, "karras": levels.karras, "exponential": levels.exponential}[schedule](steps)

    def padded_size(self, width: int, height: int) -> tuple[int, int]:
        """The size, in pixels, at which an image of this size is generated before it is cropped."""
        multiple = self.limits.size_multiple
        return -(-width // multiple) * multiple, -(-height // multiple) * multiple


class EngineError(Exception):
    """The engines cannot be read; says which file is wrong and why."""


@dataclass(slots=True)
class Catalog:
    """The engines of a server, the default one first. They change as a whole, while requests run (`engine_watch`)."""

    engines: tuple[Engine, ...]

    @property
    def default(self) -> Engine:
        return self.engines[0]

    def get(self, engine_id: str) -> Engine | None:
        return next((engine for engine in self.engines if engine.id == engine_id), None)

    def __iter__(self) -> Iterator[Engine]:
        return iter(self.engines)


def load_engine(folder: Path) -> Engine:
    """Reads and checks `folder/engine.json` and the descriptions of its LoRAs. Raises EngineError."""
    path = folder / DESCRIPTOR
    loras = [load_lora(each) for each in sorted((folder / LORAS).glob("*.json"))]
    try:
        text = path.read_bytes()
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        engine = Engine.model_validate({**json.loads(text), "digest": digest, "loras": loras})
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(f"{path} is not a valid engine descriptor: {error}") from error
    if engine.id != folder.name:
        raise EngineError(f"{path} names its engine {engine.id!r}, but its folder is {folder.name!r}; make them equal")
    return engine


def load_lora(path: Path) -> LoraInfo:
    """Reads and checks the description of a LoRA. Raises EngineError."""
    try:
        lora = LoraInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(f"{path} is not a valid description of a LoRA: {error}") from error
    if lora.name != path.stem:
        raise EngineError(f"{path} names its LoRA {lora.name!r}; make both equal")
    return lora


def load_catalog(model_repository: Path, default_engine: str = "") -> Catalog:
    """Reads all engines of a model repository, by name, the default one first. Raises EngineError."""
    folders = sorted(path.parent for path in (model_repository / "engines").glob(f"*/{DESCRIPTOR}"))
    if not folders:
        raise EngineError(
            f"no engine in {model_repository / 'engines'}; set SDSERVER_MODEL_REPOSITORY to a folder that has one"
        )
    engines = [load_engine(folder) for folder in folders]
    if default_engine:
        if default_engine not in {engine.id for engine in engines}:
            raise EngineError(
                f"default_engine is {default_engine!r}; it must be one of {', '.join(engine.id for engine in engines)}"
            )
        engines.sort(key=lambda engine: engine.id != default_engine)
    return Catalog(tuple(engines))
