"""How to change latents so that CLIP sees more of a text in them."""

from sdmodels.python_backend import ClipGuidanceModel as TritonPythonModel  # noqa: F401
