"""A denoising step's prediction and the features behind it, or a prediction from features."""

from sdmodels.python_backend import UNetCacheModel as TritonPythonModel  # noqa: F401
