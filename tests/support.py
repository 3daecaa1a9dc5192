"""What several test files share: waiting for a condition, a real daemon process, the command line as a process."""
import os
import pathlib
import subprocess
import sys
import time

import claudomator as c

PROGRAM = pathlib.Path(c.__file__).resolve()
# By import, not as a script: a script is compiled anew at every start.
COMMAND = [sys.executable, "-c", "import sys, claudomator; sys.exit(claudomator.main())"]


def wait_until(condition, timeout_s=10.0, what="the condition"):
    """The first true value of ``condition()``; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.01)


def clean_environment(home, **more):
    """An environment that reaches nothing of this machine's user."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ", "TMPDIR") if name in os.environ}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(PROGRAM.parent), "GIT_CONFIG_NOSYSTEM": "1",
            "CLAUDOMATOR_SERVER_ADDR": "", **more}  # no HTTP port: many daemons run at once


class DaemonProcess:
    """A real daemon in a process of its own, on a data directory below ``tmp_path``."""

    def __init__(self, tmp_path, config_text="", env=None, data_dir=None):
        self.home = pathlib.Path(tmp_path)
        self.data_dir = pathlib.Path(data_dir or self.home / "data")
        self.config_path = self.home / "config.toml"
        self.config_path.write_text(config_text, encoding="utf-8")
        self.env = clean_environment(self.home, CLAUDOMATOR_CONFIG=str(self.config_path),
                                     CLAUDOMATOR_DATA_DIR=str(self.data_dir), **(env or {}))
        self.log_path = self.home / "daemon.log"
        self.process = None
        self._client = None

    def start(self):
        """Start it and wait until it listens; returns itself."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen([*COMMAND, "serve"], env=self.env, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log)
        self.wait_for_socket()
        return self

    def wait_for_socket(self):
        """Wait until the process listens."""
        def listens():
            assert self.process.poll() is None, self.log()
            try:
                self.client.connect()
                return True
            except c.Unreachable:
                return False
        wait_until(listens, 20, "listening")

    @property
    def socket_path(self):
        return str(self.data_dir / "claudomator.sock")

    @property
    def http_address(self):
        """HOST:PORT of the HTTP port of a daemon that was given one (by CLAUDOMATOR_SERVER_ADDR)."""
        wait_until(lambda: "http://" in self.log(), 20, "listening")
        return self.log().rpartition("http://")[2].partition(",")[0]

    @property
    def client(self):
        """The one connection that tests use for plain calls."""
        if self._client is None:
            self._client = c.ControlClient(self.socket_path)
        return self._client

    def new_client(self):
        return c.ControlClient(self.socket_path)

    def call(self, method, **params):
        return self.client.call(method, **params)

    def add(self, script, queue=True, **more):
        """Create a task for the shell agent; returns its id."""
        return self.call("task.create", tasks=shell_task(script, **more), queue=queue)["tasks"][0]["id"]

    def wait(self, task_id, timeout_s=20):
        """The task once it has ended, is READY or asks something."""
        result = self.call("task.wait", ids=[task_id], timeout_s=timeout_s)
        assert not result["timed_out"], result["tasks"]
        return result["tasks"][0]

    def state(self, task_id):
        return self.call("task.get", id=task_id)["task"]["state"]

    def row(self, task_id):
        """The newest execution as the database has it (read beside the daemon)."""
        store = c.Store(str(self.data_dir / "claudomator.db"), readonly=True)
        try:
            return store.last_execution(store.get_task(task_id))
        finally:
            store.close()

    def started(self, task_id):
        """The newest execution once its agent has printed something."""
        def printed():
            found = self.row(task_id)
            path = self.data_dir / "executions" / found.id / "stdout.log" if found else None
            return found if path and path.exists() and path.stat().st_size else None
        return wait_until(printed, what="the agent's first output")

    def log(self):
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def memory_kb(self):
        """Resident memory of the daemon."""
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])

    def cli(self, *args, stdin=None, timeout=30, **env):
        """Run the command line against this daemon; returns the finished process with text output."""
        return subprocess.run([*COMMAND, *args], env={**self.env, **env}, input=stdin, capture_output=True, text=True,
                              timeout=timeout, encoding="utf-8", errors="surrogateescape",
                              **({} if stdin is not None else {"stdin": subprocess.DEVNULL}))

    def terminate(self):
        """SIGTERM, and wait for the end; returns the exit code."""
        if self._client:
            self._client.close()
        if self.process is None:
            return None
        self.process.terminate()
        return self.process.wait(20)

    def kill9(self):
        """SIGKILL: the daemon gets no chance to say goodbye."""
        self.client.close()
        self.process.kill()
        self.process.wait(10)

    def end_agents(self):
        """End what its agents left running, so that a test leaves no process behind."""
        root = self.data_dir / "executions"
        ids = [path.name for path in root.iterdir()] if root.is_dir() else []
        while c.signal_marked(ids, 9):
            time.sleep(0.02)

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        if self.process is not None and self.process.poll() is None:
            self.terminate()
        self.end_agents()


class AgentJob:
    """A repository, a data directory and an agent; a subclass writes the task file: ``write_task(scenario, ...)``."""

    def __init__(self, tmp_path, file_name, config_text, env):
        self.bare, self.copy = make_repository(tmp_path)
        self.head, self.task_file = self.git("rev-parse", "main"), tmp_path / file_name
        self.daemon = DaemonProcess(tmp_path, config_text, {"HOME": str(tmp_path / "home"), **env})

    def git(self, *args) -> str:
        done = subprocess.run(["git", "-C", self.bare, *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def run(self, *args, **more) -> tuple[int, dict, dict]:
        """(exit code, task, its last execution) of ``claudomator run FILE``."""
        done = self.daemon.cli("run", self.write_task(*args, **more), "--json", timeout=60)
        assert done.stdout, done.stderr
        task = c.parse_json(done.stdout)["tasks"][0]
        run = task["execution"]
        print(task["state"], run["reason"], run["detail"], done.stderr)  # shown where a test fails
        return done.returncode, task, run

    def submit(self, *args, **more) -> str:
        """Queue the task on the running daemon; returns its id."""
        return self.daemon.cli("ctl", "submit", self.write_task(*args, **more)).stdout.split()[0]

    def wait(self, task_id) -> dict:
        result = self.daemon.call("task.wait", ids=[task_id], timeout_s=60)
        assert not result["timed_out"], self.daemon.log()
        return result["tasks"][0]

    def runs(self, task_id) -> list[dict]:
        """The task's executions, oldest first."""
        return self.daemon.call("execution.list", id=task_id)["executions"][::-1]

    def subjects(self) -> list[str]:
        """What was pushed, oldest first."""
        return self.git("log", "--reverse", "--format=%s", f"{self.head}..main").splitlines()

    def wait_for_tool(self) -> pathlib.Path:
        """The sandbox, once the agent's tool has started in it."""
        sandboxes = self.daemon.data_dir / "sandboxes"
        return wait_until(lambda: next(sandboxes.glob("*/tool-started"), None), 30, "the tool's start").parent


def shell_task(script, name="task", **more):
    """A task document for the shell agent."""
    agent = {"type": "shell", "instructions": script, **more.pop("agent", {})}
    return {"name": name, "agent": agent, **more}


def make_repository(tmp_path):
    """(bare repository, working copy whose origin it is) with one commit on ``main``."""
    bare, copy = pathlib.Path(tmp_path) / "origin.git", pathlib.Path(tmp_path) / "copy"
    run = lambda *args: subprocess.run(["git", *args], check=True, capture_output=True, env=clean_environment(tmp_path))
    run("init", "-q", "--bare", "-b", "main", str(bare))
    run("init", "-q", "-b", "main", str(copy))
    (copy / "README.md").write_text("hello\n")
    run("-C", str(copy), "add", "-A")
    run("-C", str(copy), "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first")
    run("-C", str(copy), "remote", "add", "origin", str(bare))
    run("-C", str(copy), "push", "-q", "-u", "origin", "main")
    return bare, copy
