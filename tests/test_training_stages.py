"""The stages of training on a budget of seconds: they run, are cut off, resume, and fit together."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sdserver.settings import ServeSettings

from training import card, clip, dataset, export, latents, restore, sample, tokenizer, unet, vae
from training.common import Run, learning_rate, records
from training.optim import Muon, orthogonal
from training.world import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOY = 0.02  # core-minutes


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A training folder with a toy world and every model trained for a moment."""
    folder = tmp_path_factory.mktemp("train")
    patch = pytest.MonkeyPatch()
    patch.setenv("SD_TRAIN_DIR", str(folder))
    torch.set_num_threads(1)
    for size in FORMATS:
        dataset.make(size, 5)
    vae.train(TOY, decoder_only=False)
    clip.train(TOY, pairs=4)
    for size in FORMATS:
        latents.encode(size, 4)
    unet.train(TOY, threads=2)
    yield folder
    patch.undo()


def test_a_stage_that_is_cut_off_goes_on_where_it_was(toy: Path) -> None:
    before = torch.load(toy / "clip.pt", weights_only=False)["run"]
    clip.train(2 * TOY, pairs=4)
    after = torch.load(toy / "clip.pt", weights_only=False)["run"]
    assert after["step"] > before["step"]
    assert after["spent"] >= before["spent"]
    assert after["history"][: len(before["history"])] == before["history"]


def test_a_finished_stage_does_nothing_more(toy: Path) -> None:
    before = (toy / "unet.pt").stat().st_mtime_ns
    unet.train(TOY / 2)
    assert (toy / "unet.pt").stat().st_mtime_ns == before


def test_the_encoder_never_changes_once_latents_may_be_cached(toy: Path) -> None:
    before = vae.load_trained().encoder.conv_in.weight.clone()
    vae.train(10.0, decoder_only=False)
    vae.train(TOY, decoder_only=True)
    decoded = vae.load_trained()
    assert torch.equal(before, decoded.encoder.conv_in.weight)
    assert (toy / "vae-decoder.pt").exists()


def test_cached_latents_are_those_of_the_encoder(toy: Path) -> None:
    cached = latents.load(FORMATS[0])
    pixels = vae.to_tensor(np.asarray(cached.scenes.images[:2]))
    mean = vae.load_trained().encode(pixels).latent_dist.mean
    assert np.allclose(cached.moments[:2, :4], mean.numpy(), atol=5e-3)


def test_threads_share_a_batch_without_changing_its_gradient(toy: Path) -> None:
    batch = unet.Batches(0, 0).batch(0.0)
    gradients = []
    for threads in (1, 2):
        torch.manual_seed(0)
        model = unet.build()
        unet.Replicas(model, threads).gradients(batch)
        gradients.append(model.conv_in.weight.grad)
    assert gradients[0] is not None
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_the_exported_engine_loads_with_the_fields_own_classes(toy: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from open_clip.model import CLIP

    size = export.export(sample.load(), tmp_path)
    assert size < export.TOTAL_LIMIT
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.cross_attention_dim == clip.WIDTH
    statistics = json.loads((toy / "vae.json").read_text())
    scaling_factor = AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor
    assert scaling_factor == pytest.approx(statistics["scaling_factor"])
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    CLIP(**config["model_cfg"]).load_state_dict(load_file(tmp_path / "clip" / "open_clip_model.safetensors"))
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.allclose(scheduler.alphas_cumprod, unet.alphas_cumprod(sample.BETA_END), rtol=1e-4)


def test_a_restored_engine_is_the_exported_one_and_can_be_refined(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"
    trained = sample.load()
    export.export(trained, engine)
    monkeypatch.setenv("SD_TRAIN_DIR", str(tmp_path / "train"))
    restore.restore(engine)
    models = sample.load()
    for part in ("clip", "vae", "unet"):
        ours = getattr(models, part).state_dict()
        for name, value in getattr(trained, part).state_dict().items():
            assert torch.allclose(ours[name].float(), value.float(), rtol=1e-3, atol=1e-4), name
    assert models.scaling_factor == pytest.approx(trained.scaling_factor)
    assert {row["stage"] for row in records()} >= {"vae", "unet"}

    (tmp_path / "train" / "world").symlink_to(toy / "world")
    vae.train(TOY, decoder_only=True)
    clip.train(1.0)
    unet.train(1.0)  # minutes, were they not over
    for size in FORMATS:
        latents.encode(size, 4)
    unet.train(TOY, refine=True)
    assert not torch.equal(models.unet.conv_in.weight, unet.load_trained().conv_in.weight)
    assert records()[-1]["stage"] == "unet-refine"
    with pytest.raises(FileExistsError, match=r"clip.pt, unet-refine.pt"):
        restore.restore(engine)


def test_a_descriptor_gets_the_digests_and_the_schedule_of_the_exported_files(toy: Path, tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    old = {"id": "toy", "weights": {name: "old"}, "noise_schedule": {"beta_end": 1, "steps_offset": 1}}
    (tmp_path / "engine.json").write_text(json.dumps(old))
    export.main(["--out", str(tmp_path)])
    descriptor = json.loads((tmp_path / "engine.json").read_text())
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    assert descriptor == {"id": "toy", "weights": {name: digest}, "noise_schedule": schedule}


def test_the_shipped_engine_is_drawn_by_the_schedule_that_diffusers_reads_beside_it() -> None:
    shipped = ServeSettings().model_repository / "engines/tiny-landscape"
    scheduler = json.loads((shipped / "scheduler/scheduler_config.json").read_text())
    schedule = json.loads((shipped / "engine.json").read_text())["noise_schedule"]
    scheduler["train_timesteps"] = scheduler["num_train_timesteps"]
    assert schedule == {name: scheduler.get(name, False) for name in schedule}
    assert schedule["beta_end"] == sample.BETA_END


def test_a_sample_depends_on_its_seed_and_not_on_its_company(toy: Path) -> None:
    models = sample.load()
    red, blue = sample.parse("a red house"), sample.parse("a blue boat : 2 | trees : -1")
    alone = sample.generate(models, [(red, 7)], steps=2)
    together = sample.generate(models, [(blue, 3), (red, 7)], steps=2)
    assert np.abs(alone[0].astype(int) - together[1]).max() <= 1
    assert np.abs(alone[0].astype(int) - together[0]).max() > 1


def test_a_full_negative_weight_replaces_the_empty_prompt(toy: Path) -> None:
    models = sample.load()
    _, against = sample.blend(models, sample.parse("a meadow | trees : -1"))
    states = clip.text_states(models.clip, models.tokens(["trees"]))
    assert torch.allclose(against, states[0], atol=1e-5)


def test_text_states_do_not_depend_on_what_follows_them(toy: Path) -> None:
    model, tokens = clip.load_trained(), tokenizer.load()(["a red house at night"])
    length = int(tokens.argmax(1)) + 1
    whole, cut = clip.text_states(model, tokens), clip.text_states(model, tokens[:, :length])
    assert torch.allclose(whole[:, :length], cut, atol=1e-5)


def test_every_word_of_a_caption_is_one_token(toy: Path) -> None:
    tokens = tokenizer.load()
    assert len(tokens.encode("a red sailboat beside snowy mountains at sunset")) == 8


def test_a_picture_that_a_caption_also_fits_is_no_negative_of_it() -> None:
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), dim=-1)
    scale = torch.tensor(50.0)
    alike = torch.tensor([[True, True], [True, True]])
    assert clip.contrastive_loss(features, features, scale, alike).item() == pytest.approx(0, abs=1e-4)
    assert clip.contrastive_loss(features, features, scale, torch.eye(2, dtype=torch.bool)).item() > 0.5


@pytest.mark.parametrize("shape", [(8, 8), (16, 144), (90, 10)])
def test_an_orthogonal_update_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.3 < values.min() < 1.3
    assert 0.6 < values.max() < 1.3
    assert (orthogonal(matrix) * matrix).sum() > 0


def test_muon_finds_the_weights_of_a_linear_map_and_resumes_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(64, 8, generator=generator), torch.randn(4, 8, generator=generator)
    layer = torch.nn.Linear(8, 4)

    def step(layer: torch.nn.Linear, optimizer: Muon) -> float:
        loss = (layer(inputs) - inputs @ wanted.T).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return float(loss.item())

    optimizer = Muon(layer.parameters(), matrix_rate=0.3, rate=0.03, weight_decay=0.0)
    losses = []
    for remaining in range(150, 0, -1):
        optimizer.set_progress(remaining / 150)
        losses.append(step(layer, optimizer))
    assert losses[-1] < 0.01 * losses[0]

    twin = torch.nn.Linear(8, 4)
    twin.load_state_dict(layer.state_dict())
    resumed = Muon(twin.parameters(), matrix_rate=0.3, rate=0.03, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(layer, optimizer) == step(twin, resumed)
    assert torch.equal(layer.weight, twin.weight)


def test_the_learning_rate_rises_rests_and_falls() -> None:
    rates = [learning_rate(1.0, progress, warm=0.1, decay_from=0.6) for progress in (0, 0.05, 0.1, 0.6, 0.8, 1.0)]
    assert rates == pytest.approx([0.02, 0.5, 1.0, 1.0, 0.5, 0.01])


def test_a_run_without_a_checkpoint_starts_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_TRAIN_DIR", str(tmp_path))
    run = Run("none", 60)
    assert run.resume() is None
    assert run.progress == 0
    assert not run.finished


def test_the_card_says_what_is_not_reached() -> None:
    world = {"psnr_db": 20.0, "classifier_accuracy": {"time": 0.99}}
    result = {
        "seeds": 1,
        "steps": 25,
        "guidance_scale": 5.0,
        "world": world,
        "adherence": dict.fromkeys(card.TARGETS, 1.0) | {"house colour": 0.25},
        "negative_prompt": {"cut": 0.9, "time_of_day_right": 1.0},
        "clip_guidance": {"share_raised": 1.0},
        "formats": {},
        "diversity": {},
        "curves": {
            "trees_against_sea": [{"trees": 0.5, "green_share": 0.1, "blue_share": 0.87}],
            "negative_weight": [{"weight": -1.0, "green_share": 0.25, "trees_probability": 0.4}],
        },
        "failures": ["a red house (seed 1): house is blue, not red"],
    }
    text = card.card(result, [{"stage": "unet", "core_minutes": 12.4, "step": 345, "v_loss": 0.25}])
    assert "It does not reach: house colour, autoencoder PSNR on the held-out world." in text
    assert "| house colour | 25 % | >= 70 % | **no** |" in text
    assert "| `trees : w \\| sea : 1 - w`, w | 0.5 |" in text
    assert "| trees, as the judge sees it | 40 % |" in text
    assert "| unet | 12 | 345 | v_loss 0.250 |" in text
