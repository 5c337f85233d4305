"""What the server costs when it does nothing useful: resident memory when idle, time to refuse a bad request, and the
time that metrics and traces take.

The bounds are 150 MB, 10 ms, and for metrics 1 % of a UNet call of 10 ms, which no Stable Diffusion has been seen to
need less than. No Triton is needed: nothing here touches one.
"""

from __future__ import annotations

import math
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sdclient import Client, DeadlineExceededError, InvalidRequestError, Prompt, UnavailableError
from sdserver.metrics import Metrics
from sdserver.observation import CURRENT_WORK, Call, Observer, Stage, Work
from sdserver.traces import Traces

MEMORY_BOUND_MB = 150
REFUSAL_BOUND_MS = 10
REQUESTS = 300
UNET_CALL_MS = 10
METRICS_BOUND = 0.01
# Generations that share each UNet call, and steps of each.
SHARING, STEPS = 8, 20
STAGES: tuple[Stage, ...] = ("encode", "queue", "decode", "write")


def main() -> int:
    """Prints the figures; returns 1 if one is above its bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Logs of refusals would be read by nobody.
    options = [f"--port={port}", "--log-level=error", "--triton-url=127.0.0.1:1"]
    with subprocess.Popen([sys.executable, "-m", "sdserver", "serve", *options]) as process:
        try:
            with Client(f"127.0.0.1:{port}") as client:
                while not reachable(client):
                    time.sleep(0.1)
                refusals = sorted(refuse(client) for _ in range(REQUESTS))
            memory = psutil.Process(process.pid).memory_info().rss / 1e6
        finally:
            process.terminate()
    median, worst = statistics.median(refusals), refusals[int(0.99 * REQUESTS)]
    print(f"resident memory after {REQUESTS} requests  {memory:.0f} MB (bound {MEMORY_BOUND_MB})")
    print(f"refusal of a bad request           {median:.2f} ms, p99 {worst:.2f} ms (bound {REFUSAL_BOUND_MS})")
    work = STEPS * UNET_CALL_MS / 1000
    shares = {}
    for name, observer in {"metrics": Metrics(), "traces": Traces(SimpleSpanProcessor(Nowhere()))}.items():
        seconds = least_seconds(observer)
        shares[name] = seconds / work
        what = f"{name} for {SHARING} generations of {STEPS} steps"
        bound = f" (bound {METRICS_BOUND:.0%})" if name == "metrics" else ""
        print(f"{what}  {1000 * seconds:.2f} ms, {shares[name]:.2%} of their UNet calls of {UNET_CALL_MS} ms{bound}")
    exceeded = memory > MEMORY_BOUND_MB or worst > REFUSAL_BOUND_MS or shares["metrics"] > METRICS_BOUND
    return int(exceeded)


class Nowhere(SpanExporter):
    """Takes spans and does nothing with them: what sending costs is another thread's time."""

    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def least_seconds(observer: Observer) -> float:
    """What it costs to hear of generations that share all their steps: the least of many, the rest is noise."""
    least = math.inf
    for _ in range(100):
        start = time.perf_counter()
        hear(observer)
        least = min(least, time.perf_counter() - start)
    return least


def hear(observer: Observer) -> None:
    """Tells an observer of SHARING generations what the server tells it, but for waiting between."""
    steps = observer.steps("engine", "unet")
    asked = []
    with ExitStack() as running:
        for _ in range(SHARING):
            CURRENT_WORK.set(Work())
            running.enter_context(observer.call(Call("/sdapi.v1.GenerationService/Generate", engine="engine")))
            observer.admitted(0.1)
            observer.text_asked(known=True)
            for stage in STAGES:
                with observer.stage("engine", stage):
                    pass
            observer.image_done("engine", 768, 768)
            observer.spent("tenant", 10**9)
            running.enter_context(observer.stage("engine", "denoise", 0))
            asked.append([steps.asked() for _ in range(STEPS)])
        for sharing in zip(*asked, strict=True):
            with steps.calling(sharing):
                pass
            steps.called(2 * SHARING, 2 * SHARING, 2 * SHARING, 0.01)


def reachable(client: Client) -> bool:
    """Whether the server answers."""
    try:
        client.engines(timeout=1)
    except (UnavailableError, DeadlineExceededError):
        return False
    return True


def refuse(client: Client) -> float:
    """Milliseconds that the caller waits to hear everything that is wrong."""
    start = time.perf_counter()
    try:
        client.generate([Prompt(""), "ok"], width=0, height=10**9, steps=0, guidance_scale=float("nan"))
    except InvalidRequestError:
        return (time.perf_counter() - start) * 1000
    raise AssertionError("the server took a bad request")


if __name__ == "__main__":
    sys.exit(main())
