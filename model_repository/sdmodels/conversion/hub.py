"""Checkpoints of a model hub, through huggingface_hub, which keeps and resumes what it has fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmodels.conversion.clip import CONFIG, WEIGHTS
from sdmodels.conversion.diffusers_folder import (
    COMPONENTS,
    CONFIGURATIONS,
    DEPTH_FILES,
    LOW_RESOLUTION_SCHEDULER,
    OPTIONAL_COMPONENTS,
    OPTIONAL_FILES,
    weights_names,
)
from sdmodels.conversion.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint from the hub: where it lies, of which commit it is, and the SHA-256 that its files must have."""

    path: Path
    revision: str
    digests: Mapping[str, str] = field(default_factory=dict)


def fetch(repository: str, revision: str, file: str, dtype: str, report: Callable[[str, int, int], None]) -> Fetched:
    """Downloads the files of a repository that an engine is made from, and nothing else; otherwise as `fetch_files`."""

    def wanted(names: Sequence[str]) -> Sequence[str]:
        return [file] if file else _wanted(repository, names, dtype)

    fetched = fetch_files(repository, revision, wanted, report)
    # A repository of several files keeps its folders: the first is model_index.json, at the top.
    return fetched if file else replace(fetched, path=fetched.path.parent)


def fetch_clip(repository: str, report: Callable[[str, int, int], None]) -> Fetched:
    """Downloads open_clip's files of a whole CLIP; otherwise as `fetch_files`."""

    def wanted(names: Sequence[str]) -> list[str]:
        weights = [name for name in WEIGHTS if name in names]
        return [CONFIG, *(weights[:1] or WEIGHTS[:1])]

    fetched = fetch_files(repository, "", wanted, report)
    return replace(fetched, path=fetched.path.parent)


def fetch_files(
    repository: str,
    revision: str,
    wanted: Callable[[Sequence[str]], Sequence[str]],
    report: Callable[[str, int, int], None],
) -> Fetched:
    """Downloads those of a repository's files that are wanted, of which the first is the path. Raises ConversionError.

    `revision` is a branch, tag or commit; what it means now is asked once, so that all files are of one commit. The
    digests are those that the hub's index states. `report` gets a file, how many bytes of all are there, and how many
    there will be.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    except ImportError as error:
        raise ConversionError("fetching from a hub needs huggingface_hub: pip install 'sd-service[models]'") from error
    # Its own error derives from OSError and from that of its HTTP library, which changes with its versions.
    http_errors: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        names = wanted(list(siblings))
        if missing := [name for name in names if name not in siblings]:
            raise ConversionError(f"{repository} has no {missing[0]}; it has {', '.join(sorted(siblings)[:20])}")
        total = sum(siblings[name].size or 0 for name in names)
        paths, before = {}, 0
        for name in names:
            report(name, before, total)
            counts = _counts(partial(_report, report, name, before, total))
            paths[name] = huggingface_hub.hf_hub_download(repository, name, revision=info.sha, tqdm_class=counts)
            before += siblings[name].size or 0
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"the hub has no {repository}, or wants a login for it: set HF_TOKEN, or name a mirror of it"
        ) from error
    except http_errors as error:
        raise ConversionError(
            f"{repository} cannot be fetched ({error}): run the command again, which goes on where it stopped, or "
            "download the files by other means and name their path"
        ) from error
    digests = {name: lfs.sha256 for name in names if (lfs := siblings[name].lfs) is not None}
    return Fetched(Path(paths[names[0]]), info.sha or "", digests)


def _report(report: Callable[[str, int, int], None], name: str, before: int, total: int, there: int) -> None:
    report(name, before + there, total)


def _counts(on_bytes: Callable[[int], None]) -> type[Any]:
    """A progress bar of the hub's library that tells us how many bytes of a file are there, and draws nothing."""
    from tqdm import tqdm

    class Counts(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            super().__init__(disable=True)
            self._there = initial

        def update(self, n: float | None = 1) -> None:
            self._there += int(n or 0)
            on_bytes(self._there)

    return Counts


def _wanted(repository: str, names: Sequence[str], dtype: str) -> list[str]:
    if "model_index.json" not in names:
        files: Any = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
        raise ConversionError(f"{repository} is no folder of diffusers: choose a checkpoint with --file", files)
    optional = (*OPTIONAL_FILES, LOW_RESOLUTION_SCHEDULER, *(DEPTH_FILES if DEPTH_FILES[0] in names else ()))
    wanted = [name for name in (*CONFIGURATIONS, *optional) if name in names]
    for component in (*COMPONENTS, *OPTIONAL_COMPONENTS):
        inside = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        wanted += [f"{component}/{name}" for name in weights_names(inside, component, dtype)]
    return wanted
