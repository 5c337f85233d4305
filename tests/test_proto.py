"""The generated code is what the contract says, and everybody goes through its one door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_generated_code_is_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/generate_stubs.py", tmp_path], check=True)
    generated = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    checked_in = {
        path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*_pb2*.py*") if path.suffix != ".pyc"
    }
    assert generated == checked_in
    for path in generated:
        assert (tmp_path / path).read_text() == (ROOT / "proto" / path).read_text(), f"{path}: run `make proto`"
