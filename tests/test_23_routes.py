"""The operations over HTTP: which route leads where, what a request says, and that the OpenAPI document is true."""
import json
import re

import pytest

import claudomator as c
from tests.api import ApiDaemon
from tests.support import make_repository

CONFIG = 'max_concurrent = 8\n[[projects]]\nname = "known"\ndir = "/nowhere/known"\n[budgets]\nusd = 5'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with ApiDaemon(tmp_path_factory.mktemp("routes"), CONFIG) as daemon:
        yield daemon


def error(daemon, status, *args, **more):
    """The error that answers a request."""
    found, document = daemon.ask(*args, **more)
    assert found == status, document
    assert set(document) == {"error"} and set(document["error"]) <= {"code", "message", "problems"}
    return document["error"]


# -- the table


def test_every_operation_has_a_route_or_says_why_not():
    for operation in c.OPERATIONS.values():
        assert bool(operation.routes) != bool(operation.local), operation.name
        assert operation.scope in c.SCOPES
        assert not operation.routes or operation.stream == any(route.form != "json" for route in operation.routes)
    assert {name for name, operation in c.OPERATIONS.items() if operation.local} == {
        "task.start_next", "daemon.reload", "daemon.backup"}


def test_every_routes_path_and_fixed_parameters_are_parameters_of_its_operation():
    for operation in c.OPERATIONS.values():
        names = {param.name for param in operation.params}
        for route in operation.routes:
            assert set(route.fixed) | set(filter(None, [route.body])) <= names
            assert route.path.count("{") == (c.path_param(operation, route) is not None)


MATCHES = [
    ("GET", "/api/tasks", "task.list", ""), ("POST", "/api/tasks", "task.create", ""), ("HEAD", "/api/tasks", "task.list", ""),
    ("GET", "/api/tasks/t1", "task.get", "t1"), ("PATCH", "/api/tasks/t1", "task.edit", "t1"),
    ("DELETE", "/api/tasks/t1", "task.delete", "t1"), ("POST", "/api/tasks/t1/run", "task.run", "t1"),
    ("POST", "/api/tasks/t1/cancel", "task.cancel", "t1"), ("POST", "/api/tasks/t1/accept", "task.accept", "t1"),
    ("POST", "/api/tasks/t1/reject", "task.reject", "t1"), ("POST", "/api/tasks/t1/answer", "task.answer", "t1"),
    ("POST", "/api/tasks/t1/resume", "task.resume", "t1"), ("GET", "/api/tasks/t1/subtasks", "task.subtasks", "t1"),
    ("GET", "/api/tasks/t1/executions", "execution.list", "t1"), ("GET", "/api/tasks/t1/diff", "task.diff", "t1"),
    ("GET", "/api/tasks/t1,t2/wait", "task.wait", "t1,t2"), ("GET", "/api/tasks/t1/logs/stream", "execution.log", "t1"),
    ("GET", "/api/executions/e1", "execution.get", "e1"), ("GET", "/api/executions/e1/log", "execution.log", "e1"),
    ("GET", "/api/executions/e1/logs/stream", "execution.log", "e1"), ("GET", "/api/events", "events.watch", ""),
    ("GET", "/api/ws", "events.watch", ""),
    ("GET", "/api/agents/status", "agent.status", ""), ("POST", "/api/agents/claude/park", "agent.park", "claude"),
    ("POST", "/api/agents/claude/unpark", "agent.unpark", "claude"), ("GET", "/api/pool", "pool.status", ""),
    ("POST", "/api/pool/pause", "pool.pause", ""), ("POST", "/api/pool/resume", "pool.resume", ""),
    ("POST", "/api/pool/drain", "pool.drain", ""), ("GET", "/api/budget", "budget.status", ""),
    ("GET", "/api/projects", "project.list", ""), ("GET", "/api/workspaces", "sandbox.list", ""),
    ("GET", "/api/sandboxes", "sandbox.list", ""), ("DELETE", "/api/sandboxes/t1", "sandbox.rm", "t1"),
    ("GET", "/api/daemon", "daemon.status", ""), ("GET", "/api/health", "daemon.health", ""),
    ("GET", "/api/version", "daemon.version", ""), ("GET", "/api/openapi.json", "daemon.openapi", ""),
]


@pytest.mark.parametrize("method, path, name, variable", MATCHES)
def test_a_route_leads_to_its_operation(method, path, name, variable):
    operation, route, word = c.match_route(method, path)
    assert (operation.name, word) == (name, variable) and route in operation.routes


def test_the_match_table_is_whole():
    routes = {(route.method, operation.name) for operation in c.OPERATIONS.values() for route in operation.routes}
    assert {(method, name) for method, _, name, _ in MATCHES if method != "HEAD"} == routes


@pytest.mark.parametrize("path", [
    "", "/", "/api", "/api/", "/api/tasks/", "/api//tasks", "/api/tasks//run", "/api/tasks/t1/", "/api/tasks/t1/fly",
    "/{}", "/api/{}", "/api/tasks/{}/{}", "/api/tasks/t1/run/now", "/api/task", "/apix/tasks/t1", "/api/executions", "/api/agents/claude", "/x/tasks/t1",
    "/api/tasks/t1/logs", "/api/openapi"])
def test_there_is_nothing_elsewhere(path):
    with pytest.raises(c.HttpError) as caught:
        c.match_route("GET", path)
    assert (caught.value.http_status, caught.value.code) == (404, "not_found")


@pytest.mark.parametrize("method, path, allow", [
    ("PUT", "/api/tasks", "POST, GET, HEAD"), ("POST", "/api/tasks/t1", "GET, PATCH, DELETE, HEAD"), ("GET", "/api/tasks/t1/run", "POST"),
    ("HEAD", "/api/tasks/t1/run", "POST"), ("OPTIONS", "/api/health", "GET, HEAD"), ("get", "/api/health", "GET, HEAD")])
def test_another_method_is_told_what_there_is(daemon, method, path, allow):
    answer = daemon.answer(method, path)
    assert (answer.status, dict(answer.fields)["Allow"]) == (405, allow)


# -- what a request says


def decoded(method, path, query=(), body=b"", **headers):
    operation, route, variable = c.match_route(method, path)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body:
        given.setdefault("content-type", "application/json")
    request = type("Request", (), {"query": list(query), "headers": given, "body": body})
    return c.decode_params(operation, route, variable, request)


def test_a_query_string_becomes_typed_parameters():
    query = [("state", "READY"), ("state", "FAILED,BLOCKED"), ("tag", "ci"), ("limit", "7"), ("before", "12")]
    assert decoded("GET", "/api/tasks", query) == {
        "states": ["READY", "FAILED", "BLOCKED"], "tag": "ci", "project": "", "agent": "", "parent": "", "limit": 7, "before": 12}
    waiting = decoded("GET", "/api/tasks/a,b/wait", [("timeout_s", "2.5"), ("any", "true")])
    assert (waiting["ids"], waiting["timeout_s"], waiting["any"]) == (["a", "b"], 2.5, True)


@pytest.mark.parametrize("path, pair, words", [
    ("/api/tasks", ("limit", "-1"), "limit: expected a whole number, 0 or more, got '-1'"),
    *(("/api/tasks", ("limit", text), "limit: expected a whole number") for text in (
        "", "x", "+5", "1_0", "5.0", "٣", " 5", "5 ", "1e3", "true", "null", "9" * 20, "[1]", "NaN")),
    *(("/api/tasks/t/wait", ("timeout_s", text), "timeout_s: expected a number") for text in ("-0.1", "x", "Infinity", "true", "0x10")),
    *(("/api/tasks/t/wait", ("any", text), "any: expected true or false") for text in ("1", "yes", "True", "")),
    ("/api/tasks", ("states", "READY"), "states: unknown parameter (did you mean 'state'?)"),
    ("/api/tasks", ("limt", "1"), "limt: unknown parameter (did you mean 'limit'?)"), ("/api/version", ("x", "1"), "x: unknown parameter"),
    ("/api/tasks", ("tag", "a\0b"), "tag: expected a string"), ("/api/tasks/t1", ("id", "t2"), "id: unknown parameter"),
    ("/api/executions/e/log", ("follow", "true"), "follow: unknown parameter"),
])
def test_a_wrong_query_is_told_what_was_expected(path, pair, words):
    with pytest.raises(c.UsageError) as caught:
        decoded("GET", path, [pair])
    assert caught.value.http_status == 400 and caught.value.data["problems"][0].startswith(words)


def test_all_faults_of_a_query_come_at_once_and_nothing_is_given_twice():
    with pytest.raises(c.UsageError) as caught:
        decoded("GET", "/api/tasks", [("limit", "5"), ("limit", "6"), ("x", ""), ("before", "no")])
    assert [problem.partition(":")[0] for problem in caught.value.data["problems"]] == ["x", "limit", "before"]


TASK = {"name": "t", "agent": {"instructions": "x"}}


@pytest.mark.parametrize("body, expected", [
    (TASK, {"tasks": TASK}), ([TASK], {"tasks": [TASK]}), ({"tasks": [TASK]}, {"tasks": [TASK]}),
    ({"tasks": TASK, "queue": True}, {"tasks": TASK, "queue": True}),
    ({"tasks": {"tasks": [TASK]}, "auto_accept": True}, {"tasks": {"tasks": [TASK]}, "auto_accept": True})])
def test_a_task_may_come_bare_or_with_parameters(body, expected):
    found = decoded("POST", "/api/tasks", body=json.dumps(body).encode())
    assert found == {"source": "request", "queue": False, "auto_accept": False, **expected}


def test_the_idempotency_key_of_the_header_is_that_of_the_single_task():
    body = json.dumps({"tasks": TASK, "queue": True}).encode()
    assert decoded("POST", "/api/tasks", body=body, idempotency_key="k")["tasks"] == {**TASK, "idempotency_key": "k"}
    same = json.dumps({**TASK, "idempotency_key": "k"}).encode()
    assert decoded("POST", "/api/tasks", body=same, idempotency_key="k")["tasks"]["idempotency_key"] == "k"
    for wrong in (same.replace(b'"k"', b'"other"'), b'{"tasks":[]}', b"[]", b"5"):
        with pytest.raises(c.InvalidInput, match="Idempotency-Key"):
            decoded("POST", "/api/tasks", body=wrong, idempotency_key="k")


@pytest.mark.parametrize("method, path, body, status, words", [
    ("POST", "/api/tasks", b"", 400, "empty"), ("POST", "/api/tasks", b"{", 400, "not JSON"), ("POST", "/api/tasks", b"\xff", 400, "not JSON"),
    ("POST", "/api/tasks", b'{"tasks": [], "quee": true}', 400, "quee: unknown parameter (did you mean 'queue'?)"),
    ("POST", "/api/tasks/t1/run", b"[]", 400, "must be a JSON object"), ("POST", "/api/tasks/t1/run", b'{"ids": ["t2"]}', 400, "ids: unknown"),
    ("POST", "/api/tasks/t1/reject", b"", 422, "comment: is required"), ("POST", "/api/tasks/t1/reject", b'{"comment": 5}', 422, "expected a string"),
    ("PATCH", "/api/tasks/t1", b"[]", 422, "changes: expected an object"), ("DELETE", "/api/tasks/t1", b'{"x": 1}', 400, "x: unknown"),
    ("POST", "/api/pool/drain", b'{"wait": true}', 400, "wait: unknown"), ("GET", "/api/tasks", b"{}", 400, "no body"),
    ("POST", "/api/tasks", b'{"a":' * 100_000, 400, "too deeply"),
])
def test_a_wrong_body_is_told_what_was_expected(method, path, body, status, words):
    with pytest.raises(c.ClaudomatorError, match=re.escape(words)) as caught:
        decoded(method, path, body=body)
    assert caught.value.http_status == status


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_a_body_that_is_not_called_json_is_not_read(kind):
    with pytest.raises(c.HttpError) as caught:
        decoded("POST", "/api/tasks", body=b"{}", content_type=kind)
    assert caught.value.http_status == 415
    assert decoded("POST", "/api/tasks", body=json.dumps(TASK).encode(), content_type="Application/JSON ; charset=utf-8")


def test_a_post_has_no_query():
    with pytest.raises(c.UsageError, match="queue: unknown parameter"):
        decoded("POST", "/api/tasks", [("queue", "true")], body=b"{}")


def test_a_stream_goes_on_after_the_last_event_that_a_client_saw():
    assert decoded("GET", "/api/events", last_event_id="41")["since"] == 41
    found = decoded("GET", "/api/tasks/t1/logs/stream", last_event_id="e1:512")
    assert (found["id"], found["execution"], found["offset"], found["follow"]) == ("t1", "e1", 512, True)
    for wrong in ("x", "-1", "1:2:", "e1:x"):
        with pytest.raises(c.UsageError, match="Last-Event-ID"):
            decoded("GET", "/api/events" if ":" not in wrong else "/api/tasks/t1/logs/stream", last_event_id=wrong)


# -- requests to a real daemon


def test_a_tasks_way_over_http(daemon):
    status, body = daemon.ask("POST", "/api/tasks", body={"tasks": {"name": "way", "agent": {
        "type": "shell", "instructions": "echo one; echo two >&2; sleep 0.3; echo three"}}, "queue": True})
    task_id = body["tasks"][0]["id"]
    assert status == 201 and body["tasks"][0]["state"] == "QUEUED"
    stream = daemon.events(daemon.answer("GET", f"/api/tasks/{task_id}/logs/stream"), lambda event: event[1] == "end")
    assert "".join(event[2].get("text", "") for event in stream) == "one\nthree\n"
    status, body = daemon.ask("GET", f"/api/tasks/{task_id}/wait?timeout_s=20")
    assert (status, body["timed_out"], body["tasks"][0]["state"]) == (200, False, "READY")
    run_id = body["tasks"][0]["execution"]["id"]
    assert stream[-2][0] == f"{run_id}:10" and stream[-1][2]["execution"]["id"] == run_id
    assert daemon.ask("GET", f"/api/executions/{run_id}/log") == (200, "one\nthree\n")
    assert daemon.ask("GET", f"/api/executions/{run_id}/log?stream=stderr") == (200, "two\n")
    part = daemon.answer("GET", f"/api/executions/{run_id}/log?offset=0&limit=5")
    assert (part.body, dict(part.fields)["Claudomator-Next-Offset"]) == (b"one\nt", "5")
    assert daemon.ask("GET", f"/api/executions/{run_id}/log?offset=4&tail=1") == (200, "three\n")
    again = daemon.answer("GET", f"/api/executions/{run_id}/logs/stream", headers={"last-event-id": f"{run_id}:4"})
    assert [event[2]["text"] for event in daemon.events(again, lambda event: event[1] == "end")[:-1]] == ["", "three\n"]
    assert daemon.ask("POST", f"/api/tasks/{task_id}/reject", body={"comment": "more"})[1]["tasks"][0]["state"] == "PENDING"
    assert daemon.ask("PATCH", f"/api/tasks/{task_id}", body={"priority": "low"})[1]["tasks"][0]["priority"] == "low"
    assert error(daemon, 409, "POST", f"/api/tasks/{task_id}/accept")["code"] == "wrong_state"
    assert daemon.ask("DELETE", f"/api/tasks/{task_id}") == (200, {"deleted": [task_id]})
    assert error(daemon, 404, "GET", f"/api/tasks/{task_id}")["code"] == "not_found"


def test_what_is_answered_is_on_disk(daemon):
    _, body = daemon.ask("POST", "/api/tasks", body=TASK)
    assert daemon.here(daemon.core.store.is_durable)
    assert daemon.ask("POST", "/api/tasks", body=TASK, headers={"idempotency-key": "once"})[0] == 201
    again = [daemon.ask("POST", "/api/tasks", body=TASK, headers={"idempotency-key": "once"})[1]["tasks"][0]["id"] for _ in range(2)]
    assert again[0] == again[1] != body["tasks"][0]["id"]


def test_a_list_is_continued_by_its_next(daemon):
    ids = [daemon.ask("POST", "/api/tasks", body={**TASK, "tags": ["paged"]})[1]["tasks"][0]["id"] for _ in range(5)]
    found, before = [], ""
    while before is not None:
        _, body = daemon.ask("GET", f"/api/tasks?tag=paged&limit=2{before and f'&before={before}'}")
        found += [task["id"] for task in body["tasks"]]
        before = body["next"]
    assert found == ids[::-1]


def test_a_list_of_none_has_none_and_a_park_ends_before_the_years_do(daemon):
    daemon.ask("POST", "/api/tasks", body=TASK)
    assert daemon.ask("GET", "/api/tasks?limit=0") == (200, {"tasks": [], "next": None})
    for until in ("99999999d", "9999-99-99T00:00:00Z", "2001-01-01T00:00:00Z", "-"):
        assert error(daemon, 422, "POST", "/api/agents/gemini/park", body={"until": until})["message"].startswith("until: ")


def test_an_empty_name_is_an_unknown_parameter_too(daemon):
    assert error(daemon, 400, "POST", "/api/pool/pause", body={"": 1})["problems"] == [": unknown parameter"]


def test_a_wait_ends_with_its_time(daemon):
    task_id = daemon.ask("POST", "/api/tasks", body=TASK)[1]["tasks"][0]["id"]
    assert daemon.ask("GET", f"/api/tasks/{task_id}/wait?timeout_s=0.01")[1]["timed_out"] is True


def test_one_poll_lasts_a_minute_at_most(daemon, monkeypatch):
    monkeypatch.setattr(c, "LONGEST_POLL_S", 0.05)
    task_id = daemon.ask("POST", "/api/tasks", body=TASK)[1]["tasks"][0]["id"]
    for query in ("", "?timeout_s=600"):
        assert daemon.ask("GET", f"/api/tasks/{task_id}/wait{query}")[1]["timed_out"] is True


def test_events_are_followed_from_where_a_client_was(daemon):
    task_id = daemon.ask("POST", "/api/tasks", body=TASK)[1]["tasks"][0]["id"]
    stream = daemon.answer("GET", "/api/events?since=0&task=" + task_id)
    hello, (seq, name, event) = daemon.events(stream, lambda event: event[1] != "hello")
    assert hello[:2] == ("0", "hello") and hello[2]["seq"] == 0 and hello[2]["gap"] is False
    assert (int(seq), name, event["kind"]) == (event["seq"], None, "task.created")
    stream = daemon.answer("GET", f"/api/events?task={task_id}", headers={"last-event-id": seq})
    daemon.client.call("task.edit", ids=[task_id], changes={"priority": "high"})
    hello, edited = daemon.events(stream, lambda event: event[1] != "hello")
    assert hello[0] == seq and edited[2]["kind"] == "task.edited"


def test_an_event_that_holds_a_text_is_sent_as_an_event(daemon):
    asking = daemon.add('printf \'{"text": "which?"}\' > "$CLAUDOMATOR_QUESTION_FILE"')
    daemon.wait(asking)
    daemon.client.call("task.answer", id=asking, text="this")
    events = daemon.events(daemon.answer("GET", "/api/events?since=0&task=" + asking), lambda event: event[2]["kind"] == "task.answer")
    assert events[-1][2]["text"] == "this" and int(events[-1][0]) == events[-1][2]["seq"]
    daemon.client.call("task.cancel", ids=[asking])


def test_a_silent_stream_sends_comments(daemon, monkeypatch):
    monkeypatch.setattr(c, "KEEP_ALIVE_S", 0.02)
    stream = daemon.answer("GET", "/api/events").chunks

    async def first():
        chunks = [await anext(stream), await anext(stream)]
        await stream.aclose()
        return chunks
    opening, silence = daemon.run(first())
    assert opening.startswith(b"retry: 2000\nevent: hello\nid: ") and silence == b": \n\n"
    assert len(daemon.core.bus._watchers) == 0, "a stream that is over is no watcher any more"


def test_a_stream_that_cannot_begin_is_an_error(daemon):
    for path in ("/api/events?task=nope", "/api/tasks/nope/logs/stream", "/api/executions/nope/logs/stream", "/api/executions/nope/log"):
        assert error(daemon, 404, "GET", path)["code"] == "not_found"
    pending = daemon.ask("POST", "/api/tasks", body=TASK)[1]["tasks"][0]["id"]
    assert daemon.answer("HEAD", f"/api/tasks/{pending}/logs/stream").body == b""


def test_faults_of_the_program_are_logged_and_not_told(daemon, monkeypatch):
    operation, route, _ = c.match_route("GET", "/api/version")

    def broken(core, params):
        raise RuntimeError("inner matter")
    monkeypatch.setitem(c.ROUTES, "/api/version", {"GET": (operation.replace(handler=broken), route)})
    found = error(daemon, 500, "GET", "/api/version")
    assert found["code"] == "internal" and "inner" not in found["message"] and "inner matter" in daemon.log[-1]


def test_a_bad_task_names_all_its_problems(daemon):
    found = error(daemon, 422, "POST", "/api/tasks", body={"name": "", "agnt": {}})
    assert found["code"] == "invalid" and len(found["problems"]) >= 3 and found["problems"][0] in found["message"]


# -- the OpenAPI document


def faults(schema, value, document, path="$"):
    """What a JSON value has against a schema, for the words that the document uses; an unknown field is one too."""
    if "$ref" in schema:
        target = document
        for word in schema["$ref"].removeprefix("#/").split("/"):
            target = target[word]
        return faults(target, value, document, path)
    if "anyOf" in schema:
        found = [faults(option, value, document, path) for option in schema["anyOf"]]
        return [] if [] in found else found[0]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is none of {schema['enum']}"]
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    kind = names[type(value)]
    if wanted and kind not in wanted and not (kind == "integer" and "number" in wanted):
        return [f"{path}: {value!r} is no {wanted}"]
    if isinstance(value, list) and "items" in schema:
        return [fault for i, item in enumerate(value) for fault in faults(schema["items"], item, document, f"{path}[{i}]")]
    if isinstance(value, dict) and "properties" in schema:
        missing = [f"{path}.{name}: is missing" for name in schema.get("required", ()) if name not in value]
        unknown = [f"{path}.{name}: is in no schema" for name in value if name not in schema["properties"]]
        return missing + unknown + [fault for name, item in value.items() if name in schema["properties"]
                                    for fault in faults(schema["properties"][name], item, document, f"{path}.{name}")]
    if schema.get("format") == "date-time" and value is not None and not re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", value):
        return [f"{path}: {value!r} is no time"]
    return []


@pytest.fixture(scope="module")
def document(daemon):
    return daemon.ask("GET", "/api/openapi.json")[1]


def test_every_route_is_in_the_document_once(document):
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.method, route.path) for operation in c.OPERATIONS.values() for route in operation.routes}
    free = {path for path, methods in document["paths"].items() if {} in methods.get("get", {}).get("security", [])}
    assert free == {"/api/ws"}, "its token may come after it is open"
    ids = [described["operationId"] for methods in document["paths"].values() for described in methods.values()]
    assert len(set(ids)) == len(ids) and document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        for described in methods.values():
            named = [parameter["name"] for parameter in described.get("parameters", ()) if parameter["in"] == "path"]
            assert [f"{{{name}}}" for name in named] == re.findall(r"\{\w+\}", path)


def test_every_example_is_as_its_schema_says(document):
    bodies = [described["requestBody"]["content"]["application/json"] for methods in document["paths"].values()
              for described in methods.values() if "example" in described.get("requestBody", {}).get("content", {}).get("application/json", {})]
    assert len(bodies) == len(c.BODY_EXAMPLES)
    for body in bodies:
        forms = body["schema"].get("anyOf", [body["schema"]])
        assert any(faults(form, body["example"], document) == [] for form in forms), body["example"]
    assert c.parse_tasks(c.BODY_EXAMPLES["task.create"]["tasks"], "example", 0.0)


def test_every_reference_leads_somewhere(document):
    for target in re.findall(r'"\$ref":"#/([^"]+)"', c.format_json(document)):
        found = document
        for word in target.split("/"):
            found = found[word]


def test_every_answer_is_as_the_document_says(daemon, document, tmp_path):
    _, copy = make_repository(tmp_path)
    done = daemon.ask("POST", "/api/tasks", body={"tasks": {
        "name": "done", "tags": ["x"], "agent": {"type": "shell", "project_dir": str(copy), "instructions": "echo x > f; git add f; "
                                                 "git -c user.name=t -c user.email=t@example.org commit -qm c"}}, "queue": True})[1]["tasks"][0]["id"]
    asking = daemon.add('printf \'{"text": "?", "options": ["a"]}\' > "$CLAUDOMATOR_QUESTION_FILE"')
    failed = daemon.add("exit 3", agent={"project_dir": str(copy)})
    for task_id in (done, asking, failed):
        daemon.wait(task_id)
    pending = daemon.ask("POST", "/api/tasks", body={**TASK, "parent_task_id": done, "depends_on": [{"task": failed, "on": "any"}],
                                                     "start_at": "3h"})[1]["tasks"][0]["id"]
    run = daemon.ask("GET", f"/api/tasks/{done}/executions")[1]["executions"][0]
    assert run["commits"] and run["changestats"], run
    bodies = {"task.create": TASK, "task.reject": {"comment": "x"}, "task.answer": {"text": "a"}, "task.edit": {"tags": ["y"]}}
    objects = {"task.answer": asking, "task.get": asking, "task.run": failed, "task.resume": failed, "task.cancel": pending,
               "task.edit": pending, "task.delete": pending}
    order = sorted(c.OPERATIONS.values(), key=lambda operation: operation.name in ("task.delete", "sandbox.rm"))
    seen = set()
    for operation in order:
        for route in operation.routes:
            path = route.path.replace("{id}", run["id"] if operation.name == "execution.get" else objects.get(operation.name, done))
            path = path.replace("{execution}", run["id"]).replace("{agent}", "claude") + "?timeout_s=0" * (operation.name == "task.wait")
            answer = daemon.answer(route.method, path, body=bodies.get(operation.name))
            described = document["paths"][route.path][route.method.lower()]["responses"]
            if route.form == "socket":
                assert answer.status == 426 and described.keys() == {"101", "default"}
                continue
            if isinstance(answer, c.HttpStream):
                daemon.run(answer.chunks.aclose())
                assert described["200"]["content"].keys() == {answer.content_type}
                continue
            wanted = described.get(str(answer.status))
            if wanted is None:
                assert answer.status == 409, (operation.name, answer)
                wanted = document["components"]["responses"]["Error"]
            else:
                seen.add(operation.name)
            content = wanted["content"]
            if "application/json" in content:
                assert faults(content["application/json"]["schema"], json.loads(answer.body), document) == [], operation.name
    daemon.client.call("pool.resume")
    assert set(c.OPERATIONS) - seen <= {"events.watch", "task.start_next", "daemon.reload", "daemon.backup", "task.resume", "task.reject"}


def test_every_error_is_as_the_document_says(daemon, document):
    schema = document["components"]["responses"]["Error"]["content"]["application/json"]["schema"]
    for args in (("GET", "/api/tasks/nope"), ("GET", "/api/tasks?limit=x"), ("PUT", "/api/tasks"), ("POST", "/api/tasks"), ("GET", "/nope")):
        assert faults(schema, daemon.ask(*args)[1], document) == []


@pytest.mark.parametrize("task, is_right", [
    (TASK, True), ({**TASK, "timeout": "5m", "retry": {"max_attempts": 2, "backoff": ["5s"]}, "depends_on": ["a", {"task": "b", "on": "any"}]}, True),
    ({**TASK, "description": None, "retry": None, "tags": None, "depends_on": None, "priority": None, "auto_accept": None}, True),
    ({**TASK, "x": 1}, False), ({"name": "t"}, False), ({**TASK, "agent": {"instructions": 5}}, False), ({**TASK, "priority": "urgent"}, False),
    ({**TASK, "depends_on": [{"task": "b", "on": "never"}]}, False), ({**TASK, "name": None}, False), ({**TASK, "tags": "x"}, False),
])
def test_the_schema_of_a_task_and_its_reader_agree(document, task, is_right):
    assert (faults(document["components"]["schemas"]["TaskDocument"], task, document) == []) == is_right
    if is_right:
        assert c.parse_tasks(task, "x", 0.0)
    else:
        with pytest.raises(c.InvalidInput):
            c.parse_tasks(task, "x", 0.0)
