"""Section 19, the model server's client: against a real HTTP server on loopback that misbehaves as told."""
import io
import os
import socket
import ssl
import subprocess
import sys
import threading
import time

import claudomator as c
import pytest
from tests import support
from tests.fakes import chat_server

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@pytest.fixture
def server():
    with chat_server.StandIn() as stand_in:
        yield stand_in


def ask(endpoint, **more):
    """(text as it came, reader)."""
    reader = c.ChatReader()
    return "".join(c.ask_model(reader, endpoint, BODY, **more)), reader


@pytest.mark.parametrize("scenario, text, tokens", [
    ("text", chat_server.ANSWER, (11, 7)), ("crlf", "one two", (11, 7)), ("no_done", "no done", (11, 7)),
    ("document", "not streamed", (11, 7)), ("recorded", " to read" + " has done" * 11, (100, 24))])
def test_good_answers(server, scenario, text, tokens):
    server.say(scenario)
    said, reader = ask(server.endpoint)
    assert (said, reader.text(), reader.fault) == (text, text, None)
    assert (reader.tokens_in, reader.tokens_out) == tokens


def test_the_request_is_a_streaming_chat_completion_that_asks_for_usage(server):
    ask(server.endpoint + "/", api_key="sk-1")
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    assert request["headers"]["Authorization"] == "Bearer sk-1"
    assert request["headers"]["Content-Type"] == "application/json"
    ask(server.endpoint)
    assert "Authorization" not in server.requests[1]["headers"]


@pytest.mark.parametrize("scenario, kind, status, words", [
    ("error_500", "server_error", 500, "Internal Server Error"),
    ("no_model", "model_not_found", 404, "pulling it first"),
    ("too_long", "invalid_request", 400, "shorten it"), ("redirect", "invalid_request", 302, "redirects"),
    ("limit_429", "rate_limit", 429, "Too many"), ("busy_503", "overloaded", 503, "Loading model"),
    ("mid_error", "server_error", 500, "slot is gone"), ("drop", "unknown", None, "before its answer was whole"),
    ("drop_at_once", "unknown", None, "before its answer was whole")])
def test_faults(server, scenario, kind, status, words):
    server.say(scenario)
    said, reader = ask(server.endpoint)
    assert (reader.fault.kind, reader.fault.status) == (kind, status) and words in reader.fault.message
    assert said == ("half of" if scenario in ("mid_error", "drop") else "")
    assert len(server.requests) == 1  # the queue does the waiting, and no redirect is followed


@pytest.mark.parametrize("scenario", ["limit_429", "busy_503"])
def test_retry_after_becomes_a_time(server, scenario):
    server.retry_after_s = 30
    server.say(scenario)
    assert 27 < ask(server.endpoint)[1].fault.retry_at - time.time() < 31


def test_an_error_whose_text_breaks_off_between_two_chunks_is_told_by_its_status():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer():
            client = listener.accept()[0]
            with client:
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nupS\r\n")
        server = threading.Thread(target=answer)
        server.start()
        fault = ask(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout_s=5)[1].fault
        server.join()
    assert (fault.kind, fault.status, fault.message) == ("server_error", 502, "Bad Gateway")


def test_a_path_that_the_server_does_not_have(server):
    fault = ask(server.endpoint.removesuffix("/v1"))[1].fault
    assert fault.status == 404 and "mostly ends in /v1" in fault.message


def test_a_refused_connection_says_what_to_do():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    words = f"no model server listens at {endpoint}: start it, or correct [local_model] endpoint"
    assert ask(endpoint + "/v1")[1].fault == c.ChatFault("unknown", words)
    assert "secret" not in ask(endpoint.replace("//", "//user:secret@"))[1].fault.message


@pytest.mark.parametrize("endpoint", [
    "http://[::1", "http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1", "http:///v1", "http://",
                                      "http://no-such-host.invalid/v1", "https://127.0.0.1:1/v1"])
def test_endpoints_that_lead_nowhere_are_faults(endpoint):
    fault = ask(endpoint, timeout_s=5)[1].fault
    assert fault.kind == "unknown" and fault.message


def test_an_error_without_an_error_inside_is_named_by_its_own_kind():
    broken = ssl.SSLError(1, "bad record")
    broken.reason = "BAD_RECORD"  # as it is while an answer is read
    for error, words in ((UnicodeEncodeError("ascii", "ü", 0, 1, "why"), "cannot be asked: UnicodeEncodeError"),
                         (broken, "TLS with http://x fails: BAD_RECORD"), (ssl.SSLError(), "fails: no reason given")):
        assert words in c.connection_fault(error, "http://x/v1", 1.0).message


@pytest.mark.parametrize("key", ["sk-two\nlines", "sk-ü", "sk-\0"])
def test_a_key_that_no_header_can_hold_is_not_shown(server, key):
    fault = ask(server.endpoint, api_key=key)[1].fault
    assert fault.kind == "authentication_failed" and "sk-" not in fault.message and not server.requests


def test_a_wrong_key_is_not_repeated_from_the_servers_error(server):
    server.api_key = "right"
    fault = ask(server.endpoint, api_key="sk-wrong-key")[1].fault
    assert fault.kind == "authentication_failed" and "sk-wrong-key" not in fault.message and "***" in fault.message
    assert ask(server.endpoint, api_key="right")[1].fault is None


@pytest.mark.slow
def test_silence_is_bounded_between_chunks_and_a_slow_stream_is_not(server):
    server.say("silent")
    start = time.monotonic()
    said, reader = ask(server.endpoint, timeout_s=0.3)
    assert said == "first" and "sent nothing for 0.3s" in reader.fault.message and time.monotonic() - start < 5
    server.say("slow")
    threading.Timer(1.5, server.release.set).start()
    assert ask(server.endpoint, timeout_s=1.2)[1].fault is None


def test_a_server_that_takes_no_connection_is_a_timeout():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        fault = ask(f"http://127.0.0.1:{full.getsockname()[1]}/v1", timeout_s=0.3)[1].fault
        assert "sent nothing" in fault.message
        for one in waiting:
            one.close()


def test_a_limit_on_the_whole_answer_ends_one_that_never_ends(server):
    server.say("slow")
    start = time.monotonic()
    fault = ask(server.endpoint, limit_s=0.3)[1].fault
    assert fault.message.endswith("took longer than the 0.3s that it has for this") and time.monotonic() - start < 5
    assert server.dropped.wait(10)


def test_silence_up_to_the_limit_is_no_fault_of_the_configuration(server):
    server.say("silent")
    for timeout_s, limit_s, words in ((60, 0.3, "took longer than the 0.3s"), (0.1, 30, "sent nothing for 0.1s")):
        answer, why = c.ask_briefly(settings(server.endpoint, timeout_seconds=timeout_s), BODY["messages"], 9, limit_s)
        assert answer == "" and words in why and ("timeout_seconds" in why) == (timeout_s < limit_s)


def test_loopback_is_asked_without_the_environments_proxy_and_others_through_it(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert ask(server.endpoint)[0] == chat_server.ANSWER
    assert ask(server.endpoint.replace("127.0.0.1", "localhost"))[1].fault is None
    proxy = server.endpoint.removesuffix("/v1")
    monkeypatch.setenv("http_proxy", proxy)
    assert ask("http://model.example/v1")[1].fault.status == 404
    assert server.requests[-1]["path"].startswith("http://model.example/")


@pytest.mark.parametrize("url, expected", [
    ("http://localhost:1/v1", True), ("http://127.9.9.9/v1", True), ("http://[::1]:1/v1", True),
    ("http://0.0.0.0/", True),
    ("http://a.localhost/", True), ("http://LOCALHOST/", True), ("http://localhost.example/", False),
    ("http://10.0.0.1/", False),
    ("http://127.0.0.1.example/", False), ("http://127.0.0.1@evil.example/", False)])
def test_what_is_loopback(url, expected):
    assert c.is_loopback_url(url) == expected


MEMORY = r"""
import resource, sys
sys.path.insert(0, sys.argv[1])
import claudomator as c
reader = c.ChatReader()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
list(c.ask_model(c.ChatReader(), sys.argv[2] + "/none", {"messages": [{"content": ""}]}))
before = peak()
size = sum(map(len, c.ask_model(reader, sys.argv[2], {"messages": [{"content": sys.argv[3]}]})))
print(size, peak() - before, reader.fault)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["huge", "endless_line"])
def test_a_hundred_megabytes_take_bounded_memory(server, scenario):
    command = [sys.executable, "-c", MEMORY, str(support.PROGRAM.parent), server.endpoint, f"SCENARIO: {scenario}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    size, grown_kb, fault = done.stdout.split(maxsplit=2)
    assert int(grown_kb) < 40_000, done.stdout
    assert fault == "None\n" and int(size) > 400_000 if scenario == "huge" else "longer than" in fault, done.stdout


# -- the agent's process and the summary


def test_the_process_writes_claudes_envelope(server):
    sink = io.BytesIO()
    request = {"endpoint": server.endpoint, "timeout_s": 5, "body": BODY}
    code = c.run_local_agent(io.BytesIO(c.format_json(request).encode()), sink, {"CLAUDOMATOR_EXECUTION_ID": "run-1"})
    lines = [c.parse_json(line) for line in sink.getvalue().splitlines()]
    kinds = [line["type"] for line in lines]
    assert code == 0 and set(kinds[1:-2]) == {"stream_event"}
    assert (kinds[0], *kinds[-2:]) == ("system", "assistant", "result")
    pieces = [line["event"]["delta"]["text"] for line in lines if line["type"] == "stream_event"]
    assert "".join(pieces) == lines[-2]["message"]["content"][0]["text"] == chat_server.ANSWER
    assert {line["session_id"] for line in lines} == {"run-1"}
    assert all(line.startswith(b'{"type":"') for line in sink.getvalue().splitlines())  # the log reader looks at that


def test_the_program_itself_is_the_process_and_asks_for_nothing_but_stdin(server, tmp_path):
    request = {"endpoint": server.endpoint, "timeout_s": 5, "body": BODY}
    done = subprocess.run([*c.PROGRAM, "_local"], capture_output=True, env={},
                          input=c.format_json(request).encode(), cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    assert c.parse_json(done.stdout.splitlines()[-1])["is_error"] is False
    assert not os.listdir(tmp_path)


def settings(endpoint, **more):
    return c.LocalModelSettings(endpoint=endpoint, model="m", **more)


def test_a_summary_is_of_the_end_of_the_text(server):
    server.say("plain")
    assert c.summarize(settings(server.endpoint), "begin" + "é" * 20_000 + " end") == "It was summed up."
    body = server.requests[0]["body"]
    said = body["messages"][-1]["content"]
    assert said.endswith("é end") and "begin" not in said and len(said.encode()) <= 1 << 14
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", c.SUMMARY_TOKENS, 0.2)


@pytest.mark.parametrize("scenario", ["error_500", "drop", "mid_error", "redirect", "limit_429", "only_thoughts"])
def test_no_summary_where_the_model_fails(server, scenario):
    server.say(scenario)
    assert c.summarize(settings(server.endpoint), "text") == ""


@pytest.mark.parametrize("scenario", ["slow", "silent"])
def test_a_summary_takes_no_longer_than_its_limit(server, scenario, monkeypatch):
    monkeypatch.setattr(c, "SUMMARY_S", 0.3)
    server.say(scenario)
    start = time.monotonic()
    assert c.summarize(settings(server.endpoint), "text") == "" and time.monotonic() - start < 3
