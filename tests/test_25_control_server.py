"""Section 25: the control socket of a real daemon, and what hostile clients can do to others (nothing)."""
import asyncio
import json
import os
import pathlib
import random
import resource
import socket
import stat
import subprocess
import tempfile
import threading
import time

import pytest

import claudomator as c
from tests.support import COMMAND, DaemonProcess, shell_task, wait_until


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with DaemonProcess(tmp_path_factory.mktemp("control"), "max_concurrent = 4") as process:
        yield process


@pytest.fixture
def inside(tmp_path):
    """A daemon in a thread of this process, so that a test can look into it."""
    config = c.parse_config({"data_dir": str(tmp_path / "data"), "server_addr": ""}, "test", str(tmp_path))
    daemon, loop = c.Daemon(config, None, lambda level, message: None), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    run = lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)
    run(daemon.start())
    yield daemon
    run(daemon.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def connect(daemon):
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.connect(daemon.socket_path)
    raw.settimeout(20)
    return raw


def line(method, request_id=None, **params):
    request = {"jsonrpc": "2.0", "method": method, "params": params}
    return json.dumps(request if request_id is None else {**request, "id": request_id}).encode() + b"\n"


def read_lines(raw, count):
    data = b""
    while data.count(b"\n") < count:
        piece = raw.recv(1 << 16)
        if not piece:
            break
        data += piece
    return [json.loads(text) for text in data[:data.rfind(b"\n") + 1].split(b"\n") if text]


def latency_s(daemon, tries=5):
    """The slowest of a few status calls of a client of its own."""
    client, slowest = daemon.new_client(), 0.0
    for _ in range(tries):
        started = time.monotonic()
        client.call("daemon.status")
        slowest = max(slowest, time.monotonic() - started)
    client.close()
    return slowest


class Peak:
    """How much more memory the daemon has used at most since the beginning, in KB."""

    def __init__(self, daemon):
        self._path = f"/proc/{daemon.process.pid}"
        pathlib.Path(self._path, "clear_refs").write_text("5")
        self._start = self._high_water()

    def _high_water(self):
        return int(pathlib.Path(self._path, "status").read_text().split("VmHWM:")[1].split()[0])

    def grown_kb(self):
        return self._high_water() - self._start


# -- the protocol


def test_answers_to_many_requests_in_one_write_all_come_each_once(daemon):
    raw = connect(daemon)
    raw.sendall(b"".join(line("daemon.status", n) for n in range(500)) + line("agent.status", "last"))
    answers = read_lines(raw, 501)
    assert sorted(answer["id"] for answer in answers if answer["id"] != "last") == list(range(500))
    assert all("result" in answer for answer in answers)


def test_a_notification_gets_no_answer(daemon):
    raw = connect(daemon)
    raw.sendall(line("daemon.status") + line("no.such.method") + line("task.get", id="x") + line("daemon.status", 1))
    answers = read_lines(raw, 2)
    assert [answer["id"] for answer in answers] == [None, 1] and answers[0]["error"]["code"] == c.METHOD_NOT_FOUND


def test_a_line_that_is_sent_again_is_answered_anew(inside):
    """The server knows the line again that a client sent last; what it asks is looked up anew, and nothing is mixed up."""
    status, projects = line("daemon.status", 7), line("project.list", 7)
    budget = line("budget.status", 9)
    with connect(inside.config) as raw:
        ask = lambda data, count=1: (raw.sendall(data), read_lines(raw, count))[1]
        first = [ask(projects) for _ in range(3)]
        assert first[0] == first[1] == first[2] and first[0][0]["id"] == 7
        before, inside.core.config = inside.core.config, inside.core.config.replace(projects=(c.ProjectSettings(name="new", dir="/x"),))
        assert [project["name"] for project in ask(projects)[0]["result"]["projects"]] == ["new"]
        inside.core.config = before
        assert ask(projects) == first[0] and "counts" in ask(status)[0]["result"] and ask(projects) == first[0]
        ask(status), ask(status)
        raw.sendall(b" x")  # half a line: what follows is its end, not the line of before
        assert "error" in ask(status)[0] and "counts" in ask(status)[0]["result"]
        answers = ask(budget + projects, 2) + ask(projects) + ask(budget) + ask(budget)
        assert [answer["id"] for answer in answers] == [9, 7, 7, 9, 9]
        assert ["projects" in answer["result"] for answer in answers] == [False, True, True, False, False]
        gone = line("no.such", 3)
        assert ask(gone) == ask(gone) and ask(gone)[0]["error"]["code"] == c.METHOD_NOT_FOUND


def test_an_answer_that_was_given_before_is_searched_for_secrets_that_are_new(inside):
    secret, request = "a-project-name-that-becomes-a-secret", line("project.list", 1)
    inside.core.config = inside.core.config.replace(projects=(c.ProjectSettings(name=secret, dir="/x"),))
    with connect(inside.config) as raw:
        ask = lambda: (raw.sendall(request), read_lines(raw, 1))[1][0]["result"]["projects"][0]["name"]
        assert [ask() for _ in range(3)] == [secret] * 3
        before, inside.core.redactor = inside.core.redactor, c.Redactor([secret])
        assert [ask() for _ in range(3)] == [c.REDACTED] * 3
        inside.core.redactor = before
        assert [ask() for _ in range(3)] == [secret] * 3


def test_an_unknown_method_names_the_nearest(daemon):
    with pytest.raises(c.ClaudomatorError, match="did you mean 'task.cancel'"):
        daemon.call("task.cancle", ids=["x"])


def test_a_stream_can_be_cancelled_and_its_id_used_again(daemon):
    raw = connect(daemon)
    raw.sendall(line("events.watch", 5, since=0) + line("events.watch", 5, since=0) + line("stream.cancel", 6, stream=5))
    found = []
    while not any(answer.get("id") == 6 for answer in found):
        found += read_lines(raw, 1)
    assert any(answer.get("id") == 5 and "already open" in answer["error"]["message"] for answer in found)
    assert {"jsonrpc": "2.0", "id": 5, "result": {}} in found, "the answer that ends a stream"
    raw.sendall(line("stream.cancel", 7, stream=5) + line("events.watch", 5, since=0))
    found = []
    while not any(answer.get("method") == "events.watch" for answer in found):
        found += read_lines(raw, 1)
    assert next(answer for answer in found if answer.get("id") == 7)["result"] == {"cancelled": False}


def test_a_client_that_shuts_its_writing_side_still_gets_its_answers(daemon):
    raw = connect(daemon)
    task_id = daemon.add("sleep 0.3")
    raw.sendall(line("task.wait", 1, ids=[task_id]) + line("daemon.status", 2)[:-1])
    raw.shutdown(socket.SHUT_WR)
    assert [answer["id"] for answer in read_lines(raw, 9)] == [2, 1], "and then the daemon closes"


def test_values_nobody_expects_never_make_an_internal_error(daemon):
    rng, client = random.Random(19), daemon.client
    task_id = daemon.add("echo x", name="fuzz")
    daemon.wait(task_id)
    strange = {"str": ["", "x", task_id[:9], "ü\u2028", "-1", "../..", "9" * 400, "2h"], "int": [0, 1, 7, 2 ** 53 - 1],
               "number": [0, 0.5, 1e-300], "bool": [True, False], "ids": [[], [task_id], [task_id[:9], ""], ["x"] * 50],
               "names": [[], ["READY"], ["x"]], "object": [{}, {"name": None}, {"a": {"b": []}}, {"agent": {"type": 5}}],
               "any": [None, 5, "x", [], {}, [[]], {"tasks": 5}, {"tasks": [{}]}, {"name": "a\ud800", "agent": {}},
                       {"name": "a", "agent": {"instructions": "\ud800"}}, {"name": "a", "agent": {"instructions": "a\0"}},
                       {"tasks": [{"name": "n", "agent": {"instructions": "x"}, "depends_on": [{"task": "\ud800"}]}]},
                       {"name": "n", "idempotency_key": "\udcff", "agent": {"instructions": "x"}},
                       {"name": "n", "start_at": "9999-12-31T23:59:59Z", "agent": {"instructions": "x"}}]}
    strange["text"] = strange["str"]
    for _ in range(700):
        operation = rng.choice(list(c.OPERATIONS.values()))
        if operation.lasting or operation.name in ("daemon.backup", "daemon.reload"):
            continue
        params = {p.name: rng.choice(strange[p.kind]) for p in operation.params if p.required or rng.random() < 0.5}
        try:
            client.call(operation.name, **params)
        except c.ClaudomatorError as error:
            assert error.code != "internal", (operation.name, params, str(error))
    daemon.call("pool.resume")
    for kind in ("claude", "shell"):
        daemon.call("agent.unpark", agent=kind), daemon.call("pool.resume", agent=kind)
    assert "Traceback" not in daemon.log()


# -- hostile clients


def test_garbage_is_answered_with_errors_and_the_connection_stays(daemon):
    rng, raw = random.Random(20), connect(daemon)
    for _ in range(200):
        garbage = bytes(byte for byte in rng.randbytes(rng.randint(1, 300)) if byte != 10)
        raw.sendall(garbage + b"\n" + line("daemon.status", "alive"))
        found = read_lines(raw, 1)
        while found[-1].get("id") != "alive":
            found += read_lines(raw, 1)
        assert all("error" in answer for answer in found[:-1])


def test_an_endless_line_takes_bounded_memory_and_one_error(daemon):
    peak, raw, piece = Peak(daemon), connect(daemon), b"x" * (1 << 20)
    for _ in range(100):
        raw.sendall(piece)
    assert latency_s(daemon) < 1
    raw.sendall(b"\n" + line("daemon.status", 1))
    answers = read_lines(raw, 2)
    assert "8388608 bytes at most" in answers[0]["error"]["message"] and answers[1]["id"] == 1
    assert peak.grown_kb() < 24_000


def test_half_a_line_and_silence_hold_nobody_up(daemon):
    silent = [connect(daemon) for _ in range(50)]
    for raw in silent:
        raw.sendall(b'{"jsonrpc":"2.0","id":1,"meth')
    assert latency_s(daemon) < 1
    silent[0].sendall(b'od":"daemon.status"}\n')
    assert read_lines(silent[0], 1)[0]["id"] == 1


@pytest.mark.slow
def test_requests_without_reading_the_answers_wait_in_the_kernel(daemon):
    daemon.call("task.create", tasks={"tasks": [shell_task("true", f"t{n}", description="d" * 2000) for n in range(300)]})
    peak, greedy = Peak(daemon), [connect(daemon) for _ in range(5)]
    many = b"".join(line("task.list", n, limit=300) for n in range(3000))  # the answers would be 3 GB
    for raw in greedy:
        raw.setblocking(False)
        raw.send(many)
    assert latency_s(daemon, 20) < 1
    assert peak.grown_kb() < 30_000
    raw = greedy[0]
    raw.settimeout(20)
    assert [answer["id"] for answer in read_lines(raw, 3)[:3]] == [0, 1, 2], "when it reads, it goes on"


def test_six_hundred_connections_and_then_one_more(daemon):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    crowd = []
    try:
        busy = daemon.new_client()
        stream = busy.stream("events.watch", since=0)
        next(stream)
        for _ in range(600):
            crowd.append(connect(daemon))
        assert latency_s(daemon) < 1
        assert next(stream)["seq"] == 2, "one who is being served is not put out"
        newest = daemon.new_client()
        assert newest.call("daemon.status") and crowd[0].recv(1) == b"", "the longest idle one is"
    finally:
        for raw in crowd:
            raw.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_watchers_and_log_readers_that_never_read_cost_little(daemon):
    task_id = daemon.add("yes 'a line of a log that is rather long, as logs are' | head -c 30000000")
    daemon.wait(task_id)
    peak, sleepers = Peak(daemon), [connect(daemon) for _ in range(20)]
    for n, raw in enumerate(sleepers):
        raw.sendall(line("events.watch", 1, since=0) if n % 2 else line("execution.log", 1, id=task_id, follow=True))
    raw, calls = connect(daemon), 1500
    for start in range(0, calls, 100):  # each is an event
        raw.sendall(b"".join(line(f"pool.{verb}", n, agent="claude") for n in range(50) for verb in ("pause", "resume")))
        read_lines(raw, 100)
    assert latency_s(daemon) < 1
    assert peak.grown_kb() < 10_000
    sleepers[0].settimeout(20)
    stream = read_lines(sleepers[0], 5)
    assert stream[0]["method"] == "execution.log"


@pytest.mark.slow
def test_a_busy_client_does_not_starve_the_others(daemon):
    stop = threading.Event()

    def hammer():
        raw = connect(daemon)
        raw.settimeout(0.05)
        request = b"".join(line("pool.status", n) for n in range(200))
        while not stop.is_set():
            try:
                raw.sendall(request)
                while True:
                    raw.recv(1 << 20)
            except TimeoutError:
                pass
    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert latency_s(daemon, 6) < 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class PingPong:
    """A transport whose client sends its next request as soon as it is answered, ``count`` times."""

    def __init__(self, server, count):
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)  # as asyncio has it
        self.answers, self._left = 0, count
        self.connection = c.ControlConnection(server)
        self.connection.connection_made(self)

    def get_extra_info(self, name):
        return self.near

    def set_write_buffer_limits(self, high):
        pass

    def is_closing(self):
        return False

    def write(self, data):
        self.answers += 1
        self._left -= 1
        if self._left > 0:
            self.far.sendall(line("project.list", self.answers))

    def take(self, silence_s):
        """What one turn of the loop serves; returns how many answers there were."""
        before, request = self.answers, line("project.list", 0)
        self.connection.heard_at = time.monotonic() - silence_s
        self.connection._server.buffer[:len(request)] = request
        self.connection.buffer_updated(len(request))
        return self.answers - before

    def close(self):
        self.near.close()
        self.far.close()
        self.connection._server.connections.discard(self.connection)


def test_a_client_that_asks_again_at_once_is_served_without_a_turn_of_the_loop_but_not_for_ever(inside):
    wait_until(inside.core.store.is_durable)
    client = PingPong(inside.server, 3)
    assert client.take(silence_s=0) == 3  # and then nothing more came
    client.close()
    client = PingPong(inside.server, 3)
    assert client.take(silence_s=60) == 1
    client.close()
    client = PingPong(inside.server, 10 ** 9)
    start = time.monotonic()
    assert client.take(silence_s=0) > 3 and time.monotonic() - start < 1
    client.far.close()
    client.close()


def test_an_end_of_the_connection_ends_what_only_tells(inside):
    bus, server, path = inside.core.bus, inside.server, inside.config.socket_path
    keeper = c.ControlClient(path)
    task_id = keeper.call("task.create", tasks=shell_task("true"))["tasks"][0]["id"]
    before = len(bus._watchers)
    for ending in ("close", "half", "reset"):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(path)
        raw.sendall(line("task.wait", 1, ids=[task_id]) + line("events.watch", 2, since=10 ** 9)
                    + line("execution.log", 3, id=task_id, follow=True))
        wait_until(lambda: len(bus._watchers) == before + 3)
        if ending == "half":
            raw.shutdown(socket.SHUT_WR)
            wait_until(lambda: any(connection._eof for connection in server.connections))
            assert len(bus._watchers) == before + 3
        if ending == "reset":
            raw.sendall(line("agent.status", 4))
            raw.recv(1)  # the rest is unread when it closes
        raw.close()
        wait_until(lambda: len(bus._watchers) == before, what=f"nothing left after {ending}")
        wait_until(lambda: len(server.connections) == 1)


def test_what_changes_something_goes_on_when_its_client_leaves(daemon):
    ids = [daemon.add("true") for _ in range(3)]
    directories = [daemon.data_dir / "executions" / daemon.wait(task_id)["execution"]["id"] for task_id in ids]
    raw = connect(daemon)
    raw.sendall(line("task.delete", 1, ids=ids))
    raw.close()
    wait_until(lambda: not any(directory.exists() for directory in directories))


# -- who may come, and where the socket is


def test_a_client_reads_why_it_was_refused_also_where_the_daemon_hung_up_before_it_could_ask(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        client = c.ControlClient(path)
        client.connect()
        peer, _ = listener.accept()
        peer.sendall(c.encode_error(None, c.Forbidden("not you")))
        peer.close()
        real, client._socket = client._socket, None
        client.connect = lambda: setattr(client, "_socket", real)  # new, as far as the client knows
        with pytest.raises(c.ClaudomatorError, match="not you") as refused:
            client.call("daemon.status")
        assert refused.value.code == "forbidden"
        client.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused():
    with tempfile.TemporaryDirectory(dir="/tmp") as home, DaemonProcess(home) as daemon:
        import _socket  # noqa: F401  before the change of user: its file may not be readable then
        os.chmod(home, 0o755), os.chmod(daemon.data_dir, 0o755), os.chmod(daemon.socket_path, 0o666)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setgid(65534), os.setuid(65534)
                daemon.new_client().call("daemon.status")
                os.write(writer, b"let in")
            except c.ClaudomatorError as error:
                os.write(writer, f"{error.code}: {error}".encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reader, 1000).decode() == "forbidden: user 65534 may not use the control socket of user 0"
        assert daemon.call("daemon.status")


def test_socket_and_directory_are_for_the_owner_alone(daemon):
    assert stat.S_IMODE(os.stat(daemon.socket_path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(daemon.data_dir).st_mode) == 0o700


def serve_refused(daemon, *options):
    done = subprocess.run([*COMMAND, "serve", *options], env=daemon.env, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stderr


def test_a_second_daemon_is_refused_and_harms_nothing(daemon, tmp_path):
    code, words = serve_refused(daemon)
    assert code == 3 and f"pid {daemon.process.pid}" in words and "claudomator ctl" in words and "Traceback" not in words
    code, words = serve_refused(daemon, "--data-dir", str(tmp_path / "other"), "--socket", daemon.socket_path)
    assert code == 3 and "another program listens" in words and "Traceback" not in words
    (tmp_path / "file").write_text("precious")
    code, words = serve_refused(daemon, "--data-dir", str(tmp_path / "other"), "--socket", str(tmp_path / "file"))
    assert code == 1 and "is no socket" in words and (tmp_path / "file").read_text() == "precious"
    assert daemon.new_client().call("daemon.status")["pid"] == daemon.process.pid


@pytest.mark.parametrize("name", ["with space", "dätä-€-数据", "l" * 120 + "/" + "m" * 120])
def test_any_directory_will_do_and_a_stale_socket_is_taken_over(tmp_path, name):
    daemon = DaemonProcess(tmp_path, data_dir=tmp_path / name)
    with daemon:
        task_id = daemon.add("pwd; echo done")
        assert daemon.wait(task_id)["state"] == c.READY
        daemon.kill9()
        assert os.path.exists(daemon.socket_path)
        daemon.start()
        assert daemon.call("task.get", id=task_id)["task"]["state"] == c.READY
        done = daemon.cli("ctl", "logs", task_id)
        assert done.returncode == 0 and done.stdout.endswith("done\n")
    assert not os.path.exists(daemon.socket_path)


def test_a_stop_ends_waiting_clients_and_the_process_at_once(tmp_path):
    daemon = DaemonProcess(tmp_path)
    with daemon:
        task_id = daemon.add("true", queue=False)
        raws = [connect(daemon) for _ in range(3)]
        for raw in raws:
            raw.sendall(line("task.wait", 1, ids=[task_id]) + line("events.watch", 2, since=0))
        read_lines(raws[0], 1)
        started = time.monotonic()
        assert daemon.terminate() == 0 and time.monotonic() - started < 3
        while raws[1].recv(1 << 16):
            pass
