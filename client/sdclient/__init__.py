"""Stable Diffusion over gRPC: generate images from weighted prompts on a server.

    from sdclient import Client

    with Client("localhost:50051") as client:
        [image] = client.generate("a lake at dusk | trees : -1", width=384, height=128, seed=7)
        image.save("lake.png")

`Client` and its twin `AsyncClient` generate (`generate`), generate and show how it goes (`stream`), and list engines
(`engines`). `parse_prompts` and `format_prompts` read and write prompt syntax, `read_metadata` says how an image was
made. Everything that can go wrong is an `SDError`.
"""

from __future__ import annotations

from ._async import AsyncClient
from ._errors import (
    AuthenticationError,
    BlockedImageError,
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    MetadataError,
    NotFoundError,
    PromptSyntaxError,
    SDError,
    ServerBusyError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)
from ._events import (
    Accepted,
    Event,
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
from ._metadata import Metadata, read_metadata
from ._prompts import format_prompts, parse_prompts
from ._sync import Client
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
    Mask,
    Outpaint,
    Output,
    PreviewOptions,
    Prompt,
    Prompts,
    SafetyMode,
    Sampler,
    Schedule,
    Tls,
    TwoPass,
    Variation,
    WindowDefaults,
    Windows,
)

__all__ = [
    "Accepted",
    "AsyncClient",
    "AuthenticationError",
    "Blending",
    "BlockCache",
    "BlockedImageError",
    "CancelledError",
    "Client",
    "ClipGuidance",
    "ClipGuidancePreset",
    "ClipGuidanceSupport",
    "Conditioning",
    "DeadlineExceededError",
    "DepthMap",
    "Emphasis",
    "Engine",
    "EngineDefaults",
    "EngineLimits",
    "Event",
    "Finished",
    "Fit",
    "GenerateOptions",
    "GuidanceInterval",
    "Image",
    "InitImage",
    "InvalidRequestError",
    "License",
    "Mask",
    "Metadata",
    "MetadataError",
    "NotFoundError",
    "Outpaint",
    "Output",
    "Preview",
    "PreviewOptions",
    "Progress",
    "Prompt",
    "PromptSyntaxError",
    "PromptUsage",
    "Prompts",
    "SDError",
    "Safety",
    "SafetyMode",
    "SafetyOutcome",
    "SafetyScore",
    "Sampler",
    "Schedule",
    "ServerBusyError",
    "ServerError",
    "Timings",
    "Tls",
    "TwoPass",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "Variation",
    "WindowDefaults",
    "Windows",
    "format_prompts",
    "parse_prompts",
    "read_metadata",
]
