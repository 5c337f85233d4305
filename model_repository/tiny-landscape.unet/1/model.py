"""One denoising step's prediction."""

from sdmodels.python_backend import UNetModel as TritonPythonModel  # noqa: F401
