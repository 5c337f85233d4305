"""What the server costs when it does nothing useful: resident memory when idle, and time to refuse a bad request.

The bounds are 150 MB and 10 ms. No Triton is needed: neither touches one.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time

import psutil
from sdclient import Client, DeadlineExceededError, InvalidRequestError, Prompt, UnavailableError

MEMORY_BOUND_MB = 150
REFUSAL_BOUND_MS = 10
REQUESTS = 300


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
    return int(memory > MEMORY_BOUND_MB or worst > REFUSAL_BOUND_MS)


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
