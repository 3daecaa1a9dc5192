"""ct and the real daemon: the golden transcripts, over both sockets, and through a daemon that dies meanwhile.

What ``tests/fakes/ct_api.py`` answers to ct is here what the server answers: both are held to ``tests/data/ct/*.json``.
"""
import http.client
import json
import os
import socket
import uuid

import pytest

import claudomator as c
import ct
from tests.api import ApiDaemon
from tests.fakes import ct_api
from tests.support import DaemonProcess, wait_until
from tests.test_ct import environment, run, start, told

TRANSCRIPTS = ct_api.read_transcripts()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with ApiDaemon(tmp_path_factory.mktemp("ct")) as daemon:
        daemon.parent = daemon.running(name="Parent")
        daemon.client.call("pool.pause")  # what is queued stays so
        yield daemon


def prepare(daemon, name):
    """The ids of a transcript here: its given tasks are made, the parent is one that runs, with its agent's token."""
    parent, _, token = daemon.parent
    ids = {"parent": parent, "token": token, "key": str(uuid.uuid4()), "other": str(uuid.uuid4())}
    if name == "wrong_token":
        ids["token"] = "agent-token-1"
    if name == "wait_ready":  # a subtask is never READY; of a task of its own the operator asks
        ids["token"] = daemon.token
    for given in TRANSCRIPTS[name]["given"][1:]:
        ids[given["id"].strip("<>")] = task_id = str(uuid.uuid4())
        facts = {key: value for key, value in ct_api.fill(given, ids).items() if key != "id"}
        daemon.here(daemon.core.store.insert_task, c.Task(id=task_id, agent=c.AgentConfig(instructions="x"), **facts))
    daemon.here(lambda: [daemon.core.life.delete(task.id) for task in daemon.core.store.subtasks(parent) if task.id not in ids.values()])
    return ids


def settle(daemon, task_id, state, **more):
    """Bring a queued task where a run would bring it."""
    def move():
        if daemon.core.store.get_task(task_id).state == c.QUEUED:
            daemon.core.life._move(task_id, c.RUNNING)
        if state != c.RUNNING:
            daemon.core.life._move(task_id, state, **more)
    daemon.here(move)


class UnixClient(http.client.HTTPConnection):
    """http.client on a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_the_server_answers_as_a_golden_transcript_says(daemon, name):
    ids = prepare(daemon, name)
    client = UnixClient(daemon.config.agent_socket_path)
    for step in TRANSCRIPTS[name]["steps"]:
        request, expected = ct_api.fill(step["request"], ids), step["answer"]
        path = request["path"].replace("timeout_s=25", "timeout_s=0.1") if expected["body"].get("timed_out") else request["path"]
        if "/wait" in path and "task" not in {given["id"].strip("<>") for given in TRANSCRIPTS[name]["given"]}:
            wanted = expected["body"]["tasks"][0]
            settle(daemon, ids["task"], wanted["state"], summary=wanted["summary"])
        body = json.dumps(request["body"]).encode() if "body" in request else None
        client.request(request["method"], path, body, request["headers"])
        answer = client.getresponse()
        document = json.loads(answer.read())
        assert answer.status == expected["status"], document
        if "error" in expected["body"]:
            assert document["error"]["code"] == expected["body"]["error"]["code"], document
        else:
            assert ct_api.matches(expected["body"], document, ids), (ct_api.fill(expected["body"], ids), document)
    client.close()


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_ct_says_to_the_real_daemon_what_its_transcript_says(daemon, name):
    transcript, ids = TRANSCRIPTS[name], prepare(daemon, name)
    words, env = ct_api.fill(transcript["command"], ids), environment(
        f"unix://{daemon.config.agent_socket_path}", ids["token"], CLAUDOMATOR_TASK_ID=ids["parent"])
    if len(transcript["steps"]) > 1:  # it waits for what it has made
        process = start(*words, env=env)
        made, = wait_until(lambda: daemon.here(daemon.core.store.subtasks, ids["parent"]))
        last = transcript["steps"][-1]["answer"]["body"]["tasks"][0]
        settle(daemon, made.id, last["state"], summary=last["summary"])
        stdout, stderr = process.communicate(timeout=30)
        code = process.returncode
    else:
        result = run(*words, stdin=transcript.get("stdin"), env=env)
        code, stdout, stderr = result.returncode, result.stdout, result.stderr
    if "task" not in ids:
        for made in daemon.here(daemon.core.store.subtasks, ids["parent"]):
            ids["task"] = made.id
    assert (code, stdout) == (transcript["exit"], ct_api.fill(transcript["stdout"], ids).replace(
        transcript["ids"]["task"][:8], ids.get("task", "")[:8])), stderr
    assert all(ct_api.fill(words, ids) in stderr for words in transcript["stderr"]), stderr


def sockets_of(daemon):
    """How many sockets the daemon's process has."""
    directory = f"/proc/{daemon.process.pid}/fd"
    return sum(os.path.realpath(f"{directory}/{name}").rpartition("/")[2].startswith("socket:") for name in os.listdir(directory))


def test_a_wait_goes_on_through_a_daemon_that_is_killed_and_comes_back(tmp_path):
    with DaemonProcess(tmp_path, env={"CLAUDOMATOR_SERVER_ADDR": "127.0.0.1:0"}) as daemon:
        daemon.env["CLAUDOMATOR_SERVER_ADDR"] = daemon.http_address  # the next one has the same port
        task_id = daemon.add(f"echo begun; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
        daemon.started(task_id)
        token = (daemon.data_dir / "api-token").read_text().strip()
        unix = f"unix://{daemon.data_dir}/agent.sock"
        before = sockets_of(daemon)
        waits = [start("task", "wait", task_id, "--timeout", "30s", env=environment(url, token))
                 for url in (f"http://{daemon.env['CLAUDOMATOR_SERVER_ADDR']}", unix)]
        wait_until(lambda: sockets_of(daemon) >= before + len(waits), what="both polls")
        told(run("task", "status", task_id, env=environment(unix, "wrong")), ct.EXIT_REFUSED, "not valid", "--token-file")
        daemon.kill9()
        told(run("task", "status", task_id, env=environment(unix, token)), ct.EXIT_UNREACHABLE, "claudomator serve")
        daemon.start()
        assert all(process.poll() is None for process in waits)
        (tmp_path / "go").touch()
        for process in waits:
            stdout, stderr = process.communicate(timeout=30)
            assert (process.returncode, stdout) == (0, "READY\n"), stderr
