"""Makes a training folder's finished stages from an exported engine, to go on from the one that ships.

`python -m training.restore model_repository/engines/tiny-landscape` writes the checkpoints of autoencoder, CLIP and
UNet, the vocabulary and the figures of those stages (`training.json` beside the engine, which the export writes).
`python -m training` then skips them. What is restored is over: its optimizer's state was not exported.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from training import clip, export, tokenizer
from training.common import RESTORED, save_atomically, train_dir, write_atomically


def restore(engine: Path) -> None:
    """Write the checkpoints and records of the finished stages into the training folder.

    The UNet counts as the first stage's, however often it was refined: it can be refined again.
    Raises FileExistsError when the folder has a checkpoint already: training of one's own is not overwritten.
    """
    folder = train_dir()
    if taken := [path.name for path in sorted(folder.glob("*.pt"))]:
        raise FileExistsError(f"{folder} holds {', '.join(taken)}: name another folder in SD_TRAIN_DIR")
    shutil.copyfile(engine / "clip" / tokenizer.FILE_NAME, folder / tokenizer.FILE_NAME)
    autoencoder = _floats(engine / "vae" / "diffusion_pytorch_model.safetensors")
    trainee = clip.Trainee(tokenizer.load().vocab_size)  # its heads were not exported: nothing needs them any more
    trainee.clip.load_state_dict(_floats(engine / "clip" / "open_clip_model.safetensors"))
    weights = {
        "vae": autoencoder,
        "vae-decoder": autoencoder,
        "clip": trainee.state_dict(),
        "unet": _floats(engine / "unet" / "diffusion_pytorch_model.safetensors"),
    }
    config = json.loads((engine / "vae" / "config.json").read_text())
    write_atomically(json.dumps({"scaling_factor": config["scaling_factor"]}), folder / "vae.json")
    rows = [row for row in json.loads((engine / export.RECORDS).read_text()) if row["stage"] != "classifier"]
    write_atomically(json.dumps(rows, indent=1), folder / RESTORED)
    for stage, state in weights.items():
        run = {"step": 0, "spent": 0.0, "history": [], "restored": True}
        save_atomically({"run": run, "ema": {"count": 0, "shadow": state}}, folder / f"{stage}.pt")


def _floats(path: Path) -> dict[str, Any]:
    return {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.restore", description=__doc__)
    parser.add_argument("engine", type=Path, help="folder of an exported engine")
    options = parser.parse_args(arguments)
    restore(options.engine)
    print(f"{train_dir()}: {options.engine.name}, ready to be refined")


if __name__ == "__main__":
    main()
