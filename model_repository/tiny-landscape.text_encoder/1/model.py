"""Texts to text states."""

from sdmodels.python_backend import TextEncoderModel as TritonPythonModel  # noqa: F401
