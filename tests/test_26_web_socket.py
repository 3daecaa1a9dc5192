"""Section 26, WebSocket connections: real sockets, a server's loop in a thread, and clients that behave and that do not."""
import asyncio
import threading
import time

import pytest

import claudomator as c
from tests import ws_echo
from tests.support import wait_until
from tests.ws_client import BINARY, CLOSE, PING, PONG, TEXT, Client, frame


class Server:
    """Serves WebSockets at ``address`` in a thread; ``connections`` are those that run, ``ended`` what ``run`` raised."""

    def __init__(self):
        self.loop, self.connections, self.ended, self.tasks = asyncio.new_event_loop(), [], [], []
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._servers = []

    def listen(self, on_message="echo", **options):
        """The address of a new port whose connections have these options; all messages go to ``on_message``."""
        async def handler(connection):
            self.connections.append(connection)
            self.tasks.append(asyncio.current_task())
            fault = None
            try:
                await connection.run(connection.send if on_message == "echo" else on_message)
            except BaseException as error:
                fault = error
            self.connections.remove(connection)
            self.ended.append(fault)

        self._servers.append(self.run(ws_echo.start_server(handler, **options)))
        return ws_echo.address_of(self._servers[-1])

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def call(self, function, *arguments):
        """Call it in the loop, in one turn."""
        async def inside():
            return function(*arguments)
        return self.run(inside())

    def close(self):
        for connection in list(self.connections):
            self.call(connection.abort)
        wait_until(lambda: not self.connections)
        for server in self._servers:
            self.run(server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def connect():
    clients = []

    def connect(address, **options):
        clients.append(Client(address, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def test_messages_are_echoed_and_pings_answered_between_fragments(server, connect):
    client = connect(server.listen())
    assert client.answer.startswith(b"HTTP/1.1 101 ") and b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in client.answer
    client.send(TEXT, "Grüße")
    assert client.receive() == (TEXT, "Grüße".encode())
    client.send(BINARY, b"\xff\x00", final=False)
    client.send(PING, b"are you there")
    client.send(PONG, b"unasked")
    client.send(0, b"\x01")
    assert [client.receive(), client.receive()] == [(PONG, b"are you there"), (BINARY, b"\xff\x00\x01")]


def test_frames_that_came_with_the_opening_request_are_not_lost(server, connect):
    client = connect(server.listen(), early=frame(TEXT, "early") + frame(PING))
    assert [client.receive(), client.receive()] == [(TEXT, b"early"), (PONG, b"")]


def test_a_client_that_sends_countless_frames_does_not_hold_up_others(server, connect, monkeypatch):
    turns, steps, feed, done = [0], [], c.MessageDecoder.feed, threading.Event()

    def turn():
        turns[0] += 1
        if not done.is_set():
            server.loop.call_soon(turn)
    monkeypatch.setattr(c.MessageDecoder, "feed", lambda decoder, data: (steps.append((turns[0], len(data))), feed(decoder, data))[1])
    client = connect(server.listen())
    server.loop.call_soon_threadsafe(turn)
    client.socket.sendall(frame(PONG) * 20_000 + frame(TEXT, "heard all"))
    assert client.receive() == (TEXT, b"heard all")
    done.set()
    numbers = [number for number, _ in steps]
    assert len(numbers) == len(set(numbers)) and max(size for _, size in steps) < 5000


@pytest.mark.parametrize("payload, answer", [
    (b"\x03\xe8bye", (CLOSE, 1000, "")), (b"\x0f\xa0", (CLOSE, 4000, "")), (b"", (CLOSE, None, ""))])
def test_a_clients_close_frame_is_answered_with_its_code_and_ends_the_connection(server, connect, payload, answer):
    client = connect(server.listen())
    client.send(CLOSE, payload)
    client.send(TEXT, "too late")
    assert client.rest() == [answer]
    client.close()
    wait_until(lambda: server.ended == [None])


def test_a_protocol_error_answers_what_came_before_and_says_why_without_a_reset(server, connect):
    client = connect(server.listen())
    client.socket.sendall(frame(TEXT, "one") + frame(3) + frame(TEXT, "two") * 1000)
    frames = client.rest()
    assert frames == [(TEXT, b"one"), (CLOSE, 1002, "opcode 3 is reserved")]
    client.close()
    wait_until(lambda: server.ended == [None])


def test_a_message_that_is_too_big_closes_with_1009(server, connect):
    client = connect(server.listen(max_message=1000))
    client.send(TEXT, "x" * 1001)
    assert client.rest()[-1][:2] == (CLOSE, 1009)


def test_the_server_closes_and_waits_for_the_answer(server, connect):
    client = connect(server.listen())
    wait_until(lambda: server.connections)
    connection = server.connections[0]
    server.call(connection.close, 1001, "restart")
    server.call(connection.put, c.encode_message("nothing follows a close frame"))
    assert client.receive() == (CLOSE, 1001, "restart")
    client.send(PING, b"no pong after a close frame")
    assert server.connections == [connection]
    client.send(CLOSE, b"\x03\xe9")
    assert client.rest() == []
    client.close()
    wait_until(lambda: server.ended == [None])


def test_what_a_client_says_after_the_servers_close_frame_reaches_nobody(server, connect):
    heard = []

    async def hear(data):
        heard.append(data)
        server.connections[0].close()
    client = connect(server.listen(on_message=hear))
    client.socket.sendall(frame(TEXT, "one") + frame(TEXT, "two"))
    assert client.receive() == (CLOSE, 1000, "")
    client.socket.sendall(frame(TEXT, "three") + frame(CLOSE))
    assert client.rest() == [] and heard == ["one"]


def test_a_client_that_never_answers_a_close_frame_is_dropped(server, connect):
    client = connect(server.listen(close_wait_s=0.2))
    wait_until(lambda: server.connections)
    started = time.monotonic()
    server.call(server.connections[0].close)
    wait_until(lambda: server.ended == [None])
    assert 0.15 < time.monotonic() - started < 5
    assert client.receive() == (CLOSE, 1000, "")


def test_a_client_that_keeps_sending_after_its_error_is_dropped(server, connect):
    client = connect(server.listen(close_wait_s=0.3))
    client.send(3)
    with pytest.raises(OSError):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            client.send(TEXT, "x" * 1000)
    wait_until(lambda: server.ended == [None])


@pytest.mark.slow
def test_a_half_open_client_is_dropped_and_one_that_answers_pings_stays(server, connect):
    address = server.listen(ping_every_s=0.2)
    silent, alive = connect(address), connect(address)
    wait_until(lambda: len(server.connections) == 2)
    for _ in range(6):
        assert alive.receive() == (PING, b"")
        alive.send(PONG)
    assert len(server.connections) == 1
    assert silent.rest() == [(PING, b"")]


def test_a_client_that_vanishes_ends_its_connection_and_leaves_no_timer(server, connect):
    client = connect(server.listen())
    wait_until(lambda: server.connections)
    client.close()
    wait_until(lambda: server.ended == [None])
    assert server.call(lambda: [timer for timer in server.loop._scheduled if not timer.cancelled()]) == []


def test_what_a_handler_raises_closes_with_1011_and_reaches_the_caller(server, connect):
    async def fail(data):
        raise ZeroDivisionError(data)
    client = connect(server.listen(on_message=fail))
    client.socket.sendall(frame(TEXT, "x") + frame(TEXT, "y"))
    assert [answer[:2] for answer in client.rest()] == [(CLOSE, 1011)]
    client.close()
    wait_until(lambda: server.ended)
    assert isinstance(server.ended[0], ZeroDivisionError)


def test_a_stopping_server_says_so(server, connect):
    client = connect(server.listen())
    wait_until(lambda: server.tasks)
    server.call(server.tasks[0].cancel)
    assert [answer[:2] for answer in client.rest()] == [(CLOSE, 1001)]
    wait_until(lambda: server.ended)
    assert isinstance(server.ended[0], asyncio.CancelledError)


def test_messages_nobody_asked_for_are_passed_over(server, connect):
    client = connect(server.listen(on_message=None))
    client.socket.sendall(frame(TEXT, "x") + frame(BINARY, "y") + frame(PING, "z"))
    assert client.receive() == (PONG, b"z")


class CountingTransport:
    """Stands before a transport and counts its writes."""

    def __init__(self, transport):
        self._transport, self.writes = transport, 0

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def write(self, data):
        self.writes += 1
        self._transport.write(data)


def test_the_frames_of_one_turn_leave_in_order_and_in_one_write(server, connect):
    address = server.listen()
    clients = [connect(address) for _ in range(3)]
    wait_until(lambda: len(server.connections) == 3)
    for connection in server.connections:
        connection._transport = CountingTransport(connection._transport)

    def one_turn():
        for number in range(3):
            c.broadcast(server.connections, [c.encode_message(f"{number}a"), c.encode_message(f"{number}b")])
            server.connections[1].put(c.encode_message(f"{number}c"))
        return {id(connection._outbox[0]) for connection in server.connections}

    assert len(server.call(one_turn)) == 1, "one frame exists once, whatever the number of clients"
    expected = [b"0a", b"0b", b"1a", b"1b", b"2a", b"2b"]
    own = server.connections[1]._transport._transport.get_extra_info("peername")
    for client in clients:
        mine = [b"0a", b"0b", b"0c", b"1a", b"1b", b"1c", b"2a", b"2b", b"2c"]
        wanted = mine if client.socket.getsockname() == own else expected
        assert [client.receive()[1] for _ in wanted] == wanted
    assert [connection._transport.writes for connection in server.connections] == [1, 1, 1]


def flood(server, count, size, then=lambda: True):
    """Broadcast ``count`` messages of ``size`` bytes, one a turn; ``then`` says whether to go on."""
    data = c.encode_message(b"x" * size)
    for _ in range(count):
        server.call(c.broadcast, list(server.connections), [data])
        if not then():
            break


def test_a_client_that_never_reads_is_sent_away_and_the_others_miss_nothing(server, connect):
    address = server.listen(close_wait_s=0.2)
    never, reader = connect(address, receive_buffer=4096), connect(address)
    wait_until(lambda: len(server.connections) == 2)
    heard = []
    thread = threading.Thread(target=lambda: heard.extend(reader.rest()))
    thread.start()
    most = []

    def sizes():
        most.append(max((sum(map(len, connection._outbox)) for connection in server.connections), default=0))
        return not server.ended
    flood(server, 20000, 5000, sizes)
    wait_until(lambda: server.ended == [None])
    assert c.MAX_UNSENT - 5100 <= max(most) <= c.MAX_UNSENT + 5100
    server.call(server.connections[0].close)
    reader.socket.shutdown(1)
    thread.join(20)
    assert [len(answer[1]) for answer in heard[:-1]] == [5000] * len(most) and heard[-1] == (CLOSE, 1000, "")
    assert {answer[0] for answer in never.rest()} == {BINARY}, "it was dropped: it did not even take the close frame"


def test_a_slow_client_that_reads_again_hears_when_to_come_back(server, connect):
    slow = connect(server.listen(), receive_buffer=4096)
    wait_until(lambda: server.connections)
    connection = server.connections[0]
    flood(server, 20000, 5000, lambda: connection._open)
    assert [answer[:1] for answer in connection._outbox] == [b"\x88"], "what waited is given up, not kept until it reads"
    frames = []
    while not frames or frames[-1][0] == BINARY:
        frames.append(slow.receive())
    assert frames[-1] == (CLOSE, 1013, "too slow; connect again from the last event you have seen")
    assert {len(answer[1]) for answer in frames[:-1]} == {5000}, "whole frames up to the end"
    slow.send(CLOSE, b"\x03\xf5")
    assert slow.rest() == []


def test_answers_wait_for_a_client_that_reads_late_and_are_not_lost(server, connect):
    client = connect(server.listen(), receive_buffer=4096)
    message, count = bytes(range(256)) * 8192, 6  # 2 MB each, more than all buffers hold
    thread = threading.Thread(target=lambda: [client.send(BINARY, message) for _ in range(count)])
    thread.start()
    wait_until(lambda: server.connections and server.connections[0]._draining is not None)
    assert [client.receive() == (BINARY, message) for _ in range(count)] == [True] * count
    thread.join(20)


def test_a_request_that_opens_no_websocket_is_refused(server):
    import socket
    with socket.create_connection(server.listen(), timeout=20) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 426 ") and b"Sec-WebSocket-Version: 13" in answer
