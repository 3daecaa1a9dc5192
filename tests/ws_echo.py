"""An echo server on the daemon's own HTTP and WebSocket code: ``python3 -m tests.ws_echo PORT`` (0: any; it prints the address).

For the Autobahn suite, whose messages have up to 16 MB.
"""
import asyncio
import sys

import claudomator as c

MAX_MESSAGE = 16 << 20
HOST = "server.example.com"  # who tests.ws_client asks for


async def start_server(handler=None, port=0, log=print, **options):
    """An HTTP server all of whose paths are WebSockets that echo, or do what ``handler(connection)`` does."""
    def serve(connection):
        return handler(connection) if handler else connection.run(connection.send)

    server = c.HttpServer(log, (HOST,))
    server.bind_tcp(f"127.0.0.1:{port}")
    await server.start(lambda request, peer: c.open_websocket(request, serve, ("echo",),
                                                              **{"max_message": MAX_MESSAGE, **options}))
    return server


def address_of(server):
    """(host, port) where it listens."""
    return c.split_address(server.addresses[0])


async def main(port: int) -> None:
    """Serve until the process is ended."""
    server = await start_server(port=port)
    print(f"ws://{server.addresses[0]}", flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
