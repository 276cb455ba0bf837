"""What all messages share: the base, bounds, checked field types (`messages.py`)."""

from __future__ import annotations

from typing import Annotated

import msgspec

PROTOCOL_VERSION = 3
MAX_MESSAGE_BYTES = 1 << 20
POINTS_TOLD_MAX = 8192
"""Sessions in one PointsHeld: they fit in a message whatever their sizes."""
NOT_ENCODED = "not_encoded"
PART_BYTES = 512 << 10
"""Most bytes of a chunk in one FramePart."""
INIT_BYTES_MAX = 4096
"""Most bytes of an mp4's init segment; ours have about 700."""
WORK_MAX = 1024
"""Most sessions in one WorkReport."""

SessionId = Annotated[str, msgspec.Meta(pattern="^[a-z0-9]{26}$")]
ShortText = Annotated[str, msgspec.Meta(max_length=256)]
Prompt = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, tag_field="type", tag=True, frozen=True, kw_only=True):
    """Base of all messages; `type` on the wire is the class name."""
