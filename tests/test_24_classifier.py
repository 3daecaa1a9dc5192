"""Section 24: a task that names no agent is asked about once; whatever goes wrong, it starts all the same."""
import contextlib
import os
import pathlib

import pytest

import claudomator as c
from tests.fakes import chat_server
from tests.support import DaemonProcess, wait_until
from tests.test_24_pool import start_patched

CLAUDE = """#!/bin/sh
echo '{"type":"result","subtype":"success","is_error":false,"result":"ok","session_id":"s","num_turns":1}'
"""
GEMINI = """#!/bin/sh
case "$*" in *"--model flash"*) model=flash ;; esac
echo '{"type":"init","session_id":"s","model":"'$model'"}'
echo '{"type":"result","status":"success","stats":{}}'
"""
FAKE = pathlib.Path(__file__).parent / "fakes" / "gemini"
CHOICE = '{"agent": "gemini", "model": "flash"}'


def config(tmp_path, more="", gemini=GEMINI):
    for name, text in (("claude", CLAUDE), ("gemini", gemini)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return (f'claude_binary_path = "{tmp_path}/claude"\ngemini_binary_path = "{tmp_path}/gemini"\n{more}\n'
            '[agents.gemini]\nmodels = ["flash", "pro"]\n')


@pytest.fixture
def server():
    with chat_server.StandIn("choice") as stand_in:
        stand_in.answer = f"Let me see.\n```json\n{CHOICE}\n```"
        yield stand_in


@contextlib.contextmanager
def daemon_with(tmp_path, server, more="", **parts):
    local = f'[local_model]\nendpoint = "{server.endpoint}"\n' if server else ""
    with DaemonProcess(tmp_path, config(tmp_path, more, **parts) + local, {"GEMINI_API_KEY": "fake"}) as daemon:
        yield daemon


def add(daemon, **agent):
    document = {"name": "tidy", "agent": {"instructions": "Sort the imports.", **agent}}
    return daemon.call("task.create", tasks=document, queue=True)["tasks"][0]["id"]


def events(daemon, task_id, kind):
    store = c.Store(str(daemon.data_dir / "claudomator.db"), readonly=True)
    try:
        return [event for event in store.events_since(0, 5000, task_id) if event["kind"] == kind]
    finally:
        store.close()


def test_the_local_model_chooses_once_and_it_is_told_in_event_and_show(tmp_path, server):
    with daemon_with(tmp_path, server) as daemon:
        task_id = add(daemon)
        assert daemon.wait(task_id)["state"] == "READY"
        assert daemon.row(task_id).agent == "gemini" and daemon.row(task_id).model == "flash"
        found, = events(daemon, task_id, "task.agent_chosen")
        assert (found["agent"], found["model"], found["by"]) == ("gemini", "flash", "the local model")
        assert "gemini flash (chosen by the local model)" in daemon.cli("ctl", "show", task_id).stdout
        asked = [request for request in server.requests if "Sort the imports." in str(request["body"])]
        assert len(asked) == 1 and "- gemini (models: flash, pro)" in asked[0]["body"]["messages"][0]["content"]
        daemon.call("task.reject", ids=[task_id], comment="again")
        assert daemon.call("task.run", ids=[task_id])["tasks"][0]["agent"]["type"] == "gemini"  # the choice stands
        daemon.wait(task_id)
        daemon.call("task.edit", ids=[task_id], changes={"agent": {"type": "claude"}})
        assert "chosen by" not in daemon.cli("ctl", "show", task_id).stdout
        assert len([request for request in server.requests if "Sort the imports." in str(request["body"])]) == 1


def test_a_named_agent_and_an_idle_daemon_ask_nobody(tmp_path, server):
    with daemon_with(tmp_path, server) as daemon:
        assert daemon.wait(add(daemon, type="claude"))["state"] == "READY"
        daemon.call("pool.pause")
        held = add(daemon)
        assert daemon.state(held) == "QUEUED"
        assert not [request for request in server.requests if "Choose which" in str(request["body"])]


@pytest.mark.parametrize("answer", ["I would take claude.", '{"agent": "shell"}', '{"agent": "codex"}'])
def test_an_answer_that_names_no_agent_leaves_the_choice_to_the_queue_and_nobody_is_asked_for_a_while(
        tmp_path, server, answer):
    server.answer = answer
    with daemon_with(tmp_path, server) as daemon:
        first, second = add(daemon), add(daemon)
        assert [daemon.wait(task_id)["state"] for task_id in (first, second)] == ["READY", "READY"]
        assert {daemon.row(task_id).agent for task_id in (first, second)} <= {"claude", "gemini"}
        assert len(events(daemon, first, "task.agent_not_chosen")) == 1
        assert len([request for request in server.requests if "Choose which" in str(request["body"])]) == 1
        assert daemon.call("task.get", id=first)["task"]["agent"]["type"] in ("", None)


def test_a_parked_agent_is_not_offered_and_with_one_left_and_no_models_nobody_is_asked(tmp_path, server):
    server.answer = '{"agent": "gemini"}'
    with daemon_with(tmp_path, server) as daemon:
        daemon.call("agent.park", agent="gemini")
        task_id = add(daemon)
        assert daemon.wait(task_id)["state"] == "READY" and daemon.row(task_id).agent == "claude"
        assert not [request for request in server.requests if "Choose which" in str(request["body"])]


def test_while_it_is_asked_others_start_and_a_restart_asks_again(tmp_path, server):
    server.say("silent")
    with daemon_with(tmp_path, server, "max_concurrent = 1") as daemon:
        task_id = add(daemon)
        wait_until(lambda: server.requests)
        assert "the classifier is asked" in daemon.call("task.get", id=task_id)["task"]["why"]
        assert daemon.wait(add(daemon, type="claude"))["state"] == "READY"  # the only slot is free
        assert daemon.state(task_id) == "QUEUED"
        assert daemon.terminate() == 0
        server.say("choice")
        daemon._client = None
        daemon.start()
        assert daemon.wait(task_id)["state"] == "READY" and daemon.row(task_id).agent == "gemini"


def test_a_task_that_is_cancelled_while_it_is_asked_about_stays_cancelled(tmp_path, server):
    server.say("late_choice")
    with daemon_with(tmp_path, server) as daemon:
        task_id = add(daemon)
        wait_until(lambda: server.requests)
        daemon.call("task.cancel", ids=[task_id])
        server.release.set()
        assert daemon.wait(add(daemon))["state"] == "READY"  # it was asked about after the cancelled one
        assert daemon.state(task_id) == "CANCELLED" and not events(daemon, task_id, "task.agent_chosen")


def test_a_task_is_asked_about_once_however_short_the_rest_is(tmp_path, server):
    server.answer = "No."
    daemon = DaemonProcess(tmp_path, config(tmp_path) + f'[local_model]\nendpoint = "{server.endpoint}"\n')
    try:
        start_patched(daemon, "c.CHOICE_REST_S = 0.0")
        task_id = add(daemon)
        assert daemon.wait(task_id)["state"] == "READY" and len(events(daemon, task_id, "task.agent_not_chosen")) == 1
    finally:
        daemon.__exit__()


def test_it_can_be_switched_off(tmp_path, server):
    with daemon_with(tmp_path, server, 'classifier = "off"') as daemon:
        assert daemon.wait(add(daemon))["state"] == "READY"
        assert not [request for request in server.requests if "Choose which" in str(request["body"])]


def gemini_config(tmp_path, choice, classifier='classifier = "gemini"\n'):
    text = config(tmp_path, classifier).replace(f'"{tmp_path}/gemini"', f'"{FAKE}"')
    return text + f"env = {{ FAKE_GEMINI_CHOICE = '{choice}' }}\n"


def test_without_a_local_model_the_gemini_cli_is_asked_only_where_the_configuration_says_so(tmp_path):
    text = gemini_config(tmp_path, '{"agent": "claude"}', "")
    with DaemonProcess(tmp_path, text, {"GEMINI_API_KEY": "fake"}) as daemon:
        task_id = add(daemon)
        assert daemon.wait(task_id)["state"] == "READY" and daemon.row(task_id).agent == "claude"  # the first of equals
        assert not events(daemon, task_id, "task.agent_chosen") + events(daemon, task_id, "task.agent_not_chosen")
    (tmp_path / "again").mkdir()
    text = gemini_config(tmp_path, '{"agent": "claude"}')
    with DaemonProcess(tmp_path / "again", text, {"GEMINI_API_KEY": "fake"}) as daemon:
        task_id = add(daemon)
        assert daemon.wait(task_id)["state"] == "READY" and daemon.row(task_id).agent == "claude"
        assert events(daemon, task_id, "task.agent_chosen")[0]["by"] == "the gemini CLI"
        assert not (daemon.data_dir / "classifier").exists()
        assert not (daemon.home / ".gemini").exists()  # its session was kept apart from the operator's


@pytest.mark.slow
def test_a_gemini_that_hangs_is_ended_with_its_group_and_the_task_starts(tmp_path):
    text = gemini_config(tmp_path, "hang")
    daemon = DaemonProcess(tmp_path, text, {"GEMINI_API_KEY": "fake"})
    try:
        start_patched(daemon, "c.CHOICE_S['gemini'] = 0.8")
        task_id = add(daemon)
        wait_until(lambda: events(daemon, task_id, "task.agent_not_chosen"), 15)
        assert "no answer within" in events(daemon, task_id, "task.agent_not_chosen")[0]["detail"]
        wait_until(lambda: daemon.row(task_id))
        assert not asked_processes(tmp_path)
    finally:
        daemon.__exit__()


@pytest.mark.slow
def test_a_gemini_that_hangs_ends_also_where_the_daemon_that_asked_it_was_killed(tmp_path):
    daemon = DaemonProcess(tmp_path, gemini_config(tmp_path, "hang"), {"GEMINI_API_KEY": "fake"})
    try:
        start_patched(daemon, "c.CHOICE_S['gemini'], c.STOP_MARGIN_S = 1.0, 0.2")
        add(daemon)
        wait_until(lambda: asked_processes(tmp_path))
        daemon.kill9()
        assert asked_processes(tmp_path)
        wait_until(lambda: not asked_processes(tmp_path))
    finally:
        daemon.end_agents()


def test_a_daemon_that_stops_leaves_no_gemini_that_it_asks(tmp_path):
    with DaemonProcess(tmp_path, gemini_config(tmp_path, "hang"), {"GEMINI_API_KEY": "fake"}) as daemon:
        task_id = add(daemon)
        wait_until(lambda: asked_processes(tmp_path))
        assert daemon.terminate() == 0
        assert not asked_processes(tmp_path)
        store = c.Store(str(daemon.data_dir / "claudomator.db"), readonly=True)
        assert store.get_task(task_id).state == "QUEUED"
        store.close()


def asked_processes(tmp_path):
    """The processes of the fake gemini that answer the classifier's question."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "cwd").startswith(f"{tmp_path}/data/classifier/") \
                    and str(FAKE).encode() in (path / "cmdline").read_bytes():
                found.append(path.name)
    return found
