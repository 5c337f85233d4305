"""The UNet and the text encoder with LoRAs: what they add, and that a row's numbers are its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loras import CONV, TO_K, save_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sdmodels.conversion.lora import LoraOptions, add_lora
from sdmodels.errors import InvalidInput
from sdmodels.text_encoder import TextEncoder
from sdmodels.unet import UNet
from sdmodels.unet_lora import UNetLora
from test_openvino import SHIPPED, Floats, rows

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from sdmodels.precision import Precision

Digests = NDArray[np.uint8]

NONE = "00" * 32


def save_lora(folder: Path, seed: int) -> str:
    """Puts a LoRA into an engine's folder; its digest."""
    path = save_tiny(folder / f"{seed}.safetensors", seed, UNet(SHIPPED).module.state_dict())
    digest: str = add_lora(LoraOptions(str(path), str(folder)))["sha256"]
    return digest


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped engine's files in a folder of their own."""
    folder = tmp_path_factory.mktemp("engine")
    for path in SHIPPED.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def loras(engine: Path) -> tuple[str, str]:
    return save_lora(engine, 1), save_lora(engine, 2)


def used(*choices: dict[str, float]) -> tuple[Digests, Floats]:
    """Digests [B, 2, 32] and weights [B, 2] of rows."""
    chosen = [[*choice.items(), (NONE, 0.0), (NONE, 0.0)][:2] for choice in choices]
    digests = [[np.frombuffer(bytes.fromhex(digest), np.uint8) for digest, _ in row] for row in chosen]
    return np.array(digests, np.uint8), np.array([[weight for _, weight in row] for row in chosen], np.float32)


def merged(engine: Path, choice: dict[str, float]) -> UNet2DConditionModel:
    """The UNet whose weights have the LoRAs in them."""
    module = UNet(SHIPPED).module
    for digest, weight in choice.items():
        tensors = load_file(engine / f"loras/{digest}.safetensors")
        for name in (TO_K, CONV):
            down, up = tensors[f"unet.{name}.down"], tensors[f"unet.{name}.up"]
            module.get_submodule(name).weight += weight * (up.flatten(1) @ down.flatten(1)).reshape(
                module.get_submodule(name).weight.shape
            )
    return module


def test_a_row_is_predicted_as_by_weights_that_have_its_loras_in_them(engine: Path, loras: tuple[str, str]) -> None:
    one, two = loras
    choices: list[dict[str, float]] = [{}, {one: 0.7}, {one: 1.0, two: -2.0}, {two: 0.0}]
    batch = rows(len(choices), 8, 16, 77, 128)
    plain = UNet(SHIPPED)
    # Row by row, and four rows together.
    for buckets in ((), (4,)):
        made = UNetLora(engine, row_buckets=buckets)(*batch, *used(*choices))
        for number, choice in enumerate(choices):
            x, t, c = (torch.from_numpy(array[number : number + 1]) for array in batch)
            expected = merged(engine, choice)(x, t, c, return_dict=False)[0].numpy()
            assert np.abs(made[number] - expected[0]).max() < 1e-5 * np.abs(expected).max()
            difference = np.abs(made[number] - plain(*(array[number : number + 1] for array in batch))[0]).max()
            assert (difference < 1e-5) == (choice in ({}, {two: 0.0}))


def test_a_rows_bytes_do_not_depend_on_its_company(engine: Path, loras: tuple[str, str]) -> None:
    one, two = loras
    choices: list[dict[str, float]] = [{}, {one: 0.7}, {one: 1.0, two: -2.0}, {two: 3.0}, {}, {one: -1.0}]
    unet = UNetLora(engine)
    arrays: tuple[NDArray[Any], ...] = (*rows(len(choices), 8, 16, 77, 128), *used(*choices))
    alone = np.concatenate([unet(*(array[i : i + 1] for array in arrays)) for i in range(len(choices))])
    assert alone[0].tobytes() == UNet(SHIPPED)(*(array[:1] for array in arrays[:3]))[0].tobytes()
    rng = np.random.default_rng(7)
    for _ in range(3):
        some = rng.permutation(len(choices))[: rng.integers(2, 7)]
        assert unet(*(array[some] for array in arrays)).tobytes() == alone[some].tobytes()


def test_loras_beyond_the_cache_are_read_again_and_one_that_is_gone_or_damaged_is_refused(
    engine: Path, loras: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for path in engine.iterdir():
        if path.name != "loras":
            (tmp_path / path.name).symlink_to(path)
    for digest in loras:
        (folder / f"{digest}.safetensors").write_bytes((engine / f"loras/{digest}.safetensors").read_bytes())
    one, two = loras
    batch = rows(1, 8, 8, 77, 128)
    unet = UNetLora(tmp_path, cache_bytes=1)
    first = unet(*batch, *used({one: 1.0, two: 0.5}))
    # The last one stays, whatever its size.
    (folder / f"{two}.safetensors").unlink()
    unet(*batch, *used({two: 1.0}))
    with pytest.raises(InvalidInput, match=f"there is no LoRA with SHA-256 {two} any more"):
        unet(*batch, *used({one: 1.0, two: 0.5}))
    roomy = UNetLora(engine)
    assert roomy(*batch, *used({one: 1.0, two: 0.5})).tobytes() == first.tobytes()
    (folder / f"{one}.safetensors").write_bytes((engine / f"loras/{two}.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match="is damaged: add it again"):
        UNetLora(tmp_path)(*batch, *used({one: 1.0}))


def test_in_half_precision_loras_are_near_float32_and_rows_that_overflow_are_float32(
    engine: Path, loras: tuple[str, str]
) -> None:
    one, two = loras
    arrays = (*rows(2, 8, 8, 77, 128), *used({one: 0.5}, {one: 0.5, two: 0.25}))
    exact = UNetLora(engine)(*arrays)
    errors: dict[Precision, float] = {"bf16": 0.05, "fp16": 0.01}
    for precision, near in errors.items():
        made = UNetLora(engine, precision=precision)(*arrays)
        assert 0 < np.abs(made - exact).max() < near * np.abs(exact).max()
    tensors = load_file(engine / "2.safetensors")
    tensors[f"unet.{TO_K}.lora_B.weight"] *= 1e7
    save_file(tensors, engine / "huge.safetensors")
    huge = add_lora(LoraOptions(str(engine / "huge.safetensors"), str(engine)))["sha256"]
    arrays = (*arrays[:3], *used({one: 0.5}, {huge: 1.0}))
    exact = UNetLora(engine)(*arrays)
    made = UNetLora(engine, precision="fp16")(*arrays)
    assert np.isfinite(exact).all()
    assert made[1].tobytes() == exact[1].tobytes()
    assert made[0].tobytes() != exact[0].tobytes()


def test_rows_that_disagree_are_refused(engine: Path) -> None:
    with pytest.raises(InvalidInput, match="got 2, 2, 2, 1, 1 rows"):
        UNetLora(engine)(*rows(2, 8, 8, 77, 128), *used({}))


def test_text_states_follow_from_loras_and_the_features_of_clip_do_not(engine: Path, loras: tuple[str, str]) -> None:
    one, two = loras
    encode = TextEncoder(engine)
    text = "a lake at dusk"
    plain, again = encode(text), encode(text, (), *(array[0] for array in used({one: 0.8, two: -0.5})))
    assert np.abs(again.states - plain.states).max() > 0.01
    assert plain.features is not None
    assert again.features is not None
    assert again.features.tobytes() == plain.features.tobytes()
    assert encode(text).states.tobytes() == plain.states.tobytes()

    by_hand = TextEncoder(engine)
    block = by_hand._tower.transformer.resblocks[0]
    targets = {
        "attn.k": block.attn.in_proj_weight[128:256],
        "attn.out": block.attn.out_proj.weight,
        "mlp.fc1": block.mlp.c_fc.weight,
    }
    for digest, weight in ((one, 0.8), (two, -0.5)):
        tensors = load_file(engine / f"loras/{digest}.safetensors")
        for part, weights in targets.items():
            weights += weight * tensors[f"text_encoder.0.{part}.up"] @ tensors[f"text_encoder.0.{part}.down"]
    assert np.abs(by_hand(text).states - again.states).max() < 1e-5
