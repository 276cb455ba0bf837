"""The gateway's log: what is durable is read back, whatever was torn behind it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from turboserve.errors import ConfigError, CorruptState
from turboserve.server.gateway import lock_folder
from turboserve.server.input_log import MAGIC, InputLog, frame, parse_log, read_log, rewrite_log
from turboserve.server.log_records import Bound, Ended, Frontier, Opened, Rotated, encode_record, replay

SIDS = ["a" * 26, "b" * 26]


def opened(sid: str, **more) -> Opened:
    return Opened(
        sid=sid,
        tenant="t",
        model="shapes",
        model_hash="h",
        seed=1,
        width=96,
        height=96,
        steps=4,
        format="raw",
        prompt="a red circle",
        prompt_switch="swap",
        token_hash="0" * 64,
        created_unix_s=1.5,
        **more,
    )


def story() -> list:
    records: list = [opened(SIDS[0]), opened(SIDS[1], max_chunks=9, decoder="light")]
    for index in range(6):
        prompt = {0: "a red circle", 3: "a blue square"}.get(index)
        records.append(
            Bound(sid=SIDS[0], index=index, steps=4 if index < 5 else 3, version=1 + (index >= 3), prompt=prompt)
        )
        records.append(Frontier(sid=SIDS[0], delivered=index, digest=f"{index:064x}"))
    records.append(Rotated(sid=SIDS[0], token_hash="1" * 64, token_hash_prev="0" * 64))
    records.append(Ended(sid=SIDS[1], reason="deleted"))
    return records


def test_replay_tells_what_happened() -> None:
    live = replay(story())
    assert list(live) == [SIDS[0]]
    one = live[SIDS[0]]
    assert (one.bound, one.delivered, one.token_hash, one.token_hash_prev) == (6, 5, "1" * 64, "0" * 64)
    assert one.inputs == [(0, 1, "a red circle"), (3, 2, "a blue square")]
    assert one.steps == [(0, 4), (5, 3)]
    assert replay(one.as_records())[SIDS[0]] == one


def test_every_truncation_gives_a_prefix() -> None:
    records = story()
    whole = MAGIC + b"".join(frame(encode_record(one)) for one in records)
    ends = [len(MAGIC)]
    for one in records:
        ends.append(ends[-1] + len(frame(encode_record(one))))
    for length in range(len(whole) + 1):
        found, torn = parse_log(whole[:length], "log")
        count = sum(1 for end in ends if end <= length) - 1 if length >= len(MAGIC) else 0
        assert found == records[:count], length
        assert torn == (length - ends[count] if length >= len(MAGIC) else length)


def test_a_flipped_bit_ends_the_log_there() -> None:
    records = story()[:4]
    whole = bytearray(MAGIC + b"".join(frame(encode_record(one)) for one in records))
    for at in range(len(MAGIC), len(whole)):
        for bit in (0, 7):
            whole[at] ^= 1 << bit
            found, torn = parse_log(bytes(whole), "log")
            assert found == records[: len(found)] and torn > 0
            whole[at] ^= 1 << bit


def test_another_file_is_not_taken_for_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 100)
    with pytest.raises(CorruptState):
        read_log(tmp_path / "log")


def test_appends_are_durable_in_order_and_committed_in_groups(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rewrite_log(path, [])
    seen: list[int] = []
    syncs = 0
    done = threading.Event()

    def sync(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        os.fdatasync(fd)

    def durable(seq: int) -> None:
        seen.append(seq)
        if seq == 500:
            done.set()

    log = InputLog(path, on_durable=durable, on_failed=lambda error: None, sync=sync)
    records = [Frontier(sid=SIDS[0], delivered=index, digest="") for index in range(500)]
    assert [log.append(one) for one in records] == list(range(1, 501))
    assert done.wait(10)
    log.close()
    assert seen == sorted(seen) and seen[-1] == 500 and syncs == len(seen)
    assert read_log(path) == (records, 0)


def test_a_failed_sync_is_final(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rewrite_log(path, [])
    durable: list[int] = []
    failed: list[OSError] = []

    def sync(fd: int) -> None:
        raise OSError(28, "no space left")

    log = InputLog(path, on_durable=durable.append, on_failed=failed.append, sync=sync)
    log.append(Ended(sid=SIDS[0], reason="x"))
    log.close()
    log_again = len(failed)
    assert not durable and log_again == 1


def test_a_grown_log_is_rewritten_and_tells_the_same(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rewrite_log(path, [])
    done = threading.Event()
    log = InputLog(path, on_durable=lambda seq: seq >= 400 and done.set(), on_failed=print, compact_bytes=4096)
    records: list = [opened(SIDS[0]), opened(SIDS[1])]
    for index in range(199):
        records.append(Bound(sid=SIDS[0], index=index, steps=4, version=1, prompt="p" if index == 0 else None))
        records.append(Frontier(sid=SIDS[0], delivered=index, digest=f"{index:064x}"))
    for number, record in enumerate(records):
        log.append(record)
        if number % 20 == 0:
            time.sleep(0.002)
    assert done.wait(20)
    log.close()
    found, torn = read_log(path)
    assert torn == 0 and len(found) < len(records) / 2
    assert replay(found) == replay(records)


def test_a_data_directory_has_one_gateway(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(ConfigError):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()
