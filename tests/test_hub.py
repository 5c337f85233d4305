"""Checkpoints of a hub: only what is needed is fetched, of one commit, and digests decide whether it is right."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from checkpoints import Model
from sdserver.engines import load_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """The two calls of the hub's protocol that fetching takes, over folders: owner/name -> folder."""

    repositories: dict[str, Path]
    fetched: list[str] = field(default_factory=list)
    endpoint: str = ""

    def index(self, repository: str) -> dict[str, Any]:
        """What the hub knows of a repository; large files are known by their digests."""
        folder = self.repositories[repository]
        return {
            "id": repository,
            "modelId": repository,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": [
                {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size, **_lfs(path)}
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ],
        }


def _lfs(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return {"blobId": "0" * 40}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"blobId": "0" * 40, "lfs": {"sha256": digest, "size": path.stat().st_size, "pointerSize": 134}}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub({})

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def log_message(self, *arguments: Any) -> None:
            pass

        def _answer(self, send: bool) -> None:
            path = unquote(self.path.split("?")[0])
            headers = {"X-Repo-Commit": COMMIT}
            status, content = 404, b"{}"
            if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path)) and found[
                1
            ] in hub.repositories:
                status, content = 200, json.dumps(hub.index(found[1])).encode()
            elif (found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)) and found[
                1
            ] in hub.repositories:
                status, content = 200, (hub.repositories[found[1]] / found[2]).read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                if send:
                    hub.fetched.append(found[2])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if send:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def add(hub: FakeHub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sdserver engine add` against the fake hub, with a cache of the test's own, and without OpenVINO."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "sdserver",
            "engine",
            "add",
            "--model-repository",
            str(tmp_path / "repository"),
            "--runtime",
            "torch",
            *arguments,
        ],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_of_a_repository_only_what_an_engine_needs_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    folder = Model("1", "epsilon").save_diffusers(tmp_path / "source")
    (folder / "v1-small.ckpt").write_bytes(b"another form of the same, large")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"not wanted")
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"not wanted")
    hub.repositories["small/model"] = folder

    result = add(hub, tmp_path, "small/model", "--name", "small")

    assert result.returncode == 0, result.stderr
    assert set(hub.fetched) == {
        "model_index.json",
        "README.md",
        "scheduler/scheduler_config.json",
        *(f"{name}/config.json" for name in ("unet", "vae", "text_encoder")),
        *(f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")),
        "text_encoder/model.safetensors",
    }
    source = load_engine(tmp_path / "repository/engines/small").source
    assert source
    assert (source.name, source.revision) == ("small/model", COMMIT)
    # What it is at, and no bars of the hub's own.
    assert result.stderr.startswith("fetching\nreading\nwriting\nwritten unet/")
    assert "fitting the preview map" in result.stderr


def test_the_image_tower_of_a_checkpoints_clip_is_fetched_by_its_name(hub: FakeHub, tmp_path: Path) -> None:
    model = Model("2", "v_prediction")
    hub.repositories |= {"small/two": model.save_diffusers(tmp_path / "two"), "laion/clip": tmp_path / "clip"}
    (tmp_path / "clip").mkdir()
    model.save_clip(tmp_path / "clip")
    (tmp_path / "clip/open_clip_pytorch_model.bin").write_bytes(b"another form of the same, large")
    result = add(hub, tmp_path, "small/two", "--name", "two", "--clip", "laion/clip")
    assert result.returncode == 0, result.stderr
    assert "clip_guidance" in load_engine(tmp_path / "repository/engines/two").roles
    assert [name for name in hub.fetched if "clip" in name] == ["open_clip_config.json", "open_clip_model.safetensors"]


def test_a_mirror_that_hands_out_something_else_is_refused_by_the_pinned_digest(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    Model("2", "v_prediction").save_original(folder / "v2-1_768-ema-pruned.safetensors")
    hub.repositories["some/mirror"] = folder
    result = add(hub, tmp_path, "stable-diffusion-2-1", "--mirror", "some/mirror")
    assert result.returncode == 1
    assert "not the one that was asked for, by its SHA-256" in result.stderr
    assert "must be dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac" in result.stderr
    assert not [*(tmp_path / "repository").rglob("*.safetensors")]


@pytest.mark.parametrize("reached", [True, False])
def test_a_repository_that_is_not_there_is_one_clear_message(hub: FakeHub, tmp_path: Path, reached: bool) -> None:
    if not reached:
        # The discard port: nothing listens there.
        hub.endpoint = "http://127.0.0.1:9"
    result = add(hub, tmp_path, "nobody/nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("sdserver engine: ")
    assert "nobody/nothing" in result.stderr
    assert "Traceback" not in result.stderr
