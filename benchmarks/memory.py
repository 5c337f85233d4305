"""How much memory the models of Stable Diffusion 2.1 take: while they are loaded, afterwards, and at work.

The real configurations with random weights, stored in fp16 as an engine's are. Each model is loaded in a process of its
own, by the code that Triton's process runs. Its memory is what the process holds beside what it held before: private
memory (anonymous pages), not the pages of files that are mapped, which the kernel takes back when it needs them.

Takes 11 GB of disk, 6 GB of memory and some minutes; `--engine FOLDER` takes an engine that is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import machine

if TYPE_CHECKING:
    from collections.abc import Callable

# Of the issue: what loading may take at its peak, in the size of the weights in 16 bits; and what a decode of 768 x 768
# may take in tiles, in bytes.
LOADING_BOUND = 1.3
DECODING_BOUND = 0.5e9
# The side of a tile in pixels, as `sdserver engine add --decode-tile 320` has it.
TILE = 320
# What each model computes in here, and the side of the image, or of the tile, in pixels.
ROWS: tuple[tuple[str, str, int], ...] = (
    ("text_encoder", "fp32", 0),
    ("unet", "fp32", 512),
    ("unet", "bf16", 512),
    ("unet", "bf16", 768),
    ("unet_torch", "fp16", 0),
    ("vae_decoder", "bf16", 768),
    ("vae_decoder", "fp32", 768),
    ("vae_decoder", "fp32", 512),
    ("vae_decoder", "fp32", TILE),
    ("vae_encoder", "fp32", 512),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes."""

    weights: int
    """In 16 bits each."""
    peak: int
    """Most, while it was loaded."""
    loaded: int
    """Afterwards."""
    working: int
    """Most, in its first call: OpenVINO lays its weights out anew in it."""
    rest: int
    """After it."""


def load(role: str, precision: str, engine: Path) -> Callable[[int], Any]:
    """A model as Triton's process loads it, as a call of one image of that side in pixels; one row, of the UNet two."""
    if role == "unet":
        from sdmodels.runtimes import load_unet

        predict = load_unet(engine, 2, "openvino", precision)

        def call(side: int) -> Any:
            latents, states = np.zeros((2, 4, side // 8, side // 8)), np.zeros((2, 77, 1024))
            return predict(latents.astype(np.float32), np.zeros(2, np.float32), states.astype(np.float32))

        return call
    if role == "unet_torch":
        # As it goes to a GPU: that its weights pass through the CPU's memory one by one shows on the CPU, too.
        from sdmodels.unet import UNet

        unet = UNet(engine, "cpu", "fp16")
        return lambda _: unet
    if role == "text_encoder":
        from sdmodels.text_encoder import TextEncoder

        encode = TextEncoder(engine)
        return lambda _: encode("a valley in the Alps at sunset, epic vista")
    from sdmodels.vae import VaeDecoder, VaeEncoder

    if role == "vae_decoder":
        decode = VaeDecoder(engine, "cpu", "bf16" if precision == "bf16" else "fp32")
        return lambda side: decode(np.zeros((1, 4, side // 8, side // 8), np.float32))
    encode_image = VaeEncoder(engine)
    return lambda side: encode_image(np.zeros((1, side, side, 3), np.uint8))


def child(role: str, precision: str, side: int, engine: Path) -> None:
    """Loads and calls, and says on a line when each is done; goes on when it is told to."""
    from sdmodels.light_imports import leave_out_unused

    leave_out_unused(compiled=False)
    import torch

    torch.set_num_threads(2)
    if role == "unet":
        import openvino  # noqa: F401
    else:
        import sdmodels.text_encoder
        import sdmodels.unet
        import sdmodels.vae  # noqa: F401
    call: Callable[[int], Any] | None = None
    for step in ("imported", "loaded", "called"):
        if step == "loaded":
            call = load(role, precision, engine)
        elif step == "called":
            assert call is not None
            call(side)
        print(step, flush=True)
        sys.stdin.readline()


def measure(role: str, precision: str, side: int, engine: Path) -> Measured:
    """Runs a child and looks at its memory all the time."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", role, precision, str(side), str(engine)]
    most: dict[str, int] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        held = {}
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stdout or ()))
        reader.start()
        for step in ("imported", "loaded", "called"):
            most[step] = 0
            while step not in (line.strip() for line in said):
                if process.poll() is not None:
                    raise RuntimeError(f"{role} ended with status {process.returncode}")
                most[step] = max(most[step], _anonymous(process.pid))
                time.sleep(0.005)
            held[step] = _anonymous(process.pid)
            most[step] = max(most[step], held[step])
            process.stdin.write("\n")
            process.stdin.flush()
        process.wait()
        reader.join()
    return Measured(
        _weights(role, engine),
        most["loaded"] - held["imported"],
        held["loaded"] - held["imported"],
        most["called"] - held["imported"],
        held["called"] - held["imported"],
    )


def _anonymous(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")), 0)


def _weights(role: str, engine: Path) -> int:
    from safetensors import safe_open

    file, without = {
        "unet_torch": ("unet/diffusion_pytorch_model.safetensors", ()),
        "unet": ("unet/diffusion_pytorch_model.safetensors", ()),
        "text_encoder": ("clip/open_clip_model.safetensors", ("visual.",)),
        "vae_decoder": ("vae/diffusion_pytorch_model.safetensors", ("encoder.", "quant_conv.")),
        "vae_encoder": ("vae/diffusion_pytorch_model.safetensors", ("decoder.", "post_quant_conv.")),
    }[role]
    with safe_open(engine / file, framework="np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (no mapping)
    return sum(2 * int(np.prod(shape)) for name, shape in shapes.items() if not name.startswith(tuple(without)))


def full_engine(folder: Path) -> Path:
    """Adds an engine of a full-size checkpoint, as a user would; returns its folder."""
    from benchmarks import full_checkpoint

    full_checkpoint.write(folder / "checkpoint")
    command = [sys.executable, "-m", "sdserver", "engine", "add", str(folder / "checkpoint"), "--name", "full"]
    subprocess.run([*command, "--model-repository", str(folder / "repository")], check=True)
    return folder / "repository/engines/full"


def main() -> int:
    """Prints the table; returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="an engine's folder, instead of a new one")
    parser.add_argument("--only", help="a role")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        role, precision, side, engine = options.child
        child(role, precision, int(side), Path(engine))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        engine = options.engine or full_engine(Path(folder))
        print(f"memory of SD 2.1's models beside their process's; {machine()}")
        print("  model         computes in  16-bit weights  loading   ratio   loaded  first call  at rest")
        held = True
        for role, precision, side in ROWS:
            if options.only not in (None, role):
                continue
            found = measure(role, precision, side, engine)
            # float32 is twice as large.
            bound = LOADING_BOUND * (2 if precision == "fp32" else 1)
            ratio = found.peak / found.weights
            held &= ratio <= bound and (side != TILE or found.working - found.loaded <= DECODING_BOUND)
            what = f"{side} x {side}" if side else ""
            print(
                f"  {role:13} {precision:11} {_gb(found.weights):>14} {_gb(found.peak):>8} {ratio:>7.2f}"
                f" {_gb(found.loaded):>8} {_gb(found.working):>11} {_gb(found.rest):>8}  {what}",
                flush=True,
            )
    return int(not held)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
