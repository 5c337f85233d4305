"""Latents to pixels."""

from sdmodels.python_backend import VaeDecoderModel as TritonPythonModel  # noqa: F401
