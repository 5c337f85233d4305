"""Trains the denoiser: diffusers' UNet2DConditionModel, v-prediction, on cached latents and penultimate text states.

Batches hold one format and about the same number of latent tokens. Two threads each run their half of a batch through
a replica that shares the parameters: on a busy machine that waits far less than two threads inside every operation.
The learning rate is constant and falls by a cosine at the end of the stated budget, so a budget may be raised until
then; the exponential average can be sampled at any time.

Stages: `unet` learns from true captions; `unet-refine` goes on from its average with imperfect ones, which is what
makes negative prompts work (`training/imperfect.py`).
"""

from __future__ import annotations

import argparse
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F  # noqa: N812  # torch's own habit

from training import clip, latents, tokenizer, vae
from training.captions import caption
from training.common import Ema, Run, learning_rate, pid_file, train_dir
from training.imperfect import imperfect_caption, untrue_share, woods, woods_caption
from training.optim import Muon
from training.world import FORMATS

if TYPE_CHECKING:
    from concurrent.futures import Future

CHANNELS, HEADS = (64, 128, 192), (2, 4, 6)
BATCH_TOKENS = 32 * 16 * 16
SQUARE_SHARE = 0.7
MATRIX_RATE, RATE = 2e-3, 7e-4
REFINE_SHARE = 0.5
"""The refining stage's rates, as a share of the first stage's."""
WOODS_SHARE = 0.5
"""Share of the refining stage's pictures that are forests, or bare places said to be forests."""
NOISY, NOISY_SHARE = 800, 0.3
"""From which timestep on it is decided what stands in a picture; and the share of the refining stage's pictures that
are drawn from there, beside those that lie there by chance."""
BETA_START, BETA_END, TIMESTEPS = 0.00085, 0.02, 1000
"""Stable Diffusion's schedule but for its end: 0.012 leaves so much of a picture in the most noise (amplitude 0.068
instead of 0.015) that noise alone looks like one thing or another, whatever the prompt says."""

_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def build() -> UNet2DConditionModel:
    """The denoiser, untrained: three levels, cross-attention at the upper two and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=HEADS,
        cross_attention_dim=clip.WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def alphas_cumprod(beta_end: float = BETA_END) -> torch.Tensor:
    """[TIMESTEPS] of the scaled-linear schedule."""
    betas = torch.linspace(BETA_START**0.5, beta_end**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


class Batches:
    """Random training batches: noisy latents, timesteps, text states and the velocity to predict."""

    def __init__(self, seed: int, step: int, *, imperfect: bool = False) -> None:
        self.imperfect = imperfect
        self.rng = np.random.default_rng([seed, step])
        self.noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self.refresh()
        self.tokens, self.clip = tokenizer.load(), clip.load_trained()
        self.scaling_factor = float(vae.load_trained().config["scaling_factor"])
        self.alphas = alphas_cumprod()

    def refresh(self) -> None:
        """Take up the latents that were cached since."""
        self.files = [latents.load(size) for size in FORMATS]
        self.scenes = sum(len(file) for file in self.files)
        self.woods = [woods(file.scenes, len(file)) for file in self.files] if self.imperfect else []

    @torch.no_grad()
    def batch(self, progress: float) -> _Batch:
        """Noisy [N, 4, h, w], timesteps [N], text states [N, 77, D], velocity [N, 4, h, w].

        `progress` of the stage, in 0 to 1, says how imperfect captions are.
        """
        rng = self.rng
        square = rng.random() < SQUARE_SHARE
        index = 0 if square else int(rng.integers(1, len(self.files)))
        file = self.files[index]
        count = max(2, round(BATCH_TOKENS / np.prod(file.moments.shape[2:]) / 2) * 2)
        rows = rng.integers(len(file), size=count)
        timesteps = torch.randint(TIMESTEPS, (count,), generator=self.noise)
        if self.imperfect:
            noisy = torch.rand(count, generator=self.noise) < NOISY_SHARE
            timesteps[noisy] = torch.randint(NOISY, TIMESTEPS, (int(noisy.sum()),), generator=self.noise)
            texts = self._imperfect(index, rows, untrue_share(progress))
        else:
            texts = [caption(file.scenes.scene(int(row)), rng).text for row in rows]
        x0 = file.sample(rows, self.scaling_factor, self.noise)
        states = clip.text_states(self.clip, self.tokens(texts))
        noise = torch.randn(x0.shape, generator=self.noise)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        return signal * x0 + spread * noise, timesteps, states, signal * noise - spread * x0

    def _imperfect(self, index: int, rows: np.ndarray[Any, Any], untrue: float) -> list[str]:
        """A caption for each of `rows` of a format, after a share of the rows has been drawn again: as woods."""
        rng, scenes = self.rng, self.files[index].scenes
        forests, bare = self.woods[index]
        drawn = round(WOODS_SHARE * len(rows)) if forests and bare else 0
        for place in range(drawn):
            rows[place] = rng.choice(bare if rng.random() < untrue else forests)
        known = [scenes.scene(int(row)) for row in rows]
        texts = [woods_caption(scene, rng).text for scene in known[:drawn]]
        return texts + [imperfect_caption(scene, rng).text for scene in known[drawn:]]


class Replicas:
    """The same parameters run by several threads at once, each with gradients of its own.

    With `half`, matrices multiply in bfloat16 where that loses nothing (autocast), and attention is written out: the
    fused kernel is slow in it. Measured on a CPU with AVX512_BF16: 40 % less time; without, it is slower.
    """

    def __init__(self, model: UNet2DConditionModel, threads: int, *, half: bool = False) -> None:
        self.model, self.half = model, half
        if half:
            model.set_attn_processor(AttnProcessor())
        self.replicas = [model, *(copy.deepcopy(model) for _ in range(threads - 1))]
        for replica in self.replicas[1:]:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, batch: _Batch) -> float:
        """Leave the batch's mean gradient in the model's parameters; returns its mean loss."""
        parts = list(zip(*(tensor.chunk(len(self.replicas)) for tensor in batch), strict=True))
        jobs: list[Future[float]] = [
            self.pool.submit(self._part, replica, part) for replica, part in zip(self.replicas, parts, strict=False)
        ]
        losses = [job.result() for job in jobs]
        for replica in self.replicas[1 : len(parts)]:
            for mine, other in zip(self.model.parameters(), replica.parameters(), strict=True):
                if mine.grad is not None and other.grad is not None:
                    mine.grad.add_(other.grad)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(len(parts))
        return sum(losses) / len(losses)

    def _part(self, model: UNet2DConditionModel, part: _Batch) -> float:
        noisy, timesteps, states, velocity = part
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            predicted = model(noisy, timesteps, states).sample
        loss = F.mse_loss(predicted.float(), velocity)
        torch.autograd.backward(loss)
        return loss.item()


def load_trained() -> UNet2DConditionModel:
    """The averaged weights of the latest checkpoint (the refining stage's where there is one)."""
    folder = train_dir()
    path = folder / "unet-refine.pt" if (folder / "unet-refine.pt").exists() else folder / "unet.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m training.unet` first")
    model = build()
    model.load_state_dict(torch.load(path, weights_only=False)["ema"]["shadow"])
    return model.eval().requires_grad_(False)


def train(core_minutes: float, *, refine: bool = False, threads: int = 2, seed: int = 2) -> None:
    """Train until the stage's budget is spent, resuming from its checkpoint."""
    run = Run("unet-refine" if refine else "unet", core_minutes * 60)
    torch.manual_seed(seed)
    state: dict[str, Any] | None = run.resume()
    if run.restored:
        return
    # a checkpoint of the refining stage, once there is one, is what is loaded and then resumed
    model = load_trained().train().requires_grad_(True) if refine else build()
    replicas = Replicas(model, threads, half=refine)
    optimizer = Muon(model.parameters(), matrix_rate=MATRIX_RATE, rate=RATE, weight_decay=0.01, threads=replicas.pool)
    ema = Ema(model, 0.9992)
    seen = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
        seen = state["seen"]
    batches = Batches(seed + refine, run.step, imperfect=refine)
    for progress in run.steps():
        # 3 core-minutes of warm-up, whatever the budget
        warm = min(0.02, 180 / run.core_seconds)
        peak, decay_from = (REFINE_SHARE, 0.25) if refine else (1.0, 0.6)
        optimizer.set_progress(learning_rate(peak, progress, warm=warm, decay_from=decay_from))
        batch = batches.batch(progress)
        loss = replicas.gradients(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        seen += len(batch[0])
        run.tick(v_loss=loss)
        if run.due():
            run.note({"step": run.step, "core_minutes": run.spent / 60, "scenes": batches.scenes, "seen": seen})
            run.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state(), seen=seen)
            batches.refresh()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.unet", description=__doc__)
    parser.add_argument("--core-minutes", type=float, default=195.0, help="CPU time of the whole stage (default: 195)")
    parser.add_argument("--refine", action="store_true", help="go on with imperfect captions, after the first stage")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with pid_file("unet"):
        train(options.core_minutes, refine=options.refine, threads=options.threads)


if __name__ == "__main__":
    main()
