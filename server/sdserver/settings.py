"""Settings of the commands: environment variables `SDSERVER_<NAME>` and flags `--<name>`, flags first."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _shipped_model_repository() -> Path:
    # Beside the package `sdmodels`; it is only looked up, not imported, because importing it is the backends' business.
    spec = importlib.util.find_spec("sdmodels")
    return Path(spec.origin).parents[1] if spec and spec.origin else Path("model_repository")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SDSERVER_",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        extra="ignore",
        frozen=True,
    )

    model_repository: Path = Field(
        default_factory=_shipped_model_repository, description="Folder with the engines and their Triton models."
    )
    safety_model: str = Field(
        "", description="Folder below <model repository>/safety with the safety check's safety.json; empty: no check."
    )
    cost_models: Path | None = Field(
        None, description="Folder of what `sdserver calibrate` measured; default: <model repository>/cost_models."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: colours on a terminal, JSON lines elsewhere."
    )

    @property
    def cost_model_folder(self) -> Path:
        """Where cost models are read and written."""
        return self.model_repository / "cost_models" if self.cost_models is None else self.cost_models


class CalibrateSettings(Settings):
    """What UNet calls cost, measured through a Triton that runs."""

    triton_url: str = Field("localhost:8001", description="host:port of Triton's gRPC endpoint.")
    engine: str = Field("", description="The engine to measure; empty: all.")
    seconds: Seconds = Field(60.0, description="About how long an engine may take.")


class ServeSettings(Settings):
    """The gRPC server."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: Port = Field(50051, description="Port of the gRPC API; 0 chooses a free one.")
    backend: Literal["triton", "in-process"] = Field(
        "triton", description="Where the models run; in-process needs no Triton, but loads torch into the server."
    )
    triton_url: str = Field("localhost:8001", description="host:port of Triton's gRPC endpoint.")
    default_engine: str = Field("", description="Engine of requests that name none; empty: the first by name.")
    max_active: Count = Field(8, description="Generations that run at a time.")
    max_queued: Annotated[int, Field(ge=0)] = Field(64, description="Generations that may wait; more are refused.")
    parallel_calls: Count = Field(
        1, description="Calls of a model that Triton answers at a time: the GPUs that this server is to keep busy."
    )
    max_generation_seconds: Seconds = Field(600.0, description="Time limit of one generation, without its wait.")
    text_cache_mb: Annotated[int, Field(ge=0)] = Field(
        64, description="Memory, in MB, for text states of prompts that may come again; 0 keeps none."
    )
    safety_mode: Literal["off", "flag", "blur", "block"] | None = Field(
        None, description="What becomes of an image that the safety model objects to; default: block, if there is one."
    )
    prompt_block_list: Path | None = Field(
        None, description="File with words and phrases that no prompt may have, one a line."
    )
    send_timeout_seconds: Seconds = Field(30.0, description="How long a caller may leave its events unread.")
    engine_watch_seconds: Seconds = Field(2.0, description="Time between two looks for engines that come and go.")
    health_interval_seconds: Seconds = Field(1.0, description="Time between two looks at the models.")
    c2pa_certificates: Path | None = Field(
        None, description="PEM chain of certificates, the signer's first: the images are signed as C2PA has it."
    )
    c2pa_private_key: Path | None = Field(None, description="The signer's private key, unencrypted PKCS #8 PEM.")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        "es256", description="Algorithm of the signatures."
    )
    c2pa_timestamp_authority: str | None = Field(
        None, description="URL of an RFC 3161 authority that is asked for a time stamp of each signature."
    )
    drain_seconds: Seconds = Field(30.0, description="How long running generations may finish after SIGTERM.")
    api_keys: Path | None = Field(
        None, description="File with one `name key` a line, for callers; without it everybody may call."
    )
    tls_certificate: Path | None = Field(None, description="PEM chain of certificates, the server's own first.")
    tls_private_key: Path | None = Field(None, description="The server's private key, unencrypted PEM.")
    tls_client_ca: Path | None = Field(
        None, description="PEM authorities of the certificates that clients then need, too (mutual TLS)."
    )
    health_port: Port | None = Field(
        None,
        description="Another port, for health alone and never with TLS, as Kubernetes' probes want it; 0: a free one.",
    )
    max_connection_age_seconds: Seconds | None = Field(
        None, description="After which a caller has to connect again, so that it finds new servers; default: never."
    )
    max_connection_age_grace_seconds: Seconds | None = Field(
        None, description="How long calls of an aged connection may go on; default: to their end."
    )
    metrics_host: str = Field("127.0.0.1", description="Address of the metrics; 0.0.0.0 for all.")
    metrics_port: Port | None = Field(
        None, description="Port of Prometheus metrics at /metrics, by HTTP; 0 chooses a free one; default: no metrics."
    )
    traces: bool = Field(
        False, description="Send traces by OpenTelemetry, as the variables OTEL_* say; needs the extra `traces`."
    )


class TritonSettings(Settings):
    """A Triton Inference Server for this machine."""

    triton_host: str = Field(
        "127.0.0.1",
        description="Address that Triton listens on; 0.0.0.0 for all. Whoever reaches it can run code in it.",
    )
    triton_grpc_port: Port = Field(8001, description="Port of Triton's gRPC endpoint; 0 chooses a free one.")
    triton_http_port: Port = Field(8000, description="Port of Triton's HTTP endpoint; 0 chooses a free one.")
    triton_metrics_host: str | None = Field(None, description="Address of Triton's metrics; default: triton_host.")
    triton_metrics_port: Port = Field(8002, description="Port of Triton's metrics; 0 chooses a free one.")
    triton_executable: Path | None = Field(
        None, description="Another tritonserver than the wheel's, such as NVIDIA's container has one."
    )
    triton_start_seconds: Seconds = Field(180.0, description="How long Triton may take to load the models.")
    triton_max_connection_age_seconds: Seconds | None = Field(
        None, description="After which a server connects to Triton again, so that it finds new ones; default: never."
    )


class UpSettings(ServeSettings, TritonSettings):
    """Triton and the gRPC server together."""
