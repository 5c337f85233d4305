"""How long `import sdclient` takes, beyond starting the interpreter: the least of many runs, in milliseconds.

The SDK imports gRPC and protobuf with the first client, so that is shown beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

STATEMENTS = {
    "import sdclient": "import sdclient",
    "the first Client": "import sdclient; sdclient.Client()",
    "import grpc, for comparison": "import grpc",
}


def least_ms(statement: str, runs: int) -> float:
    """The shortest run: what else the machine does only ever adds time."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs: int = parser.parse_args().runs
    interpreter = least_ms("pass", runs)
    print(f"{'the interpreter alone':30} {interpreter:6.0f} ms")
    for name, statement in STATEMENTS.items():
        print(f"{name:30} {least_ms(statement, runs) - interpreter:+6.0f} ms")


if __name__ == "__main__":
    main()
