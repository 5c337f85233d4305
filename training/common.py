"""What every stage shares: where its files lie, checkpoints that survive being cut off, CPU-time budgets, loss plots.

A stage's budget is CPU time of its process (core-minutes), not wall time: training runs at the lowest priority beside
other work, may be stopped and continued, and must come out the same.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKPOINT_SECONDS = 150.0
STAGES = ("vae", "vae-decoder", "clip", "unet", "unet-refine", "classifier")
RESTORED = "restored.json"
"""Records of the stages whose results were restored from an engine."""
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


def train_dir() -> Path:
    """Folder of the world cache, checkpoints, logs and plots: $SD_TRAIN_DIR, else `.train` of the repository root."""
    folder = Path(os.environ.get("SD_TRAIN_DIR") or Path(__file__).parent.parent / ".train")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def pid_file(stage: str) -> Iterator[Path]:
    """Hold `<stage>.pid` while the stage runs, so that one can SIGSTOP and SIGCONT it.

    The file is locked: a second process of the same stage waits until the first has ended, however it ends.
    """
    path = train_dir() / f"{stage}.pid"
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield path
        file.truncate(0)


def save_atomically(state: Any, path: Path) -> None:
    """torch.save that leaves either the old file or the new one, whenever the process dies."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def write_atomically(text: str, path: Path) -> None:
    """Write text so that readers see the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Ema:
    """Exponential moving average of a module's parameters, with the usual warm-up: min(decay, (1+n)/(10+n))."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move the average towards the module; call after each step."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"count": self.count, "shadow": self.shadow}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.count, self.shadow = state["count"], state["shadow"]


def learning_rate(peak: float, progress: float, *, warm: float, decay_from: float) -> float:
    """Linear warm-up over `warm`, constant, then a cosine from `decay_from` to 1; `progress` in [0, 1]."""
    if progress < warm:
        return peak * max(progress / warm, 0.02)
    if progress < decay_from:
        return peak
    along = min((progress - decay_from) / (1 - decay_from), 1.0)
    return peak * max(0.5 * (1 + math.cos(math.pi * along)), 0.01)


@dataclass
class Run:
    """The progress of one stage: steps, CPU seconds over all its sessions, loss history, clock of checkpoints."""

    stage: str
    core_seconds: float
    log_every: int = 50
    step: int = 0
    spent: float = 0.0
    restored: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    _cpu: float = field(default_factory=time.process_time)
    _saved: float = field(default_factory=time.monotonic)
    _sums: dict[str, float] = field(default_factory=dict)
    _terms: int = 0

    @property
    def checkpoint(self) -> Path:
        """The file that holds everything needed to go on."""
        return train_dir() / f"{self.stage}.pt"

    @property
    def progress(self) -> float:
        """Share of the budget that is spent."""
        return min(self.spent / self.core_seconds, 1.0)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, here or in the folder whose engine was restored."""
        return self.restored or self.spent >= self.core_seconds

    def steps(self) -> Iterator[float]:
        """Yield the progress in [0, 1) before each step until the budget is spent, with a bar in core-minutes."""
        self._cpu = time.process_time()
        with tqdm(total=self.core_seconds, desc=self.stage, bar_format=_BAR) as bar:
            while not self.finished:
                bar.n = self.spent
                bar.set_postfix_str(
                    f"{self.spent / 60:.1f} of {self.core_seconds / 60:g} core-minutes, step {self.step}"
                )
                yield self.progress

    def tick(self, **losses: float) -> None:
        """Count one step and its losses; CPU time since the last tick goes onto the budget."""
        now = time.process_time()
        self.spent, self._cpu, self.step = self.spent + now - self._cpu, now, self.step + 1
        self._terms += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if self.step % self.log_every == 0:
            self._note_means()

    def _note_means(self) -> None:
        row = {"step": float(self.step), "core_minutes": round(self.spent / 60, 2), "time": round(time.time(), 1)}
        row |= {name: total / max(self._terms, 1) for name, total in self._sums.items()}
        self._sums, self._terms = {}, 0
        self.note(row)

    def note(self, row: dict[str, float]) -> None:
        """Append a row of figures to the history and to `<stage>.jsonl`."""
        self.history.append(row)
        with (train_dir() / f"{self.stage}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def due(self) -> bool:
        """Whether the next checkpoint is due; resets the clock when it is."""
        if time.monotonic() - self._saved < CHECKPOINT_SECONDS and not self.finished:
            return False
        self._saved = time.monotonic()
        return True

    def save(self, **state: Any) -> None:
        """Write the checkpoint and the loss plot."""
        run = {"step": self.step, "spent": self.spent, "history": self.history}
        save_atomically({"run": run, **state}, self.checkpoint)
        plot(self.history, train_dir() / f"{self.stage}.png", self.stage)

    def resume(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, or None at the very start; moves this run to where it was."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=False)
        run = state.pop("run")
        self.step, self.spent, self.history = run["step"], run["spent"], run["history"]
        self.restored = run.get("restored", False)
        return state


def records() -> list[dict[str, Any]]:
    """For each stage that ran: its name, steps, core-minutes and last losses; restored ones come first."""
    restored = train_dir() / RESTORED
    rows: list[dict[str, Any]] = json.loads(restored.read_text()) if restored.exists() else []
    for stage in STAGES:
        path = train_dir() / f"{stage}.jsonl"
        if not path.exists():
            continue
        last: dict[str, Any] = {"stage": stage}
        for line in path.read_text().splitlines():
            last |= json.loads(line)
        last.pop("time", None)
        rows.append(last)
    return rows


def plot(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Loss curves over core-minutes as a PNG; one panel for each quantity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted({name for row in history for name in row} - {"step", "core_minutes", "time", "scenes", "seen"})
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(row["core_minutes"], row[name]) for row in history if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(f"{title}: {name}", fontsize=9)
        axis.set_xlabel("core-minutes", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
