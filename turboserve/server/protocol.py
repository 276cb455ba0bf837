"""The public WebSocket protocol: what a viewer may send, checked; version 1. No model's name is in it.

JSON text both ways, binary for media only. A message is an object with a `type`; fields that we do not know are
ignored, fields that we know must fit.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Annotated, Any

import msgspec

from turboserve.errors import InvalidPrompt, Malformed

VERSION = 1
FORMATS = ("h264", "jpeg", "mp4", "raw")
PROMPT_BYTES_MAX = 4096

_INDEX_MAX = 1 << 53


class ViewerMessage(msgspec.Struct, tag_field="type", tag=str.lower, frozen=True):
    """Base; `type` on the wire is the class name in lower case."""


class Attach(ViewerMessage, frozen=True):
    token: Annotated[str, msgspec.Meta(max_length=256)]
    next_index: Annotated[int, msgspec.Meta(ge=0, le=_INDEX_MAX)] = 0
    format: str | None = None
    pace: str | None = None


class Prompt(ViewerMessage, frozen=True):
    text: str
    event_id: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    from_index: Annotated[int, msgspec.Meta(ge=0, le=_INDEX_MAX)] | None = None


class Pause(ViewerMessage, frozen=True):
    pass


class Resume(ViewerMessage, frozen=True):
    pass


class Ack(ViewerMessage, frozen=True):
    index: Annotated[int, msgspec.Meta(ge=0, le=_INDEX_MAX)]


class Stop(ViewerMessage, frozen=True):
    pass


class Ping(ViewerMessage, frozen=True):
    t: float | None = None


AnyViewerMessage = Attach | Prompt | Pause | Resume | Ack | Stop | Ping

_decoder = msgspec.json.Decoder(AnyViewerMessage)
_TYPES = "attach, prompt, pause, resume, ack, stop or ping"


def decode_viewer_message(text: str) -> AnyViewerMessage:
    """One message, or Malformed that names the field but repeats nothing of what was sent."""
    try:
        message = _decoder.decode(text)
    except msgspec.ValidationError as error:
        path = str(error).rpartition(" - at `")[2].rstrip("`") if " - at `" in str(error) else "$"
        raise Malformed(
            f"a message that does not fit its schema (at {path})", expected=f"an object whose type is {_TYPES}"
        ) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise Malformed("a message that is not JSON", expected=f"an object whose type is {_TYPES}") from None
    if isinstance(message, Attach):
        if message.format is not None and message.format not in FORMATS:
            raise Malformed("attach names an unknown format", expected=f"one of {', '.join(FORMATS)}")
        if message.pace not in (None, "live", "free"):
            raise Malformed("attach names an unknown pace", expected="live or free")
    return message


def clean_prompt(text: str) -> str:
    """The prompt as it goes on: NFC, bounded, without control characters."""
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise InvalidPrompt("the prompt is empty", hint="send some text")
    if len(text.encode("utf-8", "surrogatepass")) > PROMPT_BYTES_MAX:
        raise InvalidPrompt("the prompt is too long", expected=f"at most {PROMPT_BYTES_MAX} bytes")
    if any(unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t" for char in text):
        raise InvalidPrompt("the prompt has control characters", expected="text, line breaks and tabs")
    return text


def encode_message(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False)
