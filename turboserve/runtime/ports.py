"""Listening sockets, made once by the launcher and handed down, so that a restarted process keeps its address."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from pathlib import Path

from turboserve.errors import ConfigError

BACKLOG = 512
_LISTEN = "0A"  # TCP state in /proc/net/tcp


def listen_socket(host: str, port: int) -> socket.socket:
    """A bound, listening, inheritable TCP socket. `port` 0 takes any free one.

    ConfigError names the process that has the port and a port that is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            free = free_port(host)
            raise ConfigError(
                f"port {port} on {host} is taken by {port_owner(port) or 'another process'}",
                hint=f"stop it, or use a free port: --port {free} (make serve PORT={free})",
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"port {port} needs more rights than this user has", expected="1024 or above") from None
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}", expected="an address of this machine"
        ) from None
    sock.set_inheritable(True)
    return sock


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_owner(port: int) -> str | None:
    """`name (pid N)` of the process that listens on a TCP port, where this user may see it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if not inodes.isdisjoint(_open_files(process)):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # gone meanwhile, or another user's
    return None


def _open_files(process: Path) -> list[str]:
    """Where a process's descriptors point; one that closes while we look is left out."""
    found = []
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return found


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
