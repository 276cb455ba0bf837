"""A worker that joins from another network namespace: an address of its own, nothing shared but a wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from real_server import REPOSITORY, RunningServer, start_server
from test_real_server import Client, end_session, open_session

from turboserve.cli.worker import address, command
from turboserve.errors import ConfigError

HERE, THERE = "10.213.87.1", "10.213.87.2"
NAMESPACE, LINK = f"tsjoin{os.getpid() % 10000}", f"tsj{os.getpid() % 10000}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module", name="namespace")
def other_namespace() -> Iterator[str]:
    """Another network, joined to ours by one virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making a network namespace needs root and iproute2")
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/30", "dev", LINK)
        ip("link", "set", LINK, "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THERE}/30", "dev", "eth0")
        ip("-n", NAMESPACE, "link", "set", "eth0", "up")
        yield NAMESPACE
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)
        subprocess.run(["ip", "link", "del", LINK], check=False, capture_output=True)


def control_address(server: RunningServer) -> str:
    """What the server prints for those who want to join."""
    deadline_s = time.monotonic() + 20
    while "--join " not in server.log_text():
        assert time.monotonic() < deadline_s, server.log_text()[-2000:]
        time.sleep(0.05)
    return server.log_text().split("--join ")[1].split()[0]


@contextlib.contextmanager
def joined(namespace: str, server: RunningServer, log: Path, failpoints: str = "") -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "turboserve", "worker", "--join", control_address(server)]
    command += ["--token-file", str(server.data_dir / "cluster.token"), "--advertise", THERE]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TURBOSERVE_FAILPOINTS": failpoints}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command], stdout=output, stderr=output, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def workers(server: RunningServer) -> dict[str, dict]:
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
        return {one["id"]: one for one in (await http.get("/v1/cluster")).json()["workers"]}


async def until(check, what: str, timeout_s: float = 60.0):
    deadline_s = time.monotonic() + timeout_s
    while not (found := await check()):
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.1)
    return found


async def test_it_makes_the_same_stream_and_is_drained_by_ctrl_c(namespace, tmp_path):
    with (
        start_server(tmp_path, "--workers", "1", "--control-host", HERE) as server,
        joined(namespace, server, tmp_path / "joined.log") as process,
    ):

        async def ready():
            found = await workers(server)
            return [one for one in found if one[0] == "j" and found[one]["state"] == "ready"]

        [name] = await until(ready, "the joined worker was not ready")
        opened = [await open_session(server.url) for _ in range(2)]
        clients = [Client(server.url, one) for one in opened]
        await asyncio.gather(*(client.run(6) for client in clients))
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
            states = [(await http.get(f"/v1/sessions/{one['id']}")).json() for one in opened]
        assert {state["worker"] for state in states} == {"w0", name}
        assert clients[0].digests == clients[1].digests  # same seed, same prompt, made on two nodes
        for one in opened:
            await end_session(server.url, one["id"])
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 30) == 0
        assert "w0" in await workers(server)


def test_a_worker_with_another_token_is_not_let_in(tmp_path):
    token = tmp_path / "token"
    token.write_text("ab" * 32)
    token.chmod(0o644)
    refused = CliRunner().invoke(command, ["--join", "127.0.0.1:1", "--token-file", str(token)])
    assert isinstance(refused.exception, ConfigError) and "0600" in str(refused.exception)


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:0", "host:99999", "host:x"])
def test_an_address_says_where_and_at_which_port(text):
    with pytest.raises(ConfigError):
        address(text)
    assert address("[::1]:80") == ("::1", 80)
