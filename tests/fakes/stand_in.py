"""What the stand-ins for model APIs share: an HTTP server on loopback, in a thread."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _json(self, status: int, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class StandIn:
    """The server of a ``handler``; ``seen`` is what that notes in ``self.server.seen``.  A context manager."""

    handler = Handler

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self._server.daemon_threads = True
        self._server.seen = self.seen = []
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve(make) -> None:
    """Print the URL of a new stand-in and serve until somebody ends the process, for tries by hand."""
    with make() as server:
        print(server.url, flush=True)
        while True:
            time.sleep(3600)
