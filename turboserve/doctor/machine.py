"""Checks of the machine itself: locked memory, shared memory, disk, ports. Each does what serving will do, in small."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from turboserve.doctor.findings import Finding, failed, ok, warning
from turboserve.errors import ConfigError

MIB = 1 << 20
LOCK_BYTES = 64 * MIB
SHM_BYTES = 64 * MIB
DISK_BYTES = 1 << 30
MEMORY_BYTES = 2 << 30


def check_python() -> Finding:
    """Which Python runs; an older one than 3.11 could not have installed us."""
    return ok("python", ".".join(map(str, sys.version_info[:3])))


def check_memlock(wanted_bytes: int = LOCK_BYTES, *, needed: bool = True) -> Finding:
    """Locks so much memory for a moment. Host copies of state are page-locked where there is a GPU (`needed`)."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit_text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / MIB:.3g} MiB"
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, wanted_bytes) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(wanted_bytes)) == 0:
            libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(wanted_bytes))
            return ok("memlock", f"{wanted_bytes / MIB:.0f} MiB can be locked, the limit is {limit_text}")
        why = os.strerror(ctypes.get_errno())
    found = f"{wanted_bytes / MIB:.3g} MiB cannot be locked ({why}); the limit is {limit_text}"
    if not needed:
        return ok("memlock", f"{found}; nothing needs it without a GPU")
    mend = "ulimit -l unlimited (in a container: --ulimit memlock=-1; for a service: LimitMEMLOCK=infinity)"
    return failed("memlock", found, "room for page-locked copies of sessions", mend)


def check_shm(folder: Path = Path("/dev/shm"), wanted_bytes: int = SHM_BYTES, *, needed: bool = True) -> Finding:
    """Takes so much shared memory for a moment. NCCL and CUDA libraries put their buffers there (`needed`)."""
    mend = f"mount -o remount,size=1g {folder} (in a container: --shm-size=1g)"
    expected = f"{wanted_bytes / MIB:.3g} MiB that can be taken"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, wanted_bytes)
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return failed("shm", found, expected, mend) if needed else warning("shm", found, expected, mend)
    free_bytes = shutil.disk_usage(folder).free
    return ok("shm", f"{folder}: {free_bytes / MIB:.0f} MiB free")


def check_disk(folder: Path, wanted_bytes: int = DISK_BYTES) -> Finding:
    """The data folder (logs, directory of sessions, videos) can be made, written and synced, and has room."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    try:
        if there == folder:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"turboserve")
                file.flush()
                os.fsync(file.fileno())
        elif not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        elif not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        free_bytes = shutil.disk_usage(there).free
    except OSError as error:
        return failed("disk", f"{folder}: {error.strerror}", "a folder we may write to", "choose one: --data-dir DIR")
    text = f"{folder}: {free_bytes / (1 << 30):.3g} GiB free"
    if free_bytes < wanted_bytes:
        expected = f"{wanted_bytes / (1 << 30):.3g} GiB or more"
        return failed("disk", text, expected, f"free some space there (df -h {there}), or choose --data-dir DIR")
    return ok("disk", text)


def check_memory(wanted_bytes: int = MEMORY_BYTES) -> Finding:
    """Memory that is free or can be had, as Linux counts it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration, ValueError):
        return warning("memory", "this system does not say how much there is", "Linux", "")
    text = f"{available / (1 << 30):.3g} GiB available"
    if available < wanted_bytes:
        expected = f"{wanted_bytes / (1 << 30):.3g} GiB for one worker and the server"
        return warning("memory", text, expected, "close other programs, or use --workers 1")
    return ok("memory", text)


def check_port(host: str, port: int) -> Finding:
    """Listens on the public port for a moment."""
    from turboserve.runtime.ports import listen_socket

    try:
        listen_socket(host, port).close()
    except ConfigError as error:
        return failed("port", error.message, error.expected or "a free port", error.hint or "choose another: --port N")
    return ok("port", f"{host}:{port} is free")


def check_extension() -> Finding:
    """The compiled copies, checksums and rings; their Python twins do the same, slower."""
    from turboserve.runtime import native

    if native.IMPLEMENTATION == "native":
        return ok("extension", "turboserve._native is built")
    why = native._why_not
    mend = "install a C++ compiler (apt install g++), then: python setup.py build_ext --inplace"
    return warning("extension", why, "turboserve._native", mend)
