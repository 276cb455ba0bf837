"""Frames in parts: whole and right, or not at all."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.errors import CorruptState, ProtocolError
from turboserve.runtime import messages as m
from turboserve.runtime.frame_parts import UNSENT_BYTES_MAX, PartAssembler, PartSender
from turboserve.runtime.frame_ring import FrameHeader

SID = "b" * 26


class Peer:
    """A channel whose messages leave when the test says so."""

    def __init__(self):
        self.sent = []
        self.unsent_bytes = 0

    def send(self, message):
        assert len(m.encode(message)) <= m.MAX_MESSAGE_BYTES
        self.sent.append(m.decode(m.encode(message)))
        self.unsent_bytes += len(message.data)


def chunk(index, frames=2, height=700, width=900):
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (frames, height, width, 3), np.uint8)
    digest = hashlib.sha256(pixels.tobytes()).digest()
    header = FrameHeader(
        session_id=SID,
        worker_epoch=1,
        session_epoch=1,
        chunk_index=index,
        frames=frames,
        height=height,
        width=width,
        steps=4,
        prompt_version=1,
        digest=digest,
        digest_prev=b"",
    )
    return header, pixels


def ready(header):
    return m.ChunkReady(
        session_id=SID,
        epoch=1,
        chunk_index=header.chunk_index,
        digest=header.digest.hex(),
        digest_prev="",
        frames=header.frames,
        steps=4,
        prompt_version=1,
    )


def send_all(sender, peer, header, pixels):
    while not sender.push(header, pixels):
        peer.unsent_bytes = 0


def test_a_chunk_arrives_whole_and_a_slow_link_holds_it_back():
    peer = Peer()
    sender, parts = PartSender(lambda: peer), PartAssembler(16 << 20)
    header, pixels = chunk(0, frames=4)
    assert not sender.push(header, pixels)  # 7.6 MB: more than may wait
    assert UNSENT_BYTES_MAX < peer.unsent_bytes <= UNSENT_BYTES_MAX + m.PART_BYTES
    send_all(sender, peer, header, pixels)
    for part in peer.sent:
        parts.take(part)
    assert np.array_equal(parts.frames(ready(header)), pixels)
    assert parts.held_bytes == 0
    with pytest.raises(CorruptState):
        parts.frames(ready(header))


def test_a_new_channel_gets_the_whole_chunk_again():
    first, second = Peer(), Peer()
    now = [first]
    sender = PartSender(lambda: now[0])
    header, pixels = chunk(0, frames=4)
    assert not sender.push(header, pixels)
    now[0] = None
    assert not sender.push(header, pixels)
    now[0] = second
    send_all(sender, second, header, pixels)
    assert sum(len(one.data) for one in second.sent) == pixels.nbytes


def test_what_is_missing_changed_or_too_much_is_not_taken():
    peer = Peer()
    header, pixels = chunk(0)
    send_all(PartSender(lambda: peer), peer, header, pixels)
    parts = PartAssembler(pixels.nbytes)
    for part in peer.sent[:-1]:
        parts.take(part)
    with pytest.raises(CorruptState):
        parts.frames(ready(header))
    with pytest.raises(ProtocolError):
        parts.take(peer.sent[1])  # a part that was there
    other = PartAssembler(pixels.nbytes - 1)
    with pytest.raises(ProtocolError):
        other.take(peer.sent[0])
    wrong, parts = pixels.copy(), PartAssembler(pixels.nbytes)
    wrong[1, 2, 3, 0] ^= 1
    peer.sent.clear()
    send_all(PartSender(lambda: peer), peer, header, wrong)
    for part in peer.sent:
        parts.take(part)
    with pytest.raises(CorruptState, match="digest"):
        parts.frames(ready(header))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30))
def test_any_order_of_parts_is_taken_or_refused_and_memory_stays_bounded(order):
    peer = Peer()
    headers = []
    for index in range(3):
        header, pixels = chunk(index, frames=1, height=300, width=900)
        headers.append((header, pixels))
        send_all(PartSender(lambda: peer), peer, header, pixels)
    by_chunk = {i: [one for one in peer.sent if one.chunk_index == i] for i in range(3)}
    parts = PartAssembler(headers[0][1].nbytes)
    for index, which in order:
        try:
            if which < len(by_chunk[index]):
                parts.take(by_chunk[index][which])
            else:
                assert np.array_equal(parts.frames(ready(headers[index][0])), headers[index][1])
        except (ProtocolError, CorruptState):
            pass
        assert parts.held_bytes <= headers[0][1].nbytes
