"""The one door between the SDK's types and the messages of `sdapi.v1`, and how its channels are set up.

gRPC and protobuf are most of what the SDK costs to import, so they are imported where they are used: the first client
pays for them, not `import sdclient`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from ._errors import InvalidRequestError, PromptSyntaxError
from ._events import (
    Accepted,
    Finished,
    Image,
    Preview,
    Progress,
    PromptUsage,
    Safety,
    SafetyOutcome,
    SafetyScore,
    Timings,
    Usage,
)
from ._prompts import parse_prompts
from ._types import (
    Blending,
    BlockCache,
    ClipGuidance,
    ClipGuidancePreset,
    ClipGuidanceSupport,
    Conditioning,
    DepthMap,
    Emphasis,
    Engine,
    EngineDefaults,
    EngineLimits,
    Fit,
    GenerateOptions,
    GuidanceInterval,
    InitImage,
    License,
    Lora,
    LoraInfo,
    Mask,
    Outpaint,
    Output,
    PreviewOptions,
    Prompt,
    SafetyMode,
    Sampler,
    Schedule,
    Tls,
    TwoPass,
    Upscale,
    UpscalingSupport,
    Variation,
    WindowDefaults,
    Windows,
)

if TYPE_CHECKING:
    import os

    import grpc
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message
    from sdapi.v1 import generation_pb2
    from sdapi.v1.generation_pb2 import GenerateRequest, GenerateResponse, ListEnginesRequest, ListEnginesResponse

    from ._events import Event
    from ._types import Prompts

_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "sdapi.v1.GenerationService"}],
            # gRPC retries only while no event has arrived, waits as long as the server asks (`grpc-retry-pushback-ms`)
            # and stays within the call's timeout. 5 is the most that it allows.
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.service_config", json.dumps(_RETRIES)),
    # A request is kept for retries only while it fits; the default would not hold an initial image.
    ("grpc.per_rpc_retry_buffer_size", 16 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    # Finds a connection that died without a word, within 40 s, while an event is awaited.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # An address that swallows packets fails in 5 s rather than 20, and a server that returns is found within 5 s.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.primary_user_agent", "sdclient"),
]

# Enum -> the names that the SDK knows. A label on the wire is the enum's name and one of these: SAMPLER_DDIM.
_CHOICES: dict[str, tuple[str, ...]] = {
    "Blending": get_args(Blending),
    "Conditioning": get_args(Conditioning),
    "Fit": get_args(Fit),
    "SafetyMode": get_args(SafetyMode),
    "SafetyOutcome": get_args(SafetyOutcome),
    "Sampler": get_args(Sampler),
    "Schedule": get_args(Schedule),
}

# Message -> the SDK's type with the same fields.
_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(Prompt, Emphasis, GuidanceInterval, ClipGuidance, InitImage, Mask, Output, PreviewOptions),
        *(Upscale, UpscalingSupport, DepthMap, Outpaint, Variation, TwoPass, BlockCache, Windows, WindowDefaults),
        *(Lora, LoraInfo),
        *(PromptUsage, Progress, Preview, Image, Safety, SafetyScore, Finished, Usage, Timings),
        *(ClipGuidanceSupport, ClipGuidancePreset),
        *(Engine, EngineLimits, EngineDefaults, License),
    )
}


def credentials(tls: bool | str | os.PathLike[str] | Tls) -> grpc.ChannelCredentials | None:
    """TLS credentials; None for False. Raises OSError where a file cannot be read."""
    import grpc

    if tls is False:
        return None
    if tls is True:
        tls = Tls()
    elif not isinstance(tls, Tls):
        tls = Tls(tls)
    files = tls.authorities, tls.private_key, tls.certificate
    return grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The headers of a call: the API key, and of which trace it is a part, if the caller traces."""
    key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return tuple({**_trace_headers(), **key}.items())


def _trace_headers() -> dict[str, str]:
    """What OpenTelemetry sends along, where the caller's program uses it: a program that does has imported it."""
    propagate = sys.modules.get("opentelemetry.propagate")
    if propagate is None and "opentelemetry.trace" in sys.modules:
        from opentelemetry import propagate
    headers: dict[str, str] = {}
    if propagate is not None:
        propagate.inject(headers)
    return headers


def to_request(prompts: Prompts, options: GenerateOptions) -> GenerateRequest:
    """The message of a request. What is None stays absent.

    Raises InvalidRequestError with everything that does not fit the message or cannot be read as prompts, TypeError for
    an option that does not exist or has the wrong type. Whether the values make sense is for the server to say.
    """
    from sdapi.v1 import generation_pb2

    request = generation_pb2.GenerateRequest()
    violations: dict[str, str] = {}
    values: dict[str, Any] = {"prompts": _read_prompts(prompts, violations), **options}
    values.pop("timeout", None)
    if isinstance(loras := values.get("loras"), Mapping):
        values["loras"] = [Lora(name, weight) for name, weight in loras.items()]
    for name, value in values.items():
        field = _fields_by_name(request).get(name)
        if field is None:
            raise TypeError(f"there is no option {name!r}; there are {', '.join(GenerateOptions.__annotations__)}")
        try:
            request.MergeFrom(generation_pb2.GenerateRequest(**{name: _to_field(field, value)}))
        except ValueError as error:
            violations[name] = str(error)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    if violations:
        problems = [f"{name}: {problem}" for name, problem in violations.items()]
        message = ("\n" if "\n" in "".join(problems) else "; ").join(problems)
        raise InvalidRequestError(message, code="INVALID_ARGUMENT", violations=violations)
    return request


def _read_prompts(prompts: Prompts, violations: dict[str, str]) -> list[Prompt]:
    """The prompts; what cannot be read is put into the violations."""
    read: list[Prompt] = []
    for index, item in enumerate([prompts] if isinstance(prompts, str | Prompt) else prompts):
        try:
            read += _read_prompt(item)
        except PromptSyntaxError as error:
            violations["prompts" if item is prompts else f"prompts[{index}]"] = str(error)
    return read


def _read_prompt(prompt: str | Prompt | tuple[str, float]) -> tuple[Prompt, ...]:
    match prompt:
        case Prompt():
            return (prompt,)
        case str(text):
            return parse_prompts(text)
        case (str(text), weight):
            return (Prompt(text, weight),)
    raise TypeError(f"a prompt is a str, a Prompt or a tuple (text, weight), not {prompt!r}")


def _to_field(field: FieldDescriptor, value: Any) -> Any:
    """What a message's constructor takes for a field: None for nothing, enums by label, messages as dicts."""
    if value is None:
        return None
    if field.is_repeated:
        return [_to_item(field, item) for item in value]
    if field.enum_type is not None:
        choices = _CHOICES[field.enum_type.name]
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return _prefix(field.enum_type.name) + value.upper()
    return _to_item(field, value)


def _to_item(field: FieldDescriptor, value: Any) -> Any:
    if not is_dataclass(value) or field.message_type is None:
        return value
    items = {part.name: getattr(value, part.name) for part in fields(value)}
    parts = field.message_type.fields_by_name
    return {
        name: _to_field(parts[name], item) if name in parts else item
        for name, item in items.items()
        if item is not None
    }


def engines_request() -> ListEnginesRequest:
    """The message that asks for the engines."""
    from sdapi.v1 import generation_pb2

    return generation_pb2.ListEnginesRequest()


def to_event(response: GenerateResponse) -> Event | None:
    """The event of a response; None for one that this version does not know."""
    name = response.WhichOneof("event")
    if name is None:
        return None
    if name == "accepted":
        return _accepted(response.accepted)
    event: Event = _from_message(getattr(response, name))
    return event


def to_engines(response: ListEnginesResponse) -> list[Engine]:
    """The engines of a server, the default one first."""
    return [_from_message(engine) for engine in response.engines]


def _accepted(accepted: generation_pb2.Accepted) -> Accepted:
    request_id, prompts, options = _resolved(accepted.request)
    prompt_usage = tuple(_from_message(usage) for usage in accepted.prompt_usage)
    return Accepted(request_id, prompts, options, accepted.queue_position, prompt_usage)


def _resolved(request: GenerateRequest) -> tuple[str, tuple[Prompt, ...], GenerateOptions]:
    """Request id, prompts and options of a request."""
    resolved = {field.name: _from_field(field, value) for field, value in request.ListFields()}
    prompts = resolved.pop("prompts", ())
    request_id = resolved.pop("request_id", "")
    options = {name: value for name, value in resolved.items() if value is not None}
    return request_id, prompts, cast("GenerateOptions", options)


def from_json(request: str) -> tuple[tuple[Prompt, ...], GenerateOptions]:
    """Prompts and options of a request in protobuf's JSON.

    Raises ValueError where it is none, or has something that this version does not know.
    """
    from google.protobuf import json_format
    from sdapi.v1 import generation_pb2

    try:
        message = json_format.Parse(request, generation_pb2.GenerateRequest())
    except (json_format.Error, RecursionError) as error:
        raise ValueError(str(error)) from error
    _, prompts, options = _resolved(message)
    return prompts, options


def _from_message(message: Message) -> Any:
    """The SDK's type of the same name, field by field. What is absent stays None where None is the default."""
    if message.DESCRIPTOR.name == "Duration":
        return message.ToTimedelta().total_seconds()  # type: ignore[attr-defined]
    kind = _TYPES[message.DESCRIPTOR.name]
    descriptors = _fields_by_name(message)
    present = {field.name for field, _ in message.ListFields()}
    return kind(
        **{
            field.name: _from_field(descriptors[field.name], getattr(message, field.name))
            for field in fields(kind)
            if field.name in present or field.default is MISSING
        }
    )


def _fields_by_name(message: Message) -> Mapping[str, FieldDescriptor]:
    # Its declared type also names a class of protobuf's C implementation, with the same attributes.
    return cast("Mapping[str, FieldDescriptor]", message.DESCRIPTOR.fields_by_name)


def _from_field(field: FieldDescriptor, value: Any) -> Any:
    if field.is_repeated:
        items = [_from_item(field, item) for item in value]
        return tuple(item for item in items if item is not None)
    return _from_item(field, value)


def _from_item(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return _from_message(value)
    if field.enum_type is not None:
        label = field.enum_type.values_by_number.get(value)
        # A newer server's label is unknown here; `unspecified` names nothing.
        name = "" if label is None else label.name.removeprefix(_prefix(field.enum_type.name)).lower()
        return name if name in _CHOICES[field.enum_type.name] else None
    if field.cpp_type == field.CPPTYPE_FLOAT:
        return _shortest(value)
    return value


def _prefix(enum: str) -> str:
    """What the names of an enum's labels start with: SAFETY_MODE_ for SafetyMode."""
    return "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in enum).lstrip("_") + "_"


def _shortest(value: float) -> float:
    """The shortest decimal that is the same 32-bit float: 7.1 rather than 7.099999904632568."""
    for digits in (6, 7, 8):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value
