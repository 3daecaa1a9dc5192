"""The agents' logs: parsed megabytes per second against ``cat > file``, and the memory that one 100 MB line takes."""
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import claudomator as c

RECORDED = pathlib.Path(__file__).resolve().parents[1] / "data"
DATA = RECORDED / "claude"
CODEX = {"text": "item.text if item.type=agent_message", "session": "thread_id", "done": "usage if type=turn.completed",
         "tokens_in": "usage.input_tokens", "tokens_cached": "usage.cached_input_tokens",
         "tokens_out": "usage.output_tokens", "error": "error.message if type=turn.failed"}
STREAMS = {"claude": c.ClaudeStream, "gemini": c.GeminiStream, "jsonl": lambda: c.JsonLinesStream(CODEX), "text": c.TextStream}
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


def outputs() -> list[bytes]:
    """What 400 tools printed, as it stands in a JSON string.  The sizes are drawn once: log-normal, median 3 KB, at
    most the 30 KB to which claude cuts a command's output."""
    rng = random.Random(1)
    sizes = [min(30_000, int(rng.lognormvariate(8, 1))) for _ in range(400)]
    return [b"".join(b"    line %d of a file that the agent reads\\n" % n for n in range(size // 44 + 1)) for size in sizes]


def recorded(agent: str) -> tuple[bytes, list[bytes], bytes, bytes, bytes]:
    """(first line, what the agent says and calls, the tool's result, the words in it that are the output, last line)."""
    if agent == "gemini":
        lines = (RECORDED / "gemini" / "x_bashfail.jsonl").read_bytes().splitlines(keepends=True)
        kinds = {c.parse_json(line)["type"]: line for line in lines}
        output = c.format_json(c.parse_json(kinds["tool_result"])["output"]).encode()
        said = next(line for line in lines if b'"role":"assistant"' in line)
        return kinds["init"], [said, kinds["tool_use"]], kinds["tool_result"], output, kinds["result"]
    if agent == "jsonl":
        lines = (RECORDED / "codex" / "codex_ok.jsonl").read_bytes().splitlines(keepends=True)
        done = next(line for line in lines if b'"item.completed"' in line and b'"command_execution"' in line)
        begun = next(line for line in lines if b'"item.started"' in line)
        said = next(line for line in lines if b'"agent_message"' in line)
        output = c.format_json(c.parse_json(done)["item"]["aggregated_output"]).encode()
        return lines[0], [said, begun], done, output, lines[-1]
    lines = (DATA / "a_text.jsonl").read_bytes().splitlines(keepends=True)
    use, result = (DATA / "b_question_file.jsonl").read_bytes().splitlines(keepends=True)[2:4]
    assert b'"tool_use"' in use and b'"tool_result"' in result
    return lines[0], [lines[1], use], result, b'"wrote /workspace/q/question.json"', lines[-1]


def make_log(path: str, megabytes: int, agent: str = "claude") -> None:
    """One long run of an agent that reads and edits files: recorded lines, with tool results of 1 to 30 KB in them.

    The recorded runs are of a model that says little; a real one's tool results make up most of the log.
    """
    if agent == "text":  # a script that prints what claude's tools do
        first, last = b"begin\n", b"## Summary\nall of it was read\n"
        block = b"".join(outputs()).replace(b"\\n", b"\n")
    else:
        first, said, result, shown, last = recorded(agent)
        assert shown in result
        block = b"".join(line for output in outputs() for line in (*said, result.replace(shown, b'"%s"' % output, 1)))
    with open(path, "wb") as file:
        file.write(first)
        for _ in range(megabytes * (1 << 20) // len(block) + 1):
            file.write(block)
        file.write(last)


def parse(path: str, agent: str) -> None:
    """Read the whole log as the pool does."""
    log = c.LogReader(path, STREAMS[agent]())
    while log.read_more()[0]:
        pass
    log.finish()
    facts = log.stream.facts()
    assert facts.result_seen or agent == "text" and "all of it was read" in facts.final_text


def speed(root: str, agent: str) -> dict:
    """The row of one agent's format."""
    path = f"{root}/stdout.log"
    make_log(path, 100, agent)
    parsed, copied = [], []
    for _ in range(5):
        start = time.perf_counter()
        parse(path, agent)
        parsed.append(time.perf_counter() - start)
        start = time.perf_counter()
        with open(f"{root}/copy", "wb") as copy:
            subprocess.run(["cat", path], stdout=copy, check=True)
        copied.append(time.perf_counter() - start)
        os.unlink(f"{root}/copy")
    ratio = statistics.median(copied) / statistics.median(parsed)
    return {"metric": f"parsed log stream, {agent}", "ratio": ratio, "unit": "of cat's speed", "target": ">= 0.35",
            "ok": ratio >= 0.35, "peer": "cat > file"}


def run() -> list[dict]:
    """A row for each format, and the long line's."""
    with tempfile.TemporaryDirectory() as root:
        rows = [speed(root, agent) for agent in STREAMS]
        with open(f"{root}/long.log", "wb") as file:
            file.write(b'{"type":"result","result":"' + b"x" * 50_000_000 + b"\\n" * 25_000_000
                       + b'","is_error":false,"subtype":"success","total_cost_usd":0.5}\n')
        with open(f"{root}/long.log.small", "wb") as file:
            file.write((DATA / "a_text.jsonl").read_bytes())
        done = subprocess.run([sys.executable, "-I", "-S", "-c", LONG_LINE, os.path.dirname(c.__file__), f"{root}/long.log"],
                              capture_output=True, text=True, check=True)
        extra_mb = float(done.stdout)
    return [*rows,
            {"metric": "one 100 MB line, extra memory", "ratio": extra_mb, "unit": "MB", "target": "<= 8", "ok": extra_mb <= 8,
             "peer": "readline + json.loads: +200 MB"}]
