"""What the installed program costs against bare python: a ``ctl list``, the daemon's start, its idle memory and wakeups.

The program is installed by pip, not editable, into a virtual environment, so that it runs as a user's does: the module
from .pyc, by the script that pip writes.  An old pip writes one that imports ``re``, 10 ms that are not ours; it is
replaced by that of pip 25.1 and later.
"""
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import claudomator as c
from tests.support import clean_environment, shell_task, wait_until

ROOT = pathlib.Path(c.__file__).resolve().parent
ROUNDS, IDLE_S = 25, 10.0


def install(home: str) -> str:
    """Install the project into a fresh virtual environment; returns its ``bin``."""
    subprocess.run([sys.executable, "-m", "venv", f"{home}/venv"], check=True, capture_output=True)
    source = f"{home}/source"  # pip leaves build/ and an egg-info behind where it builds
    os.makedirs(source)
    for name in ("claudomator.py", "ct.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            (pathlib.Path(source) / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([f"{home}/venv/bin/pip", "install", "-q", "--no-deps", source], check=True, capture_output=True)
    script = pathlib.Path(f"{home}/venv/bin/claudomator")
    script.write_text(f"#!{home}/venv/bin/python\nimport sys\nfrom claudomator import main\nif __name__ == '__main__':\n"
                      "    sys.argv[0] = sys.argv[0].removesuffix('.exe')\n    sys.exit(main())\n")
    return f"{home}/venv/bin"


def seconds(argv: list, env: dict) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(argv, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


class IdleDaemon:
    """The installed daemon, started on a data directory."""

    def __init__(self, binaries: str, data_dir: str, env: dict):
        self.socket_path = f"{data_dir}/claudomator.sock"
        start = time.perf_counter()
        self.process = subprocess.Popen([f"{binaries}/claudomator", "serve", "--data-dir", data_dir], env=env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = c.ControlClient(self.socket_path)
        while True:
            try:
                client.connect()
                break
            except c.Unreachable:
                time.sleep(0.0005)
        self.listening_s = time.perf_counter() - start
        client.call("daemon.status")
        client.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def pss_kb(pid: int) -> int:
    """Proportional memory of a process."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0])


def wakeups(pid: int) -> int:
    """How often the threads of a process have gone to sleep so far."""
    return sum(int(path.read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0])
               for path in pathlib.Path(f"/proc/{pid}/task").glob("*/status"))


def bare_pss_kb(python: list, env: dict) -> int:
    """The same for an interpreter that does nothing."""
    process = subprocess.Popen([*python, "-c", "input()"], env=env, stdin=subprocess.PIPE)
    wait_until(lambda: b"pipe" in pathlib.Path(f"/proc/{process.pid}/wchan").read_bytes()
               or pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S")
    found = pss_kb(process.pid)
    process.communicate(b"\n")
    return found


def row(metric: str, ratio: float, unit: str, target: str, ok: bool, peer: str) -> dict:
    return dict(metric=metric, ratio=ratio, unit=unit, target=target, ok=ok, peer=peer)


def run() -> list[dict]:
    """The rows; the timed cases take turns, and the medians are compared."""
    with tempfile.TemporaryDirectory() as home:
        binaries, env = install(home), clean_environment(home, CLAUDOMATOR_SERVER_ADDR="127.0.0.1:0")
        del env["PYTHONPATH"]
        python = [os.path.realpath(f"{binaries}/python"), "-I", "-S"]
        daemon = IdleDaemon(binaries, f"{home}/data", env)
        client = c.ControlClient(daemon.socket_path)
        client.call("task.create", tasks={"tasks": [shell_task("true", f"task {n}") for n in range(10)]})
        client.close()
        listing = [f"{binaries}/claudomator", "ctl", "list", "--data-dir", f"{home}/data"]
        IdleDaemon(binaries, f"{home}/again", env).stop()
        cases = list(zip(*((seconds([*python, "-c", "pass"], env), seconds(listing, env), starting(binaries, f"{home}/again", env))
                           for _ in range(ROUNDS))))
        bare, listed, started = map(statistics.median, cases)
        memory, bare_memory = pss_kb(daemon.process.pid), bare_pss_kb(python, env)
        before = wakeups(daemon.process.pid)
        time.sleep(IDLE_S)
        woken = wakeups(daemon.process.pid) - before
        daemon.stop()
    return [
        row("installed `claudomator ctl list`, wall (module from .pyc)", listed / bare, "x bare python", "<= 3", listed / bare <= 3,
            f"{bare * 1e3:.1f} ms; here {listed * 1e3:.1f} ms"),
        row("daemon start to listening, own code from .pyc", started / bare, "x bare python", "<= 7", started / bare <= 7,
            f"{bare * 1e3:.1f} ms; here {started * 1e3:.1f} ms"),
        row("idle memory (PSS)", memory / bare_memory, "x bare python", "<= 4.5", memory / bare_memory <= 4.5,
            f"{bare_memory} KB; here {memory} KB"),
        row("idle wakeups in 10 s", woken, "wakeups", "0", woken == 0, "redis 100, supervisord 10")]


def starting(binaries: str, data_dir: str, env: dict) -> float:
    """Seconds from the start of a daemon to the first connection."""
    daemon = IdleDaemon(binaries, data_dir, env)
    daemon.stop()
    return daemon.listening_s


if __name__ == "__main__":
    for result in run():
        print(result)
