from sdapi.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Conditioning(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONDITIONING_UNSPECIFIED: _ClassVar[Conditioning]
    CONDITIONING_NONE: _ClassVar[Conditioning]
    CONDITIONING_INPAINTING: _ClassVar[Conditioning]
    CONDITIONING_DEPTH: _ClassVar[Conditioning]
    CONDITIONING_UPSCALING: _ClassVar[Conditioning]

class SafetyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAFETY_MODE_UNSPECIFIED: _ClassVar[SafetyMode]
    SAFETY_MODE_OFF: _ClassVar[SafetyMode]
    SAFETY_MODE_FLAG: _ClassVar[SafetyMode]
    SAFETY_MODE_BLUR: _ClassVar[SafetyMode]
    SAFETY_MODE_BLOCK: _ClassVar[SafetyMode]
CONDITIONING_UNSPECIFIED: Conditioning
CONDITIONING_NONE: Conditioning
CONDITIONING_INPAINTING: Conditioning
CONDITIONING_DEPTH: Conditioning
CONDITIONING_UPSCALING: Conditioning
SAFETY_MODE_UNSPECIFIED: SafetyMode
SAFETY_MODE_OFF: SafetyMode
SAFETY_MODE_FLAG: SafetyMode
SAFETY_MODE_BLUR: SafetyMode
SAFETY_MODE_BLOCK: SafetyMode

class Engine(_message.Message):
    __slots__ = ("id", "name", "description", "ready", "digest", "native_width", "native_height", "limits", "defaults", "samplers", "schedules", "media_types", "license", "eta_samplers", "churn_samplers", "image_to_image", "clip_guidance", "windows", "safety_mode", "block_cache", "loras", "conditioning", "estimates_depth", "upscaling")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NATIVE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    NATIVE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPES_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    ETA_SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    CHURN_SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TO_IMAGE_FIELD_NUMBER: _ClassVar[int]
    CLIP_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    SAFETY_MODE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_CACHE_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    ESTIMATES_DEPTH_FIELD_NUMBER: _ClassVar[int]
    UPSCALING_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    description: str
    ready: bool
    digest: str
    native_width: int
    native_height: int
    limits: EngineLimits
    defaults: EngineDefaults
    samplers: _containers.RepeatedScalarFieldContainer[_sampling_pb2.Sampler]
    schedules: _containers.RepeatedScalarFieldContainer[_sampling_pb2.Schedule]
    media_types: _containers.RepeatedScalarFieldContainer[str]
    license: License
    eta_samplers: _containers.RepeatedScalarFieldContainer[_sampling_pb2.Sampler]
    churn_samplers: _containers.RepeatedScalarFieldContainer[_sampling_pb2.Sampler]
    image_to_image: bool
    clip_guidance: ClipGuidanceSupport
    windows: WindowDefaults
    safety_mode: SafetyMode
    block_cache: bool
    loras: _containers.RepeatedCompositeFieldContainer[LoraInfo]
    conditioning: Conditioning
    estimates_depth: bool
    upscaling: UpscalingSupport
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., description: _Optional[str] = ..., ready: _Optional[bool] = ..., digest: _Optional[str] = ..., native_width: _Optional[int] = ..., native_height: _Optional[int] = ..., limits: _Optional[_Union[EngineLimits, _Mapping]] = ..., defaults: _Optional[_Union[EngineDefaults, _Mapping]] = ..., samplers: _Optional[_Iterable[_Union[_sampling_pb2.Sampler, str]]] = ..., schedules: _Optional[_Iterable[_Union[_sampling_pb2.Schedule, str]]] = ..., media_types: _Optional[_Iterable[str]] = ..., license: _Optional[_Union[License, _Mapping]] = ..., eta_samplers: _Optional[_Iterable[_Union[_sampling_pb2.Sampler, str]]] = ..., churn_samplers: _Optional[_Iterable[_Union[_sampling_pb2.Sampler, str]]] = ..., image_to_image: _Optional[bool] = ..., clip_guidance: _Optional[_Union[ClipGuidanceSupport, _Mapping]] = ..., windows: _Optional[_Union[WindowDefaults, _Mapping]] = ..., safety_mode: _Optional[_Union[SafetyMode, str]] = ..., block_cache: _Optional[bool] = ..., loras: _Optional[_Iterable[_Union[LoraInfo, _Mapping]]] = ..., conditioning: _Optional[_Union[Conditioning, str]] = ..., estimates_depth: _Optional[bool] = ..., upscaling: _Optional[_Union[UpscalingSupport, _Mapping]] = ...) -> None: ...

class UpscalingSupport(_message.Message):
    __slots__ = ("factor", "max_noise_level")
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    MAX_NOISE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    factor: int
    max_noise_level: int
    def __init__(self, factor: _Optional[int] = ..., max_noise_level: _Optional[int] = ...) -> None: ...

class LoraInfo(_message.Message):
    __slots__ = ("name", "title", "description", "trigger_words", "license", "sha256", "text_encoder")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_WORDS_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TEXT_ENCODER_FIELD_NUMBER: _ClassVar[int]
    name: str
    title: str
    description: str
    trigger_words: _containers.RepeatedScalarFieldContainer[str]
    license: License
    sha256: str
    text_encoder: bool
    def __init__(self, name: _Optional[str] = ..., title: _Optional[str] = ..., description: _Optional[str] = ..., trigger_words: _Optional[_Iterable[str]] = ..., license: _Optional[_Union[License, _Mapping]] = ..., sha256: _Optional[str] = ..., text_encoder: _Optional[bool] = ...) -> None: ...

class ClipGuidanceSupport(_message.Message):
    __slots__ = ("presets", "exact")
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    presets: _containers.RepeatedCompositeFieldContainer[ClipGuidancePreset]
    exact: bool
    def __init__(self, presets: _Optional[_Iterable[_Union[ClipGuidancePreset, _Mapping]]] = ..., exact: _Optional[bool] = ...) -> None: ...

class ClipGuidancePreset(_message.Message):
    __slots__ = ("name", "scale", "cutouts", "start", "end", "steps_per_gradient")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    CUTOUTS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    scale: float
    cutouts: int
    start: float
    end: float
    steps_per_gradient: int
    def __init__(self, name: _Optional[str] = ..., scale: _Optional[float] = ..., cutouts: _Optional[int] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., steps_per_gradient: _Optional[int] = ...) -> None: ...

class WindowDefaults(_message.Message):
    __slots__ = ("size", "overlap")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    size: int
    overlap: int
    def __init__(self, size: _Optional[int] = ..., overlap: _Optional[int] = ...) -> None: ...

class EngineLimits(_message.Message):
    __slots__ = ("min_size", "max_size", "max_pixels", "size_multiple", "max_steps", "max_image_count", "max_prompt_chunks", "max_image_bytes", "max_image_pixels")
    MIN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    SIZE_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    min_size: int
    max_size: int
    max_pixels: int
    size_multiple: int
    max_steps: int
    max_image_count: int
    max_prompt_chunks: int
    max_image_bytes: int
    max_image_pixels: int
    def __init__(self, min_size: _Optional[int] = ..., max_size: _Optional[int] = ..., max_pixels: _Optional[int] = ..., size_multiple: _Optional[int] = ..., max_steps: _Optional[int] = ..., max_image_count: _Optional[int] = ..., max_prompt_chunks: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ...) -> None: ...

class EngineDefaults(_message.Message):
    __slots__ = ("width", "height", "steps", "guidance_scale", "sampler", "schedule")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: _sampling_pb2.Sampler
    schedule: _sampling_pb2.Schedule
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[_Union[_sampling_pb2.Sampler, str]] = ..., schedule: _Optional[_Union[_sampling_pb2.Schedule, str]] = ...) -> None: ...

class License(_message.Message):
    __slots__ = ("name", "url", "use_restrictions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    USE_RESTRICTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    url: str
    use_restrictions: str
    def __init__(self, name: _Optional[str] = ..., url: _Optional[str] = ..., use_restrictions: _Optional[str] = ...) -> None: ...
