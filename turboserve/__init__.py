"""TurboServe: a serving system for streaming video generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from turboserve.client import AsyncSession, Session

__all__ = ["AsyncSession", "Session", "__version__"]


def __getattr__(name: str) -> Any:
    # The SDK pulls in numpy, httpx and websockets; `turboserve --help` should not pay for them.
    if name in ("Session", "AsyncSession"):
        from turboserve import client

        return getattr(client, name)
    raise AttributeError(f"module 'turboserve' has no attribute {name!r}")
