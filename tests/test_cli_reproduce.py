"""`sdclient inspect` and `sdclient reproduce` against a real server over a backend without weights."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from calls import a_request, events_of, images_of
from PIL import Image
from sdapi.v1 import generation_pb2
from sdclient import read_metadata
from sdclient.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.server import Server


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    """Commands write into an empty folder, and know the server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDCLIENT_SERVER", f"127.0.0.1:{server.port}")
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


async def sdclient(*arguments: str | Path) -> int:
    return await asyncio.to_thread(main, [str(argument) for argument in arguments])


async def made(stub: GenerationServiceAsyncStub, path: Path, media_type: str = "image/png", **fields: Any) -> Path:
    """A file of the second of two images."""
    fields = {"seed": 4, "image_count": 2, "output": generation_pb2.Output(media_type=media_type), **fields}
    path.write_bytes(images_of(await events_of(stub, a_request(**fields)))[1].data)
    return path


def a_picture(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command has printed, behind the log of the server in the same process."""
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line in ("[", "{"))
    return json.loads("\n".join(lines[start:]))


# inspect


async def test_inspect_shows_everything(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    prompts = [
        generation_pb2.Prompt(text="a lake: 2, [red]\x1b[31m"),
        generation_pb2.Prompt(text="trees", weight=-0.5),
    ]
    await made(stub, folder / "lake.png", prompts=prompts, guidance_scale=7.1)
    assert await sdclient("inspect", "lake.png") == 0
    table = capsys.readouterr().out
    engine = server.catalog.default
    for text in ("lake.png", "trees : -0.5", "guidance_scale", "7.1", engine.defaults.sampler, engine.digest):
        assert text in table
    # A file may say what it wants, and the terminal does not obey.
    assert "\x1b[31m" not in table


async def test_inspect_cuts_nothing_off_in_a_narrow_terminal(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(stub, folder / "lake.png")
    monkeypatch.setenv("COLUMNS", "50")
    assert await sdclient("inspect", "lake.png") == 0
    assert "…" not in capsys.readouterr().out


async def test_inspect_is_json_on_request(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await made(stub, folder / "a.webp", "image/webp")
    await made(stub, folder / "b.avif", "image/avif")
    assert await sdclient("inspect", "--json", "a.webp", "b.avif") == 0
    first, second = printed_json(capsys)
    assert (first["path"], second["path"]) == ("a.webp", "b.avif")
    assert first["prompts"] == [{"text": "a lake at dusk", "weight": 1.0, "emphasis": []}]
    assert (first["options"]["seed"], first["options"]["image_count"]) == (5, 1)
    assert first["options"]["output"] == {"media_type": "image/webp", "quality": 95, "metadata": True}


async def test_inspect_goes_on_after_a_file_that_says_nothing(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await made(stub, folder / "lake.png")
    (folder / "plain.png").write_bytes(a_picture())
    assert await sdclient("inspect", "plain.png", "none.png", "lake.png") == 1
    out, err = capsys.readouterr()
    assert "lake.png" in out
    plain, none, total = err.splitlines()
    assert plain.startswith("sdclient: cannot read how plain.png was made: it carries no metadata")
    assert "none.png" in none
    assert total == "sdclient: 2 of 3 files do not say how they were made"


# reproduce


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "JPEG", "avif"])
async def test_reproduce_makes_the_same_pixels(
    stub: GenerationServiceAsyncStub, folder: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    media_type = f"image/{suffix.lower().replace('jpg', 'jpeg')}"
    original = await made(stub, folder / f"lake.{suffix}", media_type, sampler="SAMPLER_EULER_ANCESTRAL")
    assert await sdclient("reproduce", original) == 0
    again = folder / f"lake-again.{suffix}"
    assert again.read_bytes() == original.read_bytes()
    assert capsys.readouterr().out.endswith(f"lake-again.{suffix}  seed 5  the same pixels\n")


async def test_another_format_is_made_and_not_compared(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = await made(stub, folder / "lake.jpg", "image/jpeg")
    assert await sdclient("reproduce", original, "-o", "lake.png", "--json") == 0
    assert printed_json(capsys)["same_pixels"] is None
    said = read_metadata("lake.png")
    assert said.options["output"].media_type == "image/png"  # type: ignore[union-attr]
    assert said.options["seed"] == 5


async def test_a_format_that_nobody_knows_any_more_becomes_a_png(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = await made(stub, folder / "lake.jpg", "image/jpeg")
    original.write_bytes(original.read_bytes().replace(b'"image/jpeg"', b'"image/lost"'))
    assert await sdclient("reproduce", original) == 0
    assert "lake-again.png  seed 5  not compared" in capsys.readouterr().out


async def test_changed_pixels_are_an_error_unless_forced(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = await made(stub, folder / "lake.png")
    data = original.read_bytes()
    # Our text chunks, and the pixels of another file.
    ihdr_end, idat, other = 33, data.index(b"IDAT") - 4, a_picture("magenta")
    original.write_bytes(other[:ihdr_end] + data[ihdr_end:idat] + other[ihdr_end:])
    assert await sdclient("reproduce", original) == 1
    assert "lake-again.png has other pixels than" in capsys.readouterr().err
    assert await sdclient("reproduce", original, "--force") == 0
    assert capsys.readouterr().out.endswith("other pixels\n")


async def test_another_digest_of_the_engine_is_refused_unless_forced(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    original = await made(stub, folder / "lake.jpg", "image/jpeg")
    digest = server.catalog.default.digest
    older = digest.replace("sha256:", "sha256;")
    original.write_bytes(original.read_bytes().replace(digest.encode(), older.encode()))
    assert await sdclient("reproduce", original) == 1
    assert not (folder / "lake-again.jpg").exists()
    assert f"is {digest} on this server, and was {older}" in capsys.readouterr().err
    assert await sdclient("reproduce", original, "--force") == 0
    assert "the same pixels" in capsys.readouterr().out


async def test_an_engine_that_the_server_does_not_have_is_an_error(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = await made(stub, folder / "lake.jpg", "image/jpeg")
    original.write_bytes(original.read_bytes().replace(b"Engine>tiny-landscape<", b"Engine>tiny-landscopo<"))
    assert await sdclient("reproduce", original, "--force") == 1
    assert "this server has tiny-landscape: choose another --server" in capsys.readouterr().err


async def test_the_initial_image_and_the_mask_are_asked_for_by_their_sha256(
    stub: GenerationServiceAsyncStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, mask = a_picture("red"), a_picture("white")
    original = await made(
        stub,
        folder / "lake.png",
        init_image=generation_pb2.InitImage(data=init, strength=0.5),
        mask=generation_pb2.Mask(data=mask),
    )
    (folder / "init.png").write_bytes(init)
    (folder / "mask.png").write_bytes(mask)
    assert await sdclient("reproduce", original) == 1
    assert await sdclient("reproduce", original, "--init", "mask.png", "--mask", "mask.png") == 1
    err = capsys.readouterr().err
    for data in (init, mask):
        assert f"give the file with SHA-256 {hashlib.sha256(data).hexdigest()}" in err
    assert f"mask.png has SHA-256 {hashlib.sha256(mask).hexdigest()}" in err
    assert await sdclient("reproduce", original, "--init", "init.png", "--mask", "mask.png") == 0
    assert (folder / "lake-again.png").read_bytes() == original.read_bytes()
    plain = await made(stub, folder / "plain.png")
    for flag in ("--init", "--depth-map"):
        assert await sdclient("reproduce", plain, flag, "init.png") == 1
        assert f"{flag}: the image was made without one" in capsys.readouterr().err


async def test_the_original_is_never_written_over(stub: GenerationServiceAsyncStub, folder: Path) -> None:
    original = await made(stub, folder / "lake.png")
    before = original.read_bytes()
    assert await sdclient("reproduce", original, "-o", "lake.png") == 1
    assert original.read_bytes() == before


async def test_generate_can_leave_the_metadata_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await sdclient("generate", "a lake", "--no-metadata", "-s", "2", "-o", "lake.avif") == 0
    assert await sdclient("inspect", "lake.avif") == 1
    assert "carries no metadata" in capsys.readouterr().err
