"""Makes the embedded engine from nothing: `python -m training`.

    world -> (autoencoder, CLIP) -> latents -> (UNet, more latents) -> UNet refined -> (decoder, classifier)
    -> evaluation, export, card

Every stage resumes from its checkpoint and skips what is done, so the command may be cut off and given again. Budgets
are core-minutes of CPU time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Budgets:
    """Core-minutes of each trained stage."""

    vae: float = 18
    clip: float = 22
    unet: float = 195
    refine: float = 112
    decoder: float = 8
    classifier: float = 7


def _start(stage: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a stage as a process of its own; it waits for one of the same name that still runs."""
    # waiting threads sleep: spinning ones would be counted as training
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen([sys.executable, "-m", f"training.{stage}", *arguments], env=environment)


def _finish(*processes: subprocess.Popen[bytes]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a stage failed: see its message above; give the command again to resume")


def make(budgets: Budgets) -> None:
    """Run every stage that is not finished."""
    _finish(_start("dataset"))
    _finish(
        _start("vae", "--core-minutes", str(budgets.vae)),
        _start("clip", "--core-minutes", str(budgets.clip)),
    )
    _finish(_start("latents", "--square", "4000", "--other", "200"))
    # the UNet takes up new latents as it goes: it need not wait for all of them
    _finish(_start("latents"), _start("unet", "--core-minutes", str(budgets.unet)))
    _finish(_start("unet", "--refine", "--core-minutes", str(budgets.refine)))
    _finish(
        _start("vae", "--decoder", "--core-minutes", str(budgets.decoder)),
        _start("classifier", "--core-minutes", str(budgets.classifier)),
    )
    for stage in ("evaluate", "export", "card"):
        _finish(_start(stage))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    for name, minutes in vars(Budgets()).items():
        parser.add_argument(f"--{name}", type=float, default=minutes, help=f"core-minutes (default: {minutes:g})")
    make(Budgets(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
