"""The real job, end to end: a task file, a repository, the command line, and ``claude``.

Every test runs with the replaying fake, where they differ for both versions of the CLI.  Marked ``campaign`` they run
with the real CLI against a stand-in for its API: the binaries that CLAUDOMATOR_TEST_CLAUDE names (separated by ``:``),
else the ``claude`` on PATH.
"""
import os
import pathlib
import shutil
import subprocess

import claudomator as c
import pytest
from tests import support
from tests.fakes import anthropic_api

FAKE = pathlib.Path(__file__).parent / "fakes" / "claude"
REAL = (os.environ.get("CLAUDOMATOR_TEST_CLAUDE") or shutil.which("claude") or "").split(":")
USD_PER_MILLION = {"claude-sonnet-5-5": (2, 10), "claude-sonnet-5": (3, 15)}  # as the two CLIs reckon
FAKES = [pytest.param((FAKE, "2.1.329"), id="fake-2.1.329"),
         pytest.param((FAKE, "2.1.197"), id="fake-2.1.197", marks=pytest.mark.slow)]  # its streams are replayed in test_10
REALS = [pytest.param((pathlib.Path(path), ""), id=f"real-{number}", marks=pytest.mark.campaign)
         for number, path in enumerate(filter(None, REAL), 1)] or \
    [pytest.param(None, id="real", marks=[pytest.mark.campaign, pytest.mark.skip(
        "no claude on PATH, and CLAUDOMATOR_TEST_CLAUDE names none")])]


class Job(support.AgentJob):
    """A job for claude from a YAML file."""

    def __init__(self, tmp_path, binary, version, api):
        config = f'claude_binary_path = "{binary}"\n[agents.claude]\nmodel = "sonnet"\n'
        config += f'env = {{ FAKE_CLAUDE_VERSION = "{version}" }}\n' if version else ""
        super().__init__(tmp_path, "task.yaml", config, {
            "ANTHROPIC_API_KEY": "sk-ant-fake", "ANTHROPIC_BASE_URL": api.url})

    def write_task(self, scenario, agent="", more=""):
        self.task_file.write_text(f"""\
name: job
agent:
  type: claude
  project_dir: {self.copy}
  instructions: |
    Do the task.
    SCENARIO: {scenario}
  {agent}
{more}
""")
        return str(self.task_file)

    def is_cost(self, run, calls) -> bool:
        """Whether the run's tokens and cost are those of so many ordinary API answers, and of nothing else."""
        log = (self.daemon.data_dir / "executions" / run["id"] / "stdout.log").read_bytes()
        per_million = USD_PER_MILLION[c.parse_json(log.partition(b"\n")[0])["model"]]
        usage = [calls * anthropic_api.ORDINARY[name] for name in ("input_tokens", "output_tokens")]
        cost = sum(count * price for count, price in zip(usage, per_million)) / 1e6
        return run["cost_usd"] == pytest.approx(cost) and [run["tokens_in"], run["tokens_out"]] == usage

    def prompt(self, run) -> str:
        return (self.daemon.data_dir / "executions" / run["id"] / "prompt.txt").read_text()


@pytest.fixture
def job(request, tmp_path):
    with anthropic_api.StandIn() as api:
        job = Job(tmp_path, *request.param, api)
        try:
            yield job
        finally:
            job.daemon.__exit__()


every_agent = pytest.mark.parametrize("job", FAKES + REALS, indirect=True)
one_fake = pytest.mark.parametrize("job", FAKES[:1] + REALS, indirect=True)


@every_agent
def test_a_text_answer_completes_the_task_and_leaves_no_sandbox(job):
    code, task, run = job.run("text")
    assert (code, task["state"], run["status"]) == (0, "COMPLETED", "COMPLETED")
    assert (run["reason"], run["exit_code"]) == (None, 0)
    assert task["summary"] == run["summary"] == "Nothing had to change."
    assert job.is_cost(run, calls=1)
    assert run["session_id"] and not run["commits"] and not run["sandbox_dir"]
    assert job.subjects() == [] and not any(path.is_dir() for path in (job.daemon.data_dir / "sandboxes").iterdir())


@one_fake
def test_a_written_file_is_committed_and_pushed(job):
    code, task, run = job.run("write")
    assert (code, task["state"]) == (0, "COMPLETED")
    assert job.subjects() == [c.AUTOCOMMIT_SUBJECT] == [commit["message"] for commit in run["commits"]]
    assert job.git("show", "main:made.txt") == "made by the agent"
    assert run["changestats"] == {"files_changed": 1, "insertions": 1, "deletions": 0}
    assert run["summary"] == "The file is there." and job.is_cost(run, calls=2)
    assert not (job.copy / "made.txt").exists()


@every_agent
def test_a_question_blocks_and_its_answer_resumes_the_same_session_in_the_same_sandbox(job):
    code, task, first = job.run("question")
    assert (code, task["state"], first["status"], first["reason"]) == (5, "BLOCKED", "BLOCKED", None)
    assert task["question"] == {"text": "Which database?", "options": ["pg", "sqlite"]}
    assert job.subjects() == [] and os.path.isdir(first["sandbox_dir"])
    job.daemon.start()
    for question, answer in (("Which database?", "pg"), ("Which version?", "sixteen\n-- {and} a half")):
        assert job.daemon.call("task.get", id=task["id"])["task"]["question"]["text"] == question
        job.daemon.call("task.answer", id=task["id"], text=answer)
        ended = job.wait(task["id"])
        prompt = job.prompt(job.runs(task["id"])[-1])
        assert question in prompt and answer in prompt and "SCENARIO" not in prompt
    assert (ended["state"], ended["summary"], ended["question"]) == ("COMPLETED", "The database is set up.", None)
    runs = job.runs(task["id"])
    assert [run["status"] for run in runs] == ["BLOCKED", "BLOCKED", "COMPLETED"]
    assert {run["session_id"] for run in runs} == {first["id"]} and runs[1]["sandbox_dir"] == first["sandbox_dir"]
    assert all(job.is_cost(run, calls=2) for run in runs)  # each run alone, though 2.1.329 reports the session's sum
    assert job.subjects() == ["feat: first", "feat: second", "feat: third"]
    assert [commit["message"] for commit in runs[2]["commits"]] == job.subjects()
    support.wait_until(lambda: not os.path.exists(first["sandbox_dir"]), 10, "the sandbox's end")


@pytest.mark.parametrize("job", REALS, indirect=True)
def test_a_question_and_a_summary_come_by_the_mcp_server_in_a_resumed_session_too(job):
    with job.daemon.config_path.open("a") as file:
        file.write("mcp = true\n")
    code, task, first = job.run("mcp_ask")
    assert (code, task["state"]) == (5, "BLOCKED")
    assert task["question"] == {"text": "Which database", "options": ["pg", "sqlite"]}
    job.daemon.start()
    job.daemon.call("task.answer", id=task["id"], text="pg")
    ended = job.wait(task["id"])
    assert (ended["state"], ended["summary"]) == ("COMPLETED", "It is decided.")
    assert {run["session_id"] for run in job.runs(task["id"])} == {first["id"]}
    assert not c.marked_processes([run["id"] for run in job.runs(task["id"])])  # the server has gone with its claude


@pytest.mark.parametrize("job", REALS, indirect=True)
def test_a_subtask_comes_by_the_mcp_server(job):
    with job.daemon.config_path.open("a") as file:
        file.write("mcp = true\n")
    job.daemon.start()
    task_id = job.submit("mcp_subtask")
    below = support.wait_until(lambda: job.daemon.call("task.subtasks", id=task_id)["tasks"], 30, "the subtask")[0]
    assert (below["name"], below["agent"]["instructions"]) == tuple(anthropic_api.SUBTASK.values())
    assert (below["agent"]["model"], below["agent"]["max_budget_usd"]) == ("sonnet", 3.0)
    ended = support.wait_until(lambda: [task for task in (job.wait(task_id),) if task["state"] == "READY"], 60, "its end")[0]
    assert ended["summary"] == "A subtask fixes the tests."
    assert job.daemon.call("task.get", id=below["id"])["task"]["state"] == "COMPLETED"


@every_agent
def test_a_reached_budget_is_its_own_state_and_the_cost_is_known(job):
    code, task, run = job.run("budget", "max_budget_usd: 0.5")
    assert (code, task["state"], run["status"], run["reason"]) == (1, "BUDGET_EXCEEDED", "BUDGET_EXCEEDED", "budget")
    assert "Reached maximum budget ($0.5)" in run["detail"]
    assert run["cost_usd"] > 0.5 and run["tokens_in"] == 5 * run["tokens_out"] > 0
    assert os.path.isdir(run["sandbox_dir"])


@every_agent
def test_an_api_error_is_retried_with_a_fresh_session_and_then_fails(job):
    code, task, run = job.run("error_500", more="retry: {max_attempts: 2, backoff: [100ms]}")
    assert (code, task["state"], run["status"], run["reason"]) == (1, "FAILED", "FAILED", "api_error")
    assert "500" in run["detail"] and run["exit_code"] == 1
    store = c.Store(str(job.daemon.data_dir / "claudomator.db"), readonly=True)
    runs = store.executions_of(task["id"])
    store.close()
    assert [run.reason for run in runs] == ["api_error"] * 2 and len({run.session_id for run in runs}) == 2


@every_agent
def test_refused_credentials_park_the_agent_and_keep_the_task(job):
    code, task, run = job.run("error_401")
    assert (code, task["state"], run["status"], run["reason"]) == (75, "QUEUED", "FAILED", "auth")
    assert "401" in run["detail"] and run["cost_usd"] == 0
    store = c.Store(str(job.daemon.data_dir / "claudomator.db"), readonly=True)
    parked = store.parked_agents()["claude"]
    store.close()
    assert parked["until"] is None and parked["reason"] == "auth"


@one_fake
def test_a_rate_limit_waits_in_the_queue_without_counting_an_attempt(job):
    job.daemon.start()
    task_id = job.submit("limit_429")
    first = support.wait_until(lambda: [run for run in job.runs(task_id) if run["end_time"]], 20)[0]
    assert (first["status"], first["reason"]) == ("FAILED", "rate_limited")
    task = job.daemon.call("task.get", id=task_id)["task"]
    assert task["state"] == "QUEUED" and "retry" in task["why"]
    assert not job.daemon.call("agent.status")["agents"][0]["parked"]
    job.daemon.call("task.cancel", ids=[task_id])


@every_agent
def test_an_unknown_model_is_the_tasks_fault(job):
    code, task, run = job.run("text", "model: no-such-model", "retry: {max_attempts: 3, backoff: [100ms]}")
    assert (code, task["state"], run["status"], run["reason"]) == (1, "FAILED", "FAILED", "bad_task")
    assert "404" in run["detail"] and "no-such-model" in run["detail"]


@one_fake
def test_a_line_of_five_megabytes_is_only_a_long_line(job):
    code, task, run = job.run("big_line")
    assert (code, task["state"], run["reason"]) == (0, "COMPLETED", None)
    assert set(run["summary"]) == {"z"} and 1000 < len(run["summary"]) <= c.SUMMARY_LIMIT
    assert job.is_cost(run, calls=1)
    log = job.daemon.data_dir / "executions" / run["id"] / "stdout.log"
    assert max(len(line) for line in log.read_bytes().splitlines()) > anthropic_api.BIG


@pytest.mark.parametrize("job", [pytest.param(("/nowhere/claude", ""), id="absent path"),
                                 pytest.param(("no-such-claude", ""), id="absent name")], indirect=True)
def test_an_agent_that_is_not_installed_is_named_with_what_to_do(job):
    code, task, run = job.run("text")
    assert (code, task["state"], run["status"], run["reason"]) == (1, "FAILED", "FAILED", "spawn_failed")
    assert "not installed" in run["detail"] and "install it or set claude_binary_path" in run["detail"]
    assert run["exit_code"] is None and run["cost_usd"] is None


@one_fake
def test_cancel_ends_everything_that_the_agent_started_and_nothing_else(job):
    stranger = subprocess.Popen(["claude", "300"], executable=shutil.which("sleep"))
    try:
        job.daemon.start()
        task_id = job.submit("escape")
        job.wait_for_tool()
        run = job.runs(task_id)[0]
        assert len(c.marked_processes([run["id"]])) >= 4  # the CLI, a detached child, two of the shell's
        task = job.daemon.call("task.cancel", ids=[task_id])["tasks"][0]
        assert task["state"] == "CANCELLED" and task["execution"]["reason"] == "cancelled"
        assert not c.marked_processes([run["id"]])
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
@one_fake
def test_a_cancelled_session_can_be_resumed(job):
    job.daemon.start()
    task_id = job.submit("slow_tool")
    sandbox = job.wait_for_tool()
    job.daemon.call("task.cancel", ids=[task_id])
    job.daemon.call("task.resume", ids=[task_id], message="Try less.")
    assert job.wait(task_id)["state"] == "READY"
    first, second = job.runs(task_id)
    assert second["session_id"] == first["session_id"] == first["id"] and first["sandbox_dir"] == str(sandbox)
    assert "interrupted" in job.prompt(second) and "Try less." in job.prompt(second)
    assert job.subjects() == [c.AUTOCOMMIT_SUBJECT]  # of what the first run had left in the sandbox


@one_fake
def test_a_killed_daemon_adopts_the_running_agent_and_pushes_its_work(job):
    job.daemon.start()
    task_id = job.submit("gated")
    sandbox = job.wait_for_tool()
    job.daemon.kill9()
    assert c.marked_processes([sandbox.name])
    job.daemon.start()
    assert "adopted" in job.daemon.log()
    (sandbox / "go").touch()
    assert job.wait(task_id)["state"] == "READY"
    run, = job.runs(task_id)
    assert (run["status"], run["summary"], run["exit_code"]) == ("COMPLETED", "It took its time.", 0)
    assert job.is_cost(run, calls=2) and job.subjects() == ["feat: late"]


@pytest.mark.parametrize("job", FAKES[:1], indirect=True)
@pytest.mark.parametrize("recording, code, state, reason, words", [
    ("d_oauth_429_unified_5h", 75, "QUEUED", "quota_exhausted", "5-hour limit"),
    ("c_denied_default", 1, "FAILED", "permission_denied", "agent.allowed_tools: [Bash]"),
    ("f_no_credentials", 75, "QUEUED", "auth", "Not logged in"),
    ("h_maxturns", 1, "FAILED", "max_turns", "maximum number of turns (3)"),
    ("x_midstream_error", 0, "COMPLETED", None, ""),
])
def test_other_recorded_ends_lead_where_they_should(job, recording, code, state, reason, words):
    ended, task, run = job.run(recording)
    assert (ended, task["state"], run["reason"]) == (code, state, reason) and words in (run["detail"] or "")
