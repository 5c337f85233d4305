"""Gradients through the denoising network."""

from sdmodels.python_backend import UNetGradientModel as TritonPythonModel  # noqa: F401
