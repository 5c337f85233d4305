"""Pixels to latents."""

from sdmodels.python_backend import VaeEncoderModel as TritonPythonModel  # noqa: F401
