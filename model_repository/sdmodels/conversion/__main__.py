"""`python -m sdmodels.conversion convert | prepare | lora '<options as JSON>'`: events, one JSON object a line, on
standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from sdmodels.light_imports import leave_out_unused


def main(arguments: list[str]) -> int:
    """The last line is `done` with the facts, or `error` with a message and problems; returns the exit status."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    leave_out_unused(compiled=False)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    from sdmodels.conversion.errors import ConversionError

    task, options = arguments[0], json.loads(arguments[1])
    try:
        facts = {"convert": _converted, "prepare": _prepared, "lora": _added}[task](options)
    except ConversionError as error:
        _say({"event": "error", "message": error.message, "problems": list(error.problems)})
        return 1
    except BrokenPipeError:
        # Who listened is gone; what is finished stays.
        return 1
    except OSError as error:
        _say({"event": "error", "message": f"a file cannot be read or written: {error}", "problems": []})
        return 1
    _say({"event": "done", **facts})
    return 0


def _converted(options: dict[str, Any]) -> dict[str, Any]:
    from sdmodels.conversion.convert import convert, options_of

    return convert(options_of(options), _say)


def _prepared(options: dict[str, Any]) -> dict[str, Any]:
    from sdmodels.conversion.prepare import Preparation, prepare

    return prepare(Preparation(**options), _say)


def _added(options: dict[str, Any]) -> dict[str, Any]:
    from sdmodels.conversion.lora import LoraOptions, add_lora

    return add_lora(LoraOptions(**options))


def _say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
