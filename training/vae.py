"""Trains the autoencoder: diffusers' AutoencoderKL, 8x, 4 channels.

Half of the steps see edge-rich 64x64 crops, half whole pictures, so that group normalisation meets both. There is no
attention in the middle: the same weights then serve every format. Stages: `joint` trains encoder and decoder; when it
is over, the encoder is fixed for good (latents are cached from it), and `decoder` trains the decoder alone for as long
as one likes.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F  # noqa: N812  # torch's own habit

from training import dataset
from training.common import Ema, Run, learning_rate, pid_file, train_dir, write_atomically
from training.optim import Muon
from training.world import FORMATS

CHANNELS = (32, 32, 64, 64)
BATCH_PIXELS = 8 * 64 * 64
KL_WEIGHT = 2e-5
MATRIX_RATE = 4e-3
DECODER_NOISE = 0.15
"""At most this share of the latents' deviation is added as noise while the decoder trains alone."""


def build() -> AutoencoderKL:
    """The autoencoder, untrained, in channels-last memory format (measured: 5 to 70 % faster here)."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )
    _initialise(model)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def _initialise(model: AutoencoderKL) -> None:
    """Residual blocks start as identities, the posterior nearly without noise: else channels die unused."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                torch.nn.init.zeros_(module.weight)
    latent_channels = model.config["latent_channels"]
    model.quant_conv.weight[latent_channels:] *= 0.1
    model.quant_conv.bias[latent_channels:] = -5.0
    model.decoder.conv_out.weight *= 0.1


def to_tensor(images: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    """[N, H, W, 3] uint8 to [N, 3, H, W] float in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_images(pixels: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[N, 3, H, W] in [-1, 1] to [N, H, W, 3] uint8."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


class Crops:
    """Random training batches: whole native pictures, or the more detailed of two random 64x64 crops."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.files = [dataset.load(size) for size in FORMATS]

    def batch(self, whole: bool) -> torch.Tensor:
        """[N, 3, H, W] in [-1, 1], about `BATCH_PIXELS` pixels."""
        if whole:
            scenes = self.files[int(self.rng.integers(len(self.files))) if self.rng.random() < 0.3 else 0]
            count = max(1, round(BATCH_PIXELS / (scenes.size[0] * scenes.size[1])))
            rows = np.sort(self.rng.integers(scenes.trained, size=count))
            pixels = scenes.images[rows]
        else:
            pixels = np.stack([self._crop() for _ in range(BATCH_PIXELS // 64**2)])
        if self.rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return to_tensor(pixels).contiguous(memory_format=torch.channels_last)

    def _crop(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        scenes = self.files[0]
        picture = scenes.images[int(self.rng.integers(scenes.trained))]
        places = self.rng.integers(0, 65, size=(2, 2))
        crops: list[np.ndarray[Any, np.dtype[np.uint8]]] = [picture[y : y + 64, x : x + 64] for y, x in places]
        detail = [np.abs(np.diff(crop.astype(np.int16), axis=1)).sum() for crop in crops]
        return crops[int(np.argmax(detail))]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, MSE (what PSNR measures) and L1 of edges (what the eye sees)."""
    loss = (output - target).abs().mean() + 2 * F.mse_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * (output.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
    return loss


@torch.no_grad()
def round_trip(
    model: AutoencoderKL, images: np.ndarray[Any, np.dtype[np.uint8]]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[N, H, W, 3] to their reconstructions, from mean latents."""
    parts = [
        to_images(model.decode(model.encode(to_tensor(images[first : first + 8])).latent_dist.mode()).sample)
        for first in range(0, len(images), 8)
    ]
    return np.concatenate(parts)


def psnr(model: AutoencoderKL, images: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
    """[N] PSNR in dB of reconstructions (mean latents, 8-bit output) against `images` [N, H, W, 3]."""
    error = np.square(round_trip(model, images).astype(float) - images).mean((1, 2, 3))
    values: np.ndarray[Any, Any] = 10 * np.log10(255**2 / np.maximum(error, 1e-2))
    return values


@torch.no_grad()
def latent_statistics(model: AutoencoderKL, images: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    """`scaling_factor` (1 over the standard deviation of all latents) and what it was measured from."""
    latents = torch.cat(
        [model.encode(to_tensor(images[i : i + 8])).latent_dist.sample() for i in range(0, len(images), 8)]
    )
    return {
        "scaling_factor": float(1 / latents.std()),
        "latent_std": float(latents.std()),
        "channel_mean": latents.mean((0, 2, 3)).tolist(),
        "channel_std": latents.std((0, 2, 3)).tolist(),
    }


def _ema_model(ema: Ema) -> AutoencoderKL:
    model = build()
    model.load_state_dict(ema.shadow)
    return model.eval().requires_grad_(False)


def load_trained() -> AutoencoderKL:
    """The averaged weights of the latest checkpoint (the decoder stage's where there is one), scaling factor set."""
    folder = train_dir()
    path = folder / "vae-decoder.pt" if (folder / "vae-decoder.pt").exists() else folder / "vae.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m training.vae` first")
    model = build()
    model.load_state_dict(torch.load(path, weights_only=False)["ema"]["shadow"])
    if (folder / "vae.json").exists():
        model.register_to_config(scaling_factor=json.loads((folder / "vae.json").read_text())["scaling_factor"])
    return model.eval().requires_grad_(False)


def train(core_minutes: float, *, decoder_only: bool, seed: int = 0) -> None:
    """Train until the budget is spent, resuming from the checkpoint; writes `vae.json` at the end of `joint`."""
    if not decoder_only and (train_dir() / "vae.json").exists():
        return  # latents may be cached already: the encoder stays as it is
    run = Run("vae-decoder" if decoder_only else "vae", core_minutes * 60)
    torch.manual_seed(seed)
    model = load_trained().train() if decoder_only else build()
    trained = list(model.decoder.parameters()) + list(model.post_quant_conv.parameters())
    if not decoder_only:
        trained = list(model.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = Muon(trained, matrix_rate=MATRIX_RATE, rate=1e-3, weight_decay=1e-3)
    ema = Ema(model, 0.998)
    state = run.resume()
    if run.restored:
        return
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
    crops = Crops(np.random.default_rng([seed, run.step]))
    torch.manual_seed(seed + run.step)
    held_out = crops.files[0].images[-64:]
    for progress in run.steps():
        optimizer.set_progress(learning_rate(1, progress, warm=0.01, decay_from=0.3))
        target = crops.batch(whole=run.step % 2 == 1)
        with torch.set_grad_enabled(not decoder_only):
            posterior = model.encode(target).latent_dist
            latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            if decoder_only:
                # generated latents are a little off: the decoder learns to clean up after the UNet
                latents = latents + torch.rand(1) * DECODER_NOISE * latents.std() * torch.randn_like(latents)
        output = model.decode(latents).sample
        loss = reconstruction = reconstruction_loss(output, target)
        if not decoder_only:
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            loss = reconstruction + KL_WEIGHT * kl
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(model)
        run.tick(loss=reconstruction.item(), mse=F.mse_loss(output, target).item())
        if run.due():
            averaged = _ema_model(ema)
            run.note({"step": run.step, "core_minutes": run.spent / 60, "psnr": float(psnr(averaged, held_out).mean())})
            run.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state())
    if not decoder_only:
        statistics = latent_statistics(_ema_model(ema), crops.files[0].images[:512])
        write_atomically(json.dumps(statistics, indent=1), train_dir() / "vae.json")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.vae", description=__doc__)
    parser.add_argument("--core-minutes", type=float, default=60.0, help="CPU time of the whole stage (default: 60)")
    parser.add_argument("--decoder", action="store_true", help="train the decoder alone, after the joint stage")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with pid_file("vae"):
        train(options.core_minutes, decoder_only=options.decoder)


if __name__ == "__main__":
    main()
