"""Section 09: server-sent events and chat completions, recorded ones and hostile bytes."""
import http.client
import io
import json
import pathlib
import random

import claudomator as c
import pytest

DATA = pathlib.Path(__file__).parent / "data"
STREAMS = ["llamacpp/stream_usage", "llamacpp/stream_nousage", "litellm/mock-gpt.stream", "litellm/tiny.stream"]
ANSWERS = [*STREAMS, "llamacpp/nonstream", "litellm/mock-gpt.nonstream"]
NOW = 1_795_000_000.0


def recorded(name: str) -> tuple[int, bytes]:
    """(HTTP status, body) of a recorded answer."""
    class Connection(io.BytesIO):
        def makefile(self, mode):
            return self
    answer = http.client.HTTPResponse(Connection((DATA / f"{name}.resp").read_bytes()))
    answer.begin()
    return answer.status, answer.read()


def events_of(*pieces: bytes, limit=c.MAX_SSE_EVENT) -> list[tuple[str, str]]:
    decoder = c.SseDecoder(limit)
    return [(event.type, event.data) for piece in pieces for event in decoder.feed(piece)]


def read(*pieces: bytes) -> tuple[str, c.ChatReader]:
    """(the text as it came, the reader at the end)."""
    reader = c.ChatReader()
    text = "".join([reader.feed(piece) for piece in pieces])
    text += reader.finish()
    return text, reader


def facts(reader: c.ChatReader) -> tuple:
    return reader.text(), reader.model, reader.finish_reason, reader.tokens_in, reader.tokens_out, reader.fault


def chunk(content=None, finish=None, **more) -> bytes:
    delta = {} if content is None else {"content": content}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    record = {"object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: " + json.dumps(record).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


# -- server-sent events

EXAMPLES = [  # WHATWG HTML, section 9.2.6
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10")]),
    (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
     [("message", "first event"), ("message", "second event"), ("message", " third event")]),
    (b"data\n\ndata\ndata\n\ndata:", [("message", ""), ("message", "\n")]),
    (b"data:test\n\ndata: test\n\n", [("message", "test"), ("message", "test")]),
    (b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
     [("add", "73857293"), ("remove", "2153"), ("add", "113411")]),
]
MORE = [
    (b"\xef\xbb\xbfdata: x\n\n", [("message", "x")]), (b"\xef\xbb\xbf\xef\xbb\xbfdata: x\n\n", []),
    (b"data: a\rdata: b\r\rdata: c\r\n\r\n", [("message", "a\nb"), ("message", "c")]),
    (b"data: a\r\n\n", [("message", "a")]), (b"data: a\n\rdata: b\n\n", [("message", "a"), ("message", "b")]),
    ("data: a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\n\n".encode(), [("message", "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg")]),
    ("data: é€😀\r\n\r\n".encode(), [("message", "é€😀")]),
    (b"data: \xff\xf0\x9f\n\n", [("message", "\ufffd\ufffd")]),
    (b"event: x\n\ndata: 1\n\n", [("message", "1")]), (b"event: x\nevent\ndata: 1\n\n", [("message", "1")]),
    (b" data: 1\n\nDATA: 2\n\ndata : 3\n\nretry: 10\n\n:\n\n", []), (b"data: cut off\n", []), (b"", []),
    (b"\n\r\n\r", []),
    (b"data:: x: y\n\n", [("message", ": x: y")]), (b"data: a\x00b\n\n", [("message", "a\x00b")]),
]


@pytest.mark.parametrize("data, expected", EXAMPLES + MORE)
def test_events_are_the_same_however_the_bytes_come(data, expected):
    assert events_of(data) == expected
    assert events_of(*(data[at:at + 1] for at in range(len(data)))) == expected
    for at in range(len(data) + 1):
        assert events_of(data[:at], b"", data[at:]) == expected


def test_a_crlf_that_is_cut_in_the_middle_is_one_line_end():
    assert events_of(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [("message", "a\nb")]
    assert events_of(b"data: a\r", b"\r", b"data: b\r\r") == [("message", "a"), ("message", "b")]


@pytest.mark.parametrize("line, word", [(b"data: " + b"x" * 100, "line"), (b":" + b"x" * 100, "line"),
                                        (b"data: x\n" * 30, "event")])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_more_than_the_limit_is_refused_before_it_fills_the_memory(line, word, size):
    stream = line * 3 + b"\n\n"
    with pytest.raises(c.StreamError, match=f"{word} of the"):
        events_of(*(stream[at:at + size] for at in range(0, len(stream), size)), limit=100)
    assert events_of(b"data: " + b"x" * 90 + b"\n\n", b":" + b"y" * 90 + b"\n", limit=100) == [("message", "x" * 90)]


def test_comments_without_end_take_no_memory():
    decoder = c.SseDecoder(1000)
    for _ in range(10_000):
        assert decoder.feed(b": keep alive\n\n") == []
    assert decoder.feed(b"data: x\n\n")[0].data == "x"


# -- recorded answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_a_recorded_answer_is_read_the_same_at_every_split(name):
    status, data = recorded(name)
    text, reader = read(data)
    assert status == 200 and text and text == reader.text() and reader.fault is None
    for at in range(len(data) + 1):
        split, other = read(data[:at], data[at:])
        assert split == text and facts(other) == facts(reader)
    assert facts(read(*(data[at:at + 1] for at in range(len(data))))[1]) == facts(reader)


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_answer_with_other_line_ends_is_the_same(name):
    data = recorded(name)[1]
    for end in (b"\r\n", b"\r"):
        assert facts(read(data.replace(b"\n", end))[1]) == facts(read(data)[1])


@pytest.mark.parametrize("name, expected", [
    ("llamacpp/stream_usage", ("tiny-random", "length", 100, 24)),
    ("llamacpp/stream_nousage", ("tiny-random", "length", None, None)),
    ("llamacpp/nonstream", ("tiny-random", "length", 100, 24)),
    ("litellm/mock-gpt.stream", ("mock-gpt", "stop", 8, 12)),
    ("litellm/mock-gpt.nonstream", ("mock-gpt", "stop", 10, 20)),
    ("litellm/tiny.stream", ("tiny", "length", 57, 16)),
])
def test_model_end_and_tokens_of_a_recorded_answer(name, expected):
    assert facts(read(recorded(name)[1])[1])[1:5] == expected


def test_texts_of_recorded_answers():
    assert read(recorded("litellm/mock-gpt.stream")[1])[0] == "Hello from the mock model, this is a streamed reply."
    assert read(recorded("llamacpp/stream_usage")[1])[0] == read(recorded("llamacpp/nonstream")[1])[0] \
        == " to read" + " has done" * 11


@pytest.mark.parametrize("name", ANSWERS)
def test_mutated_answers_never_raise(name):
    data, rng = recorded(name)[1], random.Random(name)
    words = [b"\n", b"\n\n", b"\r", b"data:", b"null", b"{", b"}", b"[]", b'"', b"\xff", b"\xf0\x9f", b"[DONE]",
             b"1e999", b'"error":', b'"\\ud800"', b"-1", b'"choices":3']
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(len(broken) + 1)
            noise = bytes(rng.randrange(256) for _ in range(3))
            broken[at:at + rng.randrange(30) * rng.randrange(2)] = rng.choice([*words, noise])
        cut = rng.randrange(len(broken) + 1)
        text, reader = read(bytes(broken[:cut]), bytes(broken[cut:]))
        text.encode("utf-8")  # nothing that cannot be stored
        assert text == reader.text() and reader.done
        lines = c.chat_envelope(reader, "s", 1.0, False)
        assert c.parse_json(c.format_json(lines)) == lines and lines[-1]["type"] == "result"


# -- chat chunks


def test_null_contents_roles_and_reasoning_are_no_text():
    stream = chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}])
    stream += chunk(choices=[{"index": 0, "delta": {"role": "assistant"}}]) + chunk("") + chunk("Hel")
    stream += chunk(choices=[{"index": 0, "delta": {"reasoning_content": "hm", "content": None}}])
    stream += chunk(choices=[{"index": 0, "delta": {"tool_calls": [{"function": {"name": "x"}}]}}])
    text, reader = read(stream + chunk("lo") + chunk(None, "stop") + DONE)
    assert (text, reader.finish_reason, reader.fault) == ("Hello", "stop", None)


@pytest.mark.parametrize("usage", [{"choices": []}, {}, {"choices": [{"index": 0, "delta": {}}]}])
def test_usage_comes_in_a_chunk_with_choices_or_without(usage):
    usage = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}, **usage}
    text, reader = read(chunk("a", usage=None) + chunk(None, "stop", usage=None) + chunk(**usage) + DONE)
    assert (text, reader.tokens_in, reader.tokens_out) == ("a", 5, 2)


def test_the_last_usage_counts_where_every_chunk_has_one():
    usages = [{"usage": {"prompt_tokens": 5, "completion_tokens": n}} for n in (1, 2, 3)]
    assert read(*(chunk("a", **usage) for usage in usages), DONE)[1].tokens_out == 3


@pytest.mark.parametrize("usage", [{"prompt_tokens": -1}, {"prompt_tokens": "5", "completion_tokens": True}, 7, []])
def test_a_usage_that_is_none_is_unknown(usage):
    reader = read(chunk("a", "stop", usage=usage) + DONE)[1]
    assert (reader.tokens_in, reader.tokens_out, reader.fault) == (None, None, None)


def test_an_answer_is_whole_without_done_once_its_end_is_told_and_not_before():
    assert read(chunk("all"), chunk(None, "stop"))[1].fault is None
    cut = read(chunk("half of"))[1]
    assert cut.text() == "half of" and "ended in the middle" in cut.fault.message and cut.fault.kind == "server_error"
    assert read(chunk("all"), DONE)[1].fault is None  # no finish_reason, but DONE


def test_nothing_after_done_is_looked_at():
    text, reader = read(chunk("a", "stop") + DONE + chunk("b"), chunk("c"))
    assert (text, reader.done) == ("a", True)


@pytest.mark.parametrize("error, kind, status, words", [
    ({"error": {"code": 500, "message": "boom", "type": "server_error"}}, "server_error", 500, "boom"),
    ({"error": {"code": "503", "message": "busy"}}, "overloaded", 503, "busy"),
    ({"error": "it broke"}, "server_error", None, "it broke"),
    ({"object": "error", "message": "vllm says", "code": 400}, "invalid_request", 400, "vllm says"),
    ({"error": {"code": 400, "type": "exceed_context_size_error", "message": "request (9 tokens) exceeds"}},
     "invalid_request", 400, "shorten it"),
    ({"error": {"message": None, "code": None}}, "server_error", None, "nothing more"),
    ({"error": {"message": {"a": 1}, "code": [1]}}, "server_error", None, "nothing more"),
])
def test_an_error_in_the_middle_of_a_stream_is_the_fault(error, kind, status, words):
    text, reader = read(chunk("half") + b"data: " + json.dumps(error).encode() + b"\n\n" + chunk("no more") + DONE)
    assert (text, reader.fault.kind, reader.fault.status) == ("half", kind, status)
    assert words in reader.fault.message


def test_a_text_beyond_the_limit_keeps_its_beginning_and_its_end(monkeypatch):
    monkeypatch.setattr(c, "MAX_CHAT_TEXT", 100)
    whole = "".join(map(str, range(1000)))
    for size in (1, 7, 49, 300, 5000):
        reader = read(*(chunk(whole[at:at + size]) for at in range(0, len(whole), size)), DONE)[1]
        assert reader.text() == f"{whole[:50]}\n[... {len(whole) - 100} characters left out ...]\n{whole[-50:]}"


def test_events_that_are_no_json_or_no_objects_say_nothing():
    texts = (b"", b"hello", b"[1]", b"3", b'"x"', b"{", b'{"choices":{}}', b'{"choices":[3]}',
             b'{"choices":[{"delta":"x"}]}')
    junk = b"".join(b"data: " + text + b"\n\n" for text in texts)
    assert facts(read(junk + chunk("ok", "stop") + junk)[1])[0] == "ok"


@pytest.mark.parametrize("body", [
    b"", b"\n\n", b"<html>no</html>", b"{}", b"{broken", b'{"choices":[]}', b": comment\n\n"])
def test_an_answer_that_is_no_completion_is_a_fault(body):
    fault = read(body)[1].fault
    assert fault.kind == "server_error" and "no chat completion" in fault.message


def test_one_endless_document_is_a_fault(monkeypatch):
    monkeypatch.setattr(c, "MAX_SSE_EVENT", 100)
    assert "longer than 100 bytes" in read(b"{" + b" " * 60, b" " * 60)[1].fault.message
    assert read(b"data: " + b"x" * 200)[1].fault


# -- errors


@pytest.mark.parametrize("name, kind, status, words", [
    ("llamacpp/err_context", "invalid_request", 400, "25025 tokens"),
    ("llamacpp/err_badjson", "invalid_request", 400, "parse error"),
    ("llamacpp/notfound", "model_not_found", 404, "/v1"),
    ("litellm/unauth", "server_error", 500, "Internal Server Error")])
def test_recorded_errors(name, kind, status, words):
    code, body = recorded(name)
    fault = c.read_fault(c.parse_json_or(body, body.decode()), code)
    assert (fault.kind, fault.status) == (kind, status) and words in fault.message


@pytest.mark.parametrize("status, kind, reason", [
    (400, "invalid_request", "bad_task"), (401, "authentication_failed", "auth"), (402, "billing_error", "auth"),
    (403, "authentication_failed", "auth"), (404, "model_not_found", "bad_task"), (405, "invalid_request", "bad_task"),
    (307, "invalid_request", "bad_task"), (408, "server_error", "api_error"), (413, "invalid_request", "bad_task"),
    (429, "rate_limit", "rate_limited"), (500, "server_error", "api_error"), (502, "server_error", "api_error"),
    (503, "overloaded", "rate_limited"), (504, "server_error", "api_error"), (529, "overloaded", "rate_limited")])
@pytest.mark.parametrize("retry_at", [None, NOW + 30])
def test_each_status_has_its_reason_when_the_envelope_is_judged(status, kind, reason, retry_at):
    fault = c.read_fault({"error": {"message": "no"}}, status, retry_at)
    assert fault.kind == kind
    reader = c.ChatReader()
    reader.fail(fault)
    verdict = judged(reader)[1]
    assert (verdict.reason, verdict.ok) == (reason, False) and "no" in verdict.detail
    assert verdict.retry_at == (retry_at if reason == "rate_limited" else None)


def test_a_used_up_account_is_no_passing_limit():
    assert c.read_fault({"error": {"code": "insufficient_quota", "message": "pay"}}, 429).kind == "billing_error"


@pytest.mark.parametrize("text, seconds", [
    ("0", 0), ("5", 5), (" 120 ", 120), ("99999999999999999999", 86400), ("-5", None), ("5.5", None), ("soon", None),
    ("", None),
    (None, None), ("٣", None), ("Wed, 18 Nov 2026 09:46:50 GMT", 10), ("Wednesday, 18-Nov-26 09:46:50 GMT", 10),
    ("Wed Nov 18 09:46:50 2026", 10), ("Fri, 20 Nov 2020 00:00:00 GMT", 0), ("Fri, 20 Nov 9999 00:00:00 GMT", 86400),
    ("Fri, 99 Foo 2026 99:00:00 GMT", None), ("1, 2, 3, 4", None)])
def test_retry_after_is_seconds_or_a_date(text, seconds):
    now = c.parse_time("2026-11-18T09:46:40Z")
    at = c.parse_retry_after(text, now)
    assert at == (None if seconds is None else now + seconds)


# -- the envelope: what claude's readers make of it


def judged(reader, is_limited=False):
    """(facts, verdict, lines) of a local agent's log with this end."""
    lines = [{"type": "system", "subtype": "init", "session_id": "s", "model": "m"}]
    lines.append({"type": "stream_event", "event": {}})
    lines += c.chat_envelope(reader, "s", 1.25, is_limited)
    stream, splitter = c.ClaudeStream(), c.LineSplitter()
    for line in splitter.feed("".join(c.format_json(line) + "\n" for line in lines).encode(), stream.BORING):
        stream.feed_line(line)
    return stream.facts(), c.judge(agent=stream.facts(), exit_code=int(lines[-1]["is_error"]), kind="local"), lines


def test_a_good_answer_is_a_success_with_text_summary_tokens_and_no_cost():
    usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    reader = read(chunk("Done.\n\n## Summary\nAll \u2028 is \U0001f600 well.", "stop") + chunk(**usage) + DONE)[1]
    agent, verdict, lines = judged(reader)
    assert verdict.ok and verdict.summary == "All \u2028 is \U0001f600 well."
    assert (agent.cost_usd, agent.tokens_in, agent.tokens_out, agent.num_turns) == (0, 7, 3, 1)
    assert (agent.final_text, agent.result_text, agent.stop_reason) == (reader.text(), reader.text(), "stop")
    shown = c.render_log_line(c.format_json(lines[-1]).encode(), "claude")
    assert shown == "✔ success · 1 turn · 1s · $0.00 · 10 tokens"


def test_tokens_that_no_server_told_are_unknown():
    agent = judged(read(chunk("x", "stop") + DONE)[1])[0]
    assert (agent.cost_usd, agent.tokens_in, agent.tokens_out) == (0, None, None)


@pytest.mark.parametrize("stream, words", [
    (chunk("  \n") + chunk(None, "stop"), "without any text"), (chunk("half", "length"), "cut off"),
    (chunk("x", "content_filter"), "content filter")])
def test_a_whole_answer_that_is_none_is_the_agents_error(stream, words):
    verdict = judged(read(stream + DONE)[1])[1]
    assert verdict.reason == "agent_error" and words in verdict.detail


def test_an_answer_of_the_length_that_the_task_asked_for_is_good():
    assert judged(read(chunk("half", "length") + DONE)[1], is_limited=True)[1].ok


def test_a_broken_answer_is_no_success_and_its_text_is_kept():
    agent, verdict, _ = judged(read(chunk("half"))[1])
    assert verdict.reason == "api_error" and agent.final_text == "half" and "in the middle" in verdict.detail


def test_readable_lines_of_a_failure():
    reader = c.ChatReader()
    reader.fail(c.read_fault("slow down", 429, NOW))
    shown = [c.render_log_line(c.format_json(line).encode(), "claude") for line in judged(reader)[2]]
    assert "retry after" in shown[2] and shown[3] == "✘ slow down" and "✘ slow down · 1 turn" in shown[4]
