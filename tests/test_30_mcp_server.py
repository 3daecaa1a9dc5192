"""The MCP server, as the process that an agent's CLI starts: requests on stdin, answers on stdout, the API beside it."""
import inspect
import json
import os
import pathlib
import queue
import random
import re
import shlex
import socket
import subprocess
import sys
import threading
import time

import pytest

import claudomator as c
import ct
from tests import support
from tests.fakes import anthropic_api, ct_api
from tests.fakes.ct_api import CtApi, answer, refusal
from tests.test_claude_job import REALS

PROGRAM = c.PROGRAM  # as a daemon starts it
COMMAND = [*support.COMMAND, "mcp"]  # the same, but compiled
TASK_ID, PARENT = "7be1d0c4-0000-4000-8000-000000000002", "4a5e0c1e-0000-4000-8000-000000000001"
TASK = {"id": TASK_ID, "name": "Fix tests", "state": "COMPLETED", "execution": None}
DONE = answer(200, {"tasks": [TASK], "timed_out": False})
RUNS = answer(200, {"tasks": [{**TASK, "state": "RUNNING"}], "timed_out": True})
TRANSCRIPTS = ct_api.read_transcripts()


def line(method, request_id=None, **params) -> bytes:
    request = {"jsonrpc": "2.0", "method": method, "params": params}
    return json.dumps({**request, **({} if request_id is None else {"id": request_id})}).encode() + b"\n"


def call(request_id, tool, meta=None, **arguments) -> bytes:
    return line("tools/call", request_id, name=tool, arguments=arguments, **({"_meta": meta} if meta else {}))


class Server:
    """The process.  ``read`` gives the next message; all of stdout must be messages."""

    def __init__(self, env, command=COMMAND):
        self.process = subprocess.Popen(command, env=env, cwd=support.PROGRAM.parent, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._messages: queue.Queue = queue.Queue()
        self._reader = threading.Thread(target=lambda: [self._messages.put(each) for each in self.process.stdout])
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait(20)
        self._reader.join(20)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def write(self, *lines):
        self.process.stdin.write(b"".join(lines))
        self.process.stdin.flush()

    def read(self) -> dict:
        message = json.loads(self._messages.get(timeout=20))
        assert message["jsonrpc"] == "2.0"
        return message

    def ask(self, data) -> dict:
        self.write(data)
        return self.read()

    def result(self, tool, **arguments) -> dict:
        return self.ask(call(9, tool, **arguments))["result"]

    def end(self) -> tuple[int, list, str]:
        """Ends its stdin; (exit code, the messages left, stderr)."""
        self.process.stdin.close()
        code, left = self.process.wait(20), []
        self._reader.join(20)
        while not self._messages.empty():
            left.append(self.read())
        return code, left, self.process.stderr.read().decode()


class Api(CtApi):
    """The stand-in with a thread for each connection, so that a wait holds nobody up."""

    def _serve(self):
        while True:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection):
        with connection:
            try:
                self._answer(connection)
            except OSError:
                pass


def environment(url="", **more) -> dict:
    """All that the server has: no PATH, no HOME, no locale."""
    return {c.API_URL: url, c.API_TOKEN: ct_api.TOKEN, c.OWN_TASK: PARENT, **more}


@pytest.fixture
def files(tmp_path):
    """The variables that name the two files."""
    return {"CLAUDOMATOR_QUESTION_FILE": str(tmp_path / "question.json"),
            "CLAUDOMATOR_SUMMARY_FILE": str(tmp_path / "summary.txt")}


def text_of(result) -> str:
    """The text of a result; a success says the same as a structure."""
    (block,), facts = result["content"], result.get("structuredContent")
    assert block["type"] == "text" and (facts is None) is result["isError"]
    if facts is not None:
        rest = {name: value for name, value in facts.items() if name != "message"}
        message, _, document = block["text"].partition("\n")
        assert message == facts["message"] and json.loads(document or "{}") == rest
    return block["text"]


# The protocol

INITIALIZED = {"capabilities": {"tools": {}}, "serverInfo": {"name": "claudomator", "version": c.__version__}}
ANSWERS = {  # request: the answer's result, or (number, words of the error's message); None: no answer
    "initialize": (line("initialize", 1, protocolVersion="2025-06-18", capabilities={}, clientInfo={"name": "x"}),
                   {"protocolVersion": "2025-06-18", **INITIALIZED}),
    "initialize, an older one": (line("initialize", 1, protocolVersion="2024-11-05"),
                                 {"protocolVersion": "2024-11-05", **INITIALIZED}),
    "initialize, unknown": (line("initialize", 1, protocolVersion="2099-01-01"),
                            {"protocolVersion": "2025-06-18", **INITIALIZED}),
    "initialize, none": (line("initialize", 1), {"protocolVersion": "2025-06-18", **INITIALIZED}),
    "initialize, nonsense": (line("initialize", 1, protocolVersion=[{}]), {"protocolVersion": "2025-06-18", **INITIALIZED}),
    "initialized": (line("notifications/initialized"), None),
    "unknown notification": (line("notifications/whatever"), None),
    "a request as a notification": (line("tools/list"), None),
    "a call as a notification": (line("tools/call", name="get_task"), None),
    "cancelled, unknown": (line("notifications/cancelled", requestId=77), None),
    "cancelled, nonsense": (line("notifications/cancelled", requestId={"a": []}), None),
    "ping": (line("ping", 1), {}),
    "unknown method": (line("resources/list", 1), (-32601, "there is no method 'resources/list'")),
    "a newer handshake": (line("server/discover", 1), (-32601, "no method")),
    "notification's name with an id": (line("notifications/cancelled", 1, requestId=1), (-32601, "no method")),
    "garbage": (b"hello\n", (-32700, "not JSON")),
    "half a document": (b'{"jsonrpc":"2.0","id":1\n', (-32700, "not JSON")),
    "not UTF-8": (b'{"jsonrpc":"2.0","id":1,"method":"\xff"}\n', (-32700, "not JSON")),
    "a batch": (b"[" + line("ping", 1).strip() + b"]\n", (-32600, "a JSON object on a line of its own")),
    "another version": (b'{"jsonrpc":"1.0","id":1,"method":"ping"}\n', (-32600, '"jsonrpc": "2.0"')),
    "positional parameters": (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}\n', (-32602, "an object")),
    "an empty line": (b" \r\n", None),
    "unknown tool": (call(1, "create_subtsk"), (-32602, "did you mean 'create_subtask'?")),
    "no tool": (line("tools/call", 1), (-32602, "there is no tool nothing")),
    "a tool that is no string": (line("tools/call", 1, name={"a": 1}), (-32602, "there is no tool a table")),
    "arguments that are none": (line("tools/call", 1, name="get_task", arguments=[1]), (-32602, "must be an object")),
}


@pytest.fixture(scope="module")
def quiet():
    """One process without an API, for requests that leave nothing behind."""
    with Server(environment()) as server:
        yield server


@pytest.mark.parametrize("case", ANSWERS)
def test_a_request_has_this_answer(case, quiet):
    request, expected = ANSWERS[case]
    quiet.write(request, line("ping", "after"))
    if expected is not None:
        message, known = quiet.read(), re.search(rb'"id": ?1\b', request) and "not JSON" not in str(expected) \
            and not request.startswith(b"[")
        assert message["id"] == (1 if known else None)
        if isinstance(expected, dict):
            assert message == {"jsonrpc": "2.0", "id": 1, "result": expected}
        else:
            assert message["error"]["code"] == expected[0] and expected[1] in message["error"]["message"]
    assert quiet.read() == {"jsonrpc": "2.0", "id": "after", "result": {}}


def test_a_line_without_end_costs_one_error_and_the_next_request_is_answered(quiet):
    quiet.write(b"x" * (c.MAX_REQUEST_LINE + 5), b"\n", line("ping", 2))
    assert quiet.read()["error"]["code"] == -32600
    assert quiet.read()["id"] == 2


CONVERSATION = b"".join([
    line("initialize", 1, protocolVersion="2025-06-18"), line("notifications/initialized"), b"{\n", b"\n",
    line("ping", "\u00e9\u4e2d"), b'{"jsonrpc":"2.0","id":2,"method":"\xc3\xa9"}\r\n', b"[]\n"])


def said(pieces) -> list[bytes]:
    """What the server writes when it gets these pieces."""
    written = []
    server = c.McpServer({}, written.append)
    for piece in pieces:
        server.receive(piece)
    server.finish()
    return written


def test_every_split_of_the_input_has_the_same_answers():
    whole = said([CONVERSATION])
    assert [json.loads(each).get("id") for each in whole] == [1, None, "\u00e9\u4e2d", 2, None]
    assert all(each.endswith(b"\n") and each.count(b"\n") == 1 for each in whole)
    for at in range(len(CONVERSATION) + 1):
        assert said([CONVERSATION[:at], CONVERSATION[at:]]) == whole
    assert said([bytes([byte]) for byte in CONVERSATION]) == whole


def test_a_client_that_writes_byte_by_byte_is_answered(quiet):
    for byte in CONVERSATION:
        quiet.write(bytes([byte]))
    assert [quiet.read().get("id") for _ in range(5)] == [1, None, "\u00e9\u4e2d", 2, None]


def test_no_mutation_of_a_conversation_ends_the_server_or_spoils_its_output():
    rng = random.Random(30)
    source = CONVERSATION + call(5, "get_task", id=TASK_ID) + call(6, "ask_operator", question="Which?") + line(
        "notifications/cancelled", requestId=5)
    for _ in range(400):
        data = bytearray(source)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            data[at:at + rng.randint(0, 4)] = rng.choice([b"", b'"', b"{", b"\n", b"\xff", b"null", b"1e999", bytes([rng.randrange(256)])])
        written = said([bytes(data), b"\n", line("ping", "last")])
        messages = [json.loads(each) for each in written]
        assert {"jsonrpc": "2.0", "id": "last", "result": {}} in messages
        assert all(("result" in each) is not ("error" in each) for each in messages)


def test_the_end_of_stdin_ends_it_and_lets_short_calls_answer(files):
    with Server(environment(**files)) as server:
        server.write(line("ping", 1), call(2, "report_summary", summary="Done."), b'{"half')
        code, messages, stderr = server.end()
    assert code == 0 and stderr == "" and sorted(each["id"] for each in messages) == [1, 2]


@pytest.mark.slow
def test_the_end_of_stdin_ends_it_while_a_call_waits():
    gate = threading.Event()
    with Api(lambda request: gate.wait(20) and DONE) as api, Server(environment(api.url)) as server:
        server.write(call(1, "wait_subtask", id=TASK_ID))
        while not api.requests:
            assert server.ask(line("ping", 2))["id"] == 2
        began = time.monotonic()
        assert server.end() == (0, [], "") and time.monotonic() - began < 5
        gate.set()


def test_a_client_that_has_left_ends_it_in_silence():
    process = subprocess.Popen(COMMAND, env={}, cwd=support.PROGRAM.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(line("ping", 1))
    process.stdin.flush()
    assert process.wait(10) == 0 and process.stderr.read() == b""
    process.stdin.close()


# The tools as they are described


def test_the_list_describes_each_tool_for_an_agent(quiet):
    tools = quiet.ask(line("tools/list", 1, cursor="whatever"))["result"]["tools"]
    assert [tool["name"] for tool in tools] == ["create_subtask", "wait_subtask", "ask_operator", "report_summary", "get_task"]
    for tool in tools:
        schema = tool["inputSchema"]
        assert len(tool["description"]) > 60 and tool["description"].endswith(".")
        assert schema["type"] == "object" and schema["additionalProperties"] is False
        assert set(schema["required"]) <= schema["properties"].keys()
        for name, each in schema["properties"].items():
            assert each["type"] in ("string", "number", "array") and each["description"], name
            assert each["type"] != "array" or each["items"] == {"type": "string"}
            assert ("minLength" in each) is (name in schema["required"])
    by_name = {tool["name"]: tool for tool in tools}
    assert by_name["create_subtask"]["inputSchema"]["required"] == ["instructions"]
    assert by_name["create_subtask"]["inputSchema"]["properties"]["max_budget_usd"] == {
        "type": "number", "minimum": 0.01, "maximum": 1000000.0, "default": 3.0, "description": "the most that a run of it may cost"}
    assert [tool["name"] for tool in tools if tool["annotations"]["readOnlyHint"]] == ["wait_subtask", "get_task"]
    assert not any(tool["annotations"]["destructiveHint"] for tool in tools)


@pytest.mark.parametrize("name", c.MCP_TOOLS)
def test_a_tools_parameters_are_those_of_its_function(name):
    tool = c.MCP_TOOLS[name]
    assert list(inspect.signature(tool.run).parameters)[2:] == [key.field for key in tool.params]


def test_a_subtask_is_what_ct_makes():
    assert (c.SUBTASK_MODEL, c.SUBTASK_USD, c.POLL_S) == (ct.MODEL, ct.BUDGET_USD, ct.POLL_S)
    assert (c.RESEND_S, c.FIRST_S, c.RESTART_S) == (ct.RESEND_S, ct.FIRST_S, ct.RESTART_S)
    assert (c.API_URL, c.API_TOKEN, c.OWN_TASK) == (ct.URL, ct.TOKEN, ct.TASK)


def test_every_state_that_a_wait_ends_in_has_its_advice():
    assert c.ADVICE.keys() == c.SETTLED_STATES | {c.BLOCKED, c.PENDING}


@pytest.mark.parametrize("tool, arguments, words", [
    ("create_subtask", {}, "instructions: missing"),
    ("create_subtask", {"instructions": " "}, "instructions: empty"),
    ("create_subtask", {"instructions": 5}, "instructions: expected a string, got 5"),
    ("create_subtask", {"instructions": "x\0"}, "NUL"), ("create_subtask", {"instructions": "\ud800"}, "surrogate"),
    ("create_subtask", {"instructions": "x", "max_budget_usd": "3"}, "max_budget_usd: expected a number"),
    ("create_subtask", {"instructions": "x", "max_budget_usd": 0}, "0.01..1000000"),
    ("create_subtask", {"instructions": "x", "tags": "a"}, "write [a]"),
    ("create_subtask", {"instructions": "x", "instuctions": "x"}, "did you mean 'instructions'?"),
    ("wait_subtask", {}, "id: missing"), ("wait_subtask", {"id": "../x"}, "expected a word"),
    ("wait_subtask", {"id": "a b"}, "expected a word"), ("wait_subtask", {"id": TASK_ID, "timeout_s": 1e9}, "timeout_s"),
    ("wait_subtask", {"id": TASK_ID, "timeout_s": True}, "timeout_s: expected a number"),
    ("get_task", {"id": "a/../b"}, "expected a word"), ("get_task", {"id": "a?b=c"}, "expected a word"),
    ("ask_operator", {"question": ""}, "question: empty"), ("ask_operator", {"question": "x", "options": [1]}, "options[0]"),
    ("report_summary", {"summary": None}, "summary: missing"),
    ("report_summary", {"summary": "x"}, "CLAUDOMATOR_SUMMARY_FILE is not set"),
    ("ask_operator", {"question": "x"}, "CLAUDOMATOR_QUESTION_FILE is not set"),
])
def test_a_call_that_cannot_be_done_says_what_to_change(tool, arguments, words, quiet):
    result = quiet.result(tool, **arguments)
    assert result["isError"] is True and words in text_of(result)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(one process, the path of the socket on which it looks for the API): a test listens there for its time."""
    path = tmp_path_factory.mktemp("api") / "agent.sock"
    with Server(environment(f"unix://{path}")) as server:
        yield server, path


@pytest.mark.parametrize("missing", [c.API_URL, c.API_TOKEN, c.OWN_TASK])
def test_a_missing_variable_is_named(missing):
    written = []
    server = c.McpServer({name: value for name, value in environment("http://127.0.0.1:1").items() if name != missing},
                         written.append)
    server.receive(call(1, "create_subtask", instructions="x"))
    server.finish()
    result = json.loads(written[0])["result"]
    assert result["isError"] and f"{missing} is not set" in text_of(result)


# Question and summary


def test_a_question_is_what_the_daemon_reads_as_one_and_the_agent_is_told_to_stop(files):
    path = pathlib.Path(files["CLAUDOMATOR_QUESTION_FILE"])
    with Server(environment(**files)) as server:
        told = server.result("ask_operator", question="Which database?", options=["pg", "sqlite"])
        assert "Stop now" in text_of(told) and "end your turn" in told["structuredContent"]["message"]
        assert c.parse_question(path.read_text()) == c.Question("question", "Which database?", ("pg", "sqlite"))
        assert path.stat().st_mode & 0o777 == 0o600
        for words, expected in (("Say which", "Say which ?"), ("\u4f60\u597d\uff1f", "\u4f60\u597d\uff1f"), ("Now?", "Now?")):
            server.result("ask_operator", question=words)
            assert c.parse_question(path.read_text()) == c.Question("question", expected)
        assert server.result("ask_operator", question="x" * c.QUESTION_LIMIT)["isError"]
        assert c.parse_question(path.read_text()).text == "Now?" and os.listdir(path.parent) == [path.name]


def test_a_summary_is_written_whole_or_not_at_all(files):
    path = pathlib.Path(files["CLAUDOMATOR_SUMMARY_FILE"])
    with Server(environment(**files)) as server:
        assert "recorded" in text_of(server.result("report_summary", summary=" Fixed the divisor \u2713. \n"))
        assert path.read_bytes() == "Fixed the divisor \u2713.\n".encode()
        assert "4096 bytes" in text_of(server.result("report_summary", summary="\u2713" * 1366))
        assert path.read_bytes() == "Fixed the divisor \u2713.\n".encode()
        os.link(path, path.with_name("opened-before"))
        assert not server.result("report_summary", summary="x" * 4095)["isError"]
        assert path.with_name("opened-before").read_bytes() == "Fixed the divisor \u2713.\n".encode()
        assert len(path.read_bytes()) == 4096 and path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_is_said_with_what_to_do(tmp_path):
    with Server(environment(CLAUDOMATOR_SUMMARY_FILE=str(tmp_path / "gone" / "summary.txt"))) as server:
        result = server.result("report_summary", summary="x")
    assert result["isError"] and "say it in your last message instead" in text_of(result)


# The API

REPLAYED = {  # transcript: (tool, arguments, whether it fails)
    "submit": ("create_subtask", {"name": "Fix tests", "instructions": "Run the tests and fix what fails."}, False),
    **{name: ("wait_subtask", {"id": "<task>"}, False) for name in TRANSCRIPTS if name.startswith("wait_")},
    "status": ("get_task", {"id": "<task>"}, False), "foreign_task": ("get_task", {"id": "<other>"}, True),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_a_golden_transcript_of_ct_is_what_a_tool_asks_too(name, shared):
    server, path = shared
    tool, arguments, fails = REPLAYED[name]
    replay = ct_api.Replay(TRANSCRIPTS[name])
    with Api(replay, path):
        result = server.result(tool, **ct_api.fill(arguments, replay.ids))
    assert replay.faults == [] and replay.steps == [] and result["isError"] is fails, result
    text = text_of(result)
    if not fails:
        body = ct_api.fill(TRANSCRIPTS[name]["steps"][-1]["answer"]["body"], replay.ids)
        task, shown = body.get("task") or body["tasks"][0], result["structuredContent"]["task"]
        assert shown == c.task_facts(task) and shown["id"] == task["id"] and task["state"] in text.partition("\n")[0]
        assert shown.get("question") == (task.get("question") or None)


def test_the_api_is_reached_by_tcp_and_by_a_socket_whose_path_is_longer_than_an_address(tmp_path):
    path = tmp_path / ("x" * 100 + "#%41?") / "agent.sock"
    path.parent.mkdir()
    with c.short_socket_path(str(path)) as address, Api(lambda request: DONE, address) as near, Api(lambda request: DONE) as far:
        for url in (f"unix://{path}", far.url, f"{far.url}/prefix/"):
            answered = c.AgentApi(url, "t").ask(c.ToolCall(), "GET", "/api/tasks/x")
            assert answered["tasks"] == [TASK]
    assert [request.headers["host"] for request in near.requests] == ["localhost"]
    assert [request.path for request in far.requests] == ["/api/tasks/x", "/prefix/api/tasks/x"]
    assert far.requests[0].headers["host"] == f"127.0.0.1:{far.port}"


def test_all_of_a_subtasks_parameters_reach_the_api():
    with Api(lambda request: answer(201, {"tasks": [{**TASK, "state": "QUEUED"}]})) as api:
        with Server(environment(api.url, CLAUDOMATOR_PROJECT_DIR="/srv/own")) as server:
            server.result("create_subtask", instructions="\n  Do it.\nThen that.", agent="gemini", model="m", tags=["a", "b"],
                          max_budget_usd=1, timeout="5m", project_dir="/srv/x")
            told = server.result("create_subtask", instructions="\n  Do it.\nThen that.", agent="gemini")
    first, second = (json.loads(request.body) for request in api.requests)
    assert first == {"queue": True, "tasks": {
        "name": "Do it.", "parent_task_id": PARENT, "tags": ["a", "b"], "timeout": "5m", "agent": {
            "type": "gemini", "model": "m", "instructions": "\n  Do it.\nThen that.", "max_budget_usd": 1.0,
            "project_dir": "/srv/x"}}}
    assert second["tasks"]["agent"] == {"type": "gemini", "instructions": "\n  Do it.\nThen that.", "max_budget_usd": 3.0,
                                        "project_dir": "/srv/own"}
    spec, = c.parse_tasks(first["tasks"], "request", 0.0)
    assert spec.timeout_s == 300
    assert api.requests[0].headers["idempotency-key"] != api.requests[1].headers["idempotency-key"]
    assert TASK_ID in text_of(told) and "wait_subtask" in text_of(told)


def test_a_task_is_shown_short():
    run = {"cost_usd": 0.5, "commits": [{"hash": "1", "message": "m"}], "changestats": None, "sandbox_dir": "/x"}
    task = {**TASK, "reason": None, "question": {"text": "?", "options": []}, "agent": {"instructions": "x" * 9999}, "execution": run}
    assert c.task_facts(task) == {"id": TASK_ID, "name": "Fix tests", "state": "COMPLETED", "cost_usd": 0.5,
                                  "question": {"text": "?", "options": []}, "commits": run["commits"]}
    for nonsense in (None, [], {}, {"id": TASK_ID}, {"id": 5, "state": "READY"}, {"id": "", "state": "READY"}):
        with pytest.raises(c.ClaudomatorError, match="different versions"):
            c.task_facts(nonsense)


@pytest.mark.parametrize("reply, words", [
    (refusal(401, "unauthorized", "the token is not valid"), "CLAUDOMATOR_API_TOKEN is wrong or its run is over"),
    (refusal(403, "forbidden", "not yours"), "your own task and its subtasks"),
    (refusal(404, "not_found", "there is no task x"), "there is no task x; get_task without an id"),
    (refusal(409, "wrong_state", "it has ended"), "it has ended"),
    (refusal(422, "invalid", "1 problem found\n  timeout: expected a duration", problems=[]), "timeout: expected a duration"),
    (refusal(500, "internal", "a \x1b[31mfault"), "a fault"),
    (answer(200, b"<html>hello</html>"), "answered HTTP 200, but not as Claudomator's API does"),
    (answer(302, b"", "Location: http://elsewhere/\r\n"), "answered HTTP 302"),
    (answer(200, {"task": {}}), "different versions"), (answer(200, {"task": None, "subtasks": 5}), "different versions"),
    (answer(200, []), "not as Claudomator's API does"), (answer(403, {"error": "no"}), "answered HTTP 403"),
])
def test_what_the_api_refuses_is_a_failed_call_with_the_next_step(reply, words, shared):
    server, path = shared
    with Api(lambda request: reply, path) as api:
        result = server.result("get_task")
    assert result["isError"] and words in text_of(result) and "\x1b" not in text_of(result)
    assert len(api.requests) == 1 and api.requests[0].path == f"/api/tasks/{PARENT}"


@pytest.mark.parametrize("url", ["https://x:1", "ftp://x", "x", "unix://", "unix://x/y", "http://", "http://x:99999", "http://[::1"])
def test_an_address_that_is_none_is_named(url):
    call_, api = c.ToolCall(), c.AgentApi(url, "t")
    with pytest.raises(c.InvalidInput, match="http://HOST:PORT or unix:///PATH"):
        api.ask(call_, "GET", "/api/tasks")


# Several calls at once, cancelled ones, and a daemon that goes and comes


def test_calls_under_way_hold_nobody_up_and_are_answered_as_they_end():
    gates = {str(number): threading.Event() for number in range(3)}

    def reply(request):
        found = re.search(r"/api/tasks/(\d)/wait", request.path)
        return answer(200, {"task": TASK, "subtasks": [TASK]}) if not found else gates[found[1]].wait(20) and DONE

    with Api(reply) as api, Server(environment(api.url)) as server:
        server.write(*(call(number, "wait_subtask", id=str(number)) for number in range(3)))
        assert server.ask(line("ping", "now"))["id"] == "now"
        assert server.ask(call("look", "get_task"))["id"] == "look"
        again = server.ask(call(1, "get_task"))
        assert again["id"] == 1 and again["error"]["code"] == -32600 and "still under way" in again["error"]["message"]
        for number in (2, 0, 1):
            gates[str(number)].set()
            assert server.read()["id"] == number


def test_too_many_calls_at_once_are_told_to_wait():
    gate = threading.Event()
    with Api(lambda request: gate.wait(20) and DONE) as api, Server(environment(api.url)) as server:
        server.write(*(call(number, "wait_subtask", id=TASK_ID) for number in range(c.CALLS_AT_ONCE)))
        result = server.result("get_task", id=TASK_ID) if c.CALLS_AT_ONCE <= 9 else server.ask(call("more", "get_task"))["result"]
        assert result["isError"] and "wait for some of them" in text_of(result)
        gate.set()
        assert {server.read()["id"] for _ in range(c.CALLS_AT_ONCE)} == set(range(c.CALLS_AT_ONCE))
        assert not server.ask(call("again", "wait_subtask", id=TASK_ID))["result"]["isError"]


def test_a_cancelled_call_leaves_the_api_and_is_never_answered(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        listener.settimeout(20)
        with Server(environment(f"unix://{tmp_path}/agent.sock")) as server:
            server.write(call("long", "wait_subtask", id=TASK_ID))
            connection = listener.accept()[0]
            connection.settimeout(20)
            while not connection.recv(65536).endswith(b"\r\n\r\n"):
                pass
            server.write(line("notifications/cancelled", requestId="long", reason="no more"), line("ping", 2))
            assert connection.recv(65536) == b""
            connection.close()
            assert server.read()["id"] == 2
            assert server.end() == (0, [], "")
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):  # it has not asked again
            listener.accept()


def test_a_call_that_ends_as_it_is_cancelled_does_not_end_the_server():
    class Ending(dict):
        """The calls under way: whoever asks whether one is among them hears yes, and then it ends."""
        def __contains__(self, request_id):
            return True
    written = []
    server = c.McpServer({}, written.append)
    server._calls = Ending()
    server.receive(line("notifications/cancelled", requestId=1) + line("ping", 2))
    assert [json.loads(each)["id"] for each in written] == [2]


def test_a_call_that_gets_no_thread_is_told_to_wait_and_its_id_is_free_again(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")
    written = []
    server = c.McpServer({}, written.append)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        server.receive(call(1, "get_task"))
    server.receive(call(1, "get_task"))
    server.finish()
    first, second = (text_of(json.loads(each)["result"]) for each in written)
    assert "can't start new thread: wait for the calls under way" in first and f"{c.OWN_TASK} is not set" in second


@pytest.mark.slow
def test_a_wait_goes_on_over_a_restart_of_the_daemon(tmp_path):
    path, first, cut = tmp_path / "agent.sock", threading.Event(), threading.Event()

    def restarting(request):
        if len(daemon.requests) == 1:
            return RUNS
        first.set()
        cut.wait(20)  # the long poll is under way when the daemon goes

    with Api(restarting, path) as daemon, Server(environment(f"unix://{path}")) as server:
        server.write(call(1, "wait_subtask", {"progressToken": "p"}, id=TASK_ID))
        progress = server.read()
        assert progress["method"] == "notifications/progress" and "id" not in progress
        assert progress["params"]["progressToken"] == "p" and progress["params"]["message"] == "7be1d0c4 is RUNNING"
        assert first.wait(20)
        daemon.stop()
        path.unlink()
        cut.set()
        with Api(lambda request: DONE, path) as restarted:
            result = server.read()["result"]
    assert result["structuredContent"]["ended"] is True and not result["isError"] and len(restarted.requests) == 1


@pytest.mark.slow
def test_a_wait_ends_with_its_time_and_says_how_to_go_on():
    with Api(lambda request: RUNS) as api, Server(environment(api.url)) as server:
        result = server.result("wait_subtask", id=TASK_ID, timeout_s=0.6)
        assert "still RUNNING: call wait_subtask again" in text_of(result)
        assert result["structuredContent"]["ended"] is False
        assert api.requests[0].path.endswith("?timeout_s=1") and api.requests[-1].path.endswith("?timeout_s=0")
        assert 2 <= len(api.requests) <= 6  # an API that answers at once is not hammered


@pytest.mark.parametrize("state, question, timed_out, polls, words", [
    ("PENDING", None, True, 1, "nothing runs it"), ("BLOCKED", {"text": "?", "options": []}, False, 1, "waits for a person"),
    ("BLOCKED", None, True, 2, "commits"), ("QUEUED", None, True, 2, "commits"), ("FAILED", None, False, 1, "reason and detail")])
def test_a_wait_ends_in_states_that_last(state, question, timed_out, polls, words, shared):
    server, path = shared

    def reply(request):
        return DONE if len(api.requests) > 1 else answer(200, {
            "tasks": [{**TASK, "state": state, "question": question}], "timed_out": timed_out})

    with Api(reply, path) as api:
        assert words in text_of(server.result("wait_subtask", id=TASK_ID))
    assert len(api.requests) == polls


@pytest.mark.parametrize("cut", [None, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", b"nonsense\r\n\r\n",
                                 answer(503, b"busy"), refusal(429, "busy", "later")],
                         ids=["closed", "half an answer", "no HTTP", "503", "429"])
def test_a_create_that_was_cut_is_sent_again_with_the_same_key(cut, shared):
    server, path = shared

    def reply(request):
        return cut if len(api.requests) == 1 else answer(201, {"tasks": [{**TASK, "state": "QUEUED"}]})

    with Api(reply, path) as api:
        assert not server.result("create_subtask", instructions="x")["isError"]
    first, second = api.requests
    assert first.facts() == second.facts() and len(first.headers["idempotency-key"]) == 32


class Waiting:
    """A clock, and a call that is stopped at a time of it; a pause takes no time at all."""

    def __init__(self, stopped_at=1e9):
        self.now, self.stopped_at, self.pauses, self.stopped, self.attach = 0.0, stopped_at, [], self, lambda socket: None

    def monotonic(self):
        return self.now

    def is_set(self):
        return self.now >= self.stopped_at

    def wait(self, seconds):
        self.pauses.append(seconds)
        assert len(self.pauses) < 1000, "it never gives up"
        self.now += seconds
        return self.is_set()


@pytest.mark.parametrize("reached, waiting, more, stopped_at, ends", [
    (False, False, {}, 1e9, 10), (True, False, {}, 1e9, 10), (False, True, {}, 1e9, 60), (True, True, {}, 1e9, 600),
    (True, True, {"deadline": 42.0}, 1e9, 42), (True, True, {}, 3.0, 3.75)])
def test_a_daemon_that_stays_away_is_given_up(monkeypatch, reached, waiting, more, stopped_at, ends):
    clock = Waiting(stopped_at)
    monkeypatch.setattr(c, "time", clock)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        api = c.AgentApi(f"http://127.0.0.1:{unused.getsockname()[1]}", "t")
        api._reached = reached
        with pytest.raises(c.Unreachable, match="the daemon may be down: call it again later"):
            api.persist(clock, "GET", "/x", waiting=waiting, **more)
    assert clock.now == ends and clock.pauses[:4] == [0.25, 0.5, 1, 2] and max(clock.pauses) <= 8


# With a real daemon

CLIENT = """\
import json, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

def call(tool, **arguments):
    request = {"jsonrpc": "2.0", "id": tool, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    server.stdin.write(json.dumps(request).encode() + b"\\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    print(json.dumps(answer["result"]), flush=True)
    return answer["result"]["structuredContent"] if not answer["result"]["isError"] else {}

made = call("create_subtask", instructions="echo It is mended. > $CLAUDOMATOR_SUMMARY_FILE", agent="shell", tags=["t"])
call("wait_subtask", id=made["task"]["id"])
call("get_task")
call("get_task", id="OTHER")
call("create_subtask", instructions="x", timeout="soon")
call("report_summary", summary="A subtask mended it.")
"""


def test_a_task_makes_a_subtask_and_waits_for_it(tmp_path):
    with support.DaemonProcess(tmp_path) as daemon:
        other = daemon.add("true", queue=False)
        (tmp_path / "client.py").write_text(CLIENT.replace("OTHER", other))
        task = daemon.wait(daemon.add(shlex.join([sys.executable, str(tmp_path / "client.py"), *PROGRAM, "mcp"])))
        log = (daemon.data_dir / "executions" / task["execution"]["id"] / "stdout.log").read_text()
        made, waited, looked, refused, wrong, _ = map(json.loads, log.splitlines())
        below, = daemon.call("task.subtasks", id=task["id"])["tasks"]
    assert task["summary"] == "A subtask mended it."
    assert (below["id"], below["state"], below["tags"]) == (made["structuredContent"]["task"]["id"], "COMPLETED", ["t"])
    assert waited["structuredContent"]["ended"] and waited["structuredContent"]["task"]["summary"] == "It is mended."
    assert looked["structuredContent"]["task"]["id"] == task["id"]
    assert [each["id"] for each in looked["structuredContent"]["subtasks"]] == [below["id"]]
    assert refused["isError"] and "that an agent of this task may reach; get_task without an id" in text_of(refused)
    assert wrong["isError"] and "timeout" in text_of(wrong) and "soon" in text_of(wrong)


# As claude gets it


def launch(tmp_path, url="", configuration="", binary="claude", scenario="mcp_subtask", host=None, **agent) -> c.Launch:
    config = c.parse_config_text(f'claude_binary_path = "{binary}"\n[agents.claude]\nmcp = true\n{configuration}', "c", "/h")
    context = c.RunContext(
        execution_id="run-1", execution_dir=str(tmp_path), cwd=str(tmp_path), is_root=os.geteuid() == 0, api_url=url,
        session_id="0c0ffee0-0000-4000-8000-000000000001", api_token=ct_api.TOKEN, program=PROGRAM)
    task = c.Task(name="t", id=PARENT, agent=c.AgentConfig(instructions=f"Go.\nSCENARIO: {scenario}", **agent))
    built = c.build_claude(task, context, config, host or {})
    for path, text in built.files:
        c.write_private(path, text)
    return built


def test_the_file_for_claude_starts_the_server_and_holds_no_token(tmp_path):
    with Api(lambda request: answer(200, {"task": TASK, "subtasks": []})) as api:
        built = launch(tmp_path, api.url)
        (path, text), = built.files
        assert path == str(tmp_path / "mcp.json") and os.stat(path).st_mode & 0o777 == 0o600
        assert built.argv[-2:] == ("--mcp-config", path) and "mcp__claudomator" in built.argv
        assert ct_api.TOKEN not in text and not any(ct_api.TOKEN in word for word in built.argv)
        row = json.loads(text)["mcpServers"]["claudomator"]
        env = {name: re.sub(r"\$\{(\w+)\}", lambda found: built.env[found[1]], value) for name, value in row["env"].items()}
        assert env == {name: value for name, value in built.env.items() if name.startswith("CLAUDOMATOR_")} and c.MARK in env
        with Server(env, [row["command"], *row["args"]]) as server:
            assert not server.result("get_task")["isError"]
            assert not server.result("report_summary", summary="Done.")["isError"]
    assert (tmp_path / "summary.txt").read_text() == "Done.\n"


def test_the_tools_are_named_in_the_preamble_and_allowed_only_where_they_are_given(tmp_path):
    both = launch(tmp_path, "unix:///agent.sock")
    assert "ask_operator" in both.stdin and "create_subtask" in both.stdin
    alone = launch(tmp_path)
    assert "report_summary" in alone.stdin and "create_subtask" not in alone.stdin
    given = both.stdin.partition("The MCP tools")[2].partition("Your task")[0]
    assert set(re.findall(r"[a-z]+_[a-z]+", given)) == c.MCP_TOOLS.keys()
    plain = launch(tmp_path, "unix:///agent.sock", skip_planning=True, allowed_tools=("Read",), additional_args=("--x",))
    assert [plain.argv[at + 1] for at, word in enumerate(plain.argv) if word == "--allowedTools"] == ["Read", "mcp__claudomator"]
    assert plain.argv[-1] == "--x" and plain.stdin.startswith("Go.")


def test_without_the_key_claude_gets_none_of_it_and_another_agent_cannot(tmp_path):
    config = c.parse_config_text("[agents.claude]\nmcp = false", "c", "/h")
    context = c.RunContext(execution_id="r", execution_dir="/e", cwd="/w", session_id="s")
    built = c.build_claude(c.Task(name="t", id="t", agent=c.AgentConfig(instructions="x")), context, config, {})
    assert "mcp" not in " ".join(built.argv) + built.stdin and built.files == ()
    with pytest.raises(c.InvalidInput, match="agents.gemini.mcp: only claude takes MCP servers"):
        c.parse_config_text("[agents.gemini]\nmcp = true", "c", "/h")


@pytest.mark.parametrize("mode", ["bypassPermissions", "default"])
@pytest.mark.parametrize("real", REALS)
def test_the_real_claude_calls_the_tools_and_the_model_reads_what_they_say(real, mode, tmp_path):
    """Without ``bypassPermissions`` too: that the tools are allowed is a matter of ``--allowedTools`` alone."""
    def reply(request):
        return answer(201, {"tasks": [{**TASK, "state": "QUEUED"}]}) if request.method == "POST" else answer(200, {
            "task": {**TASK, "id": PARENT, "state": "RUNNING"}, "subtasks": [TASK]})

    with anthropic_api.StandIn() as model, Api(reply, tmp_path / "agent.sock") as api:
        built = launch(tmp_path, api.url, binary=str(real[0]), permission_mode=mode, host={
            "PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "ANTHROPIC_API_KEY": "sk-ant-fake",
            "ANTHROPIC_BASE_URL": model.url})
        done = subprocess.run(built.argv, env=built.env, cwd=tmp_path, input=built.stdin, capture_output=True, text=True,
                              timeout=100)
    assert done.returncode == 0, done.stderr + done.stdout
    end = json.loads(done.stdout.splitlines()[-1])
    assert end["result"] == "It is on its way." and end["permission_denials"] == []
    create, look = api.requests
    assert (create.method, create.path, look.path) == ("POST", "/api/tasks", f"/api/tasks/{PARENT}")
    assert create.headers["authorization"] == f"Bearer {ct_api.TOKEN}"
    made = json.loads(create.body)["tasks"]
    assert (made["name"], made["agent"]["instructions"], made["parent_task_id"]) == (*anthropic_api.SUBTASK.values(), PARENT)
    assert (tmp_path / "summary.txt").read_text() == "A subtask fixes the tests.\n"
    first, second, third = model.seen
    assert {f"mcp__claudomator__{name}" for name in c.MCP_TOOLS} <= set(first["tools"])
    (told, failed), = second["results"]
    assert TASK_ID in told and "wait_subtask" in told and not failed
    assert not any(failed for _, failed in third["results"])
    assert any("summary is recorded" in told for told, _ in third["results"]) and any("1 subtasks" in told for told, _ in third["results"])
