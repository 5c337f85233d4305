"""Every line of the log is one object, whoever wrote it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import structlog
from sdserver import logs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before, handlers = structlog.get_config(), logging.getLogger().handlers
    yield
    structlog.configure(**before)
    logging.getLogger().handlers = handlers


def test_what_libraries_log_is_a_line_like_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        logs.configure("info", "json")
    structlog.contextvars.bind_contextvars(request_id="r-1")
    try:
        logging.getLogger("library").warning("%d%% are lost", 5)
    finally:
        structlog.contextvars.clear_contextvars()
    [line] = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["event"], found["logger"], found["level"]) == ("5% are lost", "library", "warning")
    assert found["request_id"] == "r-1"


def test_a_failure_has_its_traceback_and_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    secret = "not for the log"
    try:
        raise ValueError("on purpose")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("library").exception("failed, too")
    text = capsys.readouterr().err
    assert secret not in text
    for line in text.splitlines():
        [exception] = json.loads(line)["exception"]
        assert exception["exc_value"] == "on purpose"
        assert exception["frames"][0]["name"] == "test_a_failure_has_its_traceback_and_no_values"
