"""The Triton models of an engine: for each role a folder `<engine>.<role>` with `config.pbtxt` and `1/model.py`.

They are thin: the model code is `sdmodels.python_backend`, and `config.pbtxt` says which engine it reads and what goes
in and out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sdserver.engines import LORA_ROLE, MAX_LORAS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.engines import Engine


@dataclass(frozen=True, slots=True)
class _Role:
    purpose: str
    python_class: str
    inputs: tuple[tuple[str, str, str], ...]
    """Name, data type and dimensions of a row, as Triton writes them; {channels}, {unet_channels}, {pixel_channels},
    {states}, {features} and {cached} stand for an engine's numbers."""
    outputs: tuple[tuple[str, str, str], ...]
    optional_inputs: tuple[tuple[str, str, str], ...] = ()


Device = Literal["auto", "cpu", "gpu"]
_PREDICTING = ("unet", "unet_cache")
_AUTOENCODER = ("vae_decoder", "vae_encoder")
# Triton makes a group of KIND_AUTO one instance on each GPU, or one on the CPU where it sees none.
_KINDS: dict[Device, str] = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an engine's models run, and how; an empty text, and None, leave it to the machine that they start on.

    The texts are parameters of the UNet's models, `threads` of all: see `sdmodels.runtimes.load_unet`. A `precision` of
    fp32 holds for the autoencoder, too.
    """

    device: Device = "auto"
    precision: str = ""
    runtime: str = ""
    row_buckets: str = ""
    compile: bool = False
    threads: int | None = None

    def parameters(self, role: str) -> dict[str, str]:
        """Those of one model's `config.pbtxt`."""
        said: dict[str, str] = {} if self.threads is None else {"threads": str(self.threads)}
        if role in (*_PREDICTING, LORA_ROLE):
            said |= {"precision": self.precision, "row_buckets": self.row_buckets}
        if role in _PREDICTING:
            said["runtime"] = self.runtime
        if role in _AUTOENCODER and self.precision == "fp32":
            said["precision"] = self.precision
        if role == "unet" and self.compile:
            said["compile"] = "true"
        return {name: value for name, value in said.items() if value}


_LATENTS = "{channels}, -1, -1"
_UNET_INPUTS = (
    ("latents", "FP32", "{unet_channels}, -1, -1"),
    ("timestep", "FP32", "1"),
    ("text_states", "FP32", "-1, {states}"),
)
_ROLES = {
    "text_encoder": _Role(
        "Texts to text states.",
        "TextEncoderModel",
        (("text", "STRING", "1"), ("emphasis_range", "INT32", "-1, 2"), ("emphasis_factor", "FP32", "-1")),
        (
            ("text_states", "FP32", "-1, {states}"),
            ("token_count", "INT32", "1"),
            ("chunk_count", "INT32", "1"),
            ("text_features", "FP32", "{features}"),
        ),
        (("lora_digest", "UINT8", "-1, 32"), ("lora_weight", "FP32", "-1")),
    ),
    "unet": _Role("One denoising step's prediction.", "UNetModel", _UNET_INPUTS, (("prediction", "FP32", _LATENTS),)),
    "vae_decoder": _Role(
        "Latents to pixels.",
        "VaeDecoderModel",
        (("latents", "FP32", _LATENTS),),
        (("image", "UINT8", "-1, -1, 3"),),
    ),
    "vae_encoder": _Role(
        "Pixels to latents.",
        "VaeEncoderModel",
        (("image", "UINT8", "-1, -1, {pixel_channels}"),),
        (("latents", "FP32", _LATENTS),),
    ),
    "depth_estimator": _Role(
        "How near everything in a picture is.",
        "DepthEstimatorModel",
        (("image", "UINT8", "-1, -1, 3"),),
        (("depth", "FP32", "-1, -1"),),
    ),
    "clip_guidance": _Role(
        "How to change latents so that CLIP sees more of a text in them.",
        "ClipGuidanceModel",
        (
            ("latents", "FP32", _LATENTS),
            ("target", "FP32", "{features}"),
            ("seed", "INT64", "1"),
            ("cutouts", "INT32", "1"),
        ),
        (("gradient", "FP32", _LATENTS), ("similarity", "FP32", "1")),
    ),
    "unet_gradient": _Role(
        "Gradients through the denoising network.",
        "UNetGradientModel",
        (*_UNET_INPUTS, ("gradient", "FP32", _LATENTS)),
        (("latent_gradient", "FP32", _LATENTS),),
    ),
    "unet_cache": _Role(
        "A denoising step's prediction and the features behind it, or a prediction from features.",
        "UNetCacheModel",
        _UNET_INPUTS,
        (("prediction", "FP32", "-1, -1, -1"),),
        (("features", "FP32", "{cached}, -1, -1"),),
    ),
    LORA_ROLE: _Role(
        "A denoising step's prediction with LoRAs.",
        "UNetLoraModel",
        (*_UNET_INPUTS, ("lora_digest", "UINT8", f"{MAX_LORAS}, 32"), ("lora_weight", "FP32", f"{MAX_LORAS}")),
        (("prediction", "FP32", _LATENTS),),
    ),
}


def model_files(engine: Engine, features: int | None, placement: Placement | None = None) -> dict[str, str]:
    """The files of all models of an engine, by their path in the model repository.

    `features` is the width of the space that CLIP's two towers share; None: the engine has no image tower.
    """
    return {
        f"{engine.model(role)}/{name}": text
        for role in engine.roles
        for name, text in (
            ("config.pbtxt", _configuration(engine, role, features, placement or Placement())),
            ("1/model.py", _model(_ROLES[role])),
        )
    }


def parameters(configuration: str) -> dict[str, str]:
    """The parameters in the text of a model's `config.pbtxt`."""
    said = text_format.Parse(configuration, ModelConfig()).parameters
    return {name: value.string_value for name, value in said.items()}


def lora_model_files(engine: Engine, unet_configuration: str) -> dict[str, str]:
    """The files of the model of an engine's LoRAs, which runs where its UNet does, by their path in the repository."""
    said = parameters(unet_configuration)
    kind = re.search(r"\bKIND_(AUTO|CPU|GPU)\b", unet_configuration)
    placement = Placement(
        next(device for device, name in _KINDS.items() if kind is None or name == kind[0]),
        said.get("precision", ""),
        row_buckets=said.get("row_buckets", ""),
        threads=int(said["threads"]) if "threads" in said else None,
    )
    files = model_files(engine, None, placement)
    return {name: text for name, text in files.items() if name.startswith(f"{engine.model(LORA_ROLE)}/")}


def _configuration(engine: Engine, role: str, features: int | None, placement: Placement) -> str:
    numbers = {
        "channels": engine.latents.channels,
        "unet_channels": engine.unet_channels,
        # Of an inpainting engine it takes those with transparency, too.
        "pixel_channels": -1 if engine.conditioning == "inpainting" else 3,
        "states": engine.text_encoder.width,
        "features": features,
        "cached": None if engine.block_cache is None else engine.block_cache.channels,
    }
    # A text encoder call is one text, because texts differ in length.
    batch = 1 if role == "text_encoder" else engine.max_batch_rows
    described = _ROLES[role]
    outputs = [output for output in described.outputs if features is not None or output[0] != "text_features"]
    lines = [
        'backend: "python"',
        f"max_batch_size: {batch}",
        *_tensors("input", described.inputs, numbers, described.optional_inputs),
        *_tensors("output", outputs, numbers),
        f"instance_group [ {{ kind: {_KINDS[placement.device]} }} ]",
        *(
            f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}'
            for name, value in {"engine": f"engines/{engine.id}", **placement.parameters(role)}.items()
        ),
    ]
    if role == "unet":
        lines += [
            "# Rows of several servers' calls that wait here run together; a call alone waits for none.",
            "dynamic_batching { }",
        ]
    return "\n".join(lines) + "\n"


def _tensors(
    kind: str,
    tensors: Sequence[tuple[str, str, str]],
    numbers: dict[str, int | None],
    optional: Sequence[tuple[str, str, str]] = (),
) -> list[str]:
    rows = [
        f'  {{ name: "{name}" data_type: TYPE_{dtype} dims: [ {dims.format(**numbers)} ]{also} }}'
        for described, also in ((tensors, ""), (optional, " optional: true"))
        for name, dtype, dims in described
    ]
    return [f"{kind} [", ",\n".join(rows), "]"]


def _model(role: _Role) -> str:
    imported = f"from sdmodels.python_backend import {role.python_class} as TritonPythonModel  # noqa: F401"
    return f'"""{role.purpose}"""\n\n{imported}\n'
