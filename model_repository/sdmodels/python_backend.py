"""The models of an engine as Triton's Python backend wants them: one class for each role.

A model's `config.pbtxt` has the parameters `engine`, the engine's folder relative to the model repository (of a safety
model `safety`, its own), and `threads`, how many CPU threads it uses (default: the machine's physical cores). Its
instance group says where it runs: on GPUs, on the CPU, or on GPUs where there are any (KIND_AUTO). UNets and
autoencoders may have `precision`, UNets `runtime`, `row_buckets` and `compile`, too: see `sdmodels.runtimes.load_unet`.
Tensors come and go on the CPU, where Triton moves them (`FORCE_CPU_ONLY_INPUT_TENSORS` by default), in float32.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdmodels.batching import run_together
from sdmodels.cores import physical_cores
from sdmodels.errors import InvalidInput
from sdmodels.light_imports import leave_out_unused
from sdmodels.parameters import is_compiled, row_buckets
from sdmodels.runtimes import instance_device, load_unet, load_unet_cache, load_unet_lora, prepare_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from sdmodels.batching import Arrays

# Triton hands over what waits sooner than this after an answer; who has had the answer asks again later than this.
AT_ONCE_SECONDS = 0.0003


class Cancelled(Exception):
    """The caller left while the request waited."""


class BackendModel:
    """Answers all requests that Triton hands over at once from one run of the model."""

    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    folder: ClassVar[str] = "engine"
    """The parameter that names the folder to load from."""
    parameters: dict[str, str]
    run: Callable[..., Arrays]
    ended: float = 0.0
    """When the last call was answered."""

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        """Reads the model. The function returned takes and gives arrays in the order of `inputs` and `outputs`."""
        raise NotImplementedError

    def start(self, engine_folder: Path, device: str, threads: int) -> Callable[..., Arrays]:
        """`load` with torch made ready."""
        prepare_torch(device, threads)
        return self.load(engine_folder, device)

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton once, before any request."""
        # Several models share the cores. OpenMP's workers spin at the end of every operator, which makes a step up to
        # 50 times slower when anything else wants their core; asleep they cost it microseconds. Read when torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        config = json.loads(args["model_config"])
        self.parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        leave_out_unused(compiled=is_compiled(self.parameters))
        threads = int(self.parameters["threads"]) if "threads" in self.parameters else physical_cores()
        # Triton hands over the model's own folder, which lies in the repository.
        engine_folder = Path(args["model_repository"]).parent / self.parameters[self.folder]
        self.run = self.start(engine_folder, instance_device(args), threads)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called by Triton with one or more `pb_utils.InferenceRequest`; one response for each, in their order."""
        import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

        # A request that was cancelled while it waited still arrives here. To ask takes a tenth of what a call costs
        # beyond its work, so only those are asked that may have waited.
        waited = len(requests) > 1 or time.perf_counter() - self.ended < AT_ONCE_SECONDS
        cancelled = [waited and request.is_cancelled() for request in requests]
        # Optional inputs stand at the end, and are None where they are left out.
        tensors = (
            [pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs]
            for request, gone in zip(requests, cancelled, strict=True)
            if not gone
        )
        inputs = [tuple(tensor.as_numpy() for tensor in given if tensor is not None) for given in tensors]
        answers = iter(run_together(self.run, inputs))
        responses = [self._response(pb_utils, Cancelled() if gone else next(answers)) for gone in cancelled]
        self.ended = time.perf_counter()
        return responses

    def finalize(self) -> None:
        """Called by Triton when the model is unloaded."""
        # There is nothing to save, and Python would take seconds to take torch apart.
        os._exit(0)

    def _response(self, pb_utils: Any, answer: Arrays | Exception) -> Any:
        error = pb_utils.TritonError
        match answer:
            case Cancelled():
                failure = error("cancelled before it ran", error.CANCELLED)
            case InvalidInput():
                failure = error(str(answer), error.INVALID_ARG)
            case Exception():
                pb_utils.Logger.log_error("".join(traceback.format_exception(answer)))
                failure = error(f"the model failed with {type(answer).__name__}; see Triton's log", error.INTERNAL)
            case arrays:
                # An engine without CLIP guidance has no text features, the last output of its text encoder.
                tensors = zip(self.outputs, arrays, strict=False)
                return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors])
        return pb_utils.InferenceResponse(error=failure)


class TextEncoderModel(BackendModel):
    """One text a call, because texts differ in length; E parts of it are emphasised.

    `text` BYTES [1, 1], `emphasis_range` INT32 [1, E, 2] (start and end in code points, end exclusive),
    `emphasis_factor` FP32 [1, E] -> `text_states` FP32 [1, chunks * context_length, D], `token_count` and `chunk_count`
    INT32 [1, 1], and with CLIP guidance `text_features` FP32 [1, F].

    Optional: the SHA-256 of K LoRAs as `lora_digest` UINT8 [1, K, 32], and their `lora_weight` FP32 [1, K].
    """

    inputs = ("text", "emphasis_range", "emphasis_factor", "lora_digest", "lora_weight")
    outputs = ("text_states", "token_count", "chunk_count", "text_features")

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.text_encoder import TextEncoder

        encode = TextEncoder(engine_folder, device)

        def run(
            text: NDArray[Any], ranges: NDArray[np.int32], factors: NDArray[np.float32], *loras: NDArray[Any]
        ) -> Arrays:
            emphasis = [(start, end, factor) for (start, end), factor in zip(ranges[0], factors[0], strict=True)]
            encoding = encode(_utf8(text[0, 0]), emphasis, *(array[0] for array in loras))
            token_count, chunk_count = (np.array([[count]], np.int32) for count in (encoding.tokens, encoding.chunks))
            outputs = encoding.states[None], token_count, chunk_count
            return outputs if encoding.features is None else (*outputs, encoding.features[None])

        return run


class UNetModel(BackendModel):
    """FP32 `latents` [B, U, h, w], `timestep` [B, 1], `text_states` [B, T, D] -> `prediction` [B, 4, h, w]."""

    inputs = ("latents", "timestep", "text_states")
    outputs = ("prediction",)

    def start(self, engine_folder: Path, device: str, threads: int) -> Callable[..., Arrays]:
        options = {name: self.parameters[name] for name in ("runtime", "precision") if name in self.parameters}
        denoise = load_unet(
            engine_folder,
            threads,
            **options,
            device=device,
            row_buckets=row_buckets(self.parameters),
            compiled=is_compiled(self.parameters),
        )
        return lambda latents, timestep, text_states: (denoise(latents, timestep[:, 0], text_states),)


class UNetCacheModel(BackendModel):
    """FP32 `latents` [B, U, h, w], `timestep` [B, 1], `text_states` [B, T, D] -> `prediction` [B, 4 + F, h, w], whose
    last F channels are features; with those of another step as `features` [B, F, h, w], [B, 4, h, w].

    See `sdmodels.unet_cache.UNetCache`. A request has features in all of its rows, or in none.
    """

    inputs = ("latents", "timestep", "text_states", "features")
    outputs = ("prediction",)

    def start(self, engine_folder: Path, device: str, threads: int) -> Callable[..., Arrays]:
        options = {name: self.parameters[name] for name in ("runtime", "precision") if name in self.parameters}
        buckets = row_buckets(self.parameters)
        denoise = load_unet_cache(engine_folder, threads, **options, device=device, row_buckets=buckets)

        def run(
            latents: NDArray[Any],
            timestep: NDArray[Any],
            text_states: NDArray[Any],
            features: NDArray[Any] | None = None,
        ) -> Arrays:
            return (denoise(latents, timestep[:, 0], text_states, features),)

        return run


class UNetLoraModel(BackendModel):
    """FP32 `latents` [B, 4, h, w], `timestep` [B, 1], `text_states` [B, T, D]; the SHA-256 of up to K LoRAs of each row
    as UINT8 `lora_digest` [B, K, 32], and their FP32 `lora_weight` [B, K], 0 for none -> `prediction` [B, 4, h, w].

    Always by torch, on a CPU in float32. `lora_cache_mb` of LoRAs stay on the device.
    """

    inputs = ("latents", "timestep", "text_states", "lora_digest", "lora_weight")
    outputs = ("prediction",)

    def start(self, engine_folder: Path, device: str, threads: int) -> Callable[..., Arrays]:
        options: dict[str, Any] = {"row_buckets": row_buckets(self.parameters)}
        if device != "cpu":
            options["precision"] = self.parameters.get("precision", "")
        if "lora_cache_mb" in self.parameters:
            options["cache_bytes"] = int(self.parameters["lora_cache_mb"]) * 2**20
        denoise = load_unet_lora(engine_folder, threads, device=device, **options)
        return lambda latents, timestep, text_states, digests, weights: (
            denoise(latents, timestep[:, 0], text_states, digests, weights),
        )


class VaeDecoderModel(BackendModel):
    """`latents` FP32 [B, 4, h, w] -> `image` UINT8 [B, 8h, 8w, 3]."""

    inputs = ("latents",)
    outputs = ("image",)

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.precision import chosen, decoder_precision
        from sdmodels.vae import VaeDecoder

        precision = chosen(self.parameters.get("precision", ""), device, decoder_precision)
        decode = VaeDecoder(engine_folder, device, precision)
        return lambda latents: (decode(latents),)


class VaeEncoderModel(BackendModel):
    """`image` UINT8 [B, 8h, 8w, 3], or 4 with transparency -> `latents` FP32 [B, 4, h, w]."""

    inputs = ("image",)
    outputs = ("latents",)

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.precision import chosen, vae_precision
        from sdmodels.vae import VaeEncoder

        encode = VaeEncoder(engine_folder, device, chosen(self.parameters.get("precision", ""), device, vae_precision))
        return lambda image: (encode(image),)


class DepthEstimatorModel(BackendModel):
    """`image` UINT8 [B, H, W, 3] -> `depth` FP32 [B, h, w], at the estimator's own resolution."""

    inputs = ("image",)
    outputs = ("depth",)

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.depth import DepthEstimator

        estimate = DepthEstimator(engine_folder, device)
        return lambda image: (estimate(image),)


class SafetyClassifierModel(BackendModel):
    """`image` UINT8 [B, S, S, 3] -> `score` FP32 [B, K], 0 to 1; S and K as the safety model's `safety.json` says."""

    inputs = ("image",)
    outputs = ("score",)
    folder = "safety"

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.safety import SafetyClassifier

        classify = SafetyClassifier(engine_folder, device)
        return lambda image: (classify(image),)


class ClipGuidanceModel(BackendModel):
    """FP32 `latents` [B, 4, h, w], `target` [B, E], INT64 `seed` [B, 1], INT32 `cutouts` [B, 1] -> FP32 `gradient`
    [B, 4, h, w], `similarity` [B, 1]."""

    inputs = ("latents", "target", "seed", "cutouts")
    outputs = ("gradient", "similarity")

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.clip_guidance import ClipGuidance

        guide = ClipGuidance(engine_folder, device)

        def run(latents: NDArray[Any], target: NDArray[Any], seed: NDArray[Any], cutouts: NDArray[Any]) -> Arrays:
            gradient, similarity = guide(latents, target, seed[:, 0], cutouts[:, 0])
            return gradient, similarity[:, None]

        return run


class UNetGradientModel(BackendModel):
    """FP32 `latents` [B, U, h, w], `timestep` [B, 1], `text_states` [B, T, D], `gradient` by the prediction
    [B, 4, h, w] -> `latent_gradient` [B, 4, h, w]."""

    inputs = ("latents", "timestep", "text_states", "gradient")
    outputs = ("latent_gradient",)

    def load(self, engine_folder: Path, device: str) -> Callable[..., Arrays]:
        from sdmodels.unet_gradient import UNetGradient

        pull_back = UNetGradient(engine_folder, device)
        return lambda latents, timestep, text_states, gradient: (
            pull_back(latents, timestep[:, 0], text_states, gradient),
        )


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("text is not valid UTF-8") from None
