"""Helm's own engine, in a process of its own; the one place that knows `helm_python`.

The engine is written in Go. Test processes that had run gRPC and torch before have died in it, without a word.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import helm_python

P = ParamSpec("P")
R = TypeVar("R")


class ChartRefused(Exception):
    """The values are refused, by the schema or by one of the chart's own checks; has their sentences."""


def render(chart: Path, values: dict[str, Any], **options: Any) -> dict[str, str]:
    """Rendered templates by file. Raises ChartRefused."""
    return _run(_render, chart, values, options)


def lint(chart: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What `helm lint --strict` finds: `messages` and `errors`."""
    return _run(_lint, chart, values)


def package(chart: Path, folder: Path) -> tuple[str, str]:
    """Writes the chart's archive; returns its path and digest."""
    return _run(_package, chart, folder)


def parse_set(text: str) -> dict[str, Any]:
    """The values of a `--set` option."""
    return _run(_parse_set, text)


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _run(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    return _process().submit(function, *arguments, **options).result()


# What follows runs in the other process.


@cache
def _chart(path: Path) -> helm_python.Chart:
    import helm_python

    return helm_python.Chart.load(path)


def _render(chart: Path, values: dict[str, Any], options: dict[str, Any]) -> dict[str, str]:
    import helm_python

    try:
        files: dict[str, str] = _chart(chart).render(values, **options)
    except (helm_python.HelmValuesError, helm_python.HelmRenderError) as error:
        if isinstance(error, helm_python.HelmRenderError) and "sd-service: " not in str(error):
            raise RuntimeError(str(error)) from None
        raise ChartRefused(str(error)) from None
    return files


def _lint(chart: Path, values: dict[str, Any]) -> dict[str, Any]:
    import helm_python

    found: dict[str, Any] = helm_python.lint(chart, values, strict=True)
    return found


def _package(chart: Path, folder: Path) -> tuple[str, str]:
    import helm_python

    path = helm_python.package(chart, destination=folder)
    return path, helm_python.digest(path)


def _parse_set(text: str) -> dict[str, Any]:
    import helm_python

    values: dict[str, Any] = helm_python.parse_set_string(text)
    return values
