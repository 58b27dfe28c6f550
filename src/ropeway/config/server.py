"""Settings of the API process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ropeway.config.accounts import AccountsConfig
from ropeway.config.jobs import JobsConfig
from ropeway.config.option import option
from ropeway.config.routes import RoutesConfig


@dataclass(frozen=True, kw_only=True)
class ServerConfig(JobsConfig, AccountsConfig, RoutesConfig):
    """What the API process needs to know."""

    host: str = option("127.0.0.1", "Server", "Address to bind; anything but loopback needs an API key.")
    port: int = option(8000, "Server", "Port to bind; 0 takes a free one and prints it.", low=0, high=65535)
    api_key: str | None = option(
        None, "Server", "Bearer key that clients must send (several: separated by commas).", secret=True
    )
    admin_key: str | None = option(
        None, "Server", "Bearer key for the paths below /admin/, which are closed without one.", secret=True
    )
    tenant_header: str | None = option(
        None,
        "Server",
        "Request header in which a trusted gateway names the tenant, such as X-Tenant (default: tenants are told apart "
        "by their API keys).",
    )
    served_model_name: str | None = option(None, "Server", "Name that clients use for the model (default: its own).")
    chat_template: str | None = option(None, "Server", "File with a Jinja chat template that replaces the model's.")
    tool_call_parser: Literal[
        "auto", "none", "deepseek_v3", "deepseek_v31", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder",
        "qwen3_xml",
    ] = option("auto", "Server", "How the model writes calls of tools; 'auto': as its template shows.")  # fmt: skip
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "deepseek_v3", "granite", "mistral", "qwen3"] = option(
        "auto", "Server", "How the model sets its thoughts off from the answer; 'auto': as its chat template shows."
    )
    allowed_hosts: str | None = option(
        None, "Server", "Extra Host headers to accept, by commas (always: loopback names and the bound host)."
    )
    max_body_mib: float = option(16.0, "Server", "Largest request body, in MiB.", low=0.001)
    request_timeout: float = option(
        600.0, "Server", "Seconds after which an answer that somebody waits for ends with a timeout.", low=0.001
    )
    ttft_deadline_ms: float | None = option(
        None, "Server", "When the first token is wanted by requests that do not say so (policy deadline).", low=0.001
    )
    stream_timeout: float = option(
        30.0, "Server", "Seconds that a client may leave its stream unread before it is dropped.", low=0.001
    )
    keep_alive_interval: float = option(
        15.0, "Server", "Seconds between comment lines on a stream that waits, so that proxies keep it open.", low=0.001
    )
    response_store_count: int = option(
        1024, "Server", "Responses that /v1/responses keeps in memory for later requests; 0: none.", low=0, high=100000
    )
    response_store_mib: float = option(
        64.0, "Server", "MiB that they and the conversations they continue may take; the oldest go first.", low=0.0
    )
    response_store_ttl: float = option(
        3600.0, "Server", "Seconds that a response is kept after it was last asked for.", low=0.001
    )
    shutdown_timeout: float = option(30.0, "Server", "Seconds that running requests get to finish on SIGTERM.", low=0)
    max_restarts: int = option(3, "Server", "Engine restarts within ten minutes before the server gives up.", low=0)
    engine_timeout: float = option(
        300.0, "Server", "Seconds without a step until a busy engine is restarted; 0: never.", low=0
    )
    otlp_endpoint: str | None = option(
        None,
        "Server",
        "OpenTelemetry collector that is sent the spans of each request, OTLP over HTTP, such as http://127.0.0.1:4318.",
    )
    otlp_headers: str | None = option(
        None, "Server", "Headers that the collector wants, such as a key: NAME=VALUE, several by commas.", secret=True
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Server", "How much to log.")
    log_format: Literal["text", "json"] = option("text", "Server", "Shape of log lines.")
    show_hidden_metrics: bool = option(
        False, "Server", "Show metrics also under names that vLLM has given up, for old dashboards."
    )
    log_stats_interval: float = option(10.0, "Server", "Seconds between statistics lines while busy; 0 is off.", low=0)
