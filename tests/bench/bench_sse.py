"""A model server's stream: megabytes of events read per second against ``cat``, and the memory that 100 MB take."""
import os
import statistics
import subprocess
import sys
import tempfile
import time

import claudomator as c
from tests.fakes import chat_server

MEGABYTES = 100
READ = r"""
import sys, time
sys.path.insert(0, sys.argv[1])
import claudomator as c
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
reader = c.ChatReader()
with open(sys.argv[2], "rb", buffering=0) as file:
    for _ in range(16):
        reader.feed(file.read(c.ANSWER_BLOCK))
    before, start = peak(), time.perf_counter()
    while data := file.read(c.ANSWER_BLOCK):
        reader.feed(data)
    reader.finish()
assert reader.fault is None and reader.tokens_out == 7
print(time.perf_counter() - start, (peak() - before) / 1024)
"""


def make_stream(path: str) -> None:
    """Chunks as llama.cpp sends them, 240 bytes for a word or two, to the end with its usage."""
    block = b"".join(chat_server.chunk(f" word{at % 97}", created=1795211447, system_fingerprint="b0-unknown",
                                       id="chatcmpl-snBG9hmZy3qPS4BQfQVzJ4lsiNR2ikYY") for at in range(4000))
    with open(path, "wb") as file:
        for _ in range(MEGABYTES * (1 << 20) // len(block) + 1):
            file.write(block)
        file.write(chat_server.END + chat_server.DONE)


def run() -> list[dict]:
    """Both rows."""
    with tempfile.TemporaryDirectory() as root:
        path, read, copied, extra_mb = f"{root}/stream", [], [], []
        make_stream(path)
        for _ in range(3):
            done = subprocess.run([sys.executable, "-I", "-S", "-c", READ, os.path.dirname(c.__file__), path],
                                  capture_output=True, text=True, check=True)
            took, extra = map(float, done.stdout.split())
            read.append(took)
            extra_mb.append(extra)
            start = time.perf_counter()
            with open(f"{root}/copy", "wb") as copy:
                subprocess.run(["cat", path], stdout=copy, check=True)
            copied.append(time.perf_counter() - start)
        ratio = statistics.median(copied) / statistics.median(read)
        speed = os.path.getsize(path) / 1e6 / statistics.median(read)
    return [{"metric": f"chat stream ({speed:.0f} MB/s)", "ratio": ratio, "unit": "of cat's speed",
             "target": ">= 0.02", "ok": ratio >= 0.02, "peer": "cat > file"},
            {"metric": "100 MB of chat stream, extra memory", "ratio": max(extra_mb), "unit": "MB", "target": "<= 32",
             "ok": max(extra_mb) <= 32, "peer": "the text alone: 3 MB"}]
