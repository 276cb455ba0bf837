"""One session in this process, with the worker's own engine and no server: `turboserve generate` and `replay`.

Set up as a worker sets itself up (one thread, self-test before the first chunk), so that the same seed, prompts and
steps give the same digest chain here and there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch

from turboserve.errors import ConfigError, SessionPoisoned
from turboserve.model.interface import ChunkRequest, StreamingModel
from turboserve.model.registry import load_model
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import NumericsReport, check_numerics, set_up_determinism
from turboserve.runtime.worker_events import BrokenSession, FinishedChunk
from turboserve.session import new_session_id

SELF_TEST_SLOTS = 4


class Solo:
    """A loaded model and its engine. Sessions run one after the other."""

    def __init__(self, model: StreamingModel) -> None:
        self.model = model
        pool = KvPool(model.state_layout(), SELF_TEST_SLOTS, model.device)
        self.numerics: NumericsReport = check_numerics(model, pool)
        self._engine = Engine(model, pool)

    @classmethod
    def load(cls, name: str, device: str = "auto") -> Solo:
        """The named model on a device; `auto` takes a GPU where there is one."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here", expected="--device cpu, or a machine with a GPU")
        set_up_determinism(torch.device(device))
        return cls(load_model(name, device))

    def stream(self, seed: int, requests: Iterable[ChunkRequest], decoder: str = "") -> Iterator[FinishedChunk]:
        """Chunks in order, each handed out before its context pass runs; the slot is given back in every case."""
        engine, session_id, opened = self._engine, new_session_id(), False
        try:
            for request in requests:
                if not opened:
                    engine.open(session_id, seed, request.control, decoder=decoder)
                    opened = True
                engine.submit(session_id, request, time.monotonic() + self.model.spec.chunk_s)
                while engine.has_work:
                    for event in engine.run_pass():
                        if isinstance(event, BrokenSession):
                            raise SessionPoisoned(f"chunk {event.chunk_index} failed: {event.message}")
                        yield event
        finally:
            engine.close(session_id)
