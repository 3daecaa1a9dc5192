"""Durable dispatch of no-op agents against a loop that only spawns the same supervisor, and a supervisor's memory."""
import asyncio
import os
import statistics
import sys
import tempfile
import time

import claudomator as c

TASKS, AT_ONCE, AGENTS = 300, 8, 24


async def bare_loop(root: str, count: int) -> float:
    """Seconds per no-op agent of a loop with the supervisor and nothing else, ``AT_ONCE`` at a time."""
    waiting = list(range(count))

    async def worker() -> None:
        while waiting:
            directory = f"{root}/bare-{waiting.pop()}"
            os.makedirs(directory)
            script = os.path.join(directory, "prompt.txt")
            c.write_private(script, "exit 0")  # the very agent that the daemon's tasks run
            supervisor = c.spawn_supervisor(directory, "bench", ["/bin/sh", script], env={"PATH": "/usr/bin:/bin"},
                                            cwd="/", stdin_path="/dev/null", timeout_s=60)
            supervisor.open_gate()
            await c.wait_for_exit(supervisor.pid, supervisor.start)
    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return (time.perf_counter() - start) / count


async def through_the_daemon(root: str, count: int) -> float:
    """Seconds per no-op shell task from QUEUED to COMPLETED, everything durable; it works where it is told to, as the bare
    loop's agents do."""
    config = c.parse_config({"data_dir": root, "max_concurrent": AT_ONCE, "server_addr": ""}, "bench", root)
    daemon = c.Daemon(config, None, lambda level, message: None)
    await daemon.start()
    agent = c.AgentConfig(type="shell", instructions="exit 0", project_dir="/", isolation="none")
    specs = [c.TaskSpec(name=f"task {n}", auto_accept=True, agent=agent) for n in range(count)]
    start = time.perf_counter()
    tasks = daemon.core.life.create(specs, queue=True, config=config, kinds=daemon.core.kinds)
    wait = c.OPERATIONS["task.wait"]
    await wait.handler(daemon.core, c.check_params(wait, {"ids": [task.id for task in tasks]}))
    elapsed = time.perf_counter() - start
    assert daemon.core.store.counts() == {"COMPLETED": count}, daemon.core.store.counts()
    await daemon.close()
    return elapsed / count


def proportional_kb(pid: int) -> int:
    """PSS of a process in KiB."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def supervisor_memory(root: str) -> float:
    """MB of PSS that supervising one sleeping agent takes: everything of its session but the agent itself."""
    supervisors = []
    for number in range(AGENTS):
        os.makedirs(f"{root}/memory-{number}")
        supervisor = c.spawn_supervisor(f"{root}/memory-{number}", f"bench-memory-{number}", ["/bin/sleep", "30"],
                                        env={"PATH": "/usr/bin:/bin"}, cwd="/", stdin_path="/dev/null", timeout_s=60)
        supervisor.open_gate()
        supervisors.append(supervisor.pid)
    time.sleep(1)
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    command = file.read().split(b"\0")
                if os.getsid(int(name)) in supervisors and command[0] != b"/bin/sleep":
                    total += proportional_kb(int(name))
            except OSError:
                continue
    asyncio.run(c.sweep([f"bench-memory-{number}" for number in range(AGENTS)]))
    for pid in supervisors:
        os.waitpid(pid, 0)
    return total / 1024 / AGENTS


def run() -> list[dict]:
    """Both rows.  The two loops take turns, and the median of the turns' ratios counts: the speed of a shared machine drifts."""
    ratios = []
    with tempfile.TemporaryDirectory() as root:
        for turn in range(int(os.environ.get("TURNS", "9"))):
            bare = asyncio.run(bare_loop(f"{root}/{turn}", TASKS))
            ratios.append(bare / asyncio.run(through_the_daemon(f"{root}/data{turn}", TASKS)))
        memory = supervisor_memory(root)
    ratio = statistics.median(ratios)
    return [{"metric": "durable dispatch of a no-op agent", "ratio": ratio, "unit": "of the bare loop's rate", "target": ">= 0.6",
             "ok": ratio >= 0.6, "peer": f"posix_spawn loop with the same supervisor, {AT_ONCE} at once, no store"},
            {"metric": "supervisor's memory per running agent (PSS)", "ratio": memory, "unit": "MB", "target": "<= 0.3",
             "ok": memory <= 0.3, "peer": "tmux pane: about 3 MB"}]


if __name__ == "__main__":
    sys.exit(print(run()))
