"""Stable Diffusion over gRPC: generate images from weighted prompts on a server.

    from sdclient import Client

    with Client("localhost:50051") as client:
        [image] = client.generate(["a lake at dusk", ("trees", -1)], width=384, height=128, seed=7)
        image.save("lake.png")

`Client` and its twin `AsyncClient` generate (`generate`), generate and show how it goes (`stream`), and list engines
(`engines`). Everything that can go wrong with a call is an `SDError`.
"""

from __future__ import annotations

from ._async import AsyncClient
from ._errors import (
    AuthenticationError,
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    SDError,
    ServerBusyError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)
from ._sync import Client
from ._types import (
    Accepted,
    Blending,
    ClipGuidance,
    Engine,
    EngineDefaults,
    EngineLimits,
    Event,
    Finished,
    GenerateOptions,
    GuidanceInterval,
    Image,
    InitImage,
    License,
    Mask,
    Output,
    Preview,
    PreviewOptions,
    Progress,
    Prompt,
    Prompts,
    Sampler,
    Schedule,
    Timings,
    Usage,
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
]
