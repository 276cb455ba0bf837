"""The authenticated channel: both ends prove the token, and no record can be replayed, cut or forged."""

from __future__ import annotations

import asyncio

import pytest

from turboserve.errors import AuthFailed, ConfigError, ProtocolError
from turboserve.runtime import channel, messages

TOKEN = b"t" * 32


def lease(epoch: int) -> messages.Lease:
    return messages.Lease(lease_s=2.0, worker_epoch=epoch)


async def pair(token_client: bytes = TOKEN):
    """A connected (client, server) pair and the listener."""
    got: asyncio.Queue[channel.Channel] = asyncio.Queue()
    done = asyncio.Event()

    async def on_channel(one: channel.Channel) -> None:
        await got.put(one)
        await done.wait()

    server = await channel.listen("127.0.0.1", 0, TOKEN, on_channel)
    try:
        client = await channel.connect("127.0.0.1", channel.bound_port(server), token_client, timeout_s=2)
    except BaseException:
        server.close()
        raise
    return client, await got.get(), server, done


async def test_messages_cross_in_order_both_ways():
    client, server_side, server, done = await pair()
    for epoch in range(50):
        client.send(lease(epoch))
    assert [(await server_side.receive()).worker_epoch for _ in range(50)] == list(range(50))
    server_side.send(lease(7))
    assert (await client.receive()).worker_epoch == 7
    await client.close()
    assert await server_side.receive() is None
    done.set()
    server.close()


async def test_wrong_token_is_refused_without_an_answer():
    with pytest.raises(AuthFailed):
        await pair(b"x" * 32)


async def test_a_record_cannot_be_replayed_or_changed():
    for attack in ("replay", "flip"):
        client, server_side, server, done = await pair()
        written: list[bytes] = []
        write = client._writer.write
        client._writer.write = written.append  # the wire as an attacker sees it
        client.send(lease(1))
        record = written[0]
        write(record if attack == "replay" else record[:-1] + bytes([record[-1] ^ 1]))
        if attack == "replay":
            assert (await server_side.receive()).worker_epoch == 1
            write(record)
        with pytest.raises(AuthFailed):
            await server_side.receive()
        done.set()
        server.close()
        await client.close()


async def test_oversized_announcement_is_refused_before_it_is_read():
    client, server_side, server, done = await pair()
    client._writer.write((messages.MAX_MESSAGE_BYTES + 1).to_bytes(4, "little") + b"0" * 16)
    with pytest.raises(ProtocolError, match="announced"):
        await server_side.receive()
    done.set()
    server.close()
    await client.close()


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "*"])
async def test_no_wildcard_listener(host):
    with pytest.raises(ConfigError, match="wildcard"):
        await channel.listen(host, 0, TOKEN, lambda one: one.close())


def test_token_file_must_be_private(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN.hex())
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="0600"):
        channel.read_token(path)
    path.chmod(0o600)
    assert channel.read_token(path) == TOKEN


def test_schema_is_checked():
    good = messages.encode(lease(1))
    assert messages.decode(good) == lease(1)
    for bad in (b"", b"\xc0", good[:-3], messages._encoder.encode({"type": "Lease", "lease_s": -1, "worker_epoch": 0})):
        with pytest.raises(ProtocolError):
            messages.decode(bad)
    with pytest.raises(ProtocolError):
        messages.decode(messages._encoder.encode({"type": "Exec", "code": "rm"}))
    newer = messages._encoder.encode({"type": "Lease", "lease_s": 1.0, "worker_epoch": 3, "from_the_future": 1})
    assert messages.decode(newer).worker_epoch == 3


def test_a_loop_that_ends_with_peers_connected_complains_of_nothing():
    """asyncio.run cancels the tasks that serve peers; its stream callback must not take that for an error."""
    complaints: list[dict] = []

    async def serve_and_leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        connected = asyncio.Event()

        async def on_channel(peer: channel.Channel) -> None:
            connected.set()
            await asyncio.sleep(3600)

        server = await channel.listen("127.0.0.1", 0, TOKEN, on_channel)
        await channel.connect("127.0.0.1", channel.bound_port(server), TOKEN)
        await connected.wait()

    asyncio.run(serve_and_leave())
    assert not complaints
