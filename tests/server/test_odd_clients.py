"""Clients that do odd things to their connection: the others do not notice, and nothing of them stays behind."""

from __future__ import annotations

import json
import logging
import random
import socket
import struct
import time

import httpx
import pytest

from nonet.config.schema import ServerConfig
from nonet.server import http as http_module
from nonet.server import listen as listen_module
from tests.server.live import Live, live

PROMPT = {"prompt": "a b c", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    """The system holds little of what a client does not read: the server has to."""
    create = socket.create_server

    def create_small(address: tuple[str, int]) -> socket.socket:
        made = create(address)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # accepted sockets inherit it
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_server", create_small)
        with live(data_parallel_size=2, num_blocks=1024) as running:
            patch.undo()
            yield running


@pytest.fixture(scope="module")
def alone(server: Live) -> str:
    return ask(server)


def ask(server: Live) -> str:
    response = httpx.post(f"{server.url}/v1/completions", json=PROMPT, timeout=60)
    assert response.status_code == 200
    return response.json()["choices"][0]["text"]


def request(body: dict, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def connect(server: Live, receive_buffer: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(30)
    host, port = server.url.removeprefix("http://").split(":")
    made.connect((host, int(port)))
    return made


def all_of(plain: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while part := plain.recv(65536):
        found += part
    return found


def test_clients_that_do_not_read_hold_nobody_up(server, alone):
    """Hundreds of kilobytes for each of them. Nor do the sequences they asked for stay with the ranks."""
    body = {"prompt": "a b", "n": 4, "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 20}
    silent = [connect(server, receive_buffer=2048) for _ in range(8)]
    for each in silent:
        each.sendall(request(body))
    assert ask(server) == alone
    assert server.all_free(60), "an unread stream keeps its sequences running"
    assert ask(server) == alone
    silent[0].settimeout(60)
    found = b""
    while b"data: [DONE]" not in found:
        part = silent[0].recv(65536)
        assert part, "the stream broke off"
        found += part
    assert len(found) > 100_000, "the system may have held all of it"
    for each in silent:
        each.close()
    assert ask(server) == alone


def test_a_connection_whose_client_reads_nothing_ends(monkeypatch):
    """By the system, so that a server does not wait for ever; shortened here from minutes."""
    monkeypatch.setattr(listen_module, "_UNREAD_MS", 500)
    (listener,) = listen_module.listen(ServerConfig(port=0))
    with listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(20)
            with pytest.raises(OSError, match="timed out") as raised:
                accepted.sendall(b"x" * 50_000_000)
    assert raised.value.errno is not None, "the system's word, not that of the socket's own timeout"


def test_gone_before_the_first_token(server, alone):
    """Closed or reset at any moment between the request's last byte and its first token."""
    rng = random.Random(1)
    for i in range(60):
        with connect(server) as plain:
            prompt = [rng.randrange(3, 8000) for _ in range(rng.randrange(1, 600))]
            plain.sendall(request({"prompt": prompt, "max_tokens": 100, "n": 1 + i % 3, "stream": i % 2 == 0}))
            time.sleep(rng.uniform(0, 0.03))
            if i % 4 < 2:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.all_free(60)
    assert ask(server) == alone


def test_half_a_request(server, alone, monkeypatch, caplog):
    """Gone in the middle of a body: no word of it. Still there: told after a while, and the connection is closed."""
    half = request(PROMPT)[:-10]
    with caplog.at_level(logging.WARNING):
        for part in (half, half[:20], b""):
            with connect(server) as plain:
                plain.sendall(part)
        time.sleep(0.2)
    assert caplog.records == []
    monkeypatch.setattr(http_module, "_BODY_S", 0.3)
    with connect(server) as plain:
        plain.sendall(half)
        found = all_of(plain)
    assert found.startswith(b"HTTP/1.1 408")
    assert b"the rest did not come within 0.3 s" in found
    assert ask(server) == alone


def test_many_connections_that_ask_nothing(server, alone):
    idle = [connect(server) for _ in range(300)]
    for each in idle[::2]:
        each.sendall(request(PROMPT)[:-10])
    assert ask(server) == alone
    for each in idle:
        each.close()


def test_requests_sent_before_the_answers(server):
    body = {**PROMPT, "stream": True}
    with connect(server) as plain:
        plain.sendall(request(body) * 3 + request(PROMPT, "Connection: close"))
        found = all_of(plain)
    assert found.count(b"HTTP/1.1 200") == 4
    assert found.count(b"data: [DONE]") == 3
    assert found.rstrip().endswith(b"}")


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\n\r\nzz", "Content-Length: -1", "Content-Length: 1e3",
    ],
)  # fmt: skip
def test_a_length_that_is_none(server, alone, head):
    with connect(server) as plain:
        plain.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n{{}}".encode())
        assert all_of(plain).startswith(b"HTTP/1.1 400")
    assert ask(server) == alone


@pytest.mark.parametrize("text", ["\x00", "\ufeffa", "\u202ea\u0301", "👩‍👩‍👧‍👦" * 3, "\U0010ffff", "\r\n\t"])
def test_odd_text_comes_back_whole(server, text):
    """Through every route that takes text."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
        echo = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 1, "stop": [text]}
        assert http.post("/v1/completions", json=echo).json()["choices"][0]["text"] == text
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200


def test_a_text_that_must_match_what_has_no_end(server):
    """It is as long as was allowed, and says so."""
    schema = {"type": "array", "items": {"type": "string", "minLength": 10**6}, "minItems": 10**6}
    body = {"prompt": "a", "max_tokens": 12, "n": 2, "guided_json": schema}
    found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert [(choice["finish_reason"], choice["text"].lstrip()[0]) for choice in found] == [("length", "[")] * 2
    assert server.all_free()


def test_matching_nothing_and_matching_anything(server):
    for extra, text in (({"guided_regex": ""}, ""), ({"guided_json": {}}, None), ({"guided_json": "true"}, None)):
        response = httpx.post(f"{server.url}/v1/completions", json={**PROMPT, **extra}, timeout=60)
        assert response.status_code == 200, response.text
        assert text is None or response.json()["choices"][0]["text"] == text
