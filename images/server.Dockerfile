# The gRPC server: no torch. docker build --file images/server.Dockerfile --tag sd-service-server:0.1.0 .
# With signed images (C2PA): --build-arg LOCK=server-signing --tag sd-service-server:0.1.0-signing
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG LOCK=server
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY images/install images/install
COPY images/locks/${LOCK}.txt images/locks/build.txt images/locks/
RUN images/install dependencies /opt/sd-service "images/locks/${LOCK}.txt" && images/install slim /opt/sd-service
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY proto proto
COPY model_repository model_repository
# The server reads what engines are, and none of their weights.
RUN images/install project /opt/sd-service images/locks/build.txt \
    && mkdir /found \
    && find model_repository/engines -name engine.json -exec cp --parents {} /found \; \
    && mv /found/model_repository /models
COPY images/sbom.py images/healthcheck.py /opt/sd-service/
RUN /opt/sd-service/bin/python /opt/sd-service/sbom.py > /opt/sd-service/sbom.cdx.json

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="sd-service server" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /tmp sd
COPY --from=build /opt/sd-service /opt/sd-service
COPY --from=build --chown=1000:1000 /models /models
ENV PATH=/opt/sd-service/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SDSERVER_MODEL_REPOSITORY=/models \
    SDSERVER_HOST=0.0.0.0 \
    SDSERVER_HEALTH_PORT=50052
USER 1000:1000
WORKDIR /tmp
EXPOSE 50051 50052
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "/opt/sd-service/healthcheck.py", "server"]
CMD ["sdserver", "serve"]
