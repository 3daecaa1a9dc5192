"""The agent log: parsed megabytes per second against ``cat > file``, and the memory that one 100 MB line takes."""
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import claudomator as c

DATA = pathlib.Path(__file__).resolve().parents[1] / "data" / "claude"
LONG_LINE = r"""
import os, sys
sys.path.insert(0, sys.argv[1])
import claudomator as c
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
warm = c.LogReader(sys.argv[2] + ".small", c.ClaudeStream())
while warm.read_more()[0]: pass
before = peak()
log = c.LogReader(sys.argv[2], c.ClaudeStream())
while log.read_more()[0]: pass
log.finish()
facts = log.stream.facts()
assert facts.result_seen and not facts.is_error and facts.cost_usd == 0.5, facts
print((peak() - before) / 1024)
"""


def make_log(path: str, megabytes: int) -> None:
    """One long run of an agent that reads and edits files: recorded lines, with tool results of 1 to 30 KB in them.

    The recorded runs are of a model that says little; a real one's tool results make up most of the log.  Their sizes
    are drawn once (log-normal, median 3 KB, at most the 30 KB to which claude cuts a command's output).
    """
    rng = random.Random(1)
    lines = (DATA / "a_text.jsonl").read_bytes().splitlines(keepends=True)
    text = lines[1]
    use, result = (DATA / "b_question_file.jsonl").read_bytes().splitlines(keepends=True)[2:4]
    assert b'"tool_use"' in use and b'"tool_result"' in result
    shown = b'"content":"wrote /workspace/q/question.json"'
    assert shown in result
    talk = []
    for _ in range(400):
        size = min(30_000, int(rng.lognormvariate(8, 1)))
        output = b"".join(b"    line %d of a file that the agent reads\\n" % n for n in range(size // 44 + 1))
        talk += [text, use, result.replace(shown, b'"content":"' + output + b'"')]
    block = b"".join(talk)
    with open(path, "wb") as file:
        file.write(lines[0])
        for _ in range(megabytes * (1 << 20) // len(block) + 1):
            file.write(block)
        file.write(lines[-1])


def parse(path: str) -> None:
    """Read the whole log as the pool does."""
    log = c.LogReader(path, c.ClaudeStream())
    while log.read_more()[0]:
        pass
    log.finish()
    assert log.stream.facts().result_seen


def run() -> list[dict]:
    """Both rows."""
    with tempfile.TemporaryDirectory() as root:
        path = f"{root}/stdout.log"
        make_log(path, 100)
        parsed, copied = [], []
        for _ in range(5):
            start = time.perf_counter()
            parse(path)
            parsed.append(time.perf_counter() - start)
            start = time.perf_counter()
            with open(f"{root}/copy", "wb") as copy:
                subprocess.run(["cat", path], stdout=copy, check=True)
            copied.append(time.perf_counter() - start)
            os.unlink(f"{root}/copy")
        ratio = statistics.median(copied) / statistics.median(parsed)
        with open(f"{root}/long.log", "wb") as file:
            file.write(b'{"type":"result","result":"' + b"x" * 50_000_000 + b"\\n" * 25_000_000
                       + b'","is_error":false,"subtype":"success","total_cost_usd":0.5}\n')
        with open(f"{root}/long.log.small", "wb") as file:
            file.write((DATA / "a_text.jsonl").read_bytes())
        done = subprocess.run([sys.executable, "-I", "-S", "-c", LONG_LINE, os.path.dirname(c.__file__), f"{root}/long.log"],
                              capture_output=True, text=True, check=True)
        extra_mb = float(done.stdout)
    return [{"metric": "parsed log stream", "ratio": ratio, "unit": "of cat's speed", "target": ">= 0.35", "ok": ratio >= 0.35,
             "peer": "cat > file"},
            {"metric": "one 100 MB line, extra memory", "ratio": extra_mb, "unit": "MB", "target": "<= 8", "ok": extra_mb <= 8,
             "peer": "readline + json.loads: +200 MB"}]
