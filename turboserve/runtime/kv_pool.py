"""Memory of a worker's sessions: one slab per declared field, one slot per session, every byte accounted for.

A slab is one tensor [slots, *field.shape]; a session holds the same slot number in every slab, so there is a single
free list and a session's state is a view. Fields that only sessions with a certain decoder have share one more slab:
each decoder's lie there one behind the other, and a slot has room for the largest set. Promise P3 (bytes are
conserved: free + held == total) is checked after every change, not sampled. A slot is zeroed when it is given back, so
nothing of one session can be read by another.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import torch

from turboserve.errors import ConfigError, Conflict, NotFound, PoolExhausted, StateError
from turboserve.model.interface import Field, Tier, session_layout, state_bytes

WORKSPACE_BYTES_MAX = 8 << 30


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a declared field; StateError for a name torch does not have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"field dtype {name!r}", expected="a torch dtype name, such as float32")
    return dtype


def slots_within(wanted: int, session_bytes: int, free_bytes: int, total_bytes: int) -> int:
    """How many of the slots wanted fit a device that has its weights already, workspace kept free for passes and decode
    (a tenth of the device, 8 GB at most). ConfigError when not even one fits."""
    workspace = min(total_bytes // 10, WORKSPACE_BYTES_MAX)
    fit = max(0, free_bytes - workspace) // max(1, session_bytes)
    if fit < 1:
        raise ConfigError(
            f"no session fits: one takes {session_bytes} bytes, {free_bytes} are free and {workspace} of them kept",
            hint="a light decoder, a smaller size, or the text encoder on the CPU leave more room",
        )
    return min(wanted, fit)


class KvPool:
    """Slots for `slot_count` sessions of one layout, DEVICE fields on `device` and HOST fields in host memory.

    All memory is taken here and never grows: admission is a matter of free slots alone.
    """

    def __init__(self, layout: Sequence[Field], slot_count: int, device: torch.device | str = "cpu") -> None:
        if slot_count < 1:
            raise StateError(f"a pool of {slot_count} slots", expected="at least 1")
        if len({one.name for one in layout}) != len(layout):
            raise StateError("a layout names a field twice")
        self.layout = tuple(layout)
        self.slot_count = slot_count
        self.device = torch.device(device)
        self._slabs = {one.name: self._slab(one.tier, one.shape, one.dtype) for one in self.layout if not one.decoder}
        own = [one for one in self.layout if one.decoder]
        self._offsets = _offsets(own)
        self._shared = {
            tier: self._slab(tier, (state_bytes([one for one in own if one.tier is tier]),), "uint8")
            for tier in sorted({one.tier for one in own})
        }
        # The lowest free slot is given first: warm memory, and the same slots in a repeated run.
        self._free = list(range(slot_count))
        self._held: dict[str, int] = {}

    def _slab(self, tier: Tier, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        on_host = tier is Tier.HOST
        pinned = on_host and self.device.type == "cuda"
        return torch.zeros(
            (self.slot_count, *shape),
            dtype=torch_dtype(dtype),
            device="cpu" if on_host else self.device,
            pin_memory=pinned,
        )

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def held(self) -> Mapping[str, int]:
        """Slot of every session that holds one."""
        return dict(self._held)

    def total_bytes(self, tier: Tier | None = None) -> int:
        """Bytes of all slabs of one tier, or of both."""
        return self.slot_count * state_bytes(self.layout, tier)

    def held_bytes(self, tier: Tier | None = None) -> int:
        """Bytes of the slots that sessions hold."""
        return len(self._held) * state_bytes(self.layout, tier)

    def free_bytes(self, tier: Tier | None = None) -> int:
        return len(self._free) * state_bytes(self.layout, tier)

    def acquire(self, session_id: str) -> int:
        """Give a zeroed slot to a session. PoolExhausted when none is free, Conflict when it has one."""
        if session_id in self._held:
            raise Conflict(f"session {session_id} already holds slot {self._held[session_id]}")
        if not self._free:
            raise PoolExhausted(
                f"all {self.slot_count} slots are held", hint="close or suspend a session, or add a worker"
            )
        slot = heapq.heappop(self._free)
        self._held[session_id] = slot
        self.check()
        return slot

    def release(self, session_id: str) -> None:
        """Take a session's slot back and wipe it. NotFound when it holds none."""
        slot = self._held.get(session_id)
        if slot is None:
            raise NotFound(f"session {session_id} holds no slot")
        for slab in (*self._slabs.values(), *self._shared.values()):
            slab[slot].zero_()
        del self._held[session_id]
        heapq.heappush(self._free, slot)
        self.check()

    def tensors(self, session_id: str, decoder: str = "") -> dict[str, torch.Tensor]:
        """A session's view of its fields, by name; without a decoder, of those that all sessions have."""
        slot = self._held.get(session_id)
        if slot is None:
            raise NotFound(f"session {session_id} holds no slot")
        return {one.name: self._view(one, slot) for one in session_layout(self.layout, decoder)}

    def _view(self, one: Field, slot: int) -> torch.Tensor:
        if not one.decoder:
            return self._slabs[one.name][slot]
        begin = self._offsets[one.name]
        return self._shared[one.tier][slot, begin : begin + one.nbytes].view(torch_dtype(one.dtype)).view(one.shape)

    def check(self) -> None:
        """P3 over slots and bytes; StateError says what does not add up. Cheap: no tensor is touched."""
        slots = sorted([*self._free, *self._held.values()])
        if slots != list(range(self.slot_count)):
            raise StateError(f"slots lost or doubled: free {sorted(self._free)}, held {self._held}")
        for tier in Tier:
            slabs = [self._slabs[one.name] for one in self.layout if one.tier is tier and not one.decoder]
            slabs += [slab for shared, slab in self._shared.items() if shared is tier]
            allocated = sum(math.prod(slab.shape) * slab.element_size() for slab in slabs)
            if not self.free_bytes(tier) + self.held_bytes(tier) == self.total_bytes(tier) == allocated:
                raise StateError(f"{tier} bytes do not add up", expected=f"{allocated} bytes free or held")


def _offsets(fields: Sequence[Field]) -> dict[str, int]:
    """Where the decoders' fields begin in their shared place, each decoder's from 0 on. StateError for one that would
    not lie at a multiple of its items: padding would be bytes that no layout declares."""
    ends: dict[tuple[Tier, str], int] = {}
    begins = {}
    for one in fields:
        item = torch_dtype(one.dtype).itemsize
        begins[one.name] = begin = ends.get((one.tier, one.decoder), 0)
        ends[one.tier, one.decoder] = begin + one.nbytes
        if begin % item or state_bytes([other for other in fields if other.tier is one.tier]) % item:
            raise StateError(f"field {one.name} would begin in the middle of an item", expected=f"multiples of {item}")
    return begins
