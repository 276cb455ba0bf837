"""The frame ring's contract, over both twins and across them (C++ at one end, Python at the other)."""

from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboserve.digest import next_digest
from turboserve.errors import ConfigError, Conflict, CorruptState, InvalidRequest, LayoutMismatch
from turboserve.runtime import frame_ring
from turboserve.runtime.frame_ring import FrameHeader, attach_consumer, attach_producer, create

TWINS = ["python"] + (["native"] if frame_ring.IMPLEMENTATION == "native" else [])
PAIRS = [(producer, consumer) for producer in TWINS for consumer in TWINS]
SESSION = "abcdefghijklmnopqrstuvwxyz"


def chunk(index: int, shape=(2, 3, 5), *, epoch: int = 1, seed: int = 0) -> tuple[FrameHeader, np.ndarray]:
    """A chunk with random pixels and a right digest."""
    pixels = np.random.default_rng([seed, index]).integers(0, 256, (*shape, 3), np.uint8)
    digest_prev = bytes([index % 251]) * 32 if index else b""
    header = FrameHeader(
        session_id=SESSION,
        worker_epoch=epoch,
        session_epoch=7,
        chunk_index=index,
        frames=shape[0],
        height=shape[1],
        width=shape[2],
        steps=4,
        prompt_version=index // 3,
        digest=bytes.fromhex(next_digest(digest_prev.hex(), pixels)),
        digest_prev=digest_prev,
        flags=index % 2,
    )
    return header, pixels


@contextmanager
def ring(pair, capacity_bytes=8192, epoch=1):
    fd = create(capacity_bytes, implementation=pair[0])
    try:
        with (
            attach_producer(fd, worker_epoch=epoch, implementation=pair[0]) as producer,
            attach_consumer(fd, implementation=pair[1]) as consumer,
        ):
            yield fd, producer, consumer
    finally:
        os.close(fd)


@pytest.fixture(params=PAIRS, ids="-to-".join)
def pair(request):
    return request.param


def test_native_twin_is_tested_where_there_is_a_compiler():
    if os.environ.get("TURBOSERVE_EXPECT_NATIVE") == "1":  # set where it must have been built
        assert frame_ring.IMPLEMENTATION == "native", frame_ring._why_not


def test_chunks_come_out_as_they_went_in(pair):
    with ring(pair) as (_, producer, consumer):
        assert consumer.pop() is None and consumer.peek() is None
        sent = [chunk(index) for index in range(3)]
        for header, pixels in sent:
            assert producer.push(header, pixels)
        for header, pixels in sent:
            assert consumer.peek() == header
            record = consumer.pop()
            assert record.header == header
            np.testing.assert_array_equal(record.array(), pixels)
        assert consumer.pop() is None
        assert consumer.used_bytes == producer.used_bytes == 0


def test_any_contiguous_buffer_is_taken_and_others_are_refused(pair):
    with ring(pair) as (_, producer, consumer):
        header, pixels = chunk(0)
        for payload in (pixels, pixels.tobytes(), bytearray(pixels.tobytes()), memoryview(pixels)):
            assert producer.push(header, payload)
            assert consumer.pop().pixels == pixels.tobytes()
        with pytest.raises((ValueError, BufferError, TypeError)):
            producer.push(header, np.ascontiguousarray(pixels.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3))
        with pytest.raises(InvalidRequest, match="of pixels"):
            producer.push(header, pixels[:1])


def test_full_ring_says_false_and_counts_its_free_bytes(pair):
    with ring(pair, capacity_bytes=4096) as (_, producer, consumer):
        header, pixels = chunk(0, (1, 20, 20))
        record = frame_ring.record_bytes(header.payload_bytes)
        pushed = 0
        while producer.push(header, pixels):
            pushed += 1
            assert producer.used_bytes == consumer.used_bytes == pushed * record
            assert producer.free_bytes == 4096 - pushed * record
        assert pushed == 4096 // record
        assert producer.push(header, pixels, timeout_s=0.01) is False
        consumer.pop()
        assert producer.push(header, pixels)


def test_exact_fit_fills_the_last_byte(pair):
    with ring(pair, capacity_bytes=4096) as (_, producer, consumer):
        header, pixels = chunk(0, (1, 1, (4096 - 192) // 3))
        for _ in range(3):
            assert producer.push(header, pixels)
            assert producer.free_bytes == 0
            consumer.pop()


def test_chunk_larger_than_the_ring_is_an_error_not_a_wait(pair):
    with ring(pair, capacity_bytes=4096) as (_, producer, _consumer):
        header, pixels = chunk(0, (1, 40, 40))
        with pytest.raises(ConfigError, match="never fits"):
            producer.push(header, pixels, timeout_s=60)


def test_bounded_wait_ends_when_the_other_side_acts(pair):
    with ring(pair, capacity_bytes=4096) as (_, producer, consumer):
        header, pixels = chunk(0, (1, 30, 30))
        assert producer.push(header, pixels)
        assert not producer.push(header, pixels)
        popper = threading.Timer(0.05, consumer.pop)
        popper.start()
        assert producer.push(header, pixels, timeout_s=10)
        popper.join()
        assert consumer.pop(timeout_s=10).header == header
        assert consumer.pop(timeout_s=0.02) is None
        pusher = threading.Timer(0.05, producer.push, (header, pixels))
        pusher.start()
        assert consumer.pop(timeout_s=10).header == header
        pusher.join()


def test_pop_into_a_given_buffer(pair):
    with ring(pair) as (_, producer, consumer):
        header, pixels = chunk(4)
        assert consumer.pop_into(bytearray(10)) is None
        producer.push(header, pixels)
        with pytest.raises(ValueError, match="next payload"):
            consumer.pop_into(bytearray(header.payload_bytes - 1))
        target = np.zeros(header.payload_bytes + 5, np.uint8)
        assert consumer.pop_into(target) == header
        np.testing.assert_array_equal(target[:-5], pixels.ravel())
        assert not target[-5:].any()
        with pytest.raises((TypeError, BufferError)):
            producer.push(header, pixels)
            consumer.pop_into(bytes(header.payload_bytes))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.one_of(st.integers(1, 1300), st.none()), min_size=1, max_size=60),
    capacity_blocks=st.integers(64, 90),
)
@pytest.mark.parametrize("twins", PAIRS, ids="-to-".join)
def test_behaves_like_a_bounded_queue(twins, steps, capacity_blocks):
    """Random sizes (a number pushes that many pixels, None pops) against a deque with the same bound."""
    with ring(twins, capacity_bytes=64 * capacity_blocks) as (_, producer, consumer):
        model: deque = deque()
        used = 0
        for index, width in enumerate(steps):
            if width is None:
                record = consumer.pop()
                expected = model.popleft() if model else None
                assert (record is None) == (expected is None)
                if record:
                    assert record.header == expected[0] and record.pixels == expected[1].tobytes()
                    used -= frame_ring.record_bytes(record.header.payload_bytes)
            else:
                header, pixels = chunk(index, (1, 1, width))
                fits = used + frame_ring.record_bytes(header.payload_bytes) <= 64 * capacity_blocks
                assert producer.push(header, pixels) is fits
                if fits:
                    model.append((header, pixels))
                    used += frame_ring.record_bytes(header.payload_bytes)
            assert consumer.used_bytes == producer.used_bytes == used


def test_a_newer_worker_takes_over_and_the_older_one_is_fenced(pair):
    with ring(pair, epoch=3) as (fd, producer, consumer):
        header, pixels = chunk(0, epoch=3)
        producer.push(header, pixels)
        with pytest.raises(Conflict, match="worker epoch 3"):
            attach_producer(fd, worker_epoch=3, implementation=pair[0])
        with attach_producer(fd, worker_epoch=4, implementation=pair[1]) as successor:
            with pytest.raises(Conflict, match="taken over by worker epoch 4"):
                producer.push(header, pixels)
            newer, newer_pixels = chunk(1, epoch=4)
            assert successor.push(newer, newer_pixels)
        assert [consumer.pop().header.worker_epoch for _ in range(2)] == [3, 4]
        with pytest.raises(InvalidRequest, match="worker epoch 9"):
            producer.push(chunk(0, epoch=9)[0], pixels)


def test_a_new_gateway_goes_on_at_the_first_chunk_not_popped(pair):
    with ring(pair) as (fd, producer, consumer):
        for index in range(3):
            producer.push(*chunk(index))
        consumer.pop()
        consumer.close()
        with attach_consumer(fd, implementation=pair[0]) as successor:
            assert [successor.pop().header.chunk_index for _ in range(2)] == [1, 2]


def test_the_ring_opens_through_proc(pair):
    with ring(pair) as (fd, producer, _consumer):
        other = os.open(f"/proc/{os.getpid()}/fd/{fd}", os.O_RDWR)
        try:
            with attach_consumer(other, implementation=pair[1]) as consumer:
                producer.push(*chunk(0))
                assert consumer.pop().header.chunk_index == 0
        finally:
            os.close(other)


@pytest.mark.parametrize("twin", TWINS)
def test_half_a_record_is_never_seen(twin):
    """The bytes a producer leaves when it dies after k of them

    nothing is there, and a successor writes over them.
    """
    header, pixels = chunk(0)
    record = header.pack() + pixels.tobytes()
    for dead_at in range(len(record)):
        fd = create(4096, implementation=twin)
        os.pwrite(fd, record[:dead_at], 4096)
        with (
            attach_producer(fd, worker_epoch=2, implementation=twin) as producer,
            attach_consumer(fd, implementation=twin) as consumer,
        ):
            assert consumer.pop() is None
            assert producer.push(chunk(0, epoch=2)[0], pixels)
            assert consumer.pop().array().tolist() == pixels.tolist()
        os.close(fd)


@pytest.mark.parametrize("twin", TWINS)
def test_every_flipped_byte_of_a_record_is_found(twin):
    with ring((twin, twin), capacity_bytes=4096) as (fd, producer, consumer):
        for offset in range(192 + 2 * 3 * 5 * 3):
            position = _position(fd, 128)
            producer.push(*chunk(1))
            at = 4096 + (position + offset) % 4096
            byte = os.pread(fd, 1, at)
            os.pwrite(fd, bytes([byte[0] ^ 0x10]), at)
            with pytest.raises(CorruptState):
                consumer.pop()
            consumer.discard()
            assert consumer.used_bytes == 0
        assert producer.push(*chunk(2))
        assert consumer.pop().header.chunk_index == 2


def _position(fd: int, at: int) -> int:
    return struct.unpack("<Q", os.pread(fd, 8, at))[0]


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("head", [64, 1, 8192 + 64, 2**64 - 64], ids=["in-record", "odd", "too-far", "huge"])
def test_impossible_counters_are_found(twin, head):
    with ring((twin, twin)) as (fd, producer, consumer):
        producer.push(*chunk(0))
        os.pwrite(fd, struct.pack("<Q", head), 64)
        with pytest.raises(CorruptState):
            consumer.pop()
        with pytest.raises((CorruptState, Conflict)):
            producer.push(*chunk(1))


@pytest.mark.parametrize("twin", TWINS)
def test_a_valid_record_of_an_older_lap_is_found(twin):
    with ring((twin, twin), capacity_bytes=4096) as (fd, producer, consumer):
        header, pixels = chunk(0, (1, 1, (2048 - 192) // 3))
        for _ in range(2):
            producer.push(header, pixels)
            consumer.pop()
        os.pwrite(fd, struct.pack("<Q", 4096 + 2048), 64)  # as if committed, over the bytes of the lap before
        with pytest.raises(CorruptState, match="another lap"):
            consumer.pop()


@pytest.mark.parametrize("twin", TWINS)
def test_a_lying_length_is_held_against_the_head(twin):
    """A record whose header verifies but whose payload length reaches past what was committed."""
    for length in (2**64 - 1, 2**63, 4096, 1000):
        with ring((twin, twin), capacity_bytes=4096) as (fd, producer, consumer):
            producer.push(*chunk(0))
            header = bytearray(os.pread(fd, 192, 4096))
            struct.pack_into("<Q", header, 8, length)
            struct.pack_into("<I", header, 188, zlib.crc32(header[:188]))
            os.pwrite(fd, header, 4096)
            with pytest.raises(CorruptState, match="past the head"):
                consumer.pop()


@pytest.mark.parametrize("read", ["peek", "pop"])
@pytest.mark.parametrize("twin", TWINS)
def test_reading_goes_on_after_a_corrupt_record(twin, read, caplog):
    with ring((twin, twin)) as (fd, producer, consumer):
        producer.push(*chunk(0))
        producer.push(*chunk(1))
        os.pwrite(fd, b"?", 4096 + 20)  # in the first header: the second record cannot be found either
        with pytest.raises(CorruptState, match="does not verify"):
            getattr(consumer, read)()
        assert "dropping" in caplog.text
        assert consumer.peek() is None and producer.free_bytes == producer.capacity_bytes
        producer.push(*chunk(2))
        assert consumer.pop().header.chunk_index == 2


@pytest.mark.parametrize("twin", TWINS)
def test_wrong_pixels_cost_their_own_chunk_only(twin):
    with ring((twin, twin)) as (fd, producer, consumer):
        producer.push(*chunk(0))
        producer.push(*chunk(1))
        os.pwrite(fd, b"????", 4096 + 192)
        with pytest.raises(CorruptState, match="digest"):
            consumer.pop()
        assert consumer.pop().header.chunk_index == 1


@pytest.mark.parametrize("twin", TWINS)
def test_only_a_whole_sealed_ring_of_this_layout_attaches(twin, tmp_path):
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(8192 + 4096)
        with pytest.raises(ConfigError, match="no frame ring"):
            attach_consumer(file.fileno(), implementation=twin)
    fd = create(8192, implementation=twin)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    geometry = os.pread(fd, 28, 0)
    os.pwrite(fd, b"X", 3)
    with pytest.raises(CorruptState, match="control page"):
        attach_consumer(fd, implementation=twin)
    newer = geometry[:8] + struct.pack("<I", 2) + geometry[12:]
    os.pwrite(fd, newer + struct.pack("<I", zlib.crc32(newer)), 0)
    with pytest.raises(LayoutMismatch):
        attach_producer(fd, worker_epoch=1, implementation=twin)
    os.close(fd)
    for capacity in (0, 100, 4097, 2**41):
        with pytest.raises(ConfigError, match="capacity"):
            create(capacity, implementation=twin)


@pytest.mark.parametrize("twin", TWINS)
def test_a_closed_end_says_so(twin):
    with ring((twin, twin)) as (_, producer, consumer):
        producer.close()
        consumer.close()
        producer.close()
        with pytest.raises(Conflict, match="closed"):
            producer.push(*chunk(0))
        with pytest.raises(Conflict, match="closed"):
            consumer.pop()


@pytest.mark.parametrize("twin", TWINS)
def test_onlookers_may_read_and_close_while_another_thread_copies(twin):
    """A metrics reader sees a bounded figure, and a close in mid-copy lets the copy end before it unmaps."""
    header, pixels = chunk(0, (1, 500, 2000))
    fd = create(8 << 20, implementation=twin)
    producer = attach_producer(fd, worker_epoch=1, implementation=twin)
    consumer = attach_consumer(fd, implementation=twin)
    failures: list[BaseException] = []

    def run(act) -> None:
        try:
            while True:
                act()
        except Conflict as error:
            if "closed" not in str(error):
                failures.append(error)
        except BaseException as error:
            failures.append(error)

    acts = (lambda: producer.push(header, pixels), lambda: consumer.pop(verify=False))
    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for _ in range(300):
        assert 0 <= producer.used_bytes <= 8 << 20
        assert 0 <= consumer.free_bytes <= 8 << 20
        time.sleep(0.0003)
    producer.close()
    consumer.close()
    for thread in threads:
        thread.join(30)
    assert not failures and not any(thread.is_alive() for thread in threads)
    with pytest.raises(Conflict, match="closed"):
        _ = consumer.used_bytes
    os.close(fd)


def test_twins_write_the_same_bytes():
    images = set()
    for twin in TWINS:
        with ring((twin, twin), capacity_bytes=4096) as (fd, producer, consumer):
            for index in range(9):  # wraps
                producer.push(*chunk(index, (1, 11, 17)))
                if index % 3:
                    consumer.pop()
            images.add(os.pread(fd, 8192, 0))
    assert len(images) == 1


@pytest.mark.parametrize("field", ["session_id", "digest", "digest_prev", "steps"])
def test_a_header_that_does_not_fit_is_refused(field):
    wrong = {"session_id": "short", "digest": b"x", "digest_prev": b"x" * 31, "steps": 2**32}
    header, _ = chunk(1)
    values = {name: getattr(header, name) for name in header.__slots__} | {field: wrong[field]}
    with pytest.raises(InvalidRequest):
        FrameHeader(**values).pack()
