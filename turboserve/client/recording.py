"""A stream into an mp4 file: frames are encoded here, an mp4 stream is written as it comes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from turboserve.client import wire
from turboserve.client.chunk import Chunk
from turboserve.errors import InvalidRequest

if TYPE_CHECKING:
    from turboserve.client.aio import AsyncSession
    from turboserve.server.video_file import VideoFile


async def save_chunks(session: AsyncSession, path: str | Path, seconds: float | None) -> int:
    """Take chunks until the stream ends or `seconds` of video are written; returns the frames written.

    The last chunk is cut to the asked length, so 2 seconds at 12 frames a second are 24 frames.
    """
    if seconds is None and session.max_duration_s is None:
        raise InvalidRequest("this stream has no end", expected="save(path, seconds=…) or open(max_duration_s=…)")
    frames_wanted = None if seconds is None else max(1, round(seconds * session.fps))
    if session.format == "mp4":
        return await _save_fragments(session, Path(path), frames_wanted)
    from turboserve.server.video_file import VideoFile  # imports PyAV

    with VideoFile(path, session.width, session.height, session.fps) as file:
        async for chunk in session:
            rest = None if frames_wanted is None else frames_wanted - file.frame_count
            # Encoding takes milliseconds; in a thread it leaves the loop free to receive.
            await asyncio.to_thread(_write, file, chunk, rest)
            if frames_wanted is not None and file.frame_count >= frames_wanted:
                break
        _need_frames(file.frame_count, path)
    return file.frame_count


def _write(file: VideoFile, chunk: Chunk, rest: int | None) -> None:
    file.write(chunk.frames[:rest])


def _need_frames(count: int, path: str | Path) -> None:
    if not count:
        raise InvalidRequest(f"no frames came for {path}", expected="at least one chunk")


async def _save_fragments(session: AsyncSession, path: Path, frames_wanted: int | None) -> int:
    """The server's own fragmented mp4: whole chunks, the first initialisation only."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    count, begun = 0, False
    try:
        with open(part, "wb") as file:  # noqa: ASYNC230 - a few kilobytes a second into a page cache
            async for one in session.pieces():
                if isinstance(one, wire.Init):
                    if begun:
                        continue  # sent anew after each reconnection
                    begun = True
                else:
                    count += one.frame_count
                file.write(one.payload)
                if frames_wanted is not None and count >= frames_wanted:
                    break
        _need_frames(count, path)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count
