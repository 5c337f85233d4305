"""`sdserver calibrate`: measures what UNet calls cost here, shows it, and keeps it for the step scheduler."""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sdserver import cost_model, images
from sdserver.backends.triton import TritonBackend
from sdserver.cost_model import CostModel, Measurement, StageCosts
from sdserver.engine_schedulers import most_rows
from sdserver.engines import load_catalog
from sdserver.request import Output

if TYPE_CHECKING:
    from sdserver.backends import Backend
    from sdserver.engines import Engine
    from sdserver.settings import CalibrateSettings

ROUNDS = 5
WIDEST_BAR = 40


async def calibrate(settings: CalibrateSettings) -> None:
    """Measures engines through a Triton that runs. Raises EngineError, UnknownEngine, or RequestError of a call."""
    engines = [each for each in load_catalog(settings.model_repository) if settings.engine in ("", each.id)]
    if not engines:
        raise UnknownEngine(settings.engine)
    backend = TritonBackend(settings.triton_url)
    console = Console()
    try:
        for engine in engines:
            measurements = await measure(engine, backend, settings.seconds)
            model = cost_model.fit(measurements)
            stages = await measure_stages(engine, backend)
            path = cost_model.write(settings.cost_model_folder, engine, model, measurements, stages)
            console.print(chart(engine, model, measurements))
            console.print(
                f"a call {model.call * 1000:.1f} ms, a row of the native size "
                f"{model.row(_native_places(engine)) * 1000:.1f} ms; a text {stages.encode * 1000:.1f} ms, an image "
                f"{stages.decode_place * _native_places(engine) * 1000:.1f} ms of decoding and "
                f"{stages.write_place * _native_places(engine) * 1000:.1f} ms of writing; kept in {path}",
                soft_wrap=True,
            )
    finally:
        await backend.close()
    console.print("A server takes it up when it starts.")


class UnknownEngine(Exception):
    """There is no engine of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no engine {name!r}: sdserver engine list says which there are")


async def measure(engine: Engine, backend: Backend, seconds: float) -> list[Measurement]:
    """Medians of calls of several shapes and numbers of rows, in ROUNDS rounds or as many as `seconds` allow.

    A round asks each once, so that a machine that is busy for a while slows all of them. Raises RequestError.
    """
    plan = [
        (rows, shape)
        for shape in shapes(engine)
        for rows in numbers_of_rows(most_rows(engine, engine.max_batch_rows, shape[0] * shape[1]))
    ]
    took: dict[tuple[int, tuple[int, int]], list[float]] = {case: [] for case in plan}
    deadline = time.monotonic() + seconds
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        bar = progress.add_task(engine.id, total=(ROUNDS + 1) * len(plan))
        for number in range(ROUNDS + 1):
            for rows, shape in plan:
                call = await seconds_of_call(engine, backend, rows, shape)
                # The first call of a shape makes kernels and memory for it.
                if number > 0:
                    took[rows, shape].append(call)
                progress.advance(bar)
            if number > 0 and time.monotonic() > deadline:
                break
    return [
        Measurement(rows, height * width, statistics.median(times)) for (rows, (height, width)), times in took.items()
    ]


async def seconds_of_call(engine: Engine, backend: Backend, rows: int, shape: tuple[int, int]) -> float:
    """How long one UNet call of so many rows of latents [height, width] takes. Raises RequestError.

    They are those of pictures with guidance, two rows each, which may share some of the work.
    """
    pictures = np.arange(rows) // 2
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((rows, engine.unet_channels, *shape), np.float32)[pictures]
    # Not every number is a noise level of an upscaler.
    latents[:, engine.latents.channels :] = 0
    states = generator.standard_normal(
        (rows, engine.text_encoder.context_length, engine.text_encoder.width), np.float32
    )
    timesteps = np.linspace(999, 1, rows, dtype=np.float32)[pictures]
    began = time.perf_counter()
    await backend.predict(engine, latents, timesteps, states)
    return time.perf_counter() - began


async def measure_stages(engine: Engine, backend: Backend) -> StageCosts:
    """Medians of what an image costs beside its steps, at the native size. Raises RequestError."""
    scale, channels = engine.latents.downsampling, engine.latents.channels
    shape = 1, channels, engine.native_height // scale, engine.native_width // scale
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    encode, decode, write = [], [], []
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        await backend.encode_text(engine, f"a lake, number {number}", ())
        encoded = time.perf_counter()
        [pixels] = await backend.decode(engine, latents)
        decoded = time.perf_counter()
        images.encode(pixels, Output("image/png", None))
        written = time.perf_counter()
        # The first calls make kernels and memory.
        if number > 0:
            encode.append(encoded - began)
            decode.append(decoded - encoded)
            write.append(written - decoded)
    places = _native_places(engine)
    return StageCosts(statistics.median(encode), statistics.median(decode) / places, statistics.median(write) / places)


def shapes(engine: Engine) -> list[tuple[int, int]]:
    """Heights and widths of latents: of half, once and one and a half times the native width, where it is allowed."""
    scale, multiple = engine.latents.downsampling, engine.limits.size_multiple
    found = []
    for factor in (0.5, 1.0, 1.5):
        width = max(round(engine.native_width * factor / multiple), 1) * multiple
        if engine.limits.min_size <= width <= engine.limits.max_size:
            found.append((engine.native_height // scale, width // scale))
    return list(dict.fromkeys(found))


def numbers_of_rows(most: int) -> list[int]:
    """1, 2, 4 and so on, and `most`."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def _native_places(engine: Engine) -> int:
    scale = engine.latents.downsampling
    return (engine.native_height // scale) * (engine.native_width // scale)


def chart(engine: Engine, model: CostModel, measurements: list[Measurement]) -> Table:
    """Milliseconds a row, as measured and as the model has it; a bar for each measurement."""
    table = Table("places", "rows", "ms a call", "ms a row", "model", "", title=f"{engine.id}: a UNet call")
    most = max(m.seconds / m.rows / m.places for m in measurements)
    bounds = {m.places: min(engine.max_batch_rows, model.worthwhile_rows(m.places)) for m in measurements}
    for m in measurements:
        length = round(WIDEST_BAR * m.seconds / m.rows / m.places / most)
        table.add_row(
            *(str(m.places), str(m.rows), f"{m.seconds * 1000:.1f}", f"{m.seconds / m.rows * 1000:.1f}"),
            f"{model.seconds(m.rows, m.places) / m.rows * 1000:.1f}",
            "█" * length + (" full" if m.rows >= bounds[m.places] else ""),
        )
    return table
