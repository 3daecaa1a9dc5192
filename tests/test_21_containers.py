"""Section 21, without an engine: tests/fakes/docker has its commands, its words and its exit codes.

What only a real engine shows (limits, adoption, stops) is in tests/test_container_job.py.
"""
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess

import claudomator as c
import pytest
from tests import support

FAKES = pathlib.Path(__file__).parent / "fakes"


class Engine:
    """The fake engine's memory."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def mode(self, word):
        (self.path / "mode").write_text(word)

    def calls(self, word=""):
        path = self.path / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if not word or call[0] == word]

    def containers(self):
        return [path.name for path in self.path.glob("container-*")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(daemon, engine, bare repository): one for all, as each test looks only at its own task."""
    path = tmp_path_factory.mktemp("containers")
    engine, (bare, copy) = Engine(path / "engine"), support.make_repository(path)
    (path / "login").mkdir()
    (path / "login" / ".credentials.json").write_text("{}")
    daemon = support.DaemonProcess(path, f"""\
claude_config_dir = "{path}/login"
max_concurrent = 8
[containers]
cpus = 0
[agents.shell]
env = {{ SECRET = "s3cr3t" }}
[agents.claude]
mcp = true
env = {{ FAKE_CLAUDE_VERSION = "2.1.329", PATH = "{FAKES}:{os.environ["PATH"]}", IS_SANDBOX = "1" }}
[[projects]]
name = "p"
dir = "{copy}"
setup = "echo made-by-setup > made; echo made >> .git/info/exclude"
verify = "grep -q made-by-setup made"
""", {"PATH": f"{FAKES}:{os.environ['PATH']}", "DOCKER_FAKE": str(engine.path), "ANTHROPIC_API_KEY": "k3y"})
    with daemon:
        yield daemon, engine, bare


def add(place, script, **more):
    daemon, engine, bare = place
    return daemon.add(script, agent={"repository_url": str(bare), **more.pop("agent", {})}, **more)


def git(bare, *words):
    import subprocess
    return subprocess.run(["git", "-C", bare, *words], capture_output=True, text=True, check=True).stdout


def test_the_whole_way_of_a_task(place):
    daemon, engine, bare = place
    task = daemon.wait(add(place, "echo one > one; git add one; git commit -qm 'feat: one'; echo two > two; echo said;"
                           " echo fine > $CLAUDOMATOR_SUMMARY_FILE", verify="cat one two"))
    assert (task["state"], task["summary"]) == ("READY", "fine"), (task, daemon.log())
    run = task["execution"]
    assert [commit["message"] for commit in run["commits"]] == ["feat: one", c.AUTOCOMMIT_SUBJECT]
    assert git(bare, "show", "main:one") == "one\n" and git(bare, "show", "main:two") == "two\n"
    assert daemon.call("execution.get", id=run["id"])["execution"]["exit_code"] == 0
    own = [call for call in engine.calls() if run["id"] in json.dumps(call)]
    assert [call[0] for call in own] == ["run", "inspect", "run", "run", "ps", "rm"]  # agent; collect; verify; the end
    assert "s3cr3t" not in json.dumps(own) and engine.containers() == []
    assert "--rm" not in own[0] and "--rm" in own[2] and "--rm" in own[3]
    assert own[2][own[2].index("--network") + 1] == "none"
    assert not {"run", "work.bundle"} & set(os.listdir(daemon.data_dir / "executions" / run["id"] / "box"))


@pytest.mark.slow
def test_a_question_goes_on_in_the_same_session_sandbox_and_home(place):
    daemon, engine, bare = place
    agent = {"type": "claude", "repository_url": str(bare), "instructions": "Do it.\nSCENARIO: question\n"}
    task_id = daemon.call("task.create", tasks={"name": "q", "agent": agent}, queue=True)["tasks"][0]["id"]
    task = daemon.wait(task_id)
    assert (task["state"], task["question"]["text"]) == ("BLOCKED", "Which database?"), (task, daemon.log())
    sandbox = pathlib.Path(task["execution"]["sandbox_dir"])
    own = daemon.data_dir / "executions" / task["execution"]["id"] / "box" / "mcp.json"
    server = json.loads(own.read_text())["mcpServers"]["claudomator"]
    assert (server["command"], server["args"]) == ("python3", ["-I", c.BOX_PROGRAM, "mcp"])
    assert own.stat().st_mode & 0o777 == 0o600 and server["env"]["CLAUDOMATOR_API_URL"] == "${CLAUDOMATOR_API_URL}"
    assert f"type=bind,source={c.__file__},target={c.BOX_PROGRAM},readonly" in engine.calls("run")[-2]
    home = sandbox / ".git" / c.BOX_DIR / "home" / ".claude"
    assert (home / ".credentials.json").exists() and list(home.glob("projects/*/*.jsonl"))
    assert daemon.call("sandbox.list")["sandboxes"][0]["ahead"] == 1, "the first commit is not in the sandbox"
    for answer in ("pg", "16"):
        daemon.call("task.answer", id=task_id, text=answer)
        task = daemon.wait(task_id)
    assert (task["state"], task["summary"]) == ("READY", "The database is set up."), (task, daemon.log())
    runs = daemon.call("execution.list", id=task_id)["executions"]
    assert {run["session_id"] for run in runs} == {runs[-1]["id"]}
    assert git(bare, "log", "--format=%s", "-3", "main").splitlines() == ["feat: third", "feat: second", "feat: first"]


@pytest.mark.slow
def test_setup_and_verify_of_a_project_run_in_the_agents_copy(place):
    daemon, engine, bare = place
    task = daemon.wait(daemon.add("cat made; echo p > by-project", project="p", agent={"isolation": "container"}))
    assert task["state"] == "READY", (task, daemon.log())
    path = daemon.data_dir / "executions" / task["execution"]["id"]
    assert (path / "stdout.log").read_text() == "made-by-setup\n" and git(bare, "show", "main:by-project") == "p\n"
    names = [call[call.index("--name") + 1][48:54] for call in engine.calls("run") if task["execution"]["id"] in str(call)]
    assert names == ["-setup", "", "-colle", "-gate-"]


@pytest.mark.slow
@pytest.mark.parametrize("script, words", [
    ("echo a > c; git add c; git commit -qm a; git checkout -qb other HEAD^; echo b > c; git add c; git commit -qm b;"
     " git rebase -q main >/dev/null 2>&1; exit 0", "unfinished"),
    ("rm -rf .git", "destroyed its repository"),
    ("git checkout -qb side; echo s > s; git add s; git commit -qm 'on the side'; git checkout -q main", "on the side")])
def test_work_that_cannot_be_taken_is_refused_with_its_reason(place, script, words):
    daemon, engine, bare = place
    task = daemon.wait(add(place, script))
    assert (task["state"], task["reason"]) == ("FAILED", "sandbox_failed") and words in task["detail"], task
    assert os.path.isdir(task["execution"]["sandbox_dir"]) and engine.containers() == []


@pytest.mark.slow
def test_a_repository_inside_the_clone_is_left_out(place):
    daemon, engine, bare = place
    task = daemon.wait(add(place, "git init -q 'a b'; echo x > 'a b/x'; git init -q n; echo y > beside"))
    assert task["state"] == "READY", (task, daemon.log())
    assert git(bare, "ls-tree", "-r", "--name-only", "main").split().count("beside") == 1
    assert "a b" not in git(bare, "ls-tree", "--name-only", "main")


@pytest.mark.slow
@pytest.mark.parametrize("mode, reason, words, tries", [
    ("down", "sandbox_failed", "the container engine does not answer: start docker", 2),
    ("missing", "spawn_failed", "run `claudomator image build`, or set claude_image", 1),
    ("125", "spawn_failed", "range of CPUs", 1), ("127", "spawn_failed", "no such file or directory", 1)])
def test_an_engine_that_cannot_is_told_apart_from_an_agent_that_fails(place, mode, reason, words, tries):
    daemon, engine, bare = place
    engine.mode(mode)
    try:
        task = daemon.wait(add(place, "true", retry={"max_attempts": 2, "backoff": ["10ms"]}))
    finally:
        engine.mode("")
    assert (task["state"], task["reason"]) == ("FAILED", reason) and words in task["detail"], task
    assert len(daemon.call("execution.list", id=task["id"])["executions"]) == tries


@pytest.mark.slow
def test_a_run_that_was_stopped_with_the_engine_is_lost_and_goes_on_when_the_engine_is_back(place):
    daemon, engine, bare = place
    script = f"[ ! -e {engine.path}/again ] || exit 0; touch {engine.path}/again; echo down >{engine.path}/mode; kill -TERM $$"
    task_id = add(place, script)
    try:
        support.wait_until(lambda: len(daemon.call("execution.list", id=task_id)["executions"]) == 2, 20, "another run")
    finally:
        engine.mode("")
    task = daemon.wait(task_id)
    first = daemon.call("execution.list", id=task_id)["executions"][-1]
    assert (task["state"], first["reason"]) == ("READY", "lost"), (task, daemon.log())


@pytest.mark.slow
@pytest.mark.parametrize("code", [125, 126, 127])
def test_the_agents_own_exit_code_stays_the_agents(place, code):
    task = place[0].wait(add(place, f"exit {code}"))
    assert (task["reason"], task["execution"]["exit_code"]) == ("agent_error", code), task


def test_an_engine_that_is_not_installed_names_the_key(tmp_path):
    bare, copy = support.make_repository(tmp_path)
    programs = tmp_path / "bin"  # /usr/bin may have a podman
    programs.mkdir()
    for name in ("git", "sh"):
        (programs / name).symlink_to(shutil.which(name))
    with support.DaemonProcess(tmp_path, 'container_engine = "podman"\n', {"PATH": f"/nowhere:{programs}"}) as daemon:
        task = daemon.wait(daemon.add("true", agent={"repository_url": str(bare)}))
        assert task["reason"] == "spawn_failed" and "set container_engine" in task["detail"], task


def test_the_image_is_built_with_the_configured_engine(place):
    daemon, engine, bare = place
    done = daemon.cli("image", "build", "--base", "mine:1", "--tag", "agent:x", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["image"] == "agent:x", done.stderr
    assert "FROM mine:1" in done.stderr and engine.calls("build")[-1][1:3] == ["--tag", "agent:x"]


@pytest.mark.parametrize("mode, words", [
    ("unfetched", "mine:1 is not on this machine: where it cannot be fetched, look after the network or the proxy of docker, or name"
     " an image that `docker images` shows with --base"),
    ("down", "the container engine does not answer: start docker"), ("unbuilt", "read what docker says above\n")])
def test_an_image_that_is_not_built_tells_what_to_do(place, mode, words):
    daemon, engine, bare = place
    engine.mode(mode)
    try:
        done = daemon.cli("image", "build", "--base", "mine:1")
    finally:
        engine.mode("")
    assert done.returncode == 1 and f"claudomator: the image was not built: " in done.stderr and words in done.stderr, done.stderr


def test_an_image_build_without_an_engine_names_the_key(tmp_path):
    done = support.DaemonProcess(tmp_path, 'container_engine = "podman"\n', {"PATH": "/nowhere"}).cli("image", "build")
    assert done.returncode == 1 and "install podman, put it on the daemon's PATH, or set container_engine" in done.stderr


LAUNCHER = """
import os, sys
import claudomator as c
def die(*args, **kwargs):
    os.kill(os.getpid(), 9)
def after(owner, name):
    was = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: (was(*args, **kwargs), die()))
{patch}
sys.exit(c.main(["serve"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["c.Box.collect = die", "after(c.Box, 'collect')", "c._Finish.push = die",
                                   "after(c._Finish, 'push')", "c.Run._settle_once = die"])
def test_a_daemon_that_dies_while_it_takes_the_work_is_followed_by_one_that_takes_it_once(tmp_path, patch):
    import subprocess
    import sys
    engine, (bare, copy) = Engine(tmp_path / "engine"), support.make_repository(tmp_path)
    env = {"PATH": f"{FAKES}:{os.environ['PATH']}", "DOCKER_FAKE": str(engine.path)}
    daemon = support.DaemonProcess(tmp_path, "", env)
    with open(daemon.log_path, "ab") as log:
        process = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(patch=patch)], env=daemon.env,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        daemon.process = process
        daemon.wait_for_socket()
        task_id = daemon.add("echo one > one; git add one; git commit -qm 'feat: one'; echo two > two",
                             agent={"repository_url": str(bare)}, verify="cat one two")
        assert process.wait(20) == -9
    finally:
        process.kill()
    daemon.client.close()
    daemon._client = None
    with daemon:
        task = daemon.wait(task_id)
        assert task["state"] == "READY", (task, daemon.log())
        subjects = ["feat: one", c.AUTOCOMMIT_SUBJECT]
        assert [commit["message"] for commit in task["execution"]["commits"]] == subjects
        assert git(bare, "log", "--reverse", "--format=%s", "main").splitlines() == ["first", *subjects]
        assert len(daemon.call("execution.list", id=task_id)["executions"]) == 1 and engine.containers() == []


# -- the parts


def new_box(tmp_path, host=(), **more):
    config = c.parse_config({"data_dir": str(tmp_path), **more}, "test", "/")
    host = {"PATH": "/bin", "HOME": str(tmp_path), "DOCKER_HOST": "d", "SECRET": "s", **dict(host)}
    box = c.Box(config, host, "e" * 36, "claude")
    box.sandbox = c.Sandbox(str(tmp_path / "sandboxes" / "s"), "", "main", "", "", "")
    os.makedirs(box.files)
    return box


def test_the_client_of_the_engine_gets_nothing_of_the_agents():
    host = {"PATH": "/bin", "HOME": "/h", "DOCKER_HOST": "d", "CONTAINERS_CONF": "c", "ANTHROPIC_API_KEY": "k"}
    assert c.engine_env(host) == {name: host[name] for name in ("PATH", "HOME", "DOCKER_HOST", "CONTAINERS_CONF")}


def test_the_api_socket_is_linked_and_linked_anew_and_nothing_is_followed(tmp_path):
    box, own = new_box(tmp_path), tmp_path / "executions" / ("e" * 36) / "box" / "agent.sock"
    box.share_socket()
    assert not os.path.lexists(own)
    for _ in range(2):
        path = tmp_path / "agent.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            box.share_socket()
            assert own.stat().st_ino == path.stat().st_ino
    victim = tmp_path / "victim"
    victim.write_text("v")
    own.unlink()
    own.symlink_to(victim)
    box.share_socket()
    assert victim.read_text() == "v" and own.lstat().st_ino == path.stat().st_ino
    own.unlink()
    own.mkdir()
    box.share_socket()  # the agent's own loss, and no error
    assert own.is_dir()


def test_a_launch_keeps_command_and_secrets_out_of_the_engines_arguments(tmp_path):
    box = new_box(tmp_path)
    launch = c.Launch(("claude", "--secret", "s3cr3t"), {"TOKEN": "t0ken", "PATH": "/host/bin"}, "the prompt", "claude",
                      files=((f"{c.BOX_FILES}/policy", "p"),))
    made = box.launch(launch, "/workspace", True, 60, 5)
    assert not {"s3cr3t", "t0ken", "the prompt"} & set(" ".join(made.argv).split()) and made.env["DOCKER_HOST"] == "d"
    files = dict(made.files)
    assert sorted(os.path.basename(path) for path in files) == ["policy", "prompt.txt", "run"]
    assert all(path.startswith(box.files + "/") for path in files)
    script = files[f"{box.files}/run"]
    assert "export TOKEN=t0ken" in script and "/host/bin" not in script and "--secret s3cr3t" in script
    assert f"<{c.BOX_FILES}/prompt.txt" in script and "agent.sock" not in script
    assert made.argv[-1] == f"{c.BOX_FILES}/run"


def launched(box, env=()):
    """(the values of --mount, the script's exports) of an agent with that environment."""
    made = box.launch(c.Launch(("claude",), dict(env), "", "claude"), "/workspace", True, 60, 5)
    mounts = [value for name, value in zip(made.argv, made.argv[1:]) if name == "--mount"]
    return mounts, [line for line in dict(made.files)[f"{box.files}/run"].split("\n") if line.startswith("export ")]


def test_the_ssh_agent_stays_outside_unless_it_is_lent(tmp_path):
    path = tmp_path / "ssh.sock"
    path.touch()
    before, exports = launched(new_box(tmp_path / "1", ssh_auth_sock=str(path)))
    assert str(path) not in str(before) and not any("SSH" in line for line in exports)
    mounts, exports = launched(new_box(tmp_path / "2", ssh_auth_sock=str(path), containers={"ssh_agent": True}),
                               {"SSH_AUTH_SOCK": "/of/the/host"})
    assert mounts[len(before):] == [f"type=bind,source={path},target=/run/claudomator-ssh-agent.sock,readonly"]
    assert [line for line in exports if "SSH" in line] == ["export SSH_AUTH_SOCK=/run/claudomator-ssh-agent.sock"]


def test_an_ssh_agent_that_is_not_there_is_told_with_its_keys(tmp_path):
    box = new_box(tmp_path, ssh_auth_sock=str(tmp_path / "none"), containers={"ssh_agent": True})
    with pytest.raises(c.SpawnError, match="none is not there: start the agent, correct ssh_auth_sock, or set ssh_agent = false"):
        launched(box)


@pytest.mark.parametrize("pass_env, given, is_lent", [(["GOOGLE_APPLICATION_CREDENTIALS"], "key.json", True), ([], "key.json", False),
                                                      (["GOOGLE_APPLICATION_CREDENTIALS"], "of-the-image.json", False)])
def test_googles_key_file_goes_inside_where_pass_env_names_it_and_it_exists(tmp_path, pass_env, given, is_lent):
    host = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json")}
    (tmp_path / "key.json").write_text("{}")
    box = new_box(tmp_path / "data", host, agents={"claude": {"pass_env": pass_env}})
    mounts, exports = launched(box, {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / given)})
    assert (f"type=bind,source={tmp_path}/key.json,target=/run/claudomator-google.json,readonly" in mounts) is is_lent
    inside = "/run/claudomator-google.json" if is_lent else tmp_path / given
    assert f"export GOOGLE_APPLICATION_CREDENTIALS={inside}" in exports


def test_googles_key_file_that_is_not_there_stays_a_name(tmp_path):
    host = {"GOOGLE_APPLICATION_CREDENTIALS": "/of/the/image.json"}
    box = new_box(tmp_path, host, agents={"claude": {"pass_env": ["GOOGLE_APPLICATION_CREDENTIALS"]}})
    mounts, exports = launched(box, host)
    assert "export GOOGLE_APPLICATION_CREDENTIALS=/of/the/image.json" in exports and "google.json" not in str(mounts)


def test_a_container_belongs_to_the_execution_in_its_name():
    for name in (f"claudomator-{'e' * 36}", f"claudomator-{'e' * 36}-gate-abc123"):
        assert c.execution_of_container(name) == "e" * 36


WATCHED = """#!/bin/sh
case $1 in
run) [ ! -e "$0.refuses" ] || { echo "Error: refused" >&2; exit 126; }; echo an-id;;
kill) echo "$*" >>"$0.calls"; echo 143 >"$0.code";;
wait) echo "$*" >>"$0.calls"; until [ -s "$0.code" ]; do sleep 0.01; done; cat "$0.code";;
esac
"""


@pytest.mark.parametrize("case", ["ends", "refused", "told", "wait is killed"])
def test_podmans_container_is_waited_for_by_a_script_that_alone_passes_signals_on(tmp_path, case):
    engine = tmp_path / "podman"
    engine.write_text(WATCHED)
    engine.chmod(0o755)
    calls, code = tmp_path / "podman.calls", tmp_path / "podman.code"
    if case == "refused":
        (tmp_path / "podman.refuses").touch()
    process = subprocess.Popen(["/bin/sh", "-c", c.WATCH, "attach", engine, "name", engine, "run"], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, start_new_session=True)
    if case != "refused":
        support.wait_until(calls.exists)
    if case == "ends":
        code.write_text("3")
    if case == "told":
        os.killpg(process.pid, signal.SIGTERM)  # as the supervisor does
    if case == "wait is killed":
        waiting = support.wait_until(lambda: subprocess.run(["pgrep", "-P", str(process.pid), "podman"], capture_output=True,
                                                            text=True).stdout.split())
        os.kill(int(waiting[0]), signal.SIGKILL)
    out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == ({"ends": 3, "refused": 126, "told": 143, "wait is killed": 125}[case], b"")
    assert case != "refused" or said == b"Error: refused\n"
    assert ("kill --signal TERM name" in calls.read_text() if calls.exists() else False) is (case == "told")
