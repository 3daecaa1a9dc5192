"""Section 18: the supervisor, identity of processes, the mark, and the sweep, on real processes."""
import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import claudomator as c
from tests.support import wait_until

ENV = {"PATH": os.environ["PATH"], "LC_ALL": "C"}


def own(name):
    """An execution id of this test run's own: another one on this machine would sweep its processes."""
    return f"{name}-{os.getpid()}"


def supervise(directory, script, *, execution_id="", timeout_s=0.0, grace_s=0.5, env=None, stdin="/dev/null", gate=True):
    """A supervisor that runs a shell script; its gate is opened unless told otherwise."""
    directory.mkdir(exist_ok=True)
    supervisor = c.spawn_supervisor(str(directory), execution_id or own("e-1"), ("/bin/sh", "-c", script), env=env or ENV,
                                    cwd=str(directory), stdin_path=stdin, timeout_s=timeout_s, grace_s=grace_s)
    if gate:
        supervisor.open_gate()
    return supervisor


def end(supervisor, timeout_s=10.0):
    async def ended():
        await asyncio.wait_for(c.wait_for_exit(supervisor.pid, supervisor.start), timeout_s)
    asyncio.run(ended())


def code_of(directory):
    return c.read_exit_status(str(directory))


def run(directory, script, **options):
    """Run a script under a supervisor to its end; returns what the exit file says."""
    supervisor = supervise(directory, script, **options)
    end(supervisor)
    return code_of(directory)


def text(path, name="stdout.log"):
    return (path / name).read_text()


def is_alive(pid):
    return c.process_start(pid) is not None


def pid_from(path):
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), what=f"{path.name}")
    return int(path.read_text())


@pytest.fixture
def marked():
    """Ids whose processes end with the test."""
    ids = []
    yield ids
    while c.signal_marked(ids, signal.SIGKILL):
        time.sleep(0.01)


# -- the supervisor


@pytest.mark.parametrize("script, code", [("exit 0", 0), ("exit 7", 7), ("exit 127", 127), ("exit 124", 124),
                                          ("kill -9 $$", 137), ("kill -15 $$", 143), ("kill -11 $$", 139)])
def test_the_true_exit_status_is_recorded(tmp_path, script, code):
    assert run(tmp_path, script) == (code, False)


def test_output_goes_to_the_logs_and_is_appended(tmp_path):
    (tmp_path / "stdout.log").write_text("before\n")
    run(tmp_path, "echo out; echo err >&2")
    assert text(tmp_path) == "before\nout\n" and text(tmp_path, "stderr.log") == "err\n"
    assert (tmp_path / "exit").stat().st_mode & 0o777 == 0o600


def test_stdin_is_the_given_file_and_arguments_stay_whole(tmp_path):
    (tmp_path / "in").write_text("line 1\nline 2\n")
    supervisor = c.spawn_supervisor(str(tmp_path), "e", ("/bin/sh", "-c", 'cat; printf "<%s>" "$@"', "x", "a b", "", "*", "'\n\""),
                                    env=ENV, cwd=str(tmp_path), stdin_path=str(tmp_path / "in"), timeout_s=0)
    supervisor.open_gate()
    end(supervisor)
    assert text(tmp_path) == "line 1\nline 2\n<a b><><*><'\n\">"


def test_the_agent_inherits_three_descriptors_no_ignored_signal_and_its_mark(tmp_path):
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(12)]  # so that low numbers are taken
    os.set_inheritable(spare[-1], True)
    c.keep_descriptors()
    env = {**ENV, c.MARK: "of-an-outer-agent", "OTHER": "1"}
    os.set_inheritable(spare[0], True)  # as a parent may have left one
    c.keep_descriptors()  # what the daemon does at its start
    try:
        run(tmp_path, "ls -l /proc/$$/fd; grep -E 'Sig(Ign|Blk)' /proc/self/status; env", execution_id=own("mine"), env=env)
    finally:
        for descriptor in spare:
            os.close(descriptor)
    lines = text(tmp_path).splitlines()
    descriptors = {line.split()[-3]: line.split()[-1] for line in lines if " -> " in line}
    assert descriptors == {"0": "/dev/null", "1": str(tmp_path / "stdout.log"), "2": str(tmp_path / "stderr.log")}
    # the standard signals; glibc's own two may come down from whoever started the tests
    assert [int(line.split()[1], 16) & 0x7FFFFFFF for line in lines if line.startswith("Sig")] == [0, 0]
    assert f"{c.MARK}={own('mine')}" in lines and "OTHER=1" in lines and not any("outer" in line for line in lines)
    assert not any(line.startswith(("CLAUDOMATOR_", "word", "hit")) and not line.startswith(c.MARK) for line in lines)


def test_an_agent_does_not_start_before_the_gate_opens(tmp_path):
    supervisor = supervise(tmp_path, "echo ran", gate=False)
    try:
        assert c.is_same_process(supervisor.pid, supervisor.start, c.boot_id()) and not (tmp_path / "stdout.log").exists()
    finally:
        supervisor.open_gate()
        end(supervisor)
    assert text(tmp_path) == "ran\n"


def test_an_abandoned_supervisor_leaves_without_a_trace(tmp_path):
    supervisor = supervise(tmp_path, "echo ran", gate=False)
    supervisor.abandon()
    supervisor.abandon()
    end(supervisor)
    assert code_of(tmp_path) == (None, False) and not (tmp_path / "stdout.log").exists()


def test_a_supervisor_that_is_told_to_stop_at_its_gate_starts_nothing(tmp_path):
    supervisor = supervise(tmp_path, "echo ran", gate=False)
    assert c.signal_process(supervisor.pid, supervisor.start, signal.SIGTERM)
    supervisor.open_gate()
    end(supervisor)
    assert not (tmp_path / "stdout.log").exists() and code_of(tmp_path)[0] is None


def test_a_gate_whose_supervisor_is_dead_opens_without_an_error(tmp_path):
    supervisor = supervise(tmp_path, "echo ran", gate=False)
    os.kill(supervisor.pid, signal.SIGKILL)
    end(supervisor)
    supervisor.open_gate()
    assert not (tmp_path / "stdout.log").exists()


def test_the_gate_closes_when_the_daemon_dies_and_the_agent_never_starts(tmp_path):
    code = ("import claudomator as c, os, sys\n"
            "s = c.spawn_supervisor(sys.argv[1], 'e', ('/bin/sh', '-c', 'echo ran'), env={}, cwd='/', stdin_path='/dev/null',"
            " timeout_s=0)\nprint(s.pid, s.start, flush=True)\nos.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
                          cwd=pathlib.Path(c.__file__).parent)
    pid, start = map(int, done.stdout.split())
    wait_until(lambda: c.process_start(pid) != start)
    assert not (tmp_path / "stdout.log").exists() and not (tmp_path / "exit").exists()


def test_a_working_directory_that_is_gone_ends_with_125_and_says_so(tmp_path):
    supervisor = c.spawn_supervisor(str(tmp_path), "e", ("/bin/true",), env=ENV, cwd=str(tmp_path / "gone"),
                                    stdin_path="/dev/null", timeout_s=0)
    supervisor.open_gate()
    end(supervisor)
    assert code_of(tmp_path) == (125, False) and "gone" in text(tmp_path, "stderr.log")


def test_a_supervisor_that_cannot_be_spawned_is_an_error(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(c.SpawnError, match="supervisor could not be started"):
        c.spawn_supervisor(str(tmp_path / "gone"), "e", ("/bin/true",), env=ENV, cwd="/", stdin_path="/dev/null", timeout_s=0)
    with pytest.raises(c.SpawnError):
        c.spawn_supervisor(str(tmp_path), "e", ("/bin/echo", "a\0b"), env=ENV, cwd="/", stdin_path="/dev/null", timeout_s=0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_timeout_needs_nobody(tmp_path):
    began = time.monotonic()
    assert run(tmp_path, "sleep 60", timeout_s=0.3) == (124, False)
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_the_timeout_kills_what_ignores_sigterm_and_what_has_left_its_group(tmp_path, marked):
    marked.append(own("stubborn"))
    script = f"trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ >{tmp_path}/child; while :; do sleep 60; done' & " \
             "while :; do sleep 60; done"
    assert run(tmp_path, script, timeout_s=0.5, execution_id=own("stubborn")) == (137, False)
    wait_until(lambda: not is_alive(pid_from(tmp_path / "child")) and not c.marked_processes([own("stubborn")]))  # SIGKILL is sent


def test_a_stop_reaches_the_agent_and_the_status_stays_true(tmp_path):
    supervisor = supervise(tmp_path, "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done")
    wait_until(lambda: (tmp_path / "stdout.log").exists() and text(tmp_path) == "up\n")
    for _ in range(3):  # told more than once, as by two daemons
        c.signal_process(supervisor.pid, supervisor.start, signal.SIGTERM)
    end(supervisor)
    assert code_of(tmp_path) == (9, True)


@pytest.mark.slow
def test_a_stop_at_any_moment_ends_the_agent_and_is_recorded(tmp_path):
    """The supervisor is told between opening of the gate and well into the run; it never goes on as if nothing was."""
    for step in range(20):
        directory = tmp_path / str(step)
        supervisor = supervise(directory, "trap 'exit 5' TERM; sleep 30 & wait", execution_id=own(f"any-{step}"))
        time.sleep(step * 0.0004)
        c.signal_process(supervisor.pid, supervisor.start, signal.SIGTERM)
        began = time.monotonic()
        end(supervisor)
        assert time.monotonic() - began < 3
        code, told = code_of(directory)
        assert (code is None and not (directory / "stdout.log").exists()) or (told and code in (5, 143)), (step, code)
        wait_until(lambda: not c.marked_processes([own(f"any-{step}")]))  # what SIGKILL was sent to may take a moment to die


def test_an_agent_that_ends_while_it_is_told_to_stop_keeps_its_own_status(tmp_path):
    for step in range(25):
        directory = tmp_path / str(step)
        supervisor = supervise(directory, "trap '' TERM; exit 3")
        time.sleep(step * 0.0003)
        for _ in range(3):
            c.signal_process(supervisor.pid, supervisor.start, signal.SIGTERM)
        end(supervisor)
        assert code_of(directory)[0] in (3, 143, None)  # 143: told before the agent could ignore it


@pytest.mark.slow
def test_a_full_disk_delays_the_exit_status_and_does_not_lose_it(tmp_path):
    (tmp_path / "exit").mkdir()  # as good as a full disk: the file cannot be written
    supervisor = supervise(tmp_path, "echo done; exit 3")
    wait_until(lambda: "exit" in text(tmp_path, "stderr.log"))
    assert is_alive(supervisor.pid)
    (tmp_path / "exit").rmdir()
    end(supervisor)
    assert code_of(tmp_path) == (3, False)


def test_a_supervisor_whose_directory_was_deleted_does_not_stay(tmp_path):
    directory = tmp_path / "execution"
    supervisor = supervise(directory, f"cd /; rm -r {directory}")
    end(supervisor, 3)
    assert not directory.exists()


def test_the_supervisor_of_a_silent_agent_is_small(tmp_path, marked):
    marked.append(own("small"))
    supervisor = supervise(tmp_path, "exec sleep 60", execution_id=own("small"))
    try:
        agent = next(iter(wait_until(lambda: c.marked_processes([own("small")]))))
        wait_until(lambda: any(b"sleep" == pathlib.Path(f"/proc/{pid}/comm").read_bytes().strip()
                               for pid in c.marked_processes([own("small")])))
        assert agent
        own_kb = 0
        for pid in [supervisor.pid, *c.marked_processes([own("small")])]:
            if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "timeout"):
                rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
                own_kb += int(rollup.split("\nPrivate_Dirty:")[1].split()[0])
        assert 0 < own_kb < 500
    finally:
        c.signal_process(supervisor.pid, supervisor.start, signal.SIGTERM)
        end(supervisor)


@pytest.mark.parametrize("content, expected", [("0\n", (0, False)), ("143 stopped\n", (143, True)), ("", (None, False)),
                                               ("x\n", (None, False)), ("-1\n", (None, False)), ("٣\n", (None, False)),
                                               ("12 stopped", (12, True))])
def test_the_exit_file_is_read_strictly(tmp_path, content, expected):
    (tmp_path / "exit").write_text(content)
    assert c.read_exit_status(str(tmp_path)) == expected


def test_pipes_links_and_directories_in_place_of_a_file_are_refused_and_hold_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text("0\n")
    (tmp_path / "exit").symlink_to(tmp_path / "secret")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "exit", "directory", "absent"):
        with pytest.raises(OSError):
            c.open_plain(str(tmp_path / name))
    assert c.read_exit_status(str(tmp_path)) == (None, False)
    with c.open_plain(str(tmp_path / "secret")) as file:
        assert file.read() == b"0\n"


# -- identity


@pytest.mark.parametrize("name", ["plain", "with space", "a) S 1 (b", "((("])
def test_the_start_time_is_read_whatever_the_process_is_called(tmp_path, name):
    program = tmp_path / name
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        wait_until(lambda: pathlib.Path(f"/proc/{process.pid}/comm").read_text() == name + "\n")
        start = c.process_start(process.pid)
        assert start is not None and c.process_start(os.getpid()) <= start
        assert c.is_same_process(process.pid, start, c.boot_id())
        assert not c.is_same_process(process.pid, start + 1, c.boot_id())
        assert not c.is_same_process(process.pid, start, "another boot")
        assert not c.is_same_process(process.pid, None, c.boot_id()) and not c.is_same_process(None, None, c.boot_id())
        process.kill()
        wait_until(lambda: c.process_start(process.pid) is None, what="a zombie counts as ended")
    finally:
        process.kill()
        process.wait()
    assert c.process_start(process.pid) is None


def test_a_stranger_with_a_recorded_pid_is_not_signalled():
    process = subprocess.Popen(["sleep", "60"])
    try:
        start = c.process_start(process.pid)
        assert not c.signal_process(process.pid, start - 1, signal.SIGKILL) and process.poll() is None
        assert c.signal_process(process.pid, start, signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
        assert not c.signal_process(process.pid, start, signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_the_end_is_noticed_at_once_and_the_child_is_reaped(tmp_path):
    async def watch():
        supervisor = supervise(tmp_path, "sleep 0.2")
        await asyncio.wait_for(c.wait_for_exit(supervisor.pid, supervisor.start), 5)
        assert not os.path.exists(f"/proc/{supervisor.pid}")  # not even a zombie
        await asyncio.wait_for(c.wait_for_exit(supervisor.pid, supervisor.start), 1)  # again: it returns
        await asyncio.wait_for(c.wait_for_exit(os.getpid(), 1), 1)  # a stranger has the pid
    asyncio.run(watch())


def test_no_descriptor_left_is_an_error_and_not_the_end_of_the_agent(tmp_path):
    code = ("import asyncio, claudomator as c, os, resource\n"
            "async def main():\n"
            "    start = c.process_start(os.getpid())\n"
            "    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)\n"
            "    for attempt in (c.wait_for_exit(os.getpid(), start), asyncio.to_thread(c.marked_processes, ['x'])):\n"
            "        try:\n            await attempt\n            print('no error')\n"
            "        except OSError as error:\n            print(error.errno)\n"
            "asyncio.run(main())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=pathlib.Path(c.__file__).parent)
    assert done.stdout.split() == ["24", "24"], done.stderr[-500:]


# -- the mark


def test_marked_processes_are_found_by_the_whole_mark_and_nothing_else(marked):
    marked += [own("aa"), own("aab")]
    with subprocess.Popen(["sleep", "60"], env={c.MARK: own("aa"), "X": "y"}, start_new_session=True) as one, \
            subprocess.Popen(["sleep", "60"], env={"X": f"{c.MARK}={own('aa')}", f"Y{c.MARK}": own("aa")}) as stranger, \
            subprocess.Popen(["sleep", "60"], env={c.MARK: own("aab")}) as other:
        try:
            assert c.marked_processes([own("aa")]) == {one.pid: own("aa")}
            assert c.marked_processes([own("aa"), own("aab"), "none"]) == {one.pid: own("aa"), other.pid: own("aab")}
            assert c.marked_processes([]) == {} and c.signal_marked([], signal.SIGKILL) == 0
            assert c.signal_marked([own("aa")], signal.SIGKILL) == 1 and one.wait(5) == -9
            assert stranger.poll() is None and other.poll() is None
            assert c.marked_processes([own("aa")]) == {}
        finally:
            stranger.kill()
            other.kill()


def test_what_was_started_first_is_found_first(marked):
    """So a shell is ended before its child: it must not go on with its next command."""
    marked.append(own("row"))
    processes = [subprocess.Popen(["sleep", "60"], env={c.MARK: own("row")}) for _ in range(12)]
    wait_until(lambda: len(c.marked_processes([own("row")])) == 12)
    pids = list(c.marked_processes([own("row")]))
    for process in processes:
        process.kill()
        process.wait()
    assert pids == sorted(pids)


def test_a_process_that_carries_another_mark_is_looked_at_once_and_found_when_its_own_is_wanted(marked):
    marked.append(own("e-later"))
    with subprocess.Popen(["sleep", "60"], env={c.MARK: own("e-later")}) as process:
        assert c.marked_processes([own("e-other")]) == {}
        known = [marks for (pid, _), marks in c._MARKED.items() if pid == str(process.pid)]
        assert known == [{f"{c.MARK}={own('e-later')}".encode()}]
        assert c.marked_processes([own("e-other"), own("e-later")]) == {process.pid: own("e-later")}
        process.kill()
        process.wait()
        c.marked_processes([own("e-other")])
        assert str(process.pid) not in {pid for pid, _ in c._MARKED}


def test_a_process_that_was_looked_at_between_fork_and_exec_is_found_however_much_later(marked, monkeypatch):
    monkeypatch.setattr(c, "UNMARKED_S", 0.1)
    marked.append(own("e-young"))
    script = f"read word; exec env {c.MARK}={own('e-young')} sleep 60"  # unmarked at first, as a child of the daemon is
    with subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, env=ENV) as process:
        assert c.marked_processes([own("e-young")]) == {}
        seen = time.monotonic()
        process.stdin.write(b"go\n")
        process.stdin.close()
        comm = pathlib.Path(f"/proc/{process.pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n" and time.monotonic() > seen + c.UNMARKED_S)
        assert c.marked_processes([own("e-young")]) == {process.pid: own("e-young")}
        process.kill()


def test_a_mark_behind_a_large_environment_is_found(marked):
    marked.append(own("far"))
    env = {f"V{n}": "x" * 100_000 for n in range(10)} | {c.MARK: own("far")}
    with subprocess.Popen(["sleep", "60"], env=env) as process:
        try:
            assert c.marked_processes([own("far")]) == {process.pid: own("far")}
        finally:
            process.kill()


def test_the_sweep_ends_what_ignores_sigterm_and_spares_strangers_of_the_same_name(marked):
    marked.append(own("swept"))
    stranger = subprocess.Popen(["sleep", "61"], env={c.MARK: own("someone-else")})
    polite = subprocess.Popen(["sleep", "61"], env={c.MARK: own("swept")}, start_new_session=True)
    stubborn = subprocess.Popen([sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\n"
                                 "while True: time.sleep(60)"], env={c.MARK: own("swept")}, stdout=subprocess.PIPE)
    try:
        stubborn.stdout.readline()
        began = time.monotonic()
        assert asyncio.run(c.sweep([own("swept")], grace_s=0.3)) == 2
        assert 0.25 < time.monotonic() - began < 3
        assert not c.marked_processes([own("swept")]) and stranger.poll() is None
        assert polite.wait(5) == -15 and stubborn.wait(5) == -9
    finally:
        for process in (stranger, polite, stubborn):
            process.kill()
            process.wait()
        stubborn.stdout.close()


def test_sweeps_of_one_tick_share_a_look_and_a_dirty_one_holds_up_no_other(marked):
    marked.append(own("dirty"))
    stubborn = subprocess.Popen([sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\n"
                                 "while True: time.sleep(60)"], env={c.MARK: own("dirty")}, stdout=subprocess.PIPE)

    async def clean():
        sweeps, ended = c.SweepQueue(), []

        async def one(execution_id):
            await sweeps.clean(execution_id)
            ended.append(execution_id)
        began = time.monotonic()
        first = [asyncio.ensure_future(one(name)) for name in (own("dirty"), "clean-1", "clean-2")]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait_for(one("later"), 1)
        assert ended == ["clean-1", "clean-2", "later"] and time.monotonic() - began < 1.5
        first[0].cancel()  # a waiter that gives up takes nobody with it
        await asyncio.wait_for(one("last"), 1)
    try:
        stubborn.stdout.readline()
        asyncio.run(clean())
    finally:
        stubborn.kill()
        stubborn.wait()
        stubborn.stdout.close()


# -- threads


def test_a_blocking_function_runs_beside_the_loop_and_its_result_or_error_comes_back():
    async def work():
        loop_thread = c.sys.modules["threading"].get_ident()
        other = await c.in_thread(c.sys.modules["threading"].get_ident)
        assert other != loop_thread
        slow = asyncio.ensure_future(c.in_thread(time.sleep, 0.2))
        assert await c.in_thread(int, "7", base=8) == 7 and not slow.done()
        with pytest.raises(ZeroDivisionError):
            await c.in_thread(lambda: 1 / 0)
        slow.cancel()  # its thread ends later, into a loop that may have gone: no noise
    import threading  # noqa: F401
    asyncio.run(work())
