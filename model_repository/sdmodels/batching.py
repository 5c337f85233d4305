"""One run for the rows of many requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sdmodels.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Arrays = tuple[NDArray[Any], ...]


def run_together(run: Callable[..., Arrays], requests: Sequence[Arrays]) -> list[Arrays | Exception]:
    """Each request's answer from one `run` over the rows of all; rows are the first axis of every array.

    Where the joint run fails, each request runs by itself, so that the one at fault gets its exception and the others
    their answers.
    """
    if not requests:
        return []
    if len(requests) == 1:
        try:
            return [run(*requests[0])]
        except Exception as error:
            return [error]
    try:
        answers = run(*(np.concatenate(arrays) for arrays in zip(*requests, strict=True)))
    except Exception:
        return [answer for request in requests for answer in run_together(run, [request])]
    ends = np.cumsum([len(request[0]) for request in requests])[:-1]
    return list(zip(*(np.split(answer, ends) for answer in answers), strict=True))


def check_rows(*inputs: NDArray[Any] | None) -> None:
    """Raises `InvalidInput` where arrays differ in their number of rows; None counts for nothing."""
    counts = [len(array) for array in inputs if array is not None]
    if len(set(counts)) > 1:
        raise InvalidInput(f"every input has one array a row: got {', '.join(map(str, counts))} rows")
