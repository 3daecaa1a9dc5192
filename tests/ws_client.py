"""A WebSocket client on a plain socket, with code of its own; it can break every rule."""
import json
import socket
import struct

MASK = b"\x37\xfa\x21\x3d"  # of RFC 6455 section 5.7
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def opening(path, *fields, host="localhost"):
    """An opening request; ``fields`` are more header lines."""
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade",
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", *fields, "", ""]).encode()


OPENING = opening("/chat", host="server.example.com")


def frame(opcode, payload=b"", final=True, mask=MASK, reserved=0, form=None):
    """A client's frame.  ``form``: write the length in 7, 16 or 64 bits whatever it is; ``mask`` may be ``None``."""
    if isinstance(payload, str):
        payload = payload.encode()
    size = len(payload)
    form = form or (7 if size < 126 else 16 if size < 65536 else 64)
    seven, rest = {7: (size, b""), 16: (126, struct.pack("!H", size & 0xFFFF)), 64: (127, struct.pack("!Q", size))}[form]
    head = bytes([final << 7 | reserved << 4 | opcode, (mask is not None) << 7 | seven]) + rest
    if mask is None:
        return head + payload
    if size > 1000:  # the same, faster
        stream = (mask * (size // 4 + 1))[:size]
        return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(size, "big")
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


class Client:
    """A connection after the handshake; ``early`` is sent together with the opening request.  ``address`` may be the path
    of a Unix socket."""

    def __init__(self, address, early=b"", receive_buffer=0, opening=OPENING):
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        self.socket.connect(address)
        self.socket.sendall(opening + early)
        self._file = self.socket.makefile("rb")
        self.answer = b""
        while not self.answer.endswith(b"\r\n\r\n"):
            self.answer += self._file.readline() or b"\r\n\r\n"
        self.status = int(self.answer.split(b" ")[1])

    def send(self, *arguments, **options):
        """Send a frame."""
        self.socket.sendall(frame(*arguments, **options))

    def receive(self):
        """The next frame as (opcode, payload); a close frame as (8, code, reason); ``None`` at the end.  Never masked."""
        head = self._file.read(2)
        if len(head) < 2:
            return None
        assert head[0] & 0x80 and not head[0] & 0x70 and not head[1] & 0x80, head
        size = head[1]
        if size > 125:
            size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
        payload, opcode = self._file.read(size), head[0] & 15
        if len(payload) < size:
            return None
        if opcode == CLOSE:
            return (CLOSE, int.from_bytes(payload[:2], "big") if payload else None, payload[2:].decode())
        return opcode, payload

    def rest(self):
        """All frames up to the end of the connection; a reset is an error."""
        return list(iter(self.receive, None))

    def close(self):
        """Leave without a word."""
        self._file.close()
        self.socket.close()


class LiveClient(Client):
    """A client of the daemon's ``/api/ws``.  ``way`` says how it gives its token: header, message, protocol or none."""

    def __init__(self, address, token="", query="", way="header", fields=(), **more):
        given = {"header": [f"Authorization: Bearer {token}"],
                 "protocol": [f"Sec-WebSocket-Protocol: claudomator, claudomator.bearer.{token}"]}.get(way, [])
        super().__init__(address, opening=opening("/api/ws" + query, *given, *fields), **more)
        if way == "message" and self.status == 101:
            self.send(TEXT, json.dumps({"token": token}))

    def hear(self):
        """The next message as JSON; a close frame as (8, code, reason); ``None`` at the end.  Pings are answered."""
        while (heard := self.receive()) and heard[0] == PING:
            self.send(PONG, heard[1])
        return json.loads(heard[1]) if heard and heard[0] == TEXT else heard

    def hear_until(self, is_last):
        """What comes up to a message for which ``is_last`` holds, or to the close frame."""
        heard = [self.hear()]
        while isinstance(heard[-1], dict) and not is_last(heard[-1]):
            heard.append(self.hear())
        return heard
