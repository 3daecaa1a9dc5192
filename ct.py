#!/usr/bin/env -S python3 -I -S
"""ct: what an agent says to Claudomator from inside its task: subtasks, a question, a summary.  See docs/ct.md.

One file on the standard library, without claudomator: a container needs nothing but CPython.  It is started often, so
a start costs little more than a bare interpreter's (docs/adr/0007): HTTP by hand over ``_socket``, JSON by the C half
of ``json``, arguments by a table.  From the top: errors and text, JSON, the HTTP wire, the API, commands, the table.
"""
import os
import sys
import time

import _socket

EXIT_OK, EXIT_FAILED, EXIT_BLOCKED, EXIT_REFUSED, EXIT_UNREACHABLE = 0, 1, 2, 3, 4
EXIT_USAGE, EXIT_IO, EXIT_TIMEOUT, EXIT_INTERRUPTED = 64, 74, 124, 130
MODEL, BUDGET_USD = "sonnet", 3.0  # of a subtask that names none
MAX_TEXT = 8 << 20  # bytes of instructions; a task file holds no more either
MAX_FILE = 1 << 16  # bytes that Claudomator reads of a question file
KEPT_SUMMARY = 1 << 12  # bytes that it keeps of a summary
MAX_HEAD, MAX_LINE, MAX_ANSWER = 1 << 16, 1 << 10, 1 << 26  # bytes of an answer's head, of a chunk's line, of it all
CONNECT_S, REQUEST_S = 10.0, 30.0
POLL_S = 25  # one long poll; proxies between us and the daemon cut a silence of 60 s
PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0  # between two tries; doubles
RESEND_S = 10.0  # how long a request that was cut is sent again
FIRST_S, RESTART_S = 60.0, 600.0  # how long a wait bears an API that never answered, and one that did
FAILED_STATES = ("FAILED", "TIMED_OUT", "CANCELLED", "BUDGET_EXCEEDED")
URL, TOKEN, TASK = "CLAUDOMATOR_API_URL", "CLAUDOMATOR_API_TOKEN", "CLAUDOMATOR_TASK_ID"


class Failure(Exception):
    """What ends a command: a sentence for the caller, a stable ``code`` and the exit code."""

    def __init__(self, message: str, code: str = "usage", exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.code, self.exit_code = code, exit_code


class Unreachable(Failure):
    """The API does not answer as it should, which may pass; ``sent``: it may have received the request."""

    def __init__(self, message: str, sent: bool = True) -> None:
        super().__init__(message, "unreachable", EXIT_UNREACHABLE)
        self.sent = sent


def plain(value: object, limit: int = 500) -> str:
    """Text of a server on one line that is safe on a terminal, cut to ``limit`` characters; empty for what is none."""
    text = value[:limit * 4] if isinstance(value, str) else ""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= limit else text[:limit - 3] + "..."


def write(descriptor: int, text: str) -> None:
    """Write text as UTF-8, whatever the locale says."""
    rest = text.encode("utf-8", "replace")
    while rest:
        rest = rest[os.write(descriptor, rest):]


def note(text: str) -> None:
    """A line of talk on stderr, if anybody hears it."""
    try:
        write(2, f"ct: {text}\n")
    except OSError:
        pass


def parse_seconds(text: str) -> float:
    """Seconds of ``600``, ``90s``, ``15m`` or ``1h30m``.  Raises ``Failure``."""
    total, digits = 0.0, ""
    for char in text if text.strip("0123456789.") else text + "s":
        if char in "0123456789.":
            digits += char
        elif char not in "smhd" or digits.count(".") > 1 or not digits.strip("."):
            break
        else:
            total, digits = total + float(digits) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[char], ""
    else:
        if not digits and total < 1e9:
            return total
    raise Failure(f"{text!r} is no duration: write seconds (600), or 90s, 15m, 1h30m")


try:  # as section 02 of claudomator.py: without the regular expressions that importing ``json`` compiles
    from _json import encode_basestring, make_encoder, make_scanner

    class _Strict:
        """What ``make_scanner`` reads its options from."""

        strict, object_hook, object_pairs_hook, parse_float, parse_int, memo = True, None, None, float, int, {}
        parse_constant = None  # NaN is not JSON: calling it is a TypeError

    _scan, _encode = make_scanner(_Strict), make_encoder(
        None, None, encode_basestring, None, ":", ",", False, False, False)
except (ImportError, TypeError, AttributeError):  # another Python
    _scan = _encode = None


def parse_json(data: bytes) -> object:
    """The value of a JSON document, or ``None`` where it is not one."""
    try:
        text = data.decode("utf-8").strip(" \t\n\r")
        if _scan is None:
            import json
            return json.loads(text)
        value, end = _scan(text, 0)
        return value if end == len(text) else None
    except (ValueError, TypeError, StopIteration, RecursionError, SystemError):  # 3.11 says SystemError for a bad string
        return None


def format_json(value: dict) -> str:
    """Compact JSON on one line, not escaped to ASCII."""
    if _encode is None:
        import json
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return "".join(_encode(value, 0))


class Answer:
    """One HTTP/1.1 answer (RFC 9112), fed as its bytes come.  Raises ``Unreachable`` for bytes that are none."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 0, {}, b""
        self._bytes, self._chunks, self._received = bytearray(), bytearray(), 0

    def feed(self, data: bytes) -> bool:
        """Take the next bytes, ``b""`` for the end of the connection; whether the answer is whole now."""
        self._bytes += data
        self._received += len(data)
        if self._received > MAX_ANSWER:
            raise Failure(f"the answer is longer than {MAX_ANSWER >> 20} MiB: ask for less (ct task list --limit 10)",
                          "too_large", EXIT_UNREACHABLE)
        while self.status < 200:  # 1xx are interim answers
            if not self._read_head():
                break
        if self.status >= 200 and self._read_body(not data):
            return True
        if not data:
            raise Unreachable("the connection was closed before the answer was whole")
        return False

    def _read_head(self) -> bool:
        end = self._bytes.find(b"\r\n\r\n", 0, MAX_HEAD)
        if not b"HTTP/1.".startswith(self._bytes[:7]) or end < 0 and len(self._bytes) >= MAX_HEAD:
            raise Unreachable("what answers there does not speak HTTP/1.1")
        if end < 0:
            return False
        first, *lines = bytes(self._bytes[:end]).decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or len(words[1]) != 3 or not words[1].isdecimal() or words[1] < "100":
            raise Unreachable("what answers there does not speak HTTP/1.1")
        self.status, self.headers = int(words[1]), {}
        for line in lines:
            name, colon, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if not colon or not name or name.strip() != name or self.headers.get(name, value) != value and name in (
                    "content-length", "transfer-encoding"):
                raise Unreachable("the answer's header is broken")
            self.headers[name] = value
        del self._bytes[:end + 4]
        return True

    def _read_body(self, ended: bool) -> bool:
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if self.status in (204, 304):
            return True
        if coding is not None:  # section 6.3: it overrides a length
            if coding.lower() != "chunked":
                raise Unreachable("the answer has a transfer coding that was not asked for")
            return self._read_chunks()
        if length is None:
            self.body = bytes(self._bytes) if ended else b""
            return ended
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise Unreachable("the answer's header is broken")
        self.body = bytes(self._bytes[:int(length)]) if len(self._bytes) >= int(length) else b""
        return len(self._bytes) >= int(length)

    def _read_chunks(self) -> bool:
        while (end := self._bytes.find(b"\r\n", 0, MAX_LINE)) >= 0:
            size = bytes(self._bytes[:end]).partition(b";")[0].strip()
            if not 0 < len(size) <= 8 or size.strip(b"0123456789abcdefABCDEF"):
                raise Unreachable("the answer's chunks are broken")
            start, stop = end + 2, end + 2 + int(size, 16)
            if start == stop:  # the last one; the trailer says nothing to us
                self.body = bytes(self._chunks)
                return True
            if len(self._bytes) < stop + 2:
                return False
            if self._bytes[stop:stop + 2] != b"\r\n":
                raise Unreachable("the answer's chunks are broken")
            self._chunks += self._bytes[start:stop]
            del self._bytes[:stop + 2]
        if len(self._bytes) >= MAX_LINE:
            raise Unreachable("the answer's chunks are broken")
        return False


def parse_url(url: str) -> tuple[str, int, str]:
    """(host, port, prefix of each path) of ``http://host:port/prefix``; (path, 0, "") of ``unix:///path``.  Raises
    ``Failure``."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return rest, 0, ""
    authority, _, prefix = rest.partition("/")
    host, colon, port = authority.rpartition(":") if not authority.endswith("]") else (authority, "", "")
    host = (host if colon else authority).removeprefix("[").removesuffix("]")
    port = port if colon else "80"
    if scheme == "https":
        raise Failure(f"{url}: ct speaks no TLS; set {URL} to the daemon's own http:// or unix:// address")
    if (scheme != "http" or not host or "@" in host or not url.isascii() or not url.isprintable()
            or set(url) & set(' ?#"<>\\') or not (port.isdigit() and 0 < int(port[:6]) < 65536)):
        raise Failure(f"{url!r} is no address of the API: set {URL}, or give --url, as http://HOST:PORT or unix:///PATH")
    return host, int(port), ("/" + prefix).rstrip("/")


class Api:
    """The daemon's HTTP API, one connection a request.  ``reached``: it has answered before."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.reached = url, False
        self._host, self._port, self._prefix = parse_url(url)
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self._head = (f" HTTP/1.1\r\nHost: {f'{shown}:{self._port}' if self._port else 'localhost'}\r\n"
                      f"Authorization: Bearer {token}\r\nAccept: application/json\r\nConnection: close\r\n")

    def _connect(self) -> _socket.socket:
        host = self._host
        if self._port:  # as bytes: for a str the codec for international names is imported, and ``re`` with it
            rows = _socket.getaddrinfo(host.encode("ascii"), self._port, 0, _socket.SOCK_STREAM)
            return self._connect_first([(row[0], row[4]) for row in rows])
        if len(os.fsencode(host)) < 104:
            return self._connect_first([(_socket.AF_UNIX, host)])
        directory = os.open(os.path.dirname(host), os.O_PATH | os.O_DIRECTORY)  # an address has 108 bytes (unix(7))
        try:
            return self._connect_first([(_socket.AF_UNIX, f"/proc/self/fd/{directory}/{os.path.basename(host)}")])
        finally:
            os.close(directory)

    def _connect_first(self, found: list) -> _socket.socket:
        for last, (family, address) in enumerate(found, 1 - len(found)):
            connection = _socket.socket(family, _socket.SOCK_STREAM)
            try:
                connection.settimeout(CONNECT_S)
                connection.connect(address)
                return connection
            except OSError:
                connection.close()
                if not last:
                    raise
        raise OSError("the host has no address")

    def exchange(self, request: bytes, timeout_s: float) -> Answer:
        """Send a request and read its answer, all within ``timeout_s``.  Raises ``Unreachable``."""
        deadline, answer = time.monotonic() + timeout_s, Answer()
        try:
            connection = self._connect()
        except (OSError, ValueError) as error:  # ValueError: a NUL in a path
            raise Unreachable(f"{getattr(error, 'strerror', None) or error}", sent=False) from None
        try:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection.sendall(request)
            except OSError:
                pass  # it may have refused a long body, and said why, before it closed
            while True:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                if answer.feed(connection.recv(1 << 16)):
                    break
        except TimeoutError:
            raise Unreachable(f"no whole answer came within {timeout_s:.0f} s") from None
        except OSError as error:
            raise Unreachable(f"the connection broke ({error.strerror})") from None
        finally:
            connection.close()
        return answer

    def call(self, method: str, path: str, document: dict | None = None, key: str = "",
             timeout_s: float = REQUEST_S) -> dict:
        """The document that the API answers.  Raises ``Failure``."""
        try:
            body = b"" if document is None else format_json(document).encode("utf-8")
        except UnicodeEncodeError:  # arguments and files were looked at already
            raise Failure(f"CLAUDOMATOR_PROJECT_DIR or {TASK} is not UTF-8: give --dir and --parent") from None
        head = f"{method} {self._prefix}{path}{self._head}" + (f"Idempotency-Key: {key}\r\n" if key else "")
        if method == "POST":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            answer = self.exchange(f"{head}\r\n".encode("latin-1") + body, timeout_s)
        except Unreachable as error:
            raise Unreachable(f"the Claudomator API at {self.url} cannot be reached: {error}; look whether the daemon"
                              f" runs (claudomator serve) and whether {URL} is right", error.sent) from None
        answered = parse_json(answer.body)
        if 200 <= answer.status < 300 and isinstance(answered, dict):
            self.reached = True
            return answered
        raise self._refusal(answer, answered.get("error") if isinstance(answered, dict) else None)

    def _refusal(self, answer: Answer, error: object) -> Failure:
        """What an answer means that is no success."""
        status = answer.status
        if not isinstance(error, dict):
            text, where = answer.body[:2000].decode("utf-8", "replace"), plain(answer.headers.get("location"), 200)
            message = (f"{self.url} redirects to {where}: set {URL} to the API's own address" if where else
                       f"{self.url} answered HTTP {status}, but not as Claudomator's API does: {plain(text, 120)!r};"
                       f" look whether {URL} is right, and whether a proxy stands in between")
            return Unreachable(message) if status in (429, 502, 503, 504) else Failure(
                message, "unreachable", EXIT_UNREACHABLE)
        message = plain(error.get("message"), 2000) or f"the API answered HTTP {status}"
        problems = error.get("problems") if isinstance(error.get("problems"), list) else []
        message += "".join(f"\n  {line}" for line in map(plain, problems[:20]) if line and line not in message)
        code = plain(error.get("code"), 50) or "refused"
        if status in (429, 502, 503, 504):
            return Unreachable(f"{message}; try again")
        if status == 401:
            message += f"; {TOKEN} is wrong or its run is over: outside of a task give --token-file FILE"
        elif status == 403:
            message += "; a task's token reaches that task and its subtasks, and nothing else (ct task list)"
        elif status == 404:
            message += "; ct task list shows the tasks that you can reach"
        return Failure(message, code, EXIT_REFUSED if status in (401, 403, 404, 409) else
                       EXIT_USAGE if status < 500 else EXIT_UNREACHABLE)

    def persist(self, method: str, path: str, waiting: bool = False, deadline: float = 1e18, **more: object) -> dict:
        """``call`` something that does no harm twice: again where it was cut, and for a wait also where nobody listens,
        with growing pauses, until the daemon is back."""
        give_up, pause_s = 0.0, PAUSE_S
        while True:
            try:
                return self.call(method, path, **more)
            except Unreachable as error:
                now = time.monotonic()
                if not give_up:
                    lasting_s = (RESTART_S if self.reached else FIRST_S) if waiting else RESEND_S if error.sent else 0
                    give_up = min(now + lasting_s, deadline)
                    if now < give_up:
                        note(f"{error}; trying again for {give_up - now:.0f} s")
                if now >= give_up:
                    raise Failure(f"{error}; --timeout is over", "timeout", EXIT_TIMEOUT) if now >= deadline else error
                time.sleep(min(pause_s, give_up - now))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def task_in(answered: dict) -> dict:
    """The first task of an answer.  Raises ``Failure`` where there is none."""
    tasks = answered.get("tasks", [answered.get("task")])
    task = tasks[0] if isinstance(tasks, list) and tasks else None
    if not isinstance(task, dict) or not plain(task.get("id")) or not plain(task.get("state")):
        raise Failure("the API's answer holds no task: this ct and the daemon are of different versions; install both"
                      " from the same place", "bad_answer", EXIT_UNREACHABLE)
    return task


class Ct:
    """One call: its options (``self.name`` ...), arguments and environment."""

    def __init__(self, options: dict, arguments: list, environ: dict) -> None:
        self.__dict__.update(options)
        self.arguments, self.environ = arguments, environ
        self.timeout_s = None if self.timeout is None else parse_seconds(self.timeout)

    def api(self) -> Api:
        """The API that the environment or the options name.  Raises ``Failure`` where one of them is missing."""
        url, token = self.url or self.environ.get(URL, ""), self.environ.get(TOKEN, "")
        if self.token_file:
            token = read_text(self.token_file, 1 << 12).strip()
        missing = [name for name, value in ((URL, url), (TOKEN, token)) if not value]
        if missing:
            raise Failure(f"{' and '.join(missing)} not set: Claudomator sets them in the environment of its tasks; outside"
                          " of one give --url http://127.0.0.1:8484 --token-file ~/.claudomator/api-token")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise Failure(f"the token holds characters that no token has: correct {TOKEN} or the file of --token-file")
        return Api(url, token)

    def waiting_api(self) -> Api:
        """The same, of a command that has --wait."""
        if self.timeout is not None and not self.wait:
            raise Failure("--timeout bounds --wait: add --wait, or give a task itself a time limit (ct task submit --limit)")
        return self.api()

    def ids(self) -> list[str]:
        """The ids among the arguments, fit for a path.  Raises ``Failure``."""
        for task_id in self.arguments:
            if not (task_id.isascii() and task_id.replace("-", "").replace("_", "").isalnum()):
                raise Failure(f"{task_id!r} is no task id: ct task list shows the ids")
        return self.arguments

    def show(self, document: dict, text: str) -> None:
        """Print a result: as JSON where asked for, else as text."""
        write(1, (format_json(document) if self.json else text) + "\n")

    def document(self) -> dict:
        """The subtask as a task file has it.  Raises ``Failure``."""
        if (self.instructions is None) == (self.file is None):
            raise Failure("say what to do, in one way: --instructions TEXT, --instructions - (stdin) or --file FILE")
        text = self.instructions
        if text is None or text == "-":
            text = read_text(self.file or "-", MAX_TEXT)
        if not text.strip():
            raise Failure("the instructions are empty: write what the subtask is to do")
        try:
            budget = float(self.budget or BUDGET_USD)
        except ValueError:
            budget = 0.0
        if not 0 < budget < 1e9:
            raise Failure(f"--budget {self.budget}: expected USD above 0, like 1.50")
        kind = self.agent or "claude"
        agent = {"type": kind, "model": self.model or (MODEL if kind == "claude" else ""), "instructions": text,
                 "max_budget_usd": budget, "project_dir": self.dir or self.environ.get("CLAUDOMATOR_PROJECT_DIR", "")}
        parent = self.environ.get(TASK, "") if self.parent is None else self.parent
        task = {"name": self.name or plain(text.strip().splitlines()[0], 80), "parent_task_id": parent, "tags": self.tag,
                "timeout": self.limit, "agent": {name: value for name, value in agent.items() if value}}
        return {name: value for name, value in task.items() if value}

    def create(self, queue: bool) -> int:
        """Create a task; prints its id, or with --wait what became of it."""
        api, document = self.waiting_api(), self.document()
        answered = api.persist("POST", "/api/tasks", document={"tasks": document, "queue": queue}, key=os.urandom(16).hex())
        task_id = plain(task_in(answered)["id"])
        if not self.wait:
            self.show(answered, task_id)
            return EXIT_OK
        note(f"task {task_id} is queued; waiting for it")
        return self.report(api, [task_id])

    def run(self) -> int:
        """Queue tasks; prints their ids."""
        api, tasks = self.waiting_api(), []
        for task_id in self.ids():
            try:
                tasks.append(task_in(api.call("POST", f"/api/tasks/{task_id}/run")))
            except Unreachable as error:
                raise Failure(f"{error}; before another try see: ct task status {task_id}", error.code,
                              error.exit_code) from None
        ids = [plain(task["id"]) for task in tasks]
        if self.wait:
            return self.report(api, ids)
        self.show({"tasks": tasks}, "\n".join(ids))
        return EXIT_OK

    def report(self, api: Api, ids: list[str]) -> int:
        """Wait for tasks; prints their states, and on stderr what there is to say.  Returns the exit code."""
        deadline = 1e18 if self.timeout_s is None else time.monotonic() + self.timeout_s
        if len(ids) > 1:
            for task_id in ids:  # so that a wrong id is told now, not when the others have ended
                api.persist("GET", f"/api/tasks/{task_id}", waiting=True, deadline=deadline)
        tasks, codes = [], set()
        for task_id in ids:
            task, is_over = wait_for(api, task_id, deadline)
            state = plain(task["state"])
            tasks.append(task)
            codes.add(EXIT_TIMEOUT if not is_over else EXIT_FAILED if state in FAILED_STATES else
                      EXIT_BLOCKED if state == "BLOCKED" else EXIT_OK)
            if not self.json:
                write(1, (f"{plain(task['id'])} " if len(ids) > 1 else "") + state + "\n")
            for line in () if self.json else remarks(task, is_over):
                note(line)
        if self.json:
            write(1, format_json({"tasks": tasks, "timed_out": EXIT_TIMEOUT in codes}) + "\n")
        return next(code for code in (EXIT_FAILED, EXIT_BLOCKED, EXIT_TIMEOUT, EXIT_OK) if code in codes)

    def status(self) -> int:
        """Print one task."""
        answered = self.api().persist("GET", f"/api/tasks/{self.ids()[0]}")
        task = task_in(answered)
        subtasks = answered.get("subtasks") if isinstance(answered.get("subtasks"), list) else []
        lines = [f"{label:9}{plain(task.get(label), 4000)}" for label in ("id", "name", "state")]
        lines += [f"subtask  {row(child)}" for child in subtasks if isinstance(child, dict)]
        self.show(answered, "\n".join(lines + remarks(task, True)[1:]))
        return EXIT_OK

    def list(self) -> int:
        """Print tasks, newest first."""
        if len(self.tag) > 1:
            raise Failure("task list takes one --tag: leave the others out")
        asked = {"state": (self.state or "").upper(), "tag": "".join(self.tag), "parent": self.parent,
                 "limit": self.max or "20", "before": self.before}
        query = "&".join(f"{name}={quoted(value)}" for name, value in asked.items() if value)
        answered = self.api().persist("GET", f"/api/tasks?{query}")
        tasks = answered.get("tasks")
        if not isinstance(tasks, list):
            task_in({})
        lines = [row(task) for task in tasks if isinstance(task, dict)]
        if self.json or lines:
            self.show(answered, "\n".join(lines))
        else:
            note("no such tasks")
        if isinstance(answered.get("next"), int) and not self.json:
            note(f"there are more: add --before {answered['next']}")
        return EXIT_OK

    def ask(self) -> int:
        """Put a question into the question file."""
        text = self.words("question")
        if not self.option and "?" not in text and "\uff1f" not in text:
            text += " ?"  # without options and a question mark it would be taken for a report
        question = format_json({"text": text, "options": self.option})
        if len(question.encode("utf-8")) > MAX_FILE:
            raise Failure(f"the question is longer than {MAX_FILE >> 10} KiB: shorten it, and put the rest into a file")
        self.leave("CLAUDOMATOR_QUESTION_FILE", question)
        self.show({"question": {"text": text, "options": self.option}},
                  "The question is recorded. Stop now, without doing anything else: you will be resumed with the answer.")
        return EXIT_OK

    def summary(self) -> int:
        """Put a summary into the summary file."""
        text = self.words("summary")
        self.leave("CLAUDOMATOR_SUMMARY_FILE", text + "\n")
        if len(text.encode("utf-8")) > KEPT_SUMMARY:
            note(f"only the first {KEPT_SUMMARY} bytes of a summary are kept; write a shorter one to replace it")
        self.show({"summary": text}, "The summary is recorded.")
        return EXIT_OK

    def words(self, what: str) -> str:
        """The text that is the argument, or stdin's.  Raises ``Failure`` where it is empty."""
        text = (read_text("-", MAX_TEXT) if self.arguments[0] == "-" else self.arguments[0]).strip()
        if not text:
            raise Failure(f"the {what} is empty: write it as one argument in quotes, or - to read it from stdin")
        return text

    def leave(self, variable: str, text: str) -> None:
        """Write the file that a variable names, whole or not at all.  Raises ``Failure``."""
        path = self.environ.get(variable)
        if not path:
            raise Failure(f"{variable} is not set: Claudomator sets it in the environment of its tasks; this is none")
        try:
            with open(os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(text.encode("utf-8"))
            os.replace(f"{path}.new", path)
        except OSError as error:
            raise Failure(f"{path} cannot be written ({error.strerror}): say it in your last message instead, and stop",
                          "io", EXIT_IO) from None


def read_text(path: str, limit: int) -> str:
    """A file, or stdin for ``-``, as text.  Raises ``Failure`` where it is no UTF-8 or longer than ``limit`` bytes."""
    try:
        with open(0 if path == "-" else os.path.expanduser(path), "rb", closefd=path != "-") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise Failure(f"{path} is longer than {limit} bytes: shorten it, and name a file where the rest is to be read")
        return data.decode("utf-8")
    except (OSError, ValueError) as error:
        words = "it is not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        raise Failure(f"{path} cannot be read ({words}): correct the path or the file") from None


def quoted(value: str) -> str:
    """A value as a query of a URL holds it."""
    safe = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~"
    return "".join(chr(byte) if byte in safe else f"%{byte:02X}" for byte in value.encode("utf-8"))


def row(task: dict) -> str:
    """One task as a line of a list."""
    return f"{plain(task.get('id'))[:8]:8}  {plain(task.get('state'), 20):15}  {plain(task.get('name'), 100)}".rstrip()


def remarks(task: dict, is_over: bool) -> list[str]:
    """What there is to say of a task: its state and why, then question, summary and cost."""
    state, task_id, reason = plain(task["state"]), plain(task["id"]), plain(task.get("reason"))
    why = ": ".join(filter(None, (reason, plain(task.get("detail")) or plain(task.get("why")))))
    hint = "" if is_over else f"; wait on with: ct task wait {task_id}"
    lines = [f"{task_id[:8]} {plain(task.get('name'), 80)}: {'' if is_over else 'still '}{state}{hint}"]
    question, run = task.get("question"), task.get("execution")
    asked = question if isinstance(question, dict) else {}
    options = asked.get("options") if isinstance(asked.get("options"), list) else []
    cost = run.get("cost_usd") if isinstance(run, dict) else None
    facts = {"why": why, "question": plain(asked.get("text"), 4000), "options": " | ".join(map(plain, options[:50])),
             "summary": plain(task.get("summary"), 4000), "cost": f"${cost:.2f}" if isinstance(cost, (int, float)) else ""}
    return lines + [f"{label:9}{text}" for label, text in facts.items() if text]


def wait_for(api: Api, task_id: str, deadline: float) -> tuple[dict, bool]:
    """(task, whether it is over): long polls until it is, or until ``deadline`` on the monotonic clock.  The daemon may
    restart meanwhile.  Raises ``Failure``."""
    warned, pause_s = False, PAUSE_S
    while True:
        began = time.monotonic()
        left_s = max(0, int(min(POLL_S, deadline - began)))
        answered = api.persist("GET", f"/api/tasks/{task_id}/wait?timeout_s={left_s}", waiting=True, deadline=deadline,
                               timeout_s=left_s + REQUEST_S)
        task, now = task_in(answered), time.monotonic()
        asks = task.get("question") or answered.get("timed_out") is False
        if task["state"] in ("COMPLETED", "READY", *FAILED_STATES) or task["state"] == "BLOCKED" and asks:
            return task, True
        if now >= deadline:
            return task, False
        if task["state"] == "PENDING" and not warned:
            note(f"{task_id} is PENDING, nothing runs it: ct task run {task_id} queues it")
            warned = True
        if now - began < min(left_s, 1) or not left_s:  # a server that answers at once is not to be hammered
            time.sleep(min(pause_s, max(deadline - now, 0)))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


EVERYWHERE = {"--url": ("URL", f"the API's address; else {URL}: http://HOST:PORT or unix:///PATH"),
              "--token-file": ("FILE", f"a file that holds the token; else {TOKEN}"),
              "--json": ("", "one JSON document on stdout, for errors too"), "--help": ("", "this text")}
WAITING = {"--wait": ("", "wait for the end; print the state it ended in"),
           "--timeout": ("D", "wait no longer than this: 600 (seconds), 15m, 1h30m")}
CREATING = {
    "--name": ("NAME", "its name; else the first line of the instructions"),
    "--instructions": ("TEXT", "what to do; - reads stdin"), "--file": ("FILE", "or a file that says it; - reads stdin"),
    "--model": ("MODEL", f"else {MODEL} for claude, the agent's own for others"),
    "--budget": ("USD", f"most that a run may cost; else {BUDGET_USD:.2f}"),
    "--agent": ("KIND", "claude (default), gemini, local, shell or a configured runner"),
    "--parent": ("ID", f"the task it is part of; else {TASK}; an empty one: none"),
    "--dir": ("DIR", "the repository to work on; else CLAUDOMATOR_PROJECT_DIR"),
    "--limit": ("D", "time limit of the task itself"), "--tag": ("TAG", "a tag; may be repeated")}
LISTING = {"--state": ("STATE", "only these"), "--tag": ("TAG", "only with this tag"),
           "--parent": ("ID", "only subtasks of this task"), "--max": ("N", "so many; else 20"),
           "--before": ("N", "go on where a list ended")}
COMMANDS = {  # name: (what to do, arguments, help, options, least and most arguments)
    "task create": (lambda ct: ct.create(False), "", "create a subtask and leave it PENDING; prints its id", CREATING, 0, 0),
    "task submit": (lambda ct: ct.create(True), "", "create a subtask and queue it; prints its id", {**CREATING, **WAITING},
                    0, 0),
    "task run": (Ct.run, "ID...", "queue tasks, or run ended ones again; prints their ids", WAITING, 1, 1000),
    "task wait": (lambda ct: ct.report(ct.api(), ct.ids()), "ID...", "wait for the end; prints the state it ended in",
                  {"--timeout": WAITING["--timeout"]}, 1, 1000),
    "task status": (Ct.status, "ID", "one task: state, question, summary, subtasks", {}, 1, 1),
    "task list": (Ct.list, "", "the tasks that you can reach, newest first", LISTING, 0, 0),
    "ask": (Ct.ask, "TEXT|-", "ask a person; then stop", {"--option": ("TEXT", "a possible answer; may be repeated")}, 1, 1),
    "summary": (Ct.summary, "TEXT|-", "say what was done, in 2 to 5 sentences", {}, 1, 1),
}
LISTS = ("--tag", "--option")
ENDING = """
exit codes: 0 done (COMPLETED, or READY for a person), 1 FAILED and the like, 2 BLOCKED: it asks something,
  3 refused: not found, wrong state, not allowed, 4 the API is unreachable, 64 wrong usage, 74 a file cannot be
  written, 124 --timeout is over, 130 interrupted
an ID may be cut to any unique beginning"""
EXAMPLE = """
  ct task submit --name "Fix tests" --instructions "Run the tests and fix what fails." --wait
  ID=$(ct task submit --file subtask.txt); ct task wait "$ID" --timeout 30m
  ct ask "Which database?" --option PostgreSQL --option SQLite
  ct summary "Fixed the divisor; all tests pass." """


def help_text(name: str) -> str:
    """The help of a command, or of all that begin with ``name``."""
    if name not in COMMANDS:
        lines = [f"  ct {f'{full} {command[1]}':22}{command[2]}" for full, command in COMMANDS.items()
                 if full.startswith(name)]
        return "\n".join(["ct: subtasks, a question, a summary, from inside a task of Claudomator", *lines,
                          "ct COMMAND --help lists a command's options", EXAMPLE.rstrip(), ENDING])
    _, usage, text, options, _, _ = COMMANDS[name]
    lines = [f"  {f'{option} {value}':22}{help_}" for option, (value, help_) in {**options, **EVERYWHERE}.items()]
    return "\n".join([f"usage: ct {name} [OPTIONS] {usage}".rstrip(), f"  {text}", *lines, ENDING])


def hint(word: str, known: list) -> str:
    """The nearest of the known words, as the end of a sentence."""
    import difflib
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def parse_arguments(words: list[str], name: str) -> tuple[dict, list[str]]:
    """(every option's value, arguments).  Raises ``Failure``."""
    known = {**COMMANDS[name][3], **EVERYWHERE}
    given, arguments, rest = {}, [], iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if word == "--":
            arguments += rest
        elif word == "-" or not word.startswith("-"):
            arguments.append(word)
        elif option not in known:
            raise Failure(f"ct {name} has no option {option}{hint(option, list(known))}; see ct {name} --help")
        elif not known[option][0]:
            if equals:
                raise Failure(f"{option} takes no value")
            given[option] = True
        else:
            value = value if equals else next(rest, None)
            if value is None:
                raise Failure(f"{option} needs a value: {option} {known[option][0]} ({known[option][1]})")
            given[option] = [*given.get(option, ()), value] if option in LISTS else value
    every = {**CREATING, **WAITING, **LISTING, **EVERYWHERE, "--option": ()}
    return {option[2:].replace("-", "_"): given.get(option, [] if option in LISTS else None) for option in every}, arguments


def dispatch(words: list[str], environ: dict) -> int:
    """Run a command line; returns the exit code.  Raises ``Failure``."""
    first = next((at for at, word in enumerate(words[:2]) if word.startswith("-")), 2)
    named = words[:first]
    name = next((name for name in (" ".join(named), *named[:1]) if name in COMMANDS), "")
    if not name:
        group = "task " if named[:1] == ["task"] else ""
        if "--help" in words or "-h" in words or not words or words == ["task"]:
            write(1 if words not in ([], ["task"]) else 2, help_text(group) + "\n")
            return EXIT_OK if words not in ([], ["task"]) else EXIT_USAGE
        if named in ([], ["task"]):
            raise Failure(f"options come behind the command: ct task list {words[first]}; see ct --help")
        known = [full.removeprefix(group) for full in COMMANDS] + ["task"]
        word = named[bool(group)]
        raise Failure(f"there is no command ct {group}{word}{hint(word, known)}; see ct --help")
    rest = words[len(name.split()):]
    if "-h" in rest or "--help" in rest:
        write(1, help_text(name) + "\n")
        return EXIT_OK
    options, arguments = parse_arguments(rest, name)
    run, usage, _, _, least, most = COMMANDS[name]
    if not least <= len(arguments) <= most:
        raise Failure(f"usage: ct {name} [OPTIONS] {usage}".rstrip() + f" (got {len(arguments)} arguments; a text with"
                      " spaces needs quotes)")
    return run(Ct(options, arguments, environ))


def main() -> int:
    """The command line; returns the exit code."""
    as_json = "--json" in sys.argv
    try:
        try:
            words = [os.fsencode(word).decode("utf-8") for word in sys.argv[1:]]
        except UnicodeDecodeError:
            raise Failure("an argument is not UTF-8: write the text to a file in UTF-8 and give --file or -") from None
        return dispatch(words, dict(os.environ))
    except Failure as failure:
        error, code = failure, failure.exit_code
    except KeyboardInterrupt:
        error, code = Failure("interrupted; what was queued goes on (ct task list)", "interrupted"), EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_OK  # the reader of our output has left
    except OSError as failure:
        error, code = Failure(f"stdout cannot be written: {failure.strerror}", "io"), EXIT_IO
    try:
        if as_json:
            write(1, format_json({"error": {"code": error.code, "message": str(error)}}) + "\n")
        else:
            note(str(error))
    except OSError:
        pass
    return code


if __name__ == "__main__":
    os._exit(main())  # all is written; taking the interpreter down costs a tenth of a call
