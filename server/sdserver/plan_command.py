"""`sdserver plan`: how many GPUs so many images need, by a simulation of the step scheduler over measured costs."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from sdserver import cost_model
from sdserver.capacity.outcome import Costs, Pool
from sdserver.capacity.planning import Demand, Planner, Unreachable, lone_p95
from sdserver.capacity.workload import work_of
from sdserver.cost_model import CostModelError, StageCosts
from sdserver.engines import EngineError, load_catalog
from sdserver.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.capacity.workload import Mix
    from sdserver.engines import Engine

# A second of one core is good for so much of the server's part (benchmarks.server_alone).
SERVER_STEP_MS = 0.15
# Of what a request takes alone.
DEFAULT_PATIENCE = 4.0
# How many GPUs the table shows, over those that are needed.
SHOWN = (0.9, 1.0, 1.2, 1.5)
PLOTTED = (0.8, 0.85, 0.9, 0.95, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            raise PlanError("--plot needs matplotlib: pip install matplotlib")
        planner, notes = _planner(options)
        gpus = planner.gpus()
    except Unreachable as error:
        print(
            f"sdserver plan: {error} at the 95th percentile, so no number of GPUs makes it {options.p95:g} s; "
            "ask for fewer steps or smaller images, or allow more with --p95",
            file=sys.stderr,
        )
        return 1
    except (EngineError, PlanError) as error:
        print(f"sdserver plan: {error}", file=sys.stderr)
        return 1
    console = Console()
    for note in notes:
        console.print(note, style="yellow", soft_wrap=True, highlight=False)
    console.print(table(planner, gpus, options.price))
    console.print(_sentence(planner, gpus, options.price), soft_wrap=True, highlight=False)
    if options.plot:
        plot(planner, gpus, options.price, options.plot)
        console.print(f"plot: {options.plot}", soft_wrap=True, highlight=False)
    return 0


class PlanError(Exception):
    """There is nothing to plan with; says what to do."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdserver plan",
        description="How many GPUs so many images need. Simulates the step scheduler over what `sdserver calibrate` "
        "measured; docs/capacity.md says how far to trust it.",
    )
    parser.add_argument("--rate", type=_positive, required=True, metavar="N", help="requests a second, on average")
    parser.add_argument(
        "--p95",
        type=_positive,
        metavar="SECONDS",
        help="what 95 %% of the requests may take; default: four times what they take alone",
    )
    shared = "several share the requests equally, or as said: 512x512=3 768x768=1"
    parser.add_argument("--size", nargs="+", default=[], metavar="WxH", help=f"pixels; default: the engine's; {shared}")
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="N", help="twice as many with samplers of second order"
    )
    parser.add_argument("--unguided", type=_share, default=0.0, metavar="SHARE", help="of requests without guidance")
    parser.add_argument("--images", type=_count, default=1, metavar="N", help="of a request; default: 1")
    parser.add_argument("--price", type=_positive, metavar="AMOUNT", help="of a GPU for an hour, in any currency")
    parser.add_argument("--engine", default="", help="default: the first one by name")
    parser.add_argument("--cost-model", type=Path, metavar="FILE", help="default: what `sdserver calibrate` keeps here")
    parser.add_argument("--model-repository", type=Path, metavar="FOLDER", help="default: as for sdserver serve")
    parser.add_argument("--max-active", type=_count, default=8, metavar="N", help="as for sdserver serve; default: 8")
    parser.add_argument("--max-queued", type=int, default=64, metavar="N", help="as for sdserver serve; default: 64")
    parser.add_argument(
        "--parallel-calls", type=_count, default=1, metavar="N", help="as for sdserver serve; default: 1"
    )
    parser.add_argument(
        "--pool",
        type=_count,
        default=1,
        metavar="GPUS",
        help="GPUs whose Tritons the same servers take in turn; default: 1, a Triton in each server's pod",
    )
    parser.add_argument("--servers", type=_count, metavar="N", help="of a pool; default: one for each GPU")
    parser.add_argument(
        "--server-step-ms",
        type=float,
        default=SERVER_STEP_MS,
        metavar="MS",
        help=f"of a server's core, for a step of an image; default: {SERVER_STEP_MS}",
    )
    parser.add_argument("--requests", type=_count, default=1000, metavar="N", help="of each simulation; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the simulations; default: 0")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="a picture of it; needs matplotlib")
    return parser


def _planner(options: argparse.Namespace) -> tuple[Planner, list[str]]:
    """The planner that is asked for, and what should be known of its numbers. Raises EngineError or PlanError."""
    given = {} if options.model_repository is None else {"model_repository": options.model_repository}
    settings = Settings(**given)
    name = options.engine or (options.cost_model.stem if options.cost_model else "")
    engine = load_catalog(settings.model_repository, name).default
    path = options.cost_model or settings.cost_model_folder / f"{engine.id}.json"
    if not path.exists():
        raise PlanError(
            f"there is no {path}: run sdserver calibrate --engine {engine.id} where Triton runs on such a GPU, and "
            "name the file that it keeps with --cost-model"
        )
    try:
        calibration = cost_model.load(path)
    except CostModelError as error:
        raise PlanError(f"{path} is no cost model of sdserver calibrate ({error})") from error
    notes = []
    if calibration.engine_digest != engine.digest:
        notes.append("The costs were measured with another version of the engine.")
    if calibration.stages is None:
        notes.append("The costs are of UNet calls alone, without texts, decoding and writing: calibrate again.")
    stages = calibration.stages or StageCosts(0.0, 0.0, 0.0)
    costs = Costs(engine, calibration.cost_model, stages, options.server_step_ms / 1000)
    mix = mix_of(engine, options.size, options.steps, options.unguided, options.images)
    pool = Pool(
        *(options.pool, options.servers or options.pool, options.max_active, options.max_queued),
        options.parallel_calls,
    )
    p95 = options.p95 or DEFAULT_PATIENCE * lone_p95(mix, pool, costs)
    return Planner(Demand(mix, options.rate, p95), pool, costs, options.requests, options.seed), notes


def mix_of(engine: Engine, sizes: Sequence[str], steps: Sequence[str], unguided: float, images: int) -> Mix:
    """Every size with every number of steps, with and without guidance. Raises PlanError."""
    defaults = engine.defaults
    of_sizes = [_size(engine, each) for each in sizes] or [((defaults.width, defaults.height), 1.0)]
    of_steps = [_steps(engine, each) for each in steps] or [(defaults.steps, 1.0)]
    of_guidance = [(guided, share) for guided, share in ((True, 1 - unguided), (False, unguided)) if share > 0]
    return tuple(
        (work_of(engine, width, height, number, guided=guided, images=images), size_share * step_share * share)
        for ((width, height), size_share), (number, step_share), (guided, share) in product(
            of_sizes, of_steps, of_guidance
        )
    )


def _size(engine: Engine, said: str) -> tuple[tuple[int, int], float]:
    found = re.fullmatch(r"(\d+)x(\d+)(?:=([\d.]+))?", said)
    if not found:
        raise PlanError(f"--size {said}: such as 768x512, or 768x512=3 with a share")
    width, height = int(found[1]), int(found[2])
    limits = engine.limits
    if not limits.min_size <= min(width, height) <= max(width, height) <= limits.max_size:
        raise PlanError(f"--size {said}: engine {engine.id} takes {limits.min_size} to {limits.max_size} pixels")
    return (width, height), float(found[3] or 1)


def _steps(engine: Engine, said: str) -> tuple[int, float]:
    found = re.fullmatch(r"([1-9]\d*)(?:=([\d.]+))?", said)
    if not found:
        raise PlanError(f"--steps {said}: such as 25, or 25=3 with a share")
    return int(found[1]), float(found[2] or 1)


def _positive(said: str) -> float:
    number = float(said)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be greater than 0")
    return number


def _share(said: str) -> float:
    number = float(said)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return number


def _count(said: str) -> int:
    number = int(said)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def table(planner: Planner, gpus: int, price: float | None) -> Table:
    """What callers see with as many GPUs as are needed, with fewer, and with more."""
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    columns = ["GPUs", "busy", "p50", "p95", "p99", "wait p95", "refused", "fill"]
    for name in columns if price is None else [*columns, "1,000 images"]:
        shown.add_column(name, justify="right", no_wrap=True)
    for number in _numbers(planner, gpus, SHOWN):
        outcome = planner.outcome(number)
        row = [
            f"{number:,}",
            f"{outcome.busy_share:.0%}",
            *(f"{outcome.quantile(share):.2f} s" for share in (0.5, 0.95, 0.99)),
            f"{outcome.wait_quantile(0.95):.2f} s",
            f"{outcome.refused_share:.1%}",
            f"{outcome.fill:.0%}",
        ]
        if price is not None:
            row.append(f"{cost_of_1000(planner, number, price):.3g}")
        shown.add_row(*row, style="bold green" if number == gpus else None)
    return shown


def _numbers(planner: Planner, gpus: int, shares: Sequence[float]) -> list[int]:
    """Numbers of GPUs around a plan, none of them too few to keep up."""
    least = planner.least_gpus()
    return sorted({max(least, planner.whole(round(gpus * share))) for share in shares})


def plot(planner: Planner, gpus: int, price: float | None, path: Path) -> None:
    """Draws latencies, and what images cost, over the number of GPUs."""
    from matplotlib.figure import Figure

    numbers = _numbers(planner, gpus, PLOTTED)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for share, colour in ((0.5, "#9db8d6"), (0.95, "#2b5c8a"), (0.99, "#c8c4bc")):
        seconds = [planner.outcome(number).quantile(share) for number in numbers]
        axes.plot(numbers, seconds, "o-", color=colour, markersize=3, label=f"p{100 * share:.0f}")
    axes.axhline(planner.demand.p95, color="#4a4a4a", linestyle=":", linewidth=1)
    axes.axvline(gpus, color="#4a4a4a", linestyle=":", linewidth=1)
    axes.set(xlabel="GPUs", ylabel="seconds from request to image", ylim=(0, None))
    axes.set_title(f"{planner.demand.rate:g} requests a second: {gpus:,} GPUs", fontsize=10)
    axes.legend(frameon=False)
    if price is not None:
        each = cost_of_1000(planner, gpus, price) / gpus
        above = axes.secondary_xaxis("top", functions=(partial(np.multiply, each), partial(np.multiply, 1 / each)))
        above.set_xlabel("price of 1,000 images")
    figure.savefig(path, dpi=110)


def cost_of_1000(planner: Planner, gpus: int, price: float) -> float:
    """What 1,000 images cost when a GPU costs `price` an hour and all run all the time."""
    served = planner.demand.images_per_second * (1 - planner.outcome(gpus).refused_share)
    return 1000 * gpus * price / (3600 * served)


def _sentence(planner: Planner, gpus: int, price: float | None) -> str:
    demand = planner.demand
    said = (
        f"{gpus:,} GPU{'s' * (gpus != 1)} for {demand.rate:g} requests/s ({demand.images_per_second:g} images/s), "
        f"95% of them within {demand.p95:.3g} s; at least {planner.least_gpus():,} to keep up at all."
    )
    if price is not None:
        said += f" 1,000 images cost {cost_of_1000(planner, gpus, price):.3g}."
    return said
