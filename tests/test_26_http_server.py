"""Section 26: the HTTP server with real sockets: what it serves, to whom, for how long, and how it stops."""
import asyncio
import collections
import contextlib
import errno
import gc
import http.client
import json
import os
import pathlib
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import claudomator as c
from tests.support import COMMAND, PROGRAM, DaemonProcess, clean_environment, wait_until


class Server:
    """A server in a thread, with a handler that does what the tests need."""

    def __init__(self, root):
        self.root, self.logged, self.said, self.closed_streams = root, [], [], 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.gate = self.run(self.new_gate())
        self.http = c.HttpServer(lambda level, text: self.logged.append(text), ("named.example",))
        self.http.bind_tcp("127.0.0.1:0")
        self.http.bind_unix(f"{root}/agent.sock")
        self.port = int(self.http.addresses[0].rpartition(":")[2])
        self.run(self.http.start(self.handle))

    async def new_gate(self):
        return asyncio.Event()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def open_gate(self):
        self.loop.call_soon_threadsafe(self.gate.set)

    def handle(self, request, peer):
        if request.path == "/echo":
            return c.json_response({"method": request.method, "body": request.body.decode(), "peer": peer, "query": request.query})
        if request.path == "/big":
            return c.HttpResponse(b"x" * (8 << 20))
        if request.path == "/boom":
            raise RuntimeError("the fault")
        if request.path == "/bad-field":
            return c.HttpResponse(b"", 200, "text/plain", (("A", "b\r\nc: d"),))
        if request.path == "/missing":
            raise c.NotFound("there is no such thing")
        if request.path == "/stream":
            return c.HttpStream(self.pieces(request.query))
        if request.path == "/upgrade":
            return c.HttpUpgrade(self.parrot)
        return self.slow() if request.path == "/slow" else c.serve_file(f"{self.root}/web", request)

    async def slow(self):
        self.said.append("slow")
        await self.gate.wait()
        return c.HttpResponse(b"slow", content_type="text/plain")

    async def pieces(self, query):
        try:
            for piece in (b"data: 1\n\n", b"", b"data: 2\n\n"):
                yield piece
            if ("fail", "") in query:
                raise RuntimeError("the stream's fault")
            if ("endless", "") in query:
                while True:
                    yield b"y" * 65536
            await self.gate.wait()
            yield b"data: 3\n\n"
        finally:
            self.closed_streams += 1

    async def parrot(self, reader, writer):
        writer.write(c.encode_head(101, [("Upgrade", "parrot"), ("Connection", "Upgrade")]))
        try:
            while line := await reader.readline():
                writer.write(line.upper())
        except asyncio.CancelledError:
            writer.write(b"BYE\n")
            raise

    def connect(self):
        raw = socket.create_connection(("127.0.0.1", self.port))
        raw.settimeout(20)
        return raw

    def say(self, data):
        """All that comes until the server closes."""
        with self.connect() as raw:
            raw.sendall(data)
            return read_all(raw)

    def close(self, grace_s=5.0):
        self.run(self.http.close(grace_s))

    def end(self):
        self.open_gate()
        self.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "web").mkdir()
    server = Server(tmp_path)
    yield server
    server.end()


def read_all(raw):
    data = b""
    while piece := raw.recv(1 << 16):
        data += piece
    return data


def read_answer(raw):
    """(status, fields, body) of one answer with a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = raw.recv(1)
        assert piece, data
        data += piece
    line, *lines = data.decode().strip().split("\r\n")
    fields = {name.lower(): value for name, value in (text.split(": ", 1) for text in lines)}
    body = b""
    while len(body) < int(fields.get("content-length", 0)):
        body += raw.recv(int(fields["content-length"]) - len(body))
    return int(line.split()[1]), fields, body


def ask(path, *fields, method="GET", close=True, body=b""):
    more = [*fields, "Connection: close"] if close else fields
    return ("\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *more]) + "\r\n\r\n").encode() + body


def status(data):
    return int(data.split(b" ")[1])


def test_one_connection_serves_many_requests(server):
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for number in range(3):
        client.request("POST", f"/echo?n={number}", body=("ä" * number).encode())
        answer = client.getresponse()
        assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
        assert json.load(answer) == {"method": "POST", "body": "ä" * number, "peer": "127.0.0.1", "query": [["n", str(number)]]}
    client.request("HEAD", "/echo")
    answer = client.getresponse()
    assert answer.status == 200 and int(answer.headers["Content-Length"]) > 10 and answer.read() == b""
    client.request("PUT", "/echo", body=iter([b"a", b"b" * 100_000]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert json.load(client.getresponse())["body"] == "a" + "b" * 100_000
    client.request("GET", "/missing")
    answer = client.getresponse()
    assert (answer.status, json.load(answer)) == (404, {"error": {"code": "not_found", "message": "there is no such thing"}})
    assert len(server.http.connections) == 1
    client.close()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_is_served_on_tcp_and_on_the_unix_socket(server):
    def curl(*args):
        done = subprocess.run(["curl", "-sS", "-m", "20", "--noproxy", "*", *args], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout
    url = f"http://127.0.0.1:{server.port}/echo"
    assert json.loads(curl(url))["method"] == "GET"
    assert json.loads(curl("--http1.0", url))["method"] == "GET"
    assert json.loads(curl("-H", "Transfer-Encoding: chunked", "-d", "x" * 100_000, url))["body"] == "x" * 100_000
    assert json.loads(curl("-H", "Expect: 100-continue", "-d", "abc", url))["body"] == "abc"
    assert json.loads(curl("--unix-socket", f"{server.root}/agent.sock", "http://any.name/echo"))["peer"] == "unix"
    assert curl(url, url).count("GET") == 2 and curl("-I", url).startswith("HTTP/1.1 200 OK")


def test_pipelined_requests_are_answered_in_their_order(server):
    with server.connect() as raw:
        raw.sendall(ask("/slow", close=False) + b"".join(ask(f"/echo?{n}", close=False) for n in range(500)))
        wait_until(lambda: server.said)
        server.open_gate()
        assert read_answer(raw)[2] == b"slow"
        for number in range(500):
            assert json.loads(read_answer(raw)[2])["query"] == [[str(number), ""]]


@pytest.mark.slow
def test_a_client_that_sends_ahead_does_not_hold_up_others(server):
    with server.connect() as flood, server.connect() as other:
        flood.setblocking(False)
        block = ask("/echo", close=False) * 1000
        ends, slowest = time.monotonic() + 1, 0.0
        while time.monotonic() < ends:
            try:
                flood.send(block)
            except BlockingIOError:
                pass
            began = time.monotonic()
            other.sendall(ask("/echo", close=False))
            assert read_answer(other)[0] == 200
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1


@pytest.mark.parametrize("body", [
    b"1\r\nx\r\n" * 3000 + b"0\r\n\r\n", (b"1;" + b"a" * 250 + b"\r\nx\r\n") * 60 + b"0\r\n\r\n", b"0\r\nA: " + b"b" * 15_000 + b"\r\n\r\n"],
    ids=["tiny chunks", "extensions", "trailer"])
def test_a_body_that_is_read_in_small_steps_does_not_hold_up_others(server, monkeypatch, body):
    monkeypatch.setattr(c, "TURN_S", 0)
    turns, steps, feed = [0], [], c.RequestDecoder.feed

    def turn():
        turns[0] += 1
        if not server.gate.is_set():
            server.loop.call_soon(turn)
    monkeypatch.setattr(c.RequestDecoder, "feed", lambda decoder, data: (steps.append(turns[0]), feed(decoder, data))[1])
    server.loop.call_soon_threadsafe(turn)
    with server.connect() as raw:
        raw.sendall(ask("/echo", "Transfer-Encoding: chunked", method="POST", close=False) + body)
        assert read_answer(raw)[0] == 200
    server.open_gate()
    assert len(steps) > 1000 and max(collections.Counter(steps).values()) < 10, "so many steps in one turn of the loop"


def test_continue_is_said_before_the_body_and_only_where_it_is_awaited(server):
    with server.connect() as raw:
        raw.sendall(ask("/echo", "Expect: 100-continue", "Content-Length: 3", method="POST", close=False))
        assert read_answer(raw)[0] == 100
        raw.sendall(b"abc")
        assert json.loads(read_answer(raw)[2])["body"] == "abc"
        raw.sendall(ask("/echo", "Expect: 100-continue", f"Content-Length: {c.MAX_BODY_BYTES + 1}", method="POST", close=False))
        assert read_answer(raw)[0] == 413, "a body that will not be taken is not asked for"
        assert read_all(raw) == b""
    told = server.say(b"POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc")
    assert told.startswith(b"HTTP/1.1 200") and b"Connection: close" in told


def test_http_1_0_goes_on_only_where_it_is_asked_for(server):
    with server.connect() as raw:
        for _ in range(2):
            raw.sendall(b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert read_answer(raw)[1]["connection"] == "keep-alive"
        raw.sendall(b"GET /echo HTTP/1.0\r\n\r\n")
        assert read_answer(raw)[1]["connection"] == "close" and read_all(raw) == b""


@pytest.mark.parametrize("data, expected", [
    (b"GET / HTTP/1.1\r\n\r\n", 400), (b"nonsense\r\n\r\n", 400), (b"GET /" + b"a" * 40_000, 414), (b"GET / HTTP/9.9\r\n\r\n", 505),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9000, 431), (ask("/", "A: " + "b" * 40_000), 431), (b"\r\n\r\n\r\n\r\nGET", 400),
    (ask("/echo", "Content-Length: 3", "Transfer-Encoding: chunked"), 400)])
def test_what_cannot_be_read_is_refused_and_closed(server, data, expected):
    told = server.say(data + b"GET /echo HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status(told) == expected and told.count(b"Date: ") == 1 and b"Connection: close" in told
    assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]
    wait_until(lambda: not server.http.connections)


def test_a_head_that_ends_too_early_is_answered_to_a_client_that_listens(server):
    with server.connect() as raw:
        raw.sendall(b"GET / HTTP/1.1\nHost: localhost\n\n")
        raw.shutdown(socket.SHUT_WR)
        told = read_all(raw)
    assert status(told) == 400 and b"CR LF" in told


def test_a_client_that_shuts_its_side_still_gets_its_answer(server):
    with server.connect() as raw:
        raw.sendall(ask("/echo"))
        raw.shutdown(socket.SHUT_WR)
        assert status(read_all(raw)) == 200


def test_who_sends_too_much_still_reads_why_it_was_refused(server):
    for _ in range(5):
        with server.connect() as raw:
            raw.sendall(ask("/echo", f"Content-Length: {20 << 20}", method="POST"))
            sent = 0
            while sent < 4 << 20:
                sent += raw.send(b"x" * 65536)
            assert read_answer(raw)[0] == 413


def test_bodies_of_all_clients_together_are_bounded(server, monkeypatch):
    monkeypatch.setattr(c, "MAX_HELD_BODIES", 100_000)
    with server.connect() as first, server.connect() as second:
        first.sendall(ask("/echo", "Content-Length: 90000", method="POST", close=False, body=b"x" * 80_000))
        wait_until(lambda: server.http.held == 80_000)
        second.sendall(ask("/echo", "Content-Length: 90000", method="POST", body=b"x" * 90_000))
        assert read_answer(second)[0] == 503
        first.sendall(b"x" * 10_000)
        assert read_answer(first)[0] == 200
        first.sendall(ask("/echo", "Content-Length: 9", method="POST", close=False, body=b"x" * 9))
        assert read_answer(first)[0] == 200
    wait_until(lambda: server.http.held == 0)


# Time

@pytest.mark.parametrize("phase, sent, expected", [
    ("HEAD_S", b"GET / HTTP/1.1\r\nHost: lo", 408), ("HEAD_S", b"G", 408), ("BODY_S", ask("/echo", "Content-Length: 3", body=b"ab"), 408),
    ("IDLE_S", b"", None), ("BODY_S", ask("/echo", "Transfer-Encoding: chunked", body=b"1\r\n"), 408)])
def test_each_phase_has_its_time(server, monkeypatch, phase, sent, expected):
    monkeypatch.setattr(c, phase, 0.2)
    began = time.monotonic()
    told = server.say(sent)
    assert 0.15 < time.monotonic() - began < 5
    assert told == b"" if expected is None else status(told) == expected
    wait_until(lambda: not server.http.connections)


@pytest.mark.slow
def test_idle_time_begins_anew_with_each_exchange(server, monkeypatch):
    monkeypatch.setattr(c, "IDLE_S", 0.6)
    with server.connect() as raw:
        began = time.monotonic()
        while time.monotonic() - began < 1.2:
            raw.sendall(ask("/echo", close=False))
            assert read_answer(raw)[0] == 200
            assert not server.gate.is_set() and raw.fileno() >= 0
            time.sleep(0.1)  # a client that thinks
        last = time.monotonic()
        assert read_all(raw) == b"" and time.monotonic() - last > 0.4


def test_a_byte_now_and_then_does_not_prolong_a_head(server, monkeypatch):
    monkeypatch.setattr(c, "HEAD_S", 0.5)
    with server.connect() as raw:
        began, told = time.monotonic(), b""
        raw.settimeout(0.05)
        while not told:
            try:
                raw.sendall(b"a")
                told = raw.recv(1000)
            except TimeoutError:
                assert time.monotonic() - began < 5
        assert status(told) == 408


@pytest.mark.parametrize("path", ["/big", "/stream?endless"])
def test_a_client_that_never_reads_is_dropped_and_costs_no_more_than_its_answer(server, monkeypatch, path):
    monkeypatch.setattr(c, "WRITE_S", 0.3)
    with server.connect() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(ask(path, close=False))
        wait_until(lambda: server.http.connections)
        wait_until(lambda: not server.http.connections)
    assert server.closed_streams == path.startswith("/stream")


def test_a_slow_reader_gets_all_of_a_large_answer_as_long_as_it_reads(server, monkeypatch):
    with server.connect() as raw:
        raw.sendall(ask("/big"))
        wait_until(lambda: any(other.phase == "writing" for other in server.http.connections))
        assert len(read_answer(raw)[2]) == 8 << 20


# Streams and upgrades

def test_a_stream_sends_each_piece_as_it_comes_and_shows_its_end(server):
    with server.connect() as raw:
        raw.sendall(ask("/stream", close=False))
        told = b""
        while b"data: 2" not in told:
            told += raw.recv(1000)
        assert b"Transfer-Encoding: chunked" in told and b"data: 3" not in told
        server.open_gate()
        told += read_all(raw)
    assert told.partition(b"\r\n\r\n")[2] == b"".join(map(c.encode_chunk, (b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n", b"")))
    told = server.say(b"GET /stream HTTP/1.0\r\n\r\n")
    assert told.endswith(b"\r\n\r\ndata: 1\n\ndata: 2\n\ndata: 3\n\n")
    assert server.say(ask("/stream", method="HEAD")).endswith(b"\r\n\r\n")


def test_a_stream_ends_soon_after_its_client_has_left(server):
    raw = server.connect()
    raw.sendall(ask("/stream"))
    raw.recv(10)
    raw.close()
    wait_until(lambda: server.closed_streams == 1)
    wait_until(lambda: not server.http.connections)


def test_a_stream_that_fails_is_cut_so_that_nobody_takes_it_for_whole(server):
    with server.connect() as raw:
        raw.sendall(ask("/stream?fail"))
        told = b""
        try:
            told = read_all(raw)
        except ConnectionResetError:
            pass
    assert not told.endswith(b"0\r\n\r\n")
    wait_until(lambda: "the stream's fault" in "".join(server.logged))


def test_an_upgrade_takes_the_connection_over_with_what_was_sent_ahead(server):
    with server.connect() as raw:
        raw.sendall(ask("/upgrade", "Upgrade: parrot", close=False) + b"hello\nhe")
        status_, fields, _ = read_answer(raw)
        assert (status_, fields["upgrade"]) == (101, "parrot")
        assert raw.recv(100) == b"HELLO\n"
        raw.sendall(b"re\n")
        assert raw.recv(100) == b"HERE\n"
        raw.shutdown(socket.SHUT_WR)
        assert read_all(raw) == b""


# Who

@pytest.mark.parametrize("host, expected", [
    ("localhost", 200), ("127.0.0.1:1", 200), ("[::1]", 200), ("named.example:80", 200), ("NAMED.example", 200), ("evil.com", 403),
    ("127.0.0.1.evil.com", 403), ("192.168.0.1", 403)])
def test_a_host_that_is_not_this_server_is_refused_except_on_the_unix_socket(server, host, expected):
    request = f"GET /echo HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    told = server.say(request)
    assert status(told) == expected and (expected == 200 or b"server_names" in told)
    assert status(server.say(request.replace(b" /echo", f" http://{host}/echo".encode()).replace(host.encode() + b"\r", b"localhost\r"))) == expected
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(f"{server.root}/agent.sock")
        raw.sendall(request)
        assert status(read_all(raw)) == 200


@pytest.mark.parametrize("method, fields, expected", [
    ("POST", ["Origin: http://evil.com"], 403), ("POST", ["Origin: null"], 403), ("DELETE", ["Origin: http://localhost:1"], 403),
    ("GET", ["Origin: http://evil.com", "Upgrade: websocket"], 403), ("OPTIONS", ["Origin: http://evil.com"], 403),
    ("POST", ["Origin: http://localhost"], 200), ("POST", [], 200), ("GET", ["Origin: http://evil.com"], 200)])
def test_pages_of_other_sites_change_nothing_and_read_nothing(server, method, fields, expected):
    told = server.say(ask("/echo", *fields, method=method))
    assert status(told) == expected and b"access-control" not in told.lower()


def test_a_fault_of_the_program_is_answered_logged_and_hurts_nobody_else(server):
    with server.connect() as raw:
        raw.sendall(ask("/boom", close=False))
        status_, _, body = read_answer(raw)
        assert (status_, json.loads(body)["error"]["code"]) == (500, "internal") and b"the fault" not in body
        raw.sendall(ask("/echo", close=False))
        assert read_answer(raw)[0] == 200
    assert "GET /boom" in server.logged[0] and "Traceback" in server.logged[0]
    assert server.say(ask("/bad-field")) == b""
    wait_until(lambda: "header field 'A'" in "".join(server.logged))


def test_beyond_the_limit_the_longest_idle_connection_goes_and_a_busy_one_stays(server):
    server.http._most = 2
    with server.connect() as busy, server.connect() as idle:
        busy.sendall(ask("/slow", close=False))
        wait_until(lambda: server.said)
        idle.sendall(ask("/echo", close=False))
        assert read_answer(idle)[0] == 200
        third = server.connect()
        third.sendall(ask("/slow", close=False))
        assert read_all(idle) == b""
        wait_until(lambda: len(server.said) == 2)
        assert status(server.say(b"")) == 503
        server.open_gate()
        assert read_answer(busy)[2] == read_answer(third)[2] == b"slow"
        third.close()


def test_requests_that_never_come_keep_nobody_out(server):
    server.http._most = 3
    phases = lambda: sorted(one.phase for one in server.http.connections)
    with server.connect() as idle, server.connect() as first, server.connect() as second, contextlib.ExitStack() as stack:
        first.sendall(b"GET / HT")
        wait_until(lambda: phases() == ["idle", "idle", "reading"])
        second.sendall(ask("/echo", "Content-Length: 9", close=False))
        wait_until(lambda: phases() == ["idle", "reading", "reading"])
        third, fourth = (stack.enter_context(server.connect()) for _ in range(2))
        third.sendall(ask("/slow"))
        fourth.sendall(ask("/slow"))
        wait_until(lambda: phases() == ["reading", "working", "working"])
        assert read_all(idle) == read_all(first) == b"", "those that were awaited longest"
        second.sendall(b"123456789")
        assert read_answer(second)[0] == 200
        server.open_gate()
        assert read_answer(third)[2] == read_answer(fourth)[2] == b"slow"


def test_a_connection_that_is_refused_at_the_limit_leaves_no_timer(server):
    server.http._most = 1
    with server.connect() as busy:
        busy.sendall(ask("/slow", close=False))
        wait_until(lambda: server.said)
        for _ in range(5):
            assert status(server.say(b"")) == 503
        timers = lambda: [timer for timer in tuple(server.loop._scheduled) if not timer.cancelled()]
        wait_until(lambda: all(timer._callback.__self__ in server.http.connections for timer in timers()))


# The end

@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # CPython 3.13's transport that came too late
@pytest.mark.parametrize("turns", range(8))
def test_no_request_is_begun_after_the_end(turns):
    """A connection that is just being accepted when the server closes, after so many turns of the loop."""
    async def body():
        http, closed, late = c.HttpServer(lambda level, text: None), [], []
        http.bind_tcp("127.0.0.1:0")
        await http.start(lambda request, peer: (late.append(bool(closed)), c.json_response({}))[1])
        with socket.create_connection(c.split_address(http.addresses[0])) as raw:
            raw.sendall(ask("/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await http.close()
            closed.append(True)
            for _ in range(20):
                await asyncio.sleep(0)
        assert True not in late and not http.connections
    asyncio.run(body())
    gc.collect()


def test_a_stop_lets_answers_finish_closes_the_idle_and_ends_what_has_no_end(server):
    with server.connect() as busy, server.connect() as idle, server.connect() as half, server.connect() as stream, server.connect() as parrot:
        busy.sendall(ask("/slow", close=False))
        half.sendall(b"GET / HT")
        stream.sendall(ask("/stream"))
        parrot.sendall(ask("/upgrade", close=False))
        assert read_answer(parrot)[0] == 101
        wait_until(lambda: sorted(one.phase for one in server.http.connections) == ["idle", "lasting", "lasting", "reading", "working"])
        stopping = threading.Thread(target=server.close)
        stopping.start()
        assert read_all(idle) == b"" and read_all(parrot) == b"BYE\n" and b"data: 2" in read_quietly(stream)
        read_quietly(half)
        with pytest.raises(OSError):
            server.connect()
        assert stopping.is_alive() and not os.path.exists(f"{server.root}/agent.sock")
        server.open_gate()
        status_, fields, body = read_answer(busy)
        assert (status_, body, fields["connection"]) == (200, b"slow", "close") and read_all(busy) == b""
        stopping.join(10)
        assert not stopping.is_alive() and server.closed_streams == 1 and server.logged == []


def read_quietly(raw):
    data = b""
    try:
        while piece := raw.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_a_stop_waits_no_longer_than_it_may(server):
    with server.connect() as hanging, server.connect() as deaf:
        hanging.sendall(ask("/slow"))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(ask("/big"))
        wait_until(lambda: sorted(one.phase for one in server.http.connections) == ["working", "writing"])
        began = time.monotonic()
        server.close(0.2)
        assert time.monotonic() - began < 1 and not server.http.connections
        assert read_quietly(hanging) == b""


def test_a_refused_client_that_stays_is_dropped_without_a_word_when_the_server_stops(server):
    unhandled = []
    server.loop.set_exception_handler(lambda loop, facts: unhandled.append(facts))
    with server.connect() as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        wait_until(lambda: [one.phase for one in server.http.connections] == ["lingering"])
        server.close(0.05)
        assert status(read_quietly(raw)) == 400
    server.run(asyncio.sleep(0))
    assert not server.http.connections and unhandled == [] and server.logged == []


# Files

@pytest.fixture
def web(server):
    root = pathlib.Path(server.root) / "web"
    (root / "index.html").write_text("<h1>hello</h1>")
    (root / "app.js").write_text("1")
    (root / "sub").mkdir()
    (root / "sub" / "a b.css").write_text("x{}")
    (root / ".hidden").write_text("no")
    (root / "data.bin").write_bytes(b"\0")
    (root / "inside.js").symlink_to("app.js")
    (root / "outside.js").symlink_to("../secret")
    (root / "away").symlink_to("/etc")
    (root.parent / "secret").write_text("secret")
    (root.parent / "web2").mkdir()
    (root.parent / "web2" / "x").write_text("secret")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("path, kind", [
    ("/", "text/html; charset=utf-8"), ("/index.html", "text/html; charset=utf-8"), ("/app.js", "text/javascript; charset=utf-8"),
    ("/sub/a%20b.css", "text/css; charset=utf-8"), ("/data.bin", "application/octet-stream"), ("/inside.js", "text/javascript; charset=utf-8")])
def test_files_come_with_their_type_a_tag_and_a_strict_policy(server, web, path, kind):
    with server.connect() as raw:
        raw.sendall(ask(path, close=False))
        status_, fields, body = read_answer(raw)
        assert (status_, fields["content-type"]) == (200, kind) and body
        assert "default-src 'none'; script-src 'self';" in fields["content-security-policy"] and "unsafe" not in str(fields)
        assert fields["x-frame-options"] == "DENY" and fields["cache-control"] == "no-cache" and fields["x-content-type-options"] == "nosniff"
        raw.sendall(ask(path, f"If-None-Match: \"x\", W/{fields['etag']}", close=False))
        again, fields_again, _ = read_answer(raw)
        assert (again, fields_again["etag"]) == (304, fields["etag"]) and "content-length" not in fields_again
        raw.sendall(ask(path, method="HEAD"))
        told = read_all(raw)
        assert status(told) == 200 and told.endswith(b"\r\n\r\n") and f"Content-Length: {len(body)}".encode() in told


def test_a_changed_file_has_another_tag(server, web):
    tag = lambda: read_tag(server.say(ask("/app.js")))
    first = tag()
    os.utime(web / "app.js", ns=(1, 1))
    assert first != tag() == tag()


def read_tag(told):
    return told.partition(b"ETag: ")[2].partition(b"\r\n")[0]


@pytest.mark.parametrize("path, expected", [
    ("/nothing", 404), ("/sub", 404), ("/sub/", 404), ("/.hidden", 404), ("/sub/.x", 404), ("/outside.js", 404), ("/away/passwd", 404),
    ("/pipe", 404), ("//index.html", 404), ("/../secret", 400), ("/%2e%2e/secret", 400), ("/..%2fsecret", 400), ("/sub/..%5c..%5csecret", 400),
    ("/index.html/", 404), ("/index.html%00", 400), ("/" + "a" * 5000, 404), ("/../web2/x", 400)])
def test_nothing_but_the_files_of_the_page_is_served(server, web, path, expected):
    told = server.say(ask(path))
    assert status(told) == expected and b"secret" not in told.partition(b"\r\n\r\n")[2].replace(path.encode(), b"")


def test_a_file_can_only_be_read(server, web):
    told = server.say(ask("/app.js", method="POST"))
    assert status(told) == 405 and b"Allow: GET, HEAD" in told


# The daemon

HTTP = {"CLAUDOMATOR_SERVER_ADDR": "127.0.0.1:0"}


def get(daemon, path, host="localhost"):
    name, port = daemon.http_address.rsplit(":", 1)
    client = http.client.HTTPConnection(name.strip("[]"), int(port), timeout=20)
    client.request("GET", path, headers={"Host": host})
    answer = client.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        client.close()


def test_the_daemon_answers_on_its_port_and_on_the_agents_socket(tmp_path):
    (tmp_path / "data").mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "data" / "agent.sock"))
    stale.close()
    with DaemonProcess(tmp_path, env=HTTP) as daemon:
        assert get(daemon, "/api/health") == (200, b'{"status":"ok"}')
        assert get(daemon, "/api/version")[0] == 401
        path = daemon.data_dir / "agent.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(ask("/api/health"))
            assert status(read_all(raw)) == 200
        assert get(daemon, "/api/health", "ci.example.org")[0] == 403
        daemon.config_path.write_text('server_names = ["CI.example.org"]\n')
        daemon.call("daemon.reload")
        assert get(daemon, "/api/health", "ci.example.org")[0] == 200
        assert daemon.terminate() == 0 and not path.exists()


def test_without_an_address_there_is_no_port_and_changing_it_needs_a_restart(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        wait_until(lambda: "no HTTP port" in daemon.log())
        del daemon.env["CLAUDOMATOR_SERVER_ADDR"]
        daemon.config_path.write_text('server_addr = "localhost:0"\n')
        daemon.terminate()
        daemon.start()
        assert get(daemon, "/api/health")[0] == 200
        daemon.config_path.write_text('server_addr = "127.0.0.1:1"\n')
        assert daemon.call("daemon.reload")["changed"] == ["server_addr (needs a restart)"]
        assert get(daemon, "/api/health")[0] == 200


def test_a_kernel_without_a_family_costs_no_other_address(monkeypatch):
    class Socket(socket.socket):
        """``socket.socket`` of a kernel without IPv6."""
        def __init__(self, family=-1, *more, **options):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *more, **options)
    monkeypatch.setattr(socket, "socket", Socket)
    four, six = ((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0)),
                 (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", 0, 0, 0)))
    for found in ([six, four], [four, six]):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        server = c.HttpServer(lambda level, text: None)
        server.bind_tcp("localhost:0")
        listener, = server._listeners
        with listener:
            assert server.addresses == ["127.0.0.1:%d" % listener.getsockname()[1]]


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_ipv6_and_every_interface(tmp_path):
    with DaemonProcess(tmp_path, env={"CLAUDOMATOR_SERVER_ADDR": "[::1]:0"}) as daemon:
        assert daemon.http_address.startswith("[::1]:") and get(daemon, "/api/health", daemon.http_address)[0] == 200
    (tmp_path / "all").mkdir()
    with DaemonProcess(tmp_path / "all", "allow_unsigned_webhooks = true\n", env={"CLAUDOMATOR_SERVER_ADDR": ":0"}) as daemon:
        port = daemon.http_address.rpartition(":")[2]
        for place in ("127.0.0.1", "::1"):
            with socket.create_connection((place, int(port)), 20) as raw:
                raw.sendall(ask("/api/health"))
                assert status(read_all(raw)) == 200


def test_a_port_in_use_stops_the_start_before_anything_is_dispatched_and_names_the_setting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        env = clean_environment(tmp_path, CLAUDOMATOR_DATA_DIR=str(tmp_path / "data"), CLAUDOMATOR_SERVER_ADDR=address)
        done = subprocess.run([*COMMAND, "serve"], env=env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 3 and "server_addr" in done.stderr and address in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "data" / "claudomator.db").exists()
    for bad, code in (("nonsense", 2), (":8484", 2), ("no.such.name.invalid:80", 2), ("192.0.2.1:0", 2)):
        done = subprocess.run([*COMMAND, "serve"], env={**env, "CLAUDOMATOR_SERVER_ADDR": bad}, capture_output=True, text=True, timeout=20)
        assert done.returncode == code and "server_addr" in done.stderr and "Traceback" not in done.stderr, done


def test_a_run_without_a_daemon_opens_no_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        env = clean_environment(tmp_path, CLAUDOMATOR_DATA_DIR=str(tmp_path / "data"),
                                CLAUDOMATOR_SERVER_ADDR=f"127.0.0.1:{other.getsockname()[1]}")
        task = json.dumps({"name": "t", "agent": {"type": "shell", "instructions": "true"}})
        done = subprocess.run([*COMMAND, "run", "-"], env=env, input=task, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_thousand_idle_connections_cost_little_and_wake_nobody(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096 and hard != resource.RLIM_INFINITY:
        pytest.skip("no 4096 descriptors are to be had here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    sockets = []
    try:
        with DaemonProcess(tmp_path, env=HTTP) as daemon:
            host, port = daemon.http_address.split(":")
            get(daemon, "/api/health")
            before = daemon.memory_kb()
            for number in range(1000):
                sockets.append(socket.create_connection((host, int(port)), 20))
                if number % 2:
                    sockets[-1].sendall(ask("/api/health", close=False))
                    assert read_answer(sockets[-1])[0] == 200
            each_kb = (daemon.memory_kb() - before) / 1000
            assert each_kb < 16, each_kb
            assert get(daemon, "/api/health")[0] == 200
            switches = lambda: int(pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0])
            wait_until(lambda: steady(switches))
            began = time.monotonic()
            daemon.terminate()
            assert time.monotonic() - began < 4, "idle connections do not hold up the stop"
    finally:
        for raw in sockets:
            raw.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def steady(count, for_s=0.3):
    before = count()
    time.sleep(for_s)  # the promise is that nothing happens in this time
    return count() == before


def test_serving_imports_nothing_that_the_daemon_does_not_have(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})
import claudomator as c
asyncio = c.import_asyncio()
async def main():
    server = c.HttpServer(print)
    server.bind_tcp("127.0.0.1:0")
    server.bind_unix({str(tmp_path / 'a.sock')!r})
    before = set(sys.modules)
    await server.start(lambda request, peer: c.json_response({{}}))
    import socket
    raw = socket.socket()
    raw.connect(server._listeners[0].getsockname())
    reader, writer = await asyncio.open_connection(sock=raw)
    writer.write(b"GET /api/health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
    assert b"200 OK" in await reader.read()
    await server.close()
    print(sorted(set(sys.modules) - before))
    print([name for name in ("http", "urllib", "email", "ssl", "ipaddress", "encodings.idna", "re._parser") if name in sys.modules])
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[]" and not {"http", "urllib", "email", "ssl"} & set(eval(done.stdout.split("\n")[1]))


# The daemon and clients of bad will


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A daemon, asked over TCP as anybody can."""
    with DaemonProcess(tmp_path_factory.mktemp("hostile"), 'stop_grace = "300ms"\n', HTTP) as daemon:
        daemon.token = (daemon.data_dir / "api-token").read_text().strip()
        yield daemon


def send(daemon, method, path, body=None, *fields, token="operator", leave=False):
    """(status, header lines, document) of one request on a connection of its own; ``leave`` waits for no answer."""
    token = daemon.token if token == "operator" else token
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *fields]
    lines += [f"Authorization: Bearer {token}"] * (token is not None)
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines += [f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"] * ("Content-Type" not in "".join(fields))
    name, port = daemon.http_address.rsplit(":", 1)
    with socket.create_connection((name, int(port)), 60) as raw:
        raw.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
        if leave:
            return None
        head, _, text = read_all(raw).partition(b"\r\n\r\n")
    fields = head.decode("latin-1").split("\r\n")
    return int(fields[0].split()[1]), set(fields[1:]), json.loads(text) if text[:1] == b"{" else text


def running(daemon, task_id):
    """The id of a task's execution, once it runs."""
    return wait_until(lambda: next((run["id"] for run in daemon.call("execution.list", id=task_id)["executions"]
                                    if run["status"] == "RUNNING"), None))


SMALL = {"name": "t", "agent": {"type": "shell", "instructions": "true"}}


@pytest.mark.parametrize("path", ["/api/tasks/a%2Frun", "/api%2Ftasks", "/api/tasks/%2e%2e/run", "/api/tasks/a%5Cb"])
def test_an_encoded_slash_is_no_way_round(hostile, path):
    status, _, told = send(hostile, "GET", path)
    assert status == 400 and "encoded slash" in told["error"]["message"]


def test_a_huge_id_is_not_repeated(hostile):
    for method, path, body in (("GET", "/api/tasks/" + "9" * 7000, None), ("POST", f"/api/tasks/{'9' * 7000}/run", {}),
                               ("POST", "/api/tasks", {**SMALL, "parent_task_id": "9" * 1_000_000}),
                               ("POST", "/api/tasks", {**SMALL, "depends_on": ["9" * 1_000_000]})):
        status, _, told = send(hostile, method, path, body)
        assert status in (404, 422) and len(told["error"]["message"]) < 300, method


@pytest.mark.parametrize("body", [b'{"name":"t","timeout":' + b"9" * 5000 + b"}", b"1" * 5000])
def test_an_endless_number_is_told_in_our_words(hostile, body):
    status, _, told = send(hostile, "POST", "/api/tasks", body)
    assert status == 400 and "too many digits" in told["error"]["message"] and "sys." not in told["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("body", [
    {f"k{n}": n for n in range(200_000)}, {"tasks": SMALL, **{f"k{n}": n for n in range(200_000)}}, [SMALL] * 120_000,
    [{"name": "t", "agent": 5}] * 250_000, {**SMALL, "tags": ["x"] * 1_000_000}, {**SMALL, "depends_on": ["x"] * 1_000_000}, {**SMALL, **{f"nome{n}": 1 for n in range(400_000)}}])
def test_a_document_of_wrong_keys_or_countless_tasks_does_not_stop_the_daemon(hostile, body):
    body = json.dumps(body, separators=(",", ":")).encode()
    began = time.monotonic()
    status, _, told = send(hostile, "POST", "/api/tasks", body)
    assert status in (400, 422) and len(json.dumps(told)) < 20_000
    assert time.monotonic() - began < 5  # it was half a minute


def test_a_large_task_is_taken_whole(hostile):
    status, _, told = send(hostile, "POST", "/api/tasks", {**SMALL, "description": "x" * 5_000_000})
    assert status == 201 and len(told["tasks"][0]["description"]) == 5_000_000


@pytest.mark.parametrize("name", ["token", "access_token", "api_token"])
def test_a_token_in_the_query_is_refused_with_its_right_place(hostile, name):
    for token in (None, "operator"):
        status, _, told = send(hostile, "GET", f"/api/tasks?{name}={hostile.token}", token=token)
        assert status == (401 if token is None else 400)
        assert "Authorization: Bearer TOKEN" in told["error"]["message"] and hostile.token not in json.dumps(told)


@pytest.mark.parametrize("fields", [["X-HTTP-Method-Override: DELETE"], ["X-HTTP-Method: DELETE"], ["X-Method-Override: DELETE"],
                                    ["X-Original-URL: /api/pool/pause"], ["X-Rewrite-URL: /api/pool/pause"]])
def test_no_field_changes_what_a_request_asks_for(hostile, fields):
    task_id = hostile.add("true", queue=False)
    assert send(hostile, "POST", f"/api/tasks/{task_id}", {}, *fields)[0] == 405
    assert send(hostile, "GET", f"/api/tasks/{task_id}", None, *fields)[0] == 200
    assert hostile.call("daemon.status")["paused"] is False


def test_head_says_what_get_says_without_the_body(hostile):
    task_id = hostile.add("true")
    hostile.wait(task_id)
    known = [path.replace("{}", task_id if "/tasks/" in path else "nope") for path, methods in c.ROUTES.items()
             if "GET" in methods and path != "/api/ws"]
    assert send(hostile, "HEAD", "/api/ws")[0] == 405  # a WebSocket is opened with GET alone
    for path in [*known, "/api/tasks/nope/logs/stream", "/api/events?task=nope", "/api/nothing"]:
        path += "?timeout_s=0" * path.endswith("/wait")
        head = send(hostile, "HEAD", path)
        if head[0] == 200 and any("event-stream" in line for line in head[1]):
            assert "nope" not in path and head[2] == b""
            continue
        got = send(hostile, "GET", path)
        lines = [{line for line in answer[1] if not line.startswith(("Date", "Content-Length" if "/daemon" in path else "Date"))}
                 for answer in (head, got)]
        assert (head[0], lines[0], head[2]) == (got[0], lines[1], b""), path


def test_every_path_tells_what_it_takes_to_who_asks_with_another_method(hostile):
    for path, methods in c.ROUTES.items():
        for method in ("OPTIONS", "TRACE", "PUT", "get"):
            status, lines, _ = send(hostile, method, path.replace("{}", "x"))
            allowed = next(line for line in lines if line.startswith("Allow: "))[7:].split(", ")
            assert status == 405 and set(allowed) == {*methods, *(["HEAD"] if "GET" in methods else [])}, path


def test_an_idempotency_key_makes_one_task_however_often_and_at_once_it_comes(hostile):
    found = []
    clients = [threading.Thread(target=lambda: found.append(send(hostile, "POST", "/api/tasks", SMALL, "Idempotency-Key: one")))
               for _ in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(20)
    assert len(found) == 20 and {status for status, _, _ in found} == {201}
    assert len({told["tasks"][0]["id"] for _, _, told in found}) == 1
    assert send(hostile, "POST", "/api/tasks", SMALL, "Idempotency-Key: a", "Idempotency-Key: b")[0] == 400
    status, _, told = send(hostile, "POST", "/api/tasks", SMALL, "Idempotency-Key: ")
    assert status == 422 and "Idempotency-Key" in told["error"]["message"]


def test_a_change_goes_to_its_end_when_its_client_leaves_at_once(hostile):
    task_id = hostile.add("trap '' TERM; while :; do sleep 0.05; done", agent={"type": "shell"})
    running(hostile, task_id)
    send(hostile, "POST", f"/api/tasks/{task_id}/cancel", {}, leave=True)  # takes until the agent is proven gone
    assert hostile.wait(task_id)["state"] == c.CANCELLED
    send(hostile, "POST", "/api/tasks", {**SMALL, "name": "left alone"}, leave=True)
    wait_until(lambda: any(task["name"] == "left alone" for task in hostile.call("task.list")["tasks"]))


@pytest.mark.slow
def test_two_hundred_polls_wait_together_and_end_with_their_task(hostile):
    task_id, before, sockets = hostile.add("while [ ! -e go ]; do sleep 0.02; done", queue=True), hostile.memory_kb(), []
    name, port = hostile.http_address.rsplit(":", 1)
    try:
        for _ in range(200):
            sockets.append(socket.create_connection((name, int(port)), 30))
            sockets[-1].sendall(f"GET /api/tasks/{task_id}/wait HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                                f"Authorization: Bearer {hostile.token}\r\n\r\n".encode())
        began = time.monotonic()
        assert send(hostile, "GET", "/api/version")[0] == 200 and time.monotonic() - began < 2
        hostile.call("task.cancel", ids=[task_id])
        for raw in sockets:
            answer = read_all(raw)
            assert status(answer) == 200 and b'"state":"CANCELLED"' in answer
        assert hostile.memory_kb() - before < 20_000
    finally:
        for raw in sockets:
            raw.close()


def test_a_garbage_token_of_any_length_opens_nothing(hostile):
    for size in (*range(1, 80), 255, 256, 4096, 12_000):
        for letter in "a\xff":
            answered, lines, told = send(hostile, "GET", "/api/version", None, f"Authorization: Bearer {letter * size}", token=None)
            assert answered == 401 and any(line.startswith("WWW-Authenticate: Bearer") for line in lines), size
    for near in (hostile.token[:-1], hostile.token + "x", hostile.token.swapcase(), hostile.token[::-1], f"{hostile.token},{hostile.token}"):
        assert send(hostile, "GET", "/api/version", token=near)[0] == 401


def test_a_socket_in_a_deep_directory_serves_though_the_descriptor_of_its_address_means_something_else_now(tmp_path):
    directory = tmp_path / ("l" * 100)
    directory.mkdir(mode=0o700)

    async def body():
        server = c.HttpServer(lambda level, message: None)
        server.bind_unix(str(directory / "agent.sock"))
        taken = [open(__file__, "rb") for _ in range(3)]  # one of them has that number
        await server.start(lambda request, peer: c.HttpResponse(b"here"))
        with c.short_socket_path(str(directory / "agent.sock")) as address:
            reader, writer = await asyncio.open_unix_connection(address)
        writer.write(ask("/"))
        assert (await reader.read()).endswith(b"here")
        writer.close()
        await server.close()
        for file in taken:
            file.close()
    asyncio.run(body())
    assert not (directory / "agent.sock").exists()
