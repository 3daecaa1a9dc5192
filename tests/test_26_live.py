"""Section 26, the event log over WebSocket and as server-sent events: real daemons, many clients, and kill -9."""
import contextlib
import json
import socket
import threading
import time

import pytest

import claudomator as c
from tests.api import ApiDaemon
from tests.support import DaemonProcess, shell_task, wait_until
from tests.ws_client import CLOSE, PING, PONG, TEXT, Client, LiveClient, opening

SECRET = "hunter2-hunter2"
HTTP = {"CLAUDOMATOR_SERVER_ADDR": "127.0.0.1:0"}


@contextlib.contextmanager
def started(*args):
    """A daemon that has told its start: what comes next is a test's own."""
    with ApiDaemon(*args) as daemon:
        wait_until(lambda: last_seq(daemon))
        yield daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with started(tmp_path_factory.mktemp("live"), f'max_concurrent = 20\ngithub_token = "{SECRET}"\n') as daemon:
        yield daemon


@pytest.fixture
def connect(daemon):
    clients = []

    def connect(token=None, *args, **options):
        clients.append(LiveClient(daemon.config.agent_socket_path, daemon.token if token is None else token, *args, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
    wait_until(lambda: daemon.core.live._groups == {}, what="that nobody is left in a group")
    assert daemon.core.live._tell not in daemon.core.bus._watchers, "nobody listens: nothing is done"


def pending(name="t", **more):
    return {**shell_task("true", name), **more}


def make(daemon, *args, **more):
    return daemon.client.call("task.create", tasks=pending(*args, **more))["tasks"][0]["id"]


def stored(daemon, since=0, task_id=None):
    return daemon.here(lambda: daemon.core.store.events_since(since, 100_000, task_id))


def last_seq(daemon):
    return daemon.here(lambda: daemon.core.store.published_seq)


def joined(daemon, count):
    wait_until(lambda: sum(map(len, daemon.core.live._groups.values())) == count, what=f"{count} clients that follow")


# -- who is told


@pytest.mark.parametrize("way", ["header", "message", "protocol"])
def test_a_client_says_its_token_in_one_of_three_ways_and_hears_where_it_stands(daemon, connect, way):
    client = connect(way=way)
    assert client.hear() == {"kind": "hello", "seq": last_seq(daemon), "last_event": last_seq(daemon), "gap": False}
    assert (b"Sec-WebSocket-Protocol: claudomator\r\n" in client.answer) == (way == "protocol")
    assert daemon.token.encode() not in client.answer
    task_id = make(daemon)
    event = client.hear()
    assert (event["kind"], event["task_id"]) == ("task.created", task_id) and event == stored(daemon, event["seq"] - 1)[0]


def test_a_wrong_token_in_the_header_opens_nothing(daemon, connect):
    for fields in (["Authorization: Bearer wrong"], ["Authorization: Basic eDp5"], ["Authorization:"]):
        client = connect(way="none", fields=fields)
        assert client.status == 401 and b"WWW-Authenticate: Bearer" in client.answer


@pytest.mark.parametrize("way, token", [("message", "wrong"), ("message", ""), ("protocol", "wrong"), ("message", 5), ("message", None)])
def test_a_wrong_token_closes_with_4401_and_a_sentence(daemon, connect, way, token):
    client = connect(token if token is not None else [], way=way)
    kind, code, reason = client.hear()
    assert (kind, code) == (CLOSE, 4401) and "api-token" in reason and client.status == 101


@pytest.mark.parametrize("message", [b"{", b"[]", b'{"token": null}', b"\xff".decode("latin-1").encode(), b""])
def test_a_first_message_that_is_no_token_closes_with_4401(daemon, connect, message):
    client = connect(way="none")
    client.send(TEXT, message)
    assert client.hear()[:2] == (CLOSE, 4401)


def test_a_first_message_may_come_in_fragments_and_a_large_one_is_refused(daemon, connect):
    client = connect(way="none")
    text = json.dumps({"token": daemon.token}).encode()
    client.send(TEXT, text[:7], final=False)
    client.send(PING, b"between")
    client.send(0, text[7:])
    assert client.receive() == (PONG, b"between") and client.hear()["kind"] == "hello"
    large = connect(way="none")
    large.send(TEXT, b"x" * (c.MAX_TOKEN_MESSAGE + 1))
    assert large.hear()[:2] == (CLOSE, 1009)


def test_what_a_client_says_after_its_token_is_passed_over(daemon, connect):
    for way in ("header", "message"):
        client = connect(way=way)
        for _ in range(3):
            client.send(TEXT, '{"token": "another"}')
        client.send(PING, b"heard all")
        assert sorted([client.receive()[0], client.receive()[0]]) == [TEXT, PONG]
        task_id = make(daemon)
        assert client.hear()["task_id"] == task_id


def test_who_says_no_token_is_sent_away_in_time(daemon, connect, monkeypatch):
    monkeypatch.setattr(c, "TOKEN_S", 0.05)
    assert connect(way="none").hear() == (CLOSE, 4401, 'no token came within 0.05 s; send {"token": "TOKEN"} first')


def test_a_token_in_the_url_is_refused(daemon, connect):
    assert connect(way="none", query=f"?token={daemon.token}").status == 400


def test_what_cannot_be_asked_for_is_told_before_the_upgrade_where_the_token_came(daemon, connect):
    assert connect(query="?since=x").status == 400 and connect(query="?task=nope").status == 404
    late = connect(query="?task=nope", way="message")
    assert late.hear()[:2] == (CLOSE, 4404)


def test_plain_requests_are_told_to_upgrade(daemon):
    for method, status in (("GET", 426), ("HEAD", 405), ("POST", 405)):
        assert daemon.answer(method, "/api/ws").status == status
    fields = dict(line.lower().split(": ", 1) for line in opening("/").decode().split("\r\n")[1:-2])
    assert daemon.answer("HEAD", "/api/ws", headers=fields).status == 405


def test_pages_of_other_sites_and_of_other_names_open_nothing(tmp_path):
    with DaemonProcess(tmp_path, env=HTTP) as daemon:
        host, port = daemon.http_address.split(":")
        token = (daemon.data_dir / "api-token").read_text().strip()
        for way in ("header", "protocol"):
            for name, origin, status in (("localhost", f"http://localhost:{port}", 101), ("localhost", "https://evil.example", 403),
                                         ("localhost", "null", 403), ("evil.example", f"http://evil.example:{port}", 403)):
                given = f"Authorization: Bearer {token}" if way == "header" else f"Sec-WebSocket-Protocol: claudomator.bearer.{token}"
                client = Client((host, int(port)), opening=opening("/api/ws", given, f"Origin: {origin}", host=f"{name}:{port}"))
                assert client.status == status, (name, origin)
                client.close()


def test_an_agent_hears_of_its_own_subtree_alone_until_its_execution_ends(daemon, connect, tmp_path):
    gate = tmp_path / "gate"
    own, _, token = daemon.running(f"while [ ! -e {gate} ]; do sleep 0.02; done", name="own")
    child = make(daemon, parent_task_id=own)
    mine, below = connect(token, "?since=0"), connect(token, f"?since=0&task={child}", way="message")
    assert {event["task_id"] for event in mine.hear_until(lambda event: event.get("to") == "RUNNING")[1:]} == {own}
    assert [event["task_id"] for event in (below.hear(), below.hear())[1:]] == [child]
    assert connect(token, f"?task={make(daemon)}").status == 404
    joined(daemon, 2)
    make(daemon)
    daemon.client.call("task.edit", ids=[child], changes={"tags": ["x"]})
    assert below.hear()["kind"] == "task.edited"
    gate.touch()
    for client in (mine, below):
        heard = client.hear_until(lambda event: False)
        assert heard[-1][:2] == (CLOSE, 4401) and {event["task_id"] for event in heard[:-1]} <= {own, child}
    assert connect(token).status == 401


def test_a_new_api_token_ends_what_the_old_one_opened(tmp_path):
    with started(tmp_path) as daemon:
        client = LiveClient(daemon.config.agent_socket_path, daemon.token)
        assert client.hear()["kind"] == "hello"
        joined(daemon, 1)
        daemon.config = daemon.config.replace(api_token="another-token-of-the-operator")
        daemon.client.call("daemon.reload")
        assert client.hear_until(lambda event: event["kind"] == "daemon.reloaded")[-1][:2] == (CLOSE, 4401)
        client.close()


# -- what is told


def test_a_client_begins_after_the_event_it_names_and_of_one_task_where_it_names_one(daemon, connect):
    ids = [make(daemon, f"n{number}") for number in range(3)]
    every, one = connect(query="?since=0"), connect(query=f"?since=0&task={ids[1][:12]}")
    expected = stored(daemon)
    assert [every.hear() for _ in range(len(expected) + 1)][1:] == expected
    assert [one.hear()["kind"], one.hear()] == ["hello", stored(daemon, 0, ids[1])[0]]
    joined(daemon, 2)
    daemon.client.call("task.edit", ids=ids, changes={"tags": ["x"]})
    assert [every.hear()["task_id"] for _ in ids] == ids and one.hear()["task_id"] == ids[1]


def test_pages_follow_each_other_without_a_gap(daemon, connect, monkeypatch):
    monkeypatch.setattr(c, "EVENT_PAGE", 3)
    for number in range(10):
        make(daemon, f"page{number}")
    client, expected = connect(query="?since=0"), stored(daemon)
    assert [client.hear() for _ in range(len(expected) + 1)][1:] == expected


def test_secrets_are_taken_out_also_of_what_was_encoded_before(daemon, connect):
    client = connect()
    client.hear()
    joined(daemon, 1)
    name = f"uses {SECRET} and soon-a-secret"
    for _ in range(2):
        daemon.client.call("task.create", tasks=pending(name))
        assert client.hear()["name"] == "uses [redacted] and soon-a-secret"
    daemon.here(lambda: daemon.core.renew_secrets(daemon.config.replace(webhook_secret="soon-a-secret")))
    again = connect(query=f"?since={last_seq(daemon) - 2}")
    assert [again.hear(), again.hear(), again.hear()][1]["name"] == "uses [redacted] and [redacted]"
    once_more = connect(query=f"?since={last_seq(daemon) - 2}")
    assert [once_more.hear(), once_more.hear(), once_more.hear()][2]["name"] == "uses [redacted] and [redacted]"
    stream = daemon.answer("GET", f"/api/events?since={last_seq(daemon) - 1}")
    assert daemon.events(stream, lambda event: event[1] is None)[-1][2]["name"] == "uses [redacted] and [redacted]"


def test_a_client_whose_events_are_gone_begins_with_the_oldest_and_is_told(tmp_path):
    with started(tmp_path) as daemon:
        for number in range(5):
            make(daemon, f"n{number}")
        daemon.here(lambda: daemon.core.store.prune_events(time.time() + 1, 3))
        make(daemon)  # the pruning is on disk
        newest = last_seq(daemon)
        for since, seq, gap in ((0, 3, True), (2, 3, True), (3, 3, False), (newest, newest, False), (newest + 99, newest, True)):
            client = LiveClient(daemon.config.agent_socket_path, daemon.token, f"?since={since}")
            hello = client.hear()
            assert hello == {"kind": "hello", "seq": seq, "last_event": newest, "gap": gap}, since
            if seq < newest:
                assert client.hear()["seq"] == seq + 1
            client.close()
            stream = daemon.answer("GET", f"/api/events?since={since}")
            assert daemon.events(stream, lambda event: True)[0] == (str(seq), "hello", hello)
        daemon.here(lambda: daemon.core.store.prune_events(time.time() + 1, 1000))
        assert daemon.here(lambda: daemon.core.store.first_event()) == newest + 1, "the numbers go on"
        assert daemon.here(lambda: c.event_hello(daemon.core.store, 0))["seq"] == newest


def test_an_event_is_encoded_once_for_all_and_a_tick_is_one_write_for_each(daemon, connect, monkeypatch):
    clients = [connect() for _ in range(5)] + [connect(query="?since=0", way="message")]
    for client in clients[:5]:
        assert client.hear()["kind"] == "hello"
    joined(daemon, 6)
    told, encoded = [], []
    monkeypatch.setattr(c, "broadcast", lambda group, frames, send=c.broadcast: (told.append((len(group), len(frames))), send(group, frames)))
    monkeypatch.setattr(c.Redactor, "document", lambda self, text, clean=c.Redactor.document: (encoded.append(text), clean(self, text))[1])

    def tick():
        for number in range(4):
            daemon.core.store.append_event("test.tick", number=number)
    daemon.here(tick)
    for client in clients:
        assert client.hear_until(lambda event: event.get("number") == 3)[-1]["kind"] == "test.tick"
    assert told == [(6, 4)] and len([text for text in encoded if b"test.tick" in text]) == 4


def test_a_client_that_never_reads_is_sent_away_and_the_others_miss_nothing(daemon, connect):
    never, reader = connect(), connect()
    assert [never.hear()["kind"], reader.hear()["kind"]] == ["hello", "hello"]
    joined(daemon, 2)
    (group,), heard, text, sent = daemon.core.live._groups.values(), [], "x" * 20_000, 0
    while all(client.is_open for client in tuple(group)) and sent < 200:
        daemon.here(lambda: daemon.core.store.append_event("test.flood", text=text))
        sent += 1
        heard.append(reader.hear())
    daemon.here(lambda: daemon.core.store.append_event("test.end"))
    heard.append(reader.hear())
    assert sent < 200 and [event["kind"] for event in heard] == ["test.flood"] * sent + ["test.end"]
    frames = never.hear_until(lambda event: False)
    assert frames[-1] == (CLOSE, *c.TOO_SLOW)
    again = connect(query=f"?since={frames[-2]['seq']}")
    assert again.hear()["gap"] is False
    rest = again.hear_until(lambda event: event["kind"] == "test.end")
    seqs = [event["seq"] for event in frames[:-1] + rest]
    assert seqs == list(range(heard[0]["seq"], heard[-1]["seq"] + 1)), "it comes back and has missed nothing"


@pytest.mark.slow
def test_a_client_that_does_not_read_what_it_missed_holds_one_page_and_is_sent_away(daemon, connect, monkeypatch):
    monkeypatch.setattr(c, "WRITE_S", 0.1)
    monkeypatch.setattr(c, "EVENT_PAGE", 10)
    asked, text, first = [], "y" * 50_000, last_seq(daemon)
    for _ in range(60):
        daemon.here(lambda: daemon.core.store.append_event("test.page", text=text))
    wait_until(lambda: last_seq(daemon) == first + 60)
    real = daemon.core.store.events_since
    monkeypatch.setattr(daemon.core.store, "events_since", lambda seq, *more: (asked.append(seq), real(seq, *more))[1])
    client = connect(query=f"?since={first}")
    wait_until(lambda: asked)
    threading.Event().wait(0.5)  # in which it does not read
    assert len(asked) < 4, "what it does not take is not read from the table"
    frames = client.hear_until(lambda event: False)
    assert frames[-1] == (CLOSE, *c.TOO_SLOW) and [event["seq"] for event in frames[:-1]] == list(range(first, frames[-2]["seq"] + 1))


def test_a_client_that_reads_late_still_gets_all_that_it_missed(daemon, connect, monkeypatch):
    monkeypatch.setattr(c, "EVENT_PAGE", 10)
    text, first = "y" * 50_000, last_seq(daemon)
    for _ in range(40):
        daemon.here(lambda: daemon.core.store.append_event("test.late", text=text))
    wait_until(lambda: last_seq(daemon) == first + 40)
    client = connect(query=f"?since={first}", receive_buffer=4096)
    wait_until(lambda: any(connection._transport.get_write_buffer_size() for connection in daemon.daemon.http.connections))
    assert daemon.core.live._groups == {}, "it joins when it has taken all"
    assert [client.hear()["seq"] for _ in range(41)] == list(range(first, first + 41))
    joined(daemon, 1)


@pytest.mark.slow
def test_half_open_clients_are_dropped_and_cost_no_wakeup_when_they_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(c.WebSocketConnection.__init__, "__defaults__", (c.MAX_MESSAGE, 0.2, 5.0))
    with started(tmp_path) as daemon:
        silent, alive = (LiveClient(daemon.config.agent_socket_path, daemon.token) for _ in range(2))
        joined(daemon, 2)
        alive.hear()
        for _ in range(4):
            assert alive.receive() == (PING, b"")
            alive.send(PONG)
        assert len(silent.rest()) == 2, "hello and a ping"
        joined(daemon, 1)
        alive.send(CLOSE, b"\x03\xe8")
        assert (CLOSE, 1000, "") in alive.rest()
        silent.close(), alive.close()
        wait_until(lambda: daemon.core.live._groups == {} and not daemon.daemon.http.connections)
        timers = daemon.here(lambda: [timer for timer in daemon.loop._scheduled if not timer.cancelled()
                                      and getattr(timer._callback, "__self__", None).__class__ is c.WebSocketConnection])
        assert timers == []


def test_a_daemon_that_stops_says_so(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        path, token = str(daemon.data_dir / "agent.sock"), (daemon.data_dir / "api-token").read_text().strip()
        clients = [LiveClient(path, token), LiveClient(path, way="none")]
        assert clients[0].hear()["kind"] == "hello"
        assert daemon.terminate() == 0
        assert [client.hear_until(lambda event: False)[-1][:2] for client in clients] == [(CLOSE, 1001)] * 2


class Follower(threading.Thread):
    """Hears all there is, comes back whenever the daemon is gone, and keeps what it heard."""

    def __init__(self, path, token, form):
        super().__init__()
        self.path, self.token, self.form, self.seq, self.events, self.hellos, self.fault = path, token, form, 0, [], [], None
        self.done = threading.Event()

    def run(self):
        while not self.done.is_set():
            try:
                (self.over_socket if self.form == "socket" else self.over_sse)()
            except (OSError, AssertionError):
                self.done.wait(0.02)
            except Exception as error:
                self.fault = error
                return

    def take(self, document):
        if document["kind"] == "hello":
            self.hellos.append(document)
            assert document["seq"] == self.seq and not document["gap"], document
            return
        self.events.append(document)
        self.seq = document["seq"]
        if document["kind"] == "test.end":
            self.done.set()

    def over_socket(self):
        with contextlib.closing(LiveClient(self.path, self.token, f"?since={self.seq}")) as client:
            while not self.done.is_set() and isinstance(heard := client.hear(), dict):
                self.take(heard)

    def over_sse(self):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(self.path)
            raw.sendall(f"GET /api/events HTTP/1.0\r\nLast-Event-ID: {self.seq}\r\nAuthorization: Bearer {self.token}\r\n\r\n".encode())
            data = b""
            while not self.done.is_set() and (more := raw.recv(1 << 16)):
                *blocks, data = (data + more).split(b"\n\n")
                for block in blocks:
                    for line in block.split(b"\n"):
                        if line.startswith(b"data: "):
                            self.take(json.loads(line[6:]))


@pytest.mark.slow
def test_many_clients_miss_nothing_and_hear_nothing_twice_when_the_daemon_is_killed(tmp_path):
    with DaemonProcess(tmp_path, "max_concurrent = 4\n") as daemon:
        path, token = str(daemon.data_dir / "agent.sock"), (daemon.data_dir / "api-token").read_text().strip()
        followers = [Follower(path, token, "socket" if number % 5 else "sse") for number in range(30)]
        for follower in followers:
            follower.start()
        for _ in range(3):
            for number in range(15):
                daemon.add("true", queue=number % 3 == 0)
            daemon.kill9()
            daemon.start()
        for number in range(5):
            daemon.add("true", queue=False)
        last = daemon.add("true", queue=False, name="last")
        wait_until(lambda: all(follower.events and follower.events[-1].get("name") == "last" or follower.fault for follower in followers), 20,
                   "that all have heard of the last")
        for follower in followers:
            follower.done.set()
        daemon.add("true", queue=False)  # wakes them
        for follower in followers:
            follower.join(20)
        client = LiveClient(path, token, "?since=0")
        expected = client.hear_until(lambda event: event["task_id"] == last if "task_id" in event else False)[1:]
        client.close()
        for follower in followers:
            heard = [event for event in follower.events if event["seq"] <= expected[-1]["seq"]]
            assert follower.fault is None and heard == expected, follower.form
            assert len(follower.hellos) >= 4, "it came back after each end"


# -- server-sent events


def chunks_until(daemon, answer, is_last):
    async def read():
        found = []
        async for chunk in answer.chunks:
            found.append(chunk)
            if is_last(b"".join(found)):
                break
        await answer.chunks.aclose()
        return found
    return daemon.run(read())


def test_a_tick_of_events_is_one_piece_with_the_id_of_each(daemon):
    answer, first = daemon.answer("GET", f"/api/events?since={last_seq(daemon)}"), last_seq(daemon)

    def tick():
        for number in range(3):
            daemon.core.store.append_event("test.sse", number=number)
    daemon.here(tick)
    opening_piece, piece = chunks_until(daemon, answer, lambda text: b'"number":2' in text)
    assert opening_piece == (f'retry: 2000\nevent: hello\nid: {first}\n'
                             f'data: {{"kind":"hello","seq":{first},"last_event":{first},"gap":false}}\n\n').encode()
    blocks = piece.decode().split("\n\n")
    assert blocks.pop() == "" and [block.split("\n")[0] for block in blocks] == [f"id: {first + at}" for at in (1, 2, 3)]
    assert [json.loads(block.split("\ndata: ")[1]) for block in blocks] == stored(daemon, first)[:3]


def test_a_stream_without_since_misses_nothing_from_its_answer_on(daemon):
    answer = daemon.answer("GET", "/api/events")
    task_id = make(daemon)
    found = daemon.events(answer, lambda event: event[1] is None)
    assert [event[2]["kind"] for event in found] == ["hello", "task.created"] and found[-1][2]["task_id"] == task_id


def test_a_log_goes_on_at_the_byte_where_its_client_was(daemon, monkeypatch):
    monkeypatch.setattr(c, "LOG_CHUNK", 30)  # bytes: a line and a bit
    task_id = daemon.add(f"for n in 1 2 3 4 5 6; do echo line $n {SECRET}; done")
    text, last, tries = "", None, 0
    while True:
        answer = daemon.answer("GET", f"/api/tasks/{task_id}/logs/stream", headers={"last-event-id": last} if last else {})
        found = daemon.events(answer, lambda event: event[1] == "end" or event[2].get("text"))
        tries, text = tries + 1, text + "".join(event[2].get("text", "") for event in found)
        last = next((event[0] for event in reversed(found) if event[0]), last)
        if found[-1][1] == "end":
            break
    assert text == "".join(f"line {number} [redacted]\n" for number in range(1, 7)) and tries == 7


def test_a_client_of_a_stream_that_does_not_read_is_dropped(daemon, monkeypatch):
    monkeypatch.setattr(c, "WRITE_S", 0.2)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(daemon.config.agent_socket_path)
        raw.sendall(f"GET /api/events?since=0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.token}\r\n\r\n".encode())
        watchers = len(daemon.core.bus._watchers)
        wait_until(lambda: len(daemon.core.bus._watchers) > watchers or daemon.core.bus._watchers)
        text = "z" * 50_000
        for _ in range(20):
            daemon.here(lambda: daemon.core.store.append_event("test.unread", text=text))
        wait_until(lambda: not daemon.core.bus._watchers, what="that nobody watches any more")
        data = b""
        with contextlib.suppress(ConnectionError):
            while more := raw.recv(1 << 16):
                data += more
        assert data.startswith(b"HTTP/1.1 200 ") and not data.endswith(b"0\r\n\r\n"), "a part is not taken for the whole"
