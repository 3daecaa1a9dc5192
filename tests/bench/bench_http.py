"""HTTP: GETs of 1 KB of JSON on kept connections against aiohttp with the same plain client, and what slow clients cost.

Both servers answer the same kilobyte, encoded before, from a handler that does nothing else, each in a process of its own; the cases take
turns, and the medians are compared.  Sixteen connections ask at a time, so that the server is what is measured and not how
long the kernel takes to wake the client.  A connection that repeats its head, as a page that polls does, has it parsed
once; the second row changes the query each time.  aiohttp is in the optional dependencies ``bench``.
"""
import asyncio
import multiprocessing
import pathlib
import resource
import socket
import statistics
import time

import claudomator as c
from tests.support import wait_until

ROUNDS, REQUESTS, AT_ONCE, CLIENTS = 40, 20, 16, 1000
BODY = c.format_json({"tasks": [{"id": f"{n:032x}", "name": f"task {n}", "state": "READY"} for n in range(13)]}).encode()
REQUEST = b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"


def serve_ours(ports) -> None:
    """The server of section 26."""
    async def serve():
        server = c.HttpServer(lambda level, text: None)
        server.bind_tcp("127.0.0.1:0")
        await server.start(lambda request, peer: c.HttpResponse(BODY))
        ports.put(int(server.addresses[0].rpartition(":")[2]))
        await asyncio.Event().wait()
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    asyncio.run(serve())


def serve_aiohttp(ports) -> None:
    """aiohttp, without its access log."""
    from aiohttp import web

    async def answer(request):
        return web.Response(body=BODY, content_type="application/json")

    async def serve():
        app = web.Application()
        app.router.add_get("/api/tasks", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.put(site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()
    asyncio.run(serve())


class Peer:
    """A server in a process and kept connections to it."""

    def __init__(self, serve):
        context = multiprocessing.get_context("spawn")
        ports = context.Queue()
        self.process = context.Process(target=serve, args=(ports,), daemon=True)
        self.process.start()
        self.port = ports.get(timeout=30)
        self._sockets = [socket.create_connection(("127.0.0.1", self.port), 20) for _ in range(AT_ONCE)]
        self._sockets[0].sendall(REQUEST)
        first = b""
        while not first.endswith(b"]}"):
            first += self._sockets[0].recv(65536)
        self._size = len(first)

    def seconds_each(self, vary: bool = False) -> float:
        """Seconds a request, over ``REQUESTS`` of each connection."""
        start = time.perf_counter()
        for number in range(REQUESTS):
            request = REQUEST.replace(b" HTTP", b"?n=%d HTTP" % number) if vary else REQUEST
            for each in self._sockets:
                each.sendall(request)
            for each in self._sockets:
                left = self._size
                while left > 0:
                    left -= len(each.recv(65536))
        return (time.perf_counter() - start) / REQUESTS / AT_ONCE

    def rss_kb(self) -> int:
        """Resident memory of the server."""
        return int(pathlib.Path(f"/proc/{self.process.pid}/status").read_text().split("VmRSS:")[1].split()[0])

    def cpu_s(self) -> float:
        """Processor time the server has used."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


def slow_clients(peer: Peer) -> tuple[float, float, float]:
    """(KB each of 1,000 connections in the middle of a request, the slowdown of another client beside them, processor
    seconds for 1,000 bytes that come one from each)."""
    sockets, before, alone = [], peer.rss_kb(), statistics.median(peer.seconds_each() for _ in range(10))
    try:
        for _ in range(CLIENTS):
            sockets.append(socket.create_connection(("127.0.0.1", peer.port), 20))
            sockets[-1].sendall(REQUEST[:20])
        peer.seconds_each()
        each_kb = (peer.rss_kb() - before) / CLIENTS
        cpu = peer.cpu_s()
        for at in range(20, 25):
            for raw in sockets:
                raw.sendall(REQUEST[at:at + 1])
        wait_until(lambda: peer.seconds_each())
        cpu = (peer.cpu_s() - cpu) / 5
        return each_kb, statistics.median(peer.seconds_each() for _ in range(10)) / alone, cpu
    finally:
        for raw in sockets:
            raw.close()


def run() -> list[dict]:
    """The rows."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    peers = [Peer(serve_ours)]
    try:
        import aiohttp  # noqa: F401
        peers.append(Peer(serve_aiohttp))
    except ImportError:
        pass
    try:
        measured = [list(map(statistics.median, zip(*([peer.seconds_each(vary) for peer in peers] for _ in range(ROUNDS)))))
                    for vary in (False, True)]
        peers.append(Peer(serve_ours))  # one that has grown by nothing yet
        each_kb, slower, cpu = slow_clients(peers[-1])
    finally:
        for peer in peers:
            peer.process.kill()
            peer.process.join()
    rows = []
    for what, least, (ours, *other) in zip(("the same", "another query each time"), (1.5, None), measured):
        ratio = other[0] / ours if other else None
        rows.append({"metric": f"HTTP GET of 1 KB JSON, kept connections, {what} ({ours * 1e6:.0f} us)", "ratio": ratio,
                     "unit": "x its rate", "target": f">= {least}" if least else "none", "ok": ratio >= least if least and ratio else None,
                     "peer": f"aiohttp, {other[0] * 1e6:.0f} us" if other else "aiohttp, which is not installed"})
    return [*rows,
            {"metric": "1,000 slow clients, memory each", "ratio": each_kb, "unit": "KB", "target": "<= 16", "ok": each_kb <= 16,
             "peer": "the server without them"},
            {"metric": "another client beside 1,000 slow ones", "ratio": slower, "unit": "x its time alone", "target": "<= 1.5",
             "ok": slower <= 1.5, "peer": "itself alone"},
            {"metric": "1,000 clients with a byte a second each", "ratio": cpu, "unit": "s of processor a second", "target": "<= 0.3",
             "ok": cpu <= 0.3, "peer": "a processor"}]


if __name__ == "__main__":
    for row in run():
        print(row)
