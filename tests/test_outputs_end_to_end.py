"""The command line, the server, the real Triton: a file alone is enough to make its pixels again."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image as Pillow
from pydantic_settings import CliApp
from sdclient import AsyncClient, InitImage, Mask, Output
from sdserver.server import Server
from sdserver.settings import UpSettings

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

ROOT = Path(__file__).parents[1]


async def sdclient(folder: Path, port: int | None, *arguments: str) -> str:
    server = () if port is None else ("--server", f"127.0.0.1:{port}")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sdclient", *arguments, *server),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, output.decode()
    return output.decode()


def pixels(data: bytes) -> np.typing.NDArray[np.uint8]:
    return np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpeg", "avif"])
async def test_an_image_of_a_batch_is_made_again_from_its_file_alone(
    triton_settings: ServeSettings, tmp_path: Path, suffix: str
) -> None:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        prompts = "a (lake:1.3) at dusk : 2 | a boat | trees, fog : -0.5"
        output = Output(f"image/{suffix}")
        images = await client.generate(
            prompts, steps=6, image_count=3, seed=2**32 + 5, sampler="dpmpp_2m_sde", width=100, output=output
        )
        original = images[2].save(tmp_path / f"lake.{suffix}")
        said = await sdclient(tmp_path, server.port, "reproduce", original.name)
        assert "the same pixels" in said
    again = (tmp_path / f"lake-again.{suffix}").read_bytes()
    assert np.array_equal(pixels(again), pixels(images[2].data))
    assert again == images[2].data
    assert not np.array_equal(pixels(again), pixels(images[0].data))


async def test_an_image_that_was_painted_into_another_is_made_again_with_that(
    triton_settings: ServeSettings, tmp_path: Path
) -> None:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        [first] = await client.generate("a meadow", steps=4, seed=1)
        white = Pillow.new("L", (first.width, first.height))
        white.paste(255, (0, 0, first.width // 2, first.height))
        white.save(tmp_path / "mask.png")
        first.save(tmp_path / "init.png")
        [lake] = await client.generate(
            "a lake",
            steps=6,
            seed=0,
            init_image=InitImage.open(tmp_path / "init.png", strength=0.8),
            mask=Mask.open(tmp_path / "mask.png"),
        )
        lake.save(tmp_path / "lake.png")
        init = lake.metadata.options["init_image"]
        assert init is not None
        assert (init.data, init.sha256) == (b"", hashlib.sha256(first.data).hexdigest())
        flags = ("--init", "init.png", "--mask", "mask.png")
        assert "the same pixels" in await sdclient(tmp_path, server.port, "reproduce", "lake.png", *flags)


async def test_the_document_of_outputs_runs(triton_settings: ServeSettings, tmp_path: Path) -> None:
    text = (ROOT / "docs/outputs.md").read_text()
    async with Server(triton_settings) as server:
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "sdclient"
                inspecting = arguments[0] == "inspect"
                await sdclient(tmp_path, None if inspecting else server.port, *arguments)
        [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        code = code.replace("localhost:50051", f"127.0.0.1:{server.port}")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=tmp_path)
        assert await asyncio.wait_for(process.wait(), 120) == 0
    assert (tmp_path / "again.avif").read_bytes() == (tmp_path / "lake.avif").read_bytes()


def test_the_flags_of_the_document_are_settings() -> None:
    [line] = re.findall(r"^sdserver up (.*)$", (ROOT / "docs/outputs.md").read_text(), re.MULTILINE)
    settings = CliApp.run(UpSettings, cli_args=shlex.split(line))
    assert settings.c2pa_certificates == Path("chain.pem")
    assert settings.c2pa_private_key == Path("key.pem")
    assert settings.c2pa_timestamp_authority is None
