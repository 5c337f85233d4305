"""The code of the README and of examples/ runs as it stands, against the real Triton."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkpoints import Model
from loras import save_tiny
from PIL import Image
from safetensors.torch import load_file
from sdserver.server import Server

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

ROOT = Path(__file__).parents[1]
ADDRESS = "localhost:50051"


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


async def run(folder: Path, command: list[str], **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={"PATH": str(Path(sys.executable).parent), "HOME": str(folder), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_python_of_the_readme_runs(triton_settings: ServeSettings, tmp_path: Path) -> None:
    async with Server(triton_settings) as server:
        for code in blocks("python"):
            assert ADDRESS in code
            await run(tmp_path, [sys.executable, "-c", code.replace(ADDRESS, f"127.0.0.1:{server.port}")])
    assert size(tmp_path / "lake.png") == (384, 128)
    assert {path.name for path in tmp_path.glob("*.png")} == {"lake.png", "sea-0.png", "sea-1.png"}


async def test_the_client_commands_of_the_readme_run(triton_settings: ServeSettings, tmp_path: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sdclient")]
    assert len(commands) == 2
    async with Server(triton_settings) as server:
        for command in commands:
            await run(tmp_path, shlex.split(command, comments=True), SDCLIENT_SERVER=f"127.0.0.1:{server.port}")
    assert size(tmp_path / "out.png") == (384, 128)


async def test_the_commands_of_the_panoramas_run(triton_settings: ServeSettings, tmp_path: Path) -> None:
    commands = "".join(blocks("sh", "docs/panoramas.md")).splitlines()
    assert len(commands) == 3
    async with Server(triton_settings) as server:
        for command in commands:
            await run(tmp_path, [*shlex.split(command), "-s", "2"], SDCLIENT_SERVER=f"127.0.0.1:{server.port}")
    assert size(tmp_path / "out.png") == (256, 128)


def test_the_python_of_the_panoramas_is_that_of_its_example() -> None:
    [code] = blocks("python", "docs/panoramas.md")
    lines = (ROOT / "examples/panorama.py").read_text().splitlines()
    assert set(code.splitlines()) <= set(lines)


async def test_the_python_and_the_commands_of_the_images_run(triton_settings: ServeSettings, tmp_path: Path) -> None:
    commands = "".join(blocks("sh", "docs/images.md")).splitlines()
    assert len(commands) == 2
    async with Server(triton_settings) as server:
        address = f"127.0.0.1:{server.port}"
        for code in blocks("python", "docs/images.md"):
            await run(tmp_path, [sys.executable, "-c", code.replace(ADDRESS, address)])
        for command in commands:
            await run(tmp_path, [*shlex.split(command), "-s", "4"], SDCLIENT_SERVER=address)
    assert size(tmp_path / "sunset.png") == size(tmp_path / "trees.png") == (128, 128)
    assert size(tmp_path / "wide.png") == (256, 128)
    assert size(tmp_path / "large.png") == (256, 256)
    assert size(tmp_path / "variation-2.png") == (128, 128)


async def test_the_python_and_the_command_of_block_caching_run(triton_settings: ServeSettings, tmp_path: Path) -> None:
    [code], [command] = blocks("python", "docs/block-caching.md"), blocks("sh", "docs/block-caching.md")
    async with Server(triton_settings) as server:
        address = f"127.0.0.1:{server.port}"
        await run(tmp_path, [sys.executable, "-c", code.replace(ADDRESS, address)])
        await run(tmp_path, shlex.split(command), SDCLIENT_SERVER=address)
    # The same request, by either way.
    assert (tmp_path / "lake.png").read_bytes() == (tmp_path / "out.png").read_bytes()


async def test_the_python_and_the_commands_of_the_loras_run(settings: ServeSettings, tmp_path: Path) -> None:
    # The shipped engine in a repository that may be written.
    engine = tmp_path / "repository/engines/tiny-landscape"
    engine.mkdir(parents=True)
    for path in (settings.model_repository / "engines/tiny-landscape").iterdir():
        (engine / path.name).symlink_to(path)
    for path in settings.model_repository.glob("tiny-landscape.*"):
        (tmp_path / "repository" / path.name).symlink_to(path)
    save_tiny(tmp_path / "ink-style.safetensors", 1, load_file(engine / "unet/diffusion_pytorch_model.safetensors"))
    [code], [adding, generating] = blocks("python", "docs/loras.md"), blocks("sh", "docs/loras.md")
    repository = tmp_path / "repository"
    alone = settings.model_copy(update={"model_repository": repository, "backend": "in-process"})
    async with Server(alone.model_copy(update={"engine_watch_seconds": 0.1})) as server:
        said = [
            await run(tmp_path, shlex.split(command), SDSERVER_MODEL_REPOSITORY=str(repository))
            for command in adding.splitlines()
        ]
        assert "ink-style: 2 layers of the UNet and 3 layers of the text encoder, rank 4" in said[0]
        assert "ink-style" in said[1]
        async with asyncio.timeout(120):
            while not server.catalog.default.loras:
                await asyncio.sleep(0.1)
        address = f"127.0.0.1:{server.port}"
        await run(tmp_path, [sys.executable, "-c", code.replace(ADDRESS, address)])
        await run(tmp_path, shlex.split(generating), SDCLIENT_SERVER=address)
    # The same request, by either way.
    assert (tmp_path / "lake.png").read_bytes() == (tmp_path / "out.png").read_bytes()


@pytest.mark.parametrize("name", ["quickstart", "stream", "asynchronous", "errors", "panorama", "images"])
async def test_the_examples_run(triton_settings: ServeSettings, tmp_path: Path, name: str) -> None:
    code = (ROOT / "examples" / f"{name}.py").read_text()
    async with Server(triton_settings) as server:
        await run(tmp_path, [sys.executable, "-c", code.replace(ADDRESS, f"127.0.0.1:{server.port}")])


async def test_the_commands_of_the_engines_run(tmp_path: Path) -> None:
    Model("2", "v_prediction").save_original(tmp_path / "v2-1_768-ema-pruned.safetensors")
    [block] = blocks("sh", "docs/engines.md")
    outputs = [
        await run(tmp_path, shlex.split(command), SDSERVER_MODEL_REPOSITORY=str(tmp_path / "repository"))
        for command in block.splitlines()
    ]
    assert "v_prediction" in outputs[1]
    assert outputs[2:] == ["stable-diffusion-768-v2-1: whole\n", "stable-diffusion-768-v2-1 is removed\n"]


def test_every_example_is_run_by_a_test() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"quickstart", "stream", "asynchronous", "errors", "panorama", "images", "demo"}


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name}: {target}"


def test_every_command_of_the_makefile_is_known_to_the_documents() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(document.read_text() for document in ROOT.glob("*.md"))
    for name in re.findall(r"make ([a-z-]+)", text):
        assert name in targets


async def test_the_command_of_the_scheduling_measures_calls(triton_settings: ServeSettings, tmp_path: Path) -> None:
    [command] = "".join(blocks("sh", "docs/scheduling.md")).splitlines()
    environment = {"SDSERVER_TRITON_URL": triton_settings.triton_url, "SDSERVER_COST_MODELS": str(tmp_path)}
    said = await run(tmp_path, [*shlex.split(command), "--seconds", "1"], **environment)
    assert "a UNet call" in said
    assert (tmp_path / "tiny-landscape.json").exists()
