"""100,000 queued tasks that wait for one another: what the scheduler costs per task, and whether that grows.

One task's life here: added with its dependencies, freed by the last of them, planned, discarded, settled.  Nothing is
stored and no agent runs.  The peer is the least that Python can do for the same graph: a dict of counters and a heap,
without lanes, bounds, kinds or changes of mind.
"""
import heapq
import random
import statistics
import time

import claudomator as c

SLOTS = 64  # the ends of one tick of the event loop are settled together
TASKS, FEWER, ROUNDS = 100_000, 10_000, 3


def graph(size: int) -> list[dict[str, str]]:
    """For each task up to three dependencies among the fifty before it."""
    rng = random.Random(6)
    return [{f"t{rng.randrange(max(0, at - 50), at)}": "success" for _ in range(rng.randrange(4) if at else 0)}
            for at in range(size)]


def scheduler_us(size: int) -> float:
    """Microseconds a task through ``Queue`` and ``plan``."""
    waits, kinds = graph(size), ("claude", "gemini", "")
    queue, limits, running = c.Queue(), c.Limits(SLOTS, available_kinds=("claude", "gemini")), c.Running()
    began, ended = time.perf_counter(), 0
    for number in range(size):
        queue.add(f"t{number}", kind=kinds[number % 3], project="", rank=number % 3, seq=number,
                  waits_for=waits[number])
    while starts := c.plan(queue, running, limits, 0.0).starts:
        for start in starts:
            queue.discard(start.task_id)
        for start in starts:
            queue.settle(start.task_id, c.COMPLETED)
        ended += len(starts)
    assert ended == size and not len(queue)
    return (time.perf_counter() - began) / size * 1e6


def counters_us(size: int) -> float:
    """The same graph by counters and one heap."""
    waits = graph(size)
    began, ended = time.perf_counter(), 0
    open_count, waiters, ready, keys = {}, {}, [], {}
    for number in range(size):
        name = f"t{number}"
        open_count[name], keys[name] = len(waits[number]), (number % 3, number, name)
        for dependency in waits[number]:
            waiters.setdefault(dependency, []).append(name)
        if not waits[number]:
            heapq.heappush(ready, keys[name])
    while ready:
        *_, name = heapq.heappop(ready)
        ended += 1
        for waiter in waiters.pop(name, ()):
            open_count[waiter] -= 1
            if not open_count[waiter]:
                heapq.heappush(ready, keys[waiter])
    assert ended == size
    return (time.perf_counter() - began) / size * 1e6


def run() -> list[dict]:
    """Both rows; the cases are interleaved and the medians taken.

    The target of 10 us was set where the best technique, which is the peer, took 2 us: five times the peer.
    """
    times = [(scheduler_us(TASKS), scheduler_us(FEWER), counters_us(TASKS)) for _ in range(ROUNDS)]
    many, few, least = (statistics.median(column) for column in zip(*times))
    return [{"metric": "100,000 queued tasks with dependencies, per task", "ratio": many / least, "unit": "x the peer",
             "target": "<= 5 (10 us where the peer takes 2)", "ok": many / least <= 5,
             "peer": f"bare counters and a heap; here {many:.1f} us against {least:.1f} us"},
            {"metric": "100,000 queued tasks with dependencies, flat", "ratio": many / few, "unit": "x 10,000 tasks",
             "target": "<= 1.5", "ok": many / few <= 1.5, "peer": "naive stdlib, x 10"}]


if __name__ == "__main__":
    for row in run():
        print(f"{row['metric']}: {row['ratio']:.2f} {row['unit']} (target {row['target']}; {row['peer']})")
