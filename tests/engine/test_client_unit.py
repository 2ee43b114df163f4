"""The front end's client with pretend ranks: who gets a request, what is outstanding, and how each end is told."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
import torch
from pretend_ranks import PretendNode, Sink, eventually, request

from nonet.config import build_config
from nonet.engine import client as under_test
from nonet.engine import front_end
from nonet.engine import messages as m
from nonet.engine.client import Client
from nonet.errors import CapacityError, CommTimeout, ConfigError, EngineDeadError, ModelError, NonetError, RequestError

FIRST, SECOND, THIRD = (m.sequence_name(0, i) for i in range(3))  # names of what a client submits, in order


@pytest.fixture
def start(monkeypatch):
    """start(**settings) -> (client, node); closed at the end."""
    monkeypatch.setattr(under_test, "Node", PretendNode)
    monkeypatch.setattr(front_end, "_POLL_MS", 5)
    monkeypatch.setattr(under_test, "_FAILED_GRACE_S", 1.0)
    monkeypatch.setattr(under_test, "_ECHO_GRACE_S", 0.5)
    monkeypatch.setattr(PretendNode, "silent", ())
    monkeypatch.setattr(PretendNode, "first_words", None)
    started = []

    def run(**settings) -> tuple[Client, PretendNode]:
        client = Client(build_config("nonet-tiny", device="cpu", **settings))
        started.append(client)
        return client, PretendNode.latest

    yield run
    for client in started:
        client.close()


# -- start and choice of a rank ---------------------------------------------------------------------------------------


def test_it_is_up_when_every_rank_is_ready(start):
    client, node = start(data_parallel_size=2, tensor_parallel_size=2)
    assert client.pids == [1000, 1001, 1002, 1003]
    assert [ready.bytes_read for ready in client.ready] == [0, 1, 2, 3]
    assert client.supervisor_pid == 4242
    assert node.payload["config"] == client.config.model_dump()


def test_sequences_go_to_the_first_rank_of_their_group(start):
    client, node = start(data_parallel_size=2, tensor_parallel_size=2)
    sent = request("a")
    assert client.submit([sent], Sink(), dp_rank=1) == 1
    assert node.wait_for(2, m.Add) == [msgspec.structs.replace(sent, request_id=FIRST)]
    assert [len(messages) for messages in node.received] == [0, 0, 1, 0]


def test_the_rank_with_the_fewest_tokens_outstanding_is_taken(start):
    client, _ = start(data_parallel_size=3)
    client.submit([request("a", 10, 10)], Sink(), dp_rank=0)
    client.submit([request("b", 1, 2)], Sink(), dp_rank=1)
    client.submit([request("c", 5, 5)], Sink(), dp_rank=2)
    assert client.pending == [20, 3, 10]
    assert client.submit([request("d", 4, 4)], Sink()) == 1
    assert client.submit([request("e", 4, 4)], Sink()) == 2, "11 outstanding there, 10 here"
    assert client.pending == [20, 11, 18]


def test_equals_are_taken_in_turn(start):
    client, _ = start(data_parallel_size=3)
    taken = []
    for i in range(6):
        taken.append(client.submit([request(str(i))], Sink()))
        client.abort([str(i)])
    assert taken == [0, 1, 2, 0, 1, 2]


def test_a_request_of_several_sequences_stays_together(start):
    client, node = start(data_parallel_size=2)
    sink = Sink()
    rank = client.submit([request("a#0"), request("a#1")], sink)
    assert [message.request_id for message in node.wait_for(rank, m.Add, 2)] == [FIRST, SECOND]
    assert client.pending[rank] == 16


def test_what_cannot_be_sent_is_refused_and_not_kept(start):
    client, _ = start(data_parallel_size=2)
    client.submit([request("a")], Sink(), dp_rank=0)
    with pytest.raises(RequestError, match="^request_id = 'a': is in use; give another$"):
        client.submit([request("b"), request("a")], Sink(), dp_rank=1)
    with pytest.raises(RequestError, match="^data_parallel_rank = 2: ranks are 0 to 1$"):
        client.submit([request("c")], Sink(), dp_rank=2)
    assert client.pending == [8, 0]


# -- chunks -----------------------------------------------------------------------------------------------------------


def test_chunks_reach_their_sink_and_lower_what_is_outstanding(start):
    client, node = start()
    a, b = Sink(), Sink()
    client.submit([request("a", 3, 5)], a)
    client.submit([request("b", 2, 2)], b)
    assert client.pending == [12]
    node.say(m.Chunks(0, [m.Chunk(FIRST, [7]), m.Chunk(SECOND, [8])]))
    assert (a.next(), b.next()) == (m.Chunk("a", [7]), m.Chunk("b", [8]))
    assert client.pending == [4 + 1], "prompts and one token each came back"
    node.say(m.Chunks(0, [m.Chunk(FIRST, [9, 9])]))
    assert a.next().tokens == [9, 9]
    assert client.pending == [2 + 1]
    node.say(m.Chunks(0, [m.Chunk(FIRST, [9], finish_reason="stop")]))
    assert a.next().finish_reason == "stop"
    assert client.pending == [1], "ended early: nothing more is due"
    client.submit([request("a")], Sink())
    assert client.pending == [9], "its name is free again"


def test_an_abort_goes_to_the_ranks_concerned_and_ends_the_sinks(start):
    client, node = start(data_parallel_size=2)
    sinks = {name: Sink() for name in "abc"}
    for name, rank in (("a", 0), ("b", 1), ("c", 1)):
        client.submit([request(name)], sinks[name], dp_rank=rank)
    client.abort(["b", "c", "never seen"])
    assert sorted(node.wait_for(1, m.Abort)[0].request_ids) == [SECOND, THIRD]
    assert client.pending == [8, 0]
    assert [sinks[name].next().finish_reason for name in "bc"] == ["abort", "abort"]
    node.say(m.Chunks(1, [m.Chunk(SECOND, [1])]))
    node.say(m.Chunks(0, [m.Chunk(FIRST, [1])]))
    assert sinks["a"].next().tokens == [1]
    assert sinks["b"].nothing_more(), "a chunk that was under way is dropped"
    assert not [x for x in node.received[0] if isinstance(x, m.Abort)]


def test_what_a_step_brought_comes_by_one_call(start):
    client, node = start()
    together, alone = Sink(), Sink()
    for name, sink in (("a", together), ("b", alone), ("c", together)):
        client.submit([request(name)], sink, key=f"key {name}")
    node.say(m.Chunks(0, [m.Chunk(FIRST, [1]), m.Chunk(SECOND, [2]), m.Chunk(THIRD, [3])]))
    assert [together.next().tokens, together.next().tokens, alone.next().tokens] == [[1], [3], [2]]
    assert (together.calls, alone.calls) == ([["key a", "key c"]], [["key b"]])


def test_a_request_id_used_again_gets_nothing_of_the_old_request(start):
    client, node = start()
    old, new = Sink(), Sink()
    client.submit([request("a")], old)
    client.abort(["a"])
    assert old.next().finish_reason == "abort"
    client.submit([request("a")], new)
    node.say(m.Chunks(0, [m.Chunk(FIRST, [1])]))  # was under way when the abort was sent
    node.say(m.Chunks(0, [m.Chunk(SECOND, [2])]))
    assert new.next() == m.Chunk("a", [2])
    assert new.nothing_more()
    assert old.nothing_more()


def test_an_abort_with_a_key_spares_a_request_that_took_the_id_over(start):
    client, node = start()
    old, new = object(), object()
    client.submit([request("a")], Sink(), key=old)
    client.abort(["a"], old)
    client.submit([request("a")], Sink(), key=new)
    client.abort(["a"], old)
    assert client.pending == [8]
    client.abort(["a"], new)
    assert client.pending == [0]
    assert [x.request_ids for x in node.wait_for(0, m.Abort, 2)] == [[FIRST], [SECOND]]


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "words"),
    [
        ("RequestError", ["prompt", "9", "too long"], RequestError, "prompt = '9': too long"),
        ("CapacityError", ["no room"], CapacityError, "no room"),
    ],
)
def test_a_sequence_that_a_rank_refuses(start, kind, arguments, error, words):
    client, node = start()
    sink, other = Sink(), Sink()
    client.submit([request("a")], sink)
    client.submit([request("b")], other)
    node.say(m.Refused(FIRST, kind, arguments))
    told = sink.next()
    assert (type(told), str(told)) == (error, words)
    assert client.pending == [8]
    assert other.nothing_more(), "the engine lives on"


# -- counters ---------------------------------------------------------------------------------------------------------


def stats_of(rank: int, number: int) -> m.Stats:
    return m.Stats(number, rank, rank, 1, 2, 3, 4, 5, 6, 7, 8, [[rank]], 0.5, 1, 0)


def test_stats_of_all_ranks_in_their_order(start):
    client, node = start(data_parallel_size=2)

    def answer() -> None:
        number = node.wait_for(0, m.GetStats)[0].number
        for rank in (1, 0):
            node.say(stats_of(rank, number - 1))  # of an older question: not this one's
            node.say(stats_of(rank, number))

    answering = threading.Thread(target=answer)
    answering.start()
    assert [s.rank for s in client.stats(reset_load=True)] == [0, 1]
    answering.join()
    assert node.wait_for(1, m.GetStats)[0].reset_load


def test_stats_name_the_ranks_that_do_not_answer(start):
    client, node = start(data_parallel_size=3)

    def answer() -> None:
        node.say(stats_of(1, node.wait_for(1, m.GetStats)[0].number))

    answering = threading.Thread(target=answer)
    answering.start()
    with pytest.raises(CommTimeout) as caught:
        client.stats(timeout_s=0.3)
    answering.join()
    assert caught.value.missing == (0, 2)


# -- ends -------------------------------------------------------------------------------------------------------------


def all_told(*sinks: Sink) -> list[NonetError]:
    told = [sink.next() for sink in sinks]
    assert all(isinstance(item, EngineDeadError) for item in told)
    return told


def test_a_killed_rank_is_named_to_every_open_sequence(start):
    client, node = start(data_parallel_size=2)
    a, b = Sink(), Sink()
    client.submit([request("a")], a)
    client.submit([request("b")], b)
    node.events.put({"event": "died", "rank": 1, "how": "SIGKILL"})
    assert {str(error) for error in all_told(a, b)} == {"rank 1 died (SIGKILL)"}
    with pytest.raises(EngineDeadError, match=r"rank 1 died \(SIGKILL\)"):
        client.submit([request("c")], Sink())
    with pytest.raises(EngineDeadError):
        client.stats()
    client.abort(["a", "b"])
    assert a.nothing_more(), "it was told once"
    assert not [x for x in node.received[0] + node.received[1] if isinstance(x, m.Abort)]


def test_a_failing_ranks_own_words_win_over_the_news_of_its_end(start):
    client, node = start()
    sink = Sink()
    client.submit([request("a")], sink)
    node.events.put({"event": "died", "rank": 0, "how": "exit code 1"})
    node.say(m.Failed(0, "EngineDeadError", "ZeroDivisionError: division by zero", []))
    assert str(all_told(sink)[0]) == "rank 0: ZeroDivisionError: division by zero"
    assert sink.nothing_more()


ECHO = m.Failed(0, "CommError", "all_gather: Connection reset by peer", [])


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ({"event": "died", "rank": 1, "how": "SIGKILL"}, "rank 1 died (SIGKILL)"),
        (m.Failed(1, "EngineDeadError", "KeyError: 'a'", []), "rank 1: KeyError: 'a'"),
        ({"event": "died", "rank": 0, "how": "exit code 1"}, "rank 0: all_gather: Connection reset by peer"),
        (None, "rank 0: all_gather: Connection reset by peer"),
    ],
)
@pytest.mark.parametrize("echo_first", [True, False])
def test_what_ended_a_rank_wins_over_those_who_miss_it(start, cause, words, echo_first):
    client, node = start(data_parallel_size=2)
    sink = Sink()
    client.submit([request("a")], sink)
    if echo_first:
        node.say(ECHO)
        time.sleep(0.02)
    if isinstance(cause, m.Failed):
        node.say(cause)
    elif cause is not None:
        node.events.put(cause)
    if not echo_first:
        node.say(ECHO)
    assert str(all_told(sink)[0]) == words
    time.sleep(0.6)  # also for what waited
    assert sink.nothing_more()
    assert str(client.error) == words


def test_a_rank_that_ends_without_a_word_is_named_too(start):
    client, node = start()
    sink = Sink()
    client.submit([request("a")], sink)
    node.events.put({"event": "died", "rank": 0, "how": "exit code 1"})
    assert str(all_told(sink)[0]) == "rank 0 died (exit code 1)"


def test_a_receiver_that_is_gone_harms_nobody(start, caplog):
    client, node = start()
    sink = Sink()

    def closed(items) -> None:
        raise RuntimeError("Event loop is closed")

    client.submit([request("a")], closed)
    client.submit([request("b")], sink)
    node.say(m.Chunks(0, [m.Chunk(FIRST, [1]), m.Chunk(SECOND, [2])]))
    assert sink.next().tokens == [2]
    assert client.error is None
    assert "nobody takes what came for 1 request(s): Event loop is closed" in caplog.text


def test_a_defect_of_the_front_end_leaves_nobody_waiting(start, caplog):
    client, node = start()
    sink = Sink()

    client.submit([request("a")], sink)
    node.say_nonsense()
    assert str(all_told(sink)[0]).startswith("the front end failed: DecodeError: ")
    assert "the front end cannot go on" in caplog.text


def test_the_end_of_the_supervisor_is_told(start):
    client, node = start()
    sink = Sink()
    client.submit([request("a")], sink)
    node.events.put(None)
    assert str(all_told(sink)[0]) == "the supervisor of the ranks ended"


def test_close_tells_all_ranks_and_every_open_sequence(start):
    client, node = start(data_parallel_size=2)
    sink = Sink()
    client.submit([request("a")], sink)
    client.close()
    assert [type(one[-1]) for one in node.received] == [m.Stop, m.Stop]
    assert "closed" in str(all_told(sink)[0])
    client.close()
    with pytest.raises(EngineDeadError, match="closed"):
        client.submit([request("b")], Sink())


def test_who_asked_is_told_of_the_end_once(start):
    client, node = start()
    told, taken_back, late = [], [], []
    client.on_death(told.append)
    client.on_death(taken_back.append)()
    assert client.error is None
    node.events.put({"event": "died", "rank": 0, "how": "SIGKILL"})
    eventually(lambda: told)
    client.on_death(late.append)
    assert [str(error) for error in (*told, *late, client.error)] == ["rank 0 died (SIGKILL)"] * 3
    assert not taken_back
    client.close()
    assert len(told) == 1


def test_an_error_raised_many_times_stays_small(start):
    client, node = start()
    node.events.put({"event": "died", "rank": 0, "how": "SIGKILL"})
    eventually(lambda: client.error)
    for _ in range(3):
        with pytest.raises(EngineDeadError):
            client.submit([request("a")], Sink())
    assert client.error.__traceback__ is None


def test_leaving_the_block_closes(start):
    client, node = start()
    with client as same:
        assert same is client
    assert isinstance(node.received[0][-1], m.Stop)


@pytest.mark.parametrize(
    ("failed", "error", "words"),
    [
        (m.Failed(1, "ConfigError", "text", ["num_slots", "3", "use 4"]), ConfigError, "num_slots = '3': use 4"),
        (m.Failed(1, "ModelError", "no such tensor", []), ModelError, "no such tensor"),
        (m.Failed(1, "CommTimeout", "step: rank 0 late", []), EngineDeadError, "rank 1: step: rank 0 late"),
        (m.Failed(1, "EngineDeadError", "KeyError: 'a'", []), EngineDeadError, "rank 1: KeyError: 'a'"),
    ],
    ids=lambda value: value.kind if isinstance(value, m.Failed) else "",
)
def test_a_start_that_fails_raises_what_the_rank_raised(start, monkeypatch, failed, error, words):
    monkeypatch.setattr(PretendNode, "first_words", failed)
    with pytest.raises(error) as caught:
        start(data_parallel_size=2)
    assert str(caught.value) == words


def test_a_start_that_takes_too_long_names_the_ranks(start, monkeypatch):
    monkeypatch.setattr(PretendNode, "silent", (1, 3))
    with pytest.raises(CommTimeout) as caught:
        start(data_parallel_size=4, startup_timeout_s=0.3)
    assert caught.value.missing == (1, 3)


def test_simulated_routing_warns_that_outputs_are_meaningless(start):
    with pytest.warns(UserWarning, match=r"routing is simulated \(round_robin\): outputs are meaningless"):
        start(routing_simulation="round_robin")


@pytest.mark.parametrize(("device", "files"), [("cpu", ["/dev/nvidia0"]), ("auto", [])])
def test_gpus_are_not_asked_for_where_there_are_none(monkeypatch, device, files):
    """Neither where CPUs are wanted nor without a driver; torch would take seconds to say the same."""

    def asked() -> int:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(under_test.glob, "glob", lambda pattern: files)
    monkeypatch.setattr(torch.cuda, "device_count", asked)
    assert under_test._num_gpus(build_config("nonet-tiny", device=device)) == 0
