"""The real job in containers, with each real engine that is here.  CLAUDOMATOR_TEST_DOCKER is docker's DOCKER_HOST;
CLAUDOMATOR_TEST_PODMAN a directory with podman's storage.conf and containers.conf.  CLAUDOMATOR_TEST_DOCKER_BASE and
CLAUDOMATOR_TEST_PODMAN_BASE name a local image with bash, git, coreutils and python3 (claudomator-base:bookworm).

The agents are shell scripts, the replaying fake of ``claude``, which stands in the image, and the real CLIs that
CLAUDOMATOR_TEST_CLAUDE and CLAUDOMATOR_TEST_GEMINI name, against stand-ins for their APIs on loopback.
"""
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import claudomator as c
import pytest
from tests import support
from tests.fakes import anthropic_api, gemini_api

WITH_FAKE, IMAGE = "claudomator-fake:test", "claudomator-agent:test"
HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.campaign
FAKE_DOCKERFILE = """\
COPY claude /opt/tests/fakes/claude
COPY data /opt/tests/data/claude
RUN ln -s /opt/tests/fakes/claude /usr/local/bin/claude.py && \\
    printf '#!/bin/sh\\nexec /opt/tests/fakes/claude "$@"\\n' >/usr/local/bin/claude && chmod 755 /usr/local/bin/claude
"""


REAL_CLAUDE = (os.environ.get("CLAUDOMATOR_TEST_CLAUDE") or "").split(":")[0]
REAL_GEMINI, NODE = os.environ.get("CLAUDOMATOR_TEST_GEMINI") or "", shutil.which("node") or ""


class Engine:
    """A container engine: its name, the environment that leads its client to the one for tests, a base image."""

    def __init__(self, name, place, environment):
        self.name, self.place, self.environment = name, place, environment
        self.base = os.environ.get(f"CLAUDOMATOR_TEST_{name.upper()}_BASE", "claudomator-base:bookworm")
        self.lacks = "" if place and shutil.which(name) else f"CLAUDOMATOR_TEST_{name.upper()} names no container engine"

        is_v1 = not os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        self.has_limits = name == "docker" or os.geteuid() == 0 or not is_v1  # rootless podman needs cgroups v2 for them

    def __call__(self, *words, check=True) -> str:
        """What a command of it prints."""
        return subprocess.run([self.name, *words], env={**os.environ, **self.environment}, capture_output=True, text=True,
                              check=check, timeout=120).stdout


DOCKER = Engine("docker", os.environ.get("CLAUDOMATOR_TEST_DOCKER", ""), {
    "DOCKER_HOST": os.environ.get("CLAUDOMATOR_TEST_DOCKER", ""), "DOCKER_BUILDKIT": "0"})
_PODMAN = os.environ.get("CLAUDOMATOR_TEST_PODMAN", "")
PODMAN = Engine("podman", _PODMAN, {
    "CONTAINERS_STORAGE_CONF": f"{_PODMAN}/storage.conf", "CONTAINERS_CONF": f"{_PODMAN}/containers.conf",
    **{name: os.environ[name] for name in ("XDG_RUNTIME_DIR",) if name in os.environ}})
ENGINES = [pytest.param(engine, id=engine.name, marks=pytest.mark.skipif(bool(engine.lacks), reason=engine.lacks or "-"))
           for engine in (DOCKER, PODMAN)]
ONLY_DOCKER = pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)
ONLY_PODMAN = pytest.mark.parametrize("engine", ENGINES[1:], indirect=True)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.param


def build_agent_image(engine, directory, base, tag):
    """``claudomator image build`` from a local image."""
    daemon = support.DaemonProcess(directory, f'container_engine = "{engine.name}"\n[containers]\nnetwork = "host"\n',
                                   engine.environment)
    done = daemon.cli("image", "build", "--base", base, "--tag", tag, "--json", timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"image": tag, "base": base, "ct": True}


@pytest.fixture(scope="module")
def image(engine, tmp_path_factory):
    """The agent image, built by the program from one that has the fake ``claude``."""
    context = tmp_path_factory.mktemp("image")
    shutil.copy(HERE / "fakes" / "claude", context / "claude")
    shutil.copytree(HERE / "data" / "claude", context / "data")
    (context / "Dockerfile").write_text(f"FROM {engine.base}\n{FAKE_DOCKERFILE}")
    engine("build", "--network", "host", "--tag", WITH_FAKE, str(context))
    build_agent_image(engine, context, WITH_FAKE, IMAGE)
    return IMAGE


class Job:
    """A repository, a daemon, and what the engine knows of its containers."""

    def __init__(self, tmp_path, engine, more="", env=None, containers="", shell=""):
        self.engine = engine
        self.bare, self.copy = support.make_repository(tmp_path)
        self.daemon = support.DaemonProcess(tmp_path, f"""\
container_engine = "{engine.name}"
claude_image = "{IMAGE}"
stop_grace = "1s"
max_concurrent = 4
{more if not more.startswith("[") else ""}
[containers]
network = "host"
memory = "256m"
cpus = 1
pids = 200
{containers}
[agents.shell]
env = {{ SECRET = "s3cr3t-of-the-config" }}
{shell}
[agents.claude]
env = {{ FAKE_CLAUDE_VERSION = "2.1.329" }}
{more if more.startswith("[") else ""}
""", {**engine.environment, "ANTHROPIC_API_KEY": "sk-ant-s3cr3t", **(env or {})})

    def add(self, script, **more) -> str:
        agent = {"repository_url": str(self.bare), **more.pop("agent", {})}
        return self.daemon.add(script, agent=agent, **more)

    def containers(self) -> list[str]:
        label = f"label={c.DATA_LABEL}={self.daemon.data_dir}"
        lines = self.engine("ps", "--all", "--filter", label, "--format", "{{.Names}} {{.Status}}").splitlines()
        words = {"Up": "running", "Exited": "exited"}  # podman's {{.State}} is another text than docker's
        return [f"{name} {words.get(status, status)}" for name, status in (line.split()[:2] for line in lines)]

    def started(self, task_id) -> dict:
        """The execution, once its agent has printed something."""
        def look():
            run = self.daemon.call("task.get", id=task_id)["executions"][0:1]
            path = self.daemon.data_dir / "executions" / run[0]["id"] / "stdout.log" if run else None
            return run[0] if path and path.exists() and path.stat().st_size else None
        return support.wait_until(look, 20, "the agent's first output")

    def row(self, run):
        store = c.Store(str(self.daemon.data_dir / "claudomator.db"), readonly=True)
        try:
            return next(found for found in store.executions_of(run["task_id"]) if found.id == run["id"])
        finally:
            store.close()

    def runs(self, task_id) -> list[dict]:
        return self.daemon.call("execution.list", id=task_id)["executions"][::-1]

    def said(self, run) -> str:
        return (self.daemon.data_dir / "executions" / run["id"] / "stdout.log").read_text()

    def box(self, run) -> pathlib.Path:
        return self.daemon.data_dir / "executions" / run["id"] / "box"

    def log(self, branch="main") -> list[str]:
        done = subprocess.run(["git", "-C", self.bare, "log", "--reverse", "--format=%s", branch], text=True,
                              capture_output=True, check=True)
        return done.stdout.splitlines()


@pytest.fixture
def job(engine, tmp_path, image):
    job = Job(tmp_path, engine)
    with job.daemon:
        yield job
        for name in (line.split()[0] for line in job.containers()):
            engine("rm", "--force", name, check=False)


def commands_of_all() -> bytes:
    """The command lines of every process of this machine."""
    found = b""
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() + b"\n"
        except OSError:
            pass
    return found


def client_of(execution_id) -> int:
    """The pid of the engine's client that waits for an execution, once it is there."""
    def look():
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            is_client = words[0].endswith(b"docker") or words[0].endswith(b"podman") and words[1] == b"wait"
            if is_client and f"claudomator-{execution_id}".encode() in words:
                return int(path.parent.name)
        return 0
    return support.wait_until(look, 10, "the engine's client")


WAITS = "echo begun; until [ -e $CLAUDOMATOR_SUMMARY_FILE.go ]; do sleep 0.05; done; "
IGNORES = "trap '' TERM; echo begun; while :; do sleep 0.1; done"


def test_commits_and_what_was_not_committed_are_pushed_from_the_host(job):
    task_id = job.add("git config user.name > who; echo a > a; git add a; git commit -qm 'feat: a'; mkdir n; echo b > n/b;"
                      " chmod +x n/b; ln -s b n/c; echo done > $CLAUDOMATOR_SUMMARY_FILE; id -u; pwd",
                      verify="test -x n/b")
    task = job.daemon.wait(task_id)
    assert (task["state"], task["summary"]) == ("READY", "done"), task
    assert job.log() == ["first", "feat: a", c.AUTOCOMMIT_SUBJECT]
    tree = subprocess.run(["git", "-C", job.bare, "ls-tree", "-r", "main"], text=True, capture_output=True).stdout
    assert [line.split()[0] + line.split("\t")[1] for line in tree.splitlines()] == [
        "100644README.md", "100644a", "100755n/b", "120000n/c", "100644who"]
    assert job.containers() == []
    run = task["execution"]
    assert [commit["message"] for commit in run["commits"]] == job.log()[1:] and not run["sandbox_dir"]
    assert job.said(run) == f"{os.geteuid()}\n/workspace\n"
    support.wait_until(lambda: not list((job.daemon.data_dir / "sandboxes").glob("[!.]*")))
    assert not (job.box(run) / "work.bundle").exists()


def test_limits_hold_and_no_secret_is_seen_from_outside(job):
    task_id = job.add(WAITS + "echo $SECRET; grep Cap /proc/self/status; ls $HOME; command -v ct || :")
    run = job.started(task_id)
    name = f"claudomator-{run['id']}"
    text = job.engine("inspect", name)
    facts = json.loads(text)[0]
    host = facts["HostConfig"]
    if job.engine.has_limits:
        assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (256 << 20, 10 ** 9, 200)
    assert not host["CapAdd"] and "no-new-privileges" in host["SecurityOpt"]
    assert host["CapDrop"] == ["ALL"] or facts["BoundingCaps"] is facts["EffectiveCaps"] is None
    assert host["LogConfig"]["Type"] == "none" and host["Init"] is True and not host["Privileged"]
    assert facts["Config"]["User"] == f"{os.geteuid()}:{os.getegid()}"
    assert facts["Config"]["Labels"][c.EXECUTION_LABEL] == run["id"]
    assert "s3cr3t" not in text and b"s3cr3t" not in commands_of_all()
    assert not any(mount["Source"] == str(job.daemon.data_dir) for mount in facts["Mounts"])
    assert not (job.box(run) / "run").exists(), "the script with the secrets is still there"
    (job.box(run) / "summary.txt.go").touch()
    assert job.daemon.wait(task_id)["state"] == "READY"
    log = job.said(run)
    assert "s3cr3t-of-the-config" in log and {line.split()[1] for line in log.splitlines() if line.startswith("Cap")} == {"0" * 16}
    if (support.PROGRAM.parent / "ct.py").exists():
        assert "/usr/local/bin/ct" in log


def test_a_question_is_answered_and_the_same_session_goes_on_in_the_same_sandbox(job):
    agent = {"type": "claude", "repository_url": str(job.bare), "instructions": "Do it.\nSCENARIO: question\n"}
    task_id = job.daemon.call("task.create", tasks={"name": "q", "agent": agent}, queue=True)["tasks"][0]["id"]
    for question, answer in (("Which database?", "pg"), ("Which version?", "sixteen")):
        task = job.daemon.wait(task_id, 30)
        assert (task["state"], task["question"]) == ("BLOCKED", {**task["question"], "text": question}), task
        assert os.path.isdir(task["execution"]["sandbox_dir"]) and job.containers() == []
        job.daemon.call("task.answer", id=task_id, text=answer)
    task = job.daemon.wait(task_id, 30)
    assert (task["state"], task["summary"]) == ("READY", "The database is set up."), task
    runs = job.runs(task_id)
    assert {run["session_id"] for run in runs} == {runs[0]["id"]} and len(runs) == 3
    assert job.log() == ["first", "feat: first", "feat: second", "feat: third"]


def test_a_killed_daemon_is_followed_by_one_that_adopts_the_container(job):
    task_id = job.add(WAITS + "echo a > a")
    run = job.started(task_id)
    job.daemon.kill9()
    assert job.containers() == [f"claudomator-{run['id']} running"]
    job.daemon._client = None
    job.daemon.start()
    (job.box(run) / "summary.txt.go").touch()
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY" and len(job.runs(task_id)) == 1 and job.containers() == []
    assert job.log() == ["first", c.AUTOCOMMIT_SUBJECT]


@pytest.mark.parametrize("ends_meanwhile", [False, True])
def test_a_container_that_outlived_daemon_supervisor_and_client_is_adopted(job, ends_meanwhile):
    task_id = job.add(WAITS + "echo a > a")
    run = job.started(task_id)
    row = job.row(run)
    job.daemon.kill9()
    client = client_of(run["id"])
    os.kill(row.pid, signal.SIGKILL)  # as systemd does with KillMode=control-group
    os.kill(client, signal.SIGKILL)
    support.wait_until(lambda: not c.process_start(client) and not c.process_start(row.pid))
    assert job.containers() == [f"claudomator-{run['id']} running"]
    if ends_meanwhile:
        (job.box(run) / "summary.txt.go").touch()
        support.wait_until(lambda: job.containers() == [f"claudomator-{run['id']} exited"])
    job.daemon._client = None
    job.daemon.start()
    if not ends_meanwhile:
        support.wait_until(lambda: "adopted the container" in job.daemon.log(), 20, "the adoption")
        assert job.containers() == [f"claudomator-{run['id']} running"]
        (job.box(run) / "summary.txt.go").touch()
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY" and len(job.runs(task_id)) == 1 and job.containers() == []
    assert task["execution"]["exit_code"] == 0 and job.log() == ["first", c.AUTOCOMMIT_SUBJECT]


def test_an_adopted_container_is_cancelled(job):
    task_id = job.add(IGNORES)
    run = job.started(task_id)
    row, client = job.row(run), client_of(run["id"])
    job.daemon.kill9()
    os.kill(row.pid, signal.SIGKILL)
    os.kill(client, signal.SIGKILL)
    job.daemon._client = None
    job.daemon.start()
    support.wait_until(lambda: "adopted the container" in job.daemon.log(), 20, "the adoption")
    job.daemon.call("task.cancel", ids=[task_id])
    assert job.daemon.wait(task_id)["state"] == "CANCELLED" and job.containers() == []


@ONLY_PODMAN
def test_a_container_whose_guard_died_with_it_is_lost_and_not_waited_for(engine, job):
    """Podman has no daemon: what it says of a container is what a process beside it (conmon) wrote down last."""
    task_id = job.add(WAITS)
    run = job.started(task_id)
    pids = json.loads(engine("inspect", f"claudomator-{run['id']}"))[0]["State"]
    row, client = job.row(run), client_of(run["id"])
    job.daemon.kill9()
    for pid in (row.pid, client, pids["ConmonPid"], pids["Pid"]):  # all at once, as a stop of the daemon's unit may do
        os.kill(pid, signal.SIGKILL)
    support.wait_until(lambda: not any(map(c.process_start, (pids["ConmonPid"], pids["Pid"]))))
    job.daemon._client = None
    job.daemon.start()
    first = support.wait_until(lambda: [found for found in job.runs(task_id) if found["end_time"]], 15)[0]
    assert (first["status"], first["reason"]) == ("FAILED", "lost")
    job.daemon.call("task.cancel", ids=[task_id])
    assert job.containers() == []


def test_a_killed_client_loses_the_run_and_leaves_no_container(job):
    task_id = job.add("[ $CLAUDOMATOR_EXECUTION_ID = $(cat /run/claudomator/../claudomator/x 2>/dev/null || echo no) ];"
                      " echo begun; while :; do sleep 0.1; done")
    run = job.started(task_id)
    os.kill(client_of(run["id"]), signal.SIGKILL)
    first = support.wait_until(lambda: [found for found in job.runs(task_id) if found["end_time"]], 20)[0]
    assert (first["status"], first["reason"]) == ("FAILED", "lost")
    assert not any(run["id"] in name for name in job.containers())
    job.daemon.call("task.cancel", ids=[task_id])
    assert job.containers() == []


@pytest.mark.parametrize("script", ["echo begun; exec sleep 60", IGNORES], ids=["obeys", "ignores"])
def test_a_cancelled_run_leaves_no_container(job, script):
    task_id = job.add(script)
    job.started(task_id)
    begin = time.monotonic()
    job.daemon.call("task.cancel", ids=[task_id])
    assert job.containers() == [] and time.monotonic() - begin < 8
    assert job.daemon.wait(task_id)["state"] == "CANCELLED"


@pytest.mark.parametrize("script", ["echo begun; exec sleep 60", IGNORES], ids=["obeys", "ignores"])
def test_a_timeout_leaves_no_container(job, script):
    task = job.daemon.wait(job.add(script, timeout="2s"))
    assert (task["state"], task["reason"]) == ("TIMED_OUT", "timed_out") and job.containers() == []


def test_a_timeout_holds_without_daemon_supervisor_and_client(job):
    task_id = job.add(IGNORES, timeout="3s")
    run = job.started(task_id)
    row, client = job.row(run), client_of(run["id"])
    job.daemon.kill9()
    os.kill(row.pid, signal.SIGKILL)
    os.kill(client, signal.SIGKILL)
    support.wait_until(lambda: job.containers() == [f"claudomator-{run['id']} exited"], 15, "the container's end")
    job.daemon._client = None
    job.daemon.start()
    task = job.daemon.wait(task_id)
    assert (task["state"], task["reason"]) == ("TIMED_OUT", "timed_out") and job.containers() == []


def test_what_a_dead_daemon_left_is_removed_by_the_next_one_and_nobody_elses(job):
    assert job.daemon.wait(job.add("true"))["state"] == "READY"
    job.daemon.terminate()
    job.daemon._client = None
    other, name = "claudomator-somebody-elses", f"claudomator-{'0' * 8}-0000-4000-8000-{'0' * 12}"
    for own, label in ((name, job.daemon.data_dir), (other, "/another/one")):
        job.engine("run", "--detach", "--init", "--network", "host", "--name", own, "--label", f"{c.DATA_LABEL}={label}", IMAGE,
               "sleep", "60")
    try:
        job.daemon.start()
        support.wait_until(lambda: not job.containers(), 20, "the removal")
        assert other in job.engine("ps", "--format", "{{.Names}}")
    finally:
        job.engine("rm", "--force", other, check=False)


@ONLY_DOCKER  # what differs between the engines, test_work_that_others_overtook shows
def test_a_failed_verify_goes_back_and_the_agents_copy_is_as_it_was(job):
    task_id = job.add('[ $CLAUDOMATOR_ROUND = 1 ] && { echo x > Cargo.lock; mkdir -p t; echo 1 > t/ignored; echo t > '
                      '.gitignore; exit 0; }; test -s Cargo.lock && test -s t/ignored && echo ok > fixed',
                      verify="test -f fixed", verify_rounds=2)
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY", task
    files = subprocess.run(["git", "-C", job.bare, "ls-tree", "--name-only", "main"], capture_output=True, text=True)
    assert files.stdout.split() == [".gitignore", "Cargo.lock", "README.md", "fixed"]


def test_work_that_others_overtook_is_rebased_and_verified_anew_in_the_container(job):
    task_id = job.add(WAITS + "echo a > a", verify="ls; test ! -e theirs || { test -e a && echo both; }")
    run = job.started(task_id)
    (job.copy / "theirs").write_text("t\n")
    git = ["git", "-C", job.copy, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["add", "-A"], ["commit", "-qm", "theirs"], ["push", "-q", "origin", "main"]):
        subprocess.run([*git, *words], check=True, env=support.clean_environment(job.daemon.home))
    (job.box(run) / "summary.txt.go").touch()
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY" and job.log() == ["first", "theirs", c.AUTOCOMMIT_SUBJECT]
    assert "both" in (job.daemon.data_dir / "executions" / run["id"] / "deliver.log").read_text()


@ONLY_DOCKER  # git on the host, whatever the engine
def test_no_setting_hook_or_link_of_the_agent_reaches_the_host(job):
    """Each of these would run a program, or write to a file, as soon as a git of the host works in the agent's clone."""
    victim = job.daemon.home / "victim"
    script = f"""
printf '#!/bin/sh\\ntouch {victim}\\n' > /workspace/evil; chmod +x /workspace/evil
git config core.fsmonitor "touch {victim}; false"; git config core.hooksPath /workspace; git config core.sshCommand /workspace/evil
git config filter.x.clean "touch {victim}; cat"; echo '* filter=x' > .gitattributes
for hook in pre-push post-checkout post-rewrite pre-commit; do cp evil .git/hooks/$hook; done
for name in claudomator-commit claudomator-commit.new claudomator-base claudomator.json; do ln -sf {victim} .git/$name; done
mkdir nested; git init -q nested; git -C nested config core.fsmonitor "touch {victim}; false"; echo x > nested/x
ln -sf {victim} /run/claudomator/question.json.x; ln -sf {victim} /run/claudomator/work.bundle
echo a > a; git -c core.fsmonitor= -c core.hooksPath=/dev/null -c filter.x.clean=cat add a; echo worked
"""
    task_id = job.add(script, verify="true")
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY", (task, job.daemon.log())
    assert not os.path.lexists(victim) and job.log() == ["first", c.AUTOCOMMIT_SUBJECT]


def test_the_agent_reaches_the_api_across_a_restart_of_the_daemon(job):
    status = "ct task status $CLAUDOMATOR_TASK_ID"
    task_id = job.add(f"{status}; {WAITS} {status}")
    run = job.started(task_id)
    before = os.stat(job.daemon.data_dir / "agent.sock").st_ino
    job.daemon.kill9()
    job.daemon._client = None
    job.daemon.start()
    own = job.box(run) / "agent.sock"
    support.wait_until(lambda: own.stat().st_ino == os.stat(job.daemon.data_dir / "agent.sock").st_ino != before, 10,
                       "the new socket")
    (job.box(run) / "summary.txt.go").touch()
    task = job.daemon.wait(task_id)
    assert task["state"] == "READY", (task, job.said(run))
    assert job.said(run).count("RUNNING") == 2 and "begun" in job.said(run)


@ONLY_DOCKER  # ct over the mounted socket, test_the_agent_reaches_the_api shows with both
def test_an_agent_waits_with_ct_for_its_subtask_across_a_restart_and_asks(job):
    """``ct`` in the image, with the token of the run, over the mounted socket of two daemons."""
    task_id = job.add("""\
if [ -e asked ]; then cat asked; ct summary "all is done"; exit; fi
ct task submit --name below --agent shell --wait --instructions '
  echo begun; until [ -e $CLAUDOMATOR_SUMMARY_FILE.go ]; do sleep 0.05; done; echo below > below'
echo $? > asked
ct ask "Which one?" --option pg --option sqlite
""")
    below, = support.wait_until(lambda: job.daemon.call("task.subtasks", id=task_id)["tasks"], 20, "the subtask")
    run = job.started(below["id"])
    job.daemon.kill9()
    job.daemon._client = None
    job.daemon.start()
    (job.box(run) / "summary.txt.go").touch()
    task = job.daemon.wait(task_id, 60)
    assert (task["state"], task["question"]["text"]) == ("BLOCKED", "Which one?"), (task, job.daemon.log())
    assert task["question"]["options"] == ["pg", "sqlite"] and job.said(task["execution"]).startswith("COMPLETED\n")
    assert job.daemon.call("task.get", id=below["id"])["task"]["agent"]["repository_url"] == str(job.bare)
    job.daemon.call("task.answer", id=task_id, text="pg")
    task = job.daemon.wait(task_id, 30)
    assert (task["state"], task["summary"], job.said(task["execution"])[:2]) == ("READY", "all is done", "0\n"), task
    assert job.containers() == [] and "below" in subprocess.run(
        ["git", "-C", job.bare, "ls-tree", "--name-only", "main"], capture_output=True, text=True).stdout


def test_the_ssh_agent_and_googles_key_are_lent_read_only_and_reached(tmp_path, engine, image):
    """A socket that listens stands in for the SSH agent."""
    path, key = tmp_path / "ssh agent.sock", tmp_path / "key.json"
    key.write_text('{"type": "service_account"}')
    key.chmod(0o600)
    job = Job(tmp_path, engine, f'ssh_auth_sock = "{path}"', {"GOOGLE_APPLICATION_CREDENTIALS": str(key)},
              "ssh_agent = true\n", 'pass_env = ["GOOGLE_APPLICATION_CREDENTIALS"]')
    ask = ("import os, socket; s = socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK']); s.sendall(b'hello'); "
           "print(s.recv(9).decode())")
    with socket.socket(socket.AF_UNIX) as agent, job.daemon:
        agent.bind(str(path))
        agent.listen()
        agent.settimeout(20)
        task_id = job.add(f"""python3 -c "{ask}"; cat $GOOGLE_APPLICATION_CREDENTIALS; echo
rm -f $SSH_AUTH_SOCK $GOOGLE_APPLICATION_CREDENTIALS; echo x > $GOOGLE_APPLICATION_CREDENTIALS; chmod 777 $SSH_AUTH_SOCK; true""")
        connection, _ = agent.accept()
        with connection:
            assert connection.recv(5) == b"hello"
            connection.sendall(b"identity")
        task = job.daemon.wait(task_id)
        assert task["state"] == "READY" and job.said(task["execution"]) == 'identity\n{"type": "service_account"}\n', task
        errors = (job.daemon.data_dir / "executions" / task["execution"]["id"] / "stderr.log").read_text()
        assert errors.count("Read-only file system") == 2 and key.read_text() == '{"type": "service_account"}'
        path.unlink()
        task = job.daemon.wait(job.add("true"))
        assert task["reason"] == "spawn_failed" and "is not there: start the agent" in task["detail"], task


def test_the_login_is_copied_into_a_home_that_the_session_keeps(tmp_path, engine, image):
    login = tmp_path / "login"
    login.mkdir()
    (login / ".credentials.json").write_text('{"token": "s3cr3t"}')
    job = Job(tmp_path, engine, f'claude_config_dir = "{login}"')
    with job.daemon:
        agent = {"type": "claude", "repository_url": str(job.bare), "instructions": "Do it.\nSCENARIO: question\n"}
        task_id = job.daemon.call("task.create", tasks={"name": "q", "agent": agent}, queue=True)["tasks"][0]["id"]
        task = job.daemon.wait(task_id, 30)
        home = pathlib.Path(task["execution"]["sandbox_dir"]) / ".git" / c.BOX_DIR / "home" / ".claude"
        assert (home / ".credentials.json").read_text() == '{"token": "s3cr3t"}'
        assert list(home.glob("projects/*/*.jsonl")) and not (login / "projects").exists()
        job.daemon.call("task.cancel", ids=[task_id])


def test_memory_beyond_the_limit_is_named(job):
    if not job.engine.has_limits:
        pytest.skip("rootless podman sets no limits with cgroups v1")
    task_id = job.add("echo begun; python3 -c 'x = bytearray(1 << 30); print(len(x))'")
    task = job.daemon.wait(task_id, 30)
    assert (task["state"], task["reason"]) == ("FAILED", "agent_error") and "containers.memory" in task["detail"], task


def test_an_agent_that_exits_with_the_engines_codes_is_judged_as_an_agent(job):
    for code in (125, 126, 127):
        task = job.daemon.wait(job.add(f"exit {code}"))
        assert (task["reason"], task["execution"]["exit_code"]) == ("agent_error", code), task


def test_an_agent_that_is_not_in_the_image_says_so(tmp_path, engine, image):
    job = Job(tmp_path, engine, "", None)
    text = job.daemon.config_path.read_text().replace(f'"{IMAGE}"', f'"{engine.base}"')
    job.daemon.config_path.write_text(text)
    with job.daemon:
        agent = {"type": "claude", "repository_url": str(job.bare), "instructions": "x"}
        task_id = job.daemon.call("task.create", tasks={"name": "q", "agent": agent}, queue=True)["tasks"][0]["id"]
        task = job.daemon.wait(task_id)
        assert task["reason"] == "spawn_failed" and "claude_image" in task["detail"], task


def test_a_missing_image_names_the_command_that_makes_it(tmp_path, engine):
    job = Job(tmp_path, engine)
    job.daemon.config_path.write_text(f'container_engine = "{engine.name}"\nclaude_image = "claudomator-nowhere:1"\n')
    with job.daemon:
        task = job.daemon.wait(job.add("true"))
        assert task["reason"] == "spawn_failed" and "claudomator image build" in task["detail"], task
        assert not list((job.daemon.data_dir / "sandboxes").glob("[!.]*"))


def test_an_engine_that_does_not_answer_is_tried_again(engine, tmp_path):
    job = Job(tmp_path, engine, "", {c.ENGINE_SOCKET[engine.name]: f"unix://{tmp_path}/nothing.sock"})
    with job.daemon:
        task = job.daemon.wait(job.add("true", retry={"max_attempts": 2, "backoff": ["50ms"]}))
        assert task["reason"] == "sandbox_failed" and f"does not answer: start {engine.name}" in task["detail"], task
        assert len(job.runs(task["id"])) == 2


def test_setup_runs_inside_and_before_the_agent(tmp_path, engine, image):
    job = Job(tmp_path, engine)
    with open(job.daemon.config_path, "a", encoding="utf-8") as file:
        file.write(f'[[projects]]\nname = "p"\ndir = "{job.copy}"\nsetup = "pwd > made; echo made >> .gitignore"\n'
                   f'verify = "test $(cat made) = /workspace"\n')
    with job.daemon:
        task_id = job.daemon.add("cat made; echo x > x", project="p", agent={"isolation": "container"})
        task = job.daemon.wait(task_id)
        assert task["state"] == "READY", (task, job.daemon.log())
        assert job.said(task["execution"]) == "/workspace\n" and job.log() == ["first", c.AUTOCOMMIT_SUBJECT]
        assert not (job.copy / "x").exists()


RECLAIM = """
import glob, os, select, shutil, signal, subprocess, sys, tempfile  # before the user changes, who may not read them
import claudomator as c
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
config = c.parse_config({"data_dir": sys.argv[1], "claude_image": sys.argv[2]}, "test", "/")
box = c.Box(config, dict(os.environ), "0" * 8, "shell")
box.sandbox = c.Sandbox(sys.argv[1] + "/sandboxes/s", "", "", "", "", "")
try:
    c.remove_sandbox(box.sandbox.path, config.sandboxes_dir)
    print("removed at once")
except c.SandboxError:
    box.reclaim(dict(os.environ))
    c.remove_sandbox(box.sandbox.path, config.sandboxes_dir)
    print("removed", os.path.exists(box.sandbox.path))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
@ONLY_DOCKER  # rootless podman has no other users, and as root nothing is to be taken back
def test_files_of_another_user_in_the_agents_copy_are_taken_back(engine, image):
    import tempfile
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        inner = root / "sandboxes" / "s" / ".git" / c.BOX_DIR / "work" / "made" / "by-root"
        inner.mkdir(parents=True)
        (inner / "file").write_text("x")
        for path in (root, *root.rglob("*")):
            if "made" not in path.parts:
                os.chown(path, 65534, 65534)
        inner.parent.chmod(0o700)
        path = pathlib.Path(engine.place.removeprefix("unix://"))
        mode = path.stat().st_mode
        path.chmod(0o666)
        try:
            done = subprocess.run([sys.executable, "-c", RECLAIM, directory, IMAGE], capture_output=True, text=True,
                                  env={"PATH": os.environ["PATH"], **engine.environment, "HOME": directory,
                                       "PYTHONPATH": str(support.PROGRAM.parent)}, cwd="/")
        finally:
            path.chmod(mode)
        assert done.stdout == "removed False\n", done.stderr


@ONLY_PODMAN
@pytest.mark.skipif(os.geteuid() == 0, reason="rootless podman only: root's files need no taking back")
def test_files_of_a_subordinate_user_in_the_agents_copy_are_taken_back(engine, image, tmp_path):
    config = c.parse_config({"data_dir": str(tmp_path), "claude_image": image, "container_engine": "podman"}, "test", "/")
    env = {**os.environ, **engine.environment}
    box = c.Box(config, env, "0" * 8, "shell")
    box.sandbox = c.Sandbox(f"{config.sandboxes_dir}/s", "", "", "", "", "")
    made = pathlib.Path(box.sandbox.path, ".git", c.BOX_DIR, "work", "made")
    made.mkdir(parents=True)
    (made / "file").write_text("x")
    engine("unshare", "chown", "-R", "5:5", str(made))
    engine("unshare", "chmod", "700", str(made))
    with pytest.raises(c.SandboxError):
        c.remove_sandbox(box.sandbox.path, config.sandboxes_dir)
    box.reclaim(env)
    assert (made / "file").stat().st_uid == os.geteuid()
    c.remove_sandbox(box.sandbox.path, config.sandboxes_dir)


# -- the real CLIs


class RealJob:
    """A daemon whose containers hold the real CLI of ``kind``."""

    def __init__(self, tmp_path, engine, kind, image, env):
        self.kind, (self.bare, _) = kind, support.make_repository(tmp_path)
        self.daemon = support.DaemonProcess(tmp_path, f"""\
container_engine = "{engine.name}"
{kind}_image = "{image}"
[containers]
network = "host"
[agents.{kind}]
model = "{"sonnet" if kind == "claude" else "gemini-2.5-flash"}"
""", {**engine.environment, **env})

    def run(self, scenario) -> str:
        agent = {"type": self.kind, "repository_url": str(self.bare), "instructions": f"Do it.\nSCENARIO: {scenario}"}
        return self.daemon.call("task.create", tasks={"name": scenario, "agent": agent}, queue=True)["tasks"][0]["id"]

    def git(self, *words) -> list[str]:
        done = subprocess.run(["git", "-C", self.bare, *words], text=True, capture_output=True, check=True)
        return done.stdout.splitlines()


def real_image(engine, tmp_path_factory, kind):
    """An agent image with the CLI of this machine.  claude is one native program.  gemini needs node 20, and Debian's
    own is 18: this machine's goes along, as the base is built for the same C library."""
    context, tag = tmp_path_factory.mktemp(kind), f"claudomator-{kind}:real"
    if kind == "claude":
        shutil.copy(os.path.realpath(REAL_CLAUDE), context / "claude")
        lines = ["COPY claude /usr/local/bin/claude"]
    else:
        program = pathlib.Path(os.path.realpath(REAL_GEMINI))
        modules = next(path for path in program.parents if path.name == "node_modules")
        shutil.copy(os.path.realpath(NODE), context / "node")
        shutil.copytree(modules, context / "node_modules", symlinks=True)
        lines = ["COPY node /usr/local/bin/node", "COPY node_modules /opt/gemini/node_modules",
                 f"RUN ln -s /opt/gemini/node_modules/{program.relative_to(modules)} /usr/local/bin/gemini"]
    (context / "Dockerfile").write_text("\n".join([f"FROM {engine.base}", *lines, ""]))
    engine("build", "--network", "host", "--tag", f"{tag}-base", str(context))
    build_agent_image(engine, context, f"{tag}-base", tag)
    shutil.rmtree(context)
    return tag


@pytest.fixture(scope="module")
def claude_image(engine, tmp_path_factory):
    return real_image(engine, tmp_path_factory, "claude")


@pytest.fixture(scope="module")
def gemini_image(engine, tmp_path_factory):
    return real_image(engine, tmp_path_factory, "gemini")


@pytest.fixture(params=[
    pytest.param("claude", marks=pytest.mark.skipif(not REAL_CLAUDE, reason="CLAUDOMATOR_TEST_CLAUDE names no claude")),
    pytest.param("gemini", marks=pytest.mark.skipif(not REAL_GEMINI or not NODE, reason="no CLAUDOMATOR_TEST_GEMINI, or no node"))])
def real(request, engine, tmp_path):
    kind, image = request.param, request.getfixturevalue(f"{request.param}_image")
    with (anthropic_api if kind == "claude" else gemini_api).StandIn() as api:
        env = {"claude": {"ANTHROPIC_API_KEY": "sk-ant-fake", "ANTHROPIC_BASE_URL": api.url},
               "gemini": {"GEMINI_API_KEY": "fake", "GOOGLE_GEMINI_BASE_URL": api.url, "HOME": str(tmp_path / "home")}}[kind]
        login = tmp_path / "home" / ".gemini" / "settings.json"
        login.parent.mkdir(parents=True)
        login.write_text('{"security": {"auth": {"selectedType": "gemini-api-key"}}}')
        job = RealJob(tmp_path, engine, kind, image, env)
        with job.daemon:
            yield job
        names = engine("ps", "--all", "--filter", f"label={c.DATA_LABEL}={job.daemon.data_dir}", "--format", "{{.Names}}")
        assert names == "", "containers are left"


@ONLY_DOCKER  # large images, and a CLI does not know its engine
def test_a_real_cli_in_a_container_answers(real):
    task = real.daemon.wait(real.run("text"), 60)
    assert (task["state"], task["reason"], task["execution"]["exit_code"]) == ("READY", None, 0), (task, real.daemon.log())
    assert real.git("log", "--format=%s", "main") == ["first"] and task["execution"]["tokens_in"] > 0


@ONLY_DOCKER
def test_what_a_real_cli_wrote_in_a_container_is_committed_and_pushed(real):
    task = real.daemon.wait(real.run("write"), 60)
    assert (task["state"], task["summary"]) == ("READY", "The file is there."), (task, real.daemon.log())
    assert real.git("log", "--format=%s", "main") == [c.AUTOCOMMIT_SUBJECT, "first"]
    assert real.git("show", "main:made.txt") == ["made by the agent"]


@ONLY_DOCKER
def test_a_real_cli_resumes_its_session_in_another_container(real):
    task_id = real.run("question")
    for question, answer in (("Which database?", "pg"), ("Which version?", "sixteen")):
        task = real.daemon.wait(task_id, 60)
        assert (task["state"], task["question"] and task["question"]["text"]) == ("BLOCKED", question), (task, real.daemon.log())
        real.daemon.call("task.answer", id=task_id, text=answer)
    task = real.daemon.wait(task_id, 60)
    assert task["state"] == "READY", (task, real.daemon.log())
    runs = real.daemon.call("execution.list", id=task_id)["executions"]
    assert len(runs) == 3 and {run["session_id"] for run in runs} == {runs[-1]["id"]}
    assert [line[:5] for line in real.git("log", "--format=%s", "main")] == ["feat:"] * 3 + ["first"]
