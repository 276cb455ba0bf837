"""What viewers got lately: the share of chunks with fewer denoise steps, which the autoscaler keeps near an aim, and
the share of late ones, of which there should be hardly any."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from turboserve.orchestrator.view import ClusterView

REDUCED_SHARE = 0.008  # of chunks, aimed at; at most 2 % is promised
SERVICE_FADE_S = 1800.0
SETTLED_S = 300.0
LATE_SHARE = 0.003  # of chunks, lately: thrice what is allowed in all; below it may be chance
CROWD_LATE_SHARE = 0.1  # of one look's chunks: a crowd has no room
CROWD_GAP_S = 60.0  # between one crowd and the next


@dataclass(frozen=True, slots=True)
class Service:
    """What viewers got lately, fading. The `_seen` ones are the view's totals at the last look."""

    reduced_share: float = REDUCED_SHARE
    chunks_seen: int = 0
    reduced_seen: int = 0
    late_share: float = 0.0
    late_seen: int = 0
    crowds: int = 0  # that came to too few workers, until the late share is forgotten
    crowd_s: float = -CROWD_GAP_S  # when one last lacked room
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
    late_share = service.late_share + new * (late - service.late_share)
    crowds, crowd_s = service.crowds if late_share > LATE_SHARE else 0, service.crowd_s
    if late >= CROWD_LATE_SHARE:
        crowds += now_s - crowd_s >= CROWD_GAP_S or crowds == 0
        crowd_s = now_s
    return Service(
        reduced_share=service.reduced_share + new * (reduced - service.reduced_share),
        chunks_seen=seen.chunks,
        reduced_seen=seen.reduced_chunks,
        late_share=late_share,
        late_seen=seen.late_chunks,
        crowds=crowds,
        crowd_s=crowd_s,
        since_s=since_s,
        look_s=now_s,
    )
