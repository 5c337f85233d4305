import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from sdapi.v1 import engine_pb2 as _engine_pb2
from sdapi.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Blending(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLENDING_UNSPECIFIED: _ClassVar[Blending]
    BLENDING_TEXT_ENCODER: _ClassVar[Blending]
    BLENDING_COMPOSABLE: _ClassVar[Blending]

class Fit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIT_UNSPECIFIED: _ClassVar[Fit]
    FIT_COVER: _ClassVar[Fit]
    FIT_CONTAIN: _ClassVar[Fit]
    FIT_STRETCH: _ClassVar[Fit]

class SafetyOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAFETY_OUTCOME_UNSPECIFIED: _ClassVar[SafetyOutcome]
    SAFETY_OUTCOME_PASSED: _ClassVar[SafetyOutcome]
    SAFETY_OUTCOME_FLAGGED: _ClassVar[SafetyOutcome]
    SAFETY_OUTCOME_BLURRED: _ClassVar[SafetyOutcome]
    SAFETY_OUTCOME_BLOCKED: _ClassVar[SafetyOutcome]
BLENDING_UNSPECIFIED: Blending
BLENDING_TEXT_ENCODER: Blending
BLENDING_COMPOSABLE: Blending
FIT_UNSPECIFIED: Fit
FIT_COVER: Fit
FIT_CONTAIN: Fit
FIT_STRETCH: Fit
SAFETY_OUTCOME_UNSPECIFIED: SafetyOutcome
SAFETY_OUTCOME_PASSED: SafetyOutcome
SAFETY_OUTCOME_FLAGGED: SafetyOutcome
SAFETY_OUTCOME_BLURRED: SafetyOutcome
SAFETY_OUTCOME_BLOCKED: SafetyOutcome

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "engine", "prompts", "blending", "width", "height", "steps", "sampler", "schedule", "seed", "image_count", "guidance_scale", "guidance_interval", "clip_guidance", "init_image", "mask", "output", "preview", "eta", "churn", "guidance_rescale", "seeds", "outpaint", "variation", "two_pass", "windows", "tile_x", "tile_y", "block_cache", "loras", "depth_map", "upscale")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    BLENDING_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    CLIP_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    CHURN_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_RESCALE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    OUTPAINT_FIELD_NUMBER: _ClassVar[int]
    VARIATION_FIELD_NUMBER: _ClassVar[int]
    TWO_PASS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    TILE_X_FIELD_NUMBER: _ClassVar[int]
    TILE_Y_FIELD_NUMBER: _ClassVar[int]
    BLOCK_CACHE_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    DEPTH_MAP_FIELD_NUMBER: _ClassVar[int]
    UPSCALE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    engine: str
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    blending: Blending
    width: int
    height: int
    steps: int
    sampler: _sampling_pb2.Sampler
    schedule: _sampling_pb2.Schedule
    seed: int
    image_count: int
    guidance_scale: float
    guidance_interval: GuidanceInterval
    clip_guidance: ClipGuidance
    init_image: InitImage
    mask: Mask
    output: Output
    preview: PreviewOptions
    eta: float
    churn: float
    guidance_rescale: float
    seeds: _containers.RepeatedScalarFieldContainer[int]
    outpaint: Outpaint
    variation: Variation
    two_pass: TwoPass
    windows: Windows
    tile_x: bool
    tile_y: bool
    block_cache: BlockCache
    loras: _containers.RepeatedCompositeFieldContainer[Lora]
    depth_map: DepthMap
    upscale: Upscale
    def __init__(self, request_id: _Optional[str] = ..., engine: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., blending: _Optional[_Union[Blending, str]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., sampler: _Optional[_Union[_sampling_pb2.Sampler, str]] = ..., schedule: _Optional[_Union[_sampling_pb2.Schedule, str]] = ..., seed: _Optional[int] = ..., image_count: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., guidance_interval: _Optional[_Union[GuidanceInterval, _Mapping]] = ..., clip_guidance: _Optional[_Union[ClipGuidance, _Mapping]] = ..., init_image: _Optional[_Union[InitImage, _Mapping]] = ..., mask: _Optional[_Union[Mask, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., preview: _Optional[_Union[PreviewOptions, _Mapping]] = ..., eta: _Optional[float] = ..., churn: _Optional[float] = ..., guidance_rescale: _Optional[float] = ..., seeds: _Optional[_Iterable[int]] = ..., outpaint: _Optional[_Union[Outpaint, _Mapping]] = ..., variation: _Optional[_Union[Variation, _Mapping]] = ..., two_pass: _Optional[_Union[TwoPass, _Mapping]] = ..., windows: _Optional[_Union[Windows, _Mapping]] = ..., tile_x: _Optional[bool] = ..., tile_y: _Optional[bool] = ..., block_cache: _Optional[_Union[BlockCache, _Mapping]] = ..., loras: _Optional[_Iterable[_Union[Lora, _Mapping]]] = ..., depth_map: _Optional[_Union[DepthMap, _Mapping]] = ..., upscale: _Optional[_Union[Upscale, _Mapping]] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("name", "weight", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    sha256: str
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., sha256: _Optional[str] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "weight", "emphasis")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    EMPHASIS_FIELD_NUMBER: _ClassVar[int]
    text: str
    weight: float
    emphasis: _containers.RepeatedCompositeFieldContainer[Emphasis]
    def __init__(self, text: _Optional[str] = ..., weight: _Optional[float] = ..., emphasis: _Optional[_Iterable[_Union[Emphasis, _Mapping]]] = ...) -> None: ...

class Emphasis(_message.Message):
    __slots__ = ("start", "end", "factor")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    factor: float
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., factor: _Optional[float] = ...) -> None: ...

class GuidanceInterval(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: float
    end: float
    def __init__(self, start: _Optional[float] = ..., end: _Optional[float] = ...) -> None: ...

class ClipGuidance(_message.Message):
    __slots__ = ("scale", "cutouts", "start", "end", "prompt", "preset", "exact", "steps_per_gradient")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    CUTOUTS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    scale: float
    cutouts: int
    start: float
    end: float
    prompt: str
    preset: str
    exact: bool
    steps_per_gradient: int
    def __init__(self, scale: _Optional[float] = ..., cutouts: _Optional[int] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., prompt: _Optional[str] = ..., preset: _Optional[str] = ..., exact: _Optional[bool] = ..., steps_per_gradient: _Optional[int] = ...) -> None: ...

class InitImage(_message.Message):
    __slots__ = ("data", "strength", "fit", "sha256")
    DATA_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    strength: float
    fit: Fit
    sha256: str
    def __init__(self, data: _Optional[bytes] = ..., strength: _Optional[float] = ..., fit: _Optional[_Union[Fit, str]] = ..., sha256: _Optional[str] = ...) -> None: ...

class Upscale(_message.Message):
    __slots__ = ("noise_level",)
    NOISE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    noise_level: int
    def __init__(self, noise_level: _Optional[int] = ...) -> None: ...

class DepthMap(_message.Message):
    __slots__ = ("data", "sha256", "fit")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    sha256: str
    fit: Fit
    def __init__(self, data: _Optional[bytes] = ..., sha256: _Optional[str] = ..., fit: _Optional[_Union[Fit, str]] = ...) -> None: ...

class Mask(_message.Message):
    __slots__ = ("data", "feather", "sha256")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FEATHER_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    feather: float
    sha256: str
    def __init__(self, data: _Optional[bytes] = ..., feather: _Optional[float] = ..., sha256: _Optional[str] = ...) -> None: ...

class Outpaint(_message.Message):
    __slots__ = ("left", "right", "top", "bottom")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    left: int
    right: int
    top: int
    bottom: int
    def __init__(self, left: _Optional[int] = ..., right: _Optional[int] = ..., top: _Optional[int] = ..., bottom: _Optional[int] = ...) -> None: ...

class Variation(_message.Message):
    __slots__ = ("seed", "strength")
    SEED_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    seed: int
    strength: float
    def __init__(self, seed: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class TwoPass(_message.Message):
    __slots__ = ("width", "height", "strength")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    strength: float
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class Windows(_message.Message):
    __slots__ = ("size", "overlap")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    size: int
    overlap: int
    def __init__(self, size: _Optional[int] = ..., overlap: _Optional[int] = ...) -> None: ...

class BlockCache(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: int
    def __init__(self, interval: _Optional[int] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("media_type", "quality", "metadata")
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    media_type: str
    quality: int
    metadata: bool
    def __init__(self, media_type: _Optional[str] = ..., quality: _Optional[int] = ..., metadata: _Optional[bool] = ...) -> None: ...

class PreviewOptions(_message.Message):
    __slots__ = ("every_steps",)
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    def __init__(self, every_steps: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "preview", "image", "finished")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    preview: Preview
    image: Image
    finished: Finished
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request", "queue_position", "prompt_usage")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_USAGE_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    queue_position: int
    prompt_usage: _containers.RepeatedCompositeFieldContainer[PromptUsage]
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., queue_position: _Optional[int] = ..., prompt_usage: _Optional[_Iterable[_Union[PromptUsage, _Mapping]]] = ...) -> None: ...

class PromptUsage(_message.Message):
    __slots__ = ("tokens", "chunks")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    chunks: int
    def __init__(self, tokens: _Optional[int] = ..., chunks: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "steps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    steps: int
    def __init__(self, step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("index", "step", "data", "media_type", "width", "height")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    index: int
    step: int
    data: bytes
    media_type: str
    width: int
    height: int
    def __init__(self, index: _Optional[int] = ..., step: _Optional[int] = ..., data: _Optional[bytes] = ..., media_type: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("index", "seed", "data", "media_type", "width", "height", "safety", "signed")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SAFETY_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    index: int
    seed: int
    data: bytes
    media_type: str
    width: int
    height: int
    safety: Safety
    signed: bool
    def __init__(self, index: _Optional[int] = ..., seed: _Optional[int] = ..., data: _Optional[bytes] = ..., media_type: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., safety: _Optional[_Union[Safety, _Mapping]] = ..., signed: _Optional[bool] = ...) -> None: ...

class Safety(_message.Message):
    __slots__ = ("outcome", "scores")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    outcome: SafetyOutcome
    scores: _containers.RepeatedCompositeFieldContainer[SafetyScore]
    def __init__(self, outcome: _Optional[_Union[SafetyOutcome, str]] = ..., scores: _Optional[_Iterable[_Union[SafetyScore, _Mapping]]] = ...) -> None: ...

class SafetyScore(_message.Message):
    __slots__ = ("label", "score", "threshold")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    label: str
    score: float
    threshold: float
    def __init__(self, label: _Optional[str] = ..., score: _Optional[float] = ..., threshold: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("usage", "timings")
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    usage: Usage
    timings: Timings
    def __init__(self, usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("image_count", "unet_rows", "pixel_steps", "clip_gradients", "cached_rows")
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    UNET_ROWS_FIELD_NUMBER: _ClassVar[int]
    PIXEL_STEPS_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_ROWS_FIELD_NUMBER: _ClassVar[int]
    image_count: int
    unet_rows: int
    pixel_steps: int
    clip_gradients: int
    cached_rows: int
    def __init__(self, image_count: _Optional[int] = ..., unet_rows: _Optional[int] = ..., pixel_steps: _Optional[int] = ..., clip_gradients: _Optional[int] = ..., cached_rows: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue", "encode", "denoise", "decode", "total")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    DENOISE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    queue: _duration_pb2.Duration
    encode: _duration_pb2.Duration
    denoise: _duration_pb2.Duration
    decode: _duration_pb2.Duration
    total: _duration_pb2.Duration
    def __init__(self, queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., denoise: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., total: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ListEnginesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[_engine_pb2.Engine]
    def __init__(self, engines: _Optional[_Iterable[_Union[_engine_pb2.Engine, _Mapping]]] = ...) -> None: ...
