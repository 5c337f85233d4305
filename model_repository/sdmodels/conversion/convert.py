"""From a checkpoint to the files of an engine, with reports on the way."""

from __future__ import annotations

import fcntl
import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmodels import depth
from sdmodels.conversion.clip import clip_files, whole_clip
from sdmodels.conversion.diffusers_folder import read_diffusers_folder, source_files
from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.hub import REPOSITORY, Fetched, fetch, fetch_clip
from sdmodels.conversion.original import read_original
from sdmodels.conversion.writing import DTYPES, sha256, size_of, write_file, write_safetensors
from sdmodels.weights import DIFFUSERS_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sdmodels.conversion.components import Checkpoint
    from sdmodels.conversion.tensors import Tensors

    Report = Callable[[dict[str, Any]], None]
    """Gets events: `event` is `progress` (stage, file, done, total in bytes or files), or `file` (file, sha256, bytes,
    action)."""

# Counts up when the same checkpoint gives other files, so that engines of before are made anew.
VERSION = 1
JOURNAL = ".unfinished.json"
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Options:
    """What to convert and how. `source` is a file, a folder, or a repository of the hub."""

    source: str
    into: str
    dtype: str = "fp16"
    prediction_type: str | None = None
    clip: str | None = None
    """Folder with open_clip's files of the whole CLIP, image tower and all, or a repository of the hub."""
    sha256: str | None = None
    """What the one file must have as its digest."""
    file: str = ""
    """The one file to take of a repository."""
    revision: str = ""
    existing_plan: str | None = None
    """The plan of the engine that lies in `into` already, or nothing if it was made otherwise."""
    existing_files: dict[str, str] = field(default_factory=dict)
    """Its files and their SHA-256."""


def convert(options: Options, report: Report) -> dict[str, Any]:
    """Writes the engine's files below `options.into`; returns facts for its descriptor. Raises ConversionError.

    A file is there whole or not at all. A run that was ended leaves a journal, and the next one with the same sources
    and options keeps the files that are finished, after looking at their digests again. So it does with an engine that
    was made from the same sources and options; another one is never touched.
    """
    fetched = _located(options, report)
    clip = _located_clip(options, report)
    digests = _source_digests(fetched, clip, options, report)
    plan = _plan(digests, options)
    if options.existing_plan not in (None, plan):
        raise ConversionError(
            f"{options.into} is an engine of another checkpoint or of other options: choose another --name, or remove "
            "it first"
        )
    checkpoint = _read(fetched.path, options)
    facts = _facts(checkpoint) | {
        "source": {
            "name": Path(options.source).name if fetched.revision == "" else options.source,
            "revision": fetched.revision,
            "dtype": options.dtype,
            "files": digests,
            "plan": plan,
        },
    }
    return facts | _written(checkpoint, None if clip is None else clip.path, options, plan, report)


def _located(options: Options, report: Report) -> Fetched:
    path = Path(options.source)
    if path.exists():
        return Fetched(path.resolve(), "")
    if not REPOSITORY.fullmatch(options.source):
        raise ConversionError(f"{options.source} does not exist, and is no repository such as owner/name")
    return fetch(
        options.source,
        options.revision,
        options.file,
        options.dtype,
        lambda file, done, total: report(_progress("fetching", file, done, total)),
    )


def _located_clip(options: Options, report: Report) -> Fetched | None:
    if options.clip is None:
        return None
    if Path(options.clip).exists():
        return Fetched(Path(options.clip), "")
    if not REPOSITORY.fullmatch(options.clip):
        raise ConversionError(f"--clip {options.clip} does not exist, and is no repository such as owner/name")
    return fetch_clip(options.clip, lambda file, done, total: report(_progress("fetching", file, done, total)))


def _source_digests(fetched: Fetched, clip: Fetched | None, options: Options, report: Report) -> dict[str, str]:
    """SHA-256 of all files that the engine is made from; of the wrong ones it says so before they are looked into."""
    if fetched.path.is_dir():
        sources = {str(path.relative_to(fetched.path)): path for path in source_files(fetched.path, options.dtype)}
    else:
        sources = {fetched.path.name: fetched.path}
    sources |= {f"clip/{path.name}": path for path in (clip_files(clip.path) if clip else ())}
    digests = _digests(sources, report)
    expected = dict(fetched.digests)
    if options.sha256 is not None:
        if fetched.path.is_dir():
            raise ConversionError("--sha256 is of one file, and the checkpoint is a folder")
        expected = {fetched.path.name: options.sha256.lower()}
    # A single file of a repository may lie in a folder of it.
    expected = {name if name in digests else Path(name).name: digest for name, digest in expected.items()}
    expected |= {f"clip/{name}": digest for name, digest in (clip.digests.items() if clip else ())}
    if wrong := [
        f"{name} is {digests[name]} and must be {digest}"
        for name, digest in expected.items()
        if digests[name] != digest
    ]:
        raise ConversionError("the checkpoint is not the one that was asked for, by its SHA-256", wrong)
    return digests


def _digests(files: Mapping[str, Path], report: Report) -> dict[str, str]:
    total = sum(path.stat().st_size for path in files.values())
    done = 0
    digests = {}
    for name, path in files.items():

        def progress(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            report(_progress("reading", name, done, total))

        digests[name] = sha256(path, progress)
    return digests


def _plan(digests: Mapping[str, str], options: Options) -> str:
    what = [VERSION, sorted(digests.items()), options.dtype, options.prediction_type, options.clip is not None]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(path: Path, options: Options) -> Checkpoint:
    if path.is_dir():
        return read_diffusers_folder(path, options.prediction_type, options.dtype)
    return read_original(path, options.prediction_type)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    text = checkpoint.clip.text_config
    return {
        "family": checkpoint.family,
        "prediction_type": checkpoint.prediction_type,
        "noise_schedule": checkpoint.noise_schedule,
        "conditioning": checkpoint.conditioning,
        "upscaling": checkpoint.upscaling,
        "estimates_depth": checkpoint.depth_estimator is not None,
        "latents": {"channels": checkpoint.vae.config["latent_channels"], "downsampling": checkpoint.downsampling},
        "text_encoder": {
            "context_length": text["context_length"],
            "width": text["width"],
            "layer": checkpoint.clip.layer,
            "padding": checkpoint.padding,
        },
        "native_size": checkpoint.native_size,
        "size_multiple": checkpoint.size_multiple,
        "unet_channels": checkpoint.unet.config["block_out_channels"],
        "license": checkpoint.license,
        "ignored": list(checkpoint.ignored),
    }


def _written(
    checkpoint: Checkpoint, clip_folder: Path | None, options: Options, plan: str, report: Report
) -> dict[str, Any]:
    clip = checkpoint.clip
    if clip_folder:
        clip, problems = whole_clip(clip_folder, clip)
        if problems:
            raise ConversionError(
                f"{options.clip} is not the CLIP that the checkpoint was trained with: without --clip the engine does "
                "all but CLIP guidance",
                problems,
            )
    dtype = DTYPES[options.dtype]
    weights: dict[str, Tensors] = {
        f"unet/{DIFFUSERS_WEIGHTS}": checkpoint.unet.tensors,
        f"vae/{DIFFUSERS_WEIGHTS}": checkpoint.vae.tensors,
        "clip/open_clip_model.safetensors": clip.tensors,
    }
    configs = {
        "unet/config.json": checkpoint.unet.config,
        "vae/config.json": checkpoint.vae.config,
        "clip/open_clip_config.json": clip.config,
    }
    if (estimator := checkpoint.depth_estimator) is not None:
        weights[f"{depth.FOLDER}/{depth.WEIGHTS}"] = estimator.tensors
        configs[f"{depth.FOLDER}/config.json"] = estimator.config
        configs[f"{depth.FOLDER}/{depth.PREPROCESSOR}"] = estimator.preprocessor
    total = sum(size_of(tensors, dtype) for tensors in weights.values())
    done = 0
    folder = Path(options.into)
    with _journal(folder, plan, options.existing_files) as journal:
        files = {}
        for name, config in configs.items():
            text = json.dumps(config, indent=1, sort_keys=True) + "\n"
            files[name] = journal.keep(name) or journal.add(name, write_file(folder / name, [text.encode()]))
        for name, tensors in weights.items():
            kept = journal.keep(name)
            size = size_of(tensors, dtype)

            def progress(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                report(_progress("writing", name, done, total))

            if kept:
                progress(size)
            digest = kept or journal.add(name, write_safetensors(folder / name, tensors, dtype, progress))
            files[name] = digest
            action = "kept" if kept else "written"
            report({"event": "file", "file": name, "sha256": digest, "bytes": size, "action": action})
    model = clip.config["model_cfg"]
    return {
        "files": files,
        "text_encoder": _facts(checkpoint)["text_encoder"] | {"layer": clip.layer},
        "image_tower": {"features": model["embed_dim"], "image_size": model["vision_cfg"]["image_size"]}
        if clip_folder
        else None,
    }


class _Journal:
    """Which files of a folder are finished, and with which digest."""

    def __init__(self, folder: Path, plan: str, files: Mapping[str, str]) -> None:
        self._folder, self._plan = folder, plan
        self._files = dict(files)
        path = folder / JOURNAL
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["plan"] == plan:
                self._files |= found["files"]

    def keep(self, name: str) -> str | None:
        """The digest of a file that was finished before and is still what it was."""
        digest = self._files.get(name)
        path = self._folder / name
        return digest if digest and path.is_file() and sha256(path) == digest else None

    def add(self, name: str, digest: str) -> str:
        """A file is finished."""
        self._files[name] = digest
        content = json.dumps({"plan": self._plan, "files": self._files})
        write_file(self._folder / JOURNAL, [content.encode()])
        return digest


@contextmanager
def _journal(folder: Path, plan: str, files: Mapping[str, str]) -> Iterator[_Journal]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another command is writing {folder}: wait for it") from None
        yield _Journal(folder, plan, files)


def _progress(stage: str, file: str, done: int, total: int) -> dict[str, Any]:
    return {"event": "progress", "stage": stage, "file": file, "done": done, "total": total}


def options_of(data: Mapping[str, Any]) -> Options:
    """Options from JSON; raises ConversionError for those that are unknown or not possible."""
    known = asdict(Options("", ""))
    if unknown := sorted(data.keys() - known.keys()):
        raise ConversionError(f"unknown options: {', '.join(unknown)}")
    options = Options(**data)
    if options.dtype not in DTYPES:
        raise ConversionError(f"dtype is {options.dtype!r}; it must be one of {', '.join(DTYPES)}")
    return options
