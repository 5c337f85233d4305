"""`sdclient inspect`: how images were made, as their files say."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from ._errors import MetadataError
from ._metadata import read_metadata
from ._prompts import format_prompts
from ._terminal import print_sections

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ._metadata import Metadata


def inspect(files: Sequence[Path], as_json: bool) -> None:
    """Prints what the files say, those that say nothing on standard error. Raises MetadataError if there were such."""
    read: dict[Path, Metadata] = {}
    for path in files:
        try:
            read[path] = read_metadata(path)
        except (MetadataError, OSError) as error:
            print(f"sdclient: {error}", file=sys.stderr)
    if as_json:
        said = [{"path": str(path), **asdict(metadata)} for path, metadata in read.items()]
        print(json.dumps(said, indent=2, default=_to_json))
    elif read:
        print_sections([_section(path, metadata) for path, metadata in read.items()])
    if failed := len(files) - len(read):
        raise MetadataError(f"{failed} of {len(files)} files do not say how they were made")


def _to_json(value: Any) -> Any:
    # The options are a plain dict, into which asdict does not look for dataclasses; data is never in a file.
    return {name: part for name, part in asdict(value).items() if part != b""}


def _section(path: Path, metadata: Metadata) -> dict[str, str]:
    return {
        "file": str(path),
        "prompts": format_prompts(metadata.prompts),
        **{name: _plain(value) for name, value in metadata.options.items() if name != "engine"},
        "engine": f"{metadata.engine}, {metadata.engine_digest}",
        "server": f"sd-service {metadata.server_version}",
    }


def _plain(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        parts = asdict(value).items()
        return ", ".join(f"{name} {_plain(part)}" for name, part in parts if part not in (None, "", b""))
    if isinstance(value, tuple | list):
        return ", ".join(_plain(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
