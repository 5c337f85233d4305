"""The UNet as OpenVINO runs it: the same numbers as torch, whatever the company, and converted once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from sdmodels.cores import has_bf16
from sdmodels.errors import InvalidInput
from sdmodels.openvino_unet import OpenVinoUNet, pictures_of
from sdmodels.runtimes import default_runtime, load_unet
from sdmodels.unet import UNet

Floats = NDArray[np.float32]

SHIPPED = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"
WIDTH = 16


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with the smallest UNet of SD 2.1's kind, random weights, converted."""
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 2),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
    )
    unet.save_pretrained(folder / "unet")
    (folder / "engine.json").write_text(json.dumps({"weights": {"unet/config.json": "0", "vae/config.json": "1"}}))
    OpenVinoUNet(folder, 1)
    return folder


def rows(count: int, height: int, width: int, tokens: int, state_width: int) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(count)
    return (
        rng.standard_normal((count, 4, height, width), np.float32),
        (rng.random(count, np.float32) * 999),
        rng.standard_normal((count, tokens, state_width), np.float32),
    )


@pytest.mark.parametrize(("height", "width", "tokens"), [(16, 16, 77), (8, 24, 154)])
def test_it_predicts_what_torch_predicts(height: int, width: int, tokens: int) -> None:
    batch = rows(3, height, width, tokens, 128)
    expected = UNet(SHIPPED)(*batch)
    assert np.abs(OpenVinoUNet(SHIPPED, 1, "fp32")(*batch) - expected).max() < 1e-5 * np.abs(expected).max()
    # The best that this CPU has: bfloat16 has 8 bits.
    best = OpenVinoUNet(SHIPPED, 1)(*batch)
    assert np.square(best - expected).mean() < 0.02**2 * np.square(expected).mean()


def test_we_know_as_openvino_does_whether_the_cpu_has_bf16() -> None:
    hint = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    assert has_bf16() == (hint == openvino.Type.bf16)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rows_bytes_do_not_depend_on_its_company(threads: int, precision: str) -> None:
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not compute in bf16")
    unet = OpenVinoUNet(SHIPPED, threads, precision)
    rng = np.random.default_rng(7)
    for height, width, tokens in ((16, 16, 77), (8, 24, 77), (16, 16, 154)):
        latents, timesteps, states = rows(8, height, width, tokens, 128)
        alone = np.concatenate([unet(latents[i : i + 1], timesteps[i : i + 1], states[i : i + 1]) for i in range(8)])
        for _ in range(6):
            some = rng.permutation(8)[: rng.integers(1, 9)]
            together = unet(latents[some], timesteps[some], states[some])
            assert together.tobytes() == alone[some].tobytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_one_picture_share_its_first_layers_and_have_the_bytes_that_they_have_alone(threads: int) -> None:
    unet = OpenVinoUNet(SHIPPED, threads)
    latents, timesteps, states = rows(8, 16, 16, 77, 128)
    # Guidance has pairs; a picture of one row, three rows, the same latents at another time, and the first one again.
    of = np.array([0, 0, 1, 2, 2, 2, 3, 0])
    latents, timesteps = latents[of], timesteps[of]
    latents[6] = latents[5]
    pictures, times, labels, picture = pictures_of(latents, timesteps, {"in_channels": 4})
    assert (len(pictures), len(times), labels, picture.tolist()) == (5, 5, [], [0, 0, 1, 2, 2, 2, 3, 4])
    together = unet(latents, timesteps, states)
    alone = np.concatenate([unet(latents[i : i + 1], timesteps[i : i + 1], states[i : i + 1]) for i in range(8)])
    assert together.tobytes() == alone.tobytes()
    assert len({row.tobytes() for row in together}) == 8


def test_an_upscalers_rows_share_only_with_the_same_label() -> None:
    config = {"in_channels": 2, "num_class_embeds": 1000}
    latents = np.ones((4, 3, 2, 2), np.float32)
    latents[2:, 2] = 20
    pictures, _, [labels], picture = pictures_of(latents, np.full(4, 5, np.float32), config)
    assert (pictures.shape, labels.tolist(), picture.tolist()) == ((2, 2, 2, 2), [1, 20], [0, 0, 1, 1])


def test_an_answer_stays_as_it_is_when_the_next_one_comes(engine_folder: Path) -> None:
    unet = OpenVinoUNet(engine_folder, 1)
    latents, timesteps, states = rows(2, 8, 8, 77, WIDTH)
    first = unet(latents[:1], timesteps[:1], states[:1])
    kept = first.copy()
    unet(latents[1:], timesteps[1:], states[1:])
    assert np.array_equal(first, kept)


def test_rows_that_disagree_are_refused(engine_folder: Path) -> None:
    latents, timesteps, states = rows(2, 8, 8, 77, WIDTH)
    with pytest.raises(InvalidInput, match="got 2 latents, 1 timesteps and 2 texts"):
        OpenVinoUNet(engine_folder, 1)(latents, timesteps[:1], states)


def test_what_openvino_is_slow_at_is_written_otherwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 2, 2),
        cross_attention_dim=WIDTH,
        # The form of 1.x: convolutions beside the transformers.
        use_linear_projection=False,
    )
    for parameter in unet.parameters():
        # No norm scales by 1 and shifts by 0.
        parameter.data += 0.1 * torch.randn_like(parameter)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "engine.json").write_text(json.dumps({"weights": {"unet/config.json": "0"}}))
    batch = rows(3, 32, 40, 77, WIDTH)
    expected = UNet(tmp_path)(*batch)
    assert np.abs(OpenVinoUNet(tmp_path, 1, "fp32")(*batch) - expected).max() < 1e-5 * np.abs(expected).max()

    [converted] = (tmp_path / "openvino").glob("unet-*/unet.xml")
    kinds = [node.get_type_name() for node in openvino.Core().read_model(converted).get_ops()]
    # Two upsamplers are phases, the gates' halves are layers; of the norms only those of 32 x 32 places stay as they
    # were: two of the first resnet, four of the last two, and the last one.
    assert (kinds.count("Interpolate"), kinds.count("DepthToSpace")) == (0, 2)
    assert kinds.count("VariadicSplit") == 0
    assert kinds.count("GroupNormalization") == 7


def test_a_converted_network_is_read_again_without_torch(engine_folder: Path) -> None:
    made = {path: path.stat().st_mtime_ns for path in (engine_folder / "openvino").rglob("*")}
    code = (
        "import sys; from pathlib import Path; from sdmodels.runtimes import load_unet; "
        f"load_unet(Path({str(engine_folder)!r}), 1, 'openvino'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {path: path.stat().st_mtime_ns for path in (engine_folder / "openvino").rglob("*")} == made


def test_other_weights_are_converted_anew(engine_folder: Path, tmp_path: Path) -> None:
    for path in ("unet", "openvino"):
        (tmp_path / path).symlink_to(engine_folder / path)
    (tmp_path / "engine.json").write_text(json.dumps({"weights": {"unet/config.json": "2"}}))
    before = set((engine_folder / "openvino").iterdir())
    OpenVinoUNet(tmp_path, 1)
    assert len(set((engine_folder / "openvino").iterdir()) - before) == 1


def test_a_folder_that_cannot_be_written_is_left_alone(engine_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").symlink_to(engine_folder / "unet")
    (tmp_path / "engine.json").write_text((engine_folder / "engine.json").read_text())
    # As root may write everywhere, a file stands where the folder would be.
    (tmp_path / "openvino").write_text("")
    latents, timesteps, states = rows(1, 8, 8, 77, WIDTH)
    answer = OpenVinoUNet(tmp_path, 1)(latents, timesteps, states)
    assert np.array_equal(answer, OpenVinoUNet(engine_folder, 1)(latents, timesteps, states))


def test_the_choice_of_a_runtime(engine_folder: Path) -> None:
    assert default_runtime("cpu") == "openvino"
    assert default_runtime("cuda:0") == "torch"
    assert isinstance(load_unet(engine_folder, 1), OpenVinoUNet)
    assert isinstance(load_unet(engine_folder, 1, "torch"), UNet)
    with pytest.raises(ValueError, match="runtime is 'onnx'; it must be one of openvino, torch"):
        load_unet(engine_folder, 1, "onnx")
    with pytest.raises(ValueError, match="precision is 'int8'; it must be one of fp32, bf16"):
        load_unet(engine_folder, 1, "openvino", "int8")
    with pytest.raises(ValueError, match="with torch it must be fp32"):
        load_unet(engine_folder, 1, "torch", "fp16")
