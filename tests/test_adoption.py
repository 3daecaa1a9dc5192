"""Sections 18, 24 and 27 together: agents survive the daemon, nothing runs twice, and a stop is a stop.

Real daemon processes, killed with SIGKILL; the agents are shell scripts that note each of their starts in a file outside.
"""
import os
import pathlib
import signal
import subprocess

import pytest

import claudomator as c
from tests.support import DaemonProcess, make_repository, wait_until


@pytest.fixture
def daemon(tmp_path):
    with DaemonProcess(tmp_path, 'stop_grace = "1s"\n') as running:
        yield running


def noting(tmp_path, name, script):
    """A script that first notes its start; the notes must hold one line per run."""
    return f"echo start >> {tmp_path}/{name}.runs\n{script}"


def runs(tmp_path, name):
    path = pathlib.Path(tmp_path) / f"{name}.runs"
    return path.read_text().count("start") if path.exists() else 0


def execution(daemon, task_id):
    return daemon.call("task.get", id=task_id)["executions"][0]


def log_of(daemon, task_id):
    return (daemon.data_dir / "executions" / execution(daemon, task_id)["id"] / "stdout.log").read_text()


def is_alive(pid):
    return c.process_start(pid) is not None


# -- the daemon dies


def test_three_agents_survive_a_kill_9_and_end_as_if_nothing_had_happened(daemon, tmp_path):
    go = tmp_path / "go"
    scripts = {
        "writing": f"n=0; while [ ! -e {go} ]; do n=$((n+1)); echo line $n; sleep 0.05; done; echo last; exit 0",
        "silent": f"echo begin; while [ ! -e {go} ]; do sleep 0.05; done; exit 7",
        "ending": f"echo begin; while [ ! -e {tmp_path}/early ]; do sleep 0.02; done; echo done; exit 3",
    }
    ids = {name: daemon.add(noting(tmp_path, name, script), name=name) for name, script in scripts.items()}
    rows = {name: daemon.started(task_id) for name, task_id in ids.items()}
    daemon.kill9()
    assert all(is_alive(found.pid) for found in rows.values())
    (tmp_path / "early").touch()
    wait_until(lambda: not is_alive(rows["ending"].pid), what="the end of an agent without a daemon")
    daemon.start()
    assert daemon.call("daemon.status")["running"] >= 2
    go.touch()
    ended = {name: daemon.wait(task_id) for name, task_id in ids.items()}
    assert [ended[name]["state"] for name in scripts] == [c.READY, c.FAILED, c.FAILED]
    assert [execution(daemon, ids[name])["exit_code"] for name in scripts] == [0, 7, 3]
    for name, task_id in ids.items():
        assert runs(tmp_path, name) == 1 and len(daemon.call("task.get", id=task_id)["executions"]) == 1
        assert ended[name]["execution"]["id"] == rows[name].id
    lines = log_of(daemon, ids["writing"]).splitlines()
    assert lines[:-1] == [f"line {n + 1}" for n in range(len(lines) - 1)] and lines[-1] == "last"  # unbroken
    kinds = [event["kind"] for event in daemon_events(daemon) if event["task_id"] == ids["silent"]]
    assert kinds.count("execution.started") == kinds.count("execution.ended") == 1


def daemon_events(daemon):
    client = daemon.new_client()
    last = client.call("daemon.status")["last_event"]
    events = []
    for event in client.stream("events.watch", since=0):
        events.append(event)
        if event["seq"] >= last:
            client.close()
            return events


@pytest.mark.parametrize("victims", ["supervisor", "agent", "both"])
def test_what_was_killed_beside_the_daemon_is_settled_and_never_runs_beside_itself(daemon, tmp_path, victims):
    lost = victims != "agent"
    script = noting(tmp_path, "agent", f"echo $$ > {tmp_path}/pid; echo up; [ -e {tmp_path}/second ] && exit 0; sleep 60")
    task_id = daemon.add(script)
    found = daemon.started(task_id)
    agent = int((tmp_path / "pid").read_text())
    daemon.kill9()
    (tmp_path / "second").touch()  # if it runs again, it succeeds
    if victims in ("supervisor", "both"):
        os.kill(found.pid, signal.SIGKILL)
    if victims in ("agent", "both"):
        os.kill(agent, signal.SIGKILL)
    daemon.start()
    ended = daemon.wait(task_id)
    assert not c.marked_processes([found.id])  # an agent without its supervisor was ended before anything else ran
    first = daemon.call("task.get", id=task_id)["executions"][-1]
    if lost:
        assert (first["reason"], ended["state"], runs(tmp_path, "agent")) == ("lost", c.READY, 2)
        assert ended["attempts"] == 0
    else:
        assert (first["reason"], first["exit_code"], ended["state"]) == ("agent_error", 137, c.FAILED)
        assert runs(tmp_path, "agent") == 1


def test_a_stranger_who_got_the_pid_is_neither_adopted_nor_touched(daemon, tmp_path):
    task_id = daemon.add(noting(tmp_path, "agent", f"echo up; [ -e {tmp_path}/second ] && exit 0; sleep 60"))
    found = daemon.started(task_id)
    daemon.kill9()
    (tmp_path / "second").touch()
    os.kill(found.pid, signal.SIGKILL)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            store = c.Store(str(daemon.data_dir / "claudomator.db"))
            store.update_execution(found.id, pid=stranger.pid)  # the pid of old with another process behind it
            store.close()
            daemon.start()
            assert daemon.wait(task_id)["state"] == c.READY and runs(tmp_path, "agent") == 2
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_claimed_execution_that_never_started_goes_back_to_the_queue(daemon, tmp_path):
    task_id = daemon.add(noting(tmp_path, "agent", "echo up"), queue=False)
    daemon.kill9()
    store = c.Store(str(daemon.data_dir / "claudomator.db"))
    life = c.Lifecycle(store)
    life.claim(life.enqueue(task_id), "shell", "", 60.0, str(daemon.data_dir / "executions"))
    store.close()
    daemon.start()
    assert daemon.wait(task_id)["state"] == c.READY
    task = daemon.call("task.get", id=task_id)
    assert [run["status"] for run in task["executions"]] == [c.COMPLETED, c.FAILED] and runs(tmp_path, "agent") == 1
    assert task["executions"][1]["reason"] == "lost" and task["task"]["attempts"] == 0


@pytest.mark.slow
def test_the_timeout_is_enforced_while_no_daemon_lives(daemon, tmp_path):
    task_id = daemon.add("echo up; trap '' TERM; while true; do sleep 1; done", timeout="1s")
    found = daemon.started(task_id)
    daemon.kill9()
    wait_until(lambda: not is_alive(found.pid) and not c.marked_processes([found.id]), 25, "the end by timeout")
    daemon.start()
    ended = daemon.wait(task_id)
    assert (ended["state"], ended["reason"]) == (c.TIMED_OUT, "timed_out")
    assert execution(daemon, task_id)["exit_code"] == 137


@pytest.mark.parametrize("phase", ["setup", "verify"])
def test_killed_while_it_prepares_or_checks_the_work_the_daemon_does_it_again_and_once(tmp_path, phase):
    bare, copy = make_repository(tmp_path)
    hold = f"echo in >> {tmp_path}/{phase}.seen; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    config = f'[[projects]]\nname = "p"\ndir = "{copy}"\n' + (f'setup = "{hold}"\n' if phase == "setup" else "")
    with DaemonProcess(tmp_path, config) as daemon:
        script = noting(tmp_path, "agent", "echo work > new.txt; git add new.txt; git commit -qm work")
        task_id = daemon.add(script, agent={"project_dir": str(copy)}, **({"verify": hold} if phase == "verify" else {}))
        wait_until((tmp_path / f"{phase}.seen").exists)
        daemon.kill9()
        (tmp_path / "go").touch()
        daemon.start()
        assert daemon.wait(task_id)["state"] == c.READY
        assert runs(tmp_path, "agent") == 1
        log = subprocess.run(["git", "-C", str(bare), "log", "--format=%s", "main"], capture_output=True, text=True, check=True)
        assert log.stdout.split() == ["work", "first"]
        wait_until(lambda: not list((daemon.data_dir / "sandboxes").glob("[!.]*")), what="the removal of the sandbox")


def test_a_stopping_daemon_leaves_its_agents_at_work(daemon, tmp_path):
    task_id = daemon.add(noting(tmp_path, "agent", f"echo up; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"))
    found = daemon.started(task_id)
    assert daemon.terminate() == 0 and is_alive(found.pid)
    assert "1 agent at work without the daemon" in daemon.log()
    daemon.start()
    (tmp_path / "go").touch()
    assert daemon.wait(task_id)["state"] == c.READY and runs(tmp_path, "agent") == 1


def test_a_draining_daemon_waits_for_its_agents(tmp_path):
    with DaemonProcess(tmp_path, 'on_shutdown = "drain"\nshutdown_timeout = "20s"\n') as daemon:
        task_id = daemon.add("echo up; sleep 0.3; echo end")
        daemon.started(task_id)
        assert daemon.terminate() == 0
        assert daemon.row(task_id).status == c.COMPLETED


# -- a stop is a stop


STUBBORN = """
trap '' TERM
setsid sh -c 'trap "" TERM; echo escaped; while true; do sleep 0.2; done' &
setsid sleep 300 &
echo up
while true; do sleep 0.2; done
"""


def test_cancel_returns_when_nothing_of_the_agent_is_left_and_strangers_live(daemon, tmp_path):
    with subprocess.Popen(["sh", "-c", "trap '' TERM; while true; do sleep 0.2; done"]) as stranger:
        try:
            task_id = daemon.add(STUBBORN)
            found = daemon.started(task_id)
            wait_until(lambda: "escaped" in log_of(daemon, task_id))
            assert len(c.marked_processes([found.id])) >= 3
            cancelled = daemon.call("task.cancel", ids=[task_id])["tasks"][0]
            assert not c.marked_processes([found.id]) and not is_alive(found.pid)
            assert (cancelled["state"], cancelled["reason"]) == (c.CANCELLED, "cancelled")
            assert stranger.poll() is None and daemon.call("daemon.status")["running"] == 0
        finally:
            stranger.kill()


@pytest.mark.slow
def test_a_cancel_that_the_daemon_did_not_live_to_finish_is_finished_by_the_next(daemon, tmp_path):
    task_id = daemon.add(STUBBORN)
    found = daemon.started(task_id)
    client = daemon.new_client()
    client._send("task.cancel", {"ids": [task_id]})
    wait_until(lambda: daemon.row(task_id).stop_reason == "cancelled")
    daemon.kill9()
    daemon.start()
    ended = daemon.wait(task_id, 30)
    assert ended["state"] == c.CANCELLED and not c.marked_processes([found.id])


@pytest.mark.slow
def test_cancel_reaches_a_clone_and_a_check_too(tmp_path):
    bare, copy = make_repository(tmp_path)
    hold = f"echo in >> {tmp_path}/seen; sleep 300"
    config = f'[[projects]]\nname = "p"\ndir = "{copy}"\nsetup = "[ ! -e {tmp_path}/slow ] || sleep 300"\n'
    with DaemonProcess(tmp_path, config) as daemon:
        checked = daemon.add("echo x > x; git add x; git commit -qm x", agent={"project_dir": str(copy)}, verify=hold)
        wait_until((tmp_path / "seen").exists)
        (tmp_path / "slow").touch()
        cloning = daemon.add("true", agent={"project_dir": str(copy)})
        wait_until(lambda: (found := daemon.row(cloning)) and found.sandbox_dir and os.path.isdir(found.sandbox_dir))
        for task_id in (checked, cloning):
            found = daemon.row(task_id)
            assert daemon.call("task.cancel", ids=[task_id])["tasks"][0]["state"] == c.CANCELLED
            assert not c.marked_processes([found.id])
        log = subprocess.run(["git", "-C", str(bare), "log", "--format=%s", "main"], capture_output=True, text=True, check=True)
        assert log.stdout.split() == ["first"]


@pytest.mark.slow
def test_a_silent_agent_is_stopped_as_stalled(daemon, tmp_path):
    task_id = daemon.add("echo up; sleep 300", stall_timeout="1s")
    ended = daemon.wait(task_id)
    assert (ended["state"], ended["reason"]) == (c.TIMED_OUT, "stalled")


# -- two daemons, and peace


def test_a_second_daemon_is_refused_and_the_first_is_unharmed(daemon, tmp_path):
    second = daemon.cli("serve")
    assert second.returncode == 3 and "another daemon" in second.stderr and str(daemon.process.pid) in second.stderr
    assert daemon.call("daemon.status")["pid"] == daemon.process.pid


def test_a_reload_takes_a_good_configuration_and_refuses_a_bad_one_with_a_reason(daemon):
    daemon.config_path.write_text("max_concurrent = 7\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: daemon.call("daemon.status")["max_concurrent"] == 7)
    daemon.config_path.write_text("max_concurent = 9\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "max_concurrent" in daemon.log() and "the present one stays" in daemon.log())
    with pytest.raises(c.ClaudomatorError, match="did you mean 'max_concurrent'"):
        daemon.call("daemon.reload")
    assert daemon.call("daemon.status")["max_concurrent"] == 7


@pytest.mark.slow
def test_an_idle_daemon_sleeps(daemon):
    daemon.wait(daemon.add("true"))

    def switches():
        text = pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text()
        return int(text.split("voluntary_ctxt_switches:")[1].split()[0])
    wait_until(lambda: not daemon.call("daemon.status")["running"])
    daemon.client.close()
    _pause(0.5)  # what the last request left to do
    before = switches()
    _pause(1.5)
    assert switches() == before


def _pause(seconds):
    """Time during which nothing shall happen."""
    subprocess.run(["sleep", str(seconds)], check=True)


# -- what an execution leaves


def test_without_a_sandbox_the_changestats_come_from_the_last_line_that_git_printed(daemon):
    ended = daemon.wait(daemon.add("echo ' 1 file changed, 9 insertions(+)'; echo ' 3 files changed, 12 insertions(+), 4 deletions(-)'"))
    assert ended["execution"]["changestats"] == {"files_changed": 3, "insertions": 12, "deletions": 4}


def test_a_stderr_that_takes_nothing_does_not_end_the_daemon(tmp_path):
    daemon = DaemonProcess(tmp_path)
    daemon.log_path = pathlib.Path("/dev/full")
    with daemon:
        assert daemon.wait(daemon.add("true"))["state"] == c.READY and daemon.process.poll() is None
