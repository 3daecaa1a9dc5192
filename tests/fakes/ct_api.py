"""A stand-in for the HTTP API as ``ct`` sees it, and the golden transcripts that it and the real server are held to.

A transcript, ``tests/data/ct/NAME.json``:

    about    the promise, a sentence
    ids      placeholder: the id that the stand-in uses; a real server's test binds its own
    given    the tasks that must exist before: {"id": "<task>", "name", "state", ...}
    command  ct's arguments; with stdin, stdout, stderr (what must be in it) and exit
    steps    [{"request": {method, path, headers, body}, "answer": {status, body}}, ...]

``<name>`` anywhere in a string is a placeholder.  ``matches`` compares what is expected with what came: an object may
have more keys than expected, a string that is one unbound placeholder matches any string and binds it, the rest is equal.
"""
import json
import pathlib
import re
import socket
import threading

TRANSCRIPTS = pathlib.Path(__file__).parent.parent / "data" / "ct"
TOKEN = "agent-token-1"


def read_transcripts() -> dict:
    """Every transcript by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(TRANSCRIPTS.glob("*.json"))}


def fill(value, ids: dict):
    """``value`` with every bound placeholder replaced."""
    if isinstance(value, str):
        return re.sub(r"<(\w+)>", lambda found: ids.get(found[1], found[0]), value)
    if isinstance(value, dict):
        return {name: fill(item, ids) for name, item in value.items()}
    return [fill(item, ids) for item in value] if isinstance(value, list) else value


def matches(expected, actual, ids: dict) -> bool:
    """Whether ``actual`` is what a transcript expects; binds placeholders in ``ids``."""
    expected = fill(expected, ids)
    if isinstance(expected, str) and (unbound := re.fullmatch(r"<(\w+)>", expected)):
        ids[unbound[1]] = actual
        return isinstance(actual, str) and actual != ""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(name in actual and matches(item, actual[name], ids)
                                                for name, item in expected.items())
    if isinstance(expected, list):
        return isinstance(actual, list) and len(expected) == len(actual) and all(
            matches(item, other, ids) for item, other in zip(expected, actual))
    return expected == actual and type(expected) is type(actual)


class Request:
    """One request as it came."""

    def __init__(self, head: bytes, body: bytes):
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, self.version = first.split(" ")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.body = body

    def facts(self) -> dict:
        """It as a transcript has it."""
        facts = {"method": self.method, "path": self.path, "headers": self.headers}
        return {**facts, "body": json.loads(self.body)} if self.body else facts


def answer(status: int, document, more: str = "") -> bytes:
    """An answer of the API with a length."""
    body = document if isinstance(document, bytes) else json.dumps(document, ensure_ascii=False).encode()
    return (f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def chunked(status: int, document, size: int = 7) -> bytes:
    """The same in chunks."""
    body = json.dumps(document, ensure_ascii=False).encode()
    pieces = [body[at:at + size] for at in range(0, len(body), size)]
    return (f"HTTP/1.1 {status} OK\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nTrailer: x\r\n\r\n")


def refusal(status: int, code: str, message: str, **more) -> bytes:
    """An error of the API."""
    return answer(status, {"error": {"code": code, "message": message, **more}})


class CtApi:
    """A server that gives each request what ``reply(request)`` returns, as it is, and closes; ``None`` closes at once.

    ``path`` names a Unix socket; else it listens on loopback.  ``requests`` are those that came.
    """

    def __init__(self, reply, path=None, port: int = 0):
        self.reply, self.requests = reply, []
        self._socket = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        if path:
            pathlib.Path(path).unlink(missing_ok=True)
            self._socket.bind(str(path))
        else:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", port))
            self.port = self._socket.getsockname()[1]
        self._socket.listen(64)
        self.url = f"unix://{path}" if path else f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self) -> None:
        """Stop listening, as a daemon that is restarted does."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._thread.join(10)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                try:
                    self._answer(connection)
                except OSError:
                    pass

    def _answer(self, connection) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (block := connection.recv(65536)):
                return
            data += block
        head, _, body = data.partition(b"\r\n\r\n")
        request = Request(head, b"")
        pieces, left = [body], int(request.headers.get("content-length", 0)) - len(body)
        while left > 0:
            block = connection.recv(1 << 20)
            if not block:
                return
            pieces.append(block)
            left -= len(block)
        request.body = b"".join(pieces)
        self.requests.append(request)
        said = self.reply(request)
        if said:
            connection.sendall(said)


class Replay:
    """The answers of a transcript in their order; ``faults`` are the requests that were not the expected ones."""

    def __init__(self, transcript: dict):
        self.steps, self.ids, self.faults = list(transcript["steps"]), dict(transcript["ids"]), []

    def __call__(self, request: Request) -> bytes:
        step = self.steps.pop(0) if self.steps else None
        if step is None or not matches(step["request"], request.facts(), self.ids):
            self.faults.append(f"expected {step and fill(step['request'], self.ids)}, got {request.facts()}")
            return refusal(500, "internal", "not in the transcript")
        return answer(step["answer"]["status"], fill(step["answer"]["body"], self.ids))
