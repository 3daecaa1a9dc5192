"""Who may do what: every operation of the table with every kind of caller, what an agent may create, and that no secret
leaves the daemon."""
import contextlib
import json
import os
import re
import socket
import stat

import pytest

import claudomator as c
from tests import docs_tables
from tests.api import ApiDaemon
from tests.support import shell_task, wait_until
from tests.ws_client import LiveClient

SECRET, ENV_SECRET = "hunter2-hunter2", 'pass "word" \\ twö'
CONFIG = f"""
max_concurrent = 20
github_token = "{SECRET}"
[agents.shell]
env = {{PASSWORD = {json.dumps(ENV_SECRET)}}}
[[projects]]
name = "other"
dir = "/nowhere/other"
"""
CALLERS = ("operator", "nobody", "stranger", "own", "parent", "grandparent", "other", "ended")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with ApiDaemon(tmp_path_factory.mktemp("security"), CONFIG) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def family(daemon):
    """Tasks that all run: a grandparent, its child, that one's child, and a stranger; and an agent that has ended."""
    grandparent = daemon.running(name="grandparent")
    parent = daemon.running(name="parent", parent_task_id=grandparent[0])
    own = daemon.running(name="own", parent_task_id=parent[0])
    other = daemon.running(name="other")
    ended = daemon.running("true; sleep 0.2", name="ended")
    daemon.wait(ended[0])
    return {"grandparent": grandparent, "parent": parent, "own": own, "other": other, "ended": ended}


def token_of(daemon, family, caller):
    return {"operator": daemon.token, "nobody": "", "stranger": "x" * 43}.get(caller) or (
        family[caller][2] if caller in family else "")


def expected_status(operation, caller):
    """What a caller gets who names the task ``own``: ``None`` where it depends on the task's state."""
    if operation.scope == "open" or caller == "operator":
        return None
    if caller in ("nobody", "stranger", "ended"):
        return 401
    if operation.scope in ("anyone", "create"):
        return None
    if operation.scope == "operator":
        return 403
    allowed = {"family": ("own", "parent", "grandparent"), "below": ("parent", "grandparent")}[operation.scope]
    return None if caller in allowed else 404


CASES = [(operation, route, caller) for operation in c.OPERATIONS.values() for route in operation.routes for caller in CALLERS
         if operation.name != "task.cancel" or expected_status(operation, caller)]  # it would end the others' task


@pytest.mark.parametrize("operation, route, caller", CASES,
                         ids=lambda value: getattr(value, "path", getattr(value, "name", value)))
def test_every_operation_with_every_caller(daemon, family, operation, route, caller):
    task_id, run_id, _ = family["own"]
    path = route.path.replace("{id}", run_id if operation.name == "execution.get" else task_id)
    path = path.replace("{execution}", run_id).replace("{agent}", "gemini")
    path += {"task.wait": "?timeout_s=0.01", "task.list": f"?parent={task_id}", "events.watch": f"?task={task_id}&since=0"}.get(
        operation.name, "")
    body = {"task.create": shell_task("true", "made"), "task.reject": {"comment": "x"}, "task.answer": {"text": "x"},
            "task.edit": {"priority": "low"}}.get(operation.name, {} if route.method == "POST" else None)
    token = token_of(daemon, family, caller)
    if route.form == "socket":
        client = LiveClient(daemon.config.agent_socket_path, token, f"?task={task_id}", "header" if token else "message")
        with contextlib.closing(client):
            code = client.hear()[1] - 4000 if client.status == 101 and expected_status(operation, caller) else client.status
        assert code == (expected_status(operation, caller) or 101)
        return
    answer = daemon.answer(route.method, path, token, body)
    status = answer.status if isinstance(answer, c.HttpResponse) else daemon.run(answer.chunks.aclose()) or 200
    wanted = expected_status(operation, caller)
    assert status == wanted if wanted else status in (200, 201, 409), answer
    if status == 401:
        assert dict(answer.fields)["WWW-Authenticate"].startswith("Bearer ")
    if operation.name == "pool.drain":
        daemon.client.call("pool.resume")


def test_a_task_of_others_is_as_one_that_does_not_exist(daemon, family):
    missing = "0c0ffee0-0000-4000-8000-000000000000"
    for path in ("/api/tasks/{}", "/api/tasks/{}/executions", "/api/tasks/{}/logs/stream", "/api/executions/{}",
                 "/api/executions/{}/log", "/api/tasks/{}/wait", "/api/tasks?parent={}", "/api/events?task={}"):
        name = 1 if "executions/{" in path else 0
        for hidden in (family["other"][name], family["grandparent"][name], family["other"][name][:8], ""):
            if not hidden and "?" not in path:
                continue
            status, body = daemon.ask("GET", path.format(hidden or missing), family["parent"][2])
            there = daemon.ask("GET", path.format(missing), family["parent"][2])
            assert (status, json.dumps(body).replace(hidden or missing, "X")) == (404, json.dumps(there[1]).replace(missing, "X"))


def test_an_agent_that_names_no_task_means_its_own(daemon, family):
    status, listed = daemon.ask("GET", "/api/tasks", family["grandparent"][2])
    ids = {task["id"] for task in listed["tasks"]}
    assert status == 200 and family["parent"][0] in ids and not ids & {family["other"][0], family["own"][0]}
    stream = daemon.answer("GET", "/api/events?since=0", token=family["parent"][2])
    found = daemon.events(stream, lambda event: event[2]["kind"] == "task.state")
    assert {event[2]["task_id"] for event in found[1:]} == {family["parent"][0]}
    client = LiveClient(daemon.config.agent_socket_path, family["parent"][2], "?since=0")
    with contextlib.closing(client):
        heard = client.hear_until(lambda event: event["kind"] == "task.state")
    assert heard[1:] == [event[2] for event in found[1:]]


def test_an_agent_cancels_only_below_its_own_task(daemon):
    parent, _, token = daemon.running(name="canceller")
    child, _, child_token = daemon.running(name="cancelled", parent_task_id=parent)
    assert daemon.ask("POST", f"/api/tasks/{parent}/cancel", token)[0] == 404
    assert daemon.ask("POST", f"/api/tasks/{child}/cancel", child_token)[0] == 404
    status, body = daemon.ask("POST", f"/api/tasks/{child}/cancel", token)
    assert status == 200 and body["tasks"][0]["state"] == c.CANCELLED
    assert daemon.ask("GET", f"/api/tasks/{child}", child_token)[0] == 401, "its token died with it"


def raw_answer(daemon, path, token):
    """The bytes of an answer that came over the agents' socket."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(daemon.config.agent_socket_path)
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: raw.recv(65536), b""))


def test_an_agent_asks_over_its_socket_with_what_its_environment_says(daemon):
    script = """exec python3 -I -S -c '
import os, socket
raw = socket.socket(socket.AF_UNIX)
raw.connect(os.environ["CLAUDOMATOR_API_URL"].removeprefix("unix://"))
path, token = "/api/tasks/" + os.environ["CLAUDOMATOR_TASK_ID"], os.environ["CLAUDOMATOR_API_TOKEN"]
raw.sendall(f"GET {path} HTTP/1.0\\r\\nAuthorization: Bearer {token}\\r\\n\\r\\n".encode())
text = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
print(text.partition("\\r\\n")[0], "asked for myself" in text)'"""
    task_id = daemon.add(script, name="asked for myself")
    daemon.wait(task_id)
    assert "".join(item["text"] for item in daemon.client.stream("execution.log", id=task_id)) == "HTTP/1.1 200 OK True\n"


def test_an_agent_makes_a_subtask_with_ct_and_waits_for_it(daemon):
    task_id = daemon.add("ct task submit --name below --agent shell --instructions 'echo deep' --wait --timeout 20s", name="with ct")
    daemon.wait(task_id)
    said = "".join(item["text"] for item in daemon.client.stream("execution.log", id=task_id))
    below, = daemon.client.call("task.subtasks", id=task_id)["tasks"]
    assert (below["name"], below["state"]) == ("below", c.COMPLETED) and c.COMPLETED in said


def test_an_agent_that_waits_for_its_subtasks_lends_them_its_slot(tmp_path):
    with ApiDaemon(tmp_path, "max_concurrent = 1\n[agents.shell]\nmax_concurrent = 1") as daemon:
        submit = "ct task submit --agent shell --wait --timeout 20s --name {} --instructions '{}'"
        outer = daemon.add(submit.format("middle", submit.format("inner", "echo deep").replace("'", "'\\''")), name="outer")
        assert daemon.wait(outer)["state"] == c.READY
        middle, = daemon.client.call("task.subtasks", id=outer)["tasks"]
        inner, = daemon.client.call("task.subtasks", id=middle["id"])["tasks"]
        assert (middle["state"], inner["state"]) == (c.COMPLETED, c.COMPLETED)
        assert daemon.here(lambda: daemon.core.pool._waits) == {}


@pytest.mark.slow
def test_an_agent_that_waits_for_its_subtasks_is_not_stalled_and_one_that_waits_no_more_is(daemon):
    submit = "ct task submit --agent shell --name below --wait --timeout 20s --instructions 'sleep 3'"
    task_id = daemon.add(f"{submit}; echo goes on; sleep 60", stall_timeout="1500ms", name="waits")
    ended = daemon.wait(task_id)
    assert (ended["state"], ended["reason"]) == (c.TIMED_OUT, "stalled")
    said = "".join(item["text"] for item in daemon.client.stream("execution.log", id=task_id))
    assert said == f"{c.COMPLETED}\ngoes on\n"


def test_the_page_and_the_api_are_told_apart(daemon):
    assert raw_answer(daemon, "/api/nothing", daemon.token).startswith(b"HTTP/1.1 404 ")
    assert b'"code":"not_found"' in raw_answer(daemon, "/nothing", "")
    assert b" 401 " in raw_answer(daemon, "/api/tasks", "").partition(b"\r\n")[0]
    task_id = daemon.add("echo said")
    daemon.wait(task_id)
    said = raw_answer(daemon, f"/api/tasks/{task_id}/logs/stream", daemon.token)
    assert b"text/event-stream" in said and b'"text":"said\\n"' in said and b"event: end\n" in said


@pytest.mark.slow
def test_an_agents_stream_ends_with_its_execution(daemon):
    task_id, _, token = daemon.running("sleep 1", name="short")
    stream = daemon.answer("GET", "/api/events", token=token)
    found = daemon.events(stream, lambda event: event[1] not in (None, "hello"))
    assert found[-1][1] == "error" and found[-1][2]["error"]["code"] == "unauthorized"
    assert daemon.wait(task_id)["state"] == c.READY


def test_what_an_agent_waited_for_is_not_told_once_it_has_ended(daemon):
    task_id, _, token = daemon.running("sleep 0.5")
    assert daemon.ask("GET", f"/api/tasks/{task_id}/wait", token)[0] == 401


# -- what an agent creates


def make(daemon, token, **task):
    agent = {"instructions": "x", **task.pop("agent", {})}
    return daemon.ask("POST", "/api/tasks", token, {"name": "sub", "agent": agent, **task})


def test_a_subtask_has_its_creators_task_as_parent_and_its_rights(daemon, tmp_path):
    own = {"project_dir": str(tmp_path), "isolation": "none", "disallowed_tools": ["WebFetch"], "max_budget_usd": 2,
           "additional_args": ["a"]}
    task_id, _, token = daemon.running(agent=own)
    status, body = make(daemon, token, auto_accept=True, idempotency_key="once",
                        agent={"disallowed_tools": ["Bash"], "isolation": "none", "project_dir": str(tmp_path)})
    made, agent = body["tasks"][0], body["tasks"][0]["agent"]
    assert status == 201 and made["parent_task_id"] == task_id and made["state"] == c.PENDING
    assert (agent["project_dir"], agent["isolation"], agent["max_budget_usd"]) == (str(tmp_path), "none", 2)
    assert agent["disallowed_tools"] == ["WebFetch", "Bash"] and agent["additional_args"] == ["a"]
    assert daemon.here(daemon.core.store.get_task, made["id"]).auto_accept is False
    for asked, given in ((5, 2), (1.5, 1.5)):
        assert make(daemon, token, agent={"max_budget_usd": asked})[1]["tasks"][0]["agent"]["max_budget_usd"] == given
    assert make(daemon, token, idempotency_key="once")[1]["tasks"][0]["id"] == made["id"]
    hidden = daemon.add("true", queue=False, idempotency_key="of the operator")
    assert make(daemon, token, idempotency_key="of the operator")[1]["tasks"][0]["id"] != hidden
    below = make(daemon, token, parent_task_id=made["id"], depends_on=[made["id"]], agent={"type": "local"})
    assert below[1]["tasks"][0]["parent_task_id"] == made["id"] and below[1]["tasks"][0]["agent"]["isolation"] == ""


@pytest.mark.parametrize("change, named", [
    ({"agent": {"project_dir": "/"}}, "agent.project_dir"), ({"agent": {"additional_args": ["--x"]}}, "agent.additional_args"),
    ({"agent": {"context_files": ["/etc"]}}, "agent.context_files"), ({"verify": "env"}, "verify"),
    ({"project": "other"}, "project"), ({"agent": {"isolation": "none"}}, "agent.isolation"),
    ({"agent": {"repository_url": "x:y"}}, "agent.repository_url"),
    ({"parent_task_id": "{other}"}, "parent_task_id"), ({"parent_task_id": "{below_prefix}"}, "parent_task_id"),
    ({"depends_on": ["{other}"]}, "depends_on"), ({"story_id": "s"}, "story_id"),
])
def test_an_agent_cannot_widen_its_rights_by_a_subtask(daemon, family, change, named):
    if "own" not in family.setdefault("creator", {}):
        family["creator"]["own"] = daemon.running()
    token = family["creator"]["own"][2]
    text = json.dumps(change).replace("{other}", family["other"][0]).replace("{below_prefix}", family["own"][0][:8])
    status, body = make(daemon, token, **json.loads(text))
    assert (status, body["error"]["code"]) == (422, "invalid")
    assert len(body["error"]["problems"]) == 1 and body["error"]["problems"][0].startswith((named, "agent." + named))


@pytest.mark.parametrize("own, given, named", [
    ({}, {"type": "shell"}, "agent.type"), ({}, {"type": "codex"}, "agent.type"), ({}, {"type": "gemini"}, ""), ({"type": "shell"}, {"type": "shell"}, ""),
    ({"permission_mode": "plan"}, {"type": "gemini"}, "agent.type"), ({}, {"permission_mode": "plan"}, ""),
    ({"permission_mode": "plan"}, {"permission_mode": "bypassPermissions"}, "agent.permission_mode"),
    ({"permission_mode": "plan", "allowed_tools": ("Read",)}, {"allowed_tools": ("Bash",)}, "agent.allowed_tools"),
    ({"permission_mode": "bypassPermissions"}, {"allowed_tools": ("Bash",)}, ""),
])
def test_kind_mode_and_tools_are_bound_where_the_own_task_is(own, given, named):
    task = c.Task(name="t", id="own", agent=c.AgentConfig(instructions="x", **own))
    spec = c.TaskSpec(name="sub", agent=c.AgentConfig(instructions="y", **given))
    if not named:
        made = c.restricted_spec(spec, task, set(), {"sub"})
        assert made.parent_task_id == "own" and all(getattr(made.agent, name) == value for name, value in given.items())
        return
    with pytest.raises(c.InvalidInput) as caught:
        c.restricted_spec(spec, task, set(), {"sub"})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [named]


def test_a_subtask_of_a_restricted_agent_is_restricted_too():
    own = c.AgentConfig(instructions="x", permission_mode="plan", allowed_tools=("Read",), type="claude")
    made = c.restricted_spec(c.TaskSpec(name="s", agent=c.AgentConfig(instructions="y")), c.Task(name="t", id="own", agent=own), set(), set())
    assert (made.agent.permission_mode, made.agent.allowed_tools, made.agent.type) == ("plan", ("Read",), "claude")


def test_an_agent_has_not_endless_subtasks(daemon):
    task_id, _, token = daemon.running()
    many = [{"name": f"t{number}", "agent": {"instructions": "x"}} for number in range(c.AGENT_SUBTASKS)]
    assert daemon.ask("POST", "/api/tasks", token, {"tasks": many})[0] == 201
    status, body = daemon.ask("POST", "/api/tasks", token, many[0])
    assert (status, body["error"]["code"]) == (403, "forbidden")


# -- tokens and their files


def test_token_files_are_for_their_owner_alone_and_stay(daemon, tmp_path):
    for path in (daemon.config.api_token_path, daemon.config.agent_key_path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        text = open(path).read().strip()
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", text) and c.own_secret(path) == text
    assert c.own_secret(str(tmp_path / "a/b")) == c.own_secret(str(tmp_path / "a/b")) != c.own_secret(str(tmp_path / "c"))
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff" * 40])
def test_a_token_file_without_a_token_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(c.StorageError, match="token"):
        c.own_secret(str(tmp_path / "token"))


def test_a_link_is_no_token_file(tmp_path):
    (tmp_path / "real").write_text("x" * 43)
    os.symlink(tmp_path / "real", tmp_path / "token")
    with pytest.raises(c.StorageError):
        c.own_secret(str(tmp_path / "token"))


def test_the_token_of_the_configuration_counts_instead_of_the_file(tmp_path):
    with ApiDaemon(tmp_path, 'api_token = "chosen-by-hand"') as daemon:
        assert not os.path.exists(daemon.config.api_token_path)
        assert daemon.ask("GET", "/api/version", "chosen-by-hand") == (200, {"version": c.__version__})
        daemon.config = daemon.config.replace(api_token="another-token")
        daemon.client.call("daemon.reload")
        assert daemon.ask("GET", "/api/version", "chosen-by-hand")[0] == 401
        assert daemon.ask("GET", "/api/version", "another-token")[0] == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer {}x", "Bearer x{}", "Bearer {} {}"])
def test_only_the_whole_token_as_a_bearer_counts(daemon, header):
    headers = {"authorization": header.replace("{}", daemon.token)}
    assert daemon.ask("GET", "/api/version", "", headers=headers)[0] == 401
    assert daemon.ask("GET", "/api/version", "", headers={"authorization": f"bearer  {daemon.token} "})[0] == 200


def test_a_forged_agents_token_opens_nothing(daemon, family):
    run_id = family["own"][1]
    for token in (c.agent_token(b"guessed", run_id), family["own"][2][:-1] + "0", family["ended"][2]):
        if token != family["own"][2]:
            assert daemon.ask("GET", "/api/version", token)[0] == 401


def test_an_agents_token_outlives_the_daemon_that_made_it(tmp_path):
    told = tmp_path / "told"
    with ApiDaemon(tmp_path, ends_agents=False) as daemon:
        task_id = daemon.add(f'echo "$CLAUDOMATOR_API_TOKEN" > {told}; sleep 60')
        token = wait_until(lambda: told.exists() and told.read_text().strip())
    with ApiDaemon(tmp_path) as daemon:
        assert daemon.ask("GET", f"/api/tasks/{task_id}", token)[1]["task"]["state"] == c.RUNNING
        daemon.client.call("task.cancel", ids=[task_id])
        assert daemon.ask("GET", f"/api/tasks/{task_id}", token)[0] == 401


# -- secrets in what leaves the daemon


def test_no_secret_leaves_by_any_way(daemon):
    script = (f'echo "$PASSWORD"; echo {SECRET}; echo "token $CLAUDOMATOR_API_TOKEN $CLAUDOMATOR_API_URL"; '
              f'echo "$PASSWORD {SECRET}" >&2; echo "done with {SECRET} $PASSWORD" > "$CLAUDOMATOR_SUMMARY_FILE"')
    task_id = daemon.add(script, name=f"uses {SECRET}")
    assert daemon.wait(task_id)["summary"] == "done with [redacted] [redacted]"
    run_id = daemon.client.call("execution.list", id=task_id)["executions"][0]["id"]
    said = [daemon.answer("GET", path).body.decode() for path in (
        f"/api/tasks/{task_id}", "/api/tasks?limit=5", f"/api/executions/{run_id}", f"/api/executions/{run_id}/log",
        f"/api/executions/{run_id}/log?stream=stderr", "/api/pool")]
    for path in (f"/api/tasks/{task_id}/logs/stream", f"/api/executions/{run_id}/logs/stream"):
        said.append(json.dumps(daemon.events(daemon.answer("GET", path), lambda event: event[1] == "end")))
    said.append(json.dumps(daemon.events(daemon.answer("GET", f"/api/events?since=0&task={task_id}"),
                                         lambda event: event[2]["kind"] == "execution.ended")))
    said += [json.dumps(item) for item in daemon.client.stream("execution.log", id=task_id)]
    said.append(json.dumps(daemon.ask("GET", f"/api/tasks/{SECRET}")))
    text = "\n".join(said)
    token = c.agent_token(daemon.core.agent_key, run_id)
    forms = [form for secret in (SECRET, ENV_SECRET, token, daemon.token) for form in (
        secret, json.dumps(secret)[1:-1], json.dumps(json.dumps(secret)[1:-1])[1:-1])]
    assert [form for form in forms if form in text] == [] and text.count("[redacted]") > 20
    log = daemon.answer("GET", f"/api/executions/{run_id}/log")
    stored = (daemon.data_dir / "executions" / run_id / "stdout.log").read_bytes()
    assert dict(log.fields)["Claudomator-Next-Offset"] == str(len(stored)), "offsets are the file's"
    assert log.body.decode().startswith(f"[redacted]\n[redacted]\ntoken [redacted] unix://{daemon.data_dir}/agent.sock")


def test_errors_and_the_daemons_own_log_have_no_secret(daemon):
    with pytest.raises(c.ClaudomatorError) as caught:
        daemon.client.call("task.get", id=SECRET)
    assert SECRET not in str(caught.value) and "[redacted]" in str(caught.value)
    daemon.core.log("error", f"it said {SECRET}")
    assert daemon.log[-1] == "it said [redacted]"


def test_a_path_that_exists_is_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("A_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("A_KEY", "/not/a/path/but/base64")
    with ApiDaemon(tmp_path, '[agents.shell]\npass_env = ["A_DIRECTORY", "A_KEY"]') as daemon:
        assert daemon.core.redactor.clean(f"{tmp_path} /not/a/path/but/base64") == f"{tmp_path} [redacted]"


def test_the_page_says_who_may_call_what():
    page = (docs_tables.ROOT / "docs/security.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in c.OPERATIONS)
