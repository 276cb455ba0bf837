"""Who is calling: keys, tenants, roles. Only hashes of keys are held, and every comparison takes the same time.

A key file has one key a line; blank lines and lines that begin with # are skipped:

    tenant role=user|admin weight=N sha256=HEX
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from turboserve.errors import ConfigError, Unauthenticated

_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEX = re.compile(r"[0-9a-f]{64}")


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. `tenant` None would be nobody's; a server without keys has one tenant, `local`."""

    tenant: str
    role: Role
    weight: float = 1.0

    @property
    def wide(self) -> bool:
        """Whether the wider quotas hold: operators, and everybody on a loopback server without keys."""
        return self.role is Role.ADMIN


LOCAL = Identity("local", Role.ADMIN)


@dataclass(frozen=True, slots=True)
class Key:
    identity: Identity
    sha256: str


def parse_keys(text: str, source: str) -> tuple[Key, ...]:
    """The keys of a key file; ConfigError names the line, never its content."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        tenant, *fields = line.split()
        values = dict(field.partition("=")[::2] for field in fields)
        try:
            role = Role(values.pop("role", "user"))
            weight = float(values.pop("weight", "1"))
            digest = values.pop("sha256").lower()
        except (KeyError, ValueError):
            digest, weight, role = "", 0.0, Role.USER
        if values or not _TENANT.fullmatch(tenant) or not _HEX.fullmatch(digest) or not 0 < weight <= 1000:
            raise ConfigError(
                f"{source} line {number} is not a key", expected="tenant role=user|admin weight=N sha256=HEX"
            )
        keys.append(Key(Identity(tenant, role, weight), digest))
    return tuple(keys)


class KeyRing:
    """The keys in force. `reload` looks at the file again and keeps the old keys when the new ones are wrong."""

    def __init__(self, api_key: str, api_key_file: str) -> None:
        self._fixed: tuple[Key, ...] = ()
        if api_key:
            self._fixed = (Key(Identity("default", Role.ADMIN), hashlib.sha256(api_key.encode()).hexdigest()),)
        self._file = Path(api_key_file) if api_key_file else None
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()
        self.open = not api_key and not api_key_file
        if self._file is not None:
            self.reload()

    def reload(self) -> bool:
        """Read the file if it changed; whether it did. ConfigError when it does not read as keys."""
        if self._file is None:
            return False
        try:
            stat = self._file.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen == self._seen:
                return False
            self._seen = seen
            self._keys = parse_keys(self._file.read_text(), str(self._file))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"key file {self._file} cannot be read: {error}") from None
        return True

    def identify(self, authorization: str | None) -> Identity:
        """The caller behind an Authorization header; Unauthenticated without one that fits."""
        if self.open:
            return LOCAL
        scheme, _, offered = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not offered:
            raise Unauthenticated("this needs a key", hint="send the header Authorization: Bearer KEY")
        digest = hashlib.sha256(offered.strip().encode("utf-8", "surrogatepass")).hexdigest()
        found: Identity | None = None
        for key in (*self._fixed, *self._keys):  # all of them, so that time says nothing about which one came close
            if hmac.compare_digest(key.sha256, digest):
                found = key.identity
        if found is None:
            raise Unauthenticated("this key is not known", hint="ask the operator for a key")
        return found
