"""What a worker process is told at birth, and how it is told.

The launcher writes a `WorkerConfig` as JSON into an anonymous memory file and hands the worker its descriptor, so
that the token is neither on the command line nor in the environment nor on a disk:

    fd = config_fd(config)
    process = subprocess.Popen(worker_argv(fd), pass_fds=(fd, config.parent_fd), start_new_session=True)
    os.close(fd)

`parent_fd` is the reading end of a pipe whose writing end only the launcher holds: it reads as ended when the
launcher dies, however it died. Importing this module needs no torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields

from turboserve.errors import ConfigError
from turboserve.runtime.lifeline import json_fd, read_fd

PACK_BELOW_BYTES = 1 << 20
"""Equal pieces of session state below this size are packed on the GPU on their way to host memory and back. A copy by
DMA takes about 4 us beside its bytes: published figures for an H100 on PCIe 5 are 15 GB/s for copies of 64 KiB, 29 at
256 KiB, 42 at 1 MiB and 51 at most. So below 1 MiB more than a fifth of the link is lost, while to gather 1 MiB takes
0.6 us at 85% of 4.3 TB/s. Modelled from those figures; not measured by us."""
EXIT_DEVICE_LOST = 69
"""Exit code of a worker whose device failed for good (EX_UNAVAILABLE): its sessions go on elsewhere."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """All settings of one worker process. Times are seconds, sizes bytes, ports TCP on `*_host`.

    `slots` is how many sessions fit in memory, `capacity` how many active ones the worker should be given.
    `paced_profile` is the path of a latency profile that every pass is padded to by sleep. `ring_fd` is an inherited
    frame ring; -1 lets the worker make its own of `ring_bytes`. `arena_fd` is the node's arena, of which partition
    `arena_partition` is this worker's; -1: sessions leave no recovery points. `recovery_every_chunks` is how often they
    do; 0 takes what the model declares. `profile_dir` is where traces of capture windows go; empty: there are none. A
    worker that `joined` from elsewhere has neither ring nor launcher, its arena is its own, and it hears from the
    controller where the gateway is; `advertise` is its own address for others (empty: the one it reaches the controller
    from).
    """

    worker_id: str
    worker_epoch: int
    token: str
    """Hex secret that both ends of every control and data socket prove to know."""
    controller_port: int
    gateway_port: int
    controller_host: str = "127.0.0.1"
    gateway_host: str = "127.0.0.1"
    node: str = "local"
    model: str = "shapes"
    device: str = "cpu"
    gpu_count: int = 1
    """GPUs that this one worker runs its model on (docs/design.md, "Workers on several GPUs")."""
    slots: int = 16
    capacity: int = 4
    ring_fd: int = -1
    ring_bytes: int = 16 << 20
    board_fd: int = -1
    """An inherited work board (`work_board.py`): who was at work when this process dies; -1: there is none."""
    arena_fd: int = -1
    arena_partition: int = 0
    recovery_every_chunks: int = 0
    prepared_keep_s: float = 30.0
    parent_fd: int = -1
    heartbeat_s: float = 0.5
    shutdown_timeout_s: float = 10.0
    paced_profile: str = ""
    profile_dir: str = ""
    joined: bool = False
    advertise: str = ""
    calibrate: bool = True
    pack_below_bytes: int = PACK_BELOW_BYTES
    """0: every piece is copied by itself. Counts on CUDA only."""
    born_s: float = 0.0
    """When the launcher began to start this process, on this machine's monotonic clock; 0: not told."""
    log_format: str = "console"
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 1 <= self.capacity <= self.slots:
            raise ConfigError(f"capacity is {self.capacity}", expected=f"1 to {self.slots}, the number of slots")
        if self.joined and self.ring_fd >= 0:
            raise ConfigError("a worker that joined shares no memory", expected="no ring_fd")
        if self.advertise in ("*", "::", "0.0.0.0"):
            raise ConfigError(f"advertise is {self.advertise!r}", expected="one address of this machine")
        if self.recovery_every_chunks < 0 or self.arena_partition < 0:
            raise ConfigError("recovery_every_chunks and arena_partition must not be below 0")
        if not 0 <= self.pack_below_bytes <= 8 << 20:
            raise ConfigError(f"pack_below_bytes is {self.pack_below_bytes}", expected="0 to 8 MiB, a staging buffer")
        if self.gpu_count != 1:
            raise ConfigError(
                f"gpu_count is {self.gpu_count}", expected="1", hint="a worker on several GPUs is not built yet"
            )
        if self.log_format not in ("console", "json"):
            raise ConfigError(f"log_format is {self.log_format!r}", expected="console or json")
        if self.heartbeat_s <= 0 or self.shutdown_timeout_s < 0:
            raise ConfigError("heartbeat_s must be above 0 and shutdown_timeout_s not below it")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerConfig:
        """The config that `to_json` wrote; an unknown or missing key is a ConfigError."""
        try:
            values = json.loads(text)
            return cls(**values)
        except (ValueError, TypeError) as error:
            known = ", ".join(one.name for one in fields(cls))
            raise ConfigError(f"worker config does not fit: {error}", expected=f"a JSON object of {known}") from None

    def __repr__(self) -> str:
        """Without the token: configs end up in logs and tracebacks."""
        shown = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "token"}
        return f"WorkerConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def config_fd(config: WorkerConfig) -> int:
    """An inheritable memory file that holds the config; pass it to the worker and close it afterwards."""
    return json_fd(config.to_json(), "turboserve-worker-config")


def read_config(fd: int) -> WorkerConfig:
    """The worker's end: read the whole file and close it."""
    return WorkerConfig.from_json(read_fd(fd))


def worker_argv(fd: int) -> list[str]:
    """Command line of a worker process whose config lies in `fd`."""
    return [sys.executable, "-m", "turboserve.runtime.worker", "--config-fd", str(fd)]
