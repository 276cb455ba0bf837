"""A real worker process over real sockets and a real frame ring."""

import asyncio
import os
import signal

import pytest
from engine_harness import alone, prompt_of
from tiny_model import session_id
from worker_peers import Peers

from turboserve.runtime import messages as m

B, C = session_id("b"), session_id("c")


def seed_of(name: str) -> int:
    return sum(name.encode())


@pytest.fixture(scope="module")
def chains(deterministic):
    return {name: alone(name, 6) for name in "bc"}


async def test_two_sessions_get_their_frames_in_order_with_the_right_chain(chains):
    async with Peers() as peers:
        await peers.start_worker()
        assert peers.hello.slot_count == 4 and peers.hello.ring_fd == peers.ring_fd
        got = {B: [], C: []}
        for name in "bc":
            await peers.open(session_id(name), seed_of(name), prompt_of(name, 0))
            peers.credit(session_id(name), 0, prompt_of(name, 0))
        while any(len(chain) < 6 for chain in got.values()):
            ready = await peers.next_ready()
            sid, index = ready.session_id, ready.chunk_index
            assert index == len(got[sid])
            [record] = peers.chunks.pop((sid, index))
            record.verify()
            assert record.header.digest.hex() == ready.digest and record.header.session_epoch == 1
            got[sid].append(ready.digest)
            peers.accept(sid, index)
            if index < 5:
                name = sid[0]
                version = 1 if index + 1 < 3 else 2
                peers.credit(sid, index + 1, prompt_of(name, index + 1), version=version)
        assert got == {B: chains["b"], C: chains["c"]}
        peers.controller.send(m.CloseSession(session_id=B, epoch=1))
        assert (await peers.told_next(m.SessionReleased)).session_id == B
        await asyncio.sleep(0.3)
        assert peers.beats[-1].resident == 1 and peers.beats[-1].chunks == 12
        seen = peers.reports
        assert any(one.sessions.get(B) and one.sessions[B].begun for one in seen), "it says that a chunk is in work"
        assert seen[-1].busy_s == 0 and not seen[-1].sessions[C].begun and seen[-1].sessions[C].next_index == 6


async def test_a_gateway_that_comes_back_gets_the_same_frames_again(chains):
    async with Peers() as peers:
        await peers.start_worker()
        await peers.open(B, seed_of("b"), prompt_of("b", 0))
        peers.credit(B, 0, prompt_of("b", 0))
        first = await peers.next_ready()
        await peers.gateway.close()
        peers.gateway = None
        again = await peers.next_ready()
        assert first == again and again.digest == chains["b"][0]
        assert [one.pixels for one in peers.chunks[(B, 0)]] == 2 * [peers.chunks[(B, 0)][0].pixels]
        peers.accept(B, 0)
        peers.credit(B, 1, prompt_of("b", 1))
        assert (await peers.next_ready()).digest == chains["b"][1]


async def test_a_full_ring_holds_frames_back_and_loses_none(chains):
    async with Peers() as peers:
        await peers.start_worker(ring_bytes=4096)  # room for four records of 768 bytes of pixels
        drain, peers.drain_ring = peers.drain_ring, lambda: None
        for name in "bc":
            await peers.open(session_id(name), seed_of(name), prompt_of(name, 0))
            for index in range(3):
                peers.credit(session_id(name), index, prompt_of(name, index))
        await asyncio.sleep(1.0)
        announced = peers.ready.qsize()
        assert 0 < announced < 6
        peers.drain_ring = drain
        peers.drain_ring()
        for _ in range(6):
            await peers.next_ready()
        assert sorted(peers.chunks) == [(sid, index) for sid in (B, C) for index in range(3)]


async def test_no_lease_no_frames_and_everything_comes_when_it_is_renewed(chains):
    async with Peers() as peers:
        await peers.start_worker()
        await peers.open(B, seed_of("b"), prompt_of("b", 0))
        peers.leasing = False
        await asyncio.sleep(2.5)
        # A credit is word from the gateway: it renews the lease by itself, so the controller may stay away.
        peers.credit(B, 0, prompt_of("b", 0))
        assert (await peers.next_ready()).digest == chains["b"][0]


async def test_refusals_name_what_would_be_right():
    async with Peers() as peers:
        await peers.start_worker()
        peers.controller.send(m.OpenSession(session_id=B, epoch=1, seed=1, width=9, height=9, prompt="p"))
        refused = await peers.told_next(m.SessionRefused)
        assert refused.code == "invalid_request" and "8x8" in refused.message
        peers.credit(B, 0, "p")
        assert (await asyncio.wait_for(peers.refused.get(), 5)).code == "not_found"
        for number in range(4):
            await peers.open(session_id(f"x{number}".replace("0", "b").replace("1", "c")), 1, "p")
        peers.controller.send(m.OpenSession(session_id=B, epoch=1, seed=1, width=8, height=8, prompt="p"))
        assert (await peers.told_next(m.SessionRefused)).code == "pool_exhausted"


async def test_sigterm_asks_to_be_drained_and_stop_ends_it_with_0():
    async with Peers() as peers:
        await peers.start_worker()
        peers.process.send_signal(signal.SIGTERM)
        await peers.told_next(m.WorkerLeaving)
        peers.controller.send(m.StopWorker(worker_id="w0", reason="drained"))
        assert await asyncio.to_thread(peers.process.wait, 5) == 0


async def test_sigterm_with_sessions_that_stay_ends_before_the_launcher_kills():
    async with Peers() as peers:
        await peers.start_worker(shutdown_timeout_s=1.0)
        await peers.open(B, 1, "p")
        peers.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(peers.process.wait, 2) == 0


async def test_it_ends_with_its_launcher():
    async with Peers() as peers:
        await peers.start_worker()
        peers.end_parent()
        assert await asyncio.to_thread(peers.process.wait, 5) == 1


async def test_kill_9_in_mid_stream_leaves_no_process():
    async with Peers() as peers:
        await peers.start_worker()
        await peers.open(B, seed_of("b"), prompt_of("b", 0))
        for index in range(3):
            peers.credit(B, index, prompt_of("b", index))
        await peers.next_ready()
        peers.process.kill()
        await asyncio.to_thread(peers.process.wait)
        with pytest.raises(ProcessLookupError):
            os.kill(peers.process.pid, 0)


async def test_a_ring_too_small_for_a_chunk_ends_the_worker_instead_of_leaving_it_stuck():
    async with Peers() as peers:
        await peers.start_worker(ring_bytes=4096, frames_repeat=8)
        await peers.open(B, 1, "p")
        peers.credit(B, 0, "p")
        assert await asyncio.to_thread(peers.process.wait, 20) == 1


async def test_a_controller_of_another_version_makes_it_exit_with_1():
    async with Peers() as peers:
        await peers.start_worker()
        peers.controller.send(m.Failure(code="version", message="speak version 2"))
        assert await asyncio.to_thread(peers.process.wait, 20) == 1
