"""How a child process makes sure that it never outlives the launcher, and how configs are handed down.

Two independent lines: the kernel kills the child when the launcher's spawning thread ends (PR_SET_PDEATHSIG), and
the child watches a pipe whose writing end only the launcher holds. The second one also covers a child that was
started by somebody else or changed its user.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends. Linux; elsewhere the pipe alone must do."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return


def watch_parent(parent_fd: int) -> None:
    """End this process at once when the pipe's other end closes. A negative fd watches nothing (tests)."""
    if parent_fd < 0:
        return

    def wait() -> None:
        while os.read(parent_fd, 1):
            pass
        os._exit(1)  # not sys.exit: no handler of ours may hold a dying process up

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def hold_to_parent(parent_fd: int) -> None:
    """Both lines at once; call it first thing in a child's main."""
    die_with_parent()
    watch_parent(parent_fd)


def json_fd(text: str, name: str) -> int:
    """An inheritable memory file that holds `text`: neither argv, environment nor disk ever sees it."""
    fd = os.memfd_create(name, 0)
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    return fd


def read_fd(fd: int) -> str:
    """All of such a file; it is closed."""
    with os.fdopen(fd, "r") as file:
        file.seek(0)
        return file.read()
