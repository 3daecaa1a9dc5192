"""A gemini task from its file to its end, and one of a configured runner: daemon, repository, command line.

Every test runs with the replaying fake; marked ``campaign`` with the real CLI that CLAUDOMATOR_TEST_GEMINI names,
against a stand-in for its API on loopback.
"""
import json
import os
import pathlib
import subprocess
import sys

import claudomator as c
import pytest
from tests import support
from tests.fakes import gemini_api

FAKE = pathlib.Path(__file__).parent / "fakes" / "gemini"
REAL = os.environ.get("CLAUDOMATOR_TEST_GEMINI")
CALL = (800 * 1.25 + 200 * 0.5 + 60 * 10) / 1e6  # one answer: 1000 tokens in, 200 of them cached; 60 out with thoughts
PRICES = "".join(f'[prices."{model}"]\ninput = 1.25\ncached = 0.5\noutput = 10\n' for model in (
    "gemini-2.5-flash", "gemini-3.5-flash-lite", "gemini-3.8-flash"))


class Job(support.AgentJob):
    """A job for gemini from a JSON file."""

    def __init__(self, tmp_path, binary, api):
        home = tmp_path / "home"
        (home / ".gemini").mkdir(parents=True)
        # with another base URL than Google's the CLI wants to be told how it logs in
        (home / ".gemini" / "settings.json").write_text('{"security": {"auth": {"selectedType": "gemini-api-key"}}}')
        config = f'gemini_binary_path = "{binary}"\n[agents.gemini]\nmodel = "gemini-2.5-flash"\n{PRICES}'
        super().__init__(tmp_path, "task.json", config, {
            "GEMINI_API_KEY": "fake", "GOOGLE_GEMINI_BASE_URL": api.url})

    def write_task(self, scenario, more=None, **agent) -> str:
        agent = {"type": "gemini", "project_dir": str(self.copy), "instructions": f"Do the task.\nSCENARIO: {scenario}",
                 **agent}
        self.task_file.write_text(json.dumps({"name": "job", "agent": agent, **(more or {})}))
        return str(self.task_file)


def is_priced(run) -> bool:
    """Whether the run's tokens and cost are those of some ordinary API answers, and of nothing else."""
    calls, rest = divmod(run["tokens_in"], 1000)
    return calls > 0 and not rest and run["tokens_out"] == 60 * calls and run["cost_usd"] == pytest.approx(calls * CALL)


@pytest.fixture(params=[pytest.param(FAKE, id="fake"), pytest.param(REAL, id="real", marks=[
    pytest.mark.campaign, pytest.mark.skipif(not REAL, reason="CLAUDOMATOR_TEST_GEMINI names no gemini")])])
def job(request, tmp_path):
    with gemini_api.StandIn() as api:
        job = Job(tmp_path, request.param, api)
        try:
            yield job
        finally:
            job.daemon.__exit__()


def test_a_text_answer_completes_the_task(job):
    code, task, run = job.run("text")
    assert (code, task["state"], run["status"], run["reason"]) == (0, "COMPLETED", "COMPLETED", None)
    assert is_priced(run) and run["session_id"] == run["id"]
    assert job.subjects() == [] and not any(path.is_dir() for path in (job.daemon.data_dir / "sandboxes").iterdir())


def test_a_written_file_is_committed_and_pushed(job):
    code, task, run = job.run("write")
    assert (code, task["state"], task["summary"]) == (0, "COMPLETED", "The file is there.")
    assert job.subjects() == [c.AUTOCOMMIT_SUBJECT] and is_priced(run)
    assert job.git("show", "main:made.txt") == "made by the agent"


def test_a_question_blocks_and_its_answer_resumes_the_same_session_in_the_same_sandbox(job):
    code, task, first = job.run("question")
    assert (code, task["state"], first["status"]) == (5, "BLOCKED", "BLOCKED")
    assert task["question"] == {"text": "Which database?", "options": ["pg", "sqlite"]}
    job.daemon.start()
    for question, answer in (("Which database?", "pg"), ("Which version?", "sixteen")):
        assert job.daemon.call("task.get", id=task["id"])["task"]["question"]["text"] == question
        job.daemon.call("task.answer", id=task["id"], text=answer)
        ended = job.wait(task["id"])
    assert ended["state"] == "COMPLETED", ended["detail"]
    runs = job.runs(task["id"])
    assert [run["status"] for run in runs] == ["BLOCKED", "BLOCKED", "COMPLETED"]
    assert {run["session_id"] for run in runs} == {first["id"]} and runs[1]["sandbox_dir"] == first["sandbox_dir"]
    assert all(map(is_priced, runs)) and job.subjects() == ["feat: a", "feat: b", "feat: c"]


def test_a_session_without_a_repository_goes_on_in_its_own_directory(job):
    job.daemon.start()
    task_id = job.submit("daily", project_dir="")
    support.wait_until(lambda: job.daemon.call("agent.status")["agents"][1]["parked"], 30, "parking")
    first = job.runs(task_id)[0]
    work = job.daemon.data_dir / "executions" / first["id"] / "work"
    assert work.is_dir()
    task = job.daemon.call("task.get", id=task_id)["task"]
    assert (task["state"], task["reason"]) == ("QUEUED", "quota_exhausted")
    job.daemon.call("task.cancel", ids=[task_id])
    job.daemon.call("task.resume", ids=[task_id], message="Go on.\nSCENARIO: text")
    job.daemon.call("agent.unpark", agent="gemini")
    assert job.wait(task_id)["state"] == "READY"
    second = job.runs(task_id)[1]
    assert second["session_id"] == first["id"] and second["status"] == "COMPLETED"


def test_a_daily_quota_parks_the_kind_until_it_is_full_again(job):
    code, task, run = job.run("daily")
    assert (code, task["state"], run["status"], run["reason"]) == (75, "QUEUED", "FAILED", "quota_exhausted")
    assert run["exit_code"] == 173 and "daily quota" in run["detail"]
    store = c.Store(str(job.daemon.data_dir / "claudomator.db"), readonly=True)
    parked = store.parked_agents()
    store.close()
    assert set(parked) == {"gemini"} and c.format_time(parked["gemini"]["until"])[11:16] == "08:00"


@pytest.mark.slow
def test_another_session_in_the_same_directory_takes_nothing_from_a_blocked_one(job):
    for name in ("name", "email"):
        subprocess.run(["git", "-C", job.copy, "config", f"user.{name}", "t@example.org"], check=True)
    job.daemon.start()
    blocked = job.submit("question", isolation="none")
    assert job.wait(blocked)["state"] == "BLOCKED"
    assert job.wait(job.submit("text", isolation="none"))["state"] == "READY"
    job.daemon.call("task.answer", id=blocked, text="pg")
    assert job.wait(blocked)["question"]["text"] == "Which version?"
    assert len({run["session_id"] for run in job.runs(blocked)}) == 1
    login = job.daemon.data_dir / "executions" / job.runs(blocked)[0]["id"] / "gemini-home/.gemini/settings.json"
    assert login.is_symlink() and login.resolve() == job.daemon.home / "home/.gemini/settings.json"


@pytest.mark.slow
def test_cancel_ends_everything_that_the_agent_started(job):
    job.daemon.start()
    task_id = job.submit("slow_tool")
    job.wait_for_tool()
    run = job.runs(task_id)[0]
    assert len(c.marked_processes([run["id"]])) >= 3  # the CLI and two of the tool's, which have a session of their own
    task = job.daemon.call("task.cancel", ids=[task_id])["tasks"][0]
    assert (task["state"], task["execution"]["reason"]) == ("CANCELLED", "cancelled")
    assert not c.marked_processes([run["id"]])
    job.daemon.call("task.resume", ids=[task_id], message="Try less.\nSCENARIO: text")
    assert job.wait(task_id)["state"] == "READY"
    assert {run["session_id"] for run in job.runs(task_id)} == {run["id"]}


def test_the_log_is_readable(job):
    job.daemon.start()
    task_id = job.submit("write")
    assert job.wait(task_id)["state"] == "READY"
    shown = job.daemon.cli("ctl", "logs", task_id).stdout
    assert "→ run_shell_command: echo" in shown and "✔ success" in shown and '{"type"' not in shown


@pytest.mark.campaign
@pytest.mark.skipif(not REAL, reason="CLAUDOMATOR_TEST_GEMINI names no gemini")
@pytest.mark.parametrize("job", [pytest.param(REAL, id="real")], indirect=True)
@pytest.mark.parametrize("tool, is_there", [("Bash(touch:*)", False), ("WebFetch", True)])
def test_a_disallowed_tool_is_really_denied(job, tool, is_there):
    code, task, run = job.run("forbidden", disallowed_tools=[tool])
    assert (code, task["state"]) == (0, "COMPLETED")
    assert bool(job.subjects()) is is_there


# -- what needs no gemini

@pytest.fixture
def no_api(tmp_path):
    api = type("NoApi", (), {"url": "http://127.0.0.1:9"})
    job = Job(tmp_path, "/nowhere/gemini", api)
    try:
        yield job
    finally:
        job.daemon.__exit__()


def test_a_gemini_that_is_not_installed_is_named_with_what_to_do(no_api):
    code, task, run = no_api.run("text")
    assert (code, task["state"], run["reason"]) == (1, "FAILED", "spawn_failed")
    assert "set gemini_binary_path" in run["detail"]


def test_init_says_what_it_found(no_api):
    found = c.parse_json(no_api.daemon.cli("init", "--json").stdout)
    assert "gemini" in found["found"] and any("npm install -g @google/gemini-cli" in hint for hint in found["hints"])
    assert not found["warnings"]


def test_a_task_without_a_type_may_get_gemini(tmp_path):
    job = Job(tmp_path, FAKE, type("NoApi", (), {"url": ""}))
    job.daemon.config_path.write_text(f'claude_binary_path = "/nowhere/claude"\n{job.daemon.config_path.read_text()}')
    code, task, run = job.run("text", type="")
    assert (code, task["state"]) == (0, "COMPLETED"), run


PROGRAM = """
import json, os, sys
say = lambda **record: print(json.dumps(record), flush=True)
session = sys.argv[sys.argv.index("--go-on") + 1] if "--go-on" in sys.argv else "named-by-the-agent"
say(type="start", id=session)
if "--go-on" in sys.argv:
    say(type="text", text="It is done.\\n## Summary\\nAsked and done: " + sys.argv[-1].split("The answer is:")[1].split()[0])
    open("made.txt", "w").write(os.environ["MINE"])
else:
    open(os.environ["CLAUDOMATOR_QUESTION_FILE"], "w").write('{"text": "Which?"}')
say(type="end", usage={"in": 10, "out": 2})
"""


@pytest.mark.slow
def test_a_configured_runner_asks_is_answered_and_is_added_by_a_reload(no_api, tmp_path):
    job, program = no_api, tmp_path / "agent.py"
    program.write_text(PROGRAM)
    job.daemon.start()
    assert "mine" not in [agent["kind"] for agent in job.daemon.call("agent.status")["agents"]]
    job.daemon.config_path.write_text(f"""
[runners.mine]
command = ["{sys.executable}", "{program}", "--model={{model}}", "--", "{{prompt}}"]
resume = ["{sys.executable}", "{program}", "--go-on", "{{session}}", "--", "{{prompt}}"]
format = "jsonl"
fields = {{text = "text", session = "id", done = "type if type=end", tokens_in = "usage.in", tokens_out = "usage.out"}}
[agents.mine]
env = {{MINE = "made by mine"}}
model = "m"
[prices.m]
input = 100000
output = 500000
""")
    assert job.daemon.cli("ctl", "reload").returncode == 0
    task_id = job.submit("any", type="mine")
    assert job.wait(task_id)["state"] == "BLOCKED"
    job.daemon.call("task.answer", id=task_id, text="yes")
    task = job.wait(task_id)
    assert (task["state"], task["summary"]) == ("READY", "Asked and done: yes"), task["detail"]
    runs = job.runs(task_id)
    assert {run["session_id"] for run in runs} == {"named-by-the-agent"}
    assert [run["cost_usd"] for run in runs] == [2.0, 2.0] and job.git("show", "main:made.txt") == "made by mine"
    assert "It is done." in job.daemon.cli("ctl", "logs", task_id).stdout
