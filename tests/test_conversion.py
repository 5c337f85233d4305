"""Checkpoints become engines that compute what diffusers', open_clip's and transformers' modules do, or are refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from checkpoints import Model, original_unet, original_vae
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from sdmodels.conversion.convert import Options, convert
from sdmodels.conversion.diffusers_folder import weights_names
from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.original import unet_configuration, vae_configuration
from sdmodels.conversion.tensors import LazyTensor
from sdmodels.depth import DepthEstimator
from sdmodels.text_encoder import TextEncoder
from sdmodels.tokenizer import Tokenizer
from sdmodels.unet import UNet
from sdmodels.unet_cache import UNetCache
from sdmodels.vae import VaeDecoder, VaeEncoder
from sdserver.engine_store import EngineStore
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdserver.engines import Engine

TWO = Model("2", "v_prediction")
ONE = Model("1", "epsilon")
DEPTH = Model("2", "epsilon", "depth")
TEXTS = ["", "a valley in the Alps at sunset, epic vista"]
UNET = "unet/diffusion_pytorch_model.safetensors"

rng = np.random.default_rng(11)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small models as users would have them."""
    folder = tmp_path_factory.mktemp("sources")
    TWO.save_original(folder / "v2-1_768-small.safetensors")
    TWO.save_diffusers(folder / "two")
    ONE.save_original(folder / "one.ckpt")
    ONE.save_diffusers(folder / "one", max_shard_size="2MB")
    TWO.save_clip(folder / "clip")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "repository")


def add(store: EngineStore, source: Path, **options: Any) -> Engine:
    """An engine named `small`, made as `sdserver engine add` makes it."""
    before = store.find("small")
    if before:
        assert before.source
        options |= {"existing_plan": before.source.plan, "existing_files": before.weights}
    facts = convert(Options(str(source), str(store.folder("small")), **options), lambda _: None)
    return store.complete("small", "", "", facts).engine


def compare_unet(engine_folder: Path, model: Model) -> None:
    config = model.unet.config
    shapes = (2, config.in_channels, 8, 16), (2, 77, 64)
    latents, states = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    timesteps = np.array([1, 700], np.float32)
    labels = None if config.num_class_embeds is None else torch.tensor([301, 3])
    with torch.inference_mode():
        expected = model.unet(
            torch.tensor(latents), torch.tensor(timesteps), torch.tensor(states), class_labels=labels
        ).sample
    if labels is not None:
        planes = np.broadcast_to(labels.numpy()[:, None, None, None], (2, 1, 8, 16)).astype(np.float32)
        latents = np.concatenate([latents, planes], axis=1)
    np.testing.assert_allclose(UNet(engine_folder)(latents, timesteps, states), expected.numpy(), atol=1e-5)


def compare_vae(engine_folder: Path, model: Model) -> None:
    latents = rng.standard_normal((1, 4, 4, 6)).astype(np.float32)
    pixels = rng.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    factor = model.vae.config.scaling_factor
    with torch.inference_mode():
        decoded = model.vae.decode(torch.tensor(latents) / factor).sample
        encoded = model.vae.encode(torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean * factor
        image = VaeDecoder(engine_folder).image(torch.tensor(latents))
    np.testing.assert_allclose(image.numpy(), decoded.numpy(), atol=1e-5)
    np.testing.assert_allclose(VaeEncoder(engine_folder)(pixels), encoded.numpy(), atol=1e-5)


def padded(engine_folder: Path, text: str, padding: int) -> torch.Tensor:
    tokenize = Tokenizer(engine_folder / "clip", {"vocab_size": 49408})
    tokens = [tokenize.start, *tokenize(text), tokenize.end]
    return torch.tensor([tokens + [padding] * (77 - len(tokens))])


@torch.inference_mode()
def compare_states_of_two(engine_folder: Path) -> None:
    encode = TextEncoder(engine_folder)
    for text in TEXTS:
        states = encode(text).states
        tokens = padded(engine_folder, text, 0)
        penultimate = TWO.clip.forward_intermediates(text=tokens, text_indices=[2], normalize_intermediates=True)
        np.testing.assert_allclose(states, penultimate["text_intermediates"][0][0].numpy(), atol=1e-5)
        folder_states = TWO.transformers_text_encoder(tokens).last_hidden_state[0]
        np.testing.assert_allclose(states, folder_states.numpy(), atol=1e-5)


@torch.inference_mode()
def compare_states_of_one(engine_folder: Path) -> None:
    encode = TextEncoder(engine_folder)
    for text in TEXTS:
        expected = ONE.transformers_text_encoder(padded(engine_folder, text, 49407)).last_hidden_state[0]
        np.testing.assert_allclose(encode(text).states, expected.numpy(), atol=1e-5)


# The same mathematics


def test_an_original_file_of_2_computes_what_the_modules_do(sources: Path, store: EngineStore) -> None:
    add(store, sources / "v2-1_768-small.safetensors", dtype="fp32")
    compare_unet(store.folder("small"), TWO)
    compare_vae(store.folder("small"), TWO)
    compare_states_of_two(store.folder("small"))


def test_a_folder_of_1_in_shards_computes_what_the_modules_do(sources: Path, store: EngineStore) -> None:
    assert len([*(sources / "one/unet").glob("*-of-*.safetensors")]) > 1
    add(store, sources / "one", dtype="fp32")
    compare_unet(store.folder("small"), ONE)
    compare_vae(store.folder("small"), ONE)
    compare_states_of_one(store.folder("small"))


@pytest.mark.parametrize(
    ("file", "folder"), [("v2-1_768-small.safetensors", "two"), ("one.ckpt", "one")], ids=["2.x", "1.x"]
)
def test_an_original_file_and_a_diffusers_folder_give_the_same_bytes(
    sources: Path, tmp_path: Path, file: str, folder: str
) -> None:
    first, second = (add(EngineStore(tmp_path / name), sources / name, dtype="fp16").weights for name in (file, folder))
    tensors = {name for name in first if name.endswith(".safetensors")}
    assert len(tensors) == 3
    assert {name: first[name] for name in tensors} == {name: second[name] for name in tensors}


def test_with_the_whole_clip_the_states_are_the_same_and_there_is_clip_guidance(
    sources: Path, store: EngineStore
) -> None:
    engine = add(store, sources / "two", dtype="fp32", clip=str(sources / "clip"))
    assert engine.text_encoder.layer == "penultimate"
    assert "clip_guidance" in engine.roles
    compare_states_of_two(store.folder("small"))
    features = TextEncoder(store.folder("small"))(TEXTS[1]).features
    with torch.inference_mode():
        expected = TWO.clip.encode_text(padded(store.folder("small"), TEXTS[1], 0), normalize=True)[0]
    assert features is not None
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


def test_a_clip_with_another_text_tower_is_refused(sources: Path, store: EngineStore, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    TWO.save_clip(clip)
    tensors = load_file(clip / "open_clip_model.safetensors")
    tensors["ln_final.weight"] += 0.5
    save_file(tensors, clip / "open_clip_model.safetensors")
    with pytest.raises(ConversionError, match="without --clip") as caught:
        add(store, sources / "two", clip=str(clip))
    assert caught.value.problems == ("CLIP: ln_final.weight is not the checkpoint's",)


def test_averaged_weights_are_taken_where_a_file_has_them(store: EngineStore, tmp_path: Path) -> None:
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor
        for name, tensor in ONE.original().items()
        if name.startswith("model.diffusion_model.")
    }
    trained = {
        name: torch.zeros_like(tensor) for name, tensor in ONE.original().items() if name.startswith("model.diffusion_")
    }
    add(store, ONE.save_original(tmp_path / "full.safetensors", **trained, **averaged), dtype="fp32")
    compare_unet(store.folder("small"), ONE)


@pytest.mark.parametrize(
    ("family", "name"), [("2", "512-inpainting-ema.safetensors"), ("1", "sd-v1-5-inpainting.ckpt")]
)
def test_an_inpainting_file_and_its_folder_give_the_same_bytes_and_compute_what_the_modules_do(
    tmp_path: Path, family: Literal["1", "2"], name: str
) -> None:
    model = Model(family, "epsilon", "inpainting")
    store, other = EngineStore(tmp_path / "file"), EngineStore(tmp_path / "folder")
    engine = add(store, model.save_original(tmp_path / name), dtype="fp32")
    assert (engine.conditioning, engine.unet_channels, engine.native_width) == ("inpainting", 9, 512)
    compare_unet(store.folder("small"), model)
    compare_vae(store.folder("small"), model)
    from_folder = add(other, model.save_diffusers(tmp_path / "folder-of-diffusers"), dtype="fp32")
    assert from_folder.weights[UNET] == engine.weights[UNET]
    assert from_folder.conditioning == "inpainting"


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return DEPTH.save_diffusers(tmp_path_factory.mktemp("depth") / "stable-diffusion-2-depth")


def test_a_depth_folder_becomes_an_engine_with_its_estimator(store: EngineStore, depth_folder: Path) -> None:
    engine = add(store, depth_folder, dtype="fp32")
    assert (engine.conditioning, engine.unet_channels) == ("depth", 5)
    assert engine.optional_roles == ("vae_encoder", "depth_estimator")
    compare_unet(store.folder("small"), DEPTH)
    pixels = rng.integers(0, 256, (1, 48, 80, 3), dtype=np.uint8)
    shown = DPTImageProcessorPil(
        size={"height": 64, "width": 64}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(Image.fromarray(pixels[0]), return_tensors="pt")
    with torch.inference_mode():
        expected = DEPTH.depth_estimator(shown.pixel_values).predicted_depth.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(DepthEstimator(store.folder("small"))(pixels), expected, atol=1e-4)


def test_a_depth_file_has_the_unet_of_its_folder_and_takes_maps_alone(
    store: EngineStore, depth_folder: Path, tmp_path: Path
) -> None:
    midas = {"depth_model.model.pretrained.model.cls_token": torch.zeros(1, 1, 8)}
    engine = add(store, DEPTH.save_original(tmp_path / "512-depth-ema.safetensors", **midas), dtype="fp32")
    assert (engine.conditioning, engine.prediction_type) == ("depth", "epsilon")
    assert engine.optional_roles == ("vae_encoder",)
    assert engine.weights[UNET] == add(EngineStore(tmp_path / "other"), depth_folder, dtype="fp32").weights[UNET]


def test_a_damaged_estimator_is_named_tensor_by_tensor(store: EngineStore, tmp_path: Path) -> None:
    source = DEPTH.save_diffusers(tmp_path / "wrong")
    weights = source / "depth_estimator/model.safetensors"
    tensors = load_file(weights)
    del tensors["head.head.0.bias"]
    save_file(tensors, weights)
    with pytest.raises(ConversionError) as caught:
        add(store, source)
    assert caught.value.problems == ("depth_estimator: head.head.0.bias [8] is missing",)


def test_an_upscaler_and_its_folder_give_the_same_bytes_and_compute_what_the_modules_do(tmp_path: Path) -> None:
    model = Model("2", "v_prediction", "upscaling")
    store, other = EngineStore(tmp_path / "file"), EngineStore(tmp_path / "folder")
    engine = add(store, model.save_original(tmp_path / "x4-upscaler-ema.safetensors"), dtype="fp32")
    compare_unet(store.folder("small"), model)
    compare_vae(store.folder("small"), model)
    assert (engine.unet_channels, engine.latents.downsampling, engine.native_width) == (8, 4, 512)
    rows = rng.standard_normal((2, 8, 8, 16)).astype(np.float32)
    rows[:, 7] = [[[301]], [[3]]]
    given = rows, np.array([1, 700], np.float32), rng.standard_normal((2, 77, 64)).astype(np.float32)
    cached = UNetCache(store.folder("small"))
    prediction, features = np.split(cached(*given), [4], axis=1)
    np.testing.assert_allclose(prediction, UNet(store.folder("small"))(*given), atol=1e-5)
    np.testing.assert_allclose(cached(*given, features), prediction, atol=1e-5)
    assert (engine.prediction_type, engine.roles) == ("v_prediction", ("text_encoder", "unet", "vae_decoder"))
    from_folder = add(other, model.save_diffusers(tmp_path / "x4"), dtype="fp32")
    tensors = {name for name in engine.weights if name.endswith(".safetensors")}
    assert {name: from_folder.weights[name] for name in tensors} == {name: engine.weights[name] for name in tensors}
    assert from_folder.upscaling == engine.upscaling
    assert engine.upscaling
    assert (engine.upscaling.max_noise_level, engine.upscaling.noise_schedule.beta_end) == (350, 0.02)
    configs = [json.loads((each.folder("small") / "unet/config.json").read_text()) for each in (store, other)]
    # That of the folder leaves it to the module.
    assert [config.pop("upcast_attention") for config in configs] == [True, False]
    assert configs[0] == configs[1]


# What a descriptor says


def test_the_descriptor_of_each_family_says_how_it_was_trained(sources: Path, tmp_path: Path) -> None:
    two = add(EngineStore(tmp_path / "two"), sources / "v2-1_768-small.safetensors")
    assert (two.prediction_type, two.native_width, two.defaults.width) == ("v_prediction", 768, 768)
    assert (two.text_encoder.layer, two.text_encoder.padding) == ("last", "zero")
    assert two.license.name == "CreativeML Open RAIL++-M"
    one = add(EngineStore(tmp_path / "one"), sources / "one.ckpt")
    assert (one.prediction_type, one.native_width) == ("epsilon", 512)
    assert (one.text_encoder.layer, one.text_encoder.padding) == ("last", "end")
    assert one.license.name == "CreativeML OpenRAIL-M"
    assert one.noise_schedule == two.noise_schedule
    assert one.limits.size_multiple == two.limits.size_multiple == 64
    assert "attachment A" in one.license.use_restrictions
    assert one.source
    assert one.source.files == {"one.ckpt": hashlib.sha256((sources / "one.ckpt").read_bytes()).hexdigest()}


def said_by_a_flag(path: Path) -> dict[str, str]:
    return {"prediction_type": "v_prediction"}


def said_by_a_yaml(path: Path) -> dict[str, str]:
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n    timesteps: 1000\n')
    return {}


def said_by_its_header(path: Path) -> dict[str, str]:
    save_file(load_file(path), path, {"modelspec.prediction_type": "v"})
    return {}


@pytest.mark.parametrize("say", [said_by_a_flag, said_by_a_yaml, said_by_its_header])
def test_what_an_original_file_of_2_predicts_has_to_be_said(
    store: EngineStore, tmp_path: Path, say: Callable[[Path], dict[str, str]]
) -> None:
    path = TWO.save_original(tmp_path / "mine.safetensors")
    with pytest.raises(ConversionError, match="--prediction-type v_prediction"):
        add(store, path)
    options = say(path)
    engine = add(store, path, **options)
    assert (engine.prediction_type, engine.native_width) == ("v_prediction", 768)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_are_stored_as_asked_for(sources: Path, store: EngineStore, dtype: str) -> None:
    add(store, sources / "one", dtype=dtype)
    weights = load_file(store.folder("small") / UNET)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {tensor.dtype for tensor in weights.values()} == {kind}
    for name, tensor in ONE.unet.state_dict().items():
        assert torch.equal(weights[name], tensor.to(kind)), name


SD_2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SD_1 = {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}


@pytest.mark.parametrize("published", [SD_2, SD_1], ids=["2.x", "1.x"])
def test_the_published_configurations_follow_from_the_shapes(published: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), sample_size=64, **published)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
    found = unet_configuration(lazy(original_unet(unet.state_dict(), 2)), 64)
    del found["upcast_attention"]
    assert {name: to_tuple(value) for name, value in found.items()} == {
        name: to_tuple({**unet.config, "_class_name": "UNet2DConditionModel"}[name]) for name in found
    }
    found = vae_configuration(lazy(original_vae(vae.state_dict(), 4)), 512)
    assert {name: to_tuple(value) for name, value in found.items()} == {
        name: to_tuple({**vae.config, "_class_name": "AutoencoderKL"}[name]) for name in found
    }


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(name, tuple(tensor.shape), tensor.dtype, tensor.detach) for name, tensor in tensors.items()
    }


def to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_a_turbo_makes_its_image_in_one_step_without_guidance_under_its_own_licence(
    sources: Path, store: EngineStore, tmp_path: Path
) -> None:
    (tmp_path / "sd-turbo").symlink_to(sources / "two")
    (tmp_path / "sd-turbo.safetensors").symlink_to(sources / "v2-1_768-small.safetensors")
    engine = add(store, tmp_path / "sd-turbo.safetensors", prediction_type="epsilon")
    assert (engine.defaults.steps, engine.defaults.guidance_scale) == (1, 1)
    assert engine.license.name == "Stability AI Community License"
    other = EngineStore(tmp_path / "other")
    # Where a model card names the licence, that counts.
    assert add(other, tmp_path / "sd-turbo").license.name == "CreativeML Open RAIL++-M"


# What is refused


class Evil:
    """A pickle that runs a command where it is loaded without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("place", ["file", "component"])
def test_a_pickle_with_code_is_refused_and_not_run(
    sources: Path, store: EngineStore, tmp_path: Path, place: str
) -> None:
    trace = tmp_path / "trace"
    source = tmp_path / "evil.ckpt"
    if place == "component":
        source = ONE.save_diffusers(tmp_path / "evil")
        (source / UNET).unlink()
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "callbacks": Evil(trace)},
        source if place == "file" else source / "unet/diffusion_pytorch_model.bin",
    )
    with pytest.raises(ConversionError, match="could run any code: it is refused"):
        add(store, source)
    assert not trace.exists()
    assert store.engines() == []


@pytest.mark.parametrize(
    ("names", "dtype", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "fp16", ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "fp32", ["model.safetensors"]),
        (["model.fp16.safetensors"], "fp32", ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], "fp16", ["pytorch_model.bin"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "bf16",
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors", "model.non_ema.safetensors"],
            "fp16",
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
        ),
        (["model.non_ema.safetensors", "openvino_model.bin"], "fp16", []),
    ],
)
def test_safetensors_come_before_pickles_and_the_variant_that_is_wanted_first(
    names: list[str], dtype: str, chosen: list[str]
) -> None:
    assert weights_names(names, "text_encoder", dtype) == chosen


def test_pickles_of_plain_tensors_are_read(sources: Path, store: EngineStore, tmp_path: Path) -> None:
    source = ONE.save_diffusers(tmp_path / "bin")
    torch.save(load_file(source / UNET), source / "unet/diffusion_pytorch_model.bin")
    (source / UNET).unlink()
    assert add(store, source).weights[UNET] == add(EngineStore(tmp_path / "other"), sources / "one").weights[UNET]


def test_every_missing_unexpected_and_misshapen_tensor_is_named(store: EngineStore, tmp_path: Path) -> None:
    source = ONE.save_diffusers(tmp_path / "wrong")
    tensors = load_file(source / UNET)
    del tensors["conv_in.bias"]
    tensors["conv_extra.bias"] = torch.zeros(3)
    tensors["conv_out.weight"] = torch.zeros(4, 32, 1, 1)
    save_file(tensors, source / UNET)
    vae = source / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(vae) | {"quant_conv.bias": torch.zeros(3)}, vae)
    with pytest.raises(ConversionError) as caught:
        add(store, source)
    assert caught.value.problems == (
        "unet: conv_in.bias [32] is missing",
        "unet: conv_extra.bias [3] is unexpected",
        "unet: conv_out.weight is [4, 32, 1, 1] and must be [4, 32, 3, 3]",
        "vae: quant_conv.bias is [3] and must be [8]",
    )


def test_a_tensor_of_an_original_file_is_named_as_the_file_names_it(store: EngineStore, tmp_path: Path) -> None:
    changes = {
        "model.diffusion_model.surprise.weight": torch.zeros(2),
        "first_stage_model.surprise": torch.zeros(1),
        "cond_stage_model.transformer.text_model.surprise": torch.zeros(5),
    }
    with pytest.raises(ConversionError) as caught:
        add(store, ONE.save_original(tmp_path / "extra.safetensors", **changes))
    assert caught.value.problems == (
        "text encoder: surprise [5] is unexpected",
        "unet: model.diffusion_model.surprise.weight [2] is unexpected",
        "vae: first_stage_model.surprise [1] is unexpected",
    )


def test_a_unet_that_wants_what_no_server_of_ours_gives_is_refused_by_what_it_wants(
    store: EngineStore, tmp_path: Path
) -> None:
    eight = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)}
    with pytest.raises(ConversionError, match="an image to edit"):
        add(store, ONE.save_original(tmp_path / "editing.safetensors", **eight))


def test_values_beyond_fp16_are_refused_and_bf16_holds_them(store: EngineStore, tmp_path: Path) -> None:
    large = {"model.diffusion_model.input_blocks.0.0.bias": torch.full((32,), 1e6)}
    source = ONE.save_original(tmp_path / "large.safetensors", **large)
    with pytest.raises(ConversionError, match=r"conv_in.bias has values that F16 cannot hold"):
        add(store, source)
    assert add(store, source, dtype="bf16").source.dtype == "bf16"  # type: ignore[union-attr]


def test_a_damaged_file_is_called_damaged(store: EngineStore, sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut.safetensors"
    source.write_bytes((sources / "v2-1_768-small.safetensors").read_bytes()[:-1000])
    with pytest.raises(ConversionError, match="damaged"):
        add(store, source)


def test_a_file_of_another_digest_is_refused(store: EngineStore, sources: Path) -> None:
    with pytest.raises(ConversionError, match="SHA-256") as caught:
        add(store, sources / "one.ckpt", sha256="0" * 64)
    assert caught.value.problems[0].endswith("must be " + "0" * 64)


def test_an_index_that_leads_out_of_its_folder_is_refused(store: EngineStore, tmp_path: Path) -> None:
    source = ONE.save_diffusers(tmp_path / "out")
    (source / UNET).unlink()
    index = {"weight_map": {"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}}
    (source / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="outside of its folder"):
        add(store, source)


def test_another_tokenizer_than_clips_is_refused(store: EngineStore, tmp_path: Path) -> None:
    source = ONE.save_diffusers(tmp_path / "words")
    (source / "tokenizer").mkdir()
    (source / "tokenizer/merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ConversionError) as caught:
        add(store, source)
    assert caught.value.problems[0].startswith("tokenizer: merges.txt")


# Whole or not at all


def test_an_engine_that_is_there_is_left_as_it_is(sources: Path, store: EngineStore) -> None:
    first = add(store, sources / "one")
    stamps = {path: path.stat().st_mtime_ns for path in store.folder("small").rglob("*")}
    events: list[dict[str, Any]] = []
    again = convert(
        Options(
            str(sources / "one"),
            str(store.folder("small")),
            existing_plan=first.source.plan if first.source else "",
            existing_files=first.weights,
        ),
        events.append,
    )
    report = store.complete("small", "", "", again)
    assert report.written == ()
    assert report.engine == first
    assert {event["action"] for event in events if event["event"] == "file"} == {"kept"}
    files = {path: path.stat().st_mtime_ns for path in store.folder("small").rglob("*") if path.is_file()}
    assert files == {path: stamp for path, stamp in stamps.items() if path.is_file()}


def test_another_checkpoint_never_takes_an_engines_place(sources: Path, store: EngineStore) -> None:
    first = add(store, sources / "one")
    for source, options in ((sources / "two", {}), (sources / "one", {"dtype": "fp32"})):
        with pytest.raises(ConversionError, match="choose another --name"):
            add(store, source, **options)
    assert store.find("small") == first
    assert store.problems(first) == []


def test_a_damaged_engine_is_named_and_repaired_by_adding_it_again(sources: Path, store: EngineStore) -> None:
    first = add(store, sources / "one")
    weights = store.folder("small") / UNET
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    (store.folder("small") / "vae/config.json").unlink()
    assert store.problems(first) == [
        f"{UNET} is not what it was when the engine was made",
        "vae/config.json is missing",
    ]
    assert store.problems(add(store, sources / "one")) == []
    assert store.find("small") == first


def test_a_conversion_that_is_killed_leaves_no_engine_and_goes_on_where_it_was(
    sources: Path, store: EngineStore
) -> None:
    options = {"source": str(sources / "two"), "into": str(store.folder("small"))}
    command = [sys.executable, "-m", "sdmodels.conversion", "convert", json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "file":
                process.send_signal(signal.SIGKILL)
                break
    assert store.engines() == []
    assert store.unfinished() == ["small"]
    for path in store.folder("small").rglob("[!.]*.safetensors"):
        load_file(path)
    events: list[dict[str, Any]] = []
    facts = convert(Options(options["source"], options["into"]), events.append)
    assert store.problems(store.complete("small", "", "", facts).engine) == []
    actions = {event["file"]: event["action"] for event in events if event["event"] == "file"}
    assert actions[UNET] == "kept"
    assert "written" in actions.values()
    assert [path.name for path in store.folder("small").rglob(".*")] == []


def test_removing_leaves_nothing_of_an_engine_and_all_of_the_others(sources: Path, store: EngineStore) -> None:
    add(store, sources / "one")
    repository = store.folder("small").parents[1]
    before = {path for path in repository.rglob("*") if path.is_file()}
    assert {path.name for path in repository.glob("small.*")} == {
        "small.text_encoder",
        "small.unet",
        "small.vae_decoder",
        "small.vae_encoder",
    }
    facts = convert(Options(str(sources / "one"), str(store.folder("small-2"))), lambda _: None)
    store.complete("small-2", "", "", facts)
    store.remove("small-2")
    assert {path for path in repository.rglob("*") if path.is_file()} == before
