"""schemathesis against a real daemon: ``python3 -m tests.run_schemathesis [SEED]``, with the dependency group ``campaign``.

Requests made from ``/api/openapi.json``, right and wrong ones: examples, bounds, random values, chains of calls; all checks.
Exit code 0: nothing was found; 1: the findings are printed; 77: skipped, it is not installed.
"""
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

from tests.support import PROGRAM, DaemonProcess

SEED, SECONDS, SKIPPED = "26", 100, 77
READY, ASKING = "echo done", "printf '{\"text\": \"which?\"}' > \"$CLAUDOMATOR_QUESTION_FILE\""
OTHERS = ("echo no; exit 3", "sleep 600")
# No agent but the shell: the requests are about the interface.
CONFIG = 'claude_binary_path = "/bin/false"\ngemini_binary_path = "/bin/false"\n'
SETTINGS = """\
headers = {{ Authorization = "Bearer {token}" }}
hooks = "tests.schemathesis_hooks"
[checks]
positive_data_acceptance = {{ expected-statuses = ["2xx", "401", "403", "404", "409", "422", "426"] }}  # 422: see the hooks; 426: /api/ws
"""


def main(seed: str) -> int:
    """Run the campaign; returns its exit code."""
    if importlib.util.find_spec("schemathesis") is None:
        print("skipped: schemathesis is not installed; pip install '.[campaign]'")
        return SKIPPED
    with tempfile.TemporaryDirectory() as home, \
            DaemonProcess(home, CONFIG, {"CLAUDOMATOR_SERVER_ADDR": "127.0.0.1:0"}) as daemon:
        ids = {f"task.{name}": daemon.add(script) for name, script in (("accept", READY), ("reject", READY), ("answer", ASKING))}
        for task_id in ids.values():
            daemon.wait(task_id)
        for script in OTHERS:
            daemon.add(script)
        settings = pathlib.Path(home, "schemathesis.toml")
        settings.write_text(SETTINGS.format(token=(daemon.data_dir / "api-token").read_text().strip()) + "".join(
            f'[[operations]]\ninclude-operation-id = "{name}"\nparameters = {{ id = "{task_id}" }}\n' for name, task_id in ids.items()),
            encoding="utf-8")
        url = f"http://{daemon.http_address}/api/openapi.json"
        done = subprocess.run([
            sys.executable, "-m", "schemathesis.cli.__main__", "--config-file", str(settings), "run", url, "--checks", "all",
            "--phases", "examples,coverage,fuzzing,stateful", "--max-time", str(SECONDS), "--workers", "1", "--seed", seed,
            "--continue-on-failure", "--request-timeout", "10", "--generation-database", "none", "--no-color",
            "--exclude-path", "/api/ws"],  # what is asked there is WebSocket: tests/test_26_web_socket.py
            cwd=home, env={**os.environ, "PYTHONPATH": str(PROGRAM.parent)}, stdin=subprocess.DEVNULL, timeout=SECONDS + 200)
        alive = daemon.process.poll() is None
        faults = daemon.log().partition(" error: ")[2][:3000]
        print(f"seed {seed}; the daemon {'serves on' if alive else 'has ended'}; the first error in its log: {faults or 'none'}")
        return int(done.returncode != 0 or not alive or bool(faults))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [SEED]))
