"""Front ends that attach to an engine, with pretend ranks: whose chunks are whose, and who hears of which end."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from pretend_ranks import PretendNode, Sink, eventually, request

from nonet.config import build_config
from nonet.engine import client as client_module
from nonet.engine import front_end
from nonet.engine import messages as m
from nonet.engine.attached import Attached
from nonet.engine.client import Client
from nonet.errors import ConfigError, EngineDeadError


@pytest.fixture
def start(monkeypatch):
    """start(front_ends, **settings) -> (client, node, the attached ones); all closed at the end."""
    monkeypatch.setattr(client_module, "Node", PretendNode)
    monkeypatch.setattr(front_end, "_POLL_MS", 5)
    started = []

    def run(front_ends: int, **settings) -> tuple[Client, PretendNode, list[Attached]]:
        client = Client(build_config("nonet-tiny", device="cpu", **settings), front_ends)
        started.append(client)
        attachments = [json.loads(json.dumps(client.attachment(i))) for i in range(1, front_ends)]
        attached = [Client.attach(attachment) for attachment in attachments]
        started.extend(attached)
        return client, PretendNode.latest, attached

    yield run
    for each in reversed(started):
        each.close()


def test_they_know_what_the_starter_knows(start):
    client, _, (one,) = start(2, data_parallel_size=2, max_num_seqs=7)
    assert one.config == client.config
    assert one.spec == client.spec
    assert one.ready == client.ready
    assert one.cache_tokens == client.cache_tokens == 8 * client.config.cache.block_size
    assert (client.number, one.number) == (0, 1)


def test_each_gets_what_it_submitted_though_ids_are_equal(start):
    client, node, (one, two) = start(3)
    sinks = [Sink(), Sink(), Sink()]
    for each, sink in zip((client, one, two), sinks, strict=True):
        each.submit([request("same")], sink)
    names = [m.sequence_name(i, 0) for i in range(3)]
    assert sorted(x.request_id for x in node.wait_for(0, m.Add, 3)) == names
    for i, name in enumerate(names):
        node.say(m.Chunks(0, [m.Chunk(name, [i])]), front_end=i)
    assert [sink.next() for sink in sinks] == [m.Chunk("same", [i]) for i in range(3)]
    one.abort(["same"])
    assert node.wait_for(0, m.Abort)[0].request_ids == [names[1]]
    assert sinks[0].nothing_more()
    assert sinks[2].nothing_more()


def test_the_rank_is_chosen_by_what_all_have_outstanding(start):
    client, node, (one, two) = start(3, data_parallel_size=2)
    assert one.submit([request("a", 10, 10)], Sink(), dp_rank=0) == 0
    assert two.submit([request("b", 2, 2)], Sink()) == 1
    assert client.submit([request("c", 2, 2)], Sink()) == 1
    assert client.pending == one.pending == two.pending == [20, 8]
    node.say(m.Chunks(0, [m.Chunk(m.sequence_name(1, 0), [1], finish_reason="stop")]), front_end=1)
    eventually(lambda: client.pending == [0, 8])
    assert two.submit([request("d")], Sink()) == 0


def test_equals_are_not_all_given_the_same_rank(start):
    client, _, (one, two) = start(3, data_parallel_size=3)
    taken = []
    for each in (client, one, two):
        taken.append(each.submit([request("a")], Sink()))
        each.abort(["a"])
    assert taken == [0, 1, 2]


def test_counters_from_any_of_them(start):
    _, node, (one,) = start(2)

    def answer() -> None:
        asked = node.wait_for(0, m.GetStats)[0]
        node.say(m.Stats(asked.number, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, [[1]], 0.5, 1, 0), front_end=asked.front_end)

    answering = threading.Thread(target=answer)
    answering.start()
    assert [s.num_blocks for s in one.stats()] == [7]
    answering.join()


def test_one_that_leaves_is_forgotten_and_its_tokens_count_no_more(start):
    client, node, (one, two) = start(3, data_parallel_size=2)
    sink, other = Sink(), Sink()
    one.submit([request("a")], sink)
    two.submit([request("b")], other)
    one.close()
    assert "this front end is closed" in str(sink.next())
    for rank in (0, 1):
        assert node.wait_for(rank, m.Forget) == [m.Forget(1)]
    assert sum(client.pending) == 8
    assert other.nothing_more()
    assert client.error is two.error is None


def test_a_row_that_was_left_behind_is_cleared(start):
    """A process that is killed leaves its counts as they were; the starter clears them."""
    client, node, (one,) = start(2)
    one.submit([request("a")], Sink())
    client.forget_front_end(1)
    assert client.pending == [0]
    assert node.wait_for(0, m.Forget) == [m.Forget(1)]


def test_the_end_of_a_rank_reaches_all(start):
    client, node, (one, two) = start(3)
    sinks = [Sink(), Sink(), Sink()]
    for each, sink in zip((client, one, two), sinks, strict=True):
        each.submit([request("a")], sink)
    node.events.put({"event": "died", "rank": 3, "how": "SIGKILL"})
    for each, sink in zip((client, one, two), sinks, strict=True):
        error = sink.next()
        assert (type(error), str(error)) == (EngineDeadError, "rank 3 died (SIGKILL)")
        with pytest.raises(EngineDeadError, match="rank 3 died"):
            each.submit([request("b")], Sink())
    assert client.pending == [0]


def test_who_attaches_too_late_learns_why(start):
    client, node, _ = start(1)
    late, lost = Client(client.config, front_ends=3), None
    try:
        lost = late.attachment(2)
        late.fail(EngineDeadError("rank 0 died (SIGKILL)"))
        one = Client.attach(late.attachment(1))
        eventually(lambda: one.error)
        assert str(one.error) == "rank 0 died (SIGKILL)"
        one.close()
    finally:
        late.close()
    with pytest.raises(EngineDeadError, match="the process that started the engine ended"):
        Client.attach(lost)


def test_closing_the_engine_is_told(start):
    client, _, (one,) = start(2)
    sink = Sink()
    one.submit([request("a")], sink)
    client.close()
    assert str(sink.next()) == "the engine is closed"


def test_a_stranger_on_the_line_harms_nobody(start):
    client, _, (one,) = start(2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{client.attachment(1)['name']}-line")
        stranger.send(b"hello?")
        assert stranger.recv(64) == b""
    client.fail(EngineDeadError("over"))
    eventually(lambda: one.error)


def test_each_number_is_used_once(start):
    client, _, (one,) = start(2)
    with pytest.raises(ConfigError, match="front_end = 1: was not offered by the engine, or is attached already"):
        Client.attach(client.attachment(1))
    for number in (0, 2):
        with pytest.raises(ConfigError, match=f"front_end = {number}: attached front ends are 1 to 1"):
            client.attachment(number)
    assert one.error is None
