"""Enums of the wire as the names that the server uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdapi.v1 import engine_pb2, generation_pb2, sampling_pb2

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper


class Names:
    """A proto enum as the names that the server uses: SAMPLER_DPMPP_2M is `dpmpp_2m`."""

    def __init__(self, enum: _EnumTypeWrapper[int], prefix: str) -> None:
        self._by_number = {
            number: name.removeprefix(prefix).lower()
            for name, number in enum.items()
            if not name.endswith("UNSPECIFIED")
        }
        self._by_name = {name: number for number, name in self._by_number.items()}

    def name(self, number: int) -> str | None:
        return self._by_number.get(number)

    def number(self, name: str) -> int:
        return self._by_name[name]


SAMPLER_NAMES = Names(sampling_pb2.Sampler, "SAMPLER_")
SCHEDULE_NAMES = Names(sampling_pb2.Schedule, "SCHEDULE_")
CONDITIONING_NAMES = Names(engine_pb2.Conditioning, "CONDITIONING_")
FIT_NAMES = Names(generation_pb2.Fit, "FIT_")
SAFETY_MODE_NAMES = Names(engine_pb2.SafetyMode, "SAFETY_MODE_")
SAFETY_OUTCOME_NAMES = Names(generation_pb2.SafetyOutcome, "SAFETY_OUTCOME_")
BLENDING_NAMES = Names(generation_pb2.Blending, "BLENDING_")
