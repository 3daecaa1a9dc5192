"""Scheduling decision: the plan against a slow and obvious one, dependencies, and why a task waits."""
import heapq
import random

import pytest

import claudomator as c

INF = float("inf")
KINDS, PROJECTS = ("claude", "gemini", "shell"), ("", "api", "web")
SCOPES = ("all", "project.api", "project.web", "agent.claude", "agent.gemini")


def queue_of(*tasks: dict) -> c.Queue:
    queue = c.Queue()
    for seq, task in enumerate(tasks):
        queue.add(**{"kind": "claude", "project": "", "rank": 1, "seq": seq, **task})
    return queue


def started(queue: c.Queue, limits: c.Limits, now: float = 0.0, **running) -> list[tuple[str, str]]:
    return [(start.task_id, start.kind) for start in c.plan(queue, c.Running(**running), limits, now).starts]


# Dependencies


@pytest.mark.parametrize("on, met, impossible", [
    ("success", {"COMPLETED"}, {"FAILED", "TIMED_OUT", "CANCELLED", "BUDGET_EXCEEDED", "DELETED"}),
    ("ready", {"READY", "COMPLETED"}, {"FAILED", "TIMED_OUT", "CANCELLED", "BUDGET_EXCEEDED", "DELETED"}),
    ("failure", {"FAILED", "TIMED_OUT", "CANCELLED", "BUDGET_EXCEEDED"}, {"COMPLETED", "DELETED"}),
    ("any", {"READY", "COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED", "BUDGET_EXCEEDED", "DELETED"}, set()),
])
def test_every_state_meets_a_dependency_leaves_it_open_or_rules_it_out(on, met, impossible):
    for state in (*c.STATES, c.DELETED):
        expected = "met" if state in met else "impossible" if state in impossible else "open"
        assert c.dependency_verdict(on, state) == expected, state


def test_a_task_waits_until_all_that_it_depends_on_is_met():
    queue = queue_of({"task_id": "deploy", "waits_for": {"build": "success", "lint": "any"}})
    assert len(queue.entry("deploy").waits_for) == 2
    assert started(queue, c.Limits(3)) == []
    assert queue.settle("build", "RUNNING") == ([], [])
    assert queue.settle("build", "COMPLETED") == ([], [])
    assert len(queue.entry("deploy").waits_for) == 1 and started(queue, c.Limits(3)) == []
    assert queue.settle("build", "COMPLETED") == ([], [])  # told twice, counted once
    assert queue.settle("lint", "FAILED") == (["deploy"], [])
    assert started(queue, c.Limits(3)) == [("deploy", "claude")]


def test_a_dependency_that_cannot_be_met_names_the_tasks_until_they_are_discarded():
    queue = queue_of({"task_id": "deploy", "waits_for": {"build": "success"}},
                     {"task_id": "report", "waits_for": {"build": "failure"}},
                     {"task_id": "notify", "waits_for": {"build": "success"}})
    assert queue.settle("build", "FAILED") == (["report"], ["deploy", "notify"])
    assert queue.settle("build", "FAILED") == ([], ["deploy", "notify"])  # the daemon died before it stored that
    queue.discard("deploy")
    queue.discard("notify")
    assert queue.settle("build", "FAILED") == ([], [])
    assert len(queue) == 1 and started(queue, c.Limits(3)) == [("report", "claude")]


def test_a_discarded_task_is_not_freed_later_and_a_queued_again_one_waits_anew():
    queue = queue_of({"task_id": "deploy", "waits_for": {"build": "success"}})
    queue.discard("deploy")
    queue.discard("deploy")
    assert queue.settle("build", "COMPLETED") == ([], []) and len(queue) == 0
    queue.add("deploy", kind="claude", project="", rank=1, seq=1, waits_for={"build": "success"})
    queue.add("deploy", kind="claude", project="", rank=1, seq=1, waits_for={"lint": "success"})
    assert queue.settle("build", "COMPLETED") == ([], []) and len(queue) == 1
    assert queue.settle("lint", "COMPLETED") == (["deploy"], [])


# The plan


def test_priority_goes_before_age_and_age_before_the_order_of_queueing():
    queue = queue_of({"task_id": "new", "seq": 9}, {"task_id": "old", "seq": 2}, {"task_id": "low", "seq": 1,
                                                                                  "rank": 2},
                     {"task_id": "urgent", "seq": 20, "rank": 0}, {"task_id": "other", "seq": 5, "project": "api"})
    order = ["urgent", "old", "other", "new", "low"]
    assert [task for task, _ in started(queue, c.Limits(9))] == order
    assert [task for task, _ in started(queue, c.Limits(2))] == order[:2]
    assert [task for task, _ in started(queue, c.Limits(9), total=8)] == order[:1]
    assert started(queue, c.Limits(9), total=9) == [] == started(queue, c.Limits(9), total=12)


def test_a_full_parked_or_paused_kind_and_a_paused_project_hold_back_their_own_tasks_only():
    queue = queue_of({"task_id": "a", "rank": 0}, {"task_id": "b", "rank": 0}, {"task_id": "g", "kind": "gemini"},
                     {"task_id": "w", "project": "web"})
    assert [t for t, _ in started(queue, c.Limits(9, {"claude": 1}))] == ["a", "g"]
    assert [t for t, _ in started(queue, c.Limits(9, {"claude": 2}), total=1, by_kind={"claude": 1})] == ["a", "g"]
    assert [t for t, _ in started(queue, c.Limits(9, parked={"claude": INF}))] == ["g"]
    assert [t for t, _ in started(queue, c.Limits(9, paused_kinds=frozenset({"gemini"})))] == ["a", "b", "w"]
    assert [t for t, _ in started(queue, c.Limits(9, paused_projects=frozenset({"web"})))] == ["a", "b", "g"]


def test_nothing_starts_while_paused_or_draining_and_nobody_is_woken():
    queue = queue_of({"task_id": "a"}, {"task_id": "later", "not_before": 50.0})
    for limits in (c.Limits(3, paused=True), c.Limits(3, draining=True), c.Limits(0)):
        assert c.plan(queue, c.Running(), limits, 0.0) == c.Plan((), None)


def test_a_task_without_a_kind_gets_the_least_busy_one_that_has_room():
    queue = queue_of(*({"task_id": str(i), "kind": ""} for i in range(5)))
    available = {"available_kinds": ("gemini", "claude", "shell")}
    assert [k for _, k in started(queue, c.Limits(5, **available))] == ["gemini", "claude", "shell", "gemini",
                                                                        "claude"]
    assert [k for _, k in started(queue, c.Limits(5, **available), total=2, by_kind={"gemini": 2})] \
        == ["claude", "shell", "claude"]
    limits = c.Limits(9, {"gemini": 1}, parked={"shell": 10.0}, **available)
    assert [k for _, k in started(queue, limits)] == ["gemini", "claude", "claude", "claude", "claude"]
    assert started(queue, c.Limits(9)) == []


def test_a_start_time_and_a_park_are_waited_for_to_the_moment_and_not_beyond():
    queue = queue_of({"task_id": "at", "not_before": 100.0}, {"task_id": "g", "kind": "gemini"})
    limits = c.Limits(3, parked={"gemini": 150.0, "shell": 20.0})
    assert c.plan(queue, c.Running(), limits, 99.9) == c.Plan((), 100.0)
    assert c.plan(queue, c.Running(), limits, 100.0) == c.Plan((c.Start("at", "claude"),), 150.0)
    assert started(queue, limits, 150.0) == [("at", "claude"), ("g", "gemini")]
    assert c.plan(queue, c.Running(), limits, 99.9) == c.Plan((), 100.0)  # the clock was set back
    assert started(queue, limits, 150.0) == [("at", "claude"), ("g", "gemini")]
    assert c.plan(queue, c.Running(), c.Limits(3, parked={"gemini": INF, "claude": INF}), 100.0).wake_at is None
    assert c.plan(queue, c.Running(2), limits, 100.0).wake_at is None  # full: an end comes first


def test_a_park_that_matters_to_nobody_wakes_nobody():
    queue = queue_of({"task_id": "g", "kind": "gemini", "project": "web"}, {"task_id": "chosen", "kind": ""})
    limits = c.Limits(3, parked={"gemini": 150.0}, paused_projects=frozenset({"web"}),
                      available_kinds=("gemini", "shell"))
    assert c.plan(queue, c.Running(), limits, 0.0) == c.Plan((c.Start("chosen", "shell"),), None)
    assert c.plan(queue, c.Running(), limits.replace(available_kinds=("gemini",)), 0.0) == c.Plan((), 150.0)
    full = limits.replace(per_kind={"gemini": 1}, paused_projects=frozenset())
    assert c.plan(queue, c.Running(1, {"gemini": 1}), full, 0.0) == c.Plan((c.Start("chosen", "shell"),), None)


def test_a_lane_that_never_runs_does_not_keep_what_was_discarded():
    queue = queue_of({"task_id": "first", "seq": 0})
    for _ in range(5000):
        queue.add("edited", kind="claude", project="", rank=1, seq=7)
        queue.add("timed", kind="claude", project="", rank=1, seq=7, not_before=9.0)
    [lane] = queue.lanes(0.0)
    assert len(lane.heap) < 200 and lane.live == 2
    for task_id in ("first", "edited", "timed"):
        queue.discard(task_id)
    assert queue.lanes(0.0) == [] and queue.next_time() is None and len(queue) == 0


# Random worlds against the obvious


class World:
    """The same queue as plain dicts, asked by looping over everything."""

    def __init__(self) -> None:
        self.tasks: dict[str, dict] = {}

    def settle(self, dependency: str, state: str) -> tuple[list[str], list[str]]:
        freed, failed = [], []
        for task_id, task in self.tasks.items():
            on = task["waits_for"].get(dependency)
            verdict = c.dependency_verdict(on, state) if on else "open"
            if verdict == "impossible":
                failed.append(task_id)
            elif verdict == "met":
                del task["waits_for"][dependency]
                if not task["waits_for"]:
                    freed.append(task_id)
        return sorted(freed), sorted(failed)

    @staticmethod
    def has_budget(scope: str, counted: dict, limits: c.Limits, now: float) -> bool:
        """Whether no cap of a scope is reached; ``counted``: what has started in this plan, by scope."""
        return now >= limits.resets_at or all(
            cap.spent + (counted.get(scope, 0) if cap.unit == "runs" else 0) < cap.limit
            for cap in limits.caps if cap.scope == scope)

    @classmethod
    def kind_for(cls, task: dict, total: int, by_kind: dict, limits: c.Limits, now: float, counted=()) -> str | None:
        """The kind with which the task may start now, ``None``, or ``"fails"``."""
        counted = dict(counted)
        if limits.paused or limits.draining or total >= limits.max_concurrent or task["waits_for"]:
            return None
        if task["not_before"] is not None and task["not_before"] > now or task["project"] in limits.paused_projects:
            return None
        if not all(cls.has_budget(scope, counted, limits, now) for scope in ("all", f"project.{task['project']}")):
            return None
        own, kinds = task["kind"], [task["kind"]] if task["kind"] else limits.available_kinds
        policy = limits.on_quota.get(own) if limits.parked.get(own, -INF) > now else None
        if policy == "fail":
            return None if own in limits.paused_kinds else "fails"
        if policy == "other_agent" and task["movable"]:
            kinds = limits.available_kinds
        free = [kind for kind in kinds
                if kind not in limits.paused_kinds and not limits.parked.get(kind, -INF) > now
                and not limits.cooling.get(kind, -INF) > now and cls.has_budget(f"agent.{kind}", counted, limits, now)
                and not by_kind.get(kind, 0) >= limits.per_kind.get(kind, INF)]
        return min(free, key=lambda kind: (by_kind.get(kind, 0), free.index(kind))) if free else None

    def plan(self, running: c.Running, limits: c.Limits, now: float, counted=()) -> list[tuple[str, str]]:
        total, by_kind, starts, counted = running.total, dict(running.by_kind), [], dict(counted)
        for task_id, task in sorted(self.tasks.items(), key=lambda item: (item[1]["rank"], item[1]["seq"])):
            kind = self.kind_for(task, total, by_kind, limits, now, counted)
            if kind is not None:
                starts.append((task_id, kind))
            if kind not in (None, "fails"):
                total, by_kind[kind] = total + 1, by_kind.get(kind, 0) + 1
                for scope in ("all", f"agent.{kind}", f"project.{task['project']}"):
                    counted[scope] = counted.get(scope, 0) + 1
        return starts

    def wakes(self, starts: list, running: c.Running, limits: c.Limits, now: float) -> float | None:
        """The first moment after ``now`` at which something starts although nothing happened but ``starts``."""
        rest, by_kind, counted = World(), dict(running.by_kind), {}
        for task_id, kind in starts:
            by_kind[kind] = by_kind.get(kind, 0) + 1
            for scope in ("all", f"agent.{kind}", f"project.{self.tasks[task_id]['project']}"):
                counted[scope] = counted.get(scope, 0) + 1
        rest.tasks = {task_id: task for task_id, task in self.tasks.items() if task_id not in dict(starts)}
        times = {task["not_before"] for task in rest.tasks.values()} | set(limits.parked.values())
        times |= set(limits.cooling.values()) | {limits.resets_at}
        for at in sorted(at for at in times if at is not None and now < at < INF):
            if rest.plan(c.Running(running.total + len(starts), by_kind), limits, at, counted):
                return at
        return None


def random_limits(rng: random.Random, now: float) -> c.Limits:
    def some(names, share=0.25):
        return [name for name in names if rng.random() < share]

    return c.Limits(rng.choice((0, 1, 2, 3, 5, 50)), {kind: rng.randrange(4) for kind in some(KINDS, 0.4)},
                    rng.random() < 0.05, rng.random() < 0.05, frozenset(some(KINDS)), frozenset(some(PROJECTS)),
                    {kind: rng.choice((INF, now, now + rng.randrange(-6, 18) / 2)) for kind in some(KINDS)},
                    tuple(rng.sample(KINDS, rng.randrange(4))),
                    {kind: now + rng.randrange(-6, 18) / 2 for kind in some(KINDS, 0.15)},
                    {kind: rng.choice(("other_agent", "fail")) for kind in some(KINDS)},
                    tuple(random_cap(rng, scope) for scope in some((*SCOPES, *SCOPES), 0.15)),
                    now + rng.randrange(-2, 18) / 2)


def random_cap(rng: random.Random, scope: str) -> c.Cap:
    unit = rng.choice(("usd", "runs", "runs"))
    return c.Cap(scope, unit, rng.randrange(1, 6), rng.randrange(6))


def random_task(rng: random.Random, number: int, now: float) -> dict:
    names = [f"t{other}" for other in range(24) if other != number]
    waits = {name: rng.choice(("success", "ready", "failure", "any"))
             for name in rng.sample(names, rng.choice((0, 0, 0, 0, 1, 1, 2, 3)))}
    return {"kind": rng.choice(("", *KINDS)), "project": rng.choice(PROJECTS), "rank": rng.randrange(3),
            "seq": number + 24 * rng.randrange(4), "waits_for": waits, "movable": rng.random() < 0.5,
            "not_before": rng.choice((None, None, None, now + rng.randrange(-6, 18) / 2))}


def change(rng: random.Random, world: World, queue: c.Queue, now: float) -> None:
    number = rng.randrange(24)
    task_id, action = f"t{number}", rng.random()
    if action < 0.55:
        task = random_task(rng, number, now)
        queue.add(task_id, **{**task, "waits_for": dict(task["waits_for"])})
        world.tasks.pop(task_id, None)
        world.tasks[task_id] = task
    elif action < 0.65:
        queue.discard(task_id)
        world.tasks.pop(task_id, None)
    else:
        state = rng.choice((*c.STATES, "COMPLETED", "COMPLETED", c.DELETED))
        freed, failed = queue.settle(task_id, state)
        assert (sorted(freed), sorted(failed)) == world.settle(task_id, state)
        for lost in failed if rng.random() < 0.8 else ():
            queue.discard(lost)
            del world.tasks[lost]


def check_bounds(world: World, starts: list, running: c.Running, limits: c.Limits, now: float) -> None:
    assert not starts or running.total + len(starts) <= limits.max_concurrent
    for kind in {kind for _, kind in starts}:
        active = running.by_kind.get(kind, 0) + sum(1 for _, started_kind in starts if started_kind == kind)
        assert active <= limits.per_kind.get(kind, INF) and not limits.parked.get(kind, now) > now
    for task_id, _ in starts:
        task = world.tasks[task_id]
        assert not task["waits_for"] and (task["not_before"] is None or task["not_before"] <= now)


def compare(rng: random.Random, world: World, queue: c.Queue, now: float) -> list[tuple[str, str]]:
    by_kind = {kind: rng.choice((0, 0, 1, 2)) for kind in KINDS}
    running, limits = c.Running(sum(by_kind.values()), by_kind), random_limits(rng, now)
    if rng.random() < 0.5:
        running = c.Running()
    plan = c.plan(queue, running, limits, now)
    starts, slow = [(start.task_id, start.kind) for start in plan.starts], world.plan(running, limits, now)
    assert starts == [start for start in slow if start[1] != "fails"]
    assert list(plan.refused) == [task_id for task_id, kind in slow if kind == "fails"]
    assert c.plan(queue, running, limits, now) == plan, "asked twice"
    check_bounds(world, starts, running, limits, now)
    due = None if plan.refused else world.wakes(starts, running, limits, now)  # its moves make the pool look again
    assert plan.wake_at is None or now < plan.wake_at < INF and running.total + len(starts) < limits.max_concurrent
    assert due is None or plan.wake_at is not None and plan.wake_at <= due, "it would sleep too long"
    assert len(queue) == len(world.tasks)
    for task_id, task in world.tasks.items():
        kind = world.kind_for(task, running.total, running.by_kind, limits, now)
        why = c.explain(queue, task_id, running, limits, now, {})
        assert (why == "next") == (kind not in (None, "fails")), why
        assert kind != "fails" or why.startswith("fails: the quota of")
    return starts


@pytest.mark.parametrize("block", range(4))
def test_in_random_worlds_the_plan_is_the_one_that_looking_at_every_task_gives(block):
    seen = 0
    for seed in range(block * 300, block * 300 + 300):
        rng, world, queue, now = random.Random(seed), World(), c.Queue(), 100.0
        for _ in range(rng.randrange(1, 7)):
            for _ in range(rng.randrange(1, 15)):
                change(rng, world, queue, now)
            starts = compare(rng, world, queue, now)
            seen += len(starts)
            for task_id, _ in starts if rng.random() < 0.6 else ():
                queue.discard(task_id)
                del world.tasks[task_id]
            now += rng.choice((0, 0.5, 1, 2, 5, -2))
    assert seen > 350


# Quotas, cool-downs and budgets

QUOTA = {"parked": {"claude": 100.0}, "available_kinds": ("claude", "gemini", "local")}


def test_while_a_quota_is_used_up_other_kinds_take_the_tasks_that_may_move_and_nothing_else():
    limits = c.Limits(9, **QUOTA, on_quota={"claude": "other_agent"})
    queue = queue_of({"task_id": "moves", "movable": True}, {"task_id": "stays"},
                     {"task_id": "moves-too", "movable": True}, {"task_id": "chosen", "kind": ""})
    assert started(queue, limits) == [("moves", "gemini"), ("moves-too", "local"), ("chosen", "gemini")]
    assert c.plan(queue, c.Running(), limits, 0.0).wake_at == 100.0
    assert dict(started(queue, limits, 100.0))["moves"] == "claude"  # the reset has come
    assert started(queue, limits.replace(on_quota={})) == [("chosen", "gemini")]
    assert started(queue, limits.replace(available_kinds=("claude",))) == []
    busy = limits.replace(per_kind={"gemini": 0, "local": 1})
    assert started(queue, busy) == [("moves", "local")]


def test_where_a_used_up_quota_fails_tasks_they_take_no_slot_and_go_in_steps():
    limits = c.Limits(1, **QUOTA, on_quota={"claude": "fail"})
    queue = queue_of(*({"task_id": f"t{n}", "seq": n} for n in range(c.MOST_REFUSED + 5)),
                     {"task_id": "later", "not_before": 50.0}, {"task_id": "g", "kind": "gemini", "seq": 999})
    plan = c.plan(queue, c.Running(), limits, 0.0)
    assert plan.refused == tuple(f"t{n}" for n in range(c.MOST_REFUSED)) and plan.starts == ()
    for task_id in plan.refused:
        queue.discard(task_id)
    plan = c.plan(queue, c.Running(), limits, 0.0)
    assert len(plan.refused) == 5 and plan.starts == (c.Start("g", "gemini"),)
    assert c.plan(queue, c.Running(1), limits, 0.0).refused == ()  # its turn has not come
    assert c.plan(queue, c.Running(), limits.replace(paused_kinds=frozenset({"claude"})), 0.0).refused == ()
    assert c.plan(queue, c.Running(), limits, 100.0).refused == ()


def test_runs_are_counted_within_one_plan_so_that_a_cap_is_met_to_the_run():
    queue = queue_of(*({"task_id": f"{project or 'none'}{n}", "project": project, "seq": n}
                       for n in range(5) for project in PROJECTS))
    caps = (c.Cap("all", "runs", 10, 4), c.Cap("project.api", "runs", 2, 1), c.Cap("agent.claude", "usd", 5.0, 4.99))
    limits = c.Limits(50, caps=caps, resets_at=1000.0)
    starts = [task_id for task_id, _ in started(queue, limits)]
    assert len(starts) == 6 and sum(task_id.startswith("api") for task_id in starts) == 1
    assert c.plan(queue, c.Running(), limits, 0.0).wake_at == 1000.0
    assert len(started(queue, limits, 1000.0)) == 15
    assert started(queue, limits.replace(caps=(c.Cap("agent.claude", "usd", 5.0, 5.0),))) == []


def test_caps_are_the_configured_ones_and_each_run_counts_for_all_three_scopes():
    spent = c.sum_spending([("claude", "api", c.Spent(1.5, 100, 2, 3.0, 0, 0)),
                            ("shell", "", c.Spent(0.0, 0, 3, 1.0, 3, 3)),
                            ("claude", "", c.Spent(0.25, 7, 1, 0.5, 0, 0))])
    assert spent["all"] == c.Spent(1.75, 107, 6, 4.5, 3, 3) and spent["project.api"].runs == 2
    assert spent["agent.claude"] == c.Spent(1.75, 107, 3, 3.5) and spent.keys() == {
        "all", "agent.claude", "agent.shell", "project.api"}
    budgets = {"all": {"usd": 2.0, "tokens": 0, "runs": 6, "minutes": 0.0}, "agent.gemini": {"usd": 1.0, "runs": 0}}
    usd, runs, other = c.budget_caps(budgets, spent)
    assert (usd.spent, usd.left, usd.unknown, usd.is_warned) == (1.75, 0.25, 3, True)
    assert (runs.spent, runs.left, runs.unknown) == (6, 0, 0) and (other.scope, other.spent) == ("agent.gemini", 0)
    assert c.describe_cap(usd) == "1.75 of 2.00 USD today for everything (+ 3 runs of unknown cost)"
    assert c.describe_cap(runs) == "6 of 6 runs today for everything"
    assert c.describe_cap(c.Cap("project.all", "minutes", 1.5, 2.25)) == "2.2 of 1.5 minutes today for project all"
    tokens = c.Cap("agent.x", "tokens", 9, 2, 1)
    assert c.describe_cap(tokens) == "2 of 9 tokens today for agent x (+ 1 run of unknown tokens)"


@pytest.mark.parametrize("spent, told, events", [
    (15.99, (), []), (16.0, (), ["budget.warning"]), (19.99, ("all usd 20 warning",), []),
    (19.0, ("all usd 10 warning", "all usd 10 reached"), ["budget.warning"]), (20.0, (), ["budget.reached"]),
    (25.0, ("all usd 20 warning",), ["budget.reached"]), (25.0, ("all usd 20 reached",), [])])
def test_a_cap_is_told_of_once_when_it_comes_near_and_once_when_it_is_reached(spent, told, events):
    found = c.new_budget_notices((c.Cap("all", "usd", 20.0, spent),), told)
    assert [event for _, event, _ in found] == events
    assert c.new_budget_notices((c.Cap("all", "usd", 20.0, spent),), (*told, *(key for key, _, _ in found))) == []


# Cost


def count_heap_calls(monkeypatch, work) -> int:
    """How many heap operations ``work()`` makes; they are what a plan is made of."""
    calls = 0

    def counting(function):
        def counted(*args):
            nonlocal calls
            calls += 1
            return function(*args)
        return counted

    with monkeypatch.context() as patch:
        for name in ("heappush", "heappop", "heapreplace", "heapify"):
            patch.setattr(heapq, name, counting(getattr(heapq, name)))
        work()
    return calls


@pytest.mark.parametrize("stored", [1_000, 20_000])
def test_a_plan_costs_what_it_starts_and_not_what_is_stored(monkeypatch, stored):
    queue = queue_of({"task_id": "ready", "seq": stored})
    for number in range(stored):
        waits, at = ({f"t{number - 1}": "success"}, None) if number % 2 else (None, 1e9)
        queue.add(f"t{number}", kind="claude", project=f"p{number}", rank=1, seq=number, waits_for=waits,
                  not_before=at)
    assert len(queue.lanes(0.0)) == 1
    plan = None

    def work() -> None:
        nonlocal plan
        plan = c.plan(queue, c.Running(), c.Limits(3), 0.0)

    assert count_heap_calls(monkeypatch, work) <= 5
    assert plan == c.Plan((c.Start("ready", "claude"),), 1e9)
    assert count_heap_calls(monkeypatch, lambda: queue.settle("t2", "COMPLETED")) == 1
    assert count_heap_calls(monkeypatch, lambda: queue.settle("nobody", "COMPLETED")) == 0


def test_a_long_chain_runs_to_its_end_with_a_few_heap_operations_for_each_task(monkeypatch):
    queue, size, order = c.Queue(), 2_000, []
    for number in range(size):
        waits = {f"t{number - 1}": "success"} if number else None
        queue.add(f"t{number}", kind="claude", project="", rank=1, seq=size - number, waits_for=waits)

    def work() -> None:
        while len(queue):
            [start] = c.plan(queue, c.Running(), c.Limits(8), 0.0).starts
            order.append(start.task_id)
            queue.discard(start.task_id)
            queue.settle(start.task_id, "COMPLETED")

    assert count_heap_calls(monkeypatch, work) <= 8 * size
    assert order == [f"t{number}" for number in range(size)]


# Why a task waits

NOON = c.parse_time("2026-12-01T12:00:00Z")


def why(limits: c.Limits, running: c.Running = c.Running(), names=None, offset=0, **task) -> str:
    queue = queue_of({"task_id": "t", **task})
    return c.explain(queue, "t", running, limits, NOON, names or {}, offset)


def test_explain_names_the_first_dependencies_that_are_still_open():
    waits = {"b": "success", "l": "any"}
    assert why(c.Limits(3), names={"b": "build", "l": "lint"}, waits_for=waits) == "waits for 2 tasks: build, lint"
    assert why(c.Limits(3), names=str.upper, waits_for={"b": "success"}) == "waits for 1 task: B"
    assert why(c.Limits(3), waits_for=dict.fromkeys("abc", "any")) == "waits for 3 tasks: a, b, c"
    assert why(c.Limits(3), waits_for=dict.fromkeys("abcd", "any")) == "waits for 4 tasks: a, b, c, ..."


def test_explain_gives_the_time_of_a_start_and_the_rest_of_a_delay():
    assert why(c.Limits(3), not_before=NOON + 10 * 3600) == "starts at 22:00 (in 10h)"
    assert why(c.Limits(3), not_before=NOON + 10 * 3600, offset=-3600) == "starts at 21:00 (in 10h)"
    assert why(c.Limits(3), not_before=NOON + 90000) == "starts at 2026-12-02 13:00 (in 1d1h)"
    assert why(c.Limits(3), not_before=NOON + 11.6, retrying=True) == "retry in 12s"
    assert why(c.Limits(3), not_before=NOON + 0.2, retrying=True) == "retry in 1s"
    assert why(c.Limits(3), not_before=NOON) == "next"


@pytest.mark.parametrize("expected, limits, running", [
    ("next", {}, c.Running(2, {"claude": 1})),
    ("paused", {"paused": True, "draining": True}, c.Running()),
    ("draining", {"draining": True}, c.Running(3)),
    ("project api is paused", {"paused_projects": frozenset({"api"})}, c.Running(3)),
    ("claude is paused", {"paused_kinds": frozenset({"claude"})}, c.Running(3)),
    ("claude is parked until 14:20", {"parked": {"claude": NOON + 8400}}, c.Running(3)),
    ("claude is parked until 2026-12-03 12:00", {"parked": {"claude": NOON + 2 * 86400}}, c.Running()),
    ("claude is parked", {"parked": {"claude": INF}}, c.Running()),
    ("next", {"parked": {"claude": NOON}}, c.Running()),
    ("all 3 slots are busy", {"per_kind": {"claude": 2}}, c.Running(3, {"claude": 1})),
    ("claude: 2 of 2 slots busy", {"per_kind": {"claude": 2}}, c.Running(2, {"claude": 2})),
    ("claude: 2 of 2 slots busy", {"per_kind": {"claude": 2}}, c.Running(3, {"claude": 2})),
    ("claude cools down until 12:05", {"cooling": {"claude": NOON + 300}}, c.Running(3)),
    ("claude is parked until 13:00", {"cooling": {"claude": NOON + 9}, "parked": {"claude": NOON + 3600}},
     c.Running()),
    ("fails: the quota of claude is used up", {"parked": {"claude": NOON + 9}, "on_quota": {"claude": "fail"}},
     c.Running()),
    ("budget: 20.00 of 20.00 USD today for everything; resets 00:00", {"caps": (
        c.Cap("all", "usd", 20.0, 20.0), c.Cap("all", "runs", 20, 1)), "resets_at": NOON + 43200}, c.Running()),
    ("budget: 3 of 3 runs today for project api; resets 00:00", {"caps": (
        c.Cap("project.api", "runs", 3, 3),), "resets_at": NOON + 43200}, c.Running()),
    ("budget: 3.0 of 3.0 minutes today for agent claude; resets 00:00", {"caps": (
        c.Cap("agent.claude", "minutes", 3, 3),), "resets_at": NOON + 43200}, c.Running()),
    ("next", {"caps": (c.Cap("agent.claude", "minutes", 3, 3),), "resets_at": NOON}, c.Running()),
])
def test_explain_says_what_holds_a_task_back(expected, limits, running):
    assert why(c.Limits(3, **limits), running, project="api") == expected


def test_explain_goes_through_every_kind_that_a_task_without_one_could_get():
    limits = c.Limits(3, {"gemini": 1}, parked={"claude": NOON + 60}, available_kinds=("claude", "gemini"))
    assert why(limits, kind="") == "next"
    assert why(limits, c.Running(1, {"gemini": 1}), kind="") \
        == "claude is parked until 12:01; gemini: 1 of 1 slots busy"
    assert why(c.Limits(3), kind="") == "no agent is available"


def test_explaining_a_task_that_is_not_queued_is_an_error():
    with pytest.raises(c.NotFound, match="task nope is not queued"):
        c.explain(c.Queue(), "nope", c.Running(), c.Limits(1), 0.0, {})


@pytest.mark.parametrize("expected, task, limits", [
    (False, {}, {}), (True, {}, {"parked": {"claude": NOON + 1}}), (False, {}, {"parked": {"claude": NOON}}),
    (False, {"waits_for": {"b": "any"}}, {"parked": {"claude": INF}}), (False, {}, {"cooling": {"claude": NOON + 9}}),
    (True, {"kind": ""}, {"parked": {"claude": INF}, "available_kinds": ("claude",)}), (False, {"kind": ""}, {}),
    (False, {"kind": ""}, {"parked": {"claude": INF}, "available_kinds": ("claude", "gemini")}),
    (False, {"movable": True}, {"parked": {"claude": INF}, "available_kinds": ("gemini",),
                                "on_quota": {"claude": "other_agent"}}),
    (True, {"project": "api"}, {"caps": (c.Cap("project.api", "usd", 1, 1),)}),
    (True, {}, {"caps": (c.Cap("all", "usd", 1, 1),)}), (False, {}, {"caps": (c.Cap("project.api", "usd", 1, 1),)}),
    (True, {}, {"caps": (c.Cap("agent.claude", "usd", 1, 1),)})])
def test_only_a_park_and_a_budget_make_a_wait_long(expected, task, limits):
    queue = queue_of({"task_id": "t", **task})
    assert c.waits_long(queue, "t", c.Limits(3, **limits), NOON) is expected
    assert c.waits_long(queue, "nobody", c.Limits(3, **limits), NOON) is False
