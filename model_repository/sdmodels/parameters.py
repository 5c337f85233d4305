"""What the parameters of a model's `config.pbtxt` say; they are texts all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def row_buckets(parameters: Mapping[str, str]) -> tuple[int, ...]:
    """`row_buckets`, as in `1,2,4`; none: empty. Raises ValueError for what is no list of numbers from 1 on."""
    text = parameters.get("row_buckets", "")
    try:
        buckets = tuple(int(each) for each in text.split(",")) if text else ()
    except ValueError:
        buckets = (0,)
    if any(each < 1 for each in buckets):
        raise ValueError(f"row_buckets is {text!r}; it must be numbers of rows from 1 on, as in 1,2,4,8,16")
    return buckets


def is_compiled(parameters: Mapping[str, str]) -> bool:
    """`compile`, false by default. Raises ValueError for what is neither true nor false."""
    text = parameters.get("compile", "false")
    if text not in ("true", "false"):
        raise ValueError(f"compile is {text!r}; it must be true or false")
    return text == "true"
