"""Section 23: every move of a task, and every operation of the table, against a real daemon with shell agents."""
import os
import sqlite3

import pytest

import claudomator as c
from tests.support import DaemonProcess, shell_task, wait_until

CONFIG = """
max_concurrent = 8
[[projects]]
name = "known"
dir = "/nowhere/known"
verify = "true"
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with DaemonProcess(tmp_path_factory.mktemp("operations"), CONFIG) as process:
        yield process


def events_of(daemon, task_id):
    stream, last = daemon.new_client().stream("events.watch", since=0, task=task_id), None
    found = []
    while last is None or found[-1]["seq"] < last:
        last = last or max(event[0] for event in rows(daemon, "SELECT seq FROM events WHERE task_id = ?", task_id))
        found.append(next(stream))
    return found


def rows(daemon, sql, *values):
    db = sqlite3.connect(f"file:{daemon.data_dir}/claudomator.db?mode=ro", uri=True)
    try:
        return db.execute(sql, values).fetchall()
    finally:
        db.close()


def text_of_log(daemon, **params):
    stream, text = daemon.new_client().stream("execution.log", **params), ""
    try:
        while True:
            text += next(stream)["text"]
    except StopIteration as done:
        return text, done.value


def refused(daemon, method, code, **params):
    with pytest.raises(c.ClaudomatorError) as caught:
        daemon.call(method, **params)
    assert caught.value.code == code, caught.value
    return str(caught.value)


def parked_in_queue(daemon, **more):
    """A QUEUED task that does not start for now."""
    return daemon.add("true", start_at="3h", **more)


# -- the table


def right_params(daemon):
    """For each operation a call that works, in an order that works."""
    done = daemon.add("echo hello; echo oops >&2", name="walk")
    daemon.wait(done)
    asking = daemon.add('printf \'{"text": "?", "options": ["a"]}\' > "$CLAUDOMATOR_QUESTION_FILE"', name="asks")
    daemon.wait(asking)
    failed = daemon.add("exit 3", agent={"project_dir": str(daemon.home), "isolation": "none"}, name="fails")
    daemon.wait(failed)
    ready = daemon.add("true", name="ready")
    daemon.wait(ready)
    pending = daemon.add("true", queue=False, name="pending")
    other = daemon.add("true", queue=False, name="other")
    run = daemon.call("execution.list", id=done)["executions"][0]["id"]
    return {
        "task.create": {"tasks": shell_task("true"), "source": "walk", "queue": False, "auto_accept": True},
        "task.list": {"states": ["ready"], "tag": "", "project": "", "agent": "shell", "limit": 5, "before": 10 ** 9},
        "task.get": {"id": done[:13]}, "task.edit": {"ids": [pending], "changes": {"priority": "low"}},
        "task.accept": {"ids": [done]}, "task.reject": {"ids": [ready], "comment": "more"},
        "task.answer": {"id": asking, "text": "a"}, "task.run": {"ids": [failed]}, "task.start_next": {},
        "task.wait": {"ids": [done, failed], "any": False, "timeout_s": 20.5, "parked_ends": True},
        "task.resume": None, "task.cancel": {"ids": [parked_in_queue(daemon)]}, "task.subtasks": {"id": done},
        "task.diff": {"id": done}, "execution.list": {"id": done}, "execution.get": {"id": run},
        "execution.log": {"id": done, "stream": "stderr", "offset": 0, "tail": 5, "follow": True},
        "events.watch": {"since": 0, "task": done}, "agent.status": {}, "agent.park": {"agent": "claude", "until": "2h"},
        "agent.unpark": {"agent": "claude"}, "budget.status": {},
        "pool.status": {"ended": 3}, "pool.pause": {"agent": "claude"},
        "pool.resume": {"agent": "claude"}, "pool.drain": {"wait": False}, "project.list": {}, "sandbox.list": {},
        "sandbox.rm": {"ids": [done]}, "task.delete": {"ids": [other]}, "daemon.status": {}, "daemon.reload": {},
        "daemon.backup": {"path": str(daemon.home / "backup.db")}, "daemon.health": {}, "daemon.version": {},
        "daemon.openapi": {},
    }


def test_every_operation_works_with_the_right_parameters(daemon):
    calls = right_params(daemon)
    assert set(calls) == set(c.OPERATIONS)
    for name, params in calls.items():
        if params is None:
            continue
        stream = daemon.new_client().stream(name, **params)
        if c.OPERATIONS[name].stream:
            assert isinstance(next(stream), dict), name
        else:
            with pytest.raises(StopIteration) as done:
                next(stream)
            assert isinstance(done.value.value, dict), name
    daemon.call("pool.resume")


WRONG = {"str": 5, "text": ["x"], "int": "1", "number": "1", "bool": 1, "ids": "abc", "names": {"a": 1}, "object": []}
MORE_WRONG = {"str": "a\0b", "text": "\ud800", "int": -1, "number": -0.5, "ids": [1], "names": [None], "object": "x", "bool": "true"}


@pytest.mark.parametrize("name", c.OPERATIONS)
def test_every_operation_names_each_parameter_that_is_wrong(daemon, name):
    operation = c.OPERATIONS[name]
    client = daemon.client
    for wrong in (WRONG, MORE_WRONG):
        params = {param.name: wrong[param.kind] for param in operation.params if param.kind != "any"}
        if params:
            with pytest.raises(c.ClaudomatorError) as caught:
                client.call(name, **params)
            problems = caught.value.data["problems"]
            assert caught.value.code == "invalid" and caught.value.exit_code == 2
            assert {problem.partition(":")[0] for problem in problems} >= set(params)
            assert all("expected" in problem for problem in problems if problem.partition(":")[0] in params)
    with pytest.raises(c.ClaudomatorError) as caught:
        client.call(name, **{param.name + "x": 1 for param in operation.params}, surely_unknown=1)
    problems = caught.value.data["problems"]
    assert "surely_unknown: unknown parameter" in problems
    assert {f"{p.name}: is required ({p.help})" for p in operation.params if p.required} <= set(problems)
    assert all(f"{p.name}x: unknown parameter (did you mean {p.name!r}?)" in problems for p in operation.params)


def test_big_numbers_are_refused_before_the_database_sees_them(daemon):
    for method, params in (("task.list", {"before": 2 ** 70}), ("events.watch", {"since": 2 ** 64}),
                           ("task.list", {"limit": 2 ** 53}), ("pool.status", {"ended": 1e300})):
        refused(daemon, method, "invalid", **params)
    assert len(daemon.call("pool.status", ended=0)["tasks"]) < 300


# -- creation


def test_a_batch_is_stored_whole_or_not_at_all(daemon):
    before = daemon.call("daemon.status")["counts"]
    good, bad = shell_task("true", "good"), shell_task("true", "bad", depends_on=["0000-no-such"])
    message = refused(daemon, "task.create", "invalid", tasks={"tasks": [good, bad]}, queue=True)
    assert "'bad'" in message and "depends_on" in message
    assert daemon.call("daemon.status")["counts"] == before


@pytest.mark.parametrize("task, words", [
    (shell_task("true", agent={"type": "shel"}), ["agent.type", "did you mean 'shell'", "claude, gemini, shell"]),
    (shell_task("true", project="knwon"), ["project", "did you mean 'known'"]),
    (shell_task("true", depends_on=["nope"]), ["depends_on", "'nope'"]),
    (shell_task("true", parent_task_id="nope"), ["'nope'"]),
    (shell_task("x", agent={"type": "local", "repository_url": "git@x:y"}), ["agent.isolation", "local", "container"]),
    (shell_task("true", acceptance_criteria="good"), ["acceptance_criteria", "verify"]),
    (shell_task("true", nmae="x"), ["nmae", "did you mean 'name'"]),
])
def test_what_cannot_be_done_is_refused_with_the_place_and_a_way_out(daemon, task, words):
    with pytest.raises(c.ClaudomatorError) as caught:
        daemon.call("task.create", tasks=task)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_idempotency_key_makes_the_second_task_the_first_one(daemon):
    first = daemon.add("true", queue=False, idempotency_key="once")
    assert daemon.add("false", queue=False, idempotency_key="once") == first
    again = daemon.call("task.create", tasks={"tasks": [
        shell_task("true", "b", depends_on=["a"]), shell_task("true", "a", idempotency_key="once"),
        shell_task("true", "c", idempotency_key="twice"), shell_task("true", "d", idempotency_key="twice"),
        shell_task("true", "e", idempotency_key="once")]}, queue=True)
    b, a, twin, other_twin, known_again = again["tasks"]
    assert a["id"] == known_again["id"] == first and a["state"] == c.QUEUED and twin["id"] == other_twin["id"]
    assert b["depends_on"] == [first], "a dependency on a known task means that task"
    daemon.wait(first)
    daemon.call("task.accept", ids=[first])
    assert daemon.wait(b["id"])["state"] == c.READY


def test_a_project_gives_directory_and_verify(daemon):
    task = daemon.call("task.create", tasks=shell_task("true", project="known"))["tasks"][0]
    assert task["agent"]["project_dir"] == "/nowhere/known" and task["project"] == "known"
    task = daemon.call("task.create", tasks=shell_task("true", agent={"project_dir": "/nowhere/known"}))["tasks"][0]
    assert task["project"] == "known"


def test_dependencies_may_be_given_by_the_beginning_of_an_id(daemon):
    first = daemon.add("true", auto_accept=True)
    second = daemon.add("true", depends_on=[first[:13]])
    assert daemon.call("task.get", id=second)["task"]["depends_on"] == [first]
    assert daemon.wait(second)["state"] == c.READY and daemon.state(first) == c.COMPLETED


def test_a_dependency_that_cannot_be_met_fails_what_waits_for_it(daemon):
    first = parked_in_queue(daemon)
    second = daemon.add("true", depends_on=[first])
    third = daemon.add("true", depends_on=[{"task": first, "on": "failure"}])
    daemon.call("task.cancel", ids=[first])
    assert daemon.wait(second)["reason"] == "dependency_failed" and daemon.wait(third)["state"] == c.READY
    fourth = daemon.add("true", depends_on=[parked_in_queue(daemon, name="goes")])
    daemon.call("task.delete", ids=[daemon.call("task.get", id=fourth)["task"]["depends_on"][0]])
    assert "deleted" in daemon.wait(fourth)["detail"]


# -- moves that people make


def test_reject_sends_back_with_a_comment_that_reaches_the_next_run(daemon):
    task_id = daemon.add('[ -z "$CLAUDOMATOR_FEEDBACK_FILE" ] || cat "$CLAUDOMATOR_FEEDBACK_FILE"')
    assert daemon.wait(task_id)["state"] == c.READY
    daemon.call("task.reject", ids=[task_id], comment="the tests are missing")
    task = daemon.call("task.get", id=task_id)["task"]
    assert (task["state"], task["rejection_comment"]) == (c.PENDING, "the tests are missing")
    daemon.call("task.run", ids=[task_id])
    daemon.wait(task_id)
    assert "the tests are missing" in text_of_log(daemon, id=task_id)[0]
    daemon.call("task.accept", ids=[task_id])
    assert daemon.state(task_id) == c.COMPLETED


def test_an_answer_reaches_the_run_that_goes_on(daemon):
    task_id = daemon.add('[ -n "$CLAUDOMATOR_ANSWER" ] && echo "got: $CLAUDOMATOR_ANSWER" && cat "$CLAUDOMATOR_FEEDBACK_FILE" && exit\n'
                         'printf \'{"text": "which?", "options": ["a", "b"]}\' > "$CLAUDOMATOR_QUESTION_FILE"')
    task = daemon.wait(task_id)
    assert (task["state"], task["question"]["text"]) == (c.BLOCKED, "which?")
    assert "answer its question" in refused(daemon, "task.run", "wrong_state", ids=[task_id])
    daemon.call("task.answer", id=task_id, text="b as in bär")
    assert daemon.wait(task_id)["state"] == c.READY
    text = text_of_log(daemon, id=task_id)[0]
    assert text.startswith("got: b as in bär\n") and "which?" in text
    kinds = [event["kind"] for event in events_of(daemon, task_id)]
    assert kinds.count("task.question") == kinds.count("task.answer") == 1


def test_cancel_of_a_running_task_answers_when_nothing_of_it_runs(daemon):
    task_id = daemon.add("setsid sleep 300 & sleep 300")
    run = wait_until(lambda: daemon.call("task.get", id=task_id)["task"]["execution"])
    wait_until(lambda: len(c.marked_processes([run["id"]])) >= 3)
    task = daemon.call("task.cancel", ids=[task_id])["tasks"][0]
    assert (task["state"], task["reason"]) == (c.CANCELLED, "cancelled")
    assert not c.marked_processes([run["id"]])


def test_edit_checks_like_creation_and_the_queue_follows(daemon):
    task_id = parked_in_queue(daemon)
    for changes, words in (({"prority": "high"}, "did you mean 'priority'"), ({"agent": {"type": "shel"}}, "did you mean 'shell'"),
                           ({"agent": "x"}, "agent"), ({"project": "knwon"}, "did you mean 'known'"),
                           ({"depends_on": ["nope"]}, "'nope'"), ({"timeout": "soon"}, "timeout"),
                           ({"idempotency_key": "x"}, "cannot be changed"), ({"parent_task_id": "x"}, "cannot be changed")):
        assert words in refused(daemon, "task.edit", "invalid", ids=[task_id], changes=changes)
    other = daemon.add("true", depends_on=[task_id])
    assert "cycle" in refused(daemon, "task.edit", "invalid", ids=[task_id], changes={"depends_on": [other]})
    assert "cycle" in refused(daemon, "task.edit", "invalid", ids=[task_id], changes={"depends_on": [task_id]})
    assert daemon.state(task_id) == c.QUEUED
    changed = daemon.call("task.edit", ids=[task_id], changes={
        "start_at": None, "name": "now", "auto_accept": True, "agent": {"instructions": "echo changed"}})["tasks"][0]
    assert (changed["name"], changed["agent"]["type"]) == ("now", "shell")
    assert daemon.wait(task_id)["state"] == c.COMPLETED, "the queue has the new start time"
    assert daemon.wait(other)["state"] == c.READY
    assert text_of_log(daemon, id=task_id)[0] == "changed\n"
    assert "cannot be edited" in refused(daemon, "task.edit", "wrong_state", ids=[task_id], changes={"name": "late"})


def test_resume_wants_something_to_resume(daemon):
    never_ran = daemon.add("true", queue=False)
    daemon.call("task.cancel", ids=[never_ran])
    assert "ctl run" in refused(daemon, "task.resume", "wrong_state", ids=[never_ran])
    assert "ctl run" in refused(daemon, "task.diff", "not_found", id=daemon.add("true", queue=False))


def test_resume_goes_on_in_the_kept_sandbox_with_the_message(daemon, tmp_path):
    from tests.support import make_repository
    _, copy = make_repository(tmp_path)
    task_id = daemon.add('if [ -e half ]; then cat half "$CLAUDOMATOR_FEEDBACK_FILE"; else echo half > half; exit 1; fi',
                         agent={"project_dir": str(copy)})
    assert daemon.wait(task_id)["state"] == c.FAILED
    box = next(box for box in daemon.call("sandbox.list")["sandboxes"] if box["task_id"] == task_id)
    assert os.path.exists(box["path"] + "/half")
    daemon.call("task.resume", ids=[task_id], message="go on, please")
    assert daemon.wait(task_id)["state"] == c.READY
    text = text_of_log(daemon, id=task_id)[0]
    assert text.startswith("half\n") and "go on, please" in text
    assert daemon.call("task.diff", id=task_id)["commits"][0]["message"].startswith("chore: autocommit")


def test_delete_takes_files_and_sandbox_with_it(daemon, tmp_path):
    from tests.support import make_repository
    _, copy = make_repository(tmp_path)
    task_id = daemon.add("touch x; exit 1", agent={"project_dir": str(copy)})
    run = daemon.wait(task_id)["execution"]
    directory = daemon.data_dir / "executions" / run["id"]
    assert directory.is_dir() and os.path.isdir(run["sandbox_dir"])
    assert daemon.call("task.delete", ids=[task_id[:12]])["deleted"] == [task_id]
    assert not directory.exists() and not os.path.exists(run["sandbox_dir"])
    refused(daemon, "task.get", "not_found", id=task_id)
    running = daemon.add("sleep 100")
    wait_until(lambda: daemon.state(running) == c.RUNNING)
    assert "cancel it first" in refused(daemon, "task.delete", "wrong_state", ids=[running])
    daemon.call("task.cancel", ids=[running])


def test_a_task_whose_sandbox_lies_elsewhere_is_deleted_with_its_logs_and_the_next_one_too(tmp_path):
    elsewhere = tmp_path / "elsewhere"  # the Go server's were in /tmp
    elsewhere.mkdir()
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / "executions" / name).mkdir(parents=True)
        (data / "executions" / name / "stdout.log").write_text("said\n")
    store = c.Store(str(data / "claudomator.db"))
    for name in ("a", "b"):
        store.insert_task(c.Task(id=f"task-{name}", name=name, agent=c.AgentConfig(type="shell"), state=c.FAILED))
        store.insert_execution(c.Execution(id=name, task_id=f"task-{name}", status=c.FAILED, sandbox_dir=str(elsewhere)))
    store.close()
    with DaemonProcess(tmp_path) as process:
        assert process.call("task.delete", ids=["task-a", "task-b"]) == {"deleted": ["task-a", "task-b"]}
        assert list((data / "executions").iterdir()) == [] and elsewhere.is_dir()
        assert "is not below" in process.log()


def test_sandboxes_of_tasks_that_need_them_stay(daemon, tmp_path):
    from tests.support import make_repository
    _, copy = make_repository(tmp_path)
    asks = daemon.add('printf \'{"text": "?", "options": ["a"]}\' > "$CLAUDOMATOR_QUESTION_FILE"', agent={"project_dir": str(copy)})
    fails = daemon.add("exit 1", agent={"project_dir": str(copy)})
    daemon.wait(asks), daemon.wait(fails)
    assert "still needs" in refused(daemon, "sandbox.rm", "wrong_state", ids=[fails, asks])
    assert len(daemon.call("sandbox.rm", ids=[fails])["removed"]) == 1
    assert daemon.call("sandbox.rm", ids=[fails])["removed"] == []
    kept = {box["task_id"] for box in daemon.call("sandbox.list")["sandboxes"]}
    assert asks in kept and fails not in kept


@pytest.mark.parametrize("method, more", [("task.run", {}), ("task.cancel", {}), ("task.accept", {}),
                                          ("task.reject", {"comment": "x"}), ("task.resume", {}), ("task.delete", {}),
                                          ("task.edit", {"changes": {"name": "other"}}), ("sandbox.rm", {})])
def test_one_wrong_id_in_a_list_changes_nothing(daemon, method, more):
    script = "exit 1" if method in ("task.run", "task.resume") else "true"
    task_id = parked_in_queue(daemon) if method == "task.cancel" else daemon.add(script)
    if method != "task.cancel":
        daemon.wait(task_id)
    before = daemon.call("task.get", id=task_id)
    refused(daemon, method, "not_found", ids=[task_id, "no-such-task"], **more)
    completed = daemon.add("true", auto_accept=True)
    daemon.wait(completed)
    if method not in ("task.delete", "sandbox.rm"):
        refused(daemon, method, "wrong_state", ids=[task_id, completed], **more)
    assert daemon.call("task.get", id=task_id) == before


@pytest.mark.parametrize("method, more, words", [
    ("task.accept", {}, "READY"), ("task.reject", {"comment": "x"}, "READY"), ("task.resume", {}, "resume")])
def test_a_move_from_the_wrong_state_says_what_the_state_is(daemon, method, more, words):
    task_id = daemon.add("true", queue=False)
    message = refused(daemon, method, "wrong_state", ids=[task_id], **more)
    assert words in message


def test_start_next_queues_the_oldest_pending_task(daemon):
    for task in daemon.call("task.list", states=[c.PENDING], limit=1000)["tasks"]:
        daemon.call("task.delete", ids=[task["id"]])
    older, newer = daemon.add("true", queue=False), daemon.add("true", queue=False)
    assert daemon.call("task.start_next")["task"]["id"] == older
    assert daemon.call("task.start_next")["task"]["id"] == newer
    assert daemon.call("task.start_next") == {"task": None}


def test_an_ambiguous_or_empty_id_is_refused(daemon):
    assert "no task" in refused(daemon, "task.get", "not_found", id="")
    assert "give more of it" in refused(daemon, "task.get", "not_found", id=shared_beginning(daemon))


def shared_beginning(daemon):
    """A beginning that two ids share."""
    first = {}
    while True:
        task_id = daemon.add("true", queue=False)
        if task_id[0] in first:
            return task_id[0]
        first[task_id[0]] = task_id


# -- subtasks


def with_open_child(daemon, **child):
    """(parent that is BLOCKED on its child, the child, PENDING)."""
    parent = daemon.add("sleep 0.3")
    child_id = daemon.add("true", queue=False, parent_task_id=parent, **child)
    wait_until(lambda: daemon.state(parent) == c.BLOCKED)
    return parent, child_id


def test_a_parent_is_blocked_until_its_subtasks_end_then_ready(daemon):
    parent, child = with_open_child(daemon)
    assert [task["id"] for task in daemon.call("task.subtasks", id=parent)["tasks"]] == [child]
    assert "waits for its subtasks" in daemon.call("task.get", id=parent)["task"]["why"]
    assert "asks nothing" in refused(daemon, "task.answer", "wrong_state", id=parent, text="x")
    assert "subtasks" in refused(daemon, "task.delete", "wrong_state", ids=[parent])
    daemon.call("task.run", ids=[child])
    assert daemon.wait(parent)["state"] == c.READY and daemon.state(child) == c.COMPLETED


def test_a_failed_subtask_fails_its_parent(daemon):
    parent, child = with_open_child(daemon)
    daemon.call("task.cancel", ids=[child])
    task = daemon.wait(parent)
    assert (task["state"], task["reason"]) == (c.FAILED, "dependency_failed") and "1 of 1 subtasks" in task["detail"]


def test_deleting_the_last_open_subtask_frees_the_parent(daemon):
    parent, child = with_open_child(daemon)
    daemon.call("task.delete", ids=[child])
    assert daemon.wait(parent)["state"] == c.READY


# -- waiting


def test_wait_for_any_all_and_not_at_all(daemon):
    fast, slow = daemon.add("true"), parked_in_queue(daemon)
    result = daemon.call("task.wait", ids=[fast, slow], any=True, timeout_s=20)
    assert not result["timed_out"] and [task["id"] for task in result["tasks"]] == [fast, slow]
    assert daemon.call("task.wait", ids=[fast, slow], timeout_s=0)["timed_out"]
    assert daemon.call("task.wait", ids=[fast, slow], timeout_s=0.05)["timed_out"]
    client = daemon.new_client()
    request = client._send("task.wait", {"ids": [fast, slow], "timeout_s": 1e12})
    daemon.call("task.cancel", ids=[slow])
    answer = client._receive()
    assert answer["id"] == request and not answer["result"]["timed_out"]


def test_wait_ends_with_an_error_when_the_task_is_deleted(daemon):
    slow = parked_in_queue(daemon)
    client = daemon.new_client()
    client._send("task.wait", {"ids": [slow]})
    daemon.call("task.delete", ids=[slow])
    assert client._receive()["error"]["data"]["code"] == "not_found"


def test_a_parked_kind_ends_the_wait_where_that_is_asked(daemon):
    daemon.call("agent.park", agent="claude")
    waits = daemon.call("task.create", tasks={"name": "x", "agent": {"type": "claude", "instructions": "y"}}, queue=True)
    ids = [waits["tasks"][0]["id"]]
    assert not daemon.call("task.wait", ids=ids, parked_ends=True, timeout_s=20)["timed_out"]
    assert daemon.call("task.wait", ids=ids, timeout_s=0.05)["timed_out"]
    daemon.call("task.cancel", ids=ids)
    daemon.call("agent.unpark", agent="claude")


# -- logs


def test_log_pieces_join_to_the_log_whatever_the_offset_and_the_tail(daemon):
    task_id = daemon.add("i=0; while [ $i -lt 3000 ]; do echo \"line $i äöü €\"; i=$((i+1)); done; printf 'no end\\377'")
    run = daemon.wait(task_id)["execution"]["id"]
    data = (daemon.data_dir / "executions" / run / "stdout.log").read_bytes()
    text, result = text_of_log(daemon, id=task_id)
    assert text.encode("utf-8", "surrogateescape") == data and result["execution"]["id"] == run
    for offset in (1, 9, 10, len(data) - 1, len(data), len(data) + 5):
        assert text_of_log(daemon, execution=run[:13], offset=offset)[0].encode("utf-8", "surrogateescape") == data[offset:]
    assert c.tail_offset(daemon.data_dir / "executions" / run / "stdout.log", 0) == len(data)
    lines = data.split(b"\n")
    for tail in (0, 1, 2, 1000, 3001, 9999):
        expected = b"\n".join(lines[-tail:]) if tail else b""
        assert text_of_log(daemon, id=task_id, tail=tail)[0].encode("utf-8", "surrogateescape") == expected
    ended = daemon.add("echo one; echo two")
    daemon.wait(ended)
    assert text_of_log(daemon, id=ended, tail=1)[0] == "two\n" and text_of_log(daemon, id=ended, tail=0)[0] == ""


def test_following_a_task_waits_for_its_first_run_and_takes_every_round_after_it(daemon):
    task_id = daemon.add('echo "round $CLAUDOMATOR_ROUND"', queue=False, verify="false", verify_rounds=3,
                         agent={"project_dir": str(daemon.home), "isolation": "none"})
    client = daemon.new_client()
    stream, items = client.stream("execution.log", id=task_id, follow=True), []
    daemon.call("task.run", ids=[task_id])
    try:
        while True:
            items.append(next(stream))
    except StopIteration as done:
        result = done.value
    assert "".join(item["text"] for item in items) == "round 1\nround 2\nround 3\n"
    assert [item["round"] for item in items if "agent" in item] == [1, 2, 3] and result["task"]["reason"] == "verify_failed"
    runs = [run["id"] for run in daemon.call("execution.list", id=task_id)["executions"]]
    again, _ = text_of_log(daemon, id=task_id, execution=runs[1], offset=3, follow=True)
    assert again == "nd 2\nround 3\n", "from where a client broke off"
    assert text_of_log(daemon, execution=runs[1], follow=True)[0] == "round 2\n"
    never = daemon.add("true", queue=False)
    daemon.call("task.cancel", ids=[never])
    assert text_of_log(daemon, id=never, follow=True)[1]["execution"] is None


def test_a_log_that_is_not_there_says_why(daemon):
    never = daemon.add("true", queue=False)
    assert "has not run yet" in refused(daemon, "execution.log", "not_found", id=never)
    refused(daemon, "execution.log", "invalid")
    refused(daemon, "execution.log", "invalid", id=never, stream="../stdout")
    broken = daemon.add("true", agent={"project_dir": "/nowhere/at/all", "isolation": "none"})
    daemon.wait(broken)
    assert "never started" in refused(daemon, "execution.log", "not_found", id=broken)
    gone = daemon.add("true")
    os.unlink(daemon.data_dir / "executions" / daemon.wait(gone)["execution"]["id"] / "stdout.log")
    assert "keep_logs = 30d" in refused(daemon, "execution.log", "not_found", id=gone)


def test_the_tail_of_a_log_that_is_not_there_yet_is_all_that_comes(tmp_path):
    with DaemonProcess(tmp_path, f"""
[[projects]]
name = "slow"
dir = "{tmp_path}/project"
setup = "while [ ! -e {tmp_path}/go ]; do sleep 0.02; done"
""") as process:
        (tmp_path / "project").mkdir()
        task_id = process.add("printf 'one\\ntwo\\n'", project="slow")
        wait_until(lambda: process.state(task_id) == c.RUNNING)
        assert text_of_log(process, id=task_id, tail=1)[0] == ""
        stream = process.new_client().stream("execution.log", id=task_id, tail=1, follow=True)
        assert next(stream)["text"] == ""
        (tmp_path / "go").touch()
        assert next(stream)["text"] == "one\ntwo\n"


# -- agents, pool, daemon


def test_parking_wants_a_time_to_come(daemon):
    for until in ("yesterday", "2020-01-01T00:00:00Z", "-3h"):
        assert "like 2h" in refused(daemon, "agent.park", "invalid", agent="claude", until=until)
    assert "did you mean 'claude'" in refused(daemon, "agent.park", "not_found", agent="cloude")
    parked = daemon.call("agent.park", agent="claude", until="2999-01-01T00:00:00Z")["agents"]
    assert next(agent for agent in parked if agent["kind"] == "claude")["parked_until"] == "2999-01-01T00:00:00.000Z"
    assert not any(agent["parked"] for agent in daemon.call("agent.unpark", agent="claude")["agents"])


def test_pause_holds_the_queue_and_resume_lets_it_go(daemon):
    assert daemon.call("pool.pause")["paused"]
    task_id = daemon.add("true")
    assert "paused" in daemon.call("task.get", id=task_id)["task"]["why"]
    assert daemon.state(task_id) == c.QUEUED
    assert not daemon.call("pool.resume")["paused"]
    assert daemon.wait(task_id)["state"] == c.READY
    assert daemon.call("pool.pause", project="known")["paused_projects"] == ["known"]
    assert daemon.call("pool.resume", project="known")["paused_projects"] == []
    refused(daemon, "pool.pause", "not_found", agent="nobody")


def test_drain_answers_when_nothing_runs(daemon):
    task_id = daemon.add("sleep 0.3")
    wait_until(lambda: daemon.state(task_id) == c.RUNNING)
    answer = daemon.call("pool.drain", wait=True)
    assert answer["draining"] and answer["running"] == 0 and daemon.state(task_id) == c.READY
    daemon.call("pool.resume")


def test_a_backup_opens_and_never_overwrites_the_database(daemon):
    path = daemon.home / "copy.db"
    assert daemon.call("daemon.backup", path=str(path))["bytes"] == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM tasks").fetchone()[0] > 0
    live = str(daemon.data_dir / "claudomator.db")
    os.symlink(live, daemon.home / "alias.db")
    for bad in (live, live + "-wal", str(daemon.home / "alias.db"), "relative.db"):
        refused(daemon, "daemon.backup", "invalid", path=bad)
    refused(daemon, "daemon.backup", "storage", path="/nowhere/at/all.db")


def test_reload_takes_a_good_configuration_and_refuses_a_bad_one(daemon):
    daemon.config_path.write_text(CONFIG.replace("8", "9"))
    assert daemon.call("daemon.reload")["changed"] == ["max_concurrent"]
    daemon.config_path.write_text("max_concurrent = 0")
    assert "max_concurrent" in refused(daemon, "daemon.reload", "invalid")
    assert daemon.call("daemon.status")["max_concurrent"] == 9
    daemon.config_path.write_text(CONFIG)
    daemon.call("daemon.reload")


def test_lists_page_without_gap_or_double(daemon):
    ids = [daemon.add("true", queue=False, tags=["paged"]) for _ in range(7)]
    found, before = [], None
    while True:
        page = daemon.call("task.list", tag="paged", limit=3, before=before)
        found += [task["id"] for task in page["tasks"]]
        before = page["next"]
        if before is None:
            break
    assert found == ids[::-1]
    assert "did you mean 'READY'" in refused(daemon, "task.list", "invalid", states=["redy"])
