"""A round trip on the control socket against redis PING, both on a Unix socket with the same plain client.

``project.list`` reads no database, so it shows the wire and the dispatch: once with the same line again and again, as PING
is and as a program that polls asks, once with another id each time.  ``daemon.status`` adds two reads of SQLite.  A bare
``asyncio.Protocol`` that echoes is what asyncio leaves room for: on a machine where a process takes long to wake up or
memory is slow to get, it is itself far from redis.
"""
import asyncio
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


def serve_echo(path: str) -> None:
    """Answer each read with a constant line, with as little as asyncio needs for it."""
    class Echo(asyncio.Protocol):
        def connection_made(self, transport):
            self._transport = transport

        def data_received(self, data):
            self._transport.write(b'{"jsonrpc":"2.0","id":1,"result":{}}\n')

    async def serve():
        await (await asyncio.get_running_loop().create_unix_server(Echo, path)).serve_forever()
    asyncio.run(serve())


def request(method: str, number: int = 1) -> bytes:
    return f'{{"jsonrpc":"2.0","id":{number},"method":"{method}","params":{{}}}}\n'.encode()


def run() -> list[dict]:
    """The rows; the cases take turns, and the medians are compared."""
    with tempfile.TemporaryDirectory() as home, DaemonProcess(home) as daemon:
        echo_path, redis_path = os.path.join(home, "echo.sock"), os.path.join(home, "redis.sock")
        echo = multiprocessing.get_context("spawn").Process(target=serve_echo, args=(echo_path,), daemon=True)
        echo.start()
        redis = None
        if shutil.which("redis-server"):
            redis = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", redis_path, "--save", "", "--dir", home,
                                      "--maxmemory", "32mb"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            peers = [Peer(daemon.socket_path, request("project.list")), Peer(daemon.socket_path, request("daemon.status")),
                     Peer(daemon.socket_path, *(request("project.list", number) for number in range(REQUESTS))),
                     Peer(echo_path, b"x\n"), *([Peer(redis_path, b"PING\r\n")] if redis else [])]
            times = zip(*([peer.seconds_each() for peer in peers] for _ in range(ROUNDS)))
            wire, status, numbered, bare, *ping = [statistics.median(column) for column in times]
        finally:
            echo.kill()
            echo.join()
            if redis:
                redis.terminate()
                redis.wait(10)
    name, to_bare = "Unix JSON-lines round trip, ", {"unit": "x its rate", "target": ">= 0.8",
                                                     "peer": f"a bare asyncio echo, {bare * 1e6:.0f} us"}
    rows = [{"metric": name + f"project.list ({wire * 1e6:.0f} us)", "ratio": bare / wire, "ok": bare / wire >= 0.8, **to_bare}]
    for what, own in (("project.list", wire), ("project.list with another id each time", numbered), ("daemon.status", status)):
        ratio = ping[0] / own if ping else None
        required = own is wire and ratio is not None
        rows.append({"metric": name + f"{what} ({own * 1e6:.0f} us)", "ratio": ratio, "unit": "x its rate",
                     "target": ">= 0.6" if own is wire else "none", "ok": ratio >= 0.6 if required else None,
                     "peer": f"redis PING, {ping[0] * 1e6:.0f} us" if ping else "redis-server not installed"})
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
