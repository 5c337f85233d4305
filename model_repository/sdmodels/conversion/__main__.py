"""`python -m sdmodels.conversion '<options as JSON>'`: events, one JSON object a line, on standard output.

Options are those of a checkpoint (`convert.Options`), or with `lora` those of a LoRA (`lora.LoraOptions`).
"""

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
    from sdmodels.conversion.convert import convert, options_of
    from sdmodels.conversion.errors import ConversionError
    from sdmodels.conversion.lora import LoraOptions, add_lora

    options = json.loads(arguments[0])
    try:
        facts = add_lora(LoraOptions(**options)) if "lora" in options else convert(options_of(options), _say)
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


def _say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
