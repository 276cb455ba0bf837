"""Who may attach to a session: one secret at a time, and the one before it until the viewer has used the new one.

Only hashes are kept; a token is seen in clear by the viewer alone. Each attach rotates: the answer to it may be lost,
so the token it was made with stays valid until the first ack that arrives under the new one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

TOKEN_BYTES = 32


def new_token() -> str:
    """256 random bits, URL-safe."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(slots=True)
class AttachTokens:
    """Hashes of the tokens that open one session. `previous` is empty when only the newest does."""

    current: str
    previous: str = ""

    def accepts(self, token: str) -> bool:
        """Whether the token opens the session; takes as long for a wrong one as for a right one."""
        offered = token_hash(token)
        newest = hmac.compare_digest(offered, self.current)
        older = hmac.compare_digest(offered, self.previous or "-" * len(offered))
        return newest or older

    def rotate(self, used: str, fresh: str) -> None:
        """`used` opened the session; `fresh` is the next. Any other token is dead from here on."""
        self.previous, self.current = token_hash(used), token_hash(fresh)

    def confirm(self) -> None:
        """The viewer has shown that it holds the newest token."""
        self.previous = ""
