"""An echo server on the daemon's own WebSocket code: ``python3 -m tests.ws_echo PORT`` (0: any; it prints the address).

For the Autobahn suite, whose messages have up to 16 MB.
"""
import asyncio
import sys

import claudomator as c

MAX_MESSAGE = 16 << 20


async def serve_client(reader, writer, handler=None, **options):
    """Answer the opening request on a connection, then echo, or do what ``handler(connection)`` does."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        answer = ["HTTP/1.1 101 Switching Protocols"]
        answer += [f"{name}: {value}" for name, value in c.check_handshake(head[0].split(" ")[0], 1, headers, ("echo",))]
    except (c.HandshakeError, asyncio.IncompleteReadError, ValueError) as error:
        answer = [f"HTTP/1.1 {getattr(error, 'http_status', 400)} Refused", "Content-Length: 0"]
        answer += [f"{name}: {value}" for name, value in getattr(error, "fields", ())]
    writer.write("\r\n".join([*answer, "", ""]).encode())
    if "101" not in answer[0]:
        return writer.close()
    connection = c.WebSocketConnection(reader, writer, **{"max_message": MAX_MESSAGE, **options})
    await (handler(connection) if handler else connection.run(connection.send))


async def main(port: int) -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(serve_client, "127.0.0.1", port)
    print("ws://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
