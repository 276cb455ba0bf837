"""What the launcher tells the controller process."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from turboserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Settings of the controller. `listen_fd` is a listening socket that the launcher made and keeps."""

    token: str
    listen_fd: int
    data_dir: str
    model: str = "shapes"
    chunk_s: float = 1.0
    chunk_target_s: float = 1.0
    capacity: int = 4
    slots: int = 16
    workers: int = 1
    workers_max: int = 0
    """0 or equal to `workers`: a fixed fleet."""
    fleet_fd: int = -1
    """Our end of the link to the launcher (runtime/fleet_link.py); -1: nobody starts or stops workers for us."""
    node: str = "local"
    """The name of the server's node, as its workers bear it."""
    arena_fd: int = -1
    """The node's arena, of which partition 0 is ours; -1: sessions leave no recovery points."""
    disk_bytes: int = 1 << 34
    """What recovery points on disk may take together."""
    paced_profile: str = ""
    """The latency profile that the workers' passes are padded to: the fleet is planned with it."""
    may_kill: bool = False
    """Operators may have a worker killed, to see what happens."""
    denoise_steps: int = 4
    parent_fd: int = -1
    queue_max: int = 64
    queue_age_max_s: float = 120.0
    lease_s: float = 2.0
    start_timeout_s: float = 120.0
    steps_floor: int | None = None
    record_dir: str = ""
    """Where every tick's view and plan go (`serve --record`); empty: nowhere."""
    log_format: str = "console"
    log_level: str = "info"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ControllerConfig:
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"controller config does not fit: {error}") from None

    def __repr__(self) -> str:
        shown = {name: value for name, value in asdict(self).items() if name != "token"}
        return f"ControllerConfig({shown})"


def controller_argv(fd: int) -> list[str]:
    """Command line of the controller process whose config lies in `fd`."""
    return [sys.executable, "-m", "turboserve.runtime.control_loop", "--config-fd", str(fd)]
