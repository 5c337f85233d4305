"""Docker's health check: `python healthcheck.py server | triton` exits with 0 where it is ready, else with 1."""

from __future__ import annotations

import os
import sys
from urllib.request import urlopen

SECONDS = 4.0


def server() -> bool:
    """Whether an engine is ready, by the port that speaks no TLS."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = f"127.0.0.1:{os.environ.get('SDSERVER_HEALTH_PORT', '50052')}"
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="sdapi.v1.GenerationService")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def triton(question: str = "ready") -> bool:
    """Whether Triton's models are loaded, or whether it is "live"."""
    port = os.environ.get("SDSERVER_TRITON_HTTP_PORT", "8000")
    with urlopen(f"http://127.0.0.1:{port}/v2/health/{question}", timeout=SECONDS) as answer:
        return bool(answer.status == 200)


def main(arguments: list[str]) -> int:
    try:
        return 0 if {"server": server, "triton": triton}[arguments[0]](*arguments[1:]) else 1
    except Exception as error:
        print(f"not ready: {type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
