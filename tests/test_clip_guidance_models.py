"""The models of CLIP guidance: gradients against finite differences, features against open_clip's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from sdmodels.clip_guidance import ClipGuidance, regions
from sdmodels.errors import InvalidInput
from sdmodels.text_encoder import TextEncoder
from sdmodels.unet import UNet
from sdmodels.unet_gradient import UNetGradient
from sdmodels.vae import VaeDecoder, VaeEncoder

Floats = NDArray[np.float32]

ENGINE = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"
CONFIG = json.loads((ENGINE / "clip/open_clip_config.json").read_text())
CLIP_SIZE = CONFIG["model_cfg"]["vision_cfg"]["image_size"]


@pytest.fixture(scope="module")
def guide() -> ClipGuidance:
    return ClipGuidance(ENGINE)


@pytest.fixture(scope="module")
def encode() -> TextEncoder:
    return TextEncoder(ENGINE)


@pytest.fixture(scope="module")
def reference() -> open_clip.CLIP:
    """Both towers of the engine's CLIP, by open_clip alone."""
    clip = open_clip.CLIP(**CONFIG["model_cfg"])
    clip.load_state_dict(load_file(ENGINE / "clip/open_clip_model.safetensors"))
    return clip.eval()


@pytest.fixture(scope="module")
def target(encode: TextEncoder) -> Floats:
    return features_of(encode, "a lake at dusk")


def features_of(encode: TextEncoder, text: str) -> Floats:
    features = encode(text).features
    assert features is not None
    return features


def picture(height: int, width: int) -> Floats:
    """[1, 4, h, w] latents of a sky over a lake: what the models are used to."""
    rows = np.linspace(0, 1, height * 8)[:, None, None]
    sky = np.array([250, 140, 60]) * (1 - rows) + np.array([120, 70, 120]) * rows
    pixels = np.where(rows < 0.6, sky, np.array([40, 60, 140])).repeat(width * 8, axis=1)
    return VaeEncoder(ENGINE)(pixels[None].round().astype(np.uint8))


def call(
    guide: ClipGuidance, latents: Floats, target: Floats, seeds: list[int], cutouts: list[int]
) -> tuple[Floats, Floats]:
    return guide(latents, np.stack([target] * len(latents)), np.array(seeds), np.array(cutouts))


def loss(guide: ClipGuidance, latents: NDArray[np.float64], target: Floats, seed: int, cutouts: int) -> float:
    """Half the squared angle, from the features alone."""
    tensor = torch.tensor(latents, dtype=torch.float32)
    _, height, width = latents.shape
    with torch.no_grad():
        features = [guide.features(tensor, region) for region in regions(height, width, cutouts, seed)]
    angles = [np.arccos(feature.double().numpy() @ target.astype(np.float64)) for feature in features]
    return float(np.mean(np.square(angles)) / 2)


@pytest.mark.parametrize(
    ("height", "width", "cutouts"), [(16, 16, 0), (16, 16, 3), (12, 28, 2), (9, 5, 1), (40, 40, 1)]
)
def test_the_gradient_is_the_slope_of_the_loss(
    guide: ClipGuidance, target: Floats, height: int, width: int, cutouts: int
) -> None:
    latents = picture(height, width)
    (gradient,), _ = call(guide, latents, target, [7], [cutouts])
    noise = np.random.default_rng(0).standard_normal((3, *gradient.shape))
    for direction in (gradient, *(gradient / np.linalg.norm(gradient) + n / np.linalg.norm(n) for n in noise)):
        unit = np.asarray(direction, np.float64) / np.linalg.norm(direction)
        # Large enough for float32 losses, small enough for the loss to be straight.
        step = 0.001 * unit
        ahead, behind = (loss(guide, latents[0] + sign * step, target, 7, cutouts) for sign in (1, -1))
        slope = float((gradient * unit).sum())
        assert (ahead - behind) / 0.002 == pytest.approx(slope, rel=1e-2)


def test_going_against_the_gradient_makes_it_look_more_like_the_text(guide: ClipGuidance, target: Floats) -> None:
    latents = picture(16, 16)
    (gradient,), (before,) = call(guide, latents, target, [7], [0])
    _, (after,) = call(guide, latents - 0.1 * gradient / np.sqrt(np.mean(gradient**2)), target, [7], [0])
    assert after > before + 0.01


def test_a_row_does_not_depend_on_the_rows_beside_it(guide: ClipGuidance, encode: TextEncoder) -> None:
    latents = np.random.default_rng(1).standard_normal((3, 4, 12, 20)).astype(np.float32)
    targets = np.stack([features_of(encode, text) for text in ("a lake", "night", "a forest")])
    seeds, cutouts = np.array([1, 2**63 - 1, 0]), np.array([2, 0, 1])
    together = guide(latents, targets, seeds, cutouts)
    for row in range(3):
        one = slice(row, row + 1)
        alone = guide(latents[one], targets[one], seeds[one], cutouts[one])
        for answer, answers in zip(alone, together, strict=True):
            np.testing.assert_array_equal(answer[0], answers[row])


def test_the_seed_chooses_the_cutouts_and_nothing_else_does(guide: ClipGuidance, target: Floats) -> None:
    latents = picture(16, 16)
    first, again, other = (call(guide, latents, target, [seed], [1])[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64), st.integers(0, 2**63 - 1))
def test_cutouts_are_squares_inside_of_half_to_all_of_the_shorter_side(
    height: int, width: int, cutouts: int, seed: int
) -> None:
    found = regions(height, width, cutouts, seed)
    assert found == regions(height, width, cutouts, seed)
    assert len(found) == cutouts
    shorter = min(height, width)
    for top, left, rows, columns in found:
        assert shorter / 2 <= rows == columns <= shorter
        assert 0 <= top <= height - rows
        assert 0 <= left <= width - columns


def test_cutouts_reach_every_place_of_a_panorama() -> None:
    seen = np.zeros((16, 48), bool)
    for seed in range(20):
        for top, left, rows, columns in regions(16, 48, 64, seed):
            seen[top : top + rows, left : left + columns] = True
    assert seen.all()


def test_clip_sees_what_the_decoder_draws(guide: ClipGuidance, reference: open_clip.CLIP) -> None:
    side = CLIP_SIZE // 8
    latents = picture(side, side)
    pixels = VaeDecoder(ENGINE)(latents)[0]
    mean, deviation = (torch.tensor(CONFIG["preprocess_cfg"][name])[:, None, None] for name in ("mean", "std"))
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / deviation
    with torch.no_grad():
        expected = reference.encode_image(image[None], normalize=True)[0]
        features = guide.features(torch.from_numpy(latents[0]), (0, 0, side, side))
    # The pixels were rounded to 8 bits.
    assert float(features @ expected) > 0.9999


@pytest.mark.parametrize("text", ["", "a lake at dusk", "a boat on the sea, storm, waves"])
def test_text_features_are_those_of_open_clip(encode: TextEncoder, reference: open_clip.CLIP, text: str) -> None:
    vocabulary = next((ENGINE / "clip").glob("bpe_*.txt.gz"))
    options = CONFIG["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    tokens = open_clip.SimpleTokenizer(str(vocabulary), **options)([text])
    with torch.no_grad():
        expected = reference.encode_text(tokens, normalize=True)[0].numpy()
    np.testing.assert_allclose(features_of(encode, text), expected, atol=2e-6)


def test_the_features_of_a_long_text_are_the_mean_of_its_chunks(encode: TextEncoder) -> None:
    first, second = "trees " * 60 + "lake, ", "sea " * 30
    mean = features_of(encode, first) + features_of(encode, second)
    np.testing.assert_allclose(features_of(encode, first + second), mean / np.linalg.norm(mean), atol=1e-6)


def test_emphasis_does_not_change_the_features(encode: TextEncoder) -> None:
    emphasised = encode("a lake", [(2, 6, 2.0)]).features
    assert emphasised is not None
    np.testing.assert_array_equal(emphasised, features_of(encode, "a lake"))


def test_an_engine_without_clip_guidance_has_the_same_states_and_no_features(
    encode: TextEncoder, tmp_path: Path
) -> None:
    descriptor = json.loads((ENGINE / "engine.json").read_text())
    del descriptor["clip_guidance"]
    (tmp_path / "engine.json").write_text(json.dumps(descriptor))
    (tmp_path / "clip").symlink_to(ENGINE / "clip")
    encoding = TextEncoder(tmp_path)("a lake")
    assert encoding.features is None
    np.testing.assert_array_equal(encoding.states, encode("a lake").states)


def test_latents_that_are_not_finite_are_refused(guide: ClipGuidance, target: Floats) -> None:
    latents = picture(8, 8)
    latents[0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidInput, match="NaN"):
        call(guide, latents, target, [0], [1])


def unet_inputs(rows: int) -> tuple[Floats, Floats, Floats, Floats]:
    generator = np.random.default_rng(2)
    latents, gradients = (generator.standard_normal((rows, 4, 8, 12), np.float32) for _ in range(2))
    timesteps = generator.uniform(50, 900, rows).astype(np.float32)
    return latents, timesteps, generator.standard_normal((rows, 77, 128), np.float32), gradients


def test_the_gradient_through_the_unet_is_that_of_its_prediction() -> None:
    latents, timesteps, states, gradients = unet_inputs(1)
    unet = UNet(ENGINE)
    result = UNetGradient(ENGINE)(latents, timesteps, states, gradients)
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal(latents.shape, np.float32)
        direction = noise / np.linalg.norm(noise) + result / np.linalg.norm(result)
        ahead, behind = (unet(latents + sign * 0.02 * direction, timesteps, states) for sign in (1, -1))
        slope = float((result * direction).sum())
        assert float((gradients * (ahead - behind)).sum()) / 0.04 == pytest.approx(slope, rel=1e-2)


def test_a_gradient_through_the_unet_does_not_depend_on_the_rows_beside_it() -> None:
    inputs = unet_inputs(3)
    pull_back = UNetGradient(ENGINE)
    together = pull_back(*inputs)
    for row in range(3):
        np.testing.assert_array_equal(pull_back(*(array[row : row + 1] for array in inputs))[0], together[row])
