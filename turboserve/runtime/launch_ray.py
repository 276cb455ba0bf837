"""Workers as actors of a Ray cluster: not written yet, and said so."""

from __future__ import annotations

from turboserve.errors import ConfigError


def ray_backend() -> None:
    """Raises ConfigError: what `--backend ray` answers until there is one."""
    raise ConfigError("--backend ray does not exist yet", expected="--backend local", hint="leave the option out")
