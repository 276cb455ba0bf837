"""The Python SDK: open a session, steer it, take its chunks as numpy frames, save it as a video.

    import turboserve

    with turboserve.Session("a red circle drifting left", seed=7) as session:
        for chunk in session:
            print(chunk.index, chunk.frames.shape)      # uint8 [frames, height, width, 3]
            if chunk.index == 4:
                session.update("a blue square")
            if chunk.index == 9:
                break

`AsyncSession` is the same with `async with`, `async for` and `await`. Both come back by themselves after a lost
connection or a restarted server, at exactly the next chunk, and check the digest chain as they go. What cannot be
mended is raised as one of turboserve.errors, with the server's code, message and hint.
"""

from __future__ import annotations

from turboserve.client.aio import AsyncSession
from turboserve.client.chunk import Chunk, PromptUpdate
from turboserve.client.retry import RetryPolicy
from turboserve.client.sync import Session

__all__ = ["AsyncSession", "Chunk", "PromptUpdate", "RetryPolicy", "Session"]
