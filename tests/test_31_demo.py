"""Section 31: the demo, on a bare interpreter, in a pipe and on a terminal; three at once, as nothing is shared."""
import json
import os
import pathlib
import pty
import subprocess
import sys
import time

import pytest

import claudomator as c
from tests.support import PROGRAM, clean_environment


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """{kind: (exit code, stdout, stderr, what is left in its temporary directory)}"""
    started, runs = time.monotonic(), {}
    for kind, options in (("bare", ["--json"]), ("plain", []), ("terminal", ["--color=always"])):
        home = tmp_path_factory.mktemp(kind)
        env = clean_environment(home, TMPDIR=str(home), COLUMNS="90")
        del env["PYTHONPATH"]
        terminal, stdout = pty.openpty() if kind == "terminal" else (None, subprocess.PIPE)
        process = subprocess.Popen([sys.executable, "-I", "-S", str(PROGRAM), "demo", *options], env=env, stdin=subprocess.DEVNULL,
                                   stdout=stdout, stderr=subprocess.PIPE)
        if terminal is not None:
            os.close(stdout)
        runs[kind] = process, terminal, home
    results = {}
    for kind, (process, terminal, home) in runs.items():
        shown = b""
        if terminal is not None:
            try:
                while piece := os.read(terminal, 1 << 16):
                    shown += piece
            except OSError:  # EIO: the program has closed its side
                pass
            os.close(terminal)
        out, err = process.communicate(timeout=60)
        results[kind] = process.returncode, (shown or out).decode(), err.decode(), list(pathlib.Path(home).iterdir())
    assert time.monotonic() - started < 60
    return results


ENDS = [("fix the mean", c.COMPLETED), ("write a README", c.COMPLETED), ("choose a licence", c.COMPLETED),
        ("add a median", c.COMPLETED), ("watch paint dry", c.CANCELLED)]


def test_demo_needs_no_package_and_gives_one_document(demos):
    code, out, err, left = demos["bare"]
    assert (code, err, left) == (0, "", [])
    document = json.loads(out)
    assert [(task["name"], task["state"]) for task in document["tasks"]] == ENDS
    assert len(document["log"]) == 6 and "feat: median (round 2)" in "\n".join(document["log"])


def test_demo_in_a_pipe_tells_what_happens_as_it_happens(demos):
    code, out, err, left = demos["plain"]
    assert (code, left) == (0, []) and "Traceback" not in err and "\x1b" not in out + err
    for words in ("QUEUED → RUNNING", "asks: Which licence shall it have?", "answered: MIT", "RUNNING → QUEUED (verify_failed)",
                  "RUNNING → COMPLETED", "RUNNING → CANCELLED", "pushed"):
        assert words in err, words
    assert out.count("COMPLETED") == 4 and "MIT licence" in out and "Next: claudomator init" in out


def test_demo_on_a_terminal_redraws_the_status_table(demos):
    code, out, err, left = demos["terminal"]
    assert (code, left) == (0, []) and "RUNNING → " not in err
    assert out.count("\x1b[J") > 5 and "asks: Which licence" in out and "Next: claudomator init" in out
    table = out.split("\x1b[J")[3]
    assert all(c.text_width(c.safe_text(line)) <= 90 for line in table.splitlines())


def test_demo_without_git_says_what_to_install(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAM), "demo"], env={**clean_environment(tmp_path), "PATH": "/nowhere"}, capture_output=True,
                          text=True)
    assert done.returncode == 3 and "apt-get install git" in done.stderr
