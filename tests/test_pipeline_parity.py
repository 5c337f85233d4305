"""An added engine draws, through SDK and server, the picture that diffusers' own pipelines draw of the same weights.

Of every kind of engine, on its real configuration at reduced width. What the service does on purpose otherwise:

- the last step goes down to no noise at all, where SD's own configuration of DDIM stops just above it;
- an initial image is the mean of what the encoder says of it, not a sample;
- of a strength of 1 with a mask, what is kept is there from the first step, and diffusers starts from noise alone;
- what a mask keeps comes back byte for byte, not through the autoencoder.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import pytest
from checkpoints import Model
from diffusers_pictures import Case, Picture, clip_tokenizer, psnr
from sdclient import AsyncClient
from sdmodels.conversion.convert import Options, convert
from sdserver.engine_store import EngineStore
from sdserver.server import Server
from sdserver.triton_models import Placement

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.settings import ServeSettings
    from transformers import CLIPTokenizer

ONE, TWO, TWO_BASE = Model("1", "epsilon"), Model("2", "v_prediction"), Model("2", "epsilon")
TRAILING = {"timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Kind:
    """A kind of engine: its modules, the name of the file or folder that it is made from, its scheduler's own words."""

    model: Model
    source: str
    scheduler: dict[str, Any]


KINDS = {
    "sd-2-1": Kind(TWO, "v2-1_768-ema-pruned.safetensors", {}),
    # Also 2.0's. diffusers spaces the steps of these samplers as the service does in this spacing alone.
    "sd-2-1-base": Kind(TWO_BASE, "stable-diffusion-2-1-base", TRAILING),
    "sd-1-5": Kind(ONE, "v1-5-pruned-emaonly.safetensors", {}),
    "sd-turbo": Kind(TWO_BASE, "sd_turbo.safetensors", TRAILING),
}
CASES = [
    Case("sd-2-1", "ddim"),
    Case("sd-2-1", "euler", width=64, height=128),
    Case("sd-2-1", "ddim", "image", strength=0.5),
    Case("sd-2-1", "euler", "inpaint"),
    Case("sd-2-1-base", "dpmpp_2m"),
    Case("sd-2-1-base", "unipc", width=64, height=64),
    Case("sd-2-1-base", "heun", width=64, height=128),
    Case("sd-2-1-base", "dpmpp_2m", "image"),
    Case("sd-1-5", "ddim"),
    Case("sd-1-5", "euler", width=64, height=128),
    Case("sd-1-5", "euler", "image", strength=0.5),
    Case("sd-1-5", "ddim", "inpaint"),
    Case("sd-turbo", "euler", steps=1, scale=1.0),
    Case("sd-turbo", "euler", "image", steps=4, scale=1.0),
]


class Diffusers:
    """diffusers' pictures, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drawn: dict[Case, Picture] = {}

    @cached_property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        return {family: clip_tokenizer(self._folder / family, family) for family in ("1", "2")}

    def __call__(self, case: Case) -> Picture:
        kind = KINDS[case.engine]
        if case not in self._drawn:
            scheduler = {"prediction_type": kind.model.prediction_type, **kind.scheduler}
            tokenizer = self.tokenizers[kind.model.family]
            self._drawn[case] = case.by_diffusers(kind.model, tokenizer, scheduler)
        return self._drawn[case]


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Diffusers:
    return Diffusers(tmp_path_factory.mktemp("tokenizers"))


class Repository:
    """A model repository with an engine of each kind; those that share a UNet share OpenVINO's form of it."""

    def __init__(self, sources: Path, folder: Path, networks: Path) -> None:
        self.folder = folder
        self.store = EngineStore(folder)
        self._facts = {}
        for engine_id, kind in KINDS.items():
            source = sources / kind.source
            if source.suffix:
                kind.model.save_original(source)
            else:
                path = kind.model.save_diffusers(source) / "scheduler/scheduler_config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | kind.scheduler))
            prediction = kind.model.prediction_type
            options = Options(str(source), str(self.store.folder(engine_id)), dtype="fp32", prediction_type=prediction)
            self._facts[engine_id] = convert(options, lambda _: None)
            (self.store.folder(engine_id) / "openvino").symlink_to(networks)

    def drawn(self, settings: ServeSettings, precision: str) -> dict[Case, Picture]:
        """The service's pictures of all cases, with UNets that compute in a precision."""
        for engine_id, facts in self._facts.items():
            self.store.complete(engine_id, "", "", facts, Placement(precision=precision))

        async def draw() -> dict[Case, Picture]:
            alone = settings.model_copy(update={"model_repository": self.folder, "backend": "in-process"})
            async with Server(alone) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
                async with asyncio.timeout(250):
                    while not all(engine.ready for engine in await client.engines()):
                        await asyncio.sleep(0.05)
                return {case: await case.by_the_service(client) for case in CASES}

        return asyncio.run(draw())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(*(tmp_path_factory.mktemp(name) for name in ("sources", "repository", "networks")))


@pytest.fixture(scope="module")
def in_fp32(settings: ServeSettings, repository: Repository) -> dict[Case, Picture]:
    return repository.drawn(settings, "fp32")


@pytest.fixture(scope="module")
def in_bf16(settings: ServeSettings, repository: Repository) -> dict[Case, Picture]:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not compute in bf16")
    return repository.drawn(settings, "bf16")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_fp32_the_picture_is_that_of_diffusers(
    in_fp32: dict[Case, Picture], diffusers: Diffusers, case: Case
) -> None:
    expected = diffusers(case)
    assert expected.std() > 2
    np.testing.assert_allclose(in_fp32[case], expected, atol=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_bf16_the_picture_is_within_40_db_of_that_of_diffusers(
    in_bf16: dict[Case, Picture], diffusers: Diffusers, case: Case
) -> None:
    assert psnr(in_bf16[case], diffusers(case)) >= 40


def test_a_turbo_of_an_original_file_takes_its_one_step_from_the_noisy_end(
    repository: Repository, in_fp32: dict[Case, Picture]
) -> None:
    turbo = repository.store.find("sd-turbo")
    assert turbo
    assert turbo.noise_schedule.timestep(turbo.sigmas("native", 1)[0]) == 999
