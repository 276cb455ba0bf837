"""Who a worker was working on when it died: one whole list, whatever instant it was killed at."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from engine_harness import Driven
from tiny_model import session_id

from turboserve.errors import ConfigError
from turboserve.runtime.work_board import BOARD_BYTES, NAMES_MAX, WorkBoard, create_board

LISTS = [tuple(f"{letter * count:a<26}" for letter in "bcd"[:count]) for count in range(4)]

WRITER = """
import sys
from turboserve.runtime.work_board import WorkBoard
board = WorkBoard(int(sys.argv[1]))
lists = [tuple(f"{letter * count:a<26}" for letter in "bcd"[:count]) for count in range(4)]
print("ready", flush=True)
while True:
    for one in lists:
        board.show(one)
"""


def test_what_was_shown_last_is_read_by_another_mapping():
    fd = create_board()
    writer, reader = WorkBoard(fd), WorkBoard(fd)
    assert reader.read() == ()
    for names in (*LISTS, *reversed(LISTS)):
        writer.show(names)
        assert reader.read() == names
    many = [f"{number:026d}" for number in range(NAMES_MAX + 5)]
    writer.show(many)
    assert reader.read() == tuple(many[:NAMES_MAX])
    os.pwrite(fd, b"\xff" * BOARD_BYTES, 0)  # what a process did that wrote where it should not
    assert reader.read() == ()
    os.close(fd)
    with pytest.raises(ConfigError):
        WorkBoard(os.memfd_create("other"))


def test_a_kill_at_any_instant_leaves_one_whole_list():
    rng = random.Random(5)
    seen = set()
    for _ in range(6):
        fd = create_board()
        os.set_inheritable(fd, True)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.001, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen.add(WorkBoard(fd).read())
        os.close(fd)
    assert seen <= set(LISTS)


@pytest.mark.usefixtures("deterministic")
def test_the_engine_shows_a_session_from_before_its_chunk_until_it_is_committed():
    driven, fd = Driven(), create_board()
    board = WorkBoard(fd)
    driven.engine.show_work = board.show
    seen = []
    for name in ("begin", "next_passes", "forward", "decode"):
        right = getattr(driven.model, name)

        def watched(*args, name=name, right=right):
            seen.append((name, WorkBoard(fd).read()))
            return right(*args)

        setattr(driven.model, name, watched)
    driven.open("b")
    driven.open("c")
    assert board.read() == ()
    driven.credit("b", 0)
    driven.run_until_idle()
    b, c = session_id("b"), session_id("c")
    assert seen[:2] == [("begin", (b,)), ("begin", (c,))]
    assert {name for name, _ in seen[2:]} == {"next_passes", "forward", "decode"}
    assert all(names == (b,) for _, names in seen[2:])
    assert board.read() == (), "between two chunks nobody is worked on"
    os.close(fd)
