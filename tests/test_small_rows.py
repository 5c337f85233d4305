"""Small pictures by one thread each, several at a time: order, failures, threads, bytes in any company."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from sdmodels.precision import InRange
from sdmodels.small_rows import SMALL_PIXELS, SmallRows
from sdmodels.unet_gradient import UNetGradient
from sdmodels.vae import VaeDecoder, VaeEncoder

ENGINE = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"
LARGE = SMALL_PIXELS + 1


@pytest.fixture(autouse=True)
def _three_threads() -> None:
    torch.set_num_threads(3)


def test_small_jobs_have_one_thread_each_and_large_ones_all_and_results_keep_their_order() -> None:
    def run(job: str) -> tuple[str, int, bool]:
        return job, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    found = SmallRows("cpu").map(run, ["a", "b", "c", "d"], [SMALL_PIXELS, LARGE, 1, LARGE])
    assert found == [("a", 1, False), ("b", 3, True), ("c", 1, False), ("d", 3, True)]


def test_small_jobs_run_at_the_same_time() -> None:
    together = threading.Barrier(3)
    assert SmallRows("cpu").map(lambda job: together.wait(30) is not None, [0, 1, 2], [1, 1, 1]) == [True] * 3


def test_on_a_gpu_jobs_run_one_by_one_where_they_were_asked_for() -> None:
    assert (
        SmallRows("cuda:0").map(lambda job: threading.current_thread(), [0, 1], [1, LARGE])
        == [threading.main_thread()] * 2
    )


@pytest.mark.parametrize("pixels", [1, LARGE])
def test_a_failure_is_raised_and_leaves_the_threads_as_they_were(pixels: int) -> None:
    def fails(job: int) -> None:
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        SmallRows("cpu").map(fails, [0, 1], [pixels, pixels])
    assert torch.get_num_threads() == 3


def test_a_row_has_the_same_bytes_in_any_company() -> None:
    random = np.random.default_rng(0)
    latents = random.standard_normal((4, 4, 16, 16)).astype(np.float32)
    states, times = random.standard_normal((4, 77, 128)).astype(np.float32), np.full(4, 500, np.float32)
    decode, encode, pull_back = VaeDecoder(ENGINE), VaeEncoder(ENGINE), UNetGradient(ENGINE)
    pixels = decode(latents)
    images = encode(pixels)
    gradients = pull_back(latents, times, states, latents)
    for row in range(4):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(decode(latents[one]), pixels[one])
        np.testing.assert_array_equal(encode(pixels[one]), images[one])
        np.testing.assert_array_equal(pull_back(latents[one], times[one], states[one], latents[one]), gradients[one])


def test_several_rows_that_leave_half_precision_at_once_make_the_float32_model_once() -> None:
    made: list[str] = []

    def make() -> torch.nn.Identity:
        made.append("float32")
        return torch.nn.Identity()

    in_range = InRange("a model", lambda rows: rows * torch.inf, make)
    rows = SmallRows("cpu").map(in_range, [torch.full((1, 1), float(job)) for job in (1, 2, 3)], [1, 1, 1])
    assert [row.item() for row in rows] == [1, 2, 3]
    assert made == ["float32"]
