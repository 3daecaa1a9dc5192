"""WebSocket fan-out to 100 clients against ``websockets.broadcast``, and the memory that 20 clients take which never read.

Both servers run in one process of their own kind and send the same events to clients that read in another process; a
round ends when the clients have all.  Counted is the server's CPU time, which is what fan-out costs the daemon.  Memory is
that of the process; what importing has left free in it (a MB or two) is used first.
"""
import asyncio
import json
import multiprocessing
import os
import select
import statistics
import tempfile
import time

import claudomator as c
from tests import ws_echo
from tests.ws_client import Client, LiveClient

try:
    from websockets.asyncio.server import broadcast, serve
except ImportError:
    broadcast = serve = None

CLIENTS, ROUNDS, EVENTS, TICK = 100, 15, 60, 20
NEVER_READ, FLOOD = 20, 40_000
EVENT = json.dumps({"seq": 123456, "time": "2026-01-01T00:00:00Z", "kind": "task.state", "task_id": "0b9f2c74a1d5",
                    "payload": {"from": "RUNNING", "to": "COMPLETED", "reason": None}})
MOVE = {"from": "RUNNING", "to": "COMPLETED", "name": "a task"}


def read_all(address, control, token="") -> None:
    """Be 100 clients; for each number that comes, read that many bytes with each and say so.  With ``token`` they are
    clients of the daemon, who hear first where they stand."""
    clients = [LiveClient(address, token) if token else Client(address) for _ in range(CLIENTS)]
    for client in clients if token else ():
        client.hear()
    poll, left = select.epoll(), {}
    for client in clients:
        poll.register(client.socket.fileno(), select.EPOLLIN)
    control.send("ready")
    while size := control.recv():
        left = {client.socket.fileno(): size for client in clients}
        while any(left.values()):
            for fd, _ in poll.poll():
                left[fd] -= len(os.read(fd, 1 << 18))
        control.send("done")


async def until(condition) -> None:
    """Wait for what a client does."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


class Own:
    """This program's server."""

    name, connections = "own", ()

    async def start(self) -> tuple:
        self.connections = []

        async def handler(connection):
            self.connections.append(connection)
            await connection.run()
            self.connections.remove(connection)

        self.server = await ws_echo.start_server(handler)
        return ws_echo.address_of(self.server)

    def send(self, events: list[str]) -> None:
        c.broadcast(self.connections, [c.encode_message(event) for event in events])

    async def stop(self) -> None:
        for connection in list(self.connections):
            connection.abort()
        await until(lambda: not self.connections)
        await self.server.close()


class Peer:
    """websockets' server, as its documentation has it."""

    name, connections = "websockets", ()

    async def start(self) -> tuple:
        self.connections = set()

        async def handler(connection):
            self.connections.add(connection)
            await connection.wait_closed()
            self.connections.discard(connection)

        self.server = await serve(handler, "127.0.0.1", 0, compression=None)
        return self.server.sockets[0].getsockname()

    def send(self, events: list[str]) -> None:
        for event in events:
            broadcast(self.connections, event)

    async def stop(self) -> None:
        for connection in list(self.connections):
            connection.transport.abort()
        await until(lambda: not self.connections)
        self.server.close()


async def fan_out() -> dict[tuple[str, int], float]:
    """CPU seconds an event and client by (server, events in a tick); the cases take turns."""
    context, cases, spent = multiprocessing.get_context("spawn"), [], {}
    readers = []
    for side in [Own()] + ([Peer()] if serve else []):
        address = await side.start()
        control, theirs = context.Pipe()
        process = context.Process(target=read_all, args=(address, theirs), daemon=True)
        process.start()
        readers.append(process)
        await until(control.poll)
        control.recv()
        await until(lambda: len(side.connections) == CLIENTS)
        cases += [(side, control, tick) for tick in (1, TICK)]
    try:
        for _ in range(ROUNDS):
            for side, control, tick in cases:
                control.send(len(c.encode_message(EVENT)) * EVENTS)
                start = time.process_time()
                for _ in range(EVENTS // tick):
                    side.send([EVENT] * tick)
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)  # a turn for what was put off
                spent.setdefault((side.name, tick), []).append(time.process_time() - start)
                await until(control.poll)
                control.recv()
        for side, _, tick in cases:
            if tick == 1:
                await side.stop()
    finally:
        for process in readers:
            process.kill()
            process.join()
    return {case: statistics.median(times) / EVENTS / CLIENTS for case, times in spent.items()}


async def through_the_daemon() -> float:
    """CPU seconds of a whole daemon an event and client, where a tick writes 20 events to the store."""
    context, spent = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as home:
        config = c.parse_config_text(f'data_dir = "{home}/data"\nserver_addr = "127.0.0.1:0"\n', "config.toml", home)
        daemon = c.Daemon(config, log=lambda level, text: None)
        await daemon.start()
        core, (control, theirs) = daemon.core, context.Pipe()
        process = context.Process(target=read_all, args=(c.split_address(daemon.http.addresses[0]), theirs, core.api_token), daemon=True)
        try:
            await core.store.durable()
            process.start()
            await until(control.poll)
            control.recv()
            await until(lambda: sum(map(len, core.live._groups.values())) == CLIENTS)
            for _ in range(ROUNDS):
                first, start = core.store.published_seq, time.process_time()
                for _ in range(EVENTS // TICK):
                    for _ in range(TICK):
                        core.store.append_event("task.state", "0b9f2c74-a1d5-4c8e-9d60-3f5b7a2e1c48", **MOVE)
                    await core.store.durable()
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                spent.append(time.process_time() - start)
                told = core.store.events_since(first, EVENTS)
                control.send(sum(len(c.encode_message(core.live.encode(event).decode())) for event in told))
                await until(control.poll)
                control.recv()
        finally:
            process.kill()
            process.join()
            await daemon.close()
    return statistics.median(spent) / EVENTS / CLIENTS


def resident_kb() -> int:
    """What this process has in memory; not its peak, which importing may have set."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


async def never_read(own: bool) -> float:
    """MB that the flood adds to this process at its worst."""
    side = Own() if own else Peer()
    address = await side.start()
    opened = []
    for _ in range(NEVER_READ):
        opened.append(await asyncio.to_thread(Client, address))
    await until(lambda: len(side.connections) == NEVER_READ)
    clients = tuple(side.connections)
    before = most = resident_kb()
    for number in range(FLOOD):
        side.send([EVENT])
        await asyncio.sleep(0)
        if number % 100 == 0:
            most = max(most, resident_kb())
    most = max(most, resident_kb())
    assert not own or not any(connection._open for connection in clients), "a client was not sent away"
    await side.stop()
    return (most - before) / 1024


def measure(own: bool, results) -> None:
    """One flood, in a process of its own."""
    results.send(asyncio.run(never_read(own)))


def memory_mb(own: bool) -> float:
    """``never_read`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure, args=(own, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    finally:
        process.kill()
        process.join()


def run() -> list[dict]:
    """The rows."""
    cost = asyncio.run(fan_out())
    rows = []
    for tick, target, how in ((1, 1.4, "event by event"), (TICK, 5, f"{TICK} events of a tick in one write")):
        own, peer = cost["own", tick], cost.get(("websockets", tick))
        ratio = peer / own if peer else None
        rows.append({"metric": f"WebSocket fan-out to {CLIENTS} clients, {how} ({own * 1e6:.1f} us CPU each)", "ratio": ratio,
                     "unit": "x its rate", "target": f">= {target}", "ok": ratio >= target if peer else None,
                     "peer": f"websockets.broadcast, {peer * 1e6:.1f} us" if peer else "websockets not installed"})
    whole, peer = asyncio.run(through_the_daemon()), cost.get(("websockets", 1))
    ratio = peer / whole if peer else None
    rows.append({"metric": f"the same through the daemon: written to the store, synced, redacted, told ({whole * 1e6:.1f} us CPU"
                           " each)", "ratio": ratio, "unit": "x the peer's rate", "target": ">= 2", "ok": ratio >= 2 if peer else None,
                 "peer": f"websockets.broadcast alone, {peer * 1e6:.1f} us" if peer else "websockets not installed"})
    extra = memory_mb(True)
    return rows + [{"metric": f"{NEVER_READ} WebSocket clients that never read, {FLOOD} events, extra memory", "ratio": extra,
                    "unit": "MB", "target": "<= 8", "ok": extra <= 8,
                    "peer": f"websockets, {memory_mb(False):.0f} MB" if serve else "websockets not installed"}]


if __name__ == "__main__":
    for row in run():
        print(row)
