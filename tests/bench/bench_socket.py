"""A round trip on the control socket against redis PING, both on a Unix socket with the same plain client.

``daemon.health`` is what PING is: a question whose answer needs nothing.  ``project.list`` reads no database; it is asked
with the same line again and again, as a program that polls does, and with another id each time.  ``daemon.status`` adds
two reads of SQLite.

How far Python is from redis differs between machines: it is worse where memory or the waking of a process is slow.  So the
best technique that is known, an ``asyncio.Protocol`` that cuts lines and does nothing but JSON, takes part.  The target of
0.6 was set where that reached 0.84; it is at least 0.71 of that technique's rate.
"""
import asyncio
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time

from tests.support import DaemonProcess, wait_until

ROUNDS, REQUESTS = 60, 200


class Peer:
    """A connection on which one request line gets one answer line."""

    def __init__(self, path: str, *requests: bytes):
        self._socket, self._requests = socket.socket(socket.AF_UNIX), (requests * REQUESTS)[:REQUESTS]
        wait_until(lambda: self._socket.connect_ex(path) == 0)

    def seconds_each(self) -> float:
        """Seconds a round trip, over ``REQUESTS`` of them."""
        send, receive = self._socket.sendall, self._socket.recv
        start = time.perf_counter()
        for request in self._requests:
            send(request)
            while not receive(65536).endswith(b"\n"):
                pass
        return (time.perf_counter() - start) / REQUESTS


def serve_json(path: str) -> None:
    """Answer each line with what it asks for, which is nothing."""
    class Lines(asyncio.Protocol):
        def connection_made(self, transport):
            self._transport, self._rest = transport, b""

        def data_received(self, data):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                answer = {"jsonrpc": "2.0", "id": json.loads(line)["id"], "result": {}}
                self._transport.write(json.dumps(answer).encode() + b"\n")

    async def serve():
        await (await asyncio.get_running_loop().create_unix_server(Lines, path)).serve_forever()
    asyncio.run(serve())


def request(method: str, number: int = 1) -> bytes:
    return f'{{"jsonrpc":"2.0","id":{number},"method":"{method}","params":{{}}}}\n'.encode()


def run() -> list[dict]:
    """The rows; the cases take turns, and the medians are compared."""
    asked = {"daemon.health": [request("daemon.health")], "project.list": [request("project.list")],
             "project.list with another id each time": [request("project.list", number) for number in range(REQUESTS)],
             "daemon.status": [request("daemon.status")]}
    with tempfile.TemporaryDirectory() as home, DaemonProcess(home) as daemon:
        plain_path, redis_path = os.path.join(home, "plain.sock"), os.path.join(home, "redis.sock")
        plain = multiprocessing.get_context("spawn").Process(target=serve_json, args=(plain_path,), daemon=True)
        plain.start()
        redis = None
        if shutil.which("redis-server"):
            redis = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", redis_path, "--save", "", "--dir", home,
                                      "--maxmemory", "32mb"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            peers = [*(Peer(daemon.socket_path, *lines) for lines in asked.values()), Peer(plain_path, request("nothing")),
                     *([Peer(redis_path, b"PING\r\n")] if redis else [])]
            times = zip(*([peer.seconds_each() for peer in peers] for _ in range(ROUNDS)))
            *own, bare, ping = [*map(statistics.median, times), *([] if redis else [None])]
        finally:
            plain.kill()
            plain.join()
            if redis:
                redis.terminate()
                redis.wait(10)
    name, rows = "Unix JSON-lines round trip, ", []
    for what, took in zip(asked, own):
        metric, is_ping = name + f"{what} ({took * 1e6:.0f} us)", what == "daemon.health"
        rows += [{"metric": metric, "ratio": bare / took, "unit": "x its rate", "target": ">= 0.71", "ok": bare / took >= 0.71,
                  "peer": f"an asyncio.Protocol with JSON and nothing else, {bare * 1e6:.0f} us"}] if is_ping else []
        rows.append({"metric": metric, "ratio": ping and ping / took, "unit": "x its rate",
                     "target": ">= 0.6" if is_ping else "none", "ok": ping / took >= 0.6 if ping and is_ping else None,
                     "peer": f"redis PING, {ping * 1e6:.0f} us" if ping else "redis-server not installed"})
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
