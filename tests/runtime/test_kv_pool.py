"""Slots and bytes are conserved (P3), and nothing of one session reaches the next."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TinyModel

from turboserve.errors import ConfigError, Conflict, NotFound, PoolExhausted
from turboserve.model.interface import Tier, state_bytes
from turboserve.runtime.kv_pool import KvPool, slots_within

LAYOUT = TinyModel().state_layout()


def test_bytes_follow_from_the_layout():
    pool = KvPool(LAYOUT, 3)
    assert pool.total_bytes() == 3 * state_bytes(LAYOUT)
    assert pool.total_bytes(Tier.HOST) == 3 * 16
    pool.acquire("a")
    assert (pool.held_bytes(), pool.free_bytes()) == (state_bytes(LAYOUT), 2 * state_bytes(LAYOUT))


@pytest.mark.parametrize(
    ("wanted", "free_gb", "total_gb", "fit"),
    [
        (32, 138, 150, 23),  # 5.61 GB a session beside a workspace of 8.59
        (4, 138, 150, 4),
        (32, 20, 24, 3),  # a small device keeps a tenth
        (32, 8.1, 24, 1),
    ],
)
def test_slots_are_what_the_device_has_room_for(wanted, free_gb, total_gb, fit):
    assert slots_within(wanted, 5_610_000_000, int(free_gb * 1e9), int(total_gb * 1e9)) == fit


def test_a_device_without_room_for_one_session_says_so():
    with pytest.raises(ConfigError, match="no session fits"):
        slots_within(4, 5_610_000_000, 7_000_000_000, 24_000_000_000)


def test_a_full_pool_says_so_and_stays_whole():
    pool = KvPool(LAYOUT, 1)
    pool.acquire("a")
    with pytest.raises(PoolExhausted):
        pool.acquire("b")
    with pytest.raises(Conflict):
        pool.acquire("a")
    pool.release("a")
    with pytest.raises(NotFound):
        pool.release("a")
    with pytest.raises(NotFound):
        pool.tensors("a")
    assert pool.acquire("b") == 0


def test_slots_do_not_overlap():
    pool = KvPool(LAYOUT, 4)
    for index, name in enumerate("abcd"):
        pool.acquire(name)
        for tensor in pool.tensors(name).values():
            tensor.fill_(index + 1)
    for index, name in enumerate("abcd"):
        assert all(bool((tensor == index + 1).all()) for tensor in pool.tensors(name).values())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40))
def test_any_order_of_opens_and_closes_conserves_and_wipes(moves):
    pool = KvPool(LAYOUT, 3)
    for opens, number in moves:
        name = f"s{number}"
        if opens and name not in pool.held and pool.free_count:
            pool.acquire(name)
            for tensor in pool.tensors(name).values():
                assert not tensor.any()
                tensor.fill_(7)
        elif not opens and name in pool.held:
            pool.release(name)
        pool.check()
        assert pool.free_bytes() + pool.held_bytes() == pool.total_bytes()
    for name in pool.held:
        pool.release(name)
    assert pool.held_bytes() == 0


@pytest.mark.gpu
def test_device_and_host_tiers_on_cuda():
    pool = KvPool(LAYOUT, 2, "cuda")
    pool.acquire("a")
    tensors = pool.tensors("a")
    assert tensors["kv"].is_cuda and not tensors["counts"].is_cuda
    assert torch.cuda.memory_allocated() >= pool.total_bytes(Tier.DEVICE)
