"""What the gateway process is told at birth.

The launcher writes a `GatewayConfig` as JSON into an anonymous memory file (`runtime.lifeline.json_fd`) and hands the
gateway its descriptor, so that tokens and keys are neither on a command line nor in the environment:

    fd = json_fd(config.to_json(), "turboserve-gateway-config")
    subprocess.Popen(gateway_argv(fd), pass_fds=(fd, config.http_fd, config.data_fd, config.parent_fd))

Both listening sockets may be handed down too, so that a restarted gateway keeps its addresses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields

from turboserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits of one tenant; a key with role admin, and a loopback server without keys, get the wider set.

    Sessions count while they are neither closed nor failed. Rates are per minute.
    """

    sessions: int = 4
    creates_per_min: int = 6
    attaches_per_min: int = 30
    """Of one session: a viewer on a bad network reconnects often, a thief's script more often still."""
    session_s: float = 1800.0


WIDE_QUOTAS = Quotas(sessions=256, creates_per_min=6000, attaches_per_min=600, session_s=86_400.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the public port. Times are seconds, sizes bytes; the answer to each is in docs/errors.md."""

    header_bytes: int = 16 << 10
    header_count: int = 64
    header_s: float = 5.0
    body_bytes: int = 1 << 20
    body_s: float = 15.0
    body_depth: int = 16
    message_bytes: int = 64 << 10
    attach_s: float = 5.0
    messages_per_s: float = 10.0
    messages_burst: int = 30
    flood_drops: int = 30
    """Dropped messages within ten seconds after which the socket is closed."""
    bad_messages_per_min: int = 20
    connections_per_address: int = 600
    slow_close_s: float = 60.0
    attach_grace_s: float = 120.0
    queue_length: int = 64
    ended_kept: int = 1000
    ended_kept_s: float = 3600.0
    videos_kept: int = 64
    videos_kept_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """All settings of the gateway process.

    `http_fd` and `data_fd` are inherited listening sockets; -1 lets the gateway bind `host:port` and `data_host:0`
    itself. `token` is the cluster's shared secret in hex. `chunk_target_s` None means the model's own chunk time.
    """

    data_dir: str
    token: str
    controller_port: int
    controller_host: str = "127.0.0.1"
    gateway_epoch: int = 1
    http_fd: int = -1
    data_fd: int = -1
    parent_fd: int = -1
    host: str = "127.0.0.1"
    port: int = 8000
    data_host: str = "127.0.0.1"
    data_port: int = 0
    model: str = "shapes"
    api_key: str = ""
    api_key_file: str = ""
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    chunk_target_s: float | None = None
    playback_rate: float = 1.0
    shutdown_timeout_s: float = 10.0
    encoder_threads: int = 2
    video_pipeline: str = ""
    """Folder of a diffusers pipeline that /v1/videos offers besides (`serve --video-pipeline`); empty: none."""
    video_device: str = "cpu"
    record_trace: str = ""
    """File for a trace of what users do (`serve --record-trace`); empty: none."""
    log_format: str = "console"
    log_level: str = "info"
    quotas: Quotas = Quotas()
    wide_quotas: Quotas = WIDE_QUOTAS
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not 0.05 <= self.playback_rate <= 10:
            raise ConfigError(f"playback rate is {self.playback_rate}", expected="0.05 to 10; 1 is real time")
        if self.log_format not in ("console", "json"):
            raise ConfigError(f"log_format is {self.log_format!r}", expected="console or json")
        if self.host not in LOOPBACK and not (self.api_key or self.api_key_file):
            raise ConfigError(
                f"--host {self.host} would open the server to others without a key",
                expected="--api-key or --api-key-file with any host but loopback",
                hint="or keep 127.0.0.1 and reach it through: ssh -L 8000:127.0.0.1:8000 THIS_MACHINE",
            )
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigError("TLS needs --ssl-certfile and --ssl-keyfile together")
        if self.root_path and not (self.root_path.startswith("/") and not self.root_path.endswith("/")):
            raise ConfigError(f"root path {self.root_path!r}", expected="like /video: a leading slash, no trailing one")

    @property
    def open(self) -> bool:
        """No keys: loopback only, and whoever reaches the port may do everything."""
        return not (self.api_key or self.api_key_file)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> GatewayConfig:
        """The config that `to_json` wrote; an unknown or missing key is a ConfigError."""
        try:
            values = json.loads(text)
            for name, kind in (("quotas", Quotas), ("wide_quotas", Quotas), ("limits", Limits)):
                if name in values:
                    values[name] = kind(**values[name])
            values["allowed_origins"] = tuple(values.get("allowed_origins", ()))
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            known = ", ".join(one.name for one in fields(cls))
            raise ConfigError(f"gateway config does not fit: {error}", expected=f"a JSON object of {known}") from None

    def __repr__(self) -> str:
        """Without secrets: configs end up in logs and tracebacks."""
        hidden = ("token", "api_key")
        shown = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in hidden}
        return f"GatewayConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def gateway_argv(fd: int) -> list[str]:
    """Command line of a gateway process whose config lies in `fd`."""
    return [sys.executable, "-m", "turboserve.server.process", "--config-fd", str(fd)]
