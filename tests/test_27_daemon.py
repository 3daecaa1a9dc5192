"""Section 27: what a daemon inherits, how it stops, reloads and comes back, with real daemon processes."""
import inspect
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

import claudomator as c
from tests.support import COMMAND, DaemonProcess, shell_task, wait_until


STAND_INS = ("asyncio.sslproto", "asyncio.staggered", "inspect", "linecache", "logging", "ssl", "subprocess", "traceback", "typing")


def in_a_fresh_python(code):
    """What ``code`` prints in an interpreter that has imported nothing but the program and its asyncio."""
    begin = (f"import sys; sys.path.insert(0, {str(pathlib.Path(c.__file__).parent)!r})\n"
             "import claudomator as c; before = set(sys.modules); asyncio = c.import_asyncio()\n")
    return subprocess.run([sys.executable, "-I", "-S", "-c", begin + code], check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout


def test_a_daemon_at_rest_has_not_imported_what_asyncio_seldom_needs(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        daemon.terminate()
        with open(tmp_path / "imported", "wb") as log:
            daemon.process = subprocess.Popen([sys.executable, "-I", "-S", "-X", "importtime", c.__file__, "serve"], env=daemon.env,
                                              stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: b"serves" in (tmp_path / "imported").read_bytes(), 20)
        imported = {line.rpartition("|")[2].strip() for line in (tmp_path / "imported").read_text().splitlines() if "|" in line}
        assert {"asyncio", "asyncio.base_events", "selectors", "_sqlite3"} <= imported
        assert not imported & {*STAND_INS, "_ssl", "ast", "dis", "locale", "re", "tokenize"} - {"ssl"}
        assert daemon.terminate() == 0


def test_what_asyncio_was_not_given_comes_when_it_asks_for_it():
    assert in_a_fresh_python(f"print([name for name in {STAND_INS} if name in sys.modules.keys() - before])") == "[]\n"
    said = in_a_fresh_python("""
import os, signal
async def main():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, print, "a signal")
    try:
        loop.add_signal_handler(signal.SIGUSR2, main)
    except TypeError as error:
        print(error)
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.call_soon(lambda: 1 / 0)
    done = await asyncio.create_subprocess_exec("echo", "a process", stdout=asyncio.subprocess.PIPE)
    print(await done.stdout.read(), await done.wait(), asyncio.iscoroutinefunction(main), asyncio.iscoroutinefunction(print))
    asyncio.current_task().print_stack()
    try:
        await asyncio.open_connection("127.0.0.1", 1, happy_eyeballs_delay=0.1)
    except OSError as error:
        print(type(error).__name__)
    try:
        await asyncio.open_connection("127.0.0.1", 1, ssl=True)
    except Exception as error:
        print("no TLS:", type(error).__name__)
asyncio.run(main())
import concurrent.futures, logging, subprocess, traceback, typing
print(typing.get_type_hints(asyncio.Timeout.when), typing.get_type_hints(asyncio.Timeout.__aexit__)["exc_type"]
      == type[BaseException] | None)
future = concurrent.futures.Future()
future.add_done_callback(lambda _: 1 / 0)
future.set_result(None)
print(concurrent.futures._base.LOGGER.name, (asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT, asyncio.subprocess.DEVNULL)
      == (subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL), asyncio.futures.STACK_DEBUG == logging.DEBUG - 1)
asyncio.run(asyncio.sleep(0), debug=True)
""")
    for expected in ("a signal\n", "coroutines cannot be used with add_signal_handler()", "b'a process\\n' 0 True False", "Stack for <Task",
                     "ConnectionRefusedError", "no TLS: ", "{'return': float | None} True", "concurrent.futures True True", "exception calling callback",
                     "Exception in callback main.<locals>.<lambda>()", "Traceback (most recent call last)"):
        assert expected in said, said
    assert said.count("ZeroDivisionError: division by zero") == 2


def test_a_fault_that_only_asyncio_meets_is_in_the_daemons_log_also_without_a_descriptor_left(tmp_path):
    patch = """
import claudomator as c, os, resource, sys
start = c.Daemon.start
async def start_and_fail(self, **more):
    await start(self, **more)
    loop, limits = asyncio.get_running_loop(), resource.getrlimit(resource.RLIMIT_NOFILE)
    def fail():
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        loop.call_soon(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        asyncio.log.logger.warning("a warning of asyncio's that is lost")
        {}["a fault"]
    loop.call_later(0.1, fail)
c.Daemon.start = start_and_fail
sys.argv = ["claudomator", "serve"]
c.main()
"""
    with DaemonProcess(tmp_path) as daemon:
        daemon.terminate()
        begin = "import sys; sys.path.insert(0, {!r}); import claudomator; asyncio = claudomator.import_asyncio()\n"
        with open(daemon.log_path, "wb") as log:
            daemon.process = subprocess.Popen([sys.executable, "-c", begin.format(str(pathlib.Path(c.__file__).parent)) + patch],
                                              env=daemon.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: "a fault" in daemon.log(), 20)
        said = next(line for line in daemon.log().splitlines() if "a fault" in line)
        assert " error: Exception in callback " in said and "KeyError('a fault') (events.py:" in said
        assert daemon.call("daemon.health") == {"status": "ok"}


def test_a_fault_of_asyncios_names_what_it_is_about(tmp_path):
    log = []
    daemon = c.Daemon(c.parse_config({"data_dir": str(tmp_path)}, "test", str(tmp_path)), None, lambda *line: log.append(line))
    daemon._log_fault(None, {"message": "Task was destroyed", "task": "the task"})
    daemon._log_fault(None, {"message": "It failed", "handle": "the handle", "exception": KeyError("why")})
    assert log[0] == ("error", "Task was destroyed 'the task'")
    assert log[1][1].startswith("It failed 'the handle': ") and "KeyError: 'why'" in log[1][1]


def test_a_coroutine_function_is_known_without_inspect():
    class Thing:
        async def wait(self): ...
        def go(self): ...
    for function in (Thing.wait, Thing().wait, Thing.go, Thing().go, print, len, Thing, at_work, None):
        assert c.is_coroutine_function(function) == inspect.iscoroutinefunction(function), function


def at_work(daemon, tmp_path):
    """(task id, execution) of an agent that works until ``go`` is there."""
    task_id = daemon.add(f": > {tmp_path}/up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
    wait_until((tmp_path / "up").exists)
    return task_id, daemon.row(task_id)


def test_descriptors_that_the_daemon_inherited_do_not_reach_its_agents(tmp_path):
    daemon = DaemonProcess(tmp_path)
    read_end, write_end = os.pipe()
    try:
        with open(daemon.log_path, "ab") as log:
            daemon.process = subprocess.Popen([*COMMAND, "serve"], env=daemon.env, stdin=subprocess.DEVNULL,
                                              stdout=log, stderr=log, pass_fds=(write_end,))
        wait_until(lambda: os.path.exists(daemon.socket_path), 20)
        pipe = os.readlink(f"/proc/self/fd/{write_end}")
        assert os.readlink(f"/proc/{daemon.process.pid}/fd/{write_end}") == pipe
        assert daemon.wait(daemon.add(f"readlink /proc/self/fd/* > {tmp_path}/open; true"))["state"] == c.READY
        held = (tmp_path / "open").read_text()
        assert "stderr.log" in held and pipe not in held
    finally:
        os.close(read_end)
        os.close(write_end)
        daemon.__exit__()


@pytest.mark.slow
@pytest.mark.parametrize("config, least_s, most_s", [
    ('on_shutdown = "drain"\nshutdown_timeout = "600ms"\n', 0.6, 5), ('on_shutdown = "leave"\n', 0, 5)])
def test_a_stop_waits_as_configured_and_leaves_the_agent_at_work_for_the_next(tmp_path, config, least_s, most_s):
    with DaemonProcess(tmp_path, config) as daemon:
        task_id, found = at_work(daemon, tmp_path)
        began = time.monotonic()
        assert daemon.terminate() == 0 and least_s <= time.monotonic() - began < most_s
        assert c.process_start(found.pid) == found.pid_start
        assert "1 agent at work without the daemon" in daemon.log()
        (tmp_path / "go").touch()
        daemon.start()
        ended = daemon.wait(task_id)
        assert (ended["state"], ended["execution"]["id"]) == (c.READY, found.id)


def test_closing_on_a_full_disk_ends_soon_and_loses_neither_tasks_nor_the_agent(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        wal = daemon.data_dir / "claudomator.db-wal"
        while wal.stat().st_size < 250_000:
            daemon.call("task.create", tasks=shell_task("true", description="x" * 20_000))
        kept = daemon.call("daemon.status")["counts"]
        task_id, found = at_work(daemon, tmp_path)
        unlimited = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (200_000, unlimited[1]))  # as good as a full disk
        with pytest.raises(c.ClaudomatorError, match="make room"):
            daemon.add("true")
        began = time.monotonic()
        daemon.terminate()
        assert time.monotonic() - began < 8
        assert "could not be written" in daemon.log().rpartition("1 agent at work")[2], "what was not stored is told"
        assert c.process_start(found.pid) == found.pid_start
        (tmp_path / "go").touch()
        daemon.start()
        assert daemon.wait(task_id)["execution"]["id"] == found.id
        assert daemon.call("daemon.status")["counts"][c.PENDING] == kept[c.PENDING]


def test_a_hangup_with_a_bad_configuration_keeps_the_last_good_one_and_says_why(tmp_path):
    with DaemonProcess(tmp_path, "max_concurrent = 2\n") as daemon:
        daemon.config_path.write_text("max_concurrent = 7\n")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "changed: max_concurrent" in daemon.log())
        for text, why in (("max_concurent = 9\n", "did you mean 'max_concurrent'"),
                          ("max_concurrent = \n", "config.toml")):
            daemon.config_path.write_text(text)
            before = daemon.log().count("the present one stays")
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda: daemon.log().count("the present one stays") > before)
            assert why in daemon.log().rpartition("the present one stays")[2]
            assert daemon.call("daemon.status")["max_concurrent"] == 7


@pytest.mark.slow
def test_start_at_a_retry_delay_a_pause_and_a_park_outlive_the_daemon_and_end_in_their_time(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        began = time.time()
        later = daemon.add(f"date +%s.%N > {tmp_path}/later", start_at="2s", name="later")
        again = daemon.add(f"date +%s.%N >> {tmp_path}/again; exit 1", retry={"max_attempts": 2, "backoff": ["2s"]})
        wait_until(lambda: daemon.call("task.get", id=again)["task"]["attempts"] == 1)
        daemon.call("pool.pause", agent="claude")
        daemon.call("agent.park", agent="claude", until="3h")
        daemon.kill9()
        daemon.start()
        facts = daemon.call("daemon.status")
        assert facts["paused_kinds"] == ["claude"] and daemon.state(later) == daemon.state(again) == c.QUEUED
        assert [agent["kind"] for agent in daemon.call("agent.status")["agents"] if agent["parked"]] == ["claude"]
        assert daemon.wait(later)["state"] == c.READY and daemon.wait(again)["attempts"] == 2
        assert 1.9 < float((tmp_path / "later").read_text()) - began < 6
        first, second = map(float, (tmp_path / "again").read_text().split())
        assert 1.7 < second - first < 6


# ct


@pytest.fixture
def tools(tmp_path):
    """A configuration on a new data directory, and what ``install_ct`` logs."""
    (tmp_path / "it's data").mkdir()
    return c.parse_config_text(f'data_dir = "{tmp_path}/it\'s data"', "config.toml", "/home/ann"), []


def install(tools):
    """Install and compile; returns the compiler's exit code."""
    def log(level, message):
        tools[1].append(message)
    compiled = c.install_ct(tools[0], log)
    pid = compiled and c.compile_ct(compiled, log)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else 0


def made(tools):
    """When each file of ct was written."""
    return {entry.name: entry.stat().st_mtime_ns for entry in pathlib.Path(tools[0].tools_dir).glob("*")}


def test_ct_is_installed_once_and_anew_when_it_changes(tools, tmp_path, monkeypatch):
    (tmp_path / "ct.py").write_text("print('one')\n")
    monkeypatch.setattr(c, "__file__", str(tmp_path / "claudomator.py"))
    command = os.path.join(tools[0].tools_dir, "ct")
    for word in ("one", "one", "another"):
        (tmp_path / "ct.py").write_text(f"import sys; print('{word}', *sys.argv[1:])\n")
        os.utime(tmp_path / "ct.py", (1e9, 1e9))
        before = made(tools)
        install(tools)
        result = subprocess.run([command, "a b", "$HOME"], env={}, capture_output=True, text=True)
        assert (result.stdout, result.stderr) == (f"{word} a b $HOME\n", "")
        same = before == made(tools)
        assert os.stat(command).st_mode & 0o777 == 0o700 and len(os.listdir(tools[0].tools_dir)) == 2
        assert same == (bool(before) and word == "one") and tools[1] == []


def test_without_a_ct_beside_the_program_agents_have_none(tools, tmp_path, monkeypatch):
    install(tools)
    assert os.listdir(tools[0].tools_dir)
    monkeypatch.setattr(c, "__file__", str(tmp_path / "claudomator.py"))
    install(tools)
    assert not os.path.exists(f"{tools[0].tools_dir}/ct") and tools[1] == []


def test_a_ct_that_cannot_be_compiled_says_so_itself_and_stops_nothing(tools, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(c, "__file__", str(tmp_path / "claudomator.py"))
    for text, said in (("print('whole')\n", "whole\n"), ("def\n", "")):
        (tmp_path / "ct.py").write_text(text)
        code = install(tools)
        result = subprocess.run([os.path.join(tools[0].tools_dir, "ct")], env={}, capture_output=True, text=True)
        assert result.stdout == said and ("SyntaxError" in result.stderr) == (code == 1) == (not said)
    assert "SyntaxError" in capfd.readouterr().err and tools[1] == []


def test_a_ct_that_cannot_be_written_is_logged_and_stops_nothing(tools, tmp_path):
    (tmp_path / "it's data" / "bin").write_text("a file")
    assert install(tools) == 0 and "agents may lack it" in tools[1][0]


def test_a_daemon_that_may_start_no_process_runs_with_a_slower_ct(tools, monkeypatch):
    def refuse(*args, **more):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_spawn", refuse)
        assert install(tools) == 0 and "ct takes longer" in tools[1].pop()
    result = subprocess.run([os.path.join(tools[0].tools_dir, "ct"), "--help"], env={}, capture_output=True, text=True)
    assert result.returncode == 0 and "usage" in result.stdout.lower()


def test_an_agent_asks_and_reports_by_ct(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        asks = daemon.add("ct ask 'Which licence' --option MIT --option Apache-2.0")
        reports = daemon.add("ct summary 'Mended the divisor.'; ct task list")
        assert daemon.wait(asks)["question"] == {"text": "Which licence", "options": ["MIT", "Apache-2.0"]}
        done = daemon.wait(reports)
        assert (done["state"], done["summary"]) == ("READY", "Mended the divisor."), done
