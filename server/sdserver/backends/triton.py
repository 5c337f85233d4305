"""Models behind a Triton Inference Server, over the KServe v2 protocol on gRPC."""

from __future__ import annotations

import asyncio
import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from sdserver.backends import EncodedText
from sdserver.backends.shared_memory import SharedMemory
from sdserver.engines import LORA_ROLE
from sdserver.errors import GenerationFailed, Unavailable
from sdserver.lora_rows import lora_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from numpy.typing import NDArray

    from sdserver.backends import Bytes, Floats, Integers, Pixels
    from sdserver.engines import Engine
    from sdserver.request import Emphasis, Lora
    from sdserver.safety_model import SafetyModel

log = structlog.get_logger()

# gRPC's own limit of 4 MB is one decoded image of 1024 x 1365 pixels.
MAX_MESSAGE_BYTES = 256 * 2**20
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # gRPC's own backoff grows to two minutes; a restarted Triton should be found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Where a name stands for several Tritons, calls go to each in turn, and past one that cannot be reached.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
]
READY_SECONDS = 2.0

# What Triton answers to calls of a model whose Python process has died. It goes on calling that model ready.
DEAD_STUB = "not healthy"

# What Triton answers to calls that name memory which it knew before it was started anew.
LOST_REGION = "Unable to find shared memory region"
ALIGNMENT = 64


class TritonBackend:
    """A client of the Triton at `url`, "host:port", or of all the Tritons that the name stands for."""

    def __init__(
        self, url: str, safety_model: SafetyModel | None = None, headers: Callable[[], dict[str, str]] = dict
    ) -> None:
        """`headers` gives what is sent along with each call of a model."""
        self._url = url
        self._headers = headers
        self._safety_models: tuple[str, ...] = () if safety_model is None else (safety_model.model,)
        self._client = InferenceServerClient(url, channel_args=CHANNEL_OPTIONS)
        self._memory = SharedMemory(self._client, url)
        self._reloads: dict[str, asyncio.Task[None]] = {}

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        inputs: dict[str, NDArray[Any]] = {
            "text": np.array([[text.encode()]], dtype=object),
            "emphasis_range": np.array([(part.start, part.end) for part in emphasis], np.int32).reshape(1, -1, 2),
            "emphasis_factor": np.array([[part.factor for part in emphasis]], np.float32),
        }
        if loras:
            digests, weights = lora_arrays(loras, len(loras))
            inputs |= {"lora_digest": digests[None], "lora_weight": weights[None]}
        outputs = "text_states", "token_count", "chunk_count"
        optional = () if engine.clip_guidance is None else ("text_features",)
        text_states, token_count, chunk_count, *features = await self._infer(
            engine.model("text_encoder"), inputs, (*outputs, *optional)
        )
        return EncodedText(
            text_states[0], int(token_count[0, 0]), int(chunk_count[0, 0]), features[0][0] if features else None
        )

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        inputs = {"latents": latents, "timestep": timesteps[:, None], "text_states": text_states}
        shape = _like_latents(engine, latents)
        return await self._mapped(engine.model("unet"), inputs, "prediction", shape, np.float32)

    async def predict_with_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats
    ) -> Floats:
        assert engine.block_cache is not None
        inputs = {"latents": latents, "timestep": timesteps[:, None], "text_states": text_states}
        rows, channels, height, width = _like_latents(engine, latents)
        shape = rows, channels + engine.block_cache.channels, height, width
        return await self._mapped(engine.model("unet_cache"), inputs, "prediction", shape, np.float32)

    async def predict_from_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats
    ) -> Floats:
        inputs = {
            "latents": latents,
            "timestep": timesteps[:, None],
            "text_states": text_states,
            "features": features,
        }
        shape = _like_latents(engine, latents)
        return await self._mapped(engine.model("unet_cache"), inputs, "prediction", shape, np.float32)

    async def predict_with_loras(
        self,
        engine: Engine,
        latents: Floats,
        timesteps: Floats,
        text_states: Floats,
        digests: Bytes,
        weights: Floats,
    ) -> Floats:
        inputs: dict[str, NDArray[Any]] = {
            "latents": latents,
            "timestep": timesteps[:, None],
            "text_states": text_states,
            "lora_digest": digests,
            "lora_weight": weights,
        }
        return await self._mapped(engine.model(LORA_ROLE), inputs, "prediction", latents.shape, np.float32)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        rows, _, height, width = latents.shape
        scale = engine.latents.downsampling
        shape = rows, height * scale, width * scale, 3
        return await self._mapped(engine.model("vae_decoder"), {"latents": latents}, "image", shape, np.uint8)

    async def encode_image(self, engine: Engine, pixels: Pixels) -> Floats:
        rows, height, width, _ = pixels.shape
        scale = engine.latents.downsampling
        shape = rows, engine.latents.channels, height // scale, width // scale
        return await self._mapped(engine.model("vae_encoder"), {"image": pixels}, "latents", shape, np.float32)

    async def estimate_depth(self, engine: Engine, pixels: Pixels) -> Floats:
        (depths,) = await self._infer(engine.model("depth_estimator"), {"image": pixels}, ("depth",))
        return depths

    async def classify(self, pictures: Pixels) -> Floats:
        (model,) = self._safety_models
        (scores,) = await self._infer(model, {"image": pictures}, ("score",))
        return scores

    async def clip_gradient(
        self, engine: Engine, latents: Floats, targets: Floats, seeds: Integers, cutouts: Integers
    ) -> Floats:
        inputs: dict[str, NDArray[Any]] = {
            "latents": latents,
            "target": targets,
            "seed": seeds[:, None],
            "cutouts": cutouts[:, None].astype(np.int32),
        }
        return await self._mapped(engine.model("clip_guidance"), inputs, "gradient", latents.shape, np.float32)

    async def unet_gradient(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, gradients: Floats
    ) -> Floats:
        inputs = {
            "latents": latents,
            "timestep": timesteps[:, None],
            "text_states": text_states,
            "gradient": gradients,
        }
        shape = _like_latents(engine, latents)
        return await self._mapped(engine.model("unet_gradient"), inputs, "latent_gradient", shape, np.float32)

    async def load(self, engine: Engine) -> None:
        # Triton would load again what it has.
        loaded = await asyncio.gather(*map(self._is_loaded, engine.models))
        missing = [model for model, there in zip(engine.models, loaded, strict=True) if not there]
        await asyncio.gather(*(self._changed(self._client.load_model(model), model) for model in missing))

    async def unload(self, engine: Engine) -> None:
        await asyncio.gather(*(self._changed(self._client.unload_model(model), model) for model in engine.models))

    async def _changed(self, change: Coroutine[Any, Any, None], model: str) -> None:
        try:
            await change
        except InferenceServerException as error:
            if error.status() == "StatusCode.UNAVAILABLE":
                raise Unavailable("Triton cannot be reached; retry later", "TRITON_UNAVAILABLE") from error
            log.error("model could not be loaded or unloaded", model=model, error=str(error))

    async def is_live(self) -> bool:
        """Whether a Triton answers at all."""
        try:
            return bool(await self._client.is_server_live(client_timeout=READY_SECONDS))
        except InferenceServerException:
            return False

    async def is_ready(self, engine: Engine) -> bool:
        models = engine.models + self._safety_models
        try:
            answers = await asyncio.gather(
                *(self._client.is_model_ready(model, client_timeout=READY_SECONDS) for model in models)
            )
        except InferenceServerException:
            return False
        return all(answers) and not any(model in self._reloads for model in models)

    async def _is_loaded(self, model: str) -> bool:
        try:
            return bool(await self._client.is_model_ready(model, client_timeout=READY_SECONDS))
        except InferenceServerException:
            return False

    async def close(self) -> None:
        for reload in self._reloads.values():
            reload.cancel()
        await asyncio.gather(*self._reloads.values(), return_exceptions=True)
        await self._memory.close()
        await self._client.close()

    async def _mapped(
        self,
        model: str,
        inputs: dict[str, NDArray[Any]],
        output: str,
        shape: tuple[int, ...],
        dtype: type[np.generic],
    ) -> NDArray[Any]:
        """The output, of a shape and type that are known, of one call; through shared memory where there is some."""
        sizes = [*(array.nbytes for array in inputs.values()), math.prod(shape) * np.dtype(dtype).itemsize]
        *starts, end = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
        block = await self._memory.take(end)
        if block is None:
            [answer] = await self._infer(model, inputs, (output,))
            return answer
        tensors = []
        for (name, array), start in zip(inputs.items(), starts, strict=False):
            np.ndarray(array.shape, array.dtype, block.memory, start)[...] = array
            tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_shared_memory(block.region, array.nbytes, start)
            tensors.append(tensor)
        wanted = InferRequestedOutput(output)
        wanted.set_shared_memory(block.region, sizes[-1], starts[-1])
        try:
            result = await self._client.infer(model, tensors, outputs=[wanted], headers=self._headers())
        except InferenceServerException as error:
            if LOST_REGION in (error.message() or ""):
                self._memory.forget()
                [answer] = await self._infer(model, inputs, (output,))
                return answer
            # Without an answer nobody knows whether Triton still writes.
            self._memory.abandon(block)
            raise self._translated(model, error) from error
        except BaseException:
            self._memory.abandon(block)
            raise
        if (said := result.get_output(output)) is None or tuple(said.shape) != shape:
            self._memory.give_back(block)
            raise GenerationFailed(f"{model} answered without {output} of {shape}", "MODEL_ERROR", model=model)
        # The block is written again by the next call.
        mapped: NDArray[Any] = np.ndarray(shape, dtype, block.memory, starts[-1]).copy()
        self._memory.give_back(block)
        return mapped

    async def _infer(self, model: str, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...]) -> list[NDArray[Any]]:
        """The named outputs of one call. The arrays are read-only views of the answer."""
        tensors = []
        for name, array in inputs.items():
            tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        try:
            result = await self._client.infer(model, tensors, headers=self._headers())
        except InferenceServerException as error:
            raise self._translated(model, error) from error
        arrays = [result.as_numpy(name) for name in outputs]
        rows = next(iter(inputs.values())).shape[0]
        for name, array in zip(outputs, arrays, strict=True):
            if array is None or array.ndim == 0 or array.shape[0] != rows:
                raise GenerationFailed(f"{model} answered without {rows} rows of {name}", "MODEL_ERROR", model=model)
        return arrays

    def _translated(self, model: str, error: InferenceServerException) -> Exception:
        code, message = error.status() or "", error.message() or ""
        if DEAD_STUB in message:
            self._reload(model)
            return Unavailable(
                f"{model} has crashed and is being loaded again; retry later", "MODEL_RELOADING", model=model
            )
        if code in ("StatusCode.UNAVAILABLE", "StatusCode.NOT_FOUND"):
            # Triton says UNAVAILABLE or NOT_FOUND of a model that is not loaded; the caller can only wait for either.
            return Unavailable(
                "Triton cannot be reached or the model is not loaded; retry later", "TRITON_UNAVAILABLE", model=model
            )
        return GenerationFailed(f"{model} failed; the server's log says why", "MODEL_ERROR", model=model)

    def _reload(self, model: str) -> None:
        """Unloads and loads a model whose process has died: Triton does not restart it by itself."""
        if model not in self._reloads:
            log.warning("model has crashed; loading it again", model=model)
            self._reloads[model] = asyncio.create_task(self._unload_and_load(model), name=f"reload {model}")

    async def _unload_and_load(self, model: str) -> None:
        try:
            await self._client.unload_model(model)
            await self._client.load_model(model)
            log.info("model is loaded again", model=model)
        except InferenceServerException as error:
            log.error("model could not be loaded again", model=model, error=str(error))
        finally:
            del self._reloads[model]


def _like_latents(engine: Engine, unet_latents: Floats) -> tuple[int, int, int, int]:
    """The shape of an output that has the channels of latents, for latents with those of the conditioning."""
    rows, _, height, width = unet_latents.shape
    return rows, engine.latents.channels, height, width
