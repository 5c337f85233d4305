"""Checkpoints as diffusers' pipelines store them: a folder for each component."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import open_clip
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdmodels.conversion.clip import from_transformers, text_tower
from sdmodels.conversion.components import Checkpoint, Component, DepthEstimator, completed, component_problems
from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.tensors import read_tensors, shape_problems, shapes_of, shards
from sdmodels.depth import FOLDER as DEPTH_ESTIMATOR
from sdmodels.depth import empty_estimator
from sdmodels.vae import current_name
from sdmodels.weights import read_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdmodels.conversion.clip import Family

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionUpscalePipeline",
)
COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# Those that only some checkpoints have.
OPTIONAL_COMPONENTS = {DEPTH_ESTIMATOR: "model"}
CONFIGURATIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{name}/config.json" for name in COMPONENTS),
)
# What is read where it is there.
OPTIONAL_FILES = ("README.md", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json")
# Of an upscaler: the noise that the small image gets.
LOW_RESOLUTION_SCHEDULER = "low_res_scheduler/scheduler_config.json"
# Of a depth estimator, where there is one; the second is also that of a safety checker.
DEPTH_FILES = (f"{DEPTH_ESTIMATOR}/config.json", "feature_extractor/preprocessor_config.json")
# Where the pipeline's own default stands.
MAX_NOISE_LEVEL = 350
DPT = "DPTForDepthEstimation"
PREDICTION_TYPES = ("epsilon", "v_prediction")


def read_diffusers_folder(folder: Path, prediction_type: str | None, dtype: str) -> Checkpoint:
    """The checkpoint in a folder; `prediction_type` wins over the scheduler's. Raises ConversionError."""
    files = source_files(folder, dtype)
    configs = {name: read_config(folder / name) for name in CONFIGURATIONS}
    kind = configs["model_index.json"].get("_class_name")
    if kind not in PIPELINES:
        raise ConversionError(f"{folder} is a {kind}; this service serves {', '.join(PIPELINES)}")
    weights = {component: _weights_file(folder, component, dtype) for component in COMPONENTS}
    vae_tensors = read_tensors(weights["vae"])
    unet = Component(completed(UNet2DConditionModel, configs["unet/config.json"]), read_tensors(weights["unet"]))
    vae = Component(
        completed(AutoencoderKL, configs["vae/config.json"]),
        {current_name(name): tensor for name, tensor in vae_tensors.items()},
    )
    # OpenAI's towers have the approximation of GELU that transformers calls quick, OpenCLIP's have none.
    family: Family = "1" if configs["text_encoder/config.json"].get("hidden_act") == "quick_gelu" else "2"
    clip, problems = text_tower(from_transformers(read_tensors(weights["text_encoder"])), family)
    problems += _tokenizer_problems(folder) + component_problems(unet, vae)
    depth_estimator = None
    if _has_depth_estimator(folder):
        depth_estimator, found = _depth_estimator(folder, dtype)
        problems += found
    if problems:
        raise ConversionError(f"{folder} is not a checkpoint that can be served", problems)
    scheduler = configs["scheduler/scheduler_config.json"]
    return Checkpoint(
        family,
        unet,
        vae,
        clip,
        _prediction_type(prediction_type or scheduler.get("prediction_type", "epsilon")),
        noise_schedule(scheduler),
        _padding(folder, family),
        _license(folder),
        tuple(files),
        depth_estimator,
        _upscaling(folder, configs["model_index.json"]),
        tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_ignored(path.name, files))),
    )


def weights_names(names: Iterable[str], component: str, dtype: str) -> list[str]:
    """Which of these file names hold a component's weights: the best file or index, then the shards of an index.

    safetensors come before pickles, and the 16-bit variant first where 16 bits are wanted: rounding is the same.
    """
    stem, names = (COMPONENTS | OPTIONAL_COMPONENTS)[component], set(names)
    variants = ("", ".fp16") if dtype == "fp32" else (".fp16", "")
    for suffix, stems in ((".safetensors", (stem,)), (".bin", (stem, "pytorch_model"))):
        for variant in variants:
            for each in stems:
                for name in (
                    f"{each}{variant}{suffix}",
                    f"{each}{suffix}.index{variant}.json",
                    f"{each}{variant}{suffix}.index.json",
                ):
                    if name in names:
                        kept = re.compile(rf"{each}({re.escape(variant)})?-\d+-of-\d+({re.escape(variant)})?{suffix}")
                        parts = sorted(each for each in names if kept.fullmatch(each)) if "index" in name else []
                        return [name, *parts]
    return []


def source_files(folder: Path, dtype: str) -> list[Path]:
    """The files of a folder that an engine is made from. Raises ConversionError for those that are missing."""
    missing = [name for name in CONFIGURATIONS if not (folder / name).is_file()]
    if missing:
        raise ConversionError(f"{folder} is no checkpoint of diffusers", [f"{name} is missing" for name in missing])
    optional = (*OPTIONAL_FILES, LOW_RESOLUTION_SCHEDULER, *(DEPTH_FILES if _has_depth_estimator(folder) else ()))
    files = [folder / name for name in (*CONFIGURATIONS, *optional) if (folder / name).is_file()]
    for component in (*COMPONENTS, *(OPTIONAL_COMPONENTS if _has_depth_estimator(folder) else ())):
        path = _weights_file(folder, component, dtype)
        files += [path, *shards(path)] if path.suffix == ".json" else [path]
    return files


def noise_schedule(scheduler: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration under the names of an engine's descriptor. Raises ConversionError."""
    if scheduler.get("trained_betas") is not None:
        raise ConversionError("the scheduler has trained_betas: this service knows noise schedules by formula alone")
    scheduler_class = getattr(diffusers, str(scheduler.get("_class_name")), None)
    if scheduler_class is None:
        raise ConversionError(f"diffusers {diffusers.__version__} has no scheduler {scheduler.get('_class_name')}")
    # A file leaves out what its class has by default, and the defaults of the classes differ.
    config = scheduler_class.from_config(scheduler).config
    return {
        "beta_schedule": config["beta_schedule"],
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "train_timesteps": config["num_train_timesteps"],
        "timestep_spacing": config.get("timestep_spacing", "leading"),
        "steps_offset": config.get("steps_offset", 0),
        "rescale_zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
    }


def _weights_file(folder: Path, component: str, dtype: str) -> Path:
    names = weights_names((path.name for path in (folder / component).iterdir()), component, dtype)
    if not names:
        raise ConversionError(
            f"{folder / component} has no weights: {(COMPONENTS | OPTIONAL_COMPONENTS)[component]}.safetensors, or its "
            "shards"
        )
    return folder / component / names[0]


def _upscaling(folder: Path, index: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / LOW_RESOLUTION_SCHEDULER
    if not path.is_file():
        return None
    return {
        "noise_schedule": noise_schedule(read_config(path)),
        "max_noise_level": index.get("max_noise_level", MAX_NOISE_LEVEL),
    }


def _has_depth_estimator(folder: Path) -> bool:
    return (folder / DEPTH_FILES[0]).is_file()


def _depth_estimator(folder: Path, dtype: str) -> tuple[DepthEstimator, list[str]]:
    """It, and what is wrong with it."""
    config, path = read_config(folder / DEPTH_FILES[0]), folder / DEPTH_FILES[1]
    preprocessor = read_config(path) if path.is_file() else {}
    if config.get("architectures", [DPT]) != [DPT] or preprocessor.get("keep_aspect_ratio"):
        raise ConversionError(
            f"{folder / DEPTH_ESTIMATOR} is no {DPT} that looks at squares, and this service knows no others: without "
            "that folder the engine takes depth maps alone"
        )
    try:
        module = empty_estimator(config)
    except ModuleNotFoundError as error:
        raise ConversionError(
            f"estimating depths needs transformers, where Triton's models run, too: pip install 'sd-service[depth]'; "
            f"without the folder {DEPTH_ESTIMATOR} the engine takes depth maps alone"
        ) from error
    tensors = {
        name: tensor
        for name, tensor in read_tensors(_weights_file(folder, DEPTH_ESTIMATOR, dtype)).items()
        # Of other uses of the same module.
        if not name.startswith("dpt.pooler.")
    }
    return DepthEstimator(config, preprocessor, tensors), shape_problems(DEPTH_ESTIMATOR, tensors, shapes_of(module))


def _prediction_type(name: str) -> str:
    if name not in PREDICTION_TYPES:
        raise ConversionError(f"the scheduler predicts {name!r}; this service knows {' and '.join(PREDICTION_TYPES)}")
    return name


def _padding(folder: Path, family: Family) -> str:
    """How the tokenizer pads: 2.x with `!`, which is token 0, and 1.x with the end token."""
    path = folder / "tokenizer/special_tokens_map.json"
    said = read_config(path).get("pad_token") if path.is_file() else None
    token = said.get("content") if isinstance(said, dict) else said
    return {"!": "zero", "<|endoftext|>": "end"}.get(str(token), "end" if family == "1" else "zero")


def _tokenizer_problems(folder: Path) -> list[str]:
    path = folder / "tokenizer/merges.txt"
    if not path.is_file():
        return []
    # The first line is a version; open_clip has more merges than CLIP uses.
    found = path.read_text(encoding="utf-8").split("\n")[1:]
    known = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = [line for line in found if line]
    if merges == known.decode("utf-8").split("\n")[1 : 1 + len(merges)]:
        return []
    return ["tokenizer: merges.txt is not that of CLIP, whose vocabulary the service encodes texts with"]


def _license(folder: Path) -> str:
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    said = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return said[1] if said else ""


def _is_ignored(name: str, files: list[Path]) -> bool:
    """Whether a folder of the checkpoint is none that is known, nor one of which a file is read."""
    used = {*COMPONENTS, "tokenizer", *(path.parent.name for path in files)}
    return name not in used and not name.startswith(".")
