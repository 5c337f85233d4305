"""The simulation behind `sdserver plan`: against the real pipeline in virtual time, and against what queues obey."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import pytest
from fakes import FakeBackend
from hypothesis import given
from hypothesis import strategies as st
from sdapi.v1 import generation_pb2
from sdserver import cost_model, wire
from sdserver.admission import Admission
from sdserver.capacity.outcome import Costs, Outcome, Pool
from sdserver.capacity.planning import PRECISION, Demand, Planner, Unreachable, fewest, lone_p95, saturated_rate
from sdserver.capacity.simulation import simulate
from sdserver.capacity.workload import Work, images_of, poisson, work_of
from sdserver.cost_model import CostModel, StageCosts
from sdserver.errors import QueueFull
from sdserver.image_writer import ImageWriter
from sdserver.pipeline import Pipeline
from sdserver.plan_command import main, mix_of
from virtual_time import VirtualTimeLoop

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.backends import EncodedText, Floats, Pixels
    from sdserver.capacity.workload import Mix
    from sdserver.engines import Catalog, Engine
    from sdserver.request import Emphasis, Lora

UNET = CostModel(call=0.008, place=4e-5, square=1e-8)
STAGES = StageCosts(encode=0.003, decode_place=3e-5, write_place=0.0)


@pytest.fixture(scope="module")
def engine(catalog: Catalog) -> Engine:
    return catalog.default


@pytest.fixture(scope="module")
def costs(engine: Engine) -> Costs:
    return Costs(engine, UNET, STAGES)


@dataclass
class TimedBackend(FakeBackend):
    """One machine that does one call after the other, each of which takes what the costs say."""

    machine: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def _takes(self, seconds: float) -> None:
        async with self.machine:
            await asyncio.sleep(seconds)

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        # The empty text is known after the first request.
        await self._takes(STAGES.encode if text else 0.0)
        return await super().encode_text(engine, text, emphasis, loras)

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        rows, _, height, width = latents.shape
        await self._takes(UNET.seconds(rows, height * width))
        return await super().predict(engine, latents, timesteps, text_states)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        rows, _, height, width = latents.shape
        await self._takes(STAGES.decode_place * rows * height * width)
        return await super().decode(engine, latents)


@dataclass(frozen=True)
class Kind:
    """What a request of the real pipeline asks for."""

    width: int
    height: int
    steps: int
    guidance_scale: float = 5.0
    image_count: int = 1

    def work(self, engine: Engine) -> Work:
        guided = self.guidance_scale != 1
        return work_of(engine, self.width, self.height, self.steps, guided=guided, images=self.image_count)


def really(engine: Engine, catalog: Catalog, pool: Pool, arrivals: list[tuple[float, Kind]]) -> Outcome:
    """What the real pipeline makes of requests, on a clock that jumps."""

    async def serve() -> Outcome:
        loop, outcome = asyncio.get_running_loop(), Outcome()
        admission = Admission(pool.max_active, pool.max_queued)
        writer = ImageWriter(wire.to_json)
        async with Pipeline([engine], TimedBackend(), admission, 1e9, 10**7, writer, costs=lambda _: UNET) as pipeline:

            async def one(number: int, arrival: float, kind: Kind) -> None:
                await asyncio.sleep(arrival)
                prompts = [generation_pb2.Prompt(text=f"lake number {number}")]
                message = generation_pb2.GenerateRequest(prompts=prompts, seed=number, **asdict(kind))
                try:
                    async for _ in pipeline.generate(wire.to_request(message, str(number), catalog, None)):
                        pass
                except QueueFull:
                    outcome.refused += 1
                    return
                outcome.images += kind.image_count
                outcome.latencies.append(loop.time() - arrival)
                outcome.ends.append(loop.time())

            async with asyncio.TaskGroup() as group:
                for number, (arrival, kind) in enumerate(arrivals):
                    group.create_task(one(number, arrival, kind))
        outcome.began = arrivals[0][0]
        return outcome

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(serve())


SAME = (Kind(128, 128, 12),)
MIXED = (
    *(Kind(64, 64, 8), Kind(128, 128, 12), Kind(128, 128, 12, 1.0), Kind(192, 128, 16), Kind(64, 128, 6, 5.0, 3)),
    # Three windows, and two tiles.
    Kind(1024, 64, 3),
)


@pytest.mark.parametrize(("kinds", "load"), [(SAME, 0.5), (SAME, 1.5), (MIXED, 0.6), (MIXED, 0.9)])
def test_every_request_ends_in_the_simulation_when_it_ends_in_the_real_pipeline(
    engine: Engine, catalog: Catalog, costs: Costs, kinds: tuple[Kind, ...], load: float
) -> None:
    pool = Pool(max_active=6, max_queued=10)
    works = {kind.work(engine): kind for kind in kinds}
    mix = tuple((work, 1.0) for work in works)
    rate = load * saturated_rate(mix, pool, costs) / images_of(mix)
    arrivals = poisson(mix, rate, requests=120, seed=3)
    real = really(engine, catalog, pool, [(time, works[work]) for time, work in arrivals])
    simulated = simulate(arrivals, pool, costs)
    assert (real.refused > 10) == (load > 1)
    assert (simulated.refused, simulated.images) == (real.refused, real.images)
    assert simulated.ends == pytest.approx(real.ends)
    assert simulated.latencies == pytest.approx(real.latencies)


def plain(engine: Engine) -> Mix:
    """Requests of the native size, 20 steps, with guidance."""
    return ((work_of(engine, engine.native_width, engine.native_height, 20), 1.0),)


def test_a_request_alone_takes_what_its_calls_take(engine: Engine) -> None:
    costs = Costs(engine, UNET, StageCosts(0.003, 3e-5, 1e-5), server_step=0.001)
    [(work, _)] = plain(engine)
    [seconds] = simulate([(5.0, work)], Pool(), costs).latencies
    calls = 20 * (UNET.seconds(2, work.places) + 0.001)
    assert seconds == pytest.approx(0.003 + calls + (3e-5 + 1e-5) * work.places)


def test_what_begins_while_the_machine_is_slow_takes_longer(engine: Engine, costs: Costs) -> None:
    [(work, _)] = plain(engine)
    [seconds] = simulate([(0.0, work)], Pool(), costs).latencies
    arrivals = [(0.0, work), (100.0, work)]
    latencies = simulate(arrivals, Pool(), costs, slowness=lambda now: 3.0 if now < 50 else 1.0).latencies
    assert latencies == pytest.approx([3 * seconds, seconds])


def test_servers_that_share_a_gpu_make_no_more_images_than_one(engine: Engine, costs: Costs) -> None:
    alone = saturated_rate(plain(engine), Pool(), costs)
    assert saturated_rate(plain(engine), Pool(servers=3), costs) == pytest.approx(alone, rel=0.1)


def test_a_server_alone_keeps_its_gpu_busier_than_many_keep_many_that_they_take_in_turn(
    engine: Engine, costs: Costs
) -> None:
    mix = (*plain(engine), (work_of(engine, 256, 128, 10), 1.0))
    alone = saturated_rate(mix, Pool(), costs)
    assert saturated_rate(mix, Pool(gpus=4, servers=4), costs) < 3.9 * alone
    assert saturated_rate(mix, Pool(gpus=4, servers=12), costs) > saturated_rate(mix, Pool(gpus=4, servers=4), costs)


def test_the_same_requests_come_at_every_rate(engine: Engine) -> None:
    mix = (*plain(engine), (work_of(engine, 64, 64, 5), 3.0))
    slow, fast = poisson(mix, 2.0, 400, seed=1), poisson(mix, 8.0, 400, seed=1)
    assert [work for _, work in slow] == [work for _, work in fast]
    assert [time / 4 for time, _ in slow] == pytest.approx([time for time, _ in fast])
    assert slow[-1][0] == pytest.approx(400 / 2.0, rel=0.2)
    assert sum(work.evaluations == 5 for _, work in slow) == pytest.approx(300, abs=40)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_fewest_that_are_enough_are_found(least: int, needed: int) -> None:
    found = fewest(lambda gpus: gpus >= needed, least)
    assert max(least, needed) <= found <= max(least, needed) + PRECISION * found


def test_a_plan_meets_its_demand_and_fewer_gpus_do_not(engine: Engine, costs: Costs) -> None:
    demand = Demand(plain(engine), rate=300.0, p95=2.0)
    planner = Planner(demand, Pool(), costs, requests=300)
    gpus = planner.gpus()
    assert planner.outcome(gpus).quantile(0.95) <= 2.0
    assert planner.outcome(int(gpus * (1 - PRECISION)) - 1).quantile(0.95) > 2.0
    assert gpus > planner.least_gpus()


def test_pools_are_planned_as_wholes(engine: Engine, costs: Costs) -> None:
    planner = Planner(Demand(plain(engine), 50.0, 3.0), Pool(gpus=4, servers=4), costs, requests=100)
    assert planner.least_gpus() % 4 == planner.gpus() % 4 == 0
    assert [planner.whole(gpus) for gpus in (0.1, 4, 4.1, 11)] == [4, 4, 8, 12]


def test_no_number_of_gpus_makes_a_request_faster_than_it_is_alone(engine: Engine, costs: Costs) -> None:
    alone = lone_p95(plain(engine), Pool(), costs)
    with pytest.raises(Unreachable) as caught:
        Planner(Demand(plain(engine), 1.0, alone * 0.9), Pool(), costs).gpus()
    assert caught.value.seconds == alone


def test_shares_of_sizes_steps_and_guidance_multiply(engine: Engine) -> None:
    mix = mix_of(engine, ["64x64=3", "128x128"], ["10", "20"], unguided=0.25, images=2)
    assert len(mix) == 8
    small = sum(share for work, share in mix if work.places == 64) / sum(share for _, share in mix)
    unguided = sum(share for work, share in mix if work.rows == 1) / sum(share for _, share in mix)
    assert (small, unguided, images_of(mix)) == (0.75, 0.25, 2)


@pytest.fixture
def costs_here(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `sdserver calibrate` would have written."""
    monkeypatch.setenv("SDSERVER_COST_MODELS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return cost_model.write(tmp_path, engine, UNET, [], STAGES)


def test_the_command_says_how_many_gpus_and_what_images_cost(
    costs_here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--rate", "40", "--p95", "4", "--price", "2", "--requests", "200"]) == 0
    said = capsys.readouterr().out
    [(gpus, price)] = re.findall(r"^(\d+) GPUs for 40 requests/s .* 1,000 images cost ([\d.]+)\.$", said, re.M)
    assert float(price) == pytest.approx(1000 * int(gpus) * 2 / (3600 * 40), rel=0.01)
    assert any(line.split()[0] == gpus for line in said.splitlines())


def test_costs_of_another_version_or_without_stages_are_used_with_a_note(
    costs_here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(costs_here.read_text())
    costs_here.write_text(json.dumps({**said, "engine_digest": "sha256:other", "stages": None}))
    assert main(["--rate", "1", "--requests", "50"]) == 0
    notes = capsys.readouterr().out
    assert "another version" in notes
    assert "without texts, decoding and writing" in notes


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--cost-model", "tiny-landscape.json", "--engine", "tiny-landscape"], "sdserver calibrate"),
        (["--engine", "nope"], "tiny-landscape"),
        (["--p95", "0.01"], "no number of GPUs"),
        (["--size", "64by64"], "768x512"),
        (["--size", "8x64"], "16 to 2048"),
        (["--steps", "0"], "such as 25"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_message(
    costs_here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert main(["--rate", "1", "--requests", "50", *flags]) == 1
    message = capsys.readouterr().err
    assert message.startswith("sdserver plan: ")
    assert expected in message


def test_a_file_that_is_no_cost_model_is_one_clear_message(
    costs_here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs_here.write_text("{}")
    assert main(["--rate", "1"]) == 1
    assert "is no cost model" in capsys.readouterr().err
