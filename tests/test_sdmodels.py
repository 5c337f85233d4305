"""The models give what open_clip and diffusers give for the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from open_clip import CLIP, SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from sdmodels.batching import run_together
from sdmodels.chunking import COMMA_REACH, Emphasis, chunk_ends, fragments
from sdmodels.cores import physical_cores
from sdmodels.errors import InvalidInput
from sdmodels.python_backend import BackendModel
from sdmodels.text_encoder import TextEncoder
from sdmodels.tokenizer import LONGEST_WORD, Tokenizer
from sdmodels.unet import UNet
from sdmodels.vae import VaeDecoder, VaeEncoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENGINE = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"
CONTEXT_LENGTH, WIDTH = 77, 128
PROMPTS = ["", "a valley in the Alps at sunset, epic vista", "palm trees | sea", "a lake"]

rng = np.random.default_rng(5)


def normal(*shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def encode() -> TextEncoder:
    return TextEncoder(ENGINE)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return UNet(ENGINE)


@pytest.fixture(scope="module")
def decode() -> VaeDecoder:
    return VaeDecoder(ENGINE)


@pytest.fixture(scope="module")
def encode_image() -> VaeEncoder:
    return VaeEncoder(ENGINE)


@pytest.fixture(scope="module")
def reference_tokenizer() -> SimpleTokenizer:
    """open_clip's tokenizer with the engine's vocabulary."""
    return SimpleTokenizer(str(ENGINE / "clip/bpe_tiny.txt.gz"))


@pytest.fixture(scope="module")
def tokenize() -> Tokenizer:
    config = json.loads((ENGINE / "clip/open_clip_config.json").read_text())
    return Tokenizer(ENGINE / "clip", config["model_cfg"]["text_cfg"])


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, sdmodels, sdmodels.python_backend; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Text encoder


@torch.inference_mode()
def test_text_states_are_those_of_open_clips_penultimate_layer(
    encode: TextEncoder, reference_tokenizer: SimpleTokenizer
) -> None:
    config = json.loads((ENGINE / "clip/open_clip_config.json").read_text())["model_cfg"]
    clip = CLIP(**config).eval()
    clip.load_state_dict(load_file(ENGINE / "clip/open_clip_model.safetensors"))
    layers = config["text_cfg"]["layers"]
    tokens = reference_tokenizer(PROMPTS, context_length=CONTEXT_LENGTH)
    expected = clip.forward_intermediates(text=tokens, text_indices=[layers - 2], normalize_intermediates=True)

    states = np.stack([encode(text)[0] for text in PROMPTS])

    assert states.shape == (len(PROMPTS), CONTEXT_LENGTH, WIDTH)
    assert states.dtype == np.float32
    np.testing.assert_allclose(states, expected["text_intermediates"][0].numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("text", "tokens", "chunks"),
    [
        ("", 0, 1),
        ("a lake", 2, 1),
        ("a lake a lake", 4, 1),
        ("a " * 75, 75, 1),
        ("a " * 76, 76, 2),
        ("a " * 151, 151, 3),
    ],
)
def test_token_counts_leave_out_start_and_end(encode: TextEncoder, text: str, tokens: int, chunks: int) -> None:
    states, *counts, _ = encode(text)
    assert counts == [tokens, chunks]
    assert states.shape == (chunks * CONTEXT_LENGTH, WIDTH)


@pytest.mark.parametrize("length", [74, 75, 149, 1199])
def test_a_text_of_any_length_keeps_its_last_word(encode: TextEncoder, length: int) -> None:
    lake, sea = (encode("a " * length + word)[0] for word in ("lake", "sea"))
    position = length // 75 * CONTEXT_LENGTH + 1 + length % 75
    np.testing.assert_array_equal(lake[:position], sea[:position])
    assert np.abs(lake[position] - sea[position]).max() > 0.1


def test_every_chunk_is_encoded_as_a_text_of_its_own(encode: TextEncoder) -> None:
    first, second = "trees " * 60 + "lake, ", "sea " * 30
    states, tokens, chunks, _ = encode(first + second)
    assert (tokens, chunks) == (92, 2)
    np.testing.assert_array_equal(states, np.concatenate([encode(first)[0], encode(second)[0]]))


def test_of_a_text_with_too_many_chunks_only_the_first_is_encoded(encode: TextEncoder) -> None:
    states, tokens, chunks, _ = encode("a " * 1201)
    assert (tokens, chunks) == (1201, 17)
    np.testing.assert_array_equal(states, encode("a " * 75)[0])


COMMA = 0


@given(st.lists(st.integers(0, 3), max_size=200), st.integers(1, 80))
def test_chunks_are_all_tokens_in_order_and_none_is_too_long(tokens: list[int], size: int) -> None:
    ends = chunk_ends(tokens, size, COMMA)
    lengths = np.diff([0, *ends])
    assert ends[-1] == len(tokens)
    assert lengths.max() <= size
    assert lengths.min() >= min(1, len(tokens))
    for start, end in zip([0, *ends], ends[:-1], strict=False):
        # It is full, or ends after the last comma in reach.
        assert end == start + size or (tokens[end - 1] == COMMA and COMMA not in tokens[end : start + size])
        assert end > start + size - COMMA_REACH


def test_a_comma_ends_a_chunk_only_near_its_end() -> None:
    def ends(comma: int) -> list[int]:
        return chunk_ends([COMMA if position == comma else 1 for position in range(100)], 75, COMMA)

    assert ends(74) == [75, 100]
    assert ends(55) == [56, 100]
    assert ends(54) == ends(75) == [75, 100]


@given(st.text(max_size=60) | st.text("ab \n&;<>", min_size=1, max_size=8).map(lambda text: text * 16))
def test_tokens_are_open_clips(tokenize: Tokenizer, reference_tokenizer: SimpleTokenizer, text: str) -> None:
    assert tokenize(text) == reference_tokenizer.encode(text)


def test_an_endless_word_is_read_as_several(tokenize: Tokenizer) -> None:
    # At once: by open_clip alone it would take 16,000 times as long.
    word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), LONGEST_WORD))
    assert tokenize(word * 16_000) == tokenize(word) * 16_000


# Emphasis


def test_a_factor_of_1_changes_nothing_even_inside_of_a_word(encode: TextEncoder) -> None:
    np.testing.assert_array_equal(encode("a lake, trees", [(3, 5, 1.0), (8, 13, 1.0)])[0], encode("a lake, trees")[0])


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.3, 10.0])
def test_only_emphasised_tokens_change_their_strength_and_the_prompt_keeps_its_own(
    encode: TextEncoder, factor: float
) -> None:
    # Words of one token each, and more than a chunk holds.
    text = "a " * 70 + "b, red trees by the lake at night"
    start = text.index("red")
    plain, tokens, chunks, _ = encode(text)
    states = encode(text, [(start, start + len("red trees"), factor)])[0]
    assert tokens == 79
    assert chunks == 2
    # The second chunk begins after the comma.
    changed = np.isin(np.arange(len(plain)), [CONTEXT_LENGTH + 1, CONTEXT_LENGTH + 2])
    common = (states[~changed] / plain[~changed]).mean()
    np.testing.assert_allclose(states[~changed], common * plain[~changed], rtol=1e-4)
    np.testing.assert_allclose(states[changed], factor * common * plain[changed], rtol=1e-4)
    assert np.square(states).mean() == pytest.approx(np.square(plain).mean(), rel=1e-5)


def test_text_on_either_side_of_a_border_is_tokenized_by_itself(
    encode: TextEncoder, reference_tokenizer: SimpleTokenizer
) -> None:
    whole, parts = (
        sum(len(reference_tokenizer.encode(part)) for part in split) for split in (["trees"], ["tr", "ees"])
    )
    assert whole < parts
    assert encode("trees", [(2, 5, 2.0)])[1] == parts


@pytest.mark.parametrize(
    "emphasis",
    [
        [(-1, 2, 2.0)],
        [(2, 2, 2.0)],
        [(0, 7, 2.0)],
        [(2, 4, 2.0), (3, 5, 2.0)],
        [(2, 4, 2.0), (0, 1, 2.0)],
        [(0, 1, -1.0)],
        [(0, 1, np.inf)],
        [(0, 1, np.nan)],
    ],
)
def test_emphasis_that_is_not_possible_is_refused(encode: TextEncoder, emphasis: list[Emphasis]) -> None:
    with pytest.raises(InvalidInput, match="not possible"):
        encode("a lake", emphasis)


@given(st.data())
def test_fragments_are_the_text_with_the_factors_of_its_characters(data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=20))
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    factors = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    emphasis = [(start, end, data.draw(factors)) for start, end in pairwise(borders)][::2]
    expected = [1.0] * len(text)
    for start, end, factor in emphasis:
        expected[start:end] = [factor] * (end - start)
    read = [(character, factor) for part, factor in fragments(text, emphasis) for character in part]
    assert read == list(zip(text, expected, strict=True))


def test_without_a_vocabulary_of_its_own_an_engine_has_open_clips(tmp_path: Path) -> None:
    tokens = Tokenizer(tmp_path, {"vocab_size": 49408})("a lighthouse at dusk")
    assert tokens == SimpleTokenizer().encode("a lighthouse at dusk")


def test_a_vocabulary_that_does_not_fit_the_text_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"knows 2356 tokens and its tokenizer 49408"):
        Tokenizer(tmp_path, {"vocab_size": 2356})


# UNet


def test_predictions_are_those_of_diffusers(unet: UNet) -> None:
    reference = UNet2DConditionModel.from_pretrained(
        ENGINE / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    latents, text_states = normal(3, 4, 16, 24), normal(3, CONTEXT_LENGTH, WIDTH)
    timesteps = np.array([0, 320.5, 999], np.float32)
    with torch.inference_mode():
        inputs = (torch.from_numpy(array) for array in (latents, timesteps, text_states))
        expected = reference(*inputs).sample.numpy()

    prediction = unet(latents, timesteps, text_states)

    assert prediction.dtype == np.float32
    np.testing.assert_allclose(prediction, expected, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 32)])
def test_a_row_of_a_batch_is_what_it_is_alone(unet: UNet, height: int, width: int) -> None:
    latents, text_states = normal(5, 4, height, width), normal(5, CONTEXT_LENGTH, WIDTH)
    timesteps = np.array([999, 700, 400, 100, 0], np.float32)
    together = unet(latents, timesteps, text_states)
    for row in range(5):
        alone = unet(latents[row : row + 1], timesteps[row : row + 1], text_states[row : row + 1])
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-4)


def test_any_number_of_text_states_conditions_a_row(unet: UNet) -> None:
    latents, timesteps, text_states = normal(1, 4, 16, 16), np.array([500], np.float32), normal(1, 3 * 77, WIDTH)
    prediction = unet(latents, timesteps, text_states)
    assert np.abs(prediction - unet(latents, timesteps, text_states[:, :77])).max() > 0.01


def test_rows_that_do_not_match_are_refused(unet: UNet) -> None:
    with pytest.raises(InvalidInput, match="2 latents, 1 timesteps and 2 texts"):
        unet(normal(2, 4, 16, 16), normal(1), normal(2, CONTEXT_LENGTH, WIDTH))


# VAE


@torch.inference_mode()
def test_images_are_those_of_diffusers(decode: VaeDecoder) -> None:
    reference = AutoencoderKL.from_pretrained(ENGINE / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    latents = normal(2, 4, 16, 24)
    decoded = reference.decode(torch.from_numpy(latents) / reference.config.scaling_factor).sample
    expected = [np.asarray(image) for image in VaeImageProcessor().postprocess(decoded)]

    images = decode(latents)

    assert images.shape == (2, 128, 192, 3)
    assert images.dtype == np.uint8
    # Another order of summation may round a value the other way.
    difference = np.abs(images.astype(int) - np.stack(expected))
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@torch.inference_mode()
def test_latents_of_images_are_the_mean_that_diffusers_gives(encode_image: VaeEncoder) -> None:
    reference = AutoencoderKL.from_pretrained(ENGINE / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    pixels = rng.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    images = VaeImageProcessor().preprocess([Image.fromarray(row) for row in pixels])
    expected = reference.encode(images).latent_dist.mean * reference.config.scaling_factor

    latents = encode_image(pixels)

    assert latents.shape == (2, 4, 8, 12)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected.numpy(), atol=2e-5)


def test_of_transparent_pixels_an_encoder_sees_no_colour(encode_image: VaeEncoder) -> None:
    pixels = rng.integers(0, 256, (1, 64, 96, 4), dtype=np.uint8)
    pixels[..., 3] = rng.choice([0, 1, 255], (1, 64, 96))
    image = torch.tensor(pixels[..., :3]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        expected = encode_image.latents(image * torch.tensor(pixels[..., 3] != 0))
    np.testing.assert_allclose(encode_image(pixels), expected.numpy(), atol=1e-5)


def test_latents_do_not_depend_on_their_company_and_are_the_same_again(encode_image: VaeEncoder) -> None:
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    together = encode_image(pixels)
    for row in range(3):
        np.testing.assert_array_equal(encode_image(pixels[row : row + 1])[0], together[row])


def test_what_is_decoded_and_encoded_is_nearly_what_it_was(decode: VaeDecoder, encode_image: VaeEncoder) -> None:
    # A meadow below a sky: what the shipped engine was trained on.
    height = np.linspace(0, 1, 64)[:, None, None]
    sky = np.array([80, 150, 235]) * (1 - height) + np.array([230, 240, 250]) * height
    meadow = np.where(height < 0.6, sky, np.array([90, 180, 60])).repeat(64, axis=1)[None].round().astype(np.uint8)
    again = decode(encode_image(meadow))
    assert np.abs(again.astype(int) - meadow).mean() < 6


@pytest.mark.parametrize("shape", [(1, 64, 60, 3), (1, 63, 64, 3), (1, 64, 64, 2), (1, 0, 64, 3)])
def test_images_that_are_no_whole_latents_are_refused(encode_image: VaeEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="multiples of 8"):
        encode_image(np.zeros(shape, np.uint8))


def test_an_image_does_not_depend_on_its_company(decode: VaeDecoder) -> None:
    latents = normal(3, 4, 16, 16)
    together = decode(latents)
    for row in range(3):
        np.testing.assert_array_equal(decode(latents[row : row + 1])[0], together[row])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_no_numbers_are_refused(decode: VaeDecoder, value: float) -> None:
    latents = normal(2, 4, 16, 16)
    latents[1, 0, 3, 5] = value
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        decode(latents)


def test_latents_that_decode_to_no_numbers_are_refused(decode: VaeDecoder) -> None:
    with pytest.raises(InvalidInput, match="decode to NaN or infinity"):
        decode(np.full((1, 4, 16, 16), 3e38, np.float32))


def test_a_vae_with_the_old_names_of_attention_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=True,
    )
    vae.save_pretrained(tmp_path / "vae")
    latents = normal(1, 4, 16, 16)
    expected = VaeDecoder(tmp_path)(latents)
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights: dict[str, Any] = {}
    for name, weight in load_file(path).items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = weight
    assert weights.keys() != load_file(path).keys()
    save_file(weights, path)

    np.testing.assert_array_equal(VaeDecoder(tmp_path)(latents), expected)


# What serves them


def doubled_unless_negative(x: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    if (x < 0).any():
        raise ValueError("negative")
    return 2 * x, x.sum(axis=1)


def test_requests_run_together_and_get_what_they_get_alone() -> None:
    calls = []

    def run(x: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        calls.append(len(x))
        return doubled_unless_negative(x)

    requests = [(np.full((rows, 2), rows),) for rows in (1, 3, 2)]
    answers = run_together(run, requests)
    assert calls == [6]
    for request, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, tuple)
        for array, alone in zip(answer, doubled_unless_negative(*request), strict=True):
            np.testing.assert_array_equal(array, alone)


def test_a_request_at_fault_gets_its_error_and_the_others_their_answers() -> None:
    good, bad = (np.ones((1, 2)),), (-np.ones((2, 2)),)
    first, second, third = run_together(doubled_unless_negative, [good, bad, good])
    assert isinstance(second, ValueError)
    for answer in (first, third):
        assert isinstance(answer, tuple)
        np.testing.assert_array_equal(answer[0], [[2, 2]])


def test_no_requests_need_no_run() -> None:
    assert run_together(doubled_unless_negative, []) == []


class TritonError(Exception):
    """`pb_utils.TritonError`, and with the two classes below all of `pb_utils` that the models use to answer."""

    CANCELLED, INVALID_ARG, INTERNAL = "cancelled", "invalid argument", "internal"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message, self.code = message, code


@dataclass
class Tensor:
    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class Response:
    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Request:
    x: NDArray[Any]
    cancelled: bool = False

    def is_cancelled(self) -> bool:
        return self.cancelled


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes `pb_utils` importable, as it is in Triton only; what models log comes here."""
    lines: list[str] = []
    pb_utils = ModuleType("triton_python_backend_utils")
    pb_utils.__dict__.update(
        TritonError=TritonError,
        Tensor=Tensor,
        InferenceResponse=Response,
        Logger=SimpleNamespace(log_error=lines.append),
        get_input_tensor_by_name=lambda request, name: Tensor(name, getattr(request, name)),
    )
    monkeypatch.setitem(sys.modules, pb_utils.__name__, pb_utils)
    return lines


class Doubling(BackendModel):
    inputs = ("x",)
    outputs = ("y",)

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, x: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        self.rows.append(len(x))
        if (x == 13).any():
            raise RuntimeError("/secret/path")
        if (x < 0).any():
            raise InvalidInput("x is negative")
        return (2 * x,)


def test_requests_are_answered_in_their_order_and_cancelled_ones_are_not_run(log: list[str]) -> None:
    model = Doubling()
    first, second, third = model.execute(
        [Request(np.ones(1)), Request(np.ones(5), cancelled=True), Request(np.ones(2))]
    )
    assert model.rows == [3]
    assert [tensor.name for tensor in first.tensors] == ["y"]
    assert (first.tensors[0].array.tolist(), third.tensors[0].array.tolist()) == ([2], [2, 2])
    assert second.error.code == TritonError.CANCELLED
    assert log == []


def test_callers_learn_what_they_did_wrong_and_the_log_what_the_model_did(log: list[str]) -> None:
    invalid, failed = Doubling().execute([Request(-np.ones(1)), Request(np.full(1, 13))])
    assert (invalid.error.code, invalid.error.message) == (TritonError.INVALID_ARG, "x is negative")
    assert failed.error.code == TritonError.INTERNAL
    assert "secret" not in failed.error.message
    assert len(log) == 1
    assert "/secret/path" in log[0]


def write_machine(system: Path, threads_per_core: int) -> int:
    """A /sys with this process's CPUs as hyper-threads of cores; returns how many cores that makes."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        cores.add(cpu // threads_per_core)
        topology = system / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"core {cpu // threads_per_core}\n")
    return len(cores)


@pytest.mark.parametrize("threads_per_core", [1, 2])
def test_hyper_threads_are_no_cores(tmp_path: Path, threads_per_core: int) -> None:
    cores = write_machine(tmp_path, threads_per_core)
    assert physical_cores(tmp_path) == cores


def test_a_machine_that_does_not_tell_has_no_hyper_threads(tmp_path: Path) -> None:
    assert physical_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_a_containers_limit_is_respected(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    cores = write_machine(tmp_path, 1)
    for name, text in files.items():
        path = tmp_path / "fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert physical_cores(tmp_path) == (cores if limit is None else limit)
