"""A network that sees few numbers of rows, however many are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdmodels.precision import Rows

ROW_BUCKETS = (1, 2, 4, 8, 16)


def in_buckets(compute: Rows, buckets: Sequence[int]) -> Rows:
    """`compute`, called with one of `buckets` rows each time: the next larger one, filled up with the last row.

    Compilers, CUDA graphs and kernels' heuristics then meet few shapes. More rows than the largest bucket are several
    calls. GPU kernels are chosen by shape, and with them the order in which numbers are added up: a row's bytes are the
    same among all companies of one bucket, and with a single bucket among all there are.
    """
    ordered = sorted(buckets)
    most = ordered[-1]

    def run(*rows: torch.Tensor) -> torch.Tensor:
        results = []
        for start in range(0, len(rows[0]), most):
            part = [each[start : start + most] for each in rows]
            count = len(part[0])
            fill = next(bucket for bucket in ordered if bucket >= count) - count
            filled = [torch.cat([each, each[-1:].expand(fill, *each.shape[1:])]) if fill else each for each in part]
            results.append(compute(*filled)[:count])
        return results[0] if len(results) == 1 else torch.cat(results)

    return run
