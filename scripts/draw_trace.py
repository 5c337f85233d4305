"""Receives traces as OpenTelemetry's collector does, and draws a few of them as one picture: who waited for what.

    python scripts/draw_trace.py out/trace.png --requests 3
    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 sdserver up --traces

It draws when so many generations have ended. Needs the extras `traces` and `training` (matplotlib).
"""

from __future__ import annotations

import argparse
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from matplotlib.figure import Figure
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

GENERATE = "/Generate"
SHARED = " batch"
STAGES = {"queue": "#c8c4bc", "encode": "#7d6bb0", "denoise": "#cfe0f3", "decode": "#5aa17f", "write": "#d9a441"}
CALL, MODEL = "#4a4a4a", "#2b5c8a"
# By how many requests share a call.
SHARING = ["#9dbfe3", "#5b93cf", "#2b6cb0", "#17406f"]


@dataclass(frozen=True)
class Bar:
    """A span: its name, seconds since the first span began, and whose it is."""

    name: str
    start: float
    end: float
    depth: int
    parts: tuple[tuple[float, float, int], ...] = ()
    """Shared calls that work for it: start, end, and how many requests share each."""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that come."""

    def __init__(self) -> None:
        self.spans: queue.Queue[Span] = queue.Queue()

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


def receive(address: str, requests: int) -> list[Span]:
    """The spans until so many generations have ended, and all that came with the last of them."""
    collector = Collector()
    spans: list[Span] = []
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        address = f"{address.rpartition(':')[0]}:{server.add_insecure_port(address)}"
        server.start()
        print(f"waiting for {requests} generations: OTEL_EXPORTER_OTLP_ENDPOINT=http://{address}", flush=True)
        while sum(span.name.endswith(GENERATE) for span in spans) < requests:
            spans.append(collector.spans.get())
        try:
            while True:
                spans.append(collector.spans.get(timeout=1))
        except queue.Empty:
            server.stop(0).wait()
    return spans


def bars(spans: list[Span]) -> list[list[Bar]]:
    """The bars of each request in the order of their beginnings, then those of the shared calls."""
    calls = sorted((span for span in spans if span.name.endswith(GENERATE)), key=lambda span: span.start_time_unix_nano)
    zero = calls[0].start_time_unix_nano

    def seconds(time: int) -> float:
        return (time - zero) / 1e9

    shared = {span.span_id: span for span in spans if span.name.endswith(SHARED)}

    def bar(span: Span, depth: int) -> Bar:
        mine = [shared[link.span_id] for link in span.links if link.span_id in shared]
        parts = [(seconds(s.start_time_unix_nano), seconds(s.end_time_unix_nano), _requests(s)) for s in mine]
        facts = {each.key: each.value.int_value for each in span.attributes}
        name = span.name
        if name.endswith(GENERATE):
            name = f"{_count(facts['sd.image_count'], 'image')}, {_count(facts['sd.steps'], 'step')}"
        elif "sd.image" in facts:
            name = f"{name} {facts['sd.image']}"
        times = seconds(span.start_time_unix_nano), seconds(span.end_time_unix_nano)
        return Bar(name, *times, depth, tuple(sorted(parts)))

    def family(span: Span, depth: int) -> list[Bar]:
        children = [other for other in spans if other.parent_span_id == span.span_id]
        children.sort(key=lambda child: child.start_time_unix_nano)
        return [bar(span, depth), *(each for child in children for each in family(child, depth + 1))]

    groups = [family(call, 0) for call in calls]
    together = []
    for name in sorted({span.name for span in shared.values()}):
        parts = [
            (seconds(span.start_time_unix_nano), seconds(span.end_time_unix_nano), _requests(span))
            for span in shared.values()
            if span.name == name
        ]
        together.append(Bar(name.replace(SHARED, " calls"), parts[0][0], parts[0][0], 0, tuple(sorted(parts))))
    return [*groups, together]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _requests(span: Span) -> int:
    return len({link.trace_id for link in span.links})


def draw(groups: list[list[Bar]], file: Path) -> None:
    """Writes the picture."""
    rows = sum(map(len, groups)) + len(groups) - 1
    figure = Figure(figsize=(11, 0.9 + 0.22 * rows), dpi=110, layout="constrained")
    axes: Axes = figure.subplots()
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for group in groups:
        for bar in group:
            stage = bar.name.split()[0]
            colour = STAGES.get(stage, CALL if bar.depth == 0 else MODEL)
            height = 0.72 if bar.depth < 2 else 0.4
            if bar.end > bar.start:
                axes.broken_barh([(bar.start, bar.end - bar.start)], (y - height / 2, height), color=colour)
            for start, end, sharing in bar.parts:
                inner = SHARING[min(sharing, len(SHARING)) - 1]
                axes.broken_barh([(start, end - start)], (y - 0.3, 0.6), color=inner, edgecolor="white", linewidth=0.5)
            ticks.append((y, "   " * bar.depth + bar.name))
            y += 1
        y += 0.7
    axes.set_ylim(y - 1.2, -0.8)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")
    axes.tick_params(axis="y", length=0, pad=110)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("seconds", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    sharing = [number for group in groups for bar in group for *_, number in bar.parts]
    for number in range(min(len(SHARING), max(sharing, default=1))):
        axes.broken_barh([], (0, 0), color=SHARING[number], label=f"a call for {_count(number + 1, 'request')}")
    figure.legend(loc="outside upper right", ncols=len(SHARING), fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the PNG to write")
    parser.add_argument("--requests", type=int, default=1, help="generations to wait for")
    parser.add_argument("--listen", default="127.0.0.1:4317", metavar="HOST:PORT")
    arguments = parser.parse_args()
    draw(bars(receive(arguments.listen, arguments.requests)), arguments.file)
    print(arguments.file)


if __name__ == "__main__":
    main()
