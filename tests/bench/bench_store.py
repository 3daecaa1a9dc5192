"""What a large database costs: claiming, listing and starting with a million tasks, against ten thousand or none.

The base of each ratio is the same work on the small database, in turn with the large one in the same run.  The large one
is made by bulk INSERTs into the real schema, with an execution for each task.
"""
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time

import claudomator as c
from tests.support import COMMAND, clean_environment

LARGE, SMALL = 1_000_000, 10_000
TARGET = 1.5

TASKS = """INSERT INTO tasks (id, name, config_json, retry_json, timeout_ns, priority, state, created_at, updated_at, seq,
                              execution_id)
SELECT (10000000 + i) || '-0000-4000-8000-000000000000', 'task ' || i, '{"type":"shell","instructions":"make test"}',
       '{"max_attempts":1,"backoff":"exponential"}', 900000000000,
       CASE i % 4 WHEN 0 THEN 'high' WHEN 1 THEN 'low' ELSE 'normal' END,
       CASE i % 5 WHEN 0 THEN 'FAILED' WHEN 1 THEN 'CANCELLED' ELSE 'COMPLETED' END,
       '2026-05-13 04:02:20.123456+00:00', '2026-05-13 04:02:20.123456+00:00', i,
       (10000000 + i) || '-0000-4000-9000-000000000000' FROM n"""
EXECUTIONS = """INSERT INTO executions (id, task_id, status, start_time, end_time, agent, seq)
SELECT (10000000 + i) || '-0000-4000-9000-000000000000', (10000000 + i) || '-0000-4000-8000-000000000000',
       CASE i % 5 WHEN 0 THEN 'FAILED' WHEN 1 THEN 'CANCELLED' ELSE 'COMPLETED' END, '2026-05-13 04:02:20.123456+00:00',
       '2026-05-13 04:02:21.123456+00:00', 'shell', i FROM n"""


def make_database(path: str, count: int) -> None:
    """``count`` finished tasks with an execution each; indexes are made last, which is faster."""
    c.Store(path).close()
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("synchronous = OFF", "journal_mode = OFF", "cache_size = -400000", "temp_store = MEMORY",
                   "threads = 2"):
        db.execute(f"PRAGMA {pragma}")
    db.execute("BEGIN")
    made = db.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL AND type IN ('index', 'trigger')")
    for kind, name in made.fetchall():
        db.execute(f"DROP {kind} {name}")
    for insert in (TASKS, EXECUTIONS) if count else ():
        db.execute(f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) {insert}")
    for statement in (*c.INDEXES, *c.TRIGGERS):
        db.execute(statement)
    db.execute("INSERT INTO state_counts SELECT state, count(*) FROM tasks GROUP BY state")
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")
    db.close()


def queue_some(path: str) -> None:
    """Every fiftieth task becomes QUEUED."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("UPDATE tasks SET state = 'QUEUED' WHERE seq % 50 = 0")
    db.close()


def start_s(home: str) -> float:
    """Seconds from the spawn of a daemon to its first accepted connection."""
    data_dir = os.path.join(home, "data")
    env = clean_environment(home, CLAUDOMATOR_DATA_DIR=data_dir)
    began = time.perf_counter()
    with open(os.path.join(home, "daemon.log"), "ab") as log:
        process = subprocess.Popen([*COMMAND, "serve"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(os.path.join(data_dir, "claudomator.sock"))
                    return time.perf_counter() - began
                except OSError:
                    assert process.poll() is None, "the daemon ended; see its log"
                    time.sleep(0.0005)
    finally:
        process.terminate()
        process.wait(20)


def claim_s(store: c.Store, life: c.Lifecycle) -> float:
    """Seconds to find the next task and to claim it: one page of one, then a transaction, committed and not synced."""
    began = time.perf_counter()
    task, = store.queued_page(limit=1)
    life.claim(task, "shell", "", 900.0, "")
    return time.perf_counter() - began


def newest_s(store: c.Store) -> float:
    """Seconds for the newest 50 FAILED tasks."""
    began = time.perf_counter()
    assert len(store.list_tasks(states=(c.FAILED,), limit=50)) == 50
    return time.perf_counter() - began


def in_turn(rounds: int, large, small) -> tuple[float, float]:
    """The medians of two measurements that are taken in turn."""
    pairs = [(large(), small()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def run() -> list[dict]:
    """The rows of the table in PERFORMANCE.md that are about the store."""
    homes = {name: tempfile.mkdtemp(prefix=f"claudomator-bench-{name}-") for name in ("large", "small", "none")}
    path = {name: os.path.join(home, "data", "claudomator.db") for name, home in homes.items()}
    rows = []

    def row(metric: str, figures: tuple[float, float], unit: str, peer: str) -> None:
        ratio = figures[0] / figures[1]
        rows.append({"metric": metric, "ratio": ratio, "unit": f"x ({figures[0] * 1e3:.3g} against {figures[1] * 1e3:.3g}"
                     f" {unit})", "target": f"<= {TARGET}", "ok": ratio <= TARGET, "peer": peer})

    try:
        for name, count in (("large", LARGE), ("small", SMALL), ("none", 0)):
            os.mkdir(os.path.dirname(path[name]), 0o700)
            make_database(path[name], count)
        for name in ("large", "none"):
            start_s(homes[name])  # the first start compiles the module
        row("start with 1M finished tasks against none", in_turn(
            15, lambda: start_s(homes["large"]), lambda: start_s(homes["none"])), "ms", "naive: + 1.9 s, 514 MB")
        stores = {name: c.Store(path[name]) for name in ("large", "small") if not queue_some(path[name])}
        lives = {name: c.Lifecycle(store) for name, store in stores.items()}
        in_turn(20, lambda: claim_s(stores["large"], lives["large"]), lambda: claim_s(stores["small"], lives["small"]))
        row("claim next, 1M rows against 10k", in_turn(
            150, lambda: claim_s(stores["large"], lives["large"]), lambda: claim_s(stores["small"], lives["small"])), "ms",
            "naive: x 1000")
        row("newest 50 of a state, 1M rows against 10k", in_turn(
            200, lambda: newest_s(stores["large"]), lambda: newest_s(stores["small"])), "ms", "naive: x 100")
        for store in stores.values():
            store.close()
    finally:
        for home in homes.values():
            shutil.rmtree(home)
    return rows


if __name__ == "__main__":
    sys.exit("run it as: python3 -m tests.bench bench_store")
