"""The code of the README and of examples/ runs as it stands, against the real Triton."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from sdserver.server import Server

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

ROOT = Path(__file__).parents[1]
ADDRESS = "localhost:50051"


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


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


@pytest.mark.parametrize("name", ["quickstart", "stream", "asynchronous", "errors"])
async def test_the_examples_run(triton_settings: ServeSettings, tmp_path: Path, name: str) -> None:
    code = (ROOT / "examples" / f"{name}.py").read_text()
    async with Server(triton_settings) as server:
        await run(tmp_path, [sys.executable, "-c", code.replace(ADDRESS, f"127.0.0.1:{server.port}")])


def test_every_example_is_run_by_a_test() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"quickstart", "stream", "asynchronous", "errors", "demo"}


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name}: {target}"


def test_every_command_of_the_makefile_is_known_to_the_documents() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(document.read_text() for document in ROOT.glob("*.md"))
    for name in re.findall(r"make ([a-z]+)", text):
        assert name in targets
