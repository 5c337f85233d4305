"""The same steps as in the server's image, in a clean environment: `make check-images`, which CI runs, too."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_images import ROOT, bill, locked, stages

pytestmark = [
    pytest.mark.skipif("CHECK_IMAGES" not in os.environ, reason="`make check-images` runs it: it installs packages"),
    pytest.mark.timeout(900),
]
# Uncompressed, as `docker images` shows python:3.11-slim-bookworm, in MB; no part of this project decides it.
BASE_MB, MOST_MB = 131, 250


def test_the_servers_image_is_made_of_locked_packages_runs_and_is_small(tmp_path: Path) -> None:
    """The steps of the Dockerfile as they stand, in another folder, with the tests' python3."""
    target = tmp_path / "sd-service"
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name, rest in stages("server.Dockerfile")["build"]:
        if name != "RUN":
            continue
        for command in rest.split(" && "):
            if command.startswith("images/install"):
                step = command.replace("/opt/sd-service", str(target)).replace(
                    '"images/locks/${LOCK}.txt"', "images/locks/server.txt"
                )
                done = subprocess.run(shlex.split(step), cwd=ROOT, env=variables, capture_output=True, text=True)
                assert done.returncode == 0, f"{step}\n{done.stderr[-5000:]}"
    python = target / "bin/python"
    parts = bill(python)
    assert {name: each["version"] for name, each in parts.items() if name != "sd-service"} == {
        name: version for name, (version, _) in locked("server").items()
    }
    # Everything that the server imports is there, and still works.
    code = """
import io, sdserver.server, sdserver.metrics, sdserver.traces, sdserver.backends.triton, sdclient.__main__
from PIL import Image
for kind in ("PNG", "WEBP", "JPEG", "AVIF"):
    Image.new("RGB", (64, 64)).save(io.BytesIO(), kind)
"""
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    subprocess.run([target / "bin/sdserver", "serve", "--help"], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    megabytes = sum(path.lstat().st_size for path in target.rglob("*")) / 1e6
    print(f"{megabytes:.0f} MB of packages and {BASE_MB} MB of base")
    assert megabytes + BASE_MB <= MOST_MB
