"""ct.py, as the process that an agent starts: ``python3 -I -S``, its bytecode, and nothing but its own variables."""
import ast
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import claudomator as c
import ct
from tests.fakes import ct_api
from tests.fakes.ct_api import CtApi, answer, chunked, refusal
from tests.support import wait_until

CT = pathlib.Path(ct.__file__)
CODE = ct.__cached__ if os.path.exists(ct.__cached__) else str(CT)  # agents have it compiled
PYTHON = os.path.realpath(sys.executable)
TASK_ID = "7be1d0c4-0000-4000-8000-000000000002"
TRANSCRIPTS = ct_api.read_transcripts()
TASK = {"id": TASK_ID, "name": "Fix tests", "state": "COMPLETED"}
DONE = answer(200, {"tasks": [TASK], "timed_out": False})
RUNS = {"tasks": [{**TASK, "state": "RUNNING"}], "timed_out": True}


def environment(url="", token=ct_api.TOKEN, **more) -> dict:
    """All that ct has: no PATH, no HOME, no locale."""
    return {name: value for name, value in {ct.URL: url, ct.TOKEN: token, **more}.items() if value}


def start(*words, env=None, **more) -> subprocess.Popen:
    return subprocess.Popen([PYTHON, "-I", "-S", CODE, *words], env=env or {}, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **more)


def run(*words, env=None, stdin=None, timeout=30) -> subprocess.CompletedProcess:
    return subprocess.run([PYTHON, "-I", "-S", CODE, *words], env=env or {}, input=stdin, capture_output=True, text=True,
                          encoding="utf-8", timeout=timeout, **({} if stdin is not None else {"stdin": subprocess.DEVNULL}))


def asked(reply, *words, stdin=None, path=None, **more):
    """(finished process, requests) of a ct whose API gives ``reply``: bytes, or a function of the request."""
    with CtApi(reply if callable(reply) else lambda request: reply, path) as api:
        return run(*words, env=environment(api.url, **more), stdin=stdin), api.requests


def told(result, code, *words):
    """Checks that it failed with ``code``, printed nothing, and says ``words`` in one message without a traceback."""
    assert (result.returncode, result.stdout) == (code, ""), result
    assert result.stderr.startswith("ct: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


# The golden transcripts


@pytest.mark.parametrize("name", TRANSCRIPTS)
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_golden_transcript_is_what_ct_says_and_makes_of_the_answers(name, unix, tmp_path):
    transcript = TRANSCRIPTS[name]
    replay = ct_api.Replay(transcript)
    result, _ = asked(replay, *ct_api.fill(transcript["command"], replay.ids), stdin=transcript.get("stdin"),
                      path=tmp_path / "agent.sock" if unix else None, CLAUDOMATOR_TASK_ID=replay.ids["parent"])
    assert replay.faults == [] and replay.steps == [], result.stderr
    assert (result.returncode, result.stdout) == (transcript["exit"], ct_api.fill(transcript["stdout"], replay.ids))
    assert all(ct_api.fill(words, replay.ids) in result.stderr for words in transcript["stderr"]), result.stderr


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_the_tasks_of_a_transcript_are_tasks_as_the_daemon_reads_and_shows_them(name):
    shown = c.task_to_json(c.Task(name="t", id="i", agent=c.AgentConfig(instructions="x")), None, 900.0).keys()
    for step in ct_api.fill(TRANSCRIPTS[name]["steps"], TRANSCRIPTS[name]["ids"]):
        body = step["answer"]["body"]
        for task in [*body.get("tasks", []), *filter(None, [body.get("task")])]:
            assert task.keys() <= shown and task["state"] in c.STATES
        if "body" in step["request"]:
            spec, = c.parse_tasks(step["request"]["body"]["tasks"], "request", 0.0)
            assert spec.parent_task_id == TRANSCRIPTS[name]["ids"]["parent"]


def test_every_state_that_ends_a_task_has_its_exit_code():
    codes = {path.removeprefix("wait_").upper(): each["exit"] for path, each in TRANSCRIPTS.items() if path.startswith("wait_")}
    assert codes.keys() == c.SETTLED_STATES | {c.BLOCKED} and set(ct.FAILED_STATES) == c.FAILURE_STATES
    assert {state for state, code in codes.items() if code == 1} == c.FAILURE_STATES
    assert (codes["COMPLETED"], codes["READY"], codes["BLOCKED"]) == (0, 0, 2)


def test_a_transcript_matches_more_keys_but_no_other_value():
    ids = {"a": "1"}
    assert ct_api.matches({"x": "<a>", "y": ["<b>"]}, {"x": "1", "y": ["2"], "z": 0}, ids) and ids["b"] == "2"
    for wrong in ({"x": "2", "y": ["2"]}, {"x": "1"}, {"x": "1", "y": []}, {"x": "1", "y": ["3"]}, []):
        assert not ct_api.matches({"x": "<a>", "y": ["<b>"]}, wrong, ids)
    assert not ct_api.matches(True, 1, {}) and not ct_api.matches("<new>", "", {})


# Creating


def test_five_megabytes_of_instructions_arrive_whole(tmp_path):
    text = "Lies das hier: ü☃\n" * 250_000
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    result, requests = asked(answer(201, {"tasks": [TASK]}), "task", "submit", "--file", str(tmp_path / "x.txt"))
    assert (result.returncode, result.stdout) == (0, TASK_ID + "\n") and len(text.encode()) > 5 << 20
    assert json.loads(requests[0].body)["tasks"]["agent"]["instructions"] == text


def test_a_refusal_is_read_though_the_server_did_not_take_the_whole_body(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        connection = listener.accept()[0]
        connection.recv(1000)
        connection.sendall(refusal(413, "too_large", "the body is longer than 1 MiB"))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass
        connection.close()
    server = threading.Thread(target=refuse)
    server.start()
    (tmp_path / "x.txt").write_text("x" * (5 << 20))
    result = run("task", "submit", "--file", str(tmp_path / "x.txt"), env=environment(
        f"http://127.0.0.1:{listener.getsockname()[1]}"))
    server.join(10)
    listener.close()
    told(result, 64, "longer than 1 MiB")


def test_a_name_is_the_first_line_of_the_instructions_and_the_project_is_the_tasks():
    result, requests = asked(answer(201, {"tasks": [TASK]}), "task", "create", "--instructions", "  \nÄndere\tdas. \x1b[1m\nmehr",
                             "--parent=", CLAUDOMATOR_PROJECT_DIR="/srv/repo", CLAUDOMATOR_TASK_ID="p")
    assert result.returncode == 0
    body = json.loads(requests[0].body)
    assert body["tasks"] == {"name": "Ändere das. [1m", "agent": {
        "type": "claude", "model": "sonnet", "max_budget_usd": 3.0, "project_dir": "/srv/repo",
        "instructions": "  \nÄndere\tdas. \x1b[1m\nmehr"}} and body["queue"] is False


def test_only_claude_gets_a_model_that_nobody_named():
    for more, model in (([], "sonnet"), (["--agent", "gemini"], None), (["--agent", "gemini", "--model", "pro"], "pro")):
        _, requests = asked(answer(201, {"tasks": [TASK]}), "task", "submit", "--instructions", "x", *more)
        assert json.loads(requests[0].body)["tasks"]["agent"].get("model") == model


@pytest.mark.parametrize("words, says", [
    ([], "--instructions"), (["--instructions", "x", "--file", "y"], "one way"), (["--instructions", " \n"], "empty"),
    (["--file", "/nowhere/x"], "No such file"), (["--file", "/"], "cannot be read"), (["--instructions", "x", "--budget", "0"], "USD"),
    (["--instructions", "x", "--budget", "nan"], "USD"), (["--instructions", "x", "--budget", "much"], "USD"),
    (["--instructions", "x", "--timeout", "9"], "--wait"), (["--file", "/dev/zero"], "longer"),
    (["--instructions"], "needs a value"), (["--instruction", "x"], "did you mean --instructions?"),
    (["--wait=yes", "--instructions", "x"], "takes no value"), (["more", "--instructions", "x"], "quotes"),
    (["--instructions", "x", "--wait", "--timeout", "soon"], "duration")])
def test_a_wrong_command_line_is_told_before_anything_is_sent(words, says):
    result, requests = asked(answer(201, {"tasks": [{**TASK, "state": "QUEUED"}]}), "task", "submit", *words)
    told(result, 64, says)
    assert requests == []


def test_a_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    told(run("task", "submit", "--file", str(tmp_path / "x"), env=environment("http://127.0.0.1:1")), 64, "not UTF-8")
    result = subprocess.run([PYTHON, "-I", "-S", str(CT), "ask", b"\xff"], env={}, capture_output=True, text=True)
    told(result, 64, "not UTF-8")


@pytest.mark.slow
def test_a_cut_answer_is_asked_for_again_with_the_same_idempotency_key():
    replies = [b"", answer(201, {"tasks": [TASK]})[:60], answer(201, {"tasks": [TASK]})]
    result, requests = asked(lambda request: replies.pop(0), "task", "submit", "--instructions", "x")
    assert (result.returncode, result.stdout) == (0, TASK_ID + "\n")
    keys = {request.headers["idempotency-key"] for request in requests}
    assert len(requests) == 3 and len(keys) == 1 and len(keys.pop()) == 32
    assert result.stderr.count("trying again") == 1


def test_a_run_is_not_asked_for_twice():
    result, requests = asked(b"", "task", "run", TASK_ID)
    told(result, 4, "closed before", f"ct task status {TASK_ID}")
    assert len(requests) == 1


# The environment


def test_a_variable_that_is_not_utf_8_is_named_and_is_no_failed_task():
    env = {**environment("http://127.0.0.1:1"), "CLAUDOMATOR_PROJECT_DIR": b"/srv/\xff"}
    told(run("task", "submit", "--instructions", "x", env=env), 64, "CLAUDOMATOR_PROJECT_DIR", "--dir")


@pytest.mark.parametrize("env, missing", [
    ({}, f"{ct.URL} and {ct.TOKEN} not set"), (environment("http://127.0.0.1:1", ""), f"{ct.TOKEN} not set"),
    (environment(""), f"{ct.URL} not set")])
@pytest.mark.parametrize("words", [["task", "list"], ["task", "wait", "x"], ["task", "submit", "--instructions", "x"]])
def test_without_its_variables_ct_says_which_it_needs(env, missing, words):
    told(run(*words, env=env), 64, missing, "--token-file")


def test_a_list_of_two_tags_is_refused_and_not_that_of_the_last():
    result, requests = asked(answer(200, {"tasks": []}), "task", "list", "--tag", "a", "--tag", "b")
    told(result, 64, "one --tag")
    _, requests = asked(answer(200, {"tasks": []}), "task", "list", "--tag", "b c")
    assert requests[0].path == "/api/tasks?tag=b%20c&limit=20"


def test_an_operator_names_the_api_and_a_file_with_the_token(tmp_path):
    (tmp_path / "token").write_text("operator-token\n")
    with CtApi(lambda request: answer(200, {"tasks": [TASK], "next": 7})) as api:
        result = run("task", "list", "--url", api.url + "/claudomator/", "--token-file", str(tmp_path / "token"))
    assert result.returncode == 0 and result.stdout == "7be1d0c4  COMPLETED        Fix tests\n"
    assert api.requests[0].path == "/claudomator/api/tasks?limit=20" and "--before 7" in result.stderr
    assert api.requests[0].headers["authorization"] == "Bearer operator-token"
    assert api.requests[0].headers["host"] == f"127.0.0.1:{api.port}"


@pytest.mark.parametrize("token", ["a b", "a\r\nX: y", "ü", "\x7f"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token):
    result = run("task", "list", env=environment("http://127.0.0.1:1", token))
    told(result, 64, ct.TOKEN)
    assert token not in result.stderr


@pytest.mark.parametrize("url", [
    "localhost:8484", "http://", "http://host:x", "http://h:0", "http://h:65536", "http://h:99999999999", "ftp://h", "unix://x",
    "http://user:secret@h", "http://h /", "http://h?x", "https://h:1", "http://h\r\nX:1", "http://€", "http://h/€", "http://h:-1", "http://h:٣"])
def test_a_bad_address_is_told(url):
    told(run("task", "list", env=environment(url)), 64, ct.URL)


@pytest.mark.parametrize("url, parts", [
    ("http://127.0.0.1:8484", ("127.0.0.1", 8484, "")), ("http://host.docker.internal:8484/", ("host.docker.internal", 8484, "")),
    ("http://[::1]:8484/a/b/", ("::1", 8484, "/a/b")), ("http://[::1]", ("::1", 80, "")), ("http://h", ("h", 80, "")),
    ("unix:///run/a b/ü.sock", ("/run/a b/ü.sock", 0, ""))])
def test_an_address_is_taken_apart(url, parts):
    assert ct.parse_url(url) == parts


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "unix:///nowhere/agent.sock", "unix:///" + "x" * 200,
                                 "http://no-such-host.invalid:80", "http://" + "x" * 80 + ":80"])
def test_an_api_that_is_not_there_is_unreachable_at_once(url):
    began = time.monotonic()
    told(run("task", "list", env=environment(url)), 4, "cannot be reached", "claudomator serve")
    assert time.monotonic() - began < 8


def test_an_api_in_a_directory_with_a_long_path_is_reached(tmp_path):
    path = tmp_path / ("l" * 110) / "agent.sock"
    path.parent.mkdir()
    served = tmp_path / "s"
    with CtApi(lambda request: answer(200, {"tasks": [TASK]}), served) as api:
        os.link(served, path)
        result = run("task", "list", env=environment(f"unix://{path}"))
    assert (result.returncode, result.stderr, len(api.requests)) == (0, "", 1)


# The wire


LISTING = {"tasks": [{**TASK, "name": f"Größe {number} ☃"} for number in range(3)], "next": None}
WHOLE = {"length": answer(200, LISTING), "chunked": chunked(200, LISTING),
         "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer(200, LISTING),
         "until closed": b"HTTP/1.0 200\r\nX: y\r\n\r\n" + json.dumps(LISTING).encode()}


def read(pieces):
    """The answer that the pieces and the end of the connection make."""
    found = ct.Answer()
    for piece in [*pieces, b""]:
        if found.feed(piece):
            return found
    raise AssertionError("neither whole nor broken")


@pytest.mark.parametrize("kind", WHOLE)
def test_an_answer_is_the_same_however_its_bytes_come(kind):
    data = WHOLE[kind]
    for pieces in ([data], [bytes([byte]) for byte in data], *([data[:at], data[at:]] for at in range(1, len(data))),
                   [data, b"" if kind == "until closed" else b"trailing"]):
        found = read(pieces)
        assert found.status == 200 and ct.parse_json(found.body) == LISTING


@pytest.mark.parametrize("kind", ["length", "chunked", "interim"])
def test_no_cut_of_an_answer_passes_for_the_answer(kind):
    data = WHOLE[kind]
    whole = data.find(b"0\r\nTrailer") + 3 if kind == "chunked" else len(data)
    for at in range(whole):
        with pytest.raises(ct.Unreachable):
            read([data[:at]])


@pytest.mark.parametrize("at", [0, 5, 16, 40, 80, 120, -1])
def test_a_real_cut_ends_unreachable_when_it_goes_on(at, monkeypatch):
    monkeypatch.setattr(ct, "RESEND_S", 0.3)
    with CtApi(lambda request: WHOLE["length"][:at]) as api:
        with pytest.raises(ct.Unreachable, match="closed before the answer was whole"):
            ct.Api(api.url, "t").persist("GET", "/api/tasks")
    assert len(api.requests) in (2, 3)


BROKEN = [b"SSH-2.0-OpenSSH_9\r\n", b"\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 20\r\n\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n", b"HTTP/1.1 20\xb2 OK\r\n\r\n",
          b"HTTP/1.1 099 OK\r\n\r\n", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
          b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx",
          b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nxx",
          b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * (1 << 17),
          b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n",
          b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 2000, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
          b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
          b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxyz0\r\n\r\n"]


@pytest.mark.parametrize("data", BROKEN)
def test_bytes_that_are_no_answer_are_refused(data):
    with pytest.raises(ct.Unreachable):
        read([data])


def test_an_answer_is_bounded():
    for head in (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"ffffffff\r\n",
                 b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n"):
        found, block = ct.Answer(), b"x" * (1 << 20)
        assert not found.feed(head)
        with pytest.raises(ct.Failure, match="longer than 64 MiB"):
            for _ in range(65):
                found.feed(block)


def test_mutated_answers_never_raise_anything_else():
    random_ = random.Random(7)
    for _ in range(4000):
        data = bytearray(random_.choice(list(WHOLE.values())))
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(data))
            data[at:at + random_.randint(0, 2)] = random_.choice([b"", b"\r\n", b"\0", b":", b"9", b"\xff", b"chunked"])
        try:
            assert isinstance(ct.parse_json(read([bytes(data)]).body), (dict, list, str, int, float, type(None)))
        except ct.Failure:
            pass


def test_a_server_that_dribbles_is_given_up():
    stop, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def dribble():
        with listener.accept()[0] as connection:
            for byte in b"HTTP/1.1 200 OK\r\nA: " + b"x" * 1000:
                if stop.wait(0.05):
                    break
                connection.sendall(bytes([byte]))
    thread = threading.Thread(target=dribble)
    thread.start()
    began = time.monotonic()
    with pytest.raises(ct.Unreachable, match="no whole answer came within 0 s"):
        ct.Api(f"http://127.0.0.1:{listener.getsockname()[1]}", "t").exchange(b"GET / HTTP/1.1\r\n\r\n", 0.4)
    assert time.monotonic() - began < 5
    stop.set()
    thread.join(10)
    listener.close()


def test_a_server_that_takes_no_request_is_given_up_in_the_same_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(ct.Unreachable, match="no whole answer"):
            ct.Api(f"http://127.0.0.1:{listener.getsockname()[1]}", "t").exchange(b"x" * (32 << 20), 1.0)
        assert time.monotonic() - began < 1.8


@pytest.mark.parametrize("reply, code, says", [
    (answer(502, b"<html><body>502 Bad Gateway</body></html>"), 4, "a proxy"), (answer(200, b"<html>Welcome</html>"), 4, "Welcome"),
    (answer(404, b"nothing here"), 4, ct.URL), (answer(301, b"", "Location: http://elsewhere/\r\n"), 4, "http://elsewhere/"),
    (answer(500, b""), 4, "HTTP 500"), (refusal(500, "internal", "it broke"), 4, "it broke"), (answer(200, []), 4, "not as"),
    (refusal(400, "usage", "a bad query"), 64, "a bad query"), (refusal(409, "wrong_state", "it runs"), 3, "it runs"),
    (answer(403, {"error": {"message": 5, "problems": "x"}}), 3, "HTTP 403"), (answer(200, {"tasks": 5}), 4, "versions"),
    (answer(200, {"tasks": [1], "task": {}}), 0, ""), (answer(418, {"error": "x"}), 4, "HTTP 418"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 4, "HTTP 204")])
def test_an_answer_that_is_none_of_the_api_is_told_with_what_to_do(reply, code, says, monkeypatch):
    monkeypatch.setattr(ct, "RESEND_S", 0)
    with CtApi(lambda request: reply) as api:
        status, out, err = in_process("task", "list", url=api.url)
    assert status == code and says in err, err
    assert code == 0 or (out == "" and err.startswith("ct: ") and re.search(r"set|look|see|ct task|install|it |bad|say", err))


def in_process(*words, url):
    """(exit code, stdout, stderr) of ct within this process, with the figures that a test changed."""
    written = {1: "", 2: ""}
    real, argv, environ = ct.write, sys.argv, dict(os.environ)
    ct.write = lambda descriptor, text: written.__setitem__(descriptor, written[descriptor] + text)
    try:
        sys.argv = ["ct", *words]
        os.environ.update(environment(url))
        return ct.main(), written[1], written[2]
    finally:
        ct.write, sys.argv = real, argv
        for name in (ct.URL, ct.TOKEN):
            os.environ.pop(name)
        os.environ.update(environ)


def test_what_a_server_says_cannot_command_the_terminal():
    evil = {"id": "a\x1b[2J\n", "name": "x\x1b]0;y\x07\nz\u202e", "state": "COMPLETED\r\x9b", "summary": "\x00s" * 5000}
    for words in (["task", "list"], ["task", "status", "x"], ["task", "wait", "x"]):
        result, _ = asked(answer(200, {"tasks": [evil], "task": evil, "timed_out": False, "subtasks": [evil, 5]}), *words,
                          *(["--timeout", "0"] if "wait" in words else []))
        assert result.stdout and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.stdout + result.stderr)


# Waiting


def test_a_timeout_without_a_wait_is_told_before_a_run():
    result, requests = asked(answer(200, {"tasks": [TASK]}), "task", "run", TASK_ID, "--timeout", "5")
    told(result, 64, "add --wait")
    assert requests == []


def test_waiting_is_a_long_poll_and_not_a_hammering(tmp_path):
    release = threading.Event()

    def reply(request):
        release.wait(20)
        return DONE
    with CtApi(reply) as api:
        process = start("task", "wait", TASK_ID, env=environment(api.url))
        wait_until(lambda: api.requests)
        assert process.poll() is None
        release.set()
        assert process.communicate(timeout=20)[0] == "COMPLETED\n" and process.returncode == 0
    assert [request.path for request in api.requests] == [f"/api/tasks/{TASK_ID}/wait?timeout_s=25"]


@pytest.mark.slow
def test_a_server_that_answers_at_once_is_asked_ever_more_slowly():
    result, requests = asked(answer(200, RUNS), "task", "wait", TASK_ID, "--timeout", "3")
    assert (result.returncode, result.stdout) == (124, "RUNNING\n") and "wait on with" in result.stderr
    assert 3 <= len(requests) <= 8


def test_a_timeout_of_zero_looks_once():
    result, requests = asked(answer(200, RUNS), "task", "wait", TASK_ID, "--timeout=0")
    assert (result.returncode, result.stdout, len(requests)) == (124, "RUNNING\n", 1)


@pytest.mark.slow
def test_a_pending_task_is_pointed_out_once():
    states = ["PENDING", "PENDING", "COMPLETED"]
    result, _ = asked(lambda request: answer(200, {"tasks": [{**TASK, "state": states.pop(0)}], "timed_out": False}),
                      "task", "wait", TASK_ID)
    assert result.returncode == 0 and result.stderr.count("ct task run") == 1


def test_a_task_that_is_blocked_by_its_subtasks_is_waited_for():
    replies = [answer(200, {"tasks": [{**TASK, "state": "BLOCKED", "question": None}], "timed_out": True}), DONE]
    result, requests = asked(lambda request: replies.pop(0), "task", "wait", TASK_ID)
    assert (result.returncode, result.stdout, len(requests)) == (0, "COMPLETED\n", 2)


@pytest.mark.parametrize("states, code", [
    (["COMPLETED", "READY"], 0), (["COMPLETED", "FAILED"], 1), (["BLOCKED", "COMPLETED"], 2), (["BLOCKED", "TIMED_OUT"], 1),
    (["RUNNING", "BLOCKED"], 2), (["RUNNING", "COMPLETED"], 124)])
def test_of_several_tasks_the_worst_is_the_exit_code(states, code):
    def reply(request):
        task_id = request.path.split("/")[3]
        task = {**TASK, "id": task_id, "state": states[int(task_id)]}
        return answer(200, {"task": task, "tasks": [task], "timed_out": task["state"] == "RUNNING"})
    result, _ = asked(reply, "task", "wait", "0", "1", "--timeout", "0")
    assert (result.returncode, result.stdout) == (code, f"0 {states[0]}\n1 {states[1]}\n")
    result, _ = asked(reply, "task", "wait", "0", "1", "--timeout", "0", "--json")
    document = json.loads(result.stdout)
    assert [task["state"] for task in document["tasks"]] == states and document["timed_out"] == ("RUNNING" in states)


def test_a_wrong_id_among_several_is_told_before_the_wait():
    def reply(request):
        return DONE if request.path == "/api/tasks/0" else refusal(404, "not_found", "no task begins with 1")
    result, requests = asked(reply, "task", "wait", "0", "1")
    told(result, 3, "no task begins with 1")
    assert len(requests) == 2
    told(run("task", "wait", "../x", env=environment("http://127.0.0.1:1")), 64, "ct task list")


@pytest.mark.parametrize("unix", [pytest.param(False, id="tcp", marks=pytest.mark.slow), pytest.param(True, id="unix")])
def test_a_wait_survives_a_restart_of_the_daemon_and_says_so_once(unix, tmp_path):
    path = tmp_path / "agent.sock" if unix else None
    first = CtApi(lambda request: answer(200, RUNS), path).__enter__()
    process = start("task", "wait", TASK_ID, env=environment(first.url))
    wait_until(lambda: first.requests)
    first.reply = lambda request: answer(200, RUNS)[:30]  # killed in the middle of an answer
    wait_until(lambda: len(first.requests) > 2)
    first.stop()
    if unix:
        path.unlink()
    refused = threading.Event()
    assert not refused.wait(0.6) and process.poll() is None  # nobody listens for a while
    with CtApi(lambda request: DONE, path, port=0 if unix else first.port) as second:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, len(second.requests)) == (0, "COMPLETED\n", 1), err
    assert err.count("trying again") == 1


@pytest.mark.slow
def test_a_wait_for_a_daemon_that_does_not_come_back_ends_with_its_timeout():
    result = run("task", "wait", TASK_ID, "--timeout", "1", env=environment("unix:///nowhere/agent.sock"))
    told(result, 124, "trying again for 1 s", "--timeout is over")


def test_the_pauses_between_tries_grow_and_are_bounded(monkeypatch):
    now, pauses = [0.0], []
    monkeypatch.setattr(ct.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ct.time, "sleep", lambda pause_s: (pauses.append(pause_s), now.__setitem__(0, now[0] + pause_s)))
    with pytest.raises(ct.Unreachable):
        ct.Api("unix:///nowhere/agent.sock", "t").persist("GET", "/", waiting=True)
    assert pauses[:7] == [0.25, 0.5, 1, 2, 4, 8, 8] and sum(pauses) == ct.FIRST_S


def test_a_refusal_in_a_wait_is_final():
    replies = [answer(200, RUNS), refusal(401, "unauthorized", "the run is over")]
    result, _ = asked(lambda request: replies.pop(0), "task", "wait", TASK_ID)
    told(result, 3, "the run is over")


def test_an_interrupt_is_told_and_leaves_the_task_alone():
    release = threading.Event()
    with CtApi(lambda request: release.wait(20) and None) as api:
        process = start("task", "wait", TASK_ID, env=environment(api.url))
        wait_until(lambda: api.requests)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        release.set()
    assert (process.returncode, out) == (130, "") and "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("text, seconds", [("600", 600), ("0", 0), ("90s", 90), ("15m", 900), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800)])
def test_a_duration_is_read(text, seconds):
    assert ct.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1x", "m", "1..5s", ".", ".s", "1e3", "٣", "1h30x", "1h30", "9" * 20, " 1"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ct.Failure, match="duration"):
        ct.parse_seconds(text)


# Question and summary


@pytest.mark.parametrize("words, kind, text, options", [
    (["Which one?"], "question", "Which one?", ()), (["Which one?", "--option", "a", "--option=b c"], "question", "Which one?", ("a", "b c")),
    (["Tell me the licence"], "question", "Tell me the licence ?", ()), (["Choose.", "--option", "a"], "question", "Choose.", ("a",)), (["Größe \"x\" ☃？"], "question", "Größe \"x\" ☃？", ()),
    (["--", "--json?"], "question", "--json?", ())])
def test_a_question_is_one_that_the_daemon_takes_for_a_question(words, kind, text, options, tmp_path):
    path = tmp_path / "question.json"
    result = run("ask", *words, env={"CLAUDOMATOR_QUESTION_FILE": str(path)})
    assert result.returncode == 0 and "Stop now" in result.stdout, result.stderr
    assert c.parse_question(path.read_text(encoding="utf-8")) == c.Question(kind, text, options)
    assert os.listdir(tmp_path) == ["question.json"] and path.stat().st_mode & 0o777 == 0o600


def test_a_question_comes_from_stdin_and_a_later_one_replaces_it(tmp_path):
    env = {"CLAUDOMATOR_QUESTION_FILE": str(tmp_path / "question.json")}
    assert run("ask", "-", env=env, stdin="First?\n").returncode == 0
    assert json.loads(run("ask", "Second?", "--json", env=env).stdout) == {"question": {"text": "Second?", "options": []}}
    assert json.loads((tmp_path / "question.json").read_text()) == {"text": "Second?", "options": []}


def test_a_question_that_the_daemon_would_cut_is_refused(tmp_path):
    env = {"CLAUDOMATOR_QUESTION_FILE": str(tmp_path / "question.json")}
    told(run("ask", "-", env=env, stdin="ü" * 33_000 + "?"), 64, "64 KiB")
    assert not list(tmp_path.iterdir()) and ct.MAX_FILE == c.QUESTION_LIMIT and ct.KEPT_SUMMARY == c.SUMMARY_LIMIT


def test_a_summary_is_written_whole(tmp_path):
    path = tmp_path / "summary.txt"
    env = {"CLAUDOMATOR_SUMMARY_FILE": str(path)}
    assert run("summary", "-", env=env, stdin="Done: Größe ☃.\nAll pass.\n").returncode == 0
    assert path.read_text(encoding="utf-8") == "Done: Größe ☃.\nAll pass.\n"
    result = run("summary", "x" * 5000, env=env)
    assert result.returncode == 0 and "first 4096 bytes" in result.stderr and path.stat().st_size == 5001


@pytest.mark.parametrize("words, variable", [(["ask", "x?"], "CLAUDOMATOR_QUESTION_FILE"), (["summary", "x"], "CLAUDOMATOR_SUMMARY_FILE")])
def test_a_file_that_is_not_named_or_not_writable_is_told(words, variable, tmp_path):
    told(run(*words), 64, f"{variable} is not set")
    told(run(*words, env={variable: str(tmp_path / "gone" / "file")}), 74, "No such file", "last message")
    told(run(words[0], " ", env={variable: str(tmp_path / "file")}), 64, "empty")


# Help and output


@pytest.mark.parametrize("words, code", [([], 64), (["task"], 64), (["--help"], 0), (["-h"], 0), (["task", "--help"], 0)])
def test_the_help_lists_the_commands(words, code):
    result = run(*words)
    text = result.stderr if code else result.stdout
    assert result.returncode == code and (result.stdout == "") == bool(code)
    for name in ct.COMMANDS:
        assert (ct.COMMANDS[name][2] in text) == (name.startswith("task") or "task" not in words), name
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", ct.COMMANDS)
def test_every_command_has_help_with_all_its_options(name):
    result = run(*name.split(), "--help")
    assert result.returncode == 0 and f"usage: ct {name}" in result.stdout
    assert all(option in result.stdout for option in [*ct.COMMANDS[name][3], *ct.EVERYWHERE])


@pytest.mark.parametrize("words, says", [
    (["tusk"], "did you mean task"), (["task", "sumbit"], "did you mean submit?"), (["--max", "5", "task", "list"], "behind the command"),
    (["task", "--max", "list"], "behind the command: ct task list --max"), (["tusk", "--max"], "did you mean task"),
    (["task", "list", "--stat", "x"], "did you mean --state?"), (["task", "wait"], "ID..."), (["ask"], "TEXT"), (["list"], "ct --help")])
def test_a_mistake_gets_a_hint(words, says):
    told(run(*words), 64, says)


def test_an_option_before_the_command_does_not_make_its_name_the_text(tmp_path):
    path = tmp_path / "question.json"
    result = run("--option", "ask", env={"CLAUDOMATOR_QUESTION_FILE": str(path)})
    told(result, 64, "behind the command")
    assert not path.exists()


def test_json_is_one_document_for_errors_too():
    result, _ = asked(refusal(404, "not_found", "no such task"), "task", "status", "x", "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.returncode, result.stderr, error["code"]) == (3, "", "not_found") and "no such task" in error["message"]
    result, _ = asked(answer(201, json.dumps({"tasks": [{**TASK, "name": "Größe\U0001f600"}]}).encode()), "task", "submit", "--instructions", "x", "--json")
    assert json.loads(result.stdout)["tasks"][0]["name"] == "Größe\U0001f600"


def test_output_that_nobody_reads_or_no_disk_takes_ends_quietly():
    with CtApi(lambda request: answer(200, {"tasks": [TASK] * 5000})) as api:
        process = start("task", "list", env=environment(api.url))
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(20) == 0
        process.stderr.close()
        with open("/dev/full", "w") as full:
            result = subprocess.run([PYTHON, "-I", "-S", str(CT), "task", "list"], env=environment(api.url), stdout=full,
                                    stderr=subprocess.PIPE, text=True)
    assert result.returncode == 74 and "No space left" in result.stderr


def test_a_wait_goes_on_though_nobody_hears_its_talk():
    replies = [answer(201, {"tasks": [{**TASK, "state": "QUEUED"}]}), DONE]
    with CtApi(lambda request: replies.pop(0)) as api, open("/dev/full", "w") as full:
        result = subprocess.run([PYTHON, "-I", "-S", CODE, "task", "submit", "--instructions", "x", "--wait"],
                                env=environment(api.url), stdout=subprocess.PIPE, stderr=full, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, "COMPLETED\n")


def test_the_file_runs_by_itself():
    result = subprocess.run([str(CT), "--help"], env={"PATH": f"{os.path.dirname(PYTHON)}:/usr/bin:/bin"}, capture_output=True)
    assert result.returncode == 0 and b"ct task submit" in result.stdout


def test_the_page_names_every_command_option_variable_and_exit_code():
    page = (CT.parent / "docs" / "ct.md").read_text(encoding="utf-8")
    for name, (_, usage, text, options, _, _) in ct.COMMANDS.items():
        assert f"`ct {name} {usage}".rstrip().replace("|", "\\|") + "` | " + text in page, name
    for option in [*ct.CREATING, *ct.WAITING, *ct.EVERYWHERE, "--option"]:
        assert option in page, option
    codes = {value for name, value in vars(ct).items() if name.startswith("EXIT_")}
    assert codes == set(map(int, re.findall(r"^\| (\d+) \|", page, re.M)))
    assert set(re.findall(r"CLAUDOMATOR_[A-Z_]+", CT.read_text(encoding="utf-8"))) == set(re.findall(r"CLAUDOMATOR_[A-Z_]+", page))


# The layout


def test_the_file_stays_small_and_imports_next_to_nothing():
    source = CT.read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert source.startswith("#!/usr/bin/env -S python3 -I -S\n") and os.access(CT, os.X_OK)
    assert imported == {"os", "sys", "time", "_socket"} and "claudomator" not in {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert len(source.splitlines()) <= 740 and max(map(len, source.splitlines())) <= 125
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60
    assert all(node.returns for node in functions) and all(ast.get_docstring(node) for node in functions if node.name[0] != "_")


def test_a_call_loads_no_module_that_takes_long():
    with CtApi(lambda request: answer(200, {"tasks": [TASK], "next": None})) as api:
        result = subprocess.run([PYTHON, "-I", "-S", "-X", "importtime", str(CT), "task", "list"], env=environment(api.url),
                                capture_output=True, text=True)
    loaded = set(re.findall(r"\| +(\S+)$", result.stderr, re.M))
    assert "_socket" in loaded and not loaded & {"json", "re", "socket", "argparse", "encodings.idna", "select", "typing", "__future__"}
