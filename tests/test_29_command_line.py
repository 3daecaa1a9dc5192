"""Sections 28, 29 and 32: the command line as a person or a script uses it, against real daemons."""
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib

import pytest

import claudomator as c
from tests.support import COMMAND, PROGRAM, DaemonProcess, clean_environment, shell_task, wait_until


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with DaemonProcess(tmp_path_factory.mktemp("cli"), "max_concurrent = 6") as process:
        yield process


class Result:
    """What a command did."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def document(self):
        """The one JSON document on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def run_here(env, *args):
    """Run the command line in this process: a hundred times as fast as a new one."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = c.main([str(arg) for arg in args])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Result(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


@pytest.fixture
def cli(daemon):
    return lambda *args, **env: run_here({**daemon.env, **env}, *args)


def start(daemon, *args, **more):
    """The command line as a process of its own, for what is not over at once."""
    return subprocess.Popen([*COMMAND, *args], env=daemon.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def settled(daemon, script, **more):
    task_id = daemon.add(script, **more)
    daemon.wait(task_id)
    return task_id


ASK = 'printf \'{"text": "Which one?", "options": ["a", "b"]}\' > "$CLAUDOMATOR_QUESTION_FILE"'


# -- the command line's own grammar


@pytest.mark.parametrize("name", c.COMMANDS)
def test_every_command_has_help_that_names_its_options(name):
    shown, command = run_here({}, *name.split(), "--help"), c.COMMANDS[name]
    assert (shown.code, shown.err) == (0, "") and command.help in shown.out
    if any(other.startswith(name + " ") for other in c.COMMANDS):
        assert all(other in shown.out for other in c.COMMANDS if other.startswith(name + " "))
    else:
        assert f"usage: claudomator {name}" in shown.out
    assert all(", ".join(option.names) in shown.out for option in (*command.options, *c.GLOBAL_OPTIONS))
    assert shown.out == run_here({}, "help", *name.split()).out


@pytest.mark.parametrize("words", sorted({name.rpartition(" ")[0] for name in c.COMMANDS if " " in name}))
def test_the_first_words_of_commands_have_help_on_all_of_them(words):
    shown = run_here({}, *words.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    assert all(f"  {name} " in shown.out for name in c.COMMANDS if name.startswith(f"{words} "))
    if words not in c.COMMANDS:
        bare = run_here({}, *words.split())
        assert (bare.code, bare.out, bare.err) == (c.EXIT_USAGE, "", shown.out)


def test_help_lists_every_command_and_exit_code():
    shown = run_here({}, "--help")
    assert shown.code == 0 and all(f"  {name} {command.usage}".rstrip() in shown.out for name, command in c.COMMANDS.items())
    assert all(f"  {code:<24}{meaning}\n" in shown.out for code, meaning in c.EXIT_CODES)
    nothing = run_here({})
    assert (nothing.code, nothing.out) == (2, "") and "usage:" in nothing.err
    assert run_here({}, "--version").out == f"claudomator {c.__version__}\n"


@pytest.mark.parametrize("args, words", [
    (["srve"], "did you mean 'serve'"), (["ctl", "cancl", "x"], "did you mean 'cancel'"), (["ctl", "serve"], "claudomator ctl --help"),
    (["ctl", "sandbox", "lst"], "did you mean 'list'"),
    (["ctl", "add", "x", "--pririty", "high"], "did you mean '--priority'"), (["ctl", "wait", "x", "--timeout"], "needs a value"),
    (["list", "--limit", "many"], "expected a number"), (["ctl", "add"], "usage: claudomator ctl add"),
    (["ctl", "add", "a", "b"], "got 2 arguments"), (["list", "--json=yes"], "takes no value"), (["ctl", "accept"], "which tasks?"),
    (["ctl", "accept", "x", "--tag", "y"], "not both"), (["ctl", "wait", "x", "--timeout", "soon"], "like 90s"),
    (["ctl", "edit", "x"], "--set KEY=VALUE"), (["ctl", "edit", "x", "--set", "name"], "--set timeout=30m"),
    (["ctl", "edit", "x", "--set", "a=1", "--set", "a.b=2"], "agent.model=opus"), (["ctl", "reject", "x"], "-m"),
    (["ctl", "call", "daemon.status", "[1]"], "JSON object"), (["ctl", "call", "daemon.status", "{"], "not JSON"),
    (["ctl", "agent", "prk", "claude"], "did you mean 'park'"), (["ctl", "pool", "stop"], "claudomator ctl pool --help"),
    (["ctl", "agent", "park"], "usage: claudomator ctl agent park KIND"), (["ctl", "add", "x", "--dir", "/no/where"], "no directory"),
    (["list", "--color", "blue"], "auto, always or never"), (["run", "x.json", "--parallel", "0"], "no file x.json"),
])
def test_wrong_usage_is_told_with_the_way_out(cli, args, words):
    result = cli(*args)
    assert result.code in (2, 3) and result.out == "" and words in result.err and "Traceback" not in result.err
    document = cli(*args, "--json") if "--json=yes" not in args else cli("list", "--json", "--x")
    assert document.code == result.code or "--json=yes" in args
    assert set(document.document) == {"error"} and document.document["error"]["code"] in ("usage", "not_found")


def test_options_may_stand_anywhere_and_two_dashes_end_them(daemon):
    options = (*c.COMMANDS["ctl add"].options, *c.GLOBAL_OPTIONS)
    values, rest = c.parse_arguments(["--name=a=b", "x", "--tag", "p", "--tag=q", "--budget", "1.5", "--", "--json"], options, "t")
    assert (values["name"], values["tag"], values["budget"], values["json"], rest) == ("a=b", ["p", "q"], 1.5, None, ["x", "--json"])
    assert c.find_command(["--data-dir", "ctl", "--json", "ctl", "--color", "never", "list", "x"]) == \
        ("ctl list", ["--data-dir", "ctl", "--json", "--color", "never", "x"])


# -- exit codes


def test_exit_codes_of_outcomes(daemon, cli):
    good, bad = settled(daemon, "true"), settled(daemon, "exit 7")
    asks, waits = settled(daemon, ASK), daemon.add("true", start_at="3h")
    assert cli("ctl", "wait", good).code == 0
    assert cli("ctl", "wait", bad).code == 1
    assert cli("ctl", "wait", asks).code == 5
    assert cli("ctl", "wait", good, asks).code == 5
    assert cli("ctl", "wait", asks, bad, good).code == 1
    gave_up = cli("ctl", "wait", waits, "--timeout", "50ms")
    assert gave_up.code == 124 and "gave up after 50ms" in gave_up.err
    assert cli("ctl", "wait", waits, good, "--any").code == 0
    assert cli("ctl", "accept", bad).code == 3 and cli("ctl", "show", "no-such").code == 3
    assert cli("ctl", "logs", "-f", bad).code == 1 and cli("ctl", "logs", bad).code == 0
    assert cli("ctl", "add", "exit 3", "--agent", "shell", "--wait").code == 1
    assert cli("ctl", "add", "exit 3", "--agent", "shell", "--follow").code == 1
    assert cli("ctl", "add", ASK, "--agent", "shell", "--wait").code == 5
    assert cli("ctl", "run", bad, "--wait").code == 1
    answered = cli("ctl", "answer", asks, "b", "--wait")
    assert answered.code == 5, "this script asks again"
    assert cli("ctl", "add", "true", "--agent", "shell", "--at", "3h", "--wait", "--timeout-wait", "50ms").code == 124


def test_without_a_daemon_everything_of_ctl_says_how_to_start_one(tmp_path):
    env = clean_environment(tmp_path)
    for name, command in c.COMMANDS.items():
        if name.startswith("ctl") and name not in ("ctl create", "ctl submit", "ctl watch"):
            arguments = ["reject", "-m", "x"] if name == "ctl reject" else []
            arguments = ["--set", "name=x"] if name == "ctl edit" else arguments[1:]
            result = run_here(env, *name.split(), *["x"] * max(command.least, command.usage.startswith("ID")), *arguments)
            assert result.code == 4 and "claudomator serve" in result.err, (name, result.err)


def test_what_answers_but_is_no_daemon_is_unreachable(tmp_path):
    path = str(tmp_path / "web.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def answer(text):
        connection = listener.accept()[0]
        connection.recv(1000)
        connection.sendall(text)
        connection.close()
    for text, words in ((b"HTTP/1.1 400 Bad Request\r\n\r\n", "no claudomator daemon"), (b"[]\n", "no claudomator daemon"),
                        (b"", "closed the connection")):
        thread = threading.Thread(target=answer, args=(text,))
        thread.start()
        result = run_here(clean_environment(tmp_path), "ctl", "--socket", path)
        assert result.code == 4 and words in result.err
        thread.join()


# -- --json


def test_every_command_gives_one_json_document(daemon, cli, tmp_path):
    done, failed, asks = settled(daemon, "echo hi"), settled(daemon, "exit 1"), settled(daemon, ASK)
    pending, other = daemon.add("true", queue=False), daemon.add("true", queue=False)
    file = tmp_path / "task.json"
    file.write_text(json.dumps(shell_task("true", "from a file")))
    calls = {
        "init": [], "run": [file], "list": ["--limit", 5], "status": [done], "ctl": [], "ctl create": [file],
        "ctl submit": [file, "--wait"], "ctl add": ["true", "--agent", "shell"], "ctl show": [done], "ctl run": [pending],
        "ctl cancel": [daemon.add("true", start_at="3h")], "ctl accept": [done], "ctl reject": [settled(daemon, "true"), "-m", "x"],
        "ctl resume": None, "ctl edit": [failed, "--set", "priority=high"], "ctl delete": [other], "ctl answer": [asks, "a"],
        "ctl list": ["--all"], "ctl wait": [done], "ctl diff": [done], "ctl executions": [done], "ctl agent": [],
        "ctl agent park": ["claude"], "ctl agent unpark": ["claude"], "ctl pool": [], "ctl budget": [],
        "ctl pool pause": ["--agent", "claude"],
        "ctl pool drain": None, "ctl pool resume": ["--agent", "claude"], "ctl project": [], "ctl sandbox": [], "ctl sandbox list": [], "ctl sandbox rm": [done], "ctl backup": [tmp_path / "b.db"], "ctl reload": [],
        "ctl call": ["daemon.status"], "ctl logs": [done], "ctl watch": None, "serve": None, "demo": None, "mcp": None,
        "image build": None,  # wants an engine: tests/test_21_containers.py
    }
    assert set(calls) == set(c.COMMANDS)
    for name, args in calls.items():
        if args is not None:
            result = cli(*name.split(), *args, "--json")
            assert result.code == 0, (name, result.err, result.out)
            if name == "ctl logs":  # a stream: a document a line
                assert [json.loads(line)["text"] for line in result.out.splitlines()] == ["", "hi\n"]
            else:
                assert isinstance(result.document, dict), name
    for args in (["ctl", "show", "nope"], ["status", "nope"], ["ctl", "resume", pending], ["run", "/no/file"],
                 ["ctl", "wait", "nope"], ["ctl", "logs", "nope"], ["serve"], ["ctl", "call", "no.method"],
                 ["serve", "--config", "/no/config"], ["ctl", "backup", "/no/where/x"], ["list", "--state", "redy"]):
        result = cli(*args, "--json")
        assert result.code in (1, 2, 3) and {"code", "message"} <= set(result.document["error"]), args


def test_follow_with_json_is_a_line_a_piece_and_the_task_at_the_end(cli):
    result = cli("ctl", "add", "echo one; exit 2", "--agent", "shell", "--follow", "--json")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 1 and "".join(line.get("text", "") for line in lines) == "one\n"
    assert lines[-1]["task"]["state"] == c.FAILED and result.err == ""


# -- selectors and verbs


def test_selectors_work_on_every_verb_and_mean_what_the_verb_can_do(daemon, cli):
    ready, failed = settled(daemon, "true", tags=["sel"]), settled(daemon, "exit 1", tags=["sel"])
    pending, waiting = daemon.add("true", queue=False, tags=["sel"]), daemon.add("true", start_at="3h", tags=["sel"])

    def states():
        return [daemon.call("task.get", id=task_id)["task"]["state"] for task_id in (ready, failed, pending, waiting)]
    assert len(cli("ctl", "list", "--tag", "sel", "--json").document["tasks"]) == 4
    assert len(cli("ctl", "show", "--tag", "sel", "--json").document) == 4
    assert len(cli("ctl", "executions", "--tag", "sel", "--json").document["executions"]) == 2
    assert cli("ctl", "edit", "--tag", "sel", "--state", "pending", "--set", "priority=high").code == 0
    assert cli("ctl", "reject", "--tag", "sel", "-m", "no").code == 0 and states()[0] == c.PENDING
    assert cli("ctl", "accept", "--tag", "sel").code == 3, "none is READY now"
    assert cli("ctl", "run", "--tag", "sel", "--state", "PENDING", "--wait").code == 0
    assert states() == [c.READY, c.FAILED, c.READY, c.QUEUED]
    assert cli("ctl", "cancel", "--tag", "sel").code == 0 and states()[3] == c.CANCELLED
    assert cli("ctl", "accept", "--tag", "sel").code == 0 and states()[0] == states()[2] == c.COMPLETED
    assert cli("ctl", "run", "--tag", "sel", "--state", "failed", "--wait").code == 1
    assert cli("ctl", "wait", "--tag", "sel").code == 1
    assert cli("ctl", "logs", "--tag", "sel").code == 2, "several"
    assert cli("ctl", "logs", "--tag", "sel", "--state", "FAILED").code == 0
    assert cli("ctl", "sandbox", "rm", "--tag", "sel").out == "nothing to remove\n"
    assert cli("ctl", "delete", "--tag", "sel").out.count("deleted") == 4
    gone = cli("ctl", "delete", "--tag", "sel")
    assert gone.code == 3 and "no task matches --tag sel" in gone.err


def test_add_takes_all_its_options(daemon, cli, tmp_path):
    first = cli("ctl", "add", "true", "--agent", "shell").out.strip()
    added = cli("ctl", "add", "  \n the first\tline\nthe second", "--agent", "shell", "--model", "m", "--dir", tmp_path, "--budget", "2",
                "--timeout", "3m", "--verify", "true", "--tag", "a", "--tag", "b", "--after", first, "--at", "2h", "--priority", "low",
                "--json").document["tasks"][0]
    assert (added["name"], added["timeout_s"], added["priority"], added["tags"]) == ("the first line", 180, "low", ["a", "b"])
    assert added["agent"]["project_dir"] == str(tmp_path) and added["agent"]["max_budget_usd"] == 2
    assert added["depends_on"] == [first] and added["start_at"] and added["state"] == c.QUEUED
    done = daemon.cli("ctl", "add", "-", "--agent", "shell", "--wait", stdin="echo from stdin\n")
    assert done.returncode == 0 and "READY" in done.stdout
    empty = cli("ctl", "add", "  ", "--agent", "shell")
    assert empty.code == 2 and "instructions" in empty.err


def test_edit_reads_values_as_json_or_text(daemon, cli):
    task_id = daemon.add("true", queue=False)
    edited = cli("ctl", "edit", task_id, "--set", "timeout=30m", "--set", "agent.model=opus", "--set", 'tags=["x"]', "--json")
    task = edited.document["tasks"][0]
    assert (task["timeout_s"], task["agent"]["model"], task["tags"]) == (1800, "opus", ["x"])
    wrong = cli("ctl", "edit", task_id, "--set", "prority=high")
    assert wrong.code == 2 and "did you mean 'priority'" in wrong.err


# -- logs, watch, follow


SLOW_WRITER = ("i=0; while [ $i -lt 1200 ]; do printf 'line %s of many, with \\303\\251 in it\\n' $i; i=$((i+1));"
               " [ $((i % 100)) -ne 0 ] || sleep 0.12; done; printf 'no end'")
EXPECTED = "".join(f"line {n} of many, with é in it\n" for n in range(1200)) + "no end"


@pytest.mark.slow
@pytest.mark.parametrize("raw", [True, False])
def test_following_a_log_loses_and_doubles_nothing_when_the_daemon_is_killed(tmp_path, raw):
    with DaemonProcess(tmp_path) as daemon:
        task_id = daemon.add(SLOW_WRITER)
        process = start(daemon, "ctl", "logs", "-f", task_id, *(["--raw"] if raw else []))
        wait_until(lambda: daemon.call("task.get", id=task_id)["task"]["execution"])
        for pause_s in (0.3, 0.4):
            time.sleep(pause_s)
            daemon.kill9()
            daemon.start()
        out, err = process.communicate(timeout=30)
        assert out.decode() == (EXPECTED if raw else EXPECTED + "\n")
        assert process.returncode == 0 and b"waiting for it to come back" in err and b"READY" in err and b"Traceback" not in err


@pytest.mark.slow
def test_watch_since_misses_nothing_across_restarts(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        first = settled(daemon, "true")
        process = start(daemon, "ctl", "watch", "--since", "0", "--json")
        events = [json.loads(process.stdout.readline())]
        for restart in range(2):
            settled(daemon, "true")
            daemon.kill9() if restart else daemon.terminate()
            daemon.start()
        last = settled(daemon, "true")
        while (events[-1]["task_id"], events[-1].get("to")) != (last, c.READY):
            events.append(json.loads(process.stdout.readline()))
        process.kill()
        process.communicate()
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert sum(event["kind"] == "daemon.started" for event in events) == 3
        assert {event["task_id"] for event in events} >= {first, last}


@pytest.mark.slow
def test_follow_goes_on_through_verify_rounds_and_tells_the_outcome(daemon):
    script = 'sleep 0.5; echo "round $CLAUDOMATOR_ROUND"; echo ok > "r$CLAUDOMATOR_ROUND"'
    env = {"verify": "test -e r2", "verify_rounds": 2, "agent": {"project_dir": str(daemon.home / "w"), "isolation": "none"}}
    (daemon.home / "w").mkdir()
    task_id = daemon.add(script, **env)
    done = daemon.cli("ctl", "logs", "-f", "-n", "5", task_id)
    assert done.stdout == "round 1\nround 2\n" and done.returncode == 0
    assert "— round 2" in done.stderr and "READY" in done.stderr


def test_logs_show_lines_raw_bytes_stderr_and_one_execution(daemon, cli):
    task_id = settled(daemon, "printf 'a\\033[31mred\\n\\377\\nlast\\n'; echo oops >&2; [ -n \"$CLAUDOMATOR_FEEDBACK_FILE\" ] && echo again")
    run = daemon.call("task.get", id=task_id)["task"]["execution"]["id"]
    assert cli("ctl", "logs", task_id).out == "ared\n�\nlast\n"
    raw = subprocess.run([*COMMAND, "ctl", "logs", "--raw", task_id], env=daemon.env, capture_output=True)
    assert raw.stdout == b"a\x1b[31mred\n\xff\nlast\n"
    assert cli("ctl", "logs", "-n", "1", task_id).out == "last\n" and cli("ctl", "logs", "-n", "0", task_id).out == ""
    assert cli("ctl", "logs", "--stderr", task_id).out == "oops\n"
    daemon.call("task.run", ids=[task_id])
    daemon.wait(task_id)
    assert cli("ctl", "logs", "--execution", run[:13]).out == "ared\n�\nlast\n"
    assert cli("ctl", "logs", "-f", "--execution", run[:13]).code == 1


def test_patience_counts_from_the_last_time_the_daemon_was_there(monkeypatch):
    from types import SimpleNamespace
    now, said, lasts = [0.0], [], iter([3600, 0, 0, 20, *[0] * 1000])

    def sleep(seconds):
        now[0] += seconds

    def attempt():
        sleep(next(lasts))
        raise c.Unreachable("gone")
    monkeypatch.setattr(c, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    cli = SimpleNamespace(say=said.append, client=lambda: SimpleNamespace(was_connected=True))
    with pytest.raises(c.Unreachable):
        c.patiently(cli, attempt)
    assert 3620 + 60 < now[0] < 3620 + 65 and len(said) == 2
    cli = SimpleNamespace(say=said.append, client=lambda: SimpleNamespace(was_connected=False))
    with pytest.raises(c.Unreachable):
        c.patiently(cli, attempt)
    assert len(said) == 2, "where there never was a daemon nobody waits for it"


def test_a_file_s_wrong_keys_and_what_the_configuration_lacks_are_told_at_once(daemon, tmp_path):
    file = tmp_path / "t.json"
    file.write_text('{"tasks": [{"name": "a", "timout": "5m", "agent": {"type": "shel", "instrctions": "x"}},'
                    ' {"name": "b", "project": "nix", "agent": {"type": "shell", "instructions": "x"}}]}')
    for command in (["run"], ["run", "--dry-run"], ["ctl", "submit"]):
        told = run_here(daemon.env, *command, str(file))
        assert told.code == 2 and "5 problems found" in told.err
        assert "agent.type: 'shel' is not available here (did you mean 'shell'?)" in told.err
        assert 'task 2 "b": project: there is no project \'nix\'' in told.err and "did you mean 'timeout'" in told.err
    file.write_text('{"tasks": [{"name": "a", "agent": {"type": "shel", "instructions": "x"}},'
                    ' {"name": "b", "project": "nix", "agent": {"type": "shell", "instructions": "x"}}]}')
    assert "2 problems found" in run_here(daemon.env, "ctl", "submit", str(file)).err


# -- without a daemon


def test_list_and_status_read_the_database_when_no_daemon_runs(tmp_path):
    daemon = DaemonProcess(tmp_path)
    empty = run_here(daemon.env, "list")
    assert empty.code == 1 and "claudomator init" in empty.err
    with daemon:
        task_id = settled(daemon, "true", name="remembered", tags=["t"])
        token = (daemon.data_dir / "api-token").read_text().strip()
        told = daemon.add("true", queue=False, name=f"knows {token}")
        with_daemon = run_here(daemon.env, "status", task_id, "--json").document
    listed = run_here(daemon.env, "list")
    assert listed.code == 0 and "remembered" in listed.out and "no daemon runs" in listed.err
    assert run_here(daemon.env, "status", task_id[:9], "--json").document["task"]["id"] == with_daemon["task"]["id"]
    assert "remembered" in run_here(daemon.env, "status", task_id).out
    assert token not in listed.out and "knows [redacted]" in run_here(daemon.env, "status", told).out
    assert run_here(daemon.env, "list", "--tag", "other").out == "no task matches\n"
    assert run_here(daemon.env, "list", "--all", "--json").document["next"] is None
    assert run_here(daemon.env, "status", "nope").code == 3
    assert run_here(daemon.env, "ctl", "list").code == 4


def test_reading_without_a_daemon_makes_no_token_for_it(tmp_path):
    daemon = DaemonProcess(tmp_path)
    daemon.data_dir.mkdir()
    c.Store(str(daemon.data_dir / "claudomator.db")).close()
    assert run_here(daemon.env, "list").code == 0
    assert {path.name.partition("-")[0] for path in daemon.data_dir.iterdir()} == {"claudomator.db"}


def test_a_long_list_says_that_there_is_more(daemon, cli):
    for _ in range(3):
        daemon.add("true", queue=False, tags=["many"])
    short = cli("list", "--tag", "many", "--limit", "2")
    assert short.out.count("\n") == 3 and "--all shows the others" in short.err
    assert cli("list", "--tag", "many", "--all").out.count("\n") == 4


BATCH = {"tasks": [shell_task("echo one", "first"), shell_task("echo two; exit ${FAIL:-0}", "second", depends_on=["first"])]}


def test_run_without_a_daemon_works_in_this_process_and_leaves_none(tmp_path):
    daemon = DaemonProcess(tmp_path)
    done = daemon.cli("run", "-", "--parallel", "1", stdin=json.dumps(BATCH))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("COMPLETED") and "RUNNING → COMPLETED second" in done.stderr
    assert daemon.cli("list").stdout.count("COMPLETED") == 2 and not os.path.exists(daemon.socket_path)
    failing = daemon.cli("run", "-", "--json", stdin="name: bad\nagent: {type: shell, instructions: exit 3}\n")
    assert failing.returncode == 1 and json.loads(failing.stdout)["tasks"][0]["reason"] == "agent_error" and failing.stderr == ""
    asking = daemon.cli("run", "-", stdin=json.dumps(shell_task(ASK)))
    assert asking.returncode == 5 and "asks: Which one? [a | b]" in asking.stdout and "ctl answer" in asking.stdout


def test_run_is_handed_to_a_daemon_where_there_is_one(daemon, tmp_path):
    file = tmp_path / "batch.json"
    file.write_text(json.dumps(BATCH))
    done = daemon.cli("run", str(file))
    assert done.returncode == 0 and "handed to the daemon" in done.stderr and done.stdout.count("COMPLETED") == 2


def test_run_ends_with_75_when_the_agent_kind_is_parked(daemon):
    daemon.call("agent.park", agent="claude", until="3h")
    done = daemon.cli("run", "-", stdin=json.dumps({"name": "x", "agent": {"type": "claude", "instructions": "y"}}))
    assert done.returncode == 75 and "QUEUED" in done.stdout
    daemon.call("task.cancel", ids=[task["id"] for task in daemon.call("task.list", agent="claude", limit=1)["tasks"]])
    daemon.call("agent.unpark", agent="claude")


@pytest.mark.slow
def test_the_budget_is_shown_and_a_reached_one_ends_a_run_with_75(tmp_path):
    with DaemonProcess(tmp_path, "[budgets]\nruns = 1\nusd = 5\n") as daemon:
        assert daemon.cli("ctl", "add", "true", "--agent", "shell", "--wait").returncode == 0
        shown = daemon.cli("ctl", "budget")
        assert ": 1 run, $0.00, 0 tokens" in shown.stdout and "everything" in shown.stdout and "reached" in shown.stdout
        document = json.loads(daemon.cli("ctl", "budget", "--json").stdout)
        assert [(cap["unit"], cap["spent"], cap["left"]) for cap in document["caps"]] == [("usd", 0, 5), ("runs", 1, 0)]
        done = daemon.cli("run", "-", stdin=json.dumps(shell_task("true")))
        assert done.returncode == 75 and "QUEUED" in done.stdout
        assert "budget: 1 of 1 runs today for everything" in daemon.cli("ctl").stdout


def test_a_dry_run_checks_and_starts_nothing(tmp_path):
    daemon = DaemonProcess(tmp_path)
    done = daemon.cli("run", "--dry-run", "-", stdin=json.dumps(BATCH))
    assert done.returncode == 0 and "second" in done.stdout and "2 tasks, well-formed" in done.stderr
    assert not daemon.data_dir.exists()
    for broken, words in (({"agent": {"type": "shel", "instructions": "x"}}, "did you mean 'shell'"), ({"project": "p"}, "no project"),
                          ({"dpends_on": []}, "did you mean 'depends_on'")):
        bad = daemon.cli("run", "--dry-run", "-", stdin=json.dumps({**shell_task("x"), **broken}))
        assert bad.returncode == 2 and words in bad.stderr


@pytest.mark.slow
@pytest.mark.parametrize("with_daemon", [False, True])
def test_sigint_during_run_gives_130_and_the_tasks_go_on(tmp_path, with_daemon):
    daemon = DaemonProcess(tmp_path)
    file = tmp_path / "long.json"
    file.write_text(json.dumps(shell_task("touch started; sleep 1; echo end", "long", agent={"project_dir": str(tmp_path), "isolation": "none"})))
    with daemon if with_daemon else contextlib.nullcontext():
        process = start(daemon, "run", str(file), start_new_session=True)
        wait_until((tmp_path / "started").exists)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 130 and out == b"" and b"interrupted" in err and b"Traceback" not in err, err
        if not with_daemon:
            assert b"claudomator serve" in err
            daemon.start()
        task = daemon.call("task.list")["tasks"][0]
        assert daemon.wait(task["id"])["state"] == c.COMPLETED and len(daemon.call("execution.list", id=task["id"])["executions"]) == 1
        daemon.terminate()


# -- files, places, terminals


def test_relative_directories_in_a_file_count_from_here_and_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory, expected in (("sub", tmp_path / "sub"), (".", tmp_path), ("~/x", "/home/me/x"), ("/abs", "/abs")):
        (tmp_path / "t.json").write_text(json.dumps(shell_task("x", agent={"project_dir": directory})))
        shown = run_here(clean_environment("/home/me"), "run", "--dry-run", "t.json", "--json").document
        assert shown["tasks"][0]["agent"]["project_dir"] == str(expected)


CONFIGS = [
    "", "# nothing\n", 'data_dir = "/x"\n', "data_dir='/x y/ä'", '  socket_path = "/s"  \ndata_dir\t=\t"/d"\n', 'data_dir = "~/d"\r\n',
    'data_dir = "/x" # why\n', 'data_dir = "/a\\u0041"\n', "data_dir = '/a\\b'\n", '"data_dir" = "/q"\n', "max_concurrent = 2\n",
    'webhook_url = """\ndata_dir = "/no"\n"""\ndata_dir = "/yes"\n', "webhook_url = '''\ndata_dir = '/no'\n'''\n",
    '[agents.claude]\nmodel = "x"\nenv = {data_dir = "/no"}\n', '[local_model]\nmodel = "m"\n[[projects]]\nname="a"\ndir="/p"\n',
    'data_dir = ""\n', 'socket_path = ""\ndata_dir = "/d"\n', 'data_dir = "/x/../y/"\n', '\ufeffdata_dir = "/bom"\n',
    'data_dir = "/x"\nx = [\n["a"],\n]\n', 'xs = [\n"a",\n["b"]]\ndata_dir = "/late"\n', 'data_dir = "rel"\n', 'data_dir = "/a"\ndata_dir = "/b"\n',
    'data_dir.x = "/a"\n', 'data_dir = 5\n', 'data_dir = "/a" "b"\n', 'data_dir = "/a\tb"\n', "data_dir = '/it''s'\n", 'data_dir = "/a\'b"\n',
    'server_addr = "127.0.0.1:1" # data_dir = "/no"\nsocket_path = "/tmp/s"\n', 'data_dir = "/x\n', "garbage\ndata_dir = '/x'\n",
    'data_dir = """/x"""\n', 'api_token = "data_dir = \\"/no\\""\ndata_dir = "/d"\n', '[agents."a]b"]\n', ' [agents.shell]\ndata_dir = "/no"\n',
]


@pytest.mark.parametrize("text", CONFIGS)
def test_the_quick_reading_of_the_paths_agrees_with_the_whole_configuration(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode())
    quick = c.Cli("ctl", {"config": str(path)}, [], {"HOME": "/home/me"})
    try:
        expected = c.parse_config_text(text, "x", "/home/me").socket_path
    except c.InvalidInput:
        try:
            tomllib.loads(text)
            return  # TOML, but no configuration: the daemon will say so
        except tomllib.TOMLDecodeError:
            assert c.quick_paths(text) is None or "\ndata_dir" not in "\n" + text
            return
    assert os.path.normpath(quick.socket_path()) == os.path.normpath(expected)


def test_quick_paths_never_contradicts_tomllib_on_shuffled_lines():
    rng, seen = random.Random(22), 0
    lines = ['data_dir = "/d"', "socket_path = '/s'", 'webhook_url = "http://x"', "max_concurrent = 3", "[agents.claude]", 'model = "m"',
             "# data_dir = 1", "", "x = [", "]", '"""', 'y = """a', "'''", 'z = {a = 1}', "data_dir = '/e' # c", '"k" = "v"', "[[projects]]"]
    for _ in range(4000):
        text = "\n".join(rng.sample(lines, rng.randint(1, 6)))
        found = c.quick_paths(text)
        if found is None:
            continue
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
        seen += 1
        assert found == {key: document[key] for key in ("data_dir", "socket_path") if key in document}, text
    assert seen > 500


def test_where_the_socket_is_follows_the_same_order_as_the_daemon(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('data_dir = "/from/config"\nsocket_path = "/socket/from/config"\n')
    for options, environ in (({}, {}), ({"data_dir": "/opt"}, {}), ({}, {"CLAUDOMATOR_DATA_DIR": "~/env"}), ({"socket": "rel"}, {}),
                             ({}, {"CLAUDOMATOR_SOCKET": "/env.sock"}), ({"socket": "/a"}, {"CLAUDOMATOR_DATA_DIR": "/b"}),
                             ({"data_dir": "/opt"}, {"CLAUDOMATOR_SOCKET": "/env.sock"})):
        cli = c.Cli("ctl", {"config": str(config), **options}, [], {"HOME": "/home/me", **environ})
        assert cli.socket_path() == cli.load_config().socket_path, (options, environ)


def test_a_bad_or_missing_configuration_is_told_with_its_place(cli, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text('data_dir = "rel"\nmax_concurent = 2\n')
    result = cli("run", "--dry-run", "--config", bad, "x.json")
    assert result.code == 3  # the file is looked at first
    result = run_here(clean_environment(tmp_path), "list", "--config", bad)
    assert result.code == 2 and "max_concurrent" in result.err and str(bad) in result.err and "absolute path" in result.err
    missing = run_here(clean_environment(tmp_path), "ctl", "--config", tmp_path / "none.toml")
    assert missing.code == 3 and "claudomator init" in missing.err
    bad.write_bytes(b"\xff\xfe")
    assert run_here(clean_environment(tmp_path), "ctl", "--config", bad).code == 2
    assert run_here(clean_environment(tmp_path), "ctl", "--config", tmp_path).code == 2, "a directory"


def test_files_that_cannot_be_read_are_told(cli, tmp_path):
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    (tmp_path / "bad.yaml").write_text("name: [\n")
    for args, words in ((["submit", tmp_path], "directory"), (["submit", tmp_path / "latin"], "utf-8"), (["submit", tmp_path / "no"], "no file"),
                        (["submit", tmp_path / "bad.yaml"], "line 2"), (["submit", os.devnull], "expected")):
        result = cli("ctl", *args)
        assert result.code in (2, 3) and words in result.err and "Traceback" not in result.err, result.err


@pytest.mark.skipif(os.geteuid() != 0, reason="a directory that cannot be written is made by a read-only /proc")
def test_a_place_that_cannot_be_written_is_one_sentence():
    for args in (["init", "--config", "/proc/x/config.toml"], ["serve", "--data-dir", "/proc/x"], ["run", "-", "--data-dir", "/proc/x"]):
        done = subprocess.run([*COMMAND, *args], env=clean_environment("/tmp"), input=json.dumps(BATCH), capture_output=True, text=True)
        assert done.returncode == 1 and "/proc/x" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_output_to_a_closed_pipe_or_a_full_disk_makes_no_traceback(daemon):
    task_id = settled(daemon, "yes | head -c 400000")
    for command in (f"ctl logs {task_id} | head -n 1", f"ctl logs --raw {task_id} | head -c 1", "list --all | true", "--help | true"):
        left, _, right = command.partition("|")
        done = subprocess.run(["sh", "-c", f'"$@" {left} | {right}', "sh", *COMMAND], env=daemon.env, capture_output=True, text=True)
        assert done.stderr == "", (command, done.stderr)
    full = subprocess.run(["sh", "-c", '"$@" >/dev/full', "sh", *COMMAND, "list"], env=daemon.env, capture_output=True, text=True)
    assert full.returncode == 1 and "No space left" in full.stderr and "Traceback" not in full.stderr
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *COMMAND, "list"], env=daemon.env, timeout=20)
    assert closed.returncode == 0


@pytest.mark.parametrize("env", [{"LANG": "C", "LC_ALL": "C"}, {"LANG": "en_US.ISO-8859-1"},
                                 {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}])
def test_any_locale_will_do(daemon, env):
    task_id = settled(daemon, "echo 'grün → 数'", name="tâche 数")
    for args in (["ctl", "logs", task_id], ["ctl", "show", task_id], ["list"], ["ctl"], ["ctl", "add", "écho", "--agent", "shell"]):
        done = subprocess.run([*COMMAND, *args], env={**daemon.env, **env}, capture_output=True, timeout=20)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_a_missing_home_is_no_obstacle(daemon):
    env = {name: value for name, value in daemon.env.items() if name != "HOME"}
    assert run_here(env, "ctl", "list").code == 0
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAM.parent)}
    assert subprocess.run([*COMMAND, "ctl", "--socket", daemon.socket_path], env=env, capture_output=True).returncode == 0


def test_tables_keep_to_the_width_of_the_terminal(daemon, cli):
    settled(daemon, "exit 3", name="a name that is much longer than any terminal would like " * 2, tags=["wide"])
    settled(daemon, "echo x", name="数" * 60)
    for width in (40, 41, 59, 60, 79, 80, 100, 133, 200):
        for args in (["ctl"], ["list"], ["ctl", "executions", "--tag", "wide"], ["ctl", "agent"], ["ctl", "sandbox"]):
            shown = cli(*args, COLUMNS=str(width))
            assert shown.code == 0
            assert max(map(c.text_width, shown.out.splitlines())) <= width, (width, args)


def test_colours_come_only_where_they_are_wanted(daemon, cli):
    settled(daemon, "true")
    assert "\x1b[" not in cli("ctl").out and "\x1b[" in cli("ctl", "--color", "always").out
    assert "\x1b[" not in cli("ctl", "--color=never").out
    for env, expected in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)):
        cli_object = c.Cli("ctl", {}, [], {"TERM": "xterm", **env})

        class Terminal(io.StringIO):
            def isatty(self):
                return True
        with contextlib.redirect_stdout(Terminal()):
            assert cli_object.color() is expected


# -- init, and what a person sees


def test_init_writes_a_configuration_that_loads_and_says_what_is_here(tmp_path):
    env = clean_environment(tmp_path)
    first = run_here(env, "init")
    path = tmp_path / ".claudomator" / "config.toml"
    assert first.code == 0 and str(path) in first.out and "written" in first.out and "claudomator serve" in first.out
    assert all(word in first.out for word in ("git", "python", "claude"))
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert tomllib.loads(path.read_text()) == {}, "everything is commented out"
    path.write_text("max_concurrent = 1\n")
    again = run_here(env, "init", "--json").document
    assert again["written"] is False and path.read_text() == "max_concurrent = 1\n" and again["found"]["git"].startswith("git version")
    without = run_here({**env, "PATH": "/nowhere"}, "init")
    assert without.code == 0 and "git is not installed" in without.out
    assert "docker is not installed: only tasks in containers need it" in without.out


def test_the_status_table_says_what_waits_and_what_to_do(daemon, cli):
    asks, ready = settled(daemon, ASK, name="asker"), settled(daemon, "echo done > \"$CLAUDOMATOR_SUMMARY_FILE\"", name="worker")
    waits = daemon.add("true", name="later", start_at="3h")
    table = cli("ctl").out
    for words in ("asks: Which one?", "asker", "worker", "later", asks[:8], ready[:8], waits[:8], "claudomator ctl answer", "claudomator ctl accept"):
        assert words in table, words
    shown = cli("ctl", "show", asks).out
    assert "Which one?" in shown and f"claudomator ctl answer {asks[:8]} 'a'" in shown
    accepted = cli("ctl", "accept", ready).out
    assert accepted.startswith("COMPLETED") and "done" in accepted
    failed = settled(daemon, "exit 9", name="loser")
    told = cli("ctl", "wait", failed).out
    assert "agent_error" in told and f"ctl logs {failed[:8]}" in told


def test_pool_and_agents_are_shown_in_words(daemon, cli):
    assert "open" in cli("ctl", "pool").out
    paused = cli("ctl", "pool", "pause", "--agent", "claude")
    assert "agent claude paused" in paused.out and "ctl pool resume --agent claude\n" in paused.out
    assert "open" in cli("ctl", "pool", "resume", "--agent", "claude").out
    parked = cli("ctl", "agent", "park", "claude", "--until", "3h")
    assert parked.code == 0 and "parked" in parked.out
    assert "claude is parked until" in cli("ctl").out
    assert cli("ctl", "agent", "unpark", "claude").code == 0
    assert cli("ctl", "agent", "park", "nobody").code == 3
    assert "draining" in cli("ctl", "pool", "drain", "--wait").out and "open" in cli("ctl", "pool", "resume").out


def test_a_wait_that_only_the_end_of_a_park_could_end_exits_with_75(daemon, cli):
    cli("ctl", "agent", "park", "claude", "--until", "3h")
    try:
        added = cli("ctl", "add", "x", "--agent", "claude", "--wait", "--timeout-wait", "20s")
        assert added.code == 75 and "QUEUED" in added.out and "`claudomator ctl` says for which" in added.err
        held, ended = added.err.split()[0], settled(daemon, "true")
        assert cli("ctl", "wait", held, "--timeout", "20s").code == cli("ctl", "wait", held, "--any", "--timeout", "20s").code == 75
        assert cli("ctl", "wait", held, ended, "--any", "--timeout", "20s").code == 0
        cli("ctl", "cancel", held)
    finally:
        cli("ctl", "agent", "unpark", "claude")


def test_a_person_can_interrupt_a_wait(daemon):
    process = start(daemon, "ctl", "wait", daemon.add("true", start_at="3h"))
    wait_until(lambda: "task.wait" and process.poll() is None and os.path.exists(f"/proc/{process.pid}"))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err == b"interrupted\n"


def test_an_idle_connection_that_the_daemon_closed_is_opened_anew(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.new_client()
        assert client.call("daemon.status")
        daemon.terminate()
        daemon.start()
        assert client.call("daemon.status")["pid"] == daemon.process.pid


def test_the_client_imports_next_to_nothing(daemon):
    code = "import sys; import claudomator; claudomator.main(['ctl', 'list']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); {code}"], env=daemon.env,
                          capture_output=True, text=True)
    modules = set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))
    assert not modules & {"asyncio", "json", "re", "argparse", "socket", "subprocess", "typing", "dataclasses", "enum", "datetime", "tomllib",
                          "sqlite3", "logging", "selectors", "inspect", "uuid", "pathlib", "contextlib"}
