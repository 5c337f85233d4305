# Triton with the models' code, from NVIDIA's image or, for CPUs, from the wheel:
#   docker build --file images/triton.Dockerfile --target gpu --tag sd-service-triton:0.1.0-gpu .
#   docker build --file images/triton.Dockerfile --target cpu --tag sd-service-triton:0.1.0-cpu .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# Ubuntu 24.04 with Python 3.12, for which locks/triton-gpu.txt is.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:25.04-py3

FROM ${PYTHON_IMAGE} AS cpu-build
WORKDIR /build
COPY images/install images/install
COPY images/locks/triton-cpu.txt images/locks/build.txt images/locks/
RUN images/install dependencies /opt/sd-service images/locks/triton-cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY proto proto
COPY model_repository model_repository
RUN images/install project /opt/sd-service images/locks/build.txt
COPY images/sbom.py images/healthcheck.py /opt/sd-service/
RUN /opt/sd-service/bin/python /opt/sd-service/sbom.py > /opt/sd-service/sbom.cdx.json
# OpenVINO's form of the networks, which each start would make again: containers cannot write it.
RUN mv model_repository /models && rm -r /models/sdmodels \
    && /opt/sd-service/bin/python -c "from pathlib import Path; from sdmodels.runtimes import load_unet; [load_unet(path.parent, 1) for path in Path('/models/engines').glob('*/engine.json')]"

FROM ${PYTHON_IMAGE} AS cpu
LABEL org.opencontainers.image.title="sd-service Triton for CPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /tmp sd
COPY --from=cpu-build /opt/sd-service /opt/sd-service
COPY --from=cpu-build --chown=1000:1000 /models /models
ENV PATH=/opt/sd-service/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SDSERVER_MODEL_REPOSITORY=/models
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
    CMD ["python", "/opt/sd-service/healthcheck.py", "triton"]
CMD ["sdserver", "triton"]

FROM ${TRITON_IMAGE} AS gpu-build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-pip python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY images/install images/install
COPY images/locks/triton-gpu.txt images/locks/build.txt images/locks/
RUN images/install dependencies /opt/sd-service images/locks/triton-gpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY proto proto
COPY model_repository model_repository
RUN images/install project /opt/sd-service images/locks/build.txt \
    && mv model_repository /models && rm -r /models/sdmodels
COPY images/sbom.py images/healthcheck.py /opt/sd-service/
RUN /opt/sd-service/bin/python /opt/sd-service/sbom.py > /opt/sd-service/sbom.cdx.json

FROM ${TRITON_IMAGE} AS gpu
LABEL org.opencontainers.image.title="sd-service Triton for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=gpu-build /opt/sd-service /opt/sd-service
COPY --from=gpu-build --chown=1000:1000 /models /models
ENV PATH=/opt/sd-service/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SDSERVER_MODEL_REPOSITORY=/models \
    SDSERVER_TRITON_EXECUTABLE=/opt/tritonserver/bin/tritonserver
# NVIDIA's user triton-server.
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "/opt/sd-service/healthcheck.py", "triton"]
# In the place of NVIDIA's, which prints a page and starts what it is given.
ENTRYPOINT []
CMD ["sdserver", "triton"]
