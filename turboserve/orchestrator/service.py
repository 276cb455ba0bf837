"""What viewers got lately: the share of chunks with fewer denoise steps, which the autoscaler keeps near an aim, and
the share of late ones, of which there should be hardly any."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from turboserve.orchestrator.view import ClusterView

REDUCED_SHARE = 0.008  # of chunks, aimed at; at most 2 % is promised
SERVICE_FADE_S = 1800.0
SETTLED_S = 300.0


@dataclass(frozen=True, slots=True)
class Service:
    """What viewers got lately, fading. The `_seen` ones are the view's totals at the last look."""

    reduced_share: float = REDUCED_SHARE
    chunks_seen: int = 0
    reduced_seen: int = 0
    late_share: float = 0.0
    late_seen: int = 0
    since_s: float | None = None
    look_s: float = 0.0


def look(service: Service, view: ClusterView, now_s: float) -> Service:
    """Fade what was, add what is new. The first minutes, in which the fleet is found, do not count."""
    seen = view.observed
    since_s = now_s if service.since_s is None else service.since_s
    chunks = seen.chunks - service.chunks_seen
    if now_s - since_s < SETTLED_S or chunks < 0:
        return replace(
            service,
            chunks_seen=seen.chunks,
            reduced_seen=seen.reduced_chunks,
            late_seen=seen.late_chunks,
            since_s=since_s,
            look_s=now_s,
        )
    if chunks == 0:
        return service
    new = 1.0 - math.exp((service.look_s - now_s) / SERVICE_FADE_S)
    reduced = (seen.reduced_chunks - service.reduced_seen) / chunks
    late = min(1.0, (seen.late_chunks - service.late_seen) / chunks)
    return Service(
        reduced_share=service.reduced_share + new * (reduced - service.reduced_share),
        chunks_seen=seen.chunks,
        reduced_seen=seen.reduced_chunks,
        late_share=service.late_share + new * (late - service.late_share),
        late_seen=seen.late_chunks,
        since_s=since_s,
        look_s=now_s,
    )
