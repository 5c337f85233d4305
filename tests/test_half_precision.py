"""Half precision as GPUs have it: which kind, what of it is kept in float32, and what happens to what overflows.

On a CPU, with the kernels of a CPU: no test here has met a GPU.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from sdmodels.cores import has_bf16
from sdmodels.parameters import is_compiled, row_buckets
from sdmodels.precision import (
    InRange,
    UpcastAttention,
    chosen,
    decoder_precision,
    unet_precision,
    vae_precision,
)
from sdmodels.row_buckets import ROW_BUCKETS, in_buckets
from sdmodels.runtimes import default_runtime, instance_device, load_unet
from sdmodels.unet import UNet
from sdmodels.vae import VaeDecoder, VaeEncoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENGINE = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"
WIDTH = 16


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with a small UNet whose attention is to be upcast, as SD 2.1's is."""
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        upcast_attention=True,
    ).save_pretrained(folder / "unet")
    return folder


def rows(count: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(count)
    return (
        rng.standard_normal((count, 4, 8, 8), np.float32),
        rng.random(count, np.float32) * 999,
        rng.standard_normal((count, 7, WIDTH), np.float32),
    )


@pytest.mark.parametrize(
    ("capability", "unet", "vae"),
    [(None, "fp32", "fp32"), ((7, 5), "fp16", "fp16"), ((8, 0), "bf16", "fp16"), ((12, 0), "bf16", "fp16")],
)
def test_a_device_computes_in_what_it_has_units_for(capability: tuple[int, int] | None, unet: str, vae: str) -> None:
    assert unet_precision(capability) == unet
    assert vae_precision(capability) == vae


def test_a_decoder_computes_in_bf16_on_cpus_that_have_it() -> None:
    assert decoder_precision(None) == ("bf16" if has_bf16() else "fp32")
    assert decoder_precision((8, 0)) == "fp16"


def test_a_picture_decoded_in_bf16_is_the_same_to_the_eye() -> None:
    latents = np.random.default_rng(3).standard_normal((1, 4, 16, 16), np.float32)
    difference = VaeDecoder(ENGINE, precision="bf16")(latents).astype(float) - VaeDecoder(ENGINE)(latents)
    # 45 dB
    assert np.square(difference).mean() < 255**2 / 10**4.5


def test_a_precision_is_named_or_refused_with_the_choice_there_is() -> None:
    assert chosen("", "cpu", unet_precision) == "fp32"
    assert chosen("fp32", "cpu", unet_precision) == "fp32"
    assert chosen("fp16", "cuda:0", unet_precision) == "fp16"
    with pytest.raises(ValueError, match="must be fp32 on a CPU"):
        chosen("fp16", "cpu", unet_precision)
    with pytest.raises(ValueError, match="must be one of fp32, bf16, fp16"):
        chosen("int8", "cuda:0", unet_precision)


def test_a_model_runs_where_triton_put_its_instance() -> None:
    assert instance_device({"model_instance_kind": "GPU", "model_instance_device_id": "1"}) == "cuda:1"
    assert instance_device({"model_instance_kind": "CPU", "model_instance_device_id": "0"}) == "cpu"
    assert (default_runtime("cuda:1"), default_runtime("cpu")) == ("torch", "openvino")


def test_what_a_runtime_cannot_do_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set the model's instance_group to KIND_CPU"):
        load_unet(tmp_path, 1, "openvino", device="cuda:0")
    with pytest.raises(ValueError, match="leave them out, or set runtime to torch"):
        load_unet(tmp_path, 1, "openvino", device="cpu", row_buckets=(1, 2))


def test_a_gpu_that_triton_sees_and_torch_does_not_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    with pytest.raises(RuntimeError, match="set the model's instance_group to KIND_CPU"):
        load_unet(tmp_path, 1, device="cuda:0")


def test_the_parameters_of_a_model_are_read_or_refused() -> None:
    assert row_buckets({}) == ()
    assert row_buckets({"row_buckets": "2, 4"}) == (2, 4)
    assert (is_compiled({}), is_compiled({"compile": "true"})) == (False, True)
    for text in ("0", "2,-1", "two", ","):
        with pytest.raises(ValueError, match="as in 1,2,4,8,16"):
            row_buckets({"row_buckets": text})
    with pytest.raises(ValueError, match="must be true or false"):
        is_compiled({"compile": "yes"})


# Attention


def attention(processor: Any, states: int | None) -> Attention:
    torch.manual_seed(3)
    made = Attention(32, states, heads=2, dim_head=16, upcast_attention=True, processor=processor)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("states", [None, 24])
@torch.inference_mode()
def test_upcast_attention_gives_what_diffusers_gives_without_fused_kernels(states: int | None) -> None:
    torch.manual_seed(5)
    x, context = torch.randn(2, 9, 32), None if states is None else torch.randn(2, 7, states)
    ours, theirs = attention(UpcastAttention(), states), attention(AttnProcessor(), states)
    torch.testing.assert_close(ours(x, context), theirs(x, context), atol=1e-6, rtol=1e-5)
    half = None if context is None else context.half()
    torch.testing.assert_close(ours.half()(x.half(), half), theirs.half()(x.half(), half), atol=2e-3, rtol=1e-2)


@torch.inference_mode()
def test_products_that_fp16_cannot_hold_do_no_harm() -> None:
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(5)).half()
    half = attention(UpcastAttention(), None).half()
    half.to_q.weight *= 3000
    half.to_k.weight *= 30
    query, key = half.to_q(x), half.to_k(x)
    assert query.isfinite().all()
    assert key.isfinite().all()
    # What 2.1's do: the products of finite queries and keys are infinite.
    assert not (query @ key.transpose(1, 2)).isfinite().all()
    exact = attention(AttnProcessor(), None)
    exact.to_q.weight *= 3000
    exact.to_k.weight *= 30
    assert half(x).isfinite().all()
    assert (half(x).float() - exact(x.float())).abs().max() < 0.01


def test_the_processor_is_upcast_in_fp16_alone(engine_folder: Path) -> None:
    kinds = {
        precision: {type(each) for each in UNet(engine_folder, precision=precision).module.attn_processors.values()}
        for precision in ("fp32", "bf16", "fp16")
    }
    assert kinds == {"fp32": {AttnProcessor2_0}, "bf16": {AttnProcessor2_0}, "fp16": {UpcastAttention}}


# Models


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.03), ("fp16", 0.004)])
def test_half_precision_takes_and_gives_float32_and_is_near_it(
    engine_folder: Path, precision: Any, error: float
) -> None:
    exact, half = UNet(engine_folder)(*rows(3)), UNet(engine_folder, precision=precision)(*rows(3))
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < error * np.abs(exact).max()


def test_an_autoencoder_in_fp16_makes_the_same_picture() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), np.uint8)
    latents = VaeEncoder(ENGINE)(pixels)
    assert np.abs(VaeEncoder(ENGINE, precision="fp16")(pixels) - latents).max() < 0.02
    difference = VaeDecoder(ENGINE, precision="fp16")(latents).astype(int) - VaeDecoder(ENGINE)(latents)
    assert np.abs(difference).max() <= 2


# What overflows


def test_a_row_that_overflows_alone_is_computed_again_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[list[float]] = []
    made = 0

    def half(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (x.half() * scale.half()[:, None]).float()

    def in_float32(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        asked.append(scale.tolist())
        return x * scale[:, None]

    def make() -> Any:
        nonlocal made
        made += 1
        return in_float32

    model = InRange("unet", half, make)
    x, scale = torch.full((4, 2), 300.0), torch.tensor([1.0, 500.0, 2.0, 700.0])
    assert model(x[:1], scale[:1]).tolist() == [[300.0, 300.0]]
    assert made == 0
    with caplog.at_level(logging.WARNING):
        assert model(x, scale)[:, 0].tolist() == [300.0, 150_000.0, 600.0, 210_000.0]
        assert model(x, scale)[3].tolist() == [210_000.0, 210_000.0]
    assert asked == [[500.0], [700.0]] * 2
    assert made == 1
    assert [record.getMessage() for record in caplog.records][:2] == [
        f"unet: row {row} of 4 left half precision's range; float32 computes it" for row in (1, 3)
    ]


def test_a_unet_in_fp16_answers_rows_beyond_its_range_as_float32_does(engine_folder: Path) -> None:
    latents, timesteps, states = rows(3)
    # More than fp16 holds at all.
    latents[1] *= 1e5
    exact, half = UNet(engine_folder), UNet(engine_folder, precision="fp16")
    answer = half(latents, timesteps, states)
    alone = exact(latents[1:2], timesteps[1:2], states[1:2])
    assert np.array_equal(answer[1:2], alone)
    assert np.array_equal(answer[[0, 2]], half(latents, timesteps, states)[[0, 2]])
    assert np.abs(answer[0] - exact(latents, timesteps, states)[0]).max() < 0.01


def test_an_image_that_fp16_cannot_decode_is_decoded_in_float32() -> None:
    latents = np.random.default_rng(2).standard_normal((2, 4, 8, 8), np.float32)
    latents[1] *= 1e5
    pixels = VaeDecoder(ENGINE, precision="fp16")(latents)
    assert np.array_equal(pixels[1], VaeDecoder(ENGINE)(latents)[1])
    assert not np.array_equal(pixels[1], pixels[0])


# Row buckets


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 16, 17, 37])
def test_a_network_sees_only_the_buckets_numbers_of_rows(count: int) -> None:
    seen: list[int] = []

    def double(x: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(add)
        seen.append(len(x))
        return x * 2 + add[:, None]

    x, add = torch.arange(count * 3.0).reshape(count, 3), torch.arange(count) * 100.0
    assert torch.equal(in_buckets(double, ROW_BUCKETS)(x, add), x * 2 + add[:, None])
    assert set(seen) <= set(ROW_BUCKETS)
    # The last call is filled up, and by less than what it has.
    assert sum(seen) < 2 * count


def test_padding_that_overflows_is_nobodys_row() -> None:
    exact: list[int] = []

    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 10, torch.inf, x)

    def in_float32(x: torch.Tensor) -> torch.Tensor:
        exact.append(len(x))
        return x

    model = InRange("unet", in_buckets(half, (8,)), lambda: in_float32)
    assert model(torch.tensor([[1.0], [2.0], [11.0]])).tolist() == [[1.0], [2.0], [11.0]]
    assert exact == [1]


def test_with_one_bucket_a_rows_bytes_do_not_depend_on_its_company(engine_folder: Path) -> None:
    unet = UNet(engine_folder, row_buckets=(2,))
    latents, timesteps, states = rows(5)
    together = unet(latents, timesteps, states)
    alone = [unet(latents[i : i + 1], timesteps[i : i + 1], states[i : i + 1]) for i in range(5)]
    assert together.tobytes() == np.concatenate(alone).tobytes()


def test_a_compiled_network_is_warmed_up_at_the_native_size(engine_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").symlink_to(engine_folder / "unet")
    engine = {
        "native_height": 64,
        "native_width": 32,
        "latents": {"downsampling": 8},
        "text_encoder": {"context_length": 7, "width": WIDTH},
    }
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    unet = UNet(tmp_path, row_buckets=(1, 4))
    shapes: list[list[tuple[int, ...]]] = []
    unet.module.register_forward_pre_hook(lambda _, inputs: shapes.append([tuple(each.shape) for each in inputs]))
    unet.warm_up(tmp_path)
    assert shapes == [[(rows, 4, 8, 4), (rows,), (rows, 7, WIDTH)] for rows in (1, 4)]
