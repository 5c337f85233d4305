"""Exported models compute what torch does, in the types and under the names of the Triton models they stand for.

OpenVINO reads them here; no test has built a TensorRT plan of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from sdmodels.onnx_export import main
from sdmodels.unet import UNet
from sdmodels.vae import VaeDecoder

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Two exports, each of which traces and translates a whole network.
pytestmark = pytest.mark.timeout(900)

WIDTH = 16


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with the smallest networks of SD 2.1's kind and random weights."""
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 2),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        upcast_attention=True,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    return folder


def exported(engine_folder: Path, role: str, precision: str, target: Path) -> onnx.ModelProto:
    main([str(engine_folder), role, str(target), "--precision", precision])
    onnx.checker.check_model(target, full_check=True)
    return onnx.load(target)


def run(target: Path, *arrays: NDArray[Any]) -> NDArray[Any]:
    core = openvino.Core()
    model = core.compile_model(core.read_model(target), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: NDArray[Any] = model(arrays)[0]
    return result


def test_a_unet_in_fp16_takes_any_rows_sizes_and_texts_and_multiplies_attention_in_float32(
    engine_folder: Path, tmp_path: Path
) -> None:
    model = exported(engine_folder, "unet", "fp16", tmp_path / "unet.onnx")
    kinds = {each.name: each.type.tensor_type.elem_type for each in [*model.graph.input, *model.graph.output]}
    assert kinds == dict.fromkeys(("latents", "timestep", "text_states", "prediction"), onnx.TensorProto.FLOAT)
    weights = {each.data_type for each in model.graph.initializer if len(each.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in weights
    typed = {each.name: each.type.tensor_type.elem_type for each in model.graph.value_info}
    softmaxes = [typed[node.output[0]] for node in model.graph.node if node.op_type == "Softmax"]
    assert softmaxes
    assert set(softmaxes) == {onnx.TensorProto.FLOAT}
    convolutions = [typed[node.output[0]] for node in model.graph.node if node.op_type == "Conv"]
    assert set(convolutions) == {onnx.TensorProto.FLOAT16}
    rng = np.random.default_rng(0)
    for rows, height, width, tokens in ((1, 8, 8, 77), (3, 8, 16, 154)):
        latents = rng.standard_normal((rows, 4, height, width), np.float32)
        timestep = rng.random((rows, 1), np.float32) * 999
        states = rng.standard_normal((rows, tokens, WIDTH), np.float32)
        expected = UNet(engine_folder)(latents, timestep[:, 0], states)
        prediction = run(tmp_path / "unet.onnx", latents, timestep, states)
        assert prediction.dtype == np.float32
        assert np.abs(prediction - expected).max() < 0.004 * np.abs(expected).max()


def test_a_decoder_gives_bytes(engine_folder: Path, tmp_path: Path) -> None:
    exported(engine_folder, "vae_decoder", "fp32", tmp_path / "vae.onnx")
    for shape in ((1, 4, 8, 8), (2, 4, 8, 12)):
        latents = np.random.default_rng(1).standard_normal(shape, np.float32)
        image = run(tmp_path / "vae.onnx", latents)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - VaeDecoder(engine_folder)(latents)).max() <= 1
