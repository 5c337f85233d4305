"""What callers of the models can do wrong."""

from __future__ import annotations


class InvalidInput(ValueError):
    """An input that no model can answer. Its message is fit for the caller: no internals, no paths."""
