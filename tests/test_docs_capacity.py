"""What docs/capacity.md shows is what `sdserver plan` prints, and what it says about plans is so."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import planned_engine
import pytest
from sdserver import cost_model
from sdserver.capacity.outcome import Costs, Pool
from sdserver.capacity.planning import Demand, Planner
from sdserver.capacity.workload import work_of
from sdserver.plan_command import SERVER_STEP_MS, cost_of_1000, main

if TYPE_CHECKING:
    from sdserver.engines import Catalog

TEXT = (Path(__file__).parents[1] / "docs/capacity.md").read_text()
P95, PRICE = 6.0, 2.5


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def costs(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Costs:
    """The page's costs, in the folder where its commands run, and where `calibrate` keeps them."""
    engine = planned_engine.write(tmp_path, catalog.default)
    [block] = blocks("json")
    path = tmp_path / f"{engine.id}.json"
    path.write_text(json.dumps(json.loads(block) | {"engine_digest": engine.digest}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDSERVER_MODEL_REPOSITORY", str(tmp_path))
    monkeypatch.setenv("SDSERVER_COST_MODELS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    calibration = cost_model.load(path)
    assert calibration.stages is not None
    return Costs(engine, calibration.cost_model, calibration.stages, SERVER_STEP_MS / 1000)


def planner(costs: Costs, rate: float, pool: Pool | None = None) -> Planner:
    mix = ((work_of(costs.engine, 768, 768, 25), 1.0),)
    return Planner(Demand(mix, rate, P95), pool or Pool(), costs)


def test_the_plan_that_is_shown_is_what_the_command_prints(costs: Costs, capsys: pytest.CaptureFixture[str]) -> None:
    [shown] = [block for block in blocks("") if block.startswith("$ sdserver plan")]
    command, _, output = shown.removeprefix("$ ").partition("\n")
    assert main(shlex.split(command)[2:]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == output.splitlines()


def test_the_commands_run(costs: Costs) -> None:
    [commands] = blocks("sh")
    for command in commands.splitlines():
        assert main([*shlex.split(command)[2:], "--requests", "50", "--plot", "plan.png"]) == 0
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_rates_is_what_plans_say(costs: Costs) -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", TEXT, re.M)
    assert len(rows) == 4
    for row in rows:
        rate, gpus, least, price = (float(cell.replace(",", "")) for cell in row)
        plan = planner(costs, rate)
        assert plan.least_gpus() == least
        assert plan.outcome(int(gpus)).quantile(0.95) <= P95
        assert cost_of_1000(plan, int(gpus), PRICE) == pytest.approx(price, rel=0.01)


@pytest.mark.parametrize(
    ("said", "gpus", "pool"),
    [
        ("With `--max-active 2` the plan above is 44 GPUs", 44, Pool(max_active=2)),
        (
            "`--pool 4 --servers 4 --parallel-calls 4`, four servers that take four GPUs in turn, needs 36 GPUs",
            *(36, Pool(4, 4, parallel_calls=4)),
        ),
        (
            "so does one server for four GPUs (`--pool 4 --servers 1 --parallel-calls 4 --max-active 32`)",
            *(36, Pool(4, 1, 32, parallel_calls=4)),
        ),
        ("With its default of 1 the four servers need 56", 56, Pool(4, 4)),
    ],
)
def test_other_pools_need_as_many_gpus_as_the_page_says(costs: Costs, said: str, gpus: int, pool: Pool) -> None:
    assert said in " ".join(TEXT.split())
    plan = planner(costs, 20.0, pool)
    assert plan.outcome(gpus).quantile(0.95) <= P95 < plan.outcome(gpus - pool.gpus).quantile(0.95)
