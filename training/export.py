"""Writes the trained engine to disk: diffusers and open_clip formats, fp16, one folder a part.

clip/open_clip_config.json  clip/open_clip_model.safetensors  clip/bpe_tiny.txt.gz
vae/config.json             vae/diffusion_pytorch_model.safetensors
unet/config.json            unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json
training.json               what each stage took and reached, for the card and for `training.restore`

Where the folder has a descriptor, `engine.json`, its digests and its noise schedule are made those of the new files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from training import clip, sample, tokenizer, unet
from training.common import records, train_dir

PARTS = ("clip", "vae", "unet", "scheduler")
RECORDS = "training.json"
FILE_LIMIT, TOTAL_LIMIT = 32 * 2**20, 64 * 2**20

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": unet.BETA_START,
    "beta_end": sample.BETA_END,
    "num_train_timesteps": unet.TIMESTEPS,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def export(models: sample.Models, folder: Path) -> int:
    """Write every part into `folder` and return the bytes of all files.

    Raises ValueError when a file is over 32 MiB or all are over 64 MiB: the engine must stay small enough to ship.
    """
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
    # .half() converts in place: a copy keeps the caller's weights exact
    for name, model in (("vae", models.vae), ("unet", models.unet)):
        state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        model.save_config(folder / name)
    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in models.clip.state_dict().items()
    }
    save_file(state, folder / "clip" / "open_clip_model.safetensors", {"format": "pt"})
    preprocess = {"mean": clip.MEAN, "std": clip.STD, "interpolation": "bilinear", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": clip.config(models.tokens.vocab_size), "preprocess_cfg": preprocess}, indent=1)
    (folder / "clip" / "open_clip_config.json").write_text(text)
    shutil.copyfile(train_dir() / tokenizer.FILE_NAME, folder / "clip" / tokenizer.FILE_NAME)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=1))
    (folder / RECORDS).write_text(json.dumps(records(), indent=1) + "\n")
    # not what others keep there, such as a conversion
    written = [path for part in PARTS for path in (folder / part).iterdir()]
    for path in written:
        # safetensors writes for its owner alone; servers run as another user
        path.chmod(0o644)
    sizes = {path: path.stat().st_size for path in written}
    large = [f"{path.name}: {size} bytes" for path, size in sizes.items() if size > FILE_LIMIT]
    if large or sum(sizes.values()) > TOTAL_LIMIT:
        raise ValueError(f"the engine is too large to ship ({large or sum(sizes.values())}): make the models smaller")
    return sum(sizes.values())


def renew_descriptor(folder: Path) -> None:
    """Make the SHA-256 digests in the folder's descriptor those of the files that it names, and its betas ours."""
    path = folder / "engine.json"
    descriptor = json.loads(path.read_text())
    descriptor["weights"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in descriptor["weights"]
    }
    descriptor["noise_schedule"] |= {name: SCHEDULER[name] for name in ("beta_schedule", "beta_start", "beta_end")}
    path.write_text(json.dumps(descriptor, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write (default: `engine` of the training folder)")
    options = parser.parse_args(arguments)
    out = options.out or train_dir() / "engine"
    torch.set_num_threads(1)
    size = export(sample.load(), out)
    if (out / "engine.json").exists():
        renew_descriptor(out)
    print(f"{out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
