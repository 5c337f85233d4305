"""The denoising network compiled by OpenVINO: on a CPU it takes 0.4 of torch's time in float32 and 0.7 of that in
bfloat16, at SD 2.1's size, and a row's prediction does not depend on the rows beside it, bit for bit.

The network is converted once, by torch, and kept below the engine's folder; from then on torch is not even imported.
`sdserver engine add` does it (`prepare`), or else the first start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdmodels.batching import check_rows
from sdmodels.class_labels import apart
from sdmodels.cores import has_bf16
from sdmodels.errors import InvalidInput

# OpenVINO tells its makers that it was imported, where it finds this package.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

# Part of a conversion's name, so that it is made again when this code makes another.
CONVERSION = 6
FOLDER = "openvino"
# The network with its prediction and features, and its outermost blocks: see `sdmodels.unet_parts`.
WHOLE = "unet"
OUTERMOST = "outermost"

# Ours -> OpenVINO's.
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoUNet:
    """As `sdmodels.unet.UNet`, for CPUs: in float32 ("fp32") or bfloat16 ("bf16"), by default the faster that it has.

    `threads` CPU threads answer a call. Where nobody has done it, the first start on a machine converts the network,
    which takes 10 s for a tiny one and minutes for that of SD 2.1; where the engine's folder cannot be written, every
    start does.
    """

    def __init__(self, engine_folder: Path, threads: int, precision: str = "") -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            converted = _converted(engine_folder, WHOLE, Path(elsewhere))
            # Reads the weights' file, which may then go.
            self._request = _compiled(converted, threads, precision, features=False)
        self._config = _configuration(engine_folder)
        self._sinusoid = _Sinusoid(self._config)

    def __call__(
        self, latents: NDArray[np.float32], timesteps: NDArray[np.float32], text_states: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """[B, 4, h, w] prediction for latents [B, U, h, w], timesteps [B] and text states [B, T, D].

        As `sdmodels.unet.UNet.__call__`. Raises `InvalidInput` where the numbers of rows disagree.
        """
        if not len(latents) == len(timesteps) == len(text_states):
            raise InvalidInput(
                f"a row is one latent, one timestep and one text: "
                f"got {len(latents)} latents, {len(timesteps)} timesteps and {len(text_states)} texts"
            )
        pictures, times, labels, picture = pictures_of(latents, timesteps, self._config)
        result = self._request.infer([pictures, self._sinusoid(times), text_states, picture, *labels])
        # The request's own memory is written again by the next call.
        prediction: NDArray[np.float32] = np.array(result[0])
        return prediction


class OpenVinoUNetCache:
    """As `sdmodels.unet_cache.UNetCache`, and otherwise as `OpenVinoUNet`."""

    def __init__(self, engine_folder: Path, threads: int, precision: str = "") -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            self._whole, self._outermost = (
                _compiled(_converted(engine_folder, name, Path(elsewhere)), threads, precision)
                for name in (WHOLE, OUTERMOST)
            )
        self._config = _configuration(engine_folder)
        self._sinusoid = _Sinusoid(self._config)

    def __call__(
        self,
        latents: NDArray[np.float32],
        timesteps: NDArray[np.float32],
        text_states: NDArray[np.float32],
        features: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """[B, 4 + F, h, w] prediction and features or, from features [B, F, h, w], the prediction [B, 4, h, w]."""
        check_rows(latents, timesteps, text_states, features)
        pictures, times, labels, picture = pictures_of(latents, timesteps, self._config)
        sinusoid = self._sinusoid(times)
        if features is None:
            result = self._whole.infer([pictures, sinusoid, text_states, picture, *labels])
            return np.concatenate([result[0], result[1]], axis=1)
        result = self._outermost.infer([pictures, sinusoid, text_states, features, picture, *labels])
        prediction: NDArray[np.float32] = np.array(result[0])
        return prediction


class _Sinusoid:
    """Timesteps [B] -> [B, C]. Not in the network, because bfloat16 has no digits for timesteps of several hundred."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._frequencies = _frequencies(config)
        self._flip: bool = config.get("flip_sin_to_cos", True)

    def __call__(self, timesteps: NDArray[np.float32]) -> NDArray[np.float32]:
        angles = timesteps[:, None].astype(np.float32) * self._frequencies
        halves = (np.cos(angles), np.sin(angles)) if self._flip else (np.sin(angles), np.cos(angles))
        return np.concatenate(halves, axis=1)


def _configuration(engine_folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((engine_folder / "unet/config.json").read_text(encoding="utf-8"))
    return config


def pictures_of(
    latents: NDArray[np.float32], timesteps: NDArray[np.float32], config: dict[str, Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[NDArray[np.int64]], NDArray[np.int64]]:
    """The pictures [P, U, h, w] that rows are of, their timesteps [P], their class labels [P] as one more input if the
    UNet takes any, and which picture each row is of, [B].

    Rows of one picture lie side by side, and are the same bit for bit: see `sdmodels.unet_parts`.
    """
    bits = np.ascontiguousarray(latents).view(np.int32).reshape(len(latents), -1)
    another = (bits[1:] != bits[:-1]).any(axis=1) | (timesteps[1:] != timesteps[:-1])
    picture = np.concatenate([[0], np.cumsum(another)])
    first = np.concatenate([[True], another])
    rows, labels = apart(latents[first], config)
    return np.ascontiguousarray(rows), timesteps[first], [] if labels is None else [labels.astype(np.int64)], picture


def _compiled(path: Path, threads: int, precision: str, *, features: bool = True) -> openvino.InferRequest:
    """A converted network, compiled; without `features` it returns its first output alone."""
    core = openvino.Core()
    precision = precision or ("bf16" if has_bf16() else "fp32")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("this CPU does not compute in bf16; set the model's parameter `precision` to fp32")
    model = core.read_model(path)
    if not features:
        model.remove_result(model.get_results()[1])
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
    }
    return core.compile_model(model, "CPU", options).create_infer_request()


def _frequencies(config: dict[str, object]) -> NDArray[np.float32]:
    """[C / 2] of the timestep's sinusoid, as diffusers' get_timestep_embedding with its maximum period of 10,000."""
    channels = config["block_out_channels"]
    assert isinstance(channels, list)
    half, shift = channels[0] // 2, float(str(config.get("freq_shift", 0)))
    exponents = -math.log(10_000) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies: NDArray[np.float32] = np.exp(exponents).astype(np.float32)
    return frequencies


def prepare(
    engine_folder: Path,
    weights: Mapping[str, str],
    *,
    block_cache: bool,
    on_conversion: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Converts what a start of the engine will need, unless it is there; returns the files that were written.

    `weights` are the engine's files and their SHA-256, where its descriptor is still to come; `on_conversion` gets the
    name of a network before it is converted. Raises OSError.
    """
    made: list[Path] = []
    for name in (WHOLE, OUTERMOST) if block_cache else (WHOLE,):
        folder = engine_folder / FOLDER / f"{name}-{_key(weights)}"
        if not folder.exists():
            on_conversion(name)
            _make(engine_folder, name, folder)
            made += sorted(folder.iterdir())
    return made


def _converted(engine_folder: Path, name: str, elsewhere: Path) -> Path:
    """The file of a network, WHOLE or OUTERMOST: made before, or new, and then kept if the folder can be written."""
    weights = json.loads((engine_folder / "engine.json").read_text(encoding="utf-8"))["weights"]
    folder = engine_folder / FOLDER / f"{name}-{_key(weights)}"
    if not folder.exists():
        try:
            _make(engine_folder, name, folder)
        except OSError:
            folder = _convert(engine_folder, name, elsewhere)
    return folder / f"{name}.xml"


def _make(engine_folder: Path, name: str, folder: Path) -> None:
    """Converts a network into `folder`, which is there whole or not at all; waits while another process does it."""
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        # What a process that was killed has left goes.
        unfinished = folder.parent / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _convert(engine_folder, name, unfinished).rename(folder)
        unfinished.rmdir()


def _key(weights: Mapping[str, str]) -> str:
    """Changes with the weights, OpenVINO and this code."""
    parts = {name: digest for name, digest in weights.items() if name.startswith("unet/")}
    return hashlib.sha256(json.dumps([parts, openvino.get_version(), CONVERSION], sort_keys=True).encode()).hexdigest()[
        :16
    ]


def _convert(engine_folder: Path, name: str, elsewhere: Path) -> Path:
    """The folder, below `elsewhere`, with the network that was made from the engine's weights."""
    import torch

    from sdmodels.openvino_graph import fold_norms, rewrite_norms, split_gates, upsample_by_phases
    from sdmodels.unet import UNet
    from sdmodels.unet_parts import OutermostBlocks, WholeUNet

    unet = UNet(engine_folder).module
    # The networks take the timestep's sinusoid [P, C] in the timestep's place.
    unet.get_time_embed = lambda sample, timestep: timestep
    fold_norms(unet)
    split_gates(unet)
    config = unet.config
    width, (channels, deeper, *_) = config.cross_attention_dim, config.block_out_channels
    # Of two pictures and three rows. Numbers of both, sizes and lengths of texts are open afterwards.
    examples = [torch.zeros(2, config.in_channels, 16, 16), torch.zeros(2, channels), torch.zeros(3, 77, width)]
    shapes = [[-1, config.in_channels, -1, -1], [-1, channels], [-1, -1, width]]
    if name == OUTERMOST:
        examples.append(torch.zeros(3, deeper, 16, 16))
        shapes.append([-1, deeper, -1, -1])
    examples.append(torch.tensor([0, 1, 1]))
    shapes.append([-1])
    if config.num_class_embeds:
        examples.append(torch.zeros(2, dtype=torch.long))
        shapes.append([-1])
    network = OutermostBlocks(unet) if name == OUTERMOST else WholeUNet(unet)
    with warnings.catch_warnings():
        # What tracing says of diffusers' checks of sizes and of torch's plans for itself.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(network, example_input=tuple(examples))
    upsample_by_phases(model)
    side = config.sample_size or 64
    native = [[*example.shape[:2], side, side] if example.ndim == 4 else example.shape for example in examples]
    rewrite_norms(model, native)
    model.reshape(dict(enumerate(shapes)))
    target = elsewhere / name
    target.mkdir()
    # Not compressed: with weights that it finds in half precision, OpenVINO's results depend on the number of rows.
    openvino.save_model(model, target / f"{name}.xml", compress_to_fp16=False)
    return target
