"""Section 24: quotas, logins, cool-downs, budgets and the breaker, through a daemon in this process with a faked clock.

The agent is a script that prints claude's lines; ``mode`` in its directory says what happens to a run.
"""
import asyncio
import stat
import time

import pytest

import claudomator as c
from tests.support import make_repository, shell_task

AGENT = r"""#!/bin/sh
cd "%(root)s"
prompt=$(cat)
session=
while [ $# -gt 0 ]; do
  case "$1" in --session-id|--resume) session=$2; how=$1;; --model) model=$2;; esac
  shift
done
echo "$how $session $model" >> runs
line() { printf '%%s\n' "$1"; }
line '{"type":"system","subtype":"init","session_id":"'$session'","model":"m"}'
end='"total_cost_usd":0.5,"usage":{"input_tokens":10,"output_tokens":5},"session_id":"'$session'"}'
case "$(cat mode)" in
  quota) line '{"type":"rate_limit_event","rate_limit_info":{"status":"rejected","resetsAt":'$(cat resets)'}}'
    line '{"type":"assistant","message":{"content":[]},"error":"rate_limit","api_error_status":429}'
    line '{"type":"result","subtype":"success","is_error":true,"api_error":"usage_limit_reached","result":"limit",'"$end"
    exit 1;;
  auth) line '{"type":"assistant","message":{"content":[]},"error":"authentication_failed"}'
    line '{"type":"result","subtype":"success","is_error":true,"api_error_status":401,"result":"log in",'"$end"
    exit 1;;
  api) line '{"type":"result","subtype":"success","is_error":true,"api_error_status":500,"result":"down",'"$end"
    exit 1;;
  unknown) line '{"type":"result","subtype":"success","is_error":false,"result":"done"}'; exit 0;;
  wait) while [ ! -e go ]; do sleep 0.02; done;;
esac
line '{"type":"rate_limit_event","rate_limit_info":{"status":"allowed_warning","overageStatus":"rejected","resetsAt":1}}'
line '{"type":"result","subtype":"success","is_error":false,"result":"done",'"$end"
"""
TWO_PM = time.mktime((2026, 12, 1, 14, 0, 0, 0, 0, -1))


class World:
    """A data directory, an agent, a clock, and the daemons that come and go on it."""

    def __init__(self, tmp_path, config=""):
        self.root, self.now, self.log, self.daemon = tmp_path, TWO_PM, [], None
        self.agent = tmp_path / "claude"
        self.agent.write_text(AGENT % {"root": tmp_path})
        self.agent.chmod(self.agent.stat().st_mode | stat.S_IXUSR)
        self.mode("works")
        self.config_text = config

    def mode(self, mode, resets=None):
        (self.root / "mode").write_text(mode)
        if resets is not None:
            (self.root / "resets").write_text(str(int(resets)))

    def config(self):
        text = f'data_dir = "{self.root}/data"\nserver_addr = ""\nclaude_binary_path = "{self.agent}"\n{self.config_text}'
        return c.parse_config_text(text, "config.toml", str(self.root))

    async def start(self):
        self.daemon = c.Daemon(self.config(), self.config, lambda level, text: self.log.append(f"{level}: {text}"),
                               clock=lambda: self.now)
        await self.daemon.start()

    async def restart(self):
        await self.daemon.close()
        await self.start()

    @property
    def core(self):
        return self.daemon.core

    @property
    def store(self):
        return self.daemon.core.store

    def add(self, count=1, kind="claude", **more):
        """Queue tasks; returns their ids."""
        agent = {"type": kind, "instructions": "do it", **more.pop("agent", {})}
        if not kind:
            del agent["type"]
        result = c.OPERATIONS["task.create"].handler(self.core, {
            "tasks": {"tasks": [{"name": f"t{n}", "agent": agent, **more} for n in range(count)]}, "queue": True,
            "source": "test", "auto_accept": True})
        return [task["id"] for task in result["tasks"]]

    def add_shell(self, script, **more):
        return self.core.life.create(c.parse_tasks(shell_task(script, **more), "test", self.now), queue=True,
                                     config=self.core.config, kinds=self.core.kinds)[0].id

    def task(self, task_id):
        return self.store.get_task(task_id)

    def runs(self):
        path = self.root / "runs"
        return path.read_text().splitlines() if path.exists() else []

    def events(self, *kinds):
        return [event for event in self.store.events_since(0, 10_000) if event["kind"] in kinds]

    def why(self, task_id):
        return self.core.pool.outlook().explain(self.task(task_id))

    def look(self, seconds=0.0):
        """Let time pass, and have the pool look at it."""
        self.now += seconds
        self.core.pool.wake()

    async def until(self, condition, what="the condition"):
        deadline = time.monotonic() + 20
        while not (value := condition()):
            assert time.monotonic() < deadline, (what, self.log[-5:])
            await asyncio.sleep(0.01)
        return value

    async def settled(self):
        """Once nothing runs, and nothing starts."""
        def rests():
            pool = self.core.pool
            return not pool.runs and pool._wake_handle is None and self.store.is_durable()
        await self.until(rests, "rest")
        await asyncio.sleep(0.05)
        await self.until(rests, "rest")

    async def ended(self, ids):
        await self.until(lambda: all(self.task(each).state in c.SETTLED_STATES for each in ids), "the end of the tasks")
        await self.settled()


def play(tmp_path, body, config=""):
    """Run ``body(world)`` with a daemon in this process."""
    async def main():
        world = World(tmp_path, config)
        await world.start()
        try:
            await asyncio.wait_for(body(world), 60)
        finally:
            await world.daemon.close()
    asyncio.run(main())


# -- the quota gate


def test_a_used_up_quota_parks_forty_tasks_over_two_restarts_and_none_of_them_loses_anything(tmp_path):
    async def body(world):
        world.mode("quota", TWO_PM + 1200)
        ids = world.add(40)
        await world.until(lambda: world.store.parked_agents())
        await world.settled()
        met = len(world.runs())
        assert 1 <= met <= 3  # as many as there are slots
        assert world.why(ids[-1]) == "claude is parked until 14:20"
        for _ in range(2):
            world.now += 500
            await world.restart()
            await world.settled()
            assert world.why(ids[-1]) == "claude is parked until 14:20"
        world.look(199)
        await world.settled()
        assert len(world.runs()) == met and world.store.counts() == {"QUEUED": 40}
        assert [event["reason"] for event in world.events("agent.parked")] == ["quota_exhausted"]
        assert sum("is parked" in line for line in world.log) == 1
        world.mode("works")
        world.look(1)
        await world.ended(ids)
        assert world.store.counts() == {"COMPLETED": 40}
        tasks = [world.task(each) for each in ids]
        assert {(task.attempts, task.free_tries, task.idle_runs) for task in tasks} == {(0, 0, 0)}
        resumed = [line for line in world.runs() if line.startswith("--resume")]
        assert len(resumed) == met and len(world.runs()) == 40 + met  # the interrupted sessions went on
        assert len(world.events("agent.parked")) == len(world.events("agent.unparked")) == 1
        assert not world.events("agent.cooling")
    play(tmp_path, body)


def test_a_warning_and_an_overage_status_park_nobody(tmp_path):
    async def body(world):
        await world.ended(world.add(2))  # the agent prints both in each good run
        assert world.store.parked_agents() == {} and len(world.runs()) == 2
    play(tmp_path, body)


def test_an_expired_login_parks_the_kind_with_one_notice_until_somebody_unparks_it(tmp_path):
    async def body(world):
        world.mode("auth")
        ids = world.add(12)
        await world.until(lambda: world.store.parked_agents())
        await world.settled()
        met = len(world.runs())
        assert met <= 8 and len(world.events("agent.parked")) == 1 and sum("is parked" in line for line in world.log) == 1
        world.look(86400 * 30)
        await world.restart()
        await world.settled()
        assert len(world.runs()) == met and world.why(ids[-1]) == "claude is parked"
        world.mode("works")
        c.OPERATIONS["agent.unpark"].handler(world.core, {"agent": "claude"})
        await world.ended(ids)
        assert {world.task(each).attempts for each in ids} == {0}
    play(tmp_path, body, "max_concurrent = 8\n")


def test_on_quota_fail_fails_the_run_that_met_it_and_what_would_start_meanwhile(tmp_path):
    async def body(world):
        world.mode("quota", TWO_PM + 1200)
        first, = world.add(1, retry={"max_attempts": 5})
        await world.ended([first])
        later = world.add(3)
        waits = world.add(1, start_at="3h")
        await world.ended(later)
        for each in (first, *later):
            task = world.task(each)
            assert (task.state, task.reason) == (c.FAILED, "quota_exhausted") and 'on_quota = "wait"' in task.detail
        assert len(world.runs()) == 1 and world.task(waits[0]).state == c.QUEUED
        world.mode("works")
        world.look(3 * 3600)
        await world.ended(waits)
        assert world.task(waits[0]).state == c.COMPLETED
        assert c.continuation_of(world.store.last_execution(world.task(first)))["session_id"]  # ctl resume goes on
    play(tmp_path, body, '[agents.claude]\non_quota = "fail"\n')


def test_on_quota_other_agent_moves_what_is_not_bound_to_its_kind(tmp_path, monkeypatch):
    def build(task, context, config, host):
        assert task.agent.model == ("own" if task.agent.type == "other" else "")
        script = f'echo "other" >> {tmp_path}/runs'
        return c.Launch(("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, "", "text")
    other = c.Runner("other", build, "text", resumable=False, reads_stdin=False, chosen=True)
    monkeypatch.setitem(c.RUNNERS, "other", other)
    binary = c.runner_binary
    monkeypatch.setattr(c, "runner_binary", lambda kind, config: "/bin/sh" if kind == "other" else binary(kind, config))

    async def body(world):
        world.mode("quota", TWO_PM + 1200)
        first, = world.add(1, agent={"model": "opus"})
        await world.until(lambda: world.store.parked_agents())
        moved = world.add(3, agent={"model": "opus"})
        bound = world.add(1, agent={"additional_args": ["--max-turns", "3"]})
        await world.ended(moved)
        assert world.task(first).state == c.QUEUED and world.why(bound[0]) == "claude is parked until 14:20"
        claims = [event for event in world.events("task.state") if event["to"] == c.RUNNING and event["task_id"] in moved]
        assert [(event["agent"], event["instead_of"]) for event in claims] == [("other", "claude")] * 3
        assert {world.store.last_execution(world.task(each)).model for each in moved} == {""}
        world.mode("works")
        world.look(1200)
        await world.ended([first, *bound])
        assert [line.split()[0] for line in world.runs()] == ["--session-id", *["other"] * 3, "--resume", "--session-id"] \
            or world.runs()[-1].startswith("--resume")
    play(tmp_path, body, '[agents.claude]\non_quota = "other_agent"\n')


# -- choosing


def test_a_task_without_a_type_avoids_what_is_parked_and_waits_for_it_where_there_is_no_other(tmp_path):
    async def body(world):
        c.OPERATIONS["agent.park"].handler(world.core, {"agent": "claude", "until": "20m"})
        one, = world.add(1, kind="")
        await world.settled()
        assert world.why(one) == "claude is parked until 14:20" and world.core.pool.outlook().is_parked(world.task(one))
        world.look(1200)
        await world.ended([one])
    play(tmp_path, body)


# -- cool-down


def test_failures_of_a_kind_in_a_row_pause_it_ever_longer_until_one_run_works(tmp_path):
    async def body(world):
        world.mode("api")
        ids = world.add(20)
        await world.until(lambda: world.events("agent.cooling"))
        await world.settled()
        met = len(world.runs())
        assert met == c.COOLDOWN_AFTER and world.why(ids[-1]) == "claude cools down until 14:01"
        [shown] = [agent for agent in world.core.pool.agents() if agent["kind"] == "claude"]
        assert shown["failures"] == met and "api_error" in shown["failure"]
        await world.restart()
        world.look(59)
        await world.settled()
        assert len(world.runs()) == met
        world.look(1)
        await world.until(lambda: len(world.events("agent.cooling")) == 2)
        await world.settled()
        assert len(world.runs()) == met + 1 and world.why(ids[-1]) == "claude cools down until 14:03"
        world.mode("works")
        world.look(120)
        await world.ended(ids)
        assert world.store.agent_health() == {} and len(world.events("agent.recovered")) == 1
        assert sum("cools down" in line for line in world.log) == 2
    play(tmp_path, body, "max_concurrent = 1\n")


def test_unparking_ends_a_cool_down_and_a_failing_script_begins_none(tmp_path):
    async def body(world):
        await world.ended([world.add_shell("exit 3", name=f"s{n}") for n in range(8)])
        assert world.store.agent_health() == {}
        world.mode("api")
        world.add(5)
        await world.until(lambda: world.events("agent.cooling"))
        await world.settled()
        world.mode("works")
        ids = world.add(1)
        c.OPERATIONS["agent.unpark"].handler(world.core, {"agent": "claude"})
        await world.ended(ids)
        assert world.store.agent_health() == {}
    play(tmp_path, body, "max_concurrent = 5\n")


# -- budgets


def test_a_budget_warns_once_refuses_at_its_cap_and_begins_anew_at_midnight(tmp_path):
    async def body(world):
        ids = world.add(8)
        await world.until(lambda: world.store.counts().get("COMPLETED") == 5)
        await world.settled()
        assert world.why(ids[-1]) == "budget: 2.50 of 2.50 USD today for everything; resets 00:00"
        assert world.core.pool.outlook().is_parked(world.task(ids[-1]))
        await world.restart()
        await world.settled()
        assert [event["kind"] for event in world.events("budget.warning", "budget.reached")] == \
            ["budget.warning", "budget.reached"]
        assert sum("budget" in line for line in world.log) == 2 and len(world.runs()) == 5
        shown = world.core.pool.budget()
        assert shown["caps"] == [{"scope": "all", "unit": "usd", "limit": 2.5, "spent": 2.5, "left": 0, "unknown_runs": 0,
                                  "state": "reached"}] and shown["spent"]["tokens"] == 75
        world.look(10 * 3600 - 1)
        await world.settled()
        assert len(world.runs()) == 5
        world.look(1)
        await world.ended(ids)
        assert world.core.pool.budget()["spent"]["runs"] == 3 and len(world.events("budget.reached")) == 1
    play(tmp_path, body, "max_concurrent = 1\n[budgets]\nusd = 2.5\n")


def test_a_raised_budget_starts_what_waited_and_a_cap_on_runs_is_met_to_the_run(tmp_path):
    async def body(world):
        ids = world.add(6) + [world.add_shell("true", auto_accept=True)]
        await world.until(lambda: world.store.counts().get("COMPLETED") == 4)
        await world.settled()
        assert len(world.runs()) == 3
        assert world.why(ids[5]) == "budget: 3 of 3 runs today for agent claude; resets 00:00"
        world.config_text = world.config_text.replace("runs = 3", "runs = 5")
        world.daemon.reload()
        await world.until(lambda: world.store.counts().get("COMPLETED") == 6)
        world.config_text = ""
        world.daemon.reload()
        await world.ended(ids)
    play(tmp_path, body, "max_concurrent = 8\n[budgets.agent.claude]\nruns = 3\n")


def test_unknown_cost_is_told_and_running_agents_count_by_runs_and_minutes(tmp_path):
    async def body(world):
        world.mode("unknown")
        await world.ended(world.add(2))
        world.mode("wait")
        one, = world.add(1)
        await world.until(lambda: len(world.runs()) == 3)
        world.now += 600
        spent = world.core.pool.budget()
        assert spent["spent"]["runs"] == 3 and spent["spent"]["minutes"] >= 10 and spent["spent"]["unknown_usd"] == 2
        assert [cap["state"] for cap in spent["caps"]] == ["ok", "reached"]
        assert "(+ 2 runs of unknown cost)" in c.render_budget(spent, 200, False)
        waits, = world.add(1)
        await asyncio.sleep(0.05)
        assert "of 10.0 minutes today for everything" in world.why(waits)
        assert world.task(one).state == c.RUNNING  # it is not killed
        (world.root / "go").touch()
        await world.ended([one])
        assert world.task(waits).state == c.QUEUED and world.core.pool.budget()["spent"]["usd"] == 0.5
    play(tmp_path, body, "[budgets]\nusd = 5\nminutes = 10\n")


def test_deleting_tasks_gives_no_money_back(tmp_path):
    async def body(world):
        ids = world.add(2)
        await world.ended(ids)
        for each in ids:
            world.core.life.delete(each)
        assert world.core.pool.budget()["spent"]["usd"] == 1.0
    play(tmp_path, body)


# -- the no-progress breaker


def test_runs_that_lead_nowhere_are_stopped_and_the_way_on_is_told(tmp_path):
    async def body(world):
        world.mode("api")
        one, = world.add(1, retry={"max_attempts": 50, "backoff": ["1ms"]})
        for _ in range(200):
            if world.task(one).state == c.FAILED:
                break
            world.look(3600)
            await world.settled()
        task = world.task(one)
        assert (task.state, task.reason, task.attempts) == (c.FAILED, "api_error", 3) and len(world.runs()) == 3
        assert "no-progress breaker: 3 runs in a row" in task.detail and "no_progress_runs" in task.detail
        world.mode("works")
        world.core.life.enqueue(one)
        await world.ended([one])
        assert world.task(one).state == c.COMPLETED and world.task(one).idle_runs == 0
    play(tmp_path, body, "no_progress_runs = 3\n")


@pytest.mark.parametrize("commits, rounds", [(True, 5), (False, 2)])
def test_a_new_commit_in_each_round_is_progress(tmp_path, commits, rounds):
    _, copy = make_repository(tmp_path)

    async def body(world):
        work = "date +%N >> file; git add file; git commit -qm work" if commits else "true"
        one = world.add_shell(f"echo round >> {tmp_path}/rounds; {work}", verify="false", verify_rounds=5,
                              agent={"project_dir": str(copy)})
        await world.ended([one])
        assert (tmp_path / "rounds").read_text().count("round") == rounds
        assert ("breaker" in world.task(one).detail) is not commits
        assert world.task(one).reason == "verify_failed"
    play(tmp_path, body, "no_progress_runs = 2\n")


def test_a_commit_counts_once_and_not_for_every_round_after_it(tmp_path):
    _, copy = make_repository(tmp_path)

    async def body(world):
        script = f"echo round >> {tmp_path}/rounds; [ -e file ] || {{ : > file; git add file; git commit -qm work; }}"
        one = world.add_shell(script, verify="false", verify_rounds=9, agent={"project_dir": str(copy)})
        await world.ended([one])
        assert (tmp_path / "rounds").read_text().count("round") == 3 and "breaker" in world.task(one).detail
    play(tmp_path, body, "no_progress_runs = 2\n")


# -- what counts, and who serves


def test_an_agent_that_cannot_be_started_is_no_run_of_the_day(tmp_path):
    async def body(world):
        world.agent.unlink()
        ids = world.add(5)
        await world.ended(ids)
        assert world.core.pool.budget()["spent"]["runs"] == 0 and world.events("agent.cooling")
    play(tmp_path, body)


def test_a_run_is_counted_once_while_its_end_is_written(tmp_path):
    async def body(world):
        await world.ended(world.add(1))
        assert not world.events("budget.warning", "budget.reached")
        await world.ended(world.add(1))
        assert [event["kind"] for event in world.events("budget.warning", "budget.reached")] == ["budget.reached"]
    play(tmp_path, body, "[budgets]\nruns = 2\n")


@pytest.mark.parametrize("kind, resume, expected", [
    ("claude", None, "claude"), ("", None, ""), ("", {"agent": "shell", "session_id": "s"}, "shell"),
    ("claude", {"agent": "shell", "session_id": "s"}, "shell"), ("claude", {"agent": "shell", "session_id": ""}, "claude"),
    ("claude", {"agent": "gone", "session_id": "s"}, "claude")])
def test_a_session_is_resumed_by_the_kind_that_began_it(kind, resume, expected):
    task = c.Task(id="t", name="t", agent=c.AgentConfig(type=kind), resume=resume)
    assert c.serving_kind(task) == expected
    assert c.is_movable(task) is not bool(resume and resume["session_id"])


@pytest.mark.parametrize("more", [{"additional_args": ("-x",)}, {"permission_mode": "plan"},
                                  {"disallowed_tools": ("Bash",)}])
def test_what_another_cli_would_not_obey_binds_a_task_to_its_kind(more):
    assert not c.is_movable(c.Task(id="t", name="t", agent=c.AgentConfig(type="claude", **more)))
    assert c.is_choosable("claude") and not c.is_choosable("shell") and not c.is_choosable("gone")


def test_a_day_ends_at_local_midnight_also_where_it_has_23_hours(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        noon = c.parse_time("2026-03-28T23:30:00Z")  # half past midnight on the day on which summer time begins
        day, _, midnight = c.local_day(noon)
        assert (day, midnight) == ("2026-03-29", c.parse_time("2026-03-29T22:00:00Z"))
        assert c.local_day(midnight)[0] == "2026-03-30" and c.local_day(midnight - 1)[0] == "2026-03-29"
    finally:
        monkeypatch.undo()
        time.tzset()
