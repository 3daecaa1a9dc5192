"""``ct task list`` against bare python, as an agent calls it: ``<data_dir>/bin/ct``, and ct.py itself; curl is the peer.

The server is a loop that answers a stored list of twenty tasks, on the Unix socket that a sandbox has.
"""
import json
import multiprocessing
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import claudomator as c

ROUNDS, TARGET = 60, 1.5


def serve(path: str) -> None:
    """Answer every request with the same list."""
    task = {"state": "COMPLETED", "agent": {"type": "claude", "model": "sonnet", "instructions": "Fix it. " * 40}}
    tasks = [{"id": f"{number:08}-0000-4000-8000-000000000000", "name": f"task {number}", **task} for number in range(20)]
    body = json.dumps({"tasks": tasks, "next": None}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    while True:
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)


def seconds(argv: list, env: dict) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(argv, env=env, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run() -> list[dict]:
    """The rows; the cases take turns, and the medians are compared."""
    with tempfile.TemporaryDirectory() as home:
        path, python = f"{home}/agent.sock", [os.path.realpath(sys.executable), "-I", "-S"]
        server = multiprocessing.get_context("fork").Process(target=serve, args=(path,), daemon=True)
        server.start()
        while not os.path.exists(path):
            time.sleep(0.01)
        config = c.parse_config_text(f'data_dir = "{home}"', "config.toml", home)
        os.waitpid(c.compile_ct(c.install_ct(config, print), print), 0)
        env = {"PATH": os.environ["PATH"], "CLAUDOMATOR_API_URL": f"unix://{path}", "CLAUDOMATOR_API_TOKEN": "x"}
        script = str(pathlib.Path(c.__file__).with_name("ct.py"))
        cases = {"bare": [*python, "-c", "pass"], "ct": [f"{config.tools_dir}/ct", "task", "list"],
                 "ct.py": [*python, script, "task", "list"]}
        if shutil.which("curl"):
            cases["curl"] = ["curl", "-s", "--unix-socket", path, "http://localhost/api/tasks"]
        taken: dict[str, list] = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name, argv in cases.items():
                taken[name].append(seconds(argv, env))
        server.terminate()
        server.join()
    middle = {name: statistics.median(each) for name, each in taken.items()}
    peer = f"bare python {middle['bare'] * 1e3:.1f} ms" + (
        f", curl {middle['curl'] / middle['bare']:.2f} x" if "curl" in middle else "")
    ratio, direct = (middle[name] / middle["bare"] for name in ("ct", "ct.py"))
    return [dict(metric="`ct task list`, wall, as agents have it", ratio=ratio, unit="x bare python", target=f"<= {TARGET}",
                 ok=ratio <= TARGET, peer=peer),
            dict(metric="ct.py itself, compiled at each call", ratio=direct, unit="x bare python", target="none", ok=None,
                 peer=peer)]


if __name__ == "__main__":
    for row in run():
        print(row)
