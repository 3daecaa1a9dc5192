"""Section 24: dispatch, the phases of a run, and what happens when anything dies or fails between two of them."""
import asyncio
import contextlib
import os
import pathlib
import random
import resource
import stat
import subprocess
import sys
import threading
import time

import pytest

import claudomator as c
from tests.support import DaemonProcess, make_repository, shell_task, wait_until

DATA = pathlib.Path(__file__).parent / "data" / "claude"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One daemon for the tests that leave it as it was."""
    with DaemonProcess(tmp_path_factory.mktemp("pool"), "max_concurrent = 8\n") as running:
        yield running


def runs(path):
    """How often an agent has noted its start in a file."""
    return path.read_text().count("start\n") if path.exists() else 0


def executions(daemon, task_id):
    """All of a task's executions, oldest first."""
    return daemon.call("task.get", id=task_id)["executions"][::-1]


def events(daemon, kind, task_id):
    client, found = daemon.new_client(), []
    last = client.call("daemon.status")["last_event"]
    for event in client.stream("events.watch", since=0):
        found += [event] if event["kind"] == kind and event["task_id"] == task_id else []
        if event["seq"] >= last:
            client.close()
            return found


def newest_execution(daemon):
    """The newest execution as the database has it, once its supervisor's pid is in it."""
    store = c.Store(str(daemon.data_dir / "claudomator.db"), readonly=True)
    try:
        return next((found for found in store.running_executions() if found.pid), None)
    finally:
        store.close()


def sandboxes(daemon):
    return list((daemon.data_dir / "sandboxes").glob("[!.]*"))


def git_log(repository, branch="main"):
    done = subprocess.run(["git", "-C", repository, "log", "--reverse", "--format=%s", branch], capture_output=True,
                          text=True, check=True)
    return done.stdout.splitlines()


# -- the daemon dies at every phase

CRASHES = {  # where it dies: code that is run before the daemon starts
    "claimed": "c.Run._prepare = die",
    "cloned": "c.Run._start = die",
    "spawned": "after('spawn_supervisor')",
    "pid_stored": "c.Supervisor.open_gate = die",
    "gate_open": "was = c.Supervisor.open_gate\nc.Supervisor.open_gate = lambda self: (was(self), die())",
    "agent_ended": "c.Run._finish = die",
    "committed": "c._Finish.push = die",
    "pushed": "c.Run._settle_once = die",
    "settled": "c.Pool.discard = die",
}
LAUNCHER = """
import os, sys
import claudomator as c
def die(*args, **kwargs):
    os.kill(os.getpid(), 9)
def after(name):
    was = getattr(c, name)
    setattr(c, name, lambda *args, **kwargs: (was(*args, **kwargs), die()))
{patch}
sys.exit(c.main(["serve"]))
"""


def start_patched(daemon, patch):
    """Start a daemon in which some code has run first: shorter waits, a slow disk."""
    with open(daemon.log_path, "ab") as log:
        daemon.process = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(patch=patch)], env=daemon.env,
                                          stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    daemon.wait_for_socket()


@contextlib.contextmanager
def patched_daemon(tmp_path, patch, config_text=""):
    daemon = DaemonProcess(tmp_path, config_text)
    try:
        start_patched(daemon, patch)
        yield daemon
    finally:
        daemon.__exit__()


def die_at(daemon, point):
    """Run a daemon until it dies at a point of its own code."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(patch=CRASHES[point])], env=daemon.env,
                               stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert process.wait(15) == -9, point
    finally:
        process.kill()


def queue_without_a_daemon(daemon, tmp_path, copy):
    """Store a QUEUED task that commits, leaves a file, and is verified.  Returns its id."""
    script = f"echo start >> {tmp_path}/runs; echo 1 > a.txt; git add a.txt; git commit -qm work; echo 2 > left.txt"
    agent = c.AgentConfig(type="shell", instructions=script, project_dir=str(copy))
    daemon.data_dir.mkdir()
    store = c.Store(str(daemon.data_dir / "claudomator.db"))
    task = store.insert_task(c.Task(id="t", name="t", agent=agent, verify="[ -s a.txt ]", state=c.QUEUED))
    store.close()
    return task.id


def check_delivered(daemon, tmp_path, bare, task_id, unstarted):
    assert daemon.wait(task_id)["state"] == c.READY
    assert runs(tmp_path / "runs") == 1
    assert git_log(bare) == ["first", "work", "chore: autocommit uncommitted changes"]
    found = executions(daemon, task_id)
    ends = [(run["status"], run["reason"]) for run in found]
    assert ends == [(c.FAILED, "lost")] * unstarted + [(c.COMPLETED, None)]
    assert [commit["message"] for commit in found[-1]["commits"]] == git_log(bare)[1:]
    assert found[-1]["changestats"] == {"files_changed": 2, "insertions": 2, "deletions": 0}
    assert not c.marked_processes([run["id"] for run in found])
    assert len(events(daemon, "sandbox.pushed", task_id)) == 1
    ended = [event["execution_id"] for event in events(daemon, "execution.ended", task_id)]
    assert ended == [run["id"] for run in found]
    wait_until(lambda: daemon.call("daemon.status")["running"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("points, unstarted", [
    # three: of the first no claim is on disk, for what follows it at once is in the same transaction
    (("claimed", "cloned", "spawned", "pid_stored"), 3), (("gate_open", "agent_ended", "committed", "pushed"), 0),
    (("settled",), 0)])
def test_killed_at_any_point_the_daemon_completes_the_work_with_one_run_and_one_push(tmp_path, points, unstarted):
    bare, copy = make_repository(tmp_path)
    daemon = DaemonProcess(tmp_path)
    task_id = queue_without_a_daemon(daemon, tmp_path, copy)
    for point in points:
        die_at(daemon, point)
    with daemon:
        check_delivered(daemon, tmp_path, bare, task_id, unstarted)
        if points != ("settled",):  # there only the directory is left, for the hourly look at orphans
            wait_until(lambda: not sandboxes(daemon), what="the removal of the sandbox")


@pytest.mark.slow
def test_an_adopted_log_tells_its_events_once_and_the_session_goes_on(tmp_path):
    go = tmp_path / "go"
    lines = ['{"type":"system","subtype":"init","session_id":"s-1","model":"m","claude_code_version":"2.1.329"}',
             '{"type":"rate_limit_event","rate_limit_info":{"status":"allowed_warning","resetsAt":1790000000}}',
             '{"type":"assistant","message":{"content":[{"type":"text","text":"hi"}]}}',
             '{"type":"result","subtype":"success","is_error":false,"result":"ok","session_id":"s-1","num_turns":1,'
             '"total_cost_usd":0.25,"usage":{"input_tokens":3,"output_tokens":4}}']
    fake = tmp_path / "claude"
    fake.write_text("#!/bin/sh\ncat >/dev/null\necho start >> %s/runs\nprintf '%%s\\n' '%s'\n"
                    "while [ ! -e %s ]; do sleep 0.02; done\nprintf '%%s\\n' '%s' '%s'\n"
                    % (tmp_path, "' '".join(lines[:2]), go, lines[2], lines[3]))
    fake.chmod(0o755)
    with DaemonProcess(tmp_path, f'claude_binary_path = "{fake}"\n') as daemon:
        document = {"name": "t", "agent": {"type": "claude", "instructions": "x"}}
        task_id = daemon.call("task.create", tasks=document, queue=True)["tasks"][0]["id"]
        wait_until(lambda: events(daemon, "agent.rate_limit", task_id))
        daemon.kill9()
        daemon.start()
        daemon.kill9()
        daemon.start()
        go.touch()
        ended = daemon.wait(task_id)
        run = ended["execution"]
        assert (ended["state"], run["cost_usd"], run["session_id"]) == (c.READY, 0.25, "s-1")
        assert len(events(daemon, "agent.session", task_id)) == len(events(daemon, "agent.rate_limit", task_id)) == 1
        assert runs(tmp_path / "runs") == 1


@pytest.mark.slow
def test_an_agent_that_was_silent_without_a_daemon_is_stalled_at_once(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        task_id = daemon.add("echo up; sleep 300", stall_timeout="30s")
        found = daemon.started(task_id)
        daemon.kill9()
        log = daemon.data_dir / "executions" / found.id
        for name in ("stdout.log", "stderr.log"):
            os.utime(log / name, (time.time() - 60,) * 2)
        daemon.start()
        assert daemon.wait(task_id, 10)["reason"] == "stalled"


# -- lost


KILL_SUPERVISOR = "kill -{} $(cut -d ' ' -f 4 /proc/$PPID/stat)"


@pytest.mark.parametrize("number", [9, 15])
def test_an_agent_whose_supervisor_a_stranger_stops_runs_again_three_times_at_the_most(daemon, tmp_path, number):
    script = f"echo start >> {tmp_path}/runs; {KILL_SUPERVISOR.format(number)}; sleep 300"
    ended = daemon.wait(daemon.add(script))
    assert (ended["state"], ended["reason"], runs(tmp_path / "runs"), ended["attempts"]) == (c.FAILED, "lost", 4, 0)
    once = daemon.wait(daemon.add(f"[ -e {tmp_path}/once ] && exit 0; : > {tmp_path}/once; {script}"))
    assert once["state"] == c.READY and [run["reason"] for run in executions(daemon, once["id"])] == ["lost", None]


def test_a_running_row_that_nobody_drives_is_found_while_the_daemon_lives(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        orphan = daemon.add(f"echo start >> {tmp_path}/runs", queue=False, name="orphan")
        astray = daemon.add("true", queue=False, name="astray")
        daemon.terminate()
        start_patched(daemon, "c.RECONCILE_S = 0.2")
        daemon.add(f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done", name="keeps the daemon awake")
        store = c.Store(str(daemon.data_dir / "claudomator.db"))
        life = c.Lifecycle(store)
        life.claim(life.enqueue(orphan), "shell", "", 60.0, str(daemon.data_dir / "executions"))
        execution = store.insert_execution(c.Execution(id="astray", task_id=astray, start_time=1.0, agent="shell"))
        with subprocess.Popen(["sleep", "300"], env={c.MARK: execution.id}) as leftover:
            store.close()
            assert daemon.wait(orphan)["state"] == c.READY and runs(tmp_path / "runs") == 1
            wait_until(lambda: executions(daemon, astray)[0]["reason"] == "lost")
            assert leftover.wait(5) == -15
        assert daemon.state(astray) == c.PENDING
        (tmp_path / "go").touch()


def test_an_execution_of_a_kind_that_is_gone_from_this_version_is_adopted(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        task_id = daemon.add(f"echo up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
        found = daemon.started(task_id)
        daemon.kill9()
        store = c.Store(str(daemon.data_dir / "claudomator.db"))
        store.update_execution(found.id, agent="of-the-future")
        store.close()
        daemon.start()
        assert daemon.call("daemon.status")["running"] == 1
        (tmp_path / "go").touch()
        assert daemon.wait(task_id)["state"] == c.READY


# -- a stop, whenever it comes


@pytest.mark.slow
def test_a_cancel_at_any_moment_leaves_nothing_behind(daemon, tmp_path):
    bare, copy = make_repository(tmp_path)
    draw, ids = random.Random(7), []
    client = daemon.new_client()
    for number in range(24):
        sandboxed = number % 3 == 0
        script = f"echo start >> {tmp_path}/{number}; sleep 300 & setsid sleep 300 & wait"
        more = {"agent": {"project_dir": str(copy)}} if sandboxed else {}
        task_id = daemon.add(script, name=f"t{number}", **more)
        time.sleep(draw.random() * (0.15 if sandboxed else 0.05))
        client._send("task.cancel", {"ids": [task_id]})  # not waited for: several stop at the same time
        ids.append(task_id)
    for number, task_id in enumerate(ids):
        assert daemon.wait(task_id)["state"] == c.CANCELLED
        found = executions(daemon, task_id)
        assert len(found) <= 1 and runs(tmp_path / str(number)) <= 1
        assert not c.marked_processes([run["id"] for run in found])
    client.close()
    wait_until(lambda: daemon.call("daemon.status")["running"] == 0)
    started = {run["id"] for task_id in ids for run in executions(daemon, task_id) if run["exit_code"] is not None}
    assert {path.name for path in sandboxes(daemon)} <= started  # of an agent that was never there nothing is kept
    assert git_log(bare) == ["first"]


def test_what_does_not_run_is_cancelled_at_once(daemon, tmp_path):
    daemon.call("pool.pause", agent="shell")
    pending, queued = daemon.add("true", queue=False), daemon.add("true")
    for task_id in (pending, queued):
        task = daemon.call("task.cancel", ids=[task_id])["tasks"][0]
        assert (task["state"], task["reason"]) == (c.CANCELLED, "cancelled")
        with pytest.raises(c.ClaudomatorError, match="is CANCELLED"):
            daemon.call("task.cancel", ids=[task_id])
    daemon.call("pool.resume", agent="shell")
    blocked = daemon.add('echo \'{"text": "Which?", "options": ["a", "b"]}\' > $CLAUDOMATOR_QUESTION_FILE')
    assert daemon.wait(blocked)["state"] == c.BLOCKED
    assert daemon.call("task.cancel", ids=[blocked])["tasks"][0]["state"] == c.CANCELLED
    assert not executions(daemon, pending) and not executions(daemon, queued)


@pytest.mark.slow
def test_a_cancel_wins_over_a_stall_that_was_first_and_both_callers_are_answered(tmp_path):
    with DaemonProcess(tmp_path, 'stop_grace = "1s"\n') as daemon:
        script = "trap '' TERM; echo up; sleep 300 & while :; do sleep 1; done"
        task_id = daemon.add(script, stall_timeout="500ms", retry={"max_attempts": 3})
        wait_until(lambda: daemon.call("task.get", id=task_id)["task"]["why"] == "stopping (stalled)")
        clients = [daemon.new_client() for _ in range(2)]
        numbers = [client._send("task.cancel", {"ids": [task_id]}) for client in clients]
        for client, number in zip(clients, numbers):
            answer = client._receive()
            assert answer["id"] == number and answer["result"]["tasks"][0]["state"] == c.CANCELLED
            client.close()
        assert len(executions(daemon, task_id)) == 1


SLOW_DISK = """
import pathlib, time
hold = pathlib.Path({hold!r})
spawn, sync = c.spawn_supervisor, os.fdatasync
def spawn_and_hold(*args, **kwargs):
    hold.touch()
    return spawn(*args, **kwargs)
def slow_sync(descriptor):
    while hold.exists():
        time.sleep(0.01)
    sync(descriptor)
c.spawn_supervisor, os.fdatasync = spawn_and_hold, slow_sync
"""


@pytest.mark.slow
def test_a_cancel_while_the_pid_is_not_on_disk_yet_keeps_the_gate_shut_even_where_no_signal_can_be_sent(tmp_path):
    hold = tmp_path / "hold"
    with patched_daemon(tmp_path, SLOW_DISK.format(hold=str(hold))) as daemon:
        client = daemon.new_client()
        client.call("daemon.status")
        daemon.client._send("task.create", {"tasks": shell_task(f"echo start >> {tmp_path}/runs"), "queue": True})
        found = wait_until(lambda: newest_execution(daemon), what="the supervisor's pid")
        descriptors = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (0, descriptors[1]))  # no pidfd, so no signal
        client._send("task.cancel", {"ids": [found.task_id]})
        wait_until(lambda: newest_execution(daemon).stop_reason == "cancelled")
        hold.unlink()
        wait_until(lambda: c.process_start(found.pid) is None or runs(tmp_path / "runs"), what="an open or shut gate")
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, descriptors)
        assert client._receive()["result"]["tasks"][0]["state"] == c.CANCELLED
        assert runs(tmp_path / "runs") == 0
        client.close()


# -- what agents leave behind


def test_background_children_are_ended_before_the_sandbox_goes(tmp_path):
    bare, copy = make_repository(tmp_path)
    child = f"setsid sh -c 'echo $$ >> {tmp_path}/pids; while :; do date > tick; sleep 0.01; done' >/dev/null 2>&1 &"
    config = f'[[projects]]\nname = "p"\ndir = "{copy}"\nsetup = """{child}"""\n'
    with DaemonProcess(tmp_path, config) as daemon:
        document = shell_task(f"{child}\necho x > new; git add new; git commit -qm work",
                              agent={"project_dir": str(copy)},
                              verify=f"{child} while [ $(wc -l < {tmp_path}/pids) -lt 3 ]; do sleep 0.01; done")
        task_id = daemon.call("task.create", tasks=document, queue=True)["tasks"][0]["id"]
        assert daemon.wait(task_id)["state"] == c.READY
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 3 and not any(c.process_start(int(pid)) for pid in pids)
        wait_until(lambda: not sandboxes(daemon), what="the removal of the sandbox")


def test_setup_build_and_verify_see_no_more_of_the_daemons_environment_than_the_agent(tmp_path):
    bare, copy = make_repository(tmp_path)
    show = lambda name: f"env > {tmp_path}/{name}"
    hook = f"printf '#!/bin/sh\\n{show('push')}\\n' > .git/hooks/pre-push; chmod +x .git/hooks/pre-push"
    config = (f'[agents.shell]\npass_env = ["GIVEN"]\nenv = {{ SET = "set" }}\n[[projects]]\nname = "p"\ndir = "{copy}"\n'
              f'setup = """{show("setup")}; {hook}"""\nbuild = "{show("build")}"\n')
    env = {"KEPT_SECRET": "never-given", "GIVEN": "given", "ANTHROPIC_API_KEY": "a-key", "SSH_AUTH_SOCK": "/agent"}
    with DaemonProcess(tmp_path, config, env) as daemon:
        in_clone = daemon.add(f"{show('agent')}; echo x > new", agent={"project_dir": str(copy)}, verify=show("verify"))
        elsewhere = daemon.add("true", verify=show("bare"))
        for task_id in (in_clone, elsewhere):
            assert daemon.wait(task_id)["state"] == c.READY
        mark = f"CLAUDOMATOR_EXECUTION_ID={executions(daemon, in_clone)[0]['id']}"
    seen = {name: (tmp_path / name).read_text().splitlines() for name in ("setup", "agent", "build", "verify", "bare", "push")}
    assert "KEPT_SECRET=never-given" in seen["push"] and mark in seen["push"]  # git has its credential helpers
    own, elsewhere = set(line.split("=")[0] for line in seen.pop("agent")), seen.pop("bare")
    del seen["push"]
    for name, lines in {**seen, "bare": elsewhere}.items():
        text = "\n".join(lines)
        assert not any(word in text for word in ("KEPT_SECRET", "a-key", "CLAUDOMATOR_API_TOKEN")), name
        assert {"GIVEN=given", "SET=set", "SSH_AUTH_SOCK=/agent"} <= set(lines), name
        assert name == "bare" or mark in lines
        assert {line.split("=")[0] for line in lines} <= own, name


def test_a_sandbox_that_could_not_be_made_leaves_neither_files_nor_processes(tmp_path):
    bare, copy = make_repository(tmp_path)
    setup = f"sleep 300 & echo $! > {tmp_path}/pid; echo no; exit 3"
    config = f'[[projects]]\nname = "p"\ndir = "{copy}"\nsetup = "{setup}"\n'
    with DaemonProcess(tmp_path, config) as daemon:
        ended = daemon.wait(daemon.add("true", agent={"project_dir": str(copy)}))
        assert (ended["state"], ended["reason"]) == (c.FAILED, "sandbox_failed") and "no" in ended["detail"]
        assert not sandboxes(daemon) and c.process_start(int((tmp_path / "pid").read_text())) is None


def test_pipes_and_links_that_an_agent_plants_hold_nobody_up_and_show_nothing(daemon, tmp_path):
    (tmp_path / "secret").write_text("the secret\n")
    script = (f"mkfifo $CLAUDOMATOR_QUESTION_FILE; ln -s {tmp_path}/secret $CLAUDOMATOR_SUMMARY_FILE\n"
              "cd ${CLAUDOMATOR_SUMMARY_FILE%/*}; rm stdout.log; mkfifo stdout.log; sleep 0.1")
    ended = daemon.wait(daemon.add(script))
    assert ended["state"] == c.READY and ended["summary"] == ""


@pytest.mark.parametrize("planted", ["link", "pipe"])
def test_what_a_setup_plants_where_the_daemon_writes_is_replaced_and_not_written_through(tmp_path, planted):
    precious, path = tmp_path / "precious", tmp_path / "prompt.txt"
    precious.write_text("as it was")
    path.symlink_to(precious) if planted == "link" else os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without one a writer to the pipe would hang here
    c.write_private(str(path), "long text")
    c.write_private(str(path), "text")
    found = os.lstat(path)
    assert stat.S_ISREG(found.st_mode) and found.st_mode & 0o777 == 0o600 and path.read_text() == "text"
    assert os.read(reader, 99) == (b"" if planted == "pipe" else b"as it was") and precious.read_text() == "as it was"
    os.close(reader)


@pytest.mark.slow
def test_a_kept_sandbox_survives_the_pruning_of_the_run_that_made_it(tmp_path):
    bare, copy = make_repository(tmp_path)
    with DaemonProcess(tmp_path, "keep_executions = 1\n") as daemon:
        script = "echo round >> rounds; cp rounds $CLAUDOMATOR_SUMMARY_FILE"
        document = shell_task(script, agent={"project_dir": str(copy)}, verify="[ $(wc -l < rounds) -ge 3 ]",
                              verify_rounds=5)
        task_id = daemon.call("task.create", tasks=document, queue=True)["tasks"][0]["id"]
        ended = daemon.wait(task_id)
        assert ended["state"] == c.READY and ended["summary"] == "round\nround\nround" and ended["round"] == 3
        wait_until(lambda: len(list((daemon.data_dir / "executions").iterdir())) == 1)


# -- a disk that refuses


FULL = 200_000  # bytes of a file that the daemon may write while its disk is "full"


@contextlib.contextmanager
def full_disk(daemon):
    """As good as a full disk: nothing can be written at the end of the write-ahead log."""
    unlimited = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (FULL, unlimited[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, unlimited)


def outgrow(daemon):
    """Make the write-ahead log larger than what a full disk takes."""
    wal = pathlib.Path(daemon.data_dir / "claudomator.db-wal")
    while wal.stat().st_size < FULL + 50_000:
        daemon.call("task.create", tasks=shell_task("true", description="x" * 20_000))


@pytest.mark.slow
def test_an_end_that_the_disk_refuses_is_recorded_when_there_is_room_and_nothing_runs_twice(tmp_path):
    with patched_daemon(tmp_path, "c.SETTLE_RETRY_S = 0.2") as daemon:
        outgrow(daemon)
        script = (f"echo start >> {tmp_path}/{{0}}.runs; echo up\n"
                  f"while [ ! -e {tmp_path}/{{0}} ]; do sleep 0.02; done; echo end")
        ids = {name: daemon.add(script.format(name), name=name) for name in ("ends", "goes-on")}
        for task_id in ids.values():
            daemon.started(task_id)
        with full_disk(daemon):
            with pytest.raises(c.ClaudomatorError, match="make room"):
                daemon.add("true")
            (tmp_path / "ends").touch()
            wait_until(lambda: daemon.log().count("cannot be recorded") > 1)
            assert daemon.state(ids["ends"]) == c.RUNNING and daemon.call("daemon.status")["running"] == 2
        later = daemon.add(f"echo start >> {tmp_path}/later.runs", name="later")
        (tmp_path / "goes-on").touch()
        for name, task_id in {**ids, "later": later}.items():
            assert daemon.wait(task_id)["state"] == c.READY and runs(tmp_path / f"{name}.runs") == 1
            assert len(events(daemon, "execution.ended", task_id)) == 1
        assert "Traceback" not in daemon.log()


@pytest.mark.slow
def test_an_end_and_the_claim_that_follows_it_are_refused_together_and_neither_is_lost(tmp_path):
    with patched_daemon(tmp_path, "c.SETTLE_RETRY_S = 0.2", "max_concurrent = 1\n") as daemon:
        first = daemon.add(f"echo start >> {tmp_path}/first.runs; echo up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
        daemon.started(first)
        second = daemon.add(f"echo start >> {tmp_path}/second.runs")
        outgrow(daemon)
        with full_disk(daemon):
            (tmp_path / "go").touch()
            wait_until(lambda: daemon.log().count("cannot be recorded") > 2)
            assert (daemon.state(first), daemon.state(second)) == (c.RUNNING, c.QUEUED) and not runs(tmp_path / "second.runs")
            assert daemon.log().count("the disk has undone it") <= 1, "no claim is made where one was refused"
        for name, task_id in (("first", first), ("second", second)):
            assert daemon.wait(task_id)["state"] == c.READY and runs(tmp_path / f"{name}.runs") == 1
            assert len(executions(daemon, task_id)) == 1 and len(events(daemon, "execution.ended", task_id)) == 1
        assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("was_refused", [False, True])
def test_a_slot_is_free_when_the_end_is_written_but_no_agent_starts_before_it_is_on_disk(tmp_path, was_refused):
    async def until(condition):
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert condition()

    async def scenario():
        config = {"data_dir": str(tmp_path), "server_addr": "", "max_concurrent": 1}
        daemon = c.Daemon(c.parse_config(config, "x", str(tmp_path)), None, print)
        await daemon.start()
        store, core = daemon.core.store, daemon.core
        first, second = core.life.create(
            [c.TaskSpec(name="t", agent=c.AgentConfig(type="shell", instructions=script)) for script in (
                f": > {tmp_path}/up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done", f": > {tmp_path}/second")],
            queue=True, config=core.config, kinds=core.kinds)
        await until((tmp_path / "up").exists)
        await until(store.is_durable)
        sync, held = store._syncer.request, []
        store._syncer.request, store.was_refused = held.append, was_refused  # a disk that takes its time
        (tmp_path / "go").touch()
        await until(lambda: store.get_task(first.id).state == c.READY)
        await until(lambda: held and (was_refused or store.get_task(second.id).state == c.RUNNING))
        await asyncio.sleep(0.2)
        assert store.get_task(second.id).state == (c.QUEUED if was_refused else c.RUNNING)
        assert not (tmp_path / "second").exists()
        store._syncer.request = sync
        for callback in held:
            sync(callback)
        await until(lambda: store.get_task(second.id).state == c.READY)
        assert (tmp_path / "second").exists()
        await daemon.close()
    asyncio.run(scenario())


FILLS_AT_SPAWN = f"""
import resource
c.SETTLE_RETRY_S, spawn = 0.2, c.spawn_supervisor
def spawn_and_fill(*args, **kwargs):
    c.spawn_supervisor = spawn
    resource.setrlimit(resource.RLIMIT_FSIZE, ({FULL}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return spawn(*args, **kwargs)
c.spawn_supervisor = spawn_and_fill
"""


def test_a_disk_that_refuses_the_pid_fails_no_task_and_the_agent_runs_once_there_is_room(tmp_path):
    with patched_daemon(tmp_path, FILLS_AT_SPAWN) as daemon:
        unlimited = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
        outgrow(daemon)
        client, document = daemon.new_client(), shell_task(f"echo start >> {tmp_path}/runs", name="refused")
        client._send("task.create", {"tasks": document, "queue": True})  # its answer may meet the full disk as well
        wait_until(lambda: " waits: " in daemon.log(), what="the refusal")
        client.close()
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, unlimited)
        task_id = next(task["id"] for task in daemon.call("task.list")["tasks"] if task["name"] == "refused")
        assert daemon.wait(task_id)["state"] == c.READY and runs(tmp_path / "runs") == 1


NOTED_UNDO = """
undo = c.Store._undo
def noted(self, error):
    open({path!r}, "a").write("x")
    return undo(self, error)
c.Store._undo = noted
"""


def test_a_pass_of_the_retention_ends_where_the_disk_takes_nothing(tmp_path):
    async def scenario():
        daemon = c.Daemon(c.parse_config({"data_dir": str(tmp_path), "server_addr": ""}, "x", str(tmp_path)), None, print)
        await daemon.start()
        store, passes, durable = daemon.core.store, [], daemon.core.store.durable
        old = c.Execution(id="0" * 8, task_id="t", start_time=1.0, agent="shell", model="", round=1, timeout_s=1.0,
                          artifact_dir="x", stdout_path="", stderr_path="")

        async def refuse():
            raise c.StorageError("the disk is full")
        store.ended_before = lambda *facts: passes.append(1) or [old][:10 - len(passes)]  # what is undone comes again
        store.durable = refuse
        with pytest.raises(c.StorageError, match="full"):
            await daemon.core.pool.prune()
        assert len(passes) == 1
        store.durable = durable
        await daemon.close()
    asyncio.run(scenario())


def test_reading_a_log_again_asks_the_database_only_when_the_run_is_looked_at(tmp_path):
    """It is called for every run when the disk has refused a transaction: what failed there would end the rollback."""
    async def scenario():
        daemon = c.Daemon(c.parse_config({"data_dir": str(tmp_path), "server_addr": ""}, "x", str(tmp_path)), None, print)
        await daemon.start()
        core = daemon.core
        spec = c.TaskSpec(name="t", agent=c.AgentConfig(type="shell", instructions="sleep 60"))
        [task] = core.life.create([spec], queue=False, config=core.config, kinds=core.kinds)
        execution = c.Execution(id=task.id, task_id=task.id, start_time=1.0, agent="shell", model="", round=1,
                                timeout_s=1.0, artifact_dir="", stdout_path="", stderr_path="", pid=1)
        run = c.Run(core.pool, task, execution)
        core.store.count_log_events = lambda execution: (_ for _ in ()).throw(c.StorageError("the disk is gone"))
        core.pool.runs[run.execution.id] = run
        core.pool._rolled_back()
        with pytest.raises(c.StorageError, match="the disk is gone"):  # where ``drive`` waits and tries again
            await run._read_log()
        del core.pool.runs[run.execution.id]
        await daemon.close()
    asyncio.run(scenario())


@pytest.mark.slow
def test_what_an_agent_reports_while_the_disk_is_full_is_told_once_when_there_is_room(tmp_path):
    lines = (DATA / "a_text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "first").write_text(lines[0])
    (tmp_path / "rest").write_text("".join(lines[1:]))
    agent, undone = tmp_path / "agent", tmp_path / "undone"
    agent.write_text(f"#!/bin/sh\necho; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; cat {tmp_path}/first\n"
                     f"while [ ! -e {tmp_path}/end ]; do sleep 0.02; done; cat {tmp_path}/rest\n")
    agent.chmod(0o755)
    with patched_daemon(tmp_path, NOTED_UNDO.format(path=str(undone)), f'claude_binary_path = "{agent}"\n') as daemon:
        outgrow(daemon)
        task_id = daemon.add("Say hello", agent={"type": "claude"})
        daemon.started(task_id)
        with full_disk(daemon):
            (tmp_path / "go").touch()
            wait_until(lambda: undone.exists() and undone.stat().st_size > 1, what="refused commits")
        (tmp_path / "end").touch()
        assert daemon.wait(task_id)["state"] == c.READY
        assert len(events(daemon, "agent.session", task_id)) == 1


def ended_claude_run(pool, tmp_path, **more):
    """A run of claude whose agent has ended well, in a pool without a loop of its own."""
    store, config = pool.core.store, pool.core.config
    directory = pathlib.Path(config.executions_dir) / "run"
    directory.mkdir(parents=True)
    (directory / "stdout.log").write_bytes((DATA / "a_text.jsonl").read_bytes())
    (directory / "exit").write_text("0\n")
    task = store.insert_task(c.Task(id="task", name="t", agent=c.AgentConfig(type="claude"), state=c.RUNNING,
                                    execution_id="run", **more))
    execution = store.insert_execution(c.Execution(id="run", task_id="task", agent="claude", round=1, pid=1,
                                                   start_time=time.time(), timeout_s=60.0))
    run = pool.runs["run"] = c.Run(pool, task, execution)
    return run


def test_a_disk_that_is_full_when_an_agent_ends_costs_neither_its_result_nor_its_events(tmp_path):
    async def work(pool):
        store, sweep = pool.core.store, pool.sweeps.clean
        run = ended_claude_run(pool, tmp_path)
        await store.durable()
        await run._read_log()

        async def fill_and_clean(execution_id):
            store._undo(Exception("disk full"))
            await sweep(execution_id)
        pool.sweeps.clean = fill_and_clean
        verdict, facts = await run._finish()
        assert verdict.ok and facts["tokens_out"] and facts["session_id"]
        store._undo(Exception("disk full"))  # with it what ``_finish`` has read
        await run._settle_once(verdict, facts)
        assert [event["kind"] for event in store.events_since(0)].count("agent.session") == 1
        assert store.get_task("task").state == c.READY
    in_a_pool(tmp_path, work)


@pytest.mark.parametrize("kind", ["claude", "gemini"])
def test_a_session_without_a_project_goes_on_where_it_began(tmp_path, kind):
    async def work(pool):
        run = ended_claude_run(pool, tmp_path)
        run.runner = c.RUNNERS[kind]
        run.execution = pool.core.store.update_execution("run", session_id="first")
        run.resumed, first = True, os.path.join(pool.core.config.executions_dir, "first", "work")
        assert run._working_directory() == os.path.join(run.directory, "work"), "it is gone, or has a name of its own"
        os.makedirs(first)
        assert run._working_directory() == first
    in_a_pool(tmp_path, work)


def test_work_of_a_stalled_agent_that_fails_its_check_was_cancelled_by_nobody(tmp_path):
    async def work(pool):
        run = ended_claude_run(pool, tmp_path, verify="echo wrong; exit 1")
        run.stop_reason, run.execution = "stalled", pool.core.store.update_execution("run", stop_reason="stalled")
        verdict, _ = await run._finish()  # it had told its result before it fell silent
        assert verdict.reason == "verify_failed" and run.feedback["text"] == "wrong\n"
        run.stop_reason = "cancelled"
        verdict, _ = await run._finish()
        assert verdict.reason == "cancelled"
    in_a_pool(tmp_path, work)


@pytest.mark.parametrize("moment", ["its sandbox is looked at", "the disk refuses its end"])
def test_a_cancel_that_comes_while_a_failed_run_is_settled_ends_its_retries(tmp_path, monkeypatch, moment):
    async def work(pool):
        store = pool.core.store
        run = ended_claude_run(pool, tmp_path, retry=c.RetryPolicy(max_attempts=3))
        run.execution = store.update_execution("run", sandbox_dir=str(tmp_path))
        look, settle = c.head_of_sandbox, pool.core.life.settle

        def cancelled_look(*args):
            run.stop_reason = "cancelled"
            return look(*args)

        def refuse(*args, **facts):
            pool.core.life.settle, run.stop_reason = settle, "cancelled"
            raise c.StorageError("make room on its disk")
        if moment == "the disk refuses its end":
            monkeypatch.setattr(c, "SETTLE_RETRY_S", 0.01)
            pool.core.life.settle = refuse
        else:
            monkeypatch.setattr(c, "head_of_sandbox", cancelled_look)
        await run._settle(c.failed_verdict("agent_error", "exit 1"), {})
        task = store.get_task("task")
        assert (task.state, task.reason) == (c.CANCELLED, "cancelled") and not pool.runs
    in_a_pool(tmp_path, work)


def test_a_queue_that_could_not_be_read_again_is_read_until_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "SETTLE_RETRY_S", 0.01)

    async def work(pool):
        store, life = pool.core.store, pool.core.life
        pool._loop, pool._wake_handle = asyncio.get_running_loop(), object()  # nothing is started
        shell = c.AgentConfig(type="shell")
        store.insert_task(c.Task(id="doomed", name="doomed", agent=shell, state=c.QUEUED,
                                 depends_on=c.depends_from_json(["gone"])))
        store.insert_task(c.Task(id="other", name="other", agent=shell, state=c.QUEUED))
        await store.durable()
        fail = life.fail_dependency

        def locked_once(*args):
            life.fail_dependency = fail
            raise c.StorageError("another program is writing to it")
        life.fail_dependency = locked_once
        pool._rolled_back()
        async with asyncio.timeout(10):
            while not pool.queue.entry("other"):
                await asyncio.sleep(0.01)
        assert store.get_task("doomed").state == c.FAILED
        pool.stopping = True
    assert any("another program" in line for line in in_a_pool(tmp_path, work))


def test_a_run_that_ends_at_the_limit_of_threads_frees_its_slot(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async def work(pool):
        run = ended_claude_run(pool, tmp_path)
        agent = run.task.agent.replace(isolation="sandbox")  # of no project: it cannot start
        run.task, run.execution = run.task.replace(agent=agent), pool.core.store.update_execution("run", pid=None)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        await run.drive("new")
        monkeypatch.undo()
        task = pool.core.store.get_task("task")
        assert (task.state, task.reason) == (c.FAILED, "bad_task") and not pool.runs
    assert any("no thread can be started" in line for line in in_a_pool(tmp_path, work))


def test_a_configuration_that_is_refused_for_one_secret_brings_no_other(tmp_path):
    async def work(pool):
        core, was = pool.core, pool.core.api_token
        pathlib.Path(core.config.agent_key_path).write_text("short\n")
        with pytest.raises(c.StorageError, match="holds no token"):
            core.renew_secrets(core.config.replace(api_token="t" * 43))
        assert core.api_token == was
    in_a_pool(tmp_path, work)


def test_a_hold_that_the_disk_refuses_is_none(tmp_path):
    async def work(pool):
        def refuse(*args):
            raise c.StorageError("make room")
        pool.core.store.put_setting = pool.core.store.append_event = refuse
        for ask in (lambda: pool.hold(True), lambda: pool.hold(True, agent="shell"), pool.drain):
            with pytest.raises(c.StorageError):
                ask()
        assert pool.holds() == {"paused": False, "draining": False, "paused_kinds": [], "paused_projects": []}
    in_a_pool(tmp_path, work)


# -- dispatch


def test_bounds_hold_and_a_higher_priority_goes_first(tmp_path):
    config = "max_concurrent = 3\n[agents.shell]\nmax_concurrent = 2\n"
    with DaemonProcess(tmp_path, config) as daemon:
        daemon.call("pool.pause")
        script = f"echo {{0}} >> {tmp_path}/order; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; sleep 0.1"
        ids = [daemon.add(script.format(name), name=name, priority=name.split("-")[0])
               for name in ("low-1", "normal-1", "high-1", "high-2", "normal-2", "low-2")]
        daemon.call("pool.resume")
        wait_until(lambda: (tmp_path / "order").exists() and len((tmp_path / "order").read_text().split()) == 2)
        assert daemon.call("daemon.status")["running"] == 2
        assert "shell: 2 of 2 slots busy" in [task["why"] for task in daemon.call("task.list")["tasks"]]
        (tmp_path / "go").touch()
        for task_id in ids:
            daemon.wait(task_id)
        order = (tmp_path / "order").read_text().split()
        pairs = [set(order[at:at + 2]) for at in (0, 2, 4)]
        assert pairs == [{"high-1", "high-2"}, {"normal-1", "normal-2"}, {"low-1", "low-2"}]


def test_a_retry_waits_as_its_policy_says_and_stops_at_its_attempts(daemon, tmp_path):
    began = time.monotonic()
    script = f"echo start >> {tmp_path}/runs; exit 1"
    ended = daemon.wait(daemon.add(script, retry={"max_attempts": 3, "backoff": ["10ms", "300ms"]}))
    assert (ended["state"], ended["reason"], ended["attempts"]) == (c.FAILED, "agent_error", 3)
    assert runs(tmp_path / "runs") == 3
    assert time.monotonic() - began > 0.15  # jittered


@pytest.mark.parametrize("on, first, runs_then", [
    ("success", "auto", True), ("success", "exit 1", False), ("ready", "true", True), ("ready", "exit 1", False),
    ("failure", "exit 1", True), ("failure", "auto", False), ("any", "exit 1", True), ("any", "true", True)])
def test_a_dependency_is_met_or_fails_its_task_at_once(daemon, on, first, runs_then):
    tasks = {"tasks": [shell_task("true" if first == "auto" else first, name="first", auto_accept=first == "auto"),
                       shell_task("true", name="then", depends_on=[{"task": "first", "on": on}]),
                       shell_task("true", name="last", depends_on=[{"task": "then", "on": "ready"}])]}
    ids = [task["id"] for task in daemon.call("task.create", tasks=tasks, queue=True)["tasks"]]
    ended = [daemon.wait(task_id) for task_id in ids[1:]]
    if runs_then:
        assert [task["state"] for task in ended] == [c.READY, c.READY]
    else:
        assert [(task["state"], task["reason"]) for task in ended] == [(c.FAILED, "dependency_failed")] * 2
        assert not executions(daemon, ids[1]) and "first" in ended[0]["detail"]


def test_a_long_chain_of_dependents_fails_to_its_end(daemon):
    tasks = [shell_task("exit 1", name="t0")]
    tasks += [shell_task("true", name=f"t{n}", depends_on=[f"t{n - 1}"]) for n in range(1, 400)]
    ids = [task["id"] for task in daemon.call("task.create", tasks={"tasks": tasks}, queue=True)["tasks"]]
    assert daemon.wait(ids[-1])["reason"] == "dependency_failed"
    assert daemon.call("task.wait", ids=ids, timeout_s=0)["timed_out"] is False


def test_children_of_the_daemon_are_reaped(daemon):
    for task_id in [daemon.add("true") for _ in range(8)]:
        daemon.wait(task_id)

    def zombies():
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == daemon.process.pid and fields[0] == b"Z":
                found.append(path)
        return found
    wait_until(lambda: not zombies(), what="the end of all zombies")


# -- keeping house


def in_a_pool(tmp_path, work, **settings):
    """Run ``work(pool)`` on a pool of its own, without a daemon; returns what was logged."""
    log = []

    async def main():
        config = c.parse_config({}, "test", str(tmp_path))
        config = config.replace(data_dir=str(tmp_path / "data"), **settings)
        os.makedirs(config.sandboxes_dir)
        store = c.Store(config.db_path)
        store.attach(asyncio.get_running_loop())
        pool = c.Pool(c.Core(config, store, lambda level, text: log.append(text)))
        try:
            await work(pool)
        finally:
            store.close()
    asyncio.run(main())
    return log


def ended_run(pool, name, ago_s, *, state=c.FAILED, sandbox=""):
    """A task with an execution that ended some time ago, and its files."""
    store, config = pool.core.store, pool.core.config
    task = store.insert_task(c.Task(id=f"task-{name}", name=name, agent=c.AgentConfig(type="shell"), state=state))
    path = os.path.join(config.sandboxes_dir, sandbox) if sandbox else ""
    if path:
        os.makedirs(path, exist_ok=True)
        os.utime(path, (time.time() - ago_s,) * 2)
    os.makedirs(os.path.join(config.executions_dir, name))
    store.insert_execution(c.Execution(id=name, task_id=task.id, status=c.FAILED, end_time=time.time() - ago_s,
                                       sandbox_dir=path, artifact_dir=os.path.join(config.executions_dir, name)))
    store.update_task(task.id, execution_id=name)


def test_old_logs_and_sandboxes_go_and_what_is_needed_stays(tmp_path):
    async def work(pool):
        day = 86400
        for number in range(205):  # more than a page of young ones in front of the old ones
            ended_run(pool, f"young-{number}", 60, sandbox=f"young-{number}")
        ended_run(pool, "old", 10 * day, sandbox="old")
        ended_run(pool, "older", 40 * day)
        ended_run(pool, "waits", 10 * day, state=c.BLOCKED, sandbox="waits")
        ended_run(pool, "shared-1", 10 * day, sandbox="shared")
        ended_run(pool, "shared-2", 60, sandbox="shared")
        for name in ("orphan", "resumed"):
            os.makedirs(os.path.join(pool.core.config.sandboxes_dir, name))
            os.utime(os.path.join(pool.core.config.sandboxes_dir, name), (1, 1))
        agent, path = c.AgentConfig(type="shell"), os.path.join(pool.core.config.sandboxes_dir, "resumed")
        task = pool.core.store.insert_task(c.Task(id="t", name="t", agent=agent, state=c.RUNNING))
        run = c.Run(pool, task, c.Execution(id="now", task_id="t", sandbox_dir=path))
        pool.runs["now"] = run  # the run that made the sandbox is pruned, this one still works in it
        await pool.prune()
        left = set(os.listdir(pool.core.config.sandboxes_dir))
        assert left == {f"young-{number}" for number in range(205)} | {"waits", "shared", "resumed"}
        logs = set(os.listdir(pool.core.config.executions_dir))
        assert "older" not in logs and {"old", "waits", "young-0"} <= logs
    in_a_pool(tmp_path, work)


def test_the_retention_keeps_up_with_what_ends_and_is_not_stopped_by_what_goes_meanwhile(tmp_path):
    async def work(pool):
        store, config, old = pool.core.store, pool.core.config, 40 * 86400
        for number in range(7):
            ended_run(pool, f"log-{number}", old)
        for name in ("first", "second", "third"):
            ended_run(pool, name, old, sandbox=name)
        for number in range(45):
            store.append_event("task.state", f"task-{number}")
        await store.durable()
        store._write("UPDATE events SET time = '2020-01-01 00:00:00.000000+00:00'", ())
        discard = pool.discard

        async def discard_and_delete(function, *args):
            await discard(function, *args)  # its thread; meanwhile somebody deletes what was read before it
            for name in ("first", "second") if function is c.remove_sandbox else ("log-1",):
                store.delete_task(f"task-{name}")
        pool.discard = discard_and_delete
        await pool.prune(step=2)
        assert store.ended_before(time.time(), 10) == [] and store.events_since(0) == []
        assert os.listdir(config.executions_dir) == [] == os.listdir(config.sandboxes_dir)
    in_a_pool(tmp_path, work)


def test_a_pass_of_the_retention_that_fails_is_told_and_not_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "RECONCILE_S", 0.0)
    monkeypatch.setattr(c, "RETENTION_S", 0.0)

    async def work(pool):
        passes = asyncio.Queue()

        async def prune():
            passes.put_nowait(None)
            raise c.StorageError("the disk is gone")
        pool.prune = prune
        pool.start(asyncio.get_running_loop())
        async with asyncio.timeout(10):
            await passes.get()
            await passes.get()
        await pool.shut_down(0)
    assert any("the disk is gone" in line for line in in_a_pool(tmp_path, work))


def test_what_cannot_be_deleted_is_logged_and_stops_nothing(tmp_path):
    async def work(pool):
        await pool.discard(c.remove_sandbox, str(tmp_path / "elsewhere"), pool.core.config.sandboxes_dir)
        assert c.remove_orphans(str(tmp_path / "nowhere"), time.time(), set()) == 0
    assert any("elsewhere" in line for line in in_a_pool(tmp_path, work))
