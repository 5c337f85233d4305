"""What docs/operations.md says can be set is what can be set, and what it draws can be drawn."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import FakeBackend
from PIL import Image
from sdclient import AsyncClient
from sdclient.__main__ import main as sdclient_main
from sdserver.server import Server
from sdserver.settings import UpSettings

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/operations.md").read_text()


def test_every_flag_and_variable_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sdclient_main(["engines", "--help"])
    client = capsys.readouterr().out
    server = {f"--{name.replace('_', '-')}" for name in UpSettings.model_fields}
    others = {"--requests", "--once"}
    for flag in set(re.findall(r"--[a-z][a-z-]+", TEXT)):
        assert flag in server | others or flag in client, flag
    for variable in set(re.findall(r"SDCLIENT_[A-Z_]+", TEXT)):
        assert f"${variable}" in client, variable


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_every_query_is_one(tmp_path: Path) -> None:
    [block] = re.findall(r"```promql\n(.*?)```", TEXT, re.DOTALL)
    queries = [line for line in block.splitlines() if not line.startswith("#")]
    assert len(queries) == 4
    rules = "\n".join(f"      - record: query:{number}\n        expr: {query}" for number, query in enumerate(queries))
    file = tmp_path / "rules.yaml"
    file.write_text(f"groups:\n  - name: docs\n    rules:\n{rules}\n")
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


async def test_the_python_runs_with_a_key(settings: ServeSettings, tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    keys = tmp_path / "keys"
    keys.write_text("alice alice-key-0123456789\n")
    async with Server(settings.model_copy(update={"api_keys": keys}), FakeBackend()) as server:
        code = code.replace("localhost:50051", f"127.0.0.1:{server.port}")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code), env={"SDCLIENT_API_KEY": "alice-key-0123456789"}
        )
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_the_script_draws_what_a_server_sends(
    settings: ServeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "trace.png"
    command = [sys.executable, str(ROOT / "scripts/draw_trace.py"), str(picture), "--requests", "2"]
    process = await asyncio.create_subprocess_exec(*command, "--listen", "127.0.0.1:0", stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", line.rpartition("=")[2].strip())
    async with (
        Server(settings.model_copy(update={"traces": True}), FakeBackend(delay=0.02)) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        await asyncio.gather(*(client.generate("a lake", steps=steps) for steps in (3, 5)))
    assert await asyncio.wait_for(process.wait(), 60) == 0
    with Image.open(picture) as image:
        assert image.width > 1000
