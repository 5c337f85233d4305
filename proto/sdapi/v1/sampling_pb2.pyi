from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class Sampler(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAMPLER_UNSPECIFIED: _ClassVar[Sampler]
    SAMPLER_DDIM: _ClassVar[Sampler]
    SAMPLER_EULER: _ClassVar[Sampler]
    SAMPLER_EULER_ANCESTRAL: _ClassVar[Sampler]
    SAMPLER_HEUN: _ClassVar[Sampler]
    SAMPLER_DPMPP_2M: _ClassVar[Sampler]
    SAMPLER_DPMPP_2M_SDE: _ClassVar[Sampler]
    SAMPLER_UNIPC: _ClassVar[Sampler]
    SAMPLER_DDPM: _ClassVar[Sampler]
    SAMPLER_DPM2: _ClassVar[Sampler]
    SAMPLER_DPM2_ANCESTRAL: _ClassVar[Sampler]
    SAMPLER_LMS: _ClassVar[Sampler]
    SAMPLER_DPMPP_2S_ANCESTRAL: _ClassVar[Sampler]
    SAMPLER_DPMPP_SDE: _ClassVar[Sampler]
    SAMPLER_DPMPP_3M_SDE: _ClassVar[Sampler]
    SAMPLER_LCM: _ClassVar[Sampler]

class Schedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEDULE_UNSPECIFIED: _ClassVar[Schedule]
    SCHEDULE_NATIVE: _ClassVar[Schedule]
    SCHEDULE_KARRAS: _ClassVar[Schedule]
    SCHEDULE_EXPONENTIAL: _ClassVar[Schedule]
SAMPLER_UNSPECIFIED: Sampler
SAMPLER_DDIM: Sampler
SAMPLER_EULER: Sampler
SAMPLER_EULER_ANCESTRAL: Sampler
SAMPLER_HEUN: Sampler
SAMPLER_DPMPP_2M: Sampler
SAMPLER_DPMPP_2M_SDE: Sampler
SAMPLER_UNIPC: Sampler
SAMPLER_DDPM: Sampler
SAMPLER_DPM2: Sampler
SAMPLER_DPM2_ANCESTRAL: Sampler
SAMPLER_LMS: Sampler
SAMPLER_DPMPP_2S_ANCESTRAL: Sampler
SAMPLER_DPMPP_SDE: Sampler
SAMPLER_DPMPP_3M_SDE: Sampler
SAMPLER_LCM: Sampler
SCHEDULE_UNSPECIFIED: Schedule
SCHEDULE_NATIVE: Schedule
SCHEDULE_KARRAS: Schedule
SCHEDULE_EXPONENTIAL: Schedule
