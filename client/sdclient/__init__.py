"""Stable Diffusion over gRPC: generate images from weighted prompts on a server.

    from sdclient import Client

    with Client("localhost:50051") as client:
        [image] = client.generate("a lake at dusk | trees : -1", width=384, height=128, seed=7)
        image.save("lake.png")

`Client` and its twin `AsyncClient` generate (`generate`), generate and show how it goes (`stream`), and list engines
(`engines`). `parse_prompts` and `format_prompts` read and write prompt syntax. Everything that can go wrong with a call
is an `SDError`.
"""

from __future__ import annotations

from ._async import AsyncClient
from ._errors import (
    AuthenticationError,
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    PromptSyntaxError,
    SDError,
    ServerBusyError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)
from ._events import Accepted, Event, Finished, Image, Preview, Progress, PromptUsage, Timings, Usage
from ._prompts import format_prompts, parse_prompts
from ._sync import Client
from ._types import (
    Blending,
    ClipGuidance,
    Emphasis,
    Engine,
    EngineDefaults,
    EngineLimits,
    GenerateOptions,
    GuidanceInterval,
    InitImage,
    License,
    Mask,
    Output,
    PreviewOptions,
    Prompt,
    Prompts,
    Sampler,
    Schedule,
)

__all__ = [
    "Accepted",
    "AsyncClient",
    "AuthenticationError",
    "Blending",
    "CancelledError",
    "Client",
    "ClipGuidance",
    "DeadlineExceededError",
    "Emphasis",
    "Engine",
    "EngineDefaults",
    "EngineLimits",
    "Event",
    "Finished",
    "GenerateOptions",
    "GuidanceInterval",
    "Image",
    "InitImage",
    "InvalidRequestError",
    "License",
    "Mask",
    "NotFoundError",
    "Output",
    "Preview",
    "PreviewOptions",
    "Progress",
    "Prompt",
    "PromptSyntaxError",
    "PromptUsage",
    "Prompts",
    "SDError",
    "Sampler",
    "Schedule",
    "ServerBusyError",
    "ServerError",
    "Timings",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "format_prompts",
    "parse_prompts",
]
