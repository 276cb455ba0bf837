"""The counters and histograms every part of the server reports, as Prometheus text. A session's id is never a label."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

LATENCY_BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
SHORT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """One process's figures in a registry of their own, so that tests can have many."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"turboserve_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"turboserve_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"turboserve_{name}", about, labels, buckets=buckets, registry=registry)

        self.chunk_latency = histogram("chunk_latency_seconds", "Release of a chunk to its frames", LATENCY_BUCKETS)
        self.first_chunk_latency = histogram(
            "first_chunk_latency_seconds", "First attach to the frames of chunk 0", LATENCY_BUCKETS
        )
        self.chunks = counter("chunks", "Chunks of live streams, by whether they were on time", "on_time")
        self.on_time_share = gauge("on_time_share", "Share of live chunks that were on time, since the start")
        self.input_to_frame = histogram(
            "input_to_frame_seconds",
            "Receipt of a prompt to the first frames that show it",
            LATENCY_BUCKETS,
        )
        self.pauses = histogram(
            "stream_pause_seconds",
            "A viewer waits while its session moves: from the owner's stop, or the next chunk's release if later, to "
            "that chunk's frames; by migration, recovery, resume",
            LATENCY_BUCKETS,
            "kind",
        )
        self.stuck = counter("owners_stuck", "Owners that did not answer a credit or could not give a chunk again")
        self.batch_size = histogram(
            "batch_size", "Segments in the passes of a chunk, mean per chunk", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        )
        self.sessions = gauge("sessions", "Sessions by public state", "state")
        self.sessions_ended = counter("sessions_ended", "Sessions that ended")
        self.room = gauge("room", "Active sessions that ready workers could still take")
        self.viewers = gauge("viewers", "Open WebSocket connections")
        self.sent_bytes = counter("sent_bytes", "Media bytes sent to viewers", "format")
        self.encode_seconds = histogram("encode_seconds", "Encoding one chunk", SHORT_BUCKETS, "format")
        self.loop_lag = histogram("loop_lag_seconds", "How late the event loop wakes up", SHORT_BUCKETS)
        self.loop_blocked = counter("loop_blocked", "Times the event loop stood still for longer than 100 ms")
        self.ring_bytes = gauge("ring_bytes", "Frames held for viewers that have not acked them")
        self.frame_ring_bytes = gauge("frame_ring_bytes", "Frames that workers have written and we not yet read")
        self.storage_bytes = gauge("storage_bytes", "Recovery points: the arena's ledger and the disk's", "what")
        self.points = gauge("points", "Recovery points moved for want of room, since the controller's start", "what")
        self.log_commit = histogram("log_commit_seconds", "Append to durable", SHORT_BUCKETS)
        self.log_records = counter("log_records", "Records written to the input log")
        self.fenced = counter("chunks_fenced", "Chunks refused: an old epoch, or not the next one")
        self.refused_messages = counter("messages_refused", "Internal messages of the wrong kind")
        self.requests = counter("http_requests", "HTTP requests", "route", "status")
        self.request_seconds = histogram("http_request_seconds", "HTTP request to response", SHORT_BUCKETS, "route")
        self.closes = counter("websocket_closes", "WebSockets closed by us", "code")
        self._on_time = 0
        self._live = 0

    def measure(self, name: str, value: float) -> None:
        """One observation that the gateway's logic asked for."""
        match name:
            case "chunk_latency":
                self.chunk_latency.observe(value)
            case "first_chunk_latency":
                self.first_chunk_latency.observe(value)
            case "input_to_frame":
                self.input_to_frame.observe(value)
            case "batch_size":
                self.batch_size.observe(value)
            case "chunk_on_time" | "chunk_late":
                on_time = name == "chunk_on_time"
                self._live += 1
                self._on_time += on_time
                self.chunks.labels("true" if on_time else "false").inc()
                self.on_time_share.set(self._on_time / self._live)
            case "chunk_fenced":
                self.fenced.inc(value)
            case "pause_migration" | "pause_recovery" | "pause_resume":
                self.pauses.labels(name.removeprefix("pause_")).observe(value)
            case "owner_stuck":
                self.stuck.inc(value)
            case "session_ended":
                self.sessions_ended.inc(value)
            case "message_refused":
                self.refused_messages.inc(value)
            case _:
                raise ValueError(f"no metric is called {name}")

    @property
    def live_chunks(self) -> tuple[int, int]:
        """(on time, all) chunks of live streams since the start."""
        return self._on_time, self._live

    def set_states(self, counts: Mapping[str, int]) -> None:
        for state, count in counts.items():
            self.sessions.labels(state).set(count)

    def text(self) -> bytes:
        """The exposition that GET /metrics answers with."""
        return generate_latest(self.registry)
