"""The torch models of an engine: text encoder, UNet and the VAE's two halves, numpy arrays in and out.

`sdmodels.python_backend` serves them in Triton; without Triton they are used directly:

    encode, denoise, decode = TextEncoder(folder), UNet(folder), VaeDecoder(folder)

Importing this package imports no torch; its modules do.
"""
