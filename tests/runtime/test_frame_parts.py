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
from turboserve.video.encoded import Encoded, encoded_bytes_max

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


def ready(header, **changes):
    fields = {
        "session_id": SID,
        "epoch": 1,
        "chunk_index": header.chunk_index,
        "digest": header.digest.hex(),
        "digest_prev": "",
        "frames": header.frames,
        "steps": 4,
        "prompt_version": 1,
    }
    return m.ChunkReady(**(fields | changes))


def raw(pixels):
    return Encoded("raw", pixels.tobytes())


def send_all(sender, peer, header, chunk):
    chunk = chunk if isinstance(chunk, Encoded) else raw(chunk)
    while not sender.push(header, chunk):
        peer.unsent_bytes = 0


def part(**changes):
    """The first part of a chunk of two frames of 4x4 as h264, 1000 bytes in all."""
    fields = {
        "session_id": SID,
        "epoch": 1,
        "chunk_index": 0,
        "offset": 0,
        "frames": 2,
        "height": 4,
        "width": 4,
        "format": "h264",
        "total_bytes": 1000,
        "data": bytes(600),
    }
    return m.FramePart(**(fields | changes))


def test_a_chunk_arrives_whole_and_a_slow_link_holds_it_back():
    peer = Peer()
    sender, parts = PartSender(lambda: peer), PartAssembler(16 << 20)
    header, pixels = chunk(0, frames=4)
    sending = raw(pixels)
    assert not sender.push(header, sending)  # 7.6 MB: more than may wait
    assert UNSENT_BYTES_MAX < peer.unsent_bytes <= UNSENT_BYTES_MAX + m.PART_BYTES
    send_all(sender, peer, header, sending)
    for one in peer.sent:
        parts.take(one)
    assert np.array_equal(parts.chunk(ready(header)), pixels)
    assert parts.held_bytes == 0
    with pytest.raises(CorruptState):
        parts.chunk(ready(header))


def test_a_new_channel_gets_the_whole_chunk_again():
    first, second = Peer(), Peer()
    now = [first]
    sender = PartSender(lambda: now[0])
    header, pixels = chunk(0, frames=4)
    sending = raw(pixels)
    assert not sender.push(header, sending)
    now[0] = None
    assert not sender.push(header, sending)
    now[0] = second
    send_all(sender, second, header, sending)
    assert sum(len(one.data) for one in second.sent) == pixels.nbytes


def test_what_is_missing_changed_or_too_much_is_not_taken():
    peer = Peer()
    header, pixels = chunk(0)
    send_all(PartSender(lambda: peer), peer, header, pixels)
    parts = PartAssembler(pixels.nbytes)
    for one in peer.sent[:-1]:
        parts.take(one)
    with pytest.raises(CorruptState):
        parts.chunk(ready(header))
    with pytest.raises(ProtocolError):
        parts.take(peer.sent[1])  # a part that was there
    other = PartAssembler(pixels.nbytes - 1)
    with pytest.raises(ProtocolError):
        other.take(peer.sent[0])
    wrong, parts = pixels.copy(), PartAssembler(pixels.nbytes)
    wrong[1, 2, 3, 0] ^= 1
    peer.sent.clear()
    send_all(PartSender(lambda: peer), peer, header, wrong)
    for one in peer.sent:
        parts.take(one)
    with pytest.raises(CorruptState, match="digest"):
        parts.chunk(ready(header))


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
                assert np.array_equal(parts.chunk(ready(headers[index][0])), headers[index][1])
        except (ProtocolError, CorruptState):
            pass
        assert parts.held_bytes <= headers[0][1].nbytes


def test_an_encoded_chunk_arrives_as_it_left():
    peer, parts = Peer(), PartAssembler(16 << 20)
    header, _ = chunk(3)
    data = np.random.default_rng(0).bytes(m.PART_BYTES + 1)
    send_all(PartSender(lambda: peer), peer, header, Encoded("h264", data))
    assert [len(one.data) for one in peer.sent] == [m.PART_BYTES, 1]
    for one in peer.sent:
        parts.take(one)
    assert parts.chunk(ready(header, format="h264")) == data
    assert parts.held_bytes == 0


def test_the_same_chunk_in_another_format_begins_anew():
    """What was sent of the first is not the beginning of the second."""
    peer, parts = Peer(), PartAssembler(16 << 20)
    sender = PartSender(lambda: peer)
    header, pixels = chunk(0, frames=4)
    assert not sender.push(header, raw(pixels))
    peer.unsent_bytes = 0
    send_all(sender, peer, header, Encoded("jpeg", b"j" * 700_000))
    for one in peer.sent:
        parts.take(one)
    assert parts.chunk(ready(header, format="jpeg")) == b"j" * 700_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_bytes": 599}, "from 0 on"),  # more than was announced
        ({"total_bytes": encoded_bytes_max("h264", 2, 4, 4) + 1}, "as h264"),
        ({"format": "raw"}, "as raw"),  # frames are as long as their shape says, not longer
        ({"format": "raw", "total_bytes": 95, "data": bytes(95)}, "as raw"),
        ({"frames": 4096, "height": 16384, "width": 16384}, "of frames"),
        ({"offset": 600}, "from 0 on"),
    ],
)
def test_a_first_part_that_cannot_be_is_refused(changes, said):
    parts = PartAssembler(1 << 20)
    with pytest.raises(ProtocolError, match=said):
        parts.take(part(**changes))
    assert parts.held_bytes <= 1000


@pytest.mark.parametrize(
    "changes",
    [{"format": "jpeg"}, {"total_bytes": 1001}, {"frames": 3}, {"chunk_index": 1}, {"offset": 599}, {"offset": 601}],
    ids=str,
)
def test_parts_of_different_chunks_do_not_mix(changes):
    parts = PartAssembler(1 << 20)
    parts.take(part())
    with pytest.raises(ProtocolError):
        parts.take(part(**{"offset": 600, "data": bytes(400)} | changes))
    parts.take(part(offset=600, data=bytes(400)))  # the right one is still taken


def test_a_chunk_must_be_announced_as_what_came():
    header, _ = chunk(0)
    for changes in ({"format": "mp4"}, {"format": "raw"}, {"format": "h264", "frames": 1}):
        parts = PartAssembler(16 << 20)
        parts.take(part(data=bytes(1000)))
        with pytest.raises(ProtocolError, match="announced as"):
            parts.chunk(ready(header, **changes))


def test_an_unknown_format_is_no_message():
    good = m.encode(part())
    assert b"h264" in good
    with pytest.raises(ProtocolError, match="format"):
        m.decode(good.replace(b"h264", b"h266"))
