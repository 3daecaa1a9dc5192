"""Agents of kind local, end to end: the command line, a real daemon, and a model server on loopback.

The server is the stand-in of tests/fakes; marked ``campaign`` it is the one whose endpoint CLAUDOMATOR_TEST_LLM_SERVER
names (llama.cpp with a tiny model of random words: for the wire, not for the sense).
"""
import os
import pathlib
import subprocess
import time

import claudomator as c
import pytest
from tests import support
from tests.fakes import chat_server

REAL = os.environ.get("CLAUDOMATOR_TEST_LLM_SERVER", "")


class Job:
    """A daemon whose local model is the stand-in."""

    def __init__(self, tmp_path, endpoint, more=""):
        config = f'[local_model]\nendpoint = "{endpoint}"\nmodel = "tiny"\ntimeout_seconds = 2\n' if endpoint else ""
        self.daemon = support.DaemonProcess(tmp_path, config + more, {
            "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"})

    def submit(self, scenario, queue=True, **more) -> str:
        agent = {"type": "local", "instructions": f"Think.\nSCENARIO: {scenario}", **more.pop("agent", {})}
        tasks = {"name": "words", "agent": agent, **more}
        return self.daemon.call("task.create", tasks=tasks, queue=queue)["tasks"][0]["id"]

    def runs(self, task_id) -> list[dict]:
        """The task's executions, oldest first."""
        return self.daemon.call("execution.list", id=task_id)["executions"][::-1]

    def end(self, scenario, **more) -> tuple[dict, dict]:
        """(the settled task, its last execution)."""
        task = self.daemon.wait(self.submit(scenario, **more), 40)
        return task, task["execution"]

    def folder(self, run) -> pathlib.Path:
        return self.daemon.data_dir / "executions" / run["id"]


@pytest.fixture
def server():
    with chat_server.StandIn() as stand_in:
        yield stand_in


@pytest.fixture
def job(tmp_path, server):
    job = Job(tmp_path, server.endpoint)
    with job.daemon:
        yield job


def test_an_answer_with_summary_tokens_and_no_cost(job, server):
    task, run = job.end("text")
    assert (task["state"], run["status"], run["reason"], run["exit_code"]) == ("READY", "COMPLETED", None, 0)
    assert task["summary"] == run["summary"] == "The answer is four."
    assert (run["cost_usd"], run["tokens_in"], run["tokens_out"]) == (0, 11, 7)
    assert len(server.requests) == 1  # it has a summary of its own
    shown = job.daemon.cli("ctl", "logs", task["id"]).stdout
    assert "I thought about it: é € 😀." in shown and "$0.00 · 18 tokens" in shown
    assert "stream_event" not in shown


def test_a_task_without_a_daemon_runs_to_its_end(tmp_path, server):
    job, file = Job(tmp_path, server.endpoint), tmp_path / "task.json"
    agent = {"type": "local", "instructions": "SCENARIO: crlf", "temperature": 0, "max_tokens": 9, "model": "other"}
    file.write_text(c.format_json({"name": "words", "agent": agent}))
    done = job.daemon.cli("run", str(file), "--json", timeout=60)
    task = c.parse_json(done.stdout)["tasks"][0]
    assert (done.returncode, task["state"]) == (0, "COMPLETED"), done.stderr
    body = server.requests[0]["body"]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 9, "other") and "warning" not in done.stderr


def test_no_sandbox_is_made_of_the_project(job, tmp_path):
    _, copy = support.make_repository(tmp_path)
    task, run = job.end("text", agent={"project_dir": str(copy)})
    assert task["state"] == "READY" and not run["sandbox_dir"] and not run["commits"]
    sandboxes = job.daemon.data_dir / "sandboxes"
    assert not sandboxes.exists() or not list(sandboxes.iterdir())
    with pytest.raises(c.ClaudomatorError, match="leave it out"):
        job.submit("text", agent={"project_dir": str(copy), "isolation": "sandbox"})


@pytest.mark.slow
def test_a_cancel_closes_the_request(job, server):
    task_id = job.submit("slow")
    support.wait_until(lambda: server.requests and job.runs(task_id), 20, "the request")
    log = job.folder(job.runs(task_id)[0]) / "stdout.log"
    support.wait_until(lambda: log.exists() and log.read_bytes().count(b"tick") > 3, 20, "some text")
    job.daemon.call("task.cancel", ids=[task_id])
    assert server.dropped.wait(10)
    run = job.runs(task_id)[0]
    assert (job.daemon.wait(task_id)["state"], run["reason"]) == ("CANCELLED", "cancelled")
    assert not c.marked_processes([run["id"]])


@pytest.mark.slow
def test_a_timeout_ends_a_stream_that_never_ends(job, server):
    task, run = job.end("slow", timeout="2s")
    assert (task["state"], run["reason"]) == ("TIMED_OUT", "timed_out") and server.dropped.wait(10)


@pytest.mark.slow
def test_a_server_that_falls_silent_fails_the_run(job):
    task, run = job.end("silent")
    assert (task["state"], run["reason"]) == ("FAILED", "api_error") and "sent nothing for 2s" in run["detail"]


def test_the_daemon_is_killed_and_the_next_one_adopts_the_run(job, server):
    task_id = job.submit("slow")
    support.wait_until(lambda: server.requests, 20, "the request")
    job.daemon.kill9()
    job.daemon.start()
    support.wait_until(lambda: "adopted execution" in job.daemon.log(), 20, "the adoption")
    server.release.set()
    task = job.daemon.wait(task_id)
    assert (task["state"], task["execution"]["tokens_out"]) == ("READY", 7)
    scenarios = [request["scenario"] for request in server.requests]
    assert scenarios[0] == "slow" and len(scenarios) == 2  # the run, and the summary that it did not write
    assert len(job.runs(task_id)) == 1


@pytest.mark.slow
def test_a_busy_server_is_asked_again_from_the_queue_when_it_says(job, server):
    server.retry_after_s = 4
    task_id, before = job.submit("limit_429"), time.time()
    waiting = support.wait_until(lambda: (task := job.daemon.call("task.get", id=task_id)["task"])["state"] == "QUEUED"
                                 and task["execution"] and task, 20, "the queue")
    assert waiting["reason"] == "rate_limited" and "HTTP 429" in waiting["detail"]
    assert all(agent["running"] == 0 for agent in job.daemon.call("agent.status")["agents"])  # it holds no slot
    task = job.daemon.wait(task_id, 40)
    assert task["state"] == "READY" and len(server.requests) == 2 and time.time() - before >= 4
    assert [run["reason"] for run in job.runs(task_id)] == ["rate_limited", None]


@pytest.mark.slow
@pytest.mark.parametrize("scenario, reason, words", [
    ("drop", "api_error", "before its answer was whole"), ("mid_error", "api_error", "slot is gone"),
    ("error_500", "api_error", "HTTP 500"), ("no_model", "bad_task", "pulling it first"),
    ("too_long", "bad_task", "shorten it"),
    ("redirect", "bad_task", "redirects")])
def test_a_failure_has_its_reason_and_says_what_to_do(job, scenario, reason, words):
    task, run = job.end(scenario)
    assert (task["state"], run["reason"]) == ("FAILED", reason) and words in run["detail"]
    assert run["cost_usd"] == 0 and not task["summary"]


@pytest.mark.slow
def test_a_retry_policy_applies_to_errors_of_the_server(job, server):
    task, run = job.end("error_500", retry={"max_attempts": 2, "backoff": ["0s"]})
    assert task["state"] == "FAILED" and len(job.runs(task["id"])) == len(server.requests) == 2


def test_an_unreachable_server_is_an_error_that_says_what_to_do(tmp_path):
    job = Job(tmp_path, "http://127.0.0.1:1/v1")
    with job.daemon:
        task, run = job.end("text")
        assert (task["state"], run["reason"]) == ("FAILED", "api_error")
        assert "no model server listens at http://127.0.0.1:1: start it" in run["detail"]


def test_without_an_endpoint_the_kind_is_not_installed_and_nothing_asks_a_model(tmp_path):
    job = Job(tmp_path, "")
    with job.daemon:
        agents = {agent["kind"]: agent["installed"] for agent in job.daemon.call("agent.status")["agents"]}
        assert agents["local"] is False and agents["shell"] is True
        task, run = job.end("text")
        assert (task["state"], run["reason"]) == ("FAILED", "spawn_failed")
        assert "[local_model] endpoint" in run["detail"]
        assert job.daemon.wait(job.daemon.add("echo words"))["summary"] in (None, "")


@pytest.mark.slow
def test_a_wrong_key_parks_the_kind_and_is_shown_nowhere(tmp_path, server):
    server.api_key = "the-right-key"
    job = Job(tmp_path, server.endpoint, 'api_key = "sk-wrong-key"\n')
    with job.daemon:
        task_id = job.submit("text")
        support.wait_until(lambda: any(agent["kind"] == "local" and agent["parked"]
                                       for agent in job.daemon.call("agent.status")["agents"]), 20, "parking")
        run = job.runs(task_id)[0]
        assert run["reason"] == "auth" and "[local_model] api_key" in run["detail"]
        assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-wrong-key"
        job.daemon.config_path.write_text(job.daemon.config_path.read_text().replace("sk-wrong-key", "the-right-key"))
        job.daemon.call("daemon.reload")
        job.daemon.call("agent.unpark", agent="local")
        assert job.daemon.wait(task_id)["state"] == "READY"
    written = b"".join(path.read_bytes() for path in job.daemon.data_dir.rglob("*") if path.is_file())
    for key in (b"sk-wrong-key", b"the-right-key"):
        assert key not in written + job.daemon.log().encode()


@pytest.mark.slow
def test_a_rejection_and_a_failed_check_reach_the_next_prompt(job, server, tmp_path):
    verify = f'test -e "{tmp_path}/checked" || {{ touch "{tmp_path}/checked"; echo the check is not amused; exit 1; }}'
    task, run = job.end("text", verify=verify)
    assert task["state"] == "READY" and [r["status"] for r in job.runs(task["id"])] == ["FAILED", "COMPLETED"]
    prompt = server.requests[1]["body"]["messages"][-1]["content"]
    assert "SCENARIO: text" in prompt and "the check is not amused" in prompt
    job.daemon.call("task.reject", ids=[task["id"]], comment="Shorter, please.")
    job.daemon.call("task.run", ids=[task["id"]])
    job.daemon.wait(task["id"])
    assert "Shorter, please." in server.requests[2]["body"]["messages"][-1]["content"]


@pytest.mark.slow
def test_a_follower_reads_along_and_reads_nothing_twice(job, server):
    task_id = job.submit("lines")
    command = [*support.COMMAND, "ctl", "logs", "-f", task_id]
    follower = subprocess.Popen(command, env=job.daemon.env, stdout=subprocess.PIPE)
    try:
        shown = b""
        while b"first line\n" not in shown:
            shown += follower.stdout.readline()
            assert follower.poll() is None
        server.release.set()
        shown += follower.stdout.read()
        assert shown.count(b"first line\n") == shown.count(b"last words\n") == 1 and b"tokens" in shown
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()


# -- the summary that nobody wrote


def test_what_has_no_summary_gets_one_from_the_local_model(job, server):
    server.say("plain")
    task = job.daemon.wait(job.daemon.add("echo I moved the wall"))
    assert task["summary"] == task["execution"]["summary"] == "It was summed up."
    assert "I moved the wall" in server.requests[0]["body"]["messages"][-1]["content"] and len(server.requests) == 1
    assert job.end("text")[0]["summary"] == "It was summed up."


def test_a_summary_of_its_own_or_no_words_or_a_failure_ask_no_model(job, server):
    assert job.daemon.wait(job.daemon.add('echo mine > "$CLAUDOMATOR_SUMMARY_FILE"; echo x'))["summary"] == "mine"
    assert job.daemon.wait(job.daemon.add("printf '## Summary\\nprinted\\n'"))["summary"] == "printed"
    assert not job.daemon.wait(job.daemon.add("true"))["summary"]
    assert job.daemon.wait(job.daemon.add("echo x; exit 3"))["state"] == "FAILED"
    assert not server.requests


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["silent", "error_500", "drop"])
def test_a_model_that_fails_or_hangs_costs_six_seconds_at_most_and_never_the_run(job, server, scenario):
    server.say(scenario)
    start = time.monotonic()
    task_id = job.daemon.add("echo words")
    if scenario == "silent":
        support.wait_until(lambda: server.requests, 20, "the request")
        asked = time.monotonic()
        job.daemon.call("pool.status")
        assert time.monotonic() - asked < 1  # the loop does not wait
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY" and not task["summary"] and time.monotonic() - start < 12


# -- a real server


@pytest.mark.campaign
@pytest.mark.skipif(not REAL, reason="CLAUDOMATOR_TEST_LLM_SERVER names no endpoint")
def test_a_real_model_server(tmp_path):
    job = Job(tmp_path, REAL)
    with job.daemon:
        task, run = job.end("none", agent={"max_tokens": 40, "temperature": 0})
        assert (task["state"], run["reason"], run["cost_usd"]) == ("READY", None, 0)
        assert run["tokens_in"] > 10 and run["tokens_out"] == 40 and task["summary"]
        task, run = job.end("none", agent={"max_tokens": 40, "instructions": "word " * 20_000})
        assert run["reason"] == "bad_task" and "context" in run["detail"]
        run = job.end("none", agent={"temperature": 2})[1]  # to the end of the model's context
        assert run["reason"] in ("agent_error", None)
