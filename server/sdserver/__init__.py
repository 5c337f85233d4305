"""The gRPC server: admission, step scheduling, samplers and guidance over models that NVIDIA Triton runs. No torch."""
