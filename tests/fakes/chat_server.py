"""A stand-in for a model server with OpenAI's chat completions, on loopback.

What it does is chosen by a line ``SCENARIO: name`` in the last message, or by ``say(name)`` for all that follow; each
request is kept in ``requests``.  ``python3 chat_server.py`` prints its endpoint and serves, for tries by hand.
"""
import json
import pathlib
import re
import socket
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
ANSWER = "I thought about it: é € 😀.\n\n## Summary\nThe answer is four."
USAGE = {"prompt_tokens": 11, "completion_tokens": 7}
HUGE = 100 << 20  # bytes of events


def chunk(content=None, finish=None, **more) -> bytes:
    delta = {} if content is None else {"content": content}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    record = {"id": "c1", "object": "chat.completion.chunk", "model": "tiny", "choices": choices, **more}
    return b"data: " + json.dumps(record, ensure_ascii=False).encode() + b"\n\n"


END = chunk(None, "stop") + chunk(choices=[], usage=USAGE)
DONE = b"data: [DONE]\n\n"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        stand_in = self.server.stand_in
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        name = stand_in.scenario or (re.findall(r"SCENARIO: (\w+)", said) or ["text"])[-1]
        stand_in.requests.append({"path": self.path, "headers": dict(self.headers), "body": body, "scenario": name})
        self.close_connection = True
        try:
            if self.path != "/v1/chat/completions":
                self.refuse(404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}})
            elif stand_in.api_key and self.headers.get("Authorization") != f"Bearer {stand_in.api_key}":
                given = self.headers.get("Authorization", "none")
                self.refuse(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            else:
                getattr(self, "on_" + name)(stand_in.requests)
        except (BrokenPipeError, ConnectionResetError):
            stand_in.dropped.set()  # the client has gone

    def refuse(self, status: int, document, **headers) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def stream(self, *pieces: bytes) -> None:
        self.begin()
        for piece in pieces:
            self.send(piece)
        self.wfile.write(b"0\r\n\r\n")

    # -- scenarios

    def on_text(self, requests) -> None:
        self.stream(chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}]),
                    *(chunk(ANSWER[at:at + 5]) for at in range(0, len(ANSWER), 5)), END, DONE)

    def on_plain(self, requests) -> None:
        """No summary of its own; the request for one is answered with one."""
        asked = requests[-1]["body"]["messages"][0]["role"] == "system"
        self.stream(chunk("<think>hm</think>\nIt was summed up." if asked else "Just some words."), END, DONE)

    def on_only_thoughts(self, requests) -> None:
        """The length was enough for the reasoning alone."""
        self.stream(chunk("<think>The user wants a summary. Let me"), chunk(choices=[{"delta": {}, "finish_reason": "length"}]), DONE)

    def on_choice(self, requests) -> None:
        """What the test put into ``answer``."""
        self.stream(chunk("<think>{}</think>" + self.server.stand_in.answer), END, DONE)

    def on_late_choice(self, requests) -> None:
        self.server.stand_in.release.wait(60)
        self.on_choice(requests)

    def on_crlf(self, requests) -> None:
        self.stream((chunk("one ") + chunk("two") + END + DONE).replace(b"\n", b"\r\n"))

    def on_no_done(self, requests) -> None:
        self.stream(chunk("no done"), END)

    def on_document(self, requests) -> None:
        self.refuse(200, {"model": "tiny", "usage": USAGE, "choices": [
            {"finish_reason": "stop", "message": {"role": "assistant", "content": "not streamed"}}]},
            Content_Type="application/json")

    def on_drop(self, requests) -> None:
        self.begin()
        self.send(chunk("half of"))
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def on_drop_at_once(self, requests) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def on_mid_error(self, requests) -> None:
        self.stream(chunk("half of"), b'data: {"error": {"code": 500, "message": "slot is gone"}}\n\n')

    def on_slow(self, requests) -> None:
        """Goes on until the client leaves, or ``release`` is set: then it ends well."""
        self.begin()
        while not self.server.stand_in.release.wait(0.05):
            self.send(chunk("tick "))
        self.send(END + DONE)
        self.wfile.write(b"0\r\n\r\n")

    def on_lines(self, requests) -> None:
        """A first line at once, the last when ``release`` is set."""
        self.begin()
        self.send(chunk("first li") + chunk("ne\nlast"))
        self.wfile.flush()
        self.server.stand_in.release.wait(60)
        self.send(chunk(" words") + END + DONE)
        self.wfile.write(b"0\r\n\r\n")

    def on_silent(self, requests) -> None:
        self.begin()
        self.send(chunk("first"))
        self.server.stand_in.release.wait(60)

    def on_limit_429(self, requests) -> None:
        """Refuses the first request, with seconds."""
        if sum(request["scenario"] == "limit_429" for request in requests) > 1:
            return self.on_text(requests)
        seconds = str(self.server.stand_in.retry_after_s)
        self.refuse(429, {"error": {"message": "Too many requests"}}, Retry_After=seconds)

    def on_busy_503(self, requests) -> None:
        """Refuses the first request, with a date."""
        if sum(request["scenario"] == "busy_503" for request in requests) > 1:
            return self.on_text(requests)
        at = formatdate(time.time() + self.server.stand_in.retry_after_s, usegmt=True)
        self.refuse(503, {"error": {"message": "Loading model", "type": "unavailable_error"}}, Retry_After=at)

    def on_error_500(self, requests) -> None:
        self.refuse(500, b"<html><body>Internal Server Error</body></html>")

    def on_no_model(self, requests) -> None:
        self.refuse(404, {"error": {"message": "model 'x' not found, try pulling it first"}})

    def on_redirect(self, requests) -> None:
        self.refuse(302, b"", Location="http://127.0.0.1:1/elsewhere")

    def on_too_long(self, requests) -> None:
        self.replay("llamacpp/err_context")

    def on_recorded(self, requests) -> None:
        self.replay("llamacpp/stream_usage")

    def on_huge(self, requests) -> None:
        """A hundred megabytes of events, of which little is text."""
        self.begin()
        block = chunk("word ", padding="x" * 1000) * 64
        for _ in range(HUGE // len(block)):
            self.send(block)
        self.send(chunk("\n\n## Summary\nHuge.") + END + DONE)
        self.wfile.write(b"0\r\n\r\n")

    def on_endless_line(self, requests) -> None:
        self.begin()
        while True:
            self.send(b"data: " + b"x" * (1 << 20))

    def replay(self, name: str) -> None:
        self.wfile.write((DATA / f"{name}.resp").read_bytes())


class StandIn:
    """The running server; ``endpoint`` is what belongs into the configuration."""

    def __init__(self, scenario="", api_key="", retry_after_s=1):
        self.scenario, self.api_key, self.retry_after_s = scenario, api_key, retry_after_s
        self.requests: list[dict] = []
        self.release, self.dropped = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.stand_in = True, self
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def say(self, scenario: str) -> None:
        self.scenario = scenario

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    stand_in = StandIn(*sys.argv[1:2])
    print(stand_in.endpoint, flush=True)
    stand_in.server.serve_forever()
