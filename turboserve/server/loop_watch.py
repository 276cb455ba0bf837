"""Watches that nothing blocks the event loop: how late it wakes up, and, while it stands still, what holds it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from typing import Any

from turboserve.metrics import Metrics

BEAT_S = 0.05
BLOCKED_S = 0.1
SAY_EVERY_S = 10.0


class LoopWatch:
    """The loop beats; a thread looks at the beat and, when it is overdue, at the loop thread's stack."""

    def __init__(self, metrics: Metrics, log: Any) -> None:
        self._metrics = metrics
        self._log = log
        self._beat_s = time.monotonic()
        self._loop_thread = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="loop-watch", daemon=True)

    async def run(self) -> None:
        """Beat until cancelled."""
        self._thread.start()
        try:
            while True:
                asked_s = time.monotonic()
                await asyncio.sleep(BEAT_S)
                self._beat_s = time.monotonic()
                self._metrics.loop_lag.observe(max(0.0, self._beat_s - asked_s - BEAT_S))
        finally:
            self._stop.set()

    def _look(self) -> None:
        seen_s = said_s = 0.0
        while not self._stop.wait(BEAT_S):
            now_s, beat_s = time.monotonic(), self._beat_s
            if now_s - beat_s < BEAT_S + BLOCKED_S or beat_s == seen_s:
                continue
            seen_s = beat_s  # one stall is counted once, however long it lasts
            self._metrics.loop_blocked.inc()
            if now_s - said_s >= SAY_EVERY_S:
                said_s = now_s
                frame = sys._current_frames().get(self._loop_thread)
                stack = traceback.format_stack(frame, limit=6) if frame is not None else []
                self._log.warning("event loop stands still", for_ms=round((now_s - beat_s) * 1000), at="".join(stack))
