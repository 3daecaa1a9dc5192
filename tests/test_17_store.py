"""Section 17: the store, on real SQLite files."""
import asyncio
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import nullcontext

import pytest

import claudomator as c
from tests.support import clean_environment, wait_until

DATA = pathlib.Path(__file__).parent / "data"
NOW = 1_763_000_000.5  # exact in binary, so that a stored time comes back equal


def task(task_id="t1", **fields):
    return c.Task(**{"id": task_id, "name": f"name of {task_id}", "agent": c.AgentConfig(instructions="x"), **fields})


def run_of(task_id, execution_id, **fields):
    return c.Execution(id=execution_id, task_id=task_id, **fields)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "claudomator.db")


@pytest.fixture
def store(path):
    """Without a loop: each operation is a transaction of its own."""
    store = c.Store(path, clock=lambda: NOW)
    yield store
    store.close()


def in_loop(path, body):
    """Run ``body(store)`` in an event loop that the store is attached to."""
    async def main():
        store = c.Store(path, clock=lambda: NOW)
        store.attach(asyncio.get_running_loop())
        try:
            return await asyncio.wait_for(body(store), 20)
        finally:
            store.close()
            await asyncio.sleep(0)
    return asyncio.run(main())


def dump(path):
    """Everything in a database, as SQL."""
    db = sqlite3.connect(path)
    try:
        pragmas = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id")]
        return [*pragmas, *db.iterdump()]
    finally:
        db.close()


def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


# Records


FULL_TASK = dict(
    name="näme \"quoted\" \u2028", description="'; DROP TABLE tasks; --", agent=c.AgentConfig(
        type="claude", model="sonnet", instructions="do\nit", project_dir="/srv/x", isolation="sandbox",
        max_budget_usd=1.25, permission_mode="plan", allowed_tools=("Bash", "Read"), disallowed_tools=("Edit",),
        context_files=("/a", "/b"), system_prompt_append="be brief", additional_args=("--x", "y z"), skip_planning=True,
        temperature=0.0, max_tokens=7),
    timeout_s=66.24, stall_timeout_s=0.0, priority="high", tags=("ci", "ä"), start_at=NOW + 1,
    depends_on=(c.Dependency(task="a"), c.Dependency(task="b", on="any")),
    retry=c.RetryPolicy(max_attempts=3, backoff="list", delays_s=(1.0, 90.0)), verify="make test", verify_rounds=5,
    acceptance_criteria="works", auto_accept=True, idempotency_key="key", parent_task_id="parent", project="shop",
    story_id="story", state="READY", reason="agent_error", detail="why", question={"text": "?", "options": ["a"]},
    summary="did it", rejection_comment="no", not_before=NOW + 2.25, attempts=2, free_tries=3, idle_runs=2, round=4,
    resume={"session_id": "s", "kind": "answer"}, execution_id="e1")
FULL_EXECUTION = dict(
    status="FAILED", start_time=NOW, end_time=NOW + 0.125, exit_code=-9, reason="stalled", detail="silent",
    cost_usd=0.1 + 0.2, tokens_in=2 ** 53, tokens_out=0, session_id="s", sandbox_dir="/tmp/s",
    changestats={"files_changed": 1, "insertions": 2, "deletions": 3}, commits=({"hash": "abc", "message": "m"},),
    summary="sum", agent="claude", model="opus", round=2, pid=4711, pid_start=12345678, boot_id="boot", timeout_s=900.57,
    branch="main", start_head="cafe", source="/srv/x", pushed_branch="main", stop_reason="stalled",
    stdout_path="/d/stdout.log", stderr_path="/d/stderr.log", artifact_dir="/d")


def test_every_field_of_a_task_comes_back_as_it_was_stored(store):
    assert set(FULL_TASK) == set(c.Task._fields) - {"id", "seq", "created_at", "updated_at"}
    assert all(FULL_TASK[name] != default for name, default in c.Task._defaults.items() if name in FULL_TASK)
    stored = store.insert_task(task(**FULL_TASK))
    assert stored == task(**FULL_TASK, seq=1, created_at=NOW, updated_at=NOW)
    assert store.get_task("t1") == stored


def test_every_field_of_an_execution_comes_back_as_it_was_stored(store):
    assert set(FULL_EXECUTION) == set(c.Execution._fields) - {"id", "task_id", "seq"}
    stored = store.insert_execution(run_of("t1", "e1", **FULL_EXECUTION))
    assert stored == run_of("t1", "e1", seq=1, **FULL_EXECUTION)
    assert store.get_execution("e1") == stored


def test_a_task_and_an_execution_with_defaults_only_come_back_equal(store):
    assert store.get_task("t1") if store.insert_task(task()) else None == task(seq=1, created_at=NOW, updated_at=NOW)
    assert store.get_task("t1").stall_timeout_s is None
    stored = store.insert_execution(run_of("t1", "e1"))
    assert store.get_execution("e1") == stored and stored.cost_usd is None and stored.tokens_in is None


def test_each_field_can_be_changed_alone(store):
    before = store.insert_task(task())
    for name in FULL_TASK:
        changed = store.update_task("t1", **{name: FULL_TASK[name]})
        assert changed == before.replace(**{name: FULL_TASK[name]}), name
        assert store.update_task("t1", **{name: before.__dict__[name]}) == before, name
    before = store.insert_execution(run_of("t1", "e1"))
    for name in FULL_EXECUTION:
        changed = store.update_execution("e1", **{name: FULL_EXECUTION[name]})
        assert changed == before.replace(**{name: FULL_EXECUTION[name]}), name
        assert store.update_execution("e1", **{name: before.__dict__[name]}) == before, name


def test_a_change_to_what_does_not_exist_is_not_found(store):
    for change in (lambda: store.update_task("nix", detail="x"), lambda: store.update_execution("nix", detail="x"),
                   lambda: store.move_task("nix", c.QUEUED), lambda: store.get_task("nix"),
                   lambda: store.get_execution("nix")):
        with pytest.raises(c.NotFound, match="nix"):
            change()
    assert store.find_task("nix") is None and store.last_execution(task(execution_id="nix")) is None


def test_an_idempotency_key_is_unique_and_no_key_is_not(store):
    store.insert_task(task("a", idempotency_key="k"))
    store.insert_task(task("b"))
    store.insert_task(task("c"))
    with pytest.raises(sqlite3.IntegrityError):
        store.insert_task(task("d", idempotency_key="k"))
    assert store.task_by_key("k").id == "a" and store.task_by_key("other") is None
    assert store.insert_task(task("d")).id == "d" and store.counts() == {"PENDING": 4}


# Moves


@pytest.mark.parametrize("old", c.STATES)
def test_a_move_happens_where_the_table_allows_it_and_changes_nothing_elsewhere(path, old):
    times = itertools.count(1)
    store = c.Store(path, clock=lambda: float(next(times)))
    for new in c.STATES:
        before = store.insert_task(task(new, state=old))
        if new in c.MOVES[old]:
            moved = store.move_task(new, new, reason="agent_error", attempts=2)
            assert moved == before.replace(state=new, reason="agent_error", attempts=2, updated_at=before.updated_at + 1)
            assert moved == store.get_task(new)
        else:
            with pytest.raises(c.WrongState, match=f"is {old}; this needs {c.sources_of(new)[0]}") as caught:
                store.move_task(new, new, reason="agent_error", attempts=2)
            assert store.get_task(new) == before and caught.value.data["state"] == old
    assert store.counts() == {**{new: 1 for new in c.MOVES[old]}, old: len(c.STATES) - len(c.MOVES[old])}
    store.close()


def test_only_from_narrows_the_table_and_never_widens_it(store):
    store.insert_task(task(state=c.FAILED))
    with pytest.raises(c.WrongState, match="is FAILED; this needs PENDING") as caught:
        store.move_task("t1", c.QUEUED, only_from=(c.PENDING,))
    assert caught.value.data["state"] == c.FAILED
    with pytest.raises(c.WrongState):
        store.move_task("t1", c.RUNNING, only_from=(c.FAILED,))
    assert store.get_task("t1").state == c.FAILED


def test_of_two_callers_with_connections_of_their_own_exactly_one_wins_each_move(path):
    rounds, wins = 40, []
    stores = [c.Store(path), c.Store(path)]
    for number in range(rounds):
        stores[0].insert_task(task(f"t{number}", state=c.QUEUED))
    barrier = threading.Barrier(2)

    def claim(store, name):
        for number in range(rounds):
            barrier.wait(10)
            try:
                store.move_task(f"t{number}", c.RUNNING, execution_id=name)
                wins.append((number, name))
            except c.WrongState:
                pass
    threads = [threading.Thread(target=claim, args=(store, name)) for store, name in zip(stores, "ab")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(number for number, _ in wins) == list(range(rounds))
    assert {(number, stores[0].get_task(f"t{number}").execution_id) for number in range(rounds)} == set(wins)
    assert stores[1].counts() == {c.RUNNING: rounds}
    for store in stores:
        store.close()


def test_of_two_callers_in_one_tick_the_second_is_told_the_state(path):
    async def body(store):
        store.insert_task(task(state=c.QUEUED))
        store.move_task("t1", c.RUNNING)
        with pytest.raises(c.WrongState, match="RUNNING"):
            store.move_task("t1", c.RUNNING)
        await store.durable()
        return store.get_task("t1").state
    assert in_loop(path, body) == c.RUNNING


def test_counts_equal_a_count_after_any_operations(store):
    rng, ids = random.Random(13), []
    for step in range(400):
        what = rng.random()
        try:
            with store.atomic():
                if what < 0.4 or not ids:
                    ids.append(f"t{step}")
                    store.insert_task(task(ids[-1], state=rng.choice(c.STATES)))
                elif what < 0.5:
                    store.delete_task(ids.pop(rng.randrange(len(ids))))
                else:
                    store.move_task(rng.choice(ids), rng.choice(c.STATES))
                if rng.random() < 0.1:
                    undone = ids[:]
                    raise ZeroDivisionError
        except c.WrongState:
            pass
        except ZeroDivisionError:
            present = {row[0] for row in store._rows("SELECT id FROM tasks")}
            ids = [name for name in dict.fromkeys([*undone, *present]) if name in present]
    counted = dict(store._rows("SELECT state, count(*) FROM tasks GROUP BY state"))
    assert store.counts() == counted and len(counted) == len(c.STATES)


# Events and operations that are undone


def test_an_event_is_published_after_the_commit_with_all_it_says(store):
    seen = []
    store.on_events = seen.extend
    with store.atomic():
        store.append_event("task.created", "t1", "e1", name="ä", nested={"a": [1]})
        assert seen == [] and store.events_since(0) == [] and store.published_seq == 0
    expected = {"seq": 1, "time": c.format_time(NOW), "kind": "task.created", "task_id": "t1", "execution_id": "e1",
                "name": "ä", "nested": {"a": [1]}}
    assert seen == [expected] == store.events_since(0) and store.published_seq == 1


def test_an_event_of_an_undone_operation_is_neither_stored_nor_published(store):
    seen = []
    store.on_events = seen.extend
    with pytest.raises(ZeroDivisionError):
        with store.atomic():
            store.append_event("lost")
            raise ZeroDivisionError
    store.append_event("kept")
    assert [event["kind"] for event in seen] == ["kept"] and [seen[0]["seq"]] == [1]
    assert store.events_since(0) == seen


def fail_inside(store, caught):
    """An operation in another fails; ``caught``: on the way, so that the outer one ends as if all were well."""
    with store.atomic():
        store.insert_task(task("outer"))
        store.append_event("before")
        store.after(lambda: pytest.fail("a hook of an operation that failed"))
        with pytest.raises(ZeroDivisionError) if caught else nullcontext():
            with store.atomic():
                with store.atomic():
                    store.insert_task(task("innermost"))
                store.append_event("inner")
                raise ZeroDivisionError


@pytest.mark.parametrize("caught, error", [(False, ZeroDivisionError), (True, RuntimeError)])
def test_an_inner_failure_undoes_the_whole_operation_and_nothing_else(store, caught, error):
    seen, hooks = [], []
    store.on_events = seen.extend
    store.insert_task(task("earlier"))
    with pytest.raises(error):
        fail_inside(store, caught)
    with store.atomic():
        with store.atomic():
            store.insert_task(task("next"))
            store.append_event("next")
            store.after(lambda: hooks.append("next"))
        assert hooks == [] and seen == []
    assert hooks == ["next"]
    assert [(event["kind"], event["seq"]) for event in seen] == [("next", 1)]
    assert [found.id for found in store.list_tasks()] == ["next", "earlier"]


def test_a_hook_runs_in_the_tick_and_its_own_writes_and_hooks_count(path):
    async def body(store):
        order = []

        def first():
            order.append("first")
            with store.atomic():
                store.insert_task(task("by-hook"))
                store.after(lambda: order.append("second"))
        with store.atomic():
            store.after(first)
            assert order == []
        assert order == ["first", "second"]
        await store.durable()
    in_loop(path, body)
    again = c.Store(path)
    assert [found.id for found in again.list_tasks()] == ["by-hook"]
    again.close()


def test_a_statement_that_a_constraint_refuses_leaves_the_rest_of_the_tick(path):
    async def body(store):
        store.insert_task(task("a", idempotency_key="k"))
        with pytest.raises(sqlite3.IntegrityError):
            with store.atomic():
                store.append_event("undone")
                store.insert_task(task("b", idempotency_key="k"))
        await store.durable()
        return [found.id for found in store.list_tasks()], store.events_since(0)
    assert in_loop(path, body) == (["a"], [])


def test_an_operation_that_fails_as_the_first_of_its_tick_leaves_the_rest_of_the_tick(path):
    async def body(store):
        with pytest.raises(KeyError):
            with store.atomic():
                store.insert_task(task("undone"))
                store.append_event("undone")
                raise KeyError
        store.append_event("first")
        with pytest.raises(KeyError):
            with store.atomic():
                store.insert_task(task("undone too"))
                store.append_event("undone too")
                raise KeyError
        with store.atomic():
            store.insert_task(task("stays"))
            store.append_event("second")
        await store.durable()
        return [found.id for found in store.list_tasks()], [(event["seq"], event["kind"]) for event in store.events_since(0)]
    assert in_loop(path, body) == (["stays"], [(1, "first"), (2, "second")])


def test_log_events_are_counted_before_and_after_their_commit(path):
    async def body(store):
        run = store.insert_execution(run_of("t", "e"))
        for kind, execution_id in (("agent.limit", "e"), ("agent.limit", "other"), ("task.state", "e"), ("agent.x", "e")):
            store.append_event(kind, "t", execution_id)
        before = store.count_log_events(run)
        await store.durable()
        return before, store.count_log_events(run)
    assert in_loop(path, body) == (2, 2)


def test_events_are_paged_by_sequence_number_and_by_task(store):
    for number in range(1, 31):
        store.append_event("k", f"t{number % 3}", number=number)
    numbers = lambda events: [event["number"] for event in events]
    assert numbers(store.events_since(0, 10)) == list(range(1, 11))
    assert numbers(store.events_since(25)) == [26, 27, 28, 29, 30]
    assert numbers(store.events_since(0, 4, "t0")) == [3, 6, 9, 12]
    assert numbers(store.events_since(12, 4, "t0")) == [15, 18, 21, 24]
    assert store.events_since(30) == [] and store.events_since(0, 10, "other") == []


def test_sequence_numbers_of_events_go_on_after_all_were_pruned(path):
    store = c.Store(path, clock=lambda: NOW)
    for _ in range(3):
        store.append_event("k")
    assert store.prune_events(NOW + 1, 100) == 3
    store.close()
    store = c.Store(path, clock=lambda: NOW)
    store.append_event("k")
    assert store.events_since(3)[0]["seq"] == 4
    store.close()


# Group commit and durability


def statements_of(store):
    seen = []
    store._db.set_trace_callback(seen.append)
    return seen


def test_all_writes_of_one_tick_are_one_transaction(path):
    async def body(store):
        seen = statements_of(store)
        for number in range(100):
            with store.atomic():
                store.insert_task(task(f"t{number}"))
                store.append_event("task.created", f"t{number}")
        await store.durable()
        ends = [text for text in seen if text.split()[0] in ("BEGIN", "COMMIT")]
        assert ends == ["BEGIN IMMEDIATE", "COMMIT"]
        del seen[:]
        store.insert_task(task("later"))
        await store.durable()
        assert [text for text in seen if text.split()[0] in ("BEGIN", "COMMIT")] == ends
        return store.counts()
    assert in_loop(path, body) == {"PENDING": 101}


class SlowDisk:
    """Stands between the program and the real ``fdatasync``: counts, waits while ``gate`` is closed, fails on demand."""

    def __init__(self, monkeypatch):
        self.count, self.gate, self.entered, self.error = 0, threading.Event(), threading.Event(), None
        self.gate.set()
        real = os.fdatasync

        def fdatasync(descriptor):
            self.count += 1
            self.entered.set()
            assert self.gate.wait(10)
            if self.error:
                raise self.error
            real(descriptor)
        monkeypatch.setattr(os, "fdatasync", fdatasync)


def test_a_write_is_acknowledged_and_its_events_published_only_after_the_sync(path, monkeypatch):
    disk = SlowDisk(monkeypatch)

    async def body(store):
        seen = []
        store.on_events = seen.extend
        disk.gate.clear()
        store.append_event("k")
        waiter = asyncio.ensure_future(store.durable())
        while not disk.entered.is_set():
            await asyncio.sleep(0.001)
        late = asyncio.ensure_future(store.durable())  # committed, being synced: shares that sync
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiter.done() and not late.done() and seen == [] and store.events_since(0) == []
        disk.gate.set()
        await asyncio.gather(waiter, late)
        assert [event["kind"] for event in seen] == ["k"] and store.published_seq == 1
        await store.durable()  # nothing written: nothing to wait for
        return disk.count
    assert in_loop(path, body) == 1


def test_writes_that_come_during_a_sync_share_the_next_one(path, monkeypatch):
    disk = SlowDisk(monkeypatch)

    async def body(store):
        disk.gate.clear()
        waiters = []
        for number in range(30):
            store.insert_task(task(f"t{number}"))
            waiters += [asyncio.ensure_future(store.durable()), asyncio.ensure_future(store.durable())]
            await asyncio.sleep(0)
            while number == 0 and not disk.entered.is_set():
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)  # the last of them is committed too, two turns later
        disk.gate.set()
        await asyncio.gather(*waiters)
        return disk.count
    assert in_loop(path, body) == 2


def test_a_disk_that_failed_to_sync_is_not_believed_again(path, monkeypatch):
    disk = SlowDisk(monkeypatch)

    async def body(store):
        disk.error = OSError(5, "Input/output error")
        for number in range(2):
            store.insert_task(task(f"t{number}"))
            with pytest.raises(c.StorageError, match="did not take.*Input/output error.*restart"):
                await store.durable()
            disk.error = None
    in_loop(path, body)


def test_close_commits_syncs_and_answers_whoever_waits(path):
    async def main():
        store = c.Store(path)
        store.attach(asyncio.get_running_loop())
        store.insert_task(task())
        waiter = store.durable()
        store.close()
        await asyncio.wait_for(waiter, 5)
    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "wal-sync"]
    assert os.listdir(os.path.dirname(path)) == ["claudomator.db"]
    again = c.Store(path)
    assert again.get_task("t1").id == "t1"
    again.close()


WRITER = """
import asyncio, itertools, os, sys
import claudomator as c

async def main(path, prefix):
    store = c.Store(path)
    store.attach(asyncio.get_running_loop())

    async def one(worker):
        for number in itertools.count():
            name = f"{prefix}-{worker}-{number}"
            with store.atomic():
                store.insert_task(c.Task(id=name, name="n", agent=c.AgentConfig(instructions="x"), state="QUEUED"))
                store.append_event("task.created", name)
            await store.durable()
            os.write(1, f"{name} QUEUED\\n".encode())
            with store.atomic():
                store.move_task(name, "RUNNING", execution_id="e" + name)
                store.insert_execution(c.Execution(id="e" + name, task_id=name))
                store.append_event("task.state", name)
            await store.durable()
            os.write(1, f"{name} RUNNING\\n".encode())
    await asyncio.gather(*(one(worker) for worker in range(8)))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged_and_halves_nothing(path, tmp_path):
    rng, acknowledged = random.Random(9), {}
    for number in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path, f"r{number}"], stdout=subprocess.PIPE,
                                   env=clean_environment(tmp_path))
        output, most = [], rng.randrange(20, 400)
        while len(output) < most:
            line = process.stdout.readline()
            assert line, "the writer ended by itself"
            output.append(line)
        process.send_signal(signal.SIGKILL)
        output += process.stdout.readlines()
        process.wait(10)
        process.stdout.close()
        for line in output:
            if line.endswith(b"\n"):
                name, state = line.decode().split()
                acknowledged[name] = state
    assert os.path.getsize(path + "-wal") > 0  # it really was killed
    store = c.Store(path)
    stored = {name: (state, execution) for name, state, execution in
              store._rows("SELECT tasks.id, state, executions.id FROM tasks LEFT JOIN executions ON task_id = tasks.id")}
    events = {}
    for name, count in store._rows("SELECT task_id, count(*) FROM events GROUP BY task_id"):
        events[name] = count
    assert len(acknowledged) > 60
    for name, state in acknowledged.items():
        assert stored[name][0] == "RUNNING" or state == "QUEUED"
    for name, (state, execution) in stored.items():
        assert (execution == "e" + name) == (state == "RUNNING") and events[name] == 1 + (state == "RUNNING")
    assert store._rows("PRAGMA integrity_check") == [("ok",)]
    assert sum(store.counts().values()) == len(stored)
    store.close()


def test_what_is_remembered_of_records_is_what_is_stored(path):
    rng = random.Random(21)

    async def body(store):
        limit, names = store._rows("PRAGMA max_page_count")[0][0], [f"t{number}" for number in range(12)]
        for step in range(250):
            name = rng.choice(names)
            action = rng.choice((
                lambda: store.insert_task(task(name, state=rng.choice(c.STATES))),
                lambda: store.insert_execution(run_of(name, "e" + name, status=rng.choice(c.STATES))),
                lambda: store.move_task(name, rng.choice(c.STATES), reason="agent_error", resume={"kind": str(step)}),
                lambda: store.update_task(name, detail=str(step), tags=(str(step),)),
                lambda: store.update_execution("e" + name, pid=step, commits=({"hash": str(step), "message": ""},)),
                lambda: store.delete_task(name) if rng.random() < 0.2 else store.prune_executions(name, 0)))
            try:
                with store.atomic():
                    action()
                    if rng.random() < 0.1:
                        raise ZeroDivisionError
                if rng.random() < 0.02:
                    store._db.execute(f"PRAGMA max_page_count = {store._rows('PRAGMA page_count')[0][0]}")
                    fill(store)
            except (c.ClaudomatorError, ZeroDivisionError, sqlite3.IntegrityError):
                pass
            store._db.execute(f"PRAGMA max_page_count = {limit}")
            if rng.random() < 0.1:
                await store.durable()
            for found in store._find(c.TASKS, "1"):
                assert store.get_task(found.id) == found
            for found in store._find(c.EXECUTIONS, "1"):
                assert store.get_execution(found.id) == found
            for name in names:
                for table, get, key in (("tasks", store.get_task, name), ("executions", store.get_execution, "e" + name)):
                    if not store._rows(f"SELECT 1 FROM {table} WHERE id = ?", (key,)):
                        with pytest.raises(c.NotFound):
                            get(key)
        return store.last_seq()
    assert in_loop(path, body) > 0


def test_remembered_records_are_bounded(path):
    async def body(store):
        for number in range(c.CACHED_RECORDS + 10):
            store.insert_task(task(f"t{number}"))
            assert len(store._cache) <= c.CACHED_RECORDS
        assert store.get_task("t0").id == "t0"
    in_loop(path, body)


# A disk that refuses


def fill(store, limit=2000):
    """Write large tasks until the disk refuses; returns the error."""
    for number in range(limit):
        try:
            store.insert_task(task(f"big{number}", description="x" * 20_000))
        except c.StorageError as error:
            return error
    raise AssertionError("the disk never got full")


def test_when_the_disk_is_full_the_whole_tick_is_undone_and_everybody_who_waits_is_told(path):
    async def body(store):
        rollbacks, hooks, seen = [], [], []
        store.on_rollback = lambda: rollbacks.append(1)
        store.on_events = seen.extend
        store.insert_task(task("kept"))
        store.append_event("kept")
        await store.durable()
        pages = store._rows("PRAGMA page_count")[0][0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 20}")
        store.insert_task(task("same-tick"))
        store.append_event("undone")
        waiters = [store.durable(), store.durable()]
        with pytest.raises(c.StorageError, match="disk is full.*make room"):
            with store.atomic():
                store.after(lambda: hooks.append(1))
                with store.atomic():
                    raise fill(store)
        for waiter in waiters:
            with pytest.raises(c.StorageError, match="disk is full"):
                await waiter
        assert rollbacks == [1] and hooks == [] and [event["kind"] for event in seen] == ["kept"]
        assert [found.id for found in store.list_tasks()] == ["kept"] and store.counts() == {"PENDING": 1}
        store.append_event("small")  # what still fits is written
        await store.durable()
        store._db.execute("PRAGMA max_page_count = 1000000")
        store.insert_task(task("later", description="x" * 100_000))
        await store.durable()
        assert [event["kind"] for event in seen] == ["kept", "small"] and rollbacks == [1]
        assert store._rows("PRAGMA integrity_check") == [("ok",)]
        return sorted(found.id for found in store.list_tasks())
    assert in_loop(path, body) == ["kept", "later"]


def test_without_a_loop_a_full_disk_undoes_the_operation_and_the_next_one_works(store):
    store.insert_task(task("kept"))
    store._db.execute(f"PRAGMA max_page_count = {store._rows('PRAGMA page_count')[0][0] + 20}")
    assert "make room" in str(fill(store))
    with pytest.raises(c.StorageError):
        with store.atomic():
            store.insert_task(task("undone"))
            store.insert_task(task("too-big", description="x" * 1_000_000))
    assert store.find_task("undone") is None and store.find_task("too-big") is None
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.insert_task(task("later")) and store.get_task("kept")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, which needs root."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own needs root and mount(8)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_really_full_file_system_fails_the_write_and_recovers(small_disk):
    async def body(store):
        rollbacks, stored, failed = [], [], []
        store.on_rollback = lambda: rollbacks.append(1)
        for number in range(200):
            store.insert_task(task(f"t{number}", description="x" * 8000))
            try:
                await store.durable()
                stored.append(f"t{number}")
            except c.StorageError as error:
                failed.append(error)
                if len(failed) == 3:
                    break
        assert "could not be written" in str(failed[0]) and "make room" in str(failed[0])
        assert len(rollbacks) == 3
        assert sorted(found.id for found in store.list_tasks(limit=1000)) == sorted(stored)
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        store.insert_task(task("later"))
        await store.durable()
        assert store._rows("PRAGMA integrity_check") == [("ok",)]
        return stored
    stored = in_loop(str(small_disk / "claudomator.db"), body)
    again = c.Store(str(small_disk / "claudomator.db"))
    assert sorted(found.id for found in again.list_tasks(limit=1000)) == sorted([*stored, "later"])
    again.close()


def test_while_another_program_holds_the_lock_reads_go_on_and_writes_say_so(path):
    async def body(store):
        store.insert_task(task("a"))
        await store.durable()
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        store._db.execute("PRAGMA busy_timeout = 20")
        assert store.get_task("a").id == "a" and len(store.list_tasks()) == 1
        with pytest.raises(c.StorageError, match="another program is writing"):
            store.insert_task(task("b"))
        with pytest.raises(c.StorageError):
            with store.atomic():
                pass
        other.execute("ROLLBACK")
        other.close()
        store.insert_task(task("b"))
        await store.durable()
        return len(store.list_tasks())
    assert in_loop(path, body) == 2


def test_a_second_connection_reads_what_is_committed_and_not_what_is_under_way(path):
    async def body(store):
        store.insert_task(task("a"))
        await store.durable()
        store.insert_task(task("b"))
        reader = c.Store(path, readonly=True)
        seen = [found.id for found in reader.list_tasks()]
        await store.durable()
        seen.append([found.id for found in reader.list_tasks()])
        with pytest.raises(c.StorageError, match="readonly"):
            reader.insert_task(task("c"))
        reader.close()
        return seen
    assert in_loop(path, body) == ["a", ["b", "a"]]


def test_damage_that_shows_later_is_a_storage_error_and_no_driver_error(path):
    store = c.Store(path)
    for number in range(200):
        store.insert_task(task(f"t{number:03}", description="x" * 300))
    root = store._rows("SELECT rootpage FROM sqlite_master WHERE name = 'tasks_claim'")[0][0]
    store.close()
    with open(path, "r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)
    store = c.Store(path)
    with pytest.raises(c.StorageError, match="could not be read.*malformed"):
        store.queued_page()
    store.close()


# Migrations


def go_database(path, alters=None):
    """A database of the Go server; ``alters`` of its ALTERs, by default all, and then with the late columns filled."""
    schema = [line for line in (DATA / "go/schema.sql").read_text().splitlines() if line and not line.startswith("--")]
    added = [line for line in schema if line.startswith("ALTER")]
    db = sqlite3.connect(path)
    db.executescript("\n".join([*(line for line in schema if line not in added), (DATA / "go/rows.sql").read_text(),
                                *added[:alters]]))
    if alters is None:
        db.executescript((DATA / "go/rows_late.sql").read_text())
    db.close()


def go_id(number):
    return f"0000000{number}-aaaa-4000-8000-00000000000{number}"


def test_an_empty_file_and_no_file_become_a_database_that_only_its_user_reads(tmp_path):
    (tmp_path / "empty.db").touch()
    for name in ("new.db", "empty.db"):
        store = c.Store(str(tmp_path / name))
        assert store._rows("PRAGMA user_version") == [(c.SCHEMA_VERSION,)]
        assert store._rows("PRAGMA application_id") == [(c.APPLICATION_ID,)]
        assert store._rows("PRAGMA journal_mode") == [("wal",)] and store._rows("PRAGMA synchronous") == [(1,)]
        store.insert_task(task())
        store.close()
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o600


def test_a_database_of_the_go_server_is_completed_in_place(path):
    go_database(path)
    store = c.Store(path)
    tasks = {found.name: found for found in store.list_tasks()}
    order = [found.name for found in reversed(store.list_tasks())]
    assert order == ["ancient", "running", "blocked", "queued", "completed", "blocked in words", "failed"]

    queued = tasks["queued"]
    assert queued.agent == c.AgentConfig(
        type="claude", model="sonnet", instructions="mend it", project_dir="/srv/repo", max_budget_usd=1.5,
        permission_mode="bypassPermissions", allowed_tools=("Bash", "Read"), skip_planning=True)
    assert (queued.state, queued.priority, queued.timeout_s, queued.tags) == ("QUEUED", "high", 900.0, ("ci", "auto"))
    assert queued.retry == c.RetryPolicy(max_attempts=3, backoff="linear")
    assert queued.depends_on == (c.Dependency(task=go_id(4)),) and queued.parent_task_id == ""
    assert c.format_db_time(queued.created_at) == "2026-05-13 04:02:20.123457+00:00"
    assert queued.verify_rounds == 2 and queued.round == 1 and queued.execution_id is None and queued.description == ""

    running = tasks["running"]
    assert (running.state, running.reason) == ("FAILED", "lost") and "Go server" in running.detail
    assert running.agent.project_dir == "/srv/old" and running.agent.temperature == 0
    assert running.tags == () == running.depends_on and running.timeout_s is None
    assert c.format_time(running.created_at) == "2026-05-13T04:02:19.500Z"

    blocked = tasks["blocked"]
    assert blocked.question == {"text": "Which one?", "options": ["a", "b"]} and blocked.timeout_s == 1.5
    assert (blocked.project, blocked.story_id, blocked.summary) == ("shop", "story-1", "half done")
    session = store.last_execution(blocked)
    assert session.session_id.startswith("5e550000") and session.sandbox_dir == "/tmp/claudomator-sandbox-1"
    assert session.agent == "gemini" and session.status == "BLOCKED" and session.stderr_path == ""
    assert tasks["blocked in words"].question == {"text": "What now?", "options": []}
    assert tasks["blocked in words"].agent == c.AgentConfig()

    completed = tasks["completed"]
    assert completed.rejection_comment == "not yet" and completed.acceptance_criteria == "it works"
    newest, older = store.executions_of(completed.id)
    assert newest.id == completed.execution_id and newest.commits == ({"hash": "68399a5", "message": "merge"},)
    assert newest.changestats == {"files_changed": 5, "insertions": 127, "deletions": 43}
    assert (newest.cost_usd, newest.tokens_in, newest.tokens_out) == (0.0, 100, 50)  # a local model: really free
    assert (older.cost_usd, older.tokens_in, older.detail) == (0.25, None, "exit status 1")
    assert store.last_execution(tasks["failed"]).cost_usd is None

    ancient = tasks["ancient"]
    assert ancient.priority == "normal" and ancient.created_at == 0.0 and ancient.parent_task_id == go_id(4)

    lost = store.last_execution(running)
    assert (lost.status, lost.reason, lost.exit_code, lost.cost_usd) == ("FAILED", "lost", None, None)
    assert lost.end_time > lost.start_time and store.running_executions() == []
    assert store.counts() == {"BLOCKED": 2, "COMPLETED": 1, "FAILED": 2, "PENDING": 1, "QUEUED": 1}
    assert [found.name for found in store.queued_page()] == ["queued"]
    assert store.insert_task(task()).seq == 8 and store.insert_execution(run_of("t1", "e1")).seq == 6
    assert store._rows('SELECT "of another" FROM tasks ORDER BY seq') == [(None,)] * 3 + [("kept",)] + [(None,)] * 4
    assert store._rows("SELECT * FROM go_settings") == [("vapid_public_key", "BPc")]
    store.put_setting("holds", {"paused": True})
    assert store.get_setting("holds") == {"paused": True} and store._rows("SELECT * FROM projects") == []
    for found in store.list_tasks():
        assert json.loads(c.format_json(c.task_to_json(found, store.last_execution(found), 900.0)))["id"] == found.id
    store.close()


GO_ALTERS = (DATA / "go/schema.sql").read_text().count("\nALTER")


@pytest.mark.parametrize("alters", range(GO_ALTERS + 1))
def test_any_older_schema_of_the_go_server_is_completed_too(path, alters):
    go_database(path, alters)
    store = c.Store(path)
    assert store.counts() == {"BLOCKED": 2, "COMPLETED": 1, "FAILED": 2, "PENDING": 1, "QUEUED": 1}
    assert store.get_task(go_id(1)).timeout_s == 900.0 and store.get_task(go_id(2)).reason == "lost"
    assert store.update_task(go_id(1), **{**FULL_TASK, "state": "QUEUED"}).summary == "did it"
    assert store.update_execution("e0000003-bbbb-4000-8000-000000000003", **FULL_EXECUTION).tokens_in == 2 ** 53
    store.close()


def test_opening_again_changes_nothing(path):
    go_database(path)
    c.Store(path).close()
    before = dump(path)
    c.Store(path).close()
    c.Store(path, readonly=True).close()
    assert dump(path) == before


class Interrupted:
    """A connection on which the statement of the given number fails, as if the process ended there."""

    def __init__(self, db, fail_at):
        self._db, self.count, self._fail_at = db, 0, fail_at

    def execute(self, sql, values=()):
        self.count += 1
        if self.count == self._fail_at:
            raise KeyboardInterrupt
        return self._db.execute(sql, values)

    def __enter__(self):
        return self._db.__enter__()

    def __exit__(self, *error):
        return self._db.__exit__(*error)


def plain(text_lines):
    """A dump without the times at which rows were found to be lost."""
    return [re.sub(r"'20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}000\+00:00'", "'now'", str(line)) for line in text_lines]


@pytest.mark.slow
def test_a_migration_that_ends_at_any_statement_has_changed_nothing_or_a_whole_step(tmp_path):
    origin, whole = str(tmp_path / "go.db"), str(tmp_path / "whole.db")
    go_database(origin)
    shutil.copy(origin, whole)
    db = sqlite3.connect(whole, isolation_level=None)
    counter = Interrupted(db, -1)
    c.migrate(counter)
    db.close()
    states, between = {0: dump(origin), 3: plain(dump(whole))}, str(tmp_path / "between.db")
    shutil.copy(origin, between)
    db = sqlite3.connect(between, isolation_level=None)
    with db:
        c._migrate_2(db)
        db.execute("PRAGMA user_version = 2")
    db.close()
    states[2] = plain(dump(between))
    reached = set()
    for fail_at in range(1, counter.count + 1):
        copy = str(tmp_path / "copy.db")
        shutil.copy(origin, copy)
        db = sqlite3.connect(copy, isolation_level=None)
        with pytest.raises(KeyboardInterrupt):
            c.migrate(Interrupted(db, fail_at))
        assert not db.in_transaction
        db.close()
        found = dump(copy)
        found = plain(found) if found[0] else found
        reached.add(int(found[0]))
        assert found == states[int(found[0])]
        if fail_at % 7 == 0:
            c.Store(copy).close()
            assert plain(dump(copy)) == states[3]
    assert reached == {0, 2} and counter.count > 40


def vm_steps(db, call):
    """How much work SQLite did, in thousands of its instructions."""
    steps = []
    db.set_progress_handler(lambda: steps.append(1), 1000)
    call()
    db.set_progress_handler(None, 0)
    return len(steps)


def test_the_work_of_a_migration_grows_with_the_rows_and_not_with_their_square(tmp_path):
    work = []
    for count in (1000, 4000):
        path = str(tmp_path / f"{count}.db")
        go_database(path)
        db = sqlite3.connect(path, isolation_level=None)
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
        db.execute(f"{numbers} INSERT INTO tasks (id, name, config_json, priority, timeout_ns, retry_json, tags_json,"
                   " depends_on_json, state, created_at, updated_at) SELECT 't' || i, 'n', '{}', 'low', 0, '{}', 'null',"
                   " 'null', 'COMPLETED', '2026-05-13 04:02:20+00:00', '' FROM n")
        db.execute(f"{numbers} INSERT INTO executions (id, task_id, start_time, end_time, status)"
                   " SELECT 'e' || i, 't' || i, '2026-05-13 04:02:20+00:00', '', 'COMPLETED' FROM n")
        work.append(vm_steps(db, lambda: c.migrate(db)))
        assert db.execute("SELECT count(*) FROM tasks WHERE execution_id = 'e' || substr(id, 2)").fetchone()[0] == count
        db.close()
    assert work[1] < 6 * work[0]


FROZEN_TASKS = [task("frozen-1", **FULL_TASK), task("frozen-2"), task("frozen-3", state=c.RUNNING, execution_id="e2")]
FROZEN_EXECUTIONS = [run_of("frozen-1", "e1", **FULL_EXECUTION), run_of("frozen-3", "e2", start_time=NOW)]


def write_frozen(path):
    """How tests/data/frozen_vN.db came to be: once for each schema version, before it is released."""
    store = c.Store(path, clock=lambda: NOW)
    for found in FROZEN_TASKS:
        store.insert_task(found)
    for execution in FROZEN_EXECUTIONS:
        store.insert_execution(execution)
    store.append_event("task.created", "frozen-1", "e1", name="n")
    store.put_setting("holds", {"paused": True, "kinds": ["claude"], "projects": []})
    store.park_agent("claude", NOW + 60, "quota_exhausted", "until later")
    store.put_health("shell", c.Health(6, NOW + 120, "api_error: down"))
    store.add_spending("2025-11-13", "claude", "shop", c.Spent(0.25, 900, 1, 2.5, 0, 0))
    store._db.execute("VACUUM")
    store.close()


@pytest.mark.parametrize("version", range(2, c.SCHEMA_VERSION + 1))
def test_a_frozen_database_of_each_released_version_opens_and_its_rows_read_as_written(path, version):
    shutil.copyfile(DATA / f"frozen_v{version}.db", path)
    assert dump(path)[:2] == [version, c.APPLICATION_ID]
    store = c.Store(path)
    stored = [found.replace(seq=seq, created_at=NOW, updated_at=NOW, idle_runs=found.idle_runs if version > 2 else 0)
              for seq, found in enumerate(FROZEN_TASKS, 1)]
    assert store.list_tasks() == stored[::-1]
    assert [store.get_execution(run.id) for run in FROZEN_EXECUTIONS] == [
        run.replace(seq=seq) for seq, run in enumerate(FROZEN_EXECUTIONS, 1)]
    assert store.events_since(0) == [{"seq": 1, "time": c.format_time(NOW), "kind": "task.created", "name": "n",
                                      "task_id": "frozen-1", "execution_id": "e1"}]
    assert store.get_setting("holds") == {"paused": True, "kinds": ["claude"], "projects": []}
    assert store.parked_agents() == {"claude": {"until": NOW + 60, "reason": "quota_exhausted", "detail": "until later"}}
    later = version > 2
    assert store.agent_health() == ({"shell": c.Health(6, NOW + 120, "api_error: down")} if later else {})
    assert store.spending("2025-11-13") == ([("claude", "shop", c.Spent(0.25, 900, 1, 2.5, 0, 0))] if later else [])
    assert store.counts() == {"READY": 1, "PENDING": 1, "RUNNING": 1}
    assert store.running_executions() == [store.get_execution("e2")]
    store.close()


def test_a_database_made_now_equals_the_frozen_one_of_this_version(path, tmp_path):
    write_frozen(path)
    frozen = shutil.copyfile(DATA / f"frozen_v{c.SCHEMA_VERSION}.db", tmp_path / "frozen.db")
    assert dump(path) == dump(frozen)


# Refusals


def refusal(path, **how):
    with pytest.raises(c.StorageError) as caught:
        c.open_database(str(path), **how)
    return str(caught.value)


@pytest.fixture(scope="module")
def healthy_file(tmp_path_factory):
    """A plain file with rows in every table, big enough to have inner pages."""
    path = str(tmp_path_factory.mktemp("healthy") / "claudomator.db")
    store = c.Store(path)
    with store.atomic():
        for number in range(300):
            store.insert_task(task(f"t{number}", description="x" * 200))
            store.insert_execution(run_of(f"t{number}", f"e{number}"))
            store.append_event("k", f"t{number}", text="y" * 100)
    store.close()
    return path


@pytest.fixture
def healthy(healthy_file, path):
    return shutil.copy(healthy_file, path)


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def root_page(path, table):
    db = sqlite3.connect(path)
    page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
    db.close()
    return page


DAMAGE = {
    "cut to half": lambda path: os.truncate(path, os.path.getsize(path) // 8192 * 4096),
    "cut to its first page": lambda path: os.truncate(path, 4096),
    "cut within its header": lambda path: os.truncate(path, 60),
    "garbage at the start": lambda path: overwrite(path, 0, b"garbage!" * 4),
    "garbage all over": lambda path: overwrite(path, 0, random.Random(1).randbytes(os.path.getsize(path))),
    "zeros all over": lambda path: overwrite(path, 0, bytes(os.path.getsize(path))),
    "garbage in the schema": lambda path: overwrite(path, 100, random.Random(2).randbytes(3996)),
    "a text file": lambda path: pathlib.Path(path).write_text("name: a task file?\n" * 500),
    **{f"the root of {table} overwritten": lambda path, table=table: overwrite(
        path, (root_page(path, table) - 1) * 4096, b"\xa5" * 4096) for table in ("tasks", "executions", "events")},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_advice_and_stays_as_it_is(healthy, damage):
    DAMAGE[damage](healthy)
    before = sha256(healthy)
    for readonly in (False, True):
        said = refusal(healthy, readonly=readonly)
        assert healthy in said and "restore a backup" in said
        assert sha256(healthy) == before
    assert not os.path.exists(healthy + "-wal") or os.path.getsize(healthy + "-wal") == 0


def test_an_empty_log_that_was_left_over_is_no_obstacle(healthy):
    pathlib.Path(healthy + "-wal").touch()
    store = c.Store(healthy)
    assert sum(store.counts().values()) == 300
    store.close()


@pytest.mark.parametrize("leave", [lambda path: os.unlink(path), lambda path: os.truncate(path, 0)])
def test_a_log_without_its_database_is_never_started_clean_over(healthy, leave):
    wal = pathlib.Path(healthy + "-wal")
    wal.write_bytes(b"\x37\x7f\x06\x82" + bytes(5000))
    leave(healthy)
    assert "write-ahead log" in refusal(healthy) and wal.stat().st_size == 5004
    assert "no database" in refusal(healthy, readonly=True)


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_database_of_a_newer_version_is_refused_and_stays_as_it_is(healthy, mode):
    db = sqlite3.connect(healthy, isolation_level=None)
    db.execute(f"PRAGMA journal_mode = {mode}")
    db.execute("PRAGMA user_version = 99")
    keep = {end: pathlib.Path(healthy + end).read_bytes() for end in ("", "-wal") if os.path.exists(healthy + end)}
    db.close()
    for end, data in keep.items():  # as kill -9 leaves them
        pathlib.Path(healthy + end).write_bytes(data)
    for readonly in (False, True):
        assert "version 99" in refusal(healthy, readonly=readonly)
    assert {end: pathlib.Path(healthy + end).read_bytes() for end in keep} == keep and ("-wal" in keep) == (mode == "WAL")


def test_a_database_of_another_program_is_refused_and_stays_as_it_is(path):
    for statements in (["PRAGMA application_id = 7"], ["PRAGMA user_version = 1"]):
        db = sqlite3.connect(path, isolation_level=None)
        for statement in ("CREATE TABLE IF NOT EXISTS moz_places (id INTEGER)", *statements):
            db.execute(statement)
        db.close()
        before = sha256(path)
        assert "another program" in refusal(path) and sha256(path) == before
        os.unlink(path)


def test_a_write_that_a_killed_go_server_had_begun_is_undone_first(path, tmp_path):
    go_database(path)
    killed = str(tmp_path / "killed.db")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA cache_size = 1")
    db.execute("PRAGMA cache_spill = 1")
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE tasks SET name = 'half'")
    for number in range(200):
        db.execute("INSERT INTO agent_events VALUES (?, 'a', 'e', '', '', ?)", (number, "x" * 1000))
    shutil.copy(path, killed)
    shutil.copy(path + "-journal", killed + "-journal")
    db.execute("ROLLBACK")
    db.close()
    store = c.Store(killed)
    assert store.get_task(go_id(1)).name == "queued" and store._rows("SELECT count(*) FROM agent_events") == [(0,)]
    store.close()


def test_a_directory_in_its_place_is_refused(path):
    os.mkdir(path)
    assert path in refusal(path) and os.path.isdir(path)
    assert path in refusal(path, readonly=True)


REFUSED = """
import os, queue, sqlite3, sys, threading
import claudomator as c
if not os.geteuid():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    c.Store(sys.argv[1])
except c.StorageError as error:
    print(error)
"""


def test_a_file_that_may_not_be_read_is_refused():
    directory = tempfile.mkdtemp()
    path = os.path.join(directory, "claudomator.db")
    try:
        c.Store(path).close()
        before = sha256(path)
        os.chmod(directory, 0o755)
        os.chmod(path, 0)
        done = subprocess.run([sys.executable, "-c", REFUSED, path], capture_output=True, text=True, cwd="/",
                              env=clean_environment(directory))
        assert "cannot open the database" in done.stdout and path in done.stdout, done.stderr
        os.chmod(path, 0o600)
        assert sha256(path) == before
    finally:
        shutil.rmtree(directory)


def test_read_only_needs_a_migrated_database_and_writes_nothing(path):
    assert "no database" in refusal(path, readonly=True) and not os.path.exists(path)
    go_database(path)
    before = sha256(path)
    assert "start the daemon" in refusal(path, readonly=True) and sha256(path) == before
    c.Store(path).close()
    before = sha256(path)
    store = c.Store(path, readonly=True)
    assert len(store.list_tasks()) == 7
    store.close()
    assert sha256(path) == before


def test_any_file_name_is_taken_literally(tmp_path):
    names = ["a?b.db", "a#b.db", "a%41.db", "with space.db", "ä.db"]
    for name in names:
        c.Store(str(tmp_path / name)).close()
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    for name in names:
        c.Store(str(tmp_path / name), readonly=True).close()


# Queries


QUERIES = {  # what is called: the access that each of its statements must have, in order
    "queued_page": (lambda s: s.queued_page((1, 5), 10), ["tasks USING INDEX tasks_claim (state=? AND rank=? AND rowid>?)"] * 2),
    "newest of a state": (lambda s: s.list_tasks(states=("FAILED",)), ["tasks USING INDEX tasks_newest (state=?)"]),
    "newest, next page": (lambda s: s.list_tasks(states=("FAILED",), before_seq=9),
                          ["tasks USING INDEX tasks_newest (state=? AND rowid<?)"]),
    "newest of all": (lambda s: s.list_tasks(before_seq=9), ["tasks USING INTEGER PRIMARY KEY (rowid<?)"]),
    "of a parent": (lambda s: s.list_tasks(parent="p"), ["tasks USING INDEX tasks_parent (parent_task_id=?)"]),
    "of a parent and state": (lambda s: s.list_tasks(parent="p", states=("FAILED",), before_seq=7),
                              ["tasks USING INDEX tasks_parent (parent_task_id=? AND rowid<?)"]),
    "oldest_pending": (lambda s: s.oldest_pending(), ["tasks USING INDEX tasks_newest (state=?)"]),
    "subtasks": (lambda s: s.subtasks("p"), ["tasks USING INDEX tasks_parent (parent_task_id=?)"]),
    "open_subtasks": (lambda s: s.open_subtasks("p"), ["tasks USING INDEX tasks_parent (parent_task_id=?)"]),
    "get_task": (lambda s: s.get_task("t1"), ["tasks USING INDEX sqlite_autoindex_tasks_1 (id=?)"]),
    "task_by_key": (lambda s: s.task_by_key("k"), ["tasks USING INDEX tasks_idempotency (idempotency_key=?)"]),
    "task_states": (lambda s: s.task_states(["t1"]), ["tasks USING INDEX sqlite_autoindex_tasks_1 (id=?)"]),
    "resolve_task": (lambda s: s.resolve_task("t1"), ["tasks USING INDEX sqlite_autoindex_tasks_1 (id>? AND id<?)"]),
    "move_task": (lambda s: s.move_task("t1", "QUEUED"), ["tasks USING INDEX sqlite_autoindex_tasks_1 (id=?)"] * 2),
    "update_task": (lambda s: s.update_task("t1", detail="x"),
                    ["tasks USING INDEX sqlite_autoindex_tasks_1 (id=?)"] * 2),
    "counts": (lambda s: s.counts(), ["SCAN state_counts"]),
    "executions_of": (lambda s: s.executions_of("t1"), ["executions USING INDEX executions_task (task_id=?)"]),
    "last_execution": (lambda s: s.last_execution(task(execution_id="e1")),
                       ["executions USING INDEX sqlite_autoindex_executions_1 (id=?)"]),
    "resolve_execution": (lambda s: s.resolve_execution("e1"),
                          ["executions USING INDEX sqlite_autoindex_executions_1 (id>? AND id<?)"]),
    "running_executions": (lambda s: s.running_executions(), ["executions USING INDEX executions_running (status=?)"]),
    "update_execution": (lambda s: s.update_execution("e1", detail="x"),
                         ["executions USING INDEX sqlite_autoindex_executions_1 (id=?)"] * 2),
    "prune_executions": (lambda s: s.prune_executions("t1", 0),
                         ["executions USING INDEX executions_task (task_id=?)",
                          "executions USING INDEX sqlite_autoindex_executions_1 (id=?)"]),
    "ended_before": (lambda s: s.ended_before(NOW, 10), ["executions USING INDEX executions_files (end_time<?)"]),
    "sandbox_users": (lambda s: s.sandbox_users("/x"), ["executions USING INDEX executions_sandbox (sandbox_dir=?)"]),
    "events_since": (lambda s: s.events_since(3), ["events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"]),
    "events_since of a task": (lambda s: s.events_since(3, 10, "t1"),
                               ["events USING INDEX events_task (task_id=? AND rowid>? AND rowid<?)"]),
    "count_log_events": (lambda s: s.count_log_events(run_of("t1", "e1")), ["events USING INDEX events_task (task_id=?)"]),
    "spending": (lambda s: s.spending("2026-11-21"), ["spending USING PRIMARY KEY (day=?)"]),
    "delete_task": (lambda s: s.delete_task("t1"), ["executions USING INDEX executions_task (task_id=?)",
                                                    "tasks USING INDEX sqlite_autoindex_tasks_1 (id=?)"]),
}


def plans_of(store, call):
    """(statement, its plan's lines) of each statement that ``call`` runs and that looks something up."""
    seen = statements_of(store)
    call(store)
    store._db.set_trace_callback(None)
    return [(sql, [row[3] for row in store._rows("EXPLAIN QUERY PLAN " + sql)])
            for sql in dict.fromkeys(seen) if sql.startswith(("SELECT", "UPDATE", "DELETE"))]  # triggers repeat theirs


def test_a_query_of_a_table_that_grows_uses_its_index_and_sorts_nothing(store):
    store.insert_task(task())
    store.insert_execution(run_of("t1", "e1", status="FAILED"))
    for name, (call, expected) in QUERIES.items():
        plans = plans_of(store, call)
        assert len(plans) == len(expected), name
        for (sql, plan), wanted in zip(plans, expected):
            assert len(plan) == 1 and plan[0].replace("COVERING ", "").endswith(wanted), (name, sql, plan)
            assert plan[0].startswith("SEARCH") or "state_counts" in wanted


def test_kept_sandboxes_are_found_and_sorted_without_a_look_at_the_rest(store):
    (sql, plan), = plans_of(store, lambda s: s.kept_sandboxes())
    assert plan == ["SCAN executions USING INDEX executions_sandbox", "USE TEMP B-TREE FOR ORDER BY"]


def test_starting_does_the_same_work_whatever_is_stored(path):
    def work():
        steps = []
        db = sqlite3.connect(path)
        db.set_progress_handler(lambda: steps.append(1), 1)
        c._check_sound(db)
        for table in ("events", "tasks"):
            db.execute(f"SELECT coalesce(max(seq), 0) FROM {table}").fetchone()
        db.close()
        return len(steps)
    store = c.Store(path)
    store.insert_task(task("first"))
    before = work()
    with store.atomic():
        for number in range(2000):
            store.insert_task(task(f"t{number}"))
            store.append_event("k")
    store.close()
    assert work() < before * 1.5


def test_pruning_events_looks_at_no_more_than_its_step(path):
    times = iter(range(100_000))
    store = c.Store(path, clock=lambda: float(next(times)))
    with store.atomic():
        for _ in range(5000):
            store.append_event("k")
    assert vm_steps(store._db, lambda: store.prune_events(-1.0, 50)) <= 2  # none is old enough
    assert store.prune_events(120.0, 100) == 100 and store.prune_events(120.0, 100) == 20
    assert store.prune_events(120.0, 100) == 0 and store.events_since(0, 1)[0]["seq"] == 121
    store.close()


def test_retention_steps_take_the_oldest_ends_and_leave_what_runs(store):
    ends = [5.0, 3.0, None, 1.0, 4.0, 2.0]
    for number, end in enumerate(ends):
        store.insert_execution(run_of("t", f"e{number}", end_time=end, status="FAILED" if end else "RUNNING",
                                      artifact_dir=f"/d/{number}", sandbox_dir=f"/s/{number % 2}" if number else ""))
    found = store.ended_before(4.5, 3)
    assert [execution.end_time for execution in found] == [1.0, 2.0, 3.0]
    for execution in found:
        store.update_execution(execution.id, artifact_dir="")
    assert [execution.end_time for execution in store.ended_before(4.5, 3)] == [4.0]
    assert [execution.end_time for execution in store.kept_sandboxes()] == [4.0, 3.0, 2.0, 1.0]
    assert [execution.end_time for execution in store.kept_sandboxes(limit=1)] == [4.0]
    assert [execution.id for execution in store.sandbox_users("/s/0")] == ["e4", "e2"]
    assert store.sandbox_users("") == []


def test_pruning_keeps_the_newest_ended_executions_of_the_task_and_what_runs(store):
    for number in range(6):
        store.insert_execution(run_of("t", f"e{number}", status="RUNNING" if number == 1 else "FAILED"))
        store.insert_execution(run_of("other", f"o{number}", status="FAILED"))
    assert [execution.id for execution in store.prune_executions("t", 2)] == ["e3", "e2", "e0"]
    assert [execution.id for execution in store.executions_of("t")] == ["e5", "e4", "e1"]
    assert len(store.executions_of("other")) == 6 and len(store.executions_of("other", 4)) == 4


def test_a_prefix_names_the_one_id_that_begins_with_it(store):
    for name in ("abc1", "abc2", "abd", "abd-longer", "x%y"):
        store.insert_task(task(name))
        store.insert_execution(run_of(name, name))
    for resolve in (store.resolve_task, store.resolve_execution):
        assert resolve("abc1") == "abc1" and resolve("x") == "x%y" and resolve("abd") == "abd"
        with pytest.raises(c.NotFound, match=r"several \w+ ids: abc1 .*abc2"):
            resolve("abc")
        for unknown in ("", "zz", "%", "ABC1", "abc1x", "\U0010ffff"):
            with pytest.raises(c.NotFound, match="begins with"):
                resolve(unknown)


def test_lists_filter_and_page_as_a_plain_search_would(store):
    rng, everything = random.Random(4), []
    states, tags, projects, agents = c.STATES[:4], ("ci", "a'b", "ä", "%"), ("", "shop", "shop2"), ("claude", "", "shell")
    with store.atomic():
        for number in range(300):
            everything.append(store.insert_task(task(
                f"t{number}", state=rng.choice(states), tags=tuple(rng.sample(tags, rng.randrange(3))),
                project=rng.choice(projects), parent_task_id=rng.choice(("", "", "p")),
                agent=c.AgentConfig(type=rng.choice(agents), instructions="x"))))
    for _ in range(60):
        asked = {"states": tuple(rng.sample(states, rng.randrange(3))), "tag": rng.choice(("", *tags)),
                 "project": rng.choice(projects), "agent": rng.choice(agents), "parent": rng.choice(("", "", "p"))}
        wanted = [found.id for found in reversed(everything) if
                  (not asked["states"] or found.state in asked["states"]) and (not asked["tag"] or asked["tag"] in found.tags)
                  and asked["project"] in ("", found.project) and asked["agent"] in ("", found.agent.type)
                  and asked["parent"] in ("", found.parent_task_id)]
        pages, before = [], None
        while page := store.list_tasks(**asked, limit=7, before_seq=before):
            assert len(page) <= 7
            pages += [found.id for found in page]
            before = page[-1].seq
        assert pages == wanted, asked
    assert store.list_tasks(limit=0) == [] and len(store.list_tasks()) == 50


def test_the_queue_is_read_in_claim_order_page_by_page(store):
    rng = random.Random(5)
    for number in range(100):
        store.insert_task(task(f"t{number}", priority=rng.choice(("low", "high", "normal")),
                               state=rng.choice((c.QUEUED, c.QUEUED, c.PENDING))))
    queued = [found for found in reversed(store.list_tasks(limit=1000)) if found.state == c.QUEUED]
    wanted = sorted(queued, key=lambda found: (c.PRIORITY_RANK[found.priority], found.seq))
    pages, after = [], (0, 0)
    while page := store.queued_page(after, 9):
        pages += page
        after = (c.PRIORITY_RANK[page[-1].priority], page[-1].seq)
    assert pages == wanted
    store.update_task(wanted[-1].id, priority="high")  # the rank follows
    assert [found.priority for found in store.queued_page()].count("high") == 1 + [
        found.priority for found in wanted].count("high") and store.queued_page()[-1].id != wanted[-1].id
    assert store.oldest_pending() == min((found for found in store.list_tasks(limit=1000) if found.state == c.PENDING),
                                         key=lambda found: found.seq)


def test_small_look_ups(store):
    for name, parent in (("a", ""), ("b", "a"), ("c", "a"), ("d", "b")):
        store.insert_task(task(name, parent_task_id=parent))
    assert [found.id for found in store.subtasks("a")] == ["b", "c"] and store.subtasks("d") == []
    assert store.task_states(["a", "nix"]) == {"a": "PENDING"} and store.last_seq() == 4
    store.insert_execution(run_of("a", "e1"))
    store.insert_execution(run_of("a", "e2", status="FAILED"))
    assert [execution.id for execution in store.running_executions()] == ["e1"]
    store.delete_task("a")
    assert store.find_task("a") is None and store.executions_of("a") == []
    assert store.get_setting("k", 7) == 7
    store.put_setting("k", [1, None])
    store.put_setting("k", {"a": False})
    assert store.get_setting("k", 7) == {"a": False}


def test_an_agent_kind_is_parked_until_a_time_or_until_it_is_unparked(path):
    store = c.Store(path)
    store.park_agent("claude", NOW, "quota_exhausted", "weekly limit")
    store.park_agent("gemini", None, "auth", "log in")
    store.park_agent("claude", NOW + 5, "rate_limited", "")
    store.close()
    store = c.Store(path)
    assert store.parked_agents() == {"claude": {"until": NOW + 5, "reason": "rate_limited", "detail": ""},
                                     "gemini": {"until": None, "reason": "auth", "detail": "log in"}}
    store.park_agent("gemini", None, "", "")
    assert list(store.parked_agents()) == ["claude"]
    store.close()


# Backup


@pytest.mark.slow
def test_a_backup_while_others_write_is_whole_and_private(path, tmp_path):
    target = str(tmp_path / "copy.db")

    async def body(store):
        with store.atomic():
            for number in range(3000):
                store.insert_task(task(f"t{number}", description="x" * 12_000))
        await store.durable()
        assert store._rows("PRAGMA page_count")[0][0] > 8000  # many steps of any backup in steps
        loop, written = asyncio.get_running_loop(), 0
        job = loop.run_in_executor(None, store.backup, target)
        while not job.done():  # steps would begin anew at each of these
            with store.atomic():
                store.insert_task(task(f"during{written}", state=c.RUNNING))
                store.insert_execution(run_of(f"during{written}", f"e{written}"))
            await store.durable()
            written += 1
        return await job, written
    size, written = in_loop(path, body)
    assert size == os.path.getsize(target) and os.stat(target).st_mode & 0o777 == 0o600 and written > 0
    db = sqlite3.connect(target)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    copy = c.Store(target)
    counts = copy.counts()
    assert counts["PENDING"] == 3000 and counts.get("RUNNING", 0) == len(copy.running_executions()) <= written
    copy.close()


def test_a_backup_replaces_the_older_one_only_when_it_succeeded(healthy, tmp_path):
    store, target = c.Store(healthy), tmp_path / "copy.db"
    target.write_text("the older one")
    os.chmod(target, 0o644)
    overwrite(healthy, (root_page(healthy, "tasks_newest") - 1) * 4096, b"\xa5" * 4096)
    with pytest.raises(c.StorageError, match="backup"):
        store.backup(str(target))
    assert target.read_text() == "the older one"
    assert sorted(name for name in os.listdir(tmp_path) if "copy" in name) == ["copy.db"]
    store.close()


def test_a_backup_that_succeeds_replaces_the_older_one_and_is_private(healthy, tmp_path):
    store, target = c.Store(healthy), tmp_path / "copy.db"
    target.write_text("the older one")
    os.chmod(target, 0o644)
    store.backup(str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(name for name in os.listdir(tmp_path) if "copy" in name) == ["copy.db"]
    store.close()
    copy = c.Store(str(target))
    assert copy.counts() == {"PENDING": 300}
    copy.close()


def test_a_backup_never_lands_on_the_database_itself_or_on_what_is_no_file(healthy, tmp_path):
    store = c.Store(healthy)
    (tmp_path / "link").symlink_to(healthy)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for target in (healthy, healthy + "-wal", str(tmp_path / "." / "claudomator.db"), str(tmp_path / "link"),
                   str(tmp_path / "directory"), str(tmp_path / "fifo")):
        with pytest.raises(c.StorageError, match="a file of its own"):
            store.backup(target)
    with pytest.raises(c.StorageError, match="failed"):
        store.backup(str(tmp_path / "missing" / "copy.db"))
    store.insert_task(task("still-works"))
    assert store.counts() == {"PENDING": 301}
    store.close()


# JSON for the interfaces


def test_a_task_in_json_has_what_the_specification_lists(store):
    store.insert_execution(run_of("t1", "e1", **FULL_EXECUTION))
    stored = store.insert_task(task(**FULL_TASK))
    shown = c.task_to_json(stored, store.last_execution(stored), 900.0)
    names = ("id name description state reason detail agent timeout_s priority tags depends_on parent_task_id project story_id"
             " summary question created_at updated_at execution").split()
    assert set(names) <= set(shown) and shown["timeout_s"] == 66.24 and shown["created_at"] == c.format_time(NOW)
    assert c.task_to_json(task(), None, 900.0)["timeout_s"] == 900.0 and c.task_to_json(task(), None, 1)["execution"] is None
    names = ("id task_id status reason detail start_time end_time exit_code cost_usd tokens_in tokens_out session_id"
             " sandbox_dir changestats commits summary").split()
    assert set(names) <= set(shown["execution"]) and shown["execution"]["commits"] == [{"hash": "abc", "message": "m"}]
    assert c.execution_to_json(run_of("t", "e"))["cost_usd"] is None
