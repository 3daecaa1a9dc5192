"""Section 08: what an agent's output says, from recorded streams of the real CLI and from hostile bytes."""
import glob
import json
import os
import random

import claudomator as c
import pytest

DATA = os.path.join(os.path.dirname(__file__), "data", "claude")
NAMES = sorted(os.path.basename(path)[:-len(".jsonl")] for path in glob.glob(os.path.join(DATA, "*.jsonl")))


def recorded(name: str) -> bytes:
    with open(os.path.join(DATA, name + ".jsonl"), "rb") as file:
        return file.read()


def feed(stream, pieces, boring=()):
    """(facts, events) of bytes that come in pieces, through the line splitter as the daemon does it."""
    splitter, events = c.LineSplitter(), []
    for piece in pieces:
        for line in splitter.feed(piece, boring):
            events += stream.feed_line(line)
    last = splitter.finish()
    events += stream.feed_line(last) if last is not None else []
    return stream.facts(), events


def facts_of(*records, stream=None):
    """Facts of a claude stream made of dicts and raw lines."""
    lines = [line if isinstance(line, bytes) else json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()
             for line in records]
    return feed(stream or c.ClaudeStream(), [line + b"\n" for line in lines])[0]


def text_line(text, **more):
    return {"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}, "parent_tool_use_id": None,
            "session_id": "s", **more}


def result_line(**more):
    return {"type": "result", "subtype": "success", "is_error": False, "result": "done", "num_turns": 1,
            "total_cost_usd": 0.5, "permission_denials": [], "session_id": "s",
            "modelUsage": {"m": {"inputTokens": 10, "outputTokens": 2, "cacheReadInputTokens": 100,
                                 "cacheCreationInputTokens": 1000, "costUSD": 0.5}}, **more}


# -- recorded streams

@pytest.mark.parametrize("name", NAMES)
def test_facts_do_not_depend_on_how_the_bytes_arrive(name):
    data = recorded(name)
    whole = feed(c.ClaudeStream(), [data])
    assert feed(c.ClaudeStream(), [data[at:at + 1] for at in range(len(data))]) == whole
    rnd = random.Random(name)
    for _ in range(5):
        cuts = sorted(rnd.randrange(len(data) + 1) for _ in range(rnd.randrange(1, 40)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
        assert feed(c.ClaudeStream(), pieces) == whole
        facts, events = feed(c.ClaudeStream(), pieces, c.ClaudeStream.BORING)
        assert (facts.replace(lines=whole[0].lines), events) == whole  # lines passed over are not counted


def test_looking_at_bytes_first_misses_nothing_that_parsing_every_line_finds():
    class Thorough(c.ClaudeStream):
        BORING = (b"never",)
        _ASSISTANT = b"never"
        _CAN_MATTER = (b"{",)
    for name in NAMES:
        data = recorded(name)
        assert feed(c.ClaudeStream(), [data]) == feed(Thorough(), [data]), name


def test_key_order_and_spaces_do_not_matter():
    for name in NAMES:
        lines = [json.loads(line) for line in recorded(name).splitlines()]
        spaced = [json.dumps(line, separators=(", ", ": ")).encode() for line in lines]
        reverse = [dict(reversed(line.items())) for line in lines]
        assert facts_of(*reverse) == facts_of(*lines) == facts_of(*spaced), name


def test_facts_of_a_plain_run():
    facts, events = feed(c.ClaudeStream(), [recorded("a_text")])
    assert facts == c.AgentFacts(
        lines=3, session_id="11111111-1111-4111-8111-111111111101", model="claude-sonnet-5-5", version="2.1.329",
        result_seen=True, subtype="success", terminal_reason="completed", stop_reason="end_turn",
        result_text="Hello from the fake model.", final_text="Hello from the fake model.", cost_usd=0.0025,
        tokens_in=1000,
        tokens_out=50, num_turns=1)
    assert events == [{"kind": "session", "session_id": "11111111-1111-4111-8111-111111111101",
                       "model": "claude-sonnet-5-5", "version": "2.1.329"}]


EVENTS = {
    "d_oauth_429_after_tool": ["session", "rate_limit", "api_error"],  # the ``allowed`` event before is no news
    "d_oauth_allowed": ["session"],
    "d_oauth_allowed_warning": ["session", "rate_limit"],
    "d_429_retries2": ["session", "api_retry", "api_retry", "api_error"],
    "c_denied_default": ["session", "permission_denied"],
    "k_bg_task": ["session"],  # its second init is the same session
    "f_no_credentials": ["session", "api_error"],
    "j_bad_session_id": [],
}


@pytest.mark.parametrize("name", EVENTS)
def test_notable_events(name):
    events = feed(c.ClaudeStream(), [recorded(name)])[1]
    assert [event["kind"] for event in events] == EVENTS[name]


def test_events_carry_what_the_log_of_events_shows():
    limit, error = feed(c.ClaudeStream(), [recorded("d_oauth_429_unified_5h")])[1][1:]
    assert limit == {"kind": "rate_limit", "status": "rejected", "type": "five_hour", "resets_at": 1795213829}
    assert error == {"kind": "api_error", "error": "rate_limit", "status": 429,
                     "text": "You've hit your 5-hour limit · resets 10:30pm (UTC)"}
    retry = feed(c.ClaudeStream(), [recorded("d_429_retries2")])[1][1]
    assert retry == {"kind": "api_retry", "attempt": 1, "status": 429, "error": "rate_limit", "delay_s": 2.042}
    denied = feed(c.ClaudeStream(), [recorded("x_settings_deny")])[1][1]
    assert denied == {"kind": "permission_denied", "tool": "Bash", "text":
                      "Permission to use Bash with command touch denied_probe.txt && echo done has been denied."}


def test_denials_name_the_tool_and_its_input():
    facts, _ = feed(c.ClaudeStream(), [recorded("x_acceptedits_write")])
    assert [denial["tool"] for denial in facts.denials] == ["Write"]
    assert facts.denials[0]["input"]["file_path"] == "/workspace/outside/w.txt"


def test_a_killed_agent_shows_the_retry_that_it_was_in():
    facts, _ = feed(c.ClaudeStream(), [recorded("f_401")])
    assert not facts.result_seen and facts.cost_usd is None and facts.tokens_in is None
    assert facts.retry["status"] == 401 and facts.retry["error"] == "authentication_failed"
    assert feed(c.ClaudeStream(), [recorded("d_429_then_ok")])[0].retry is None  # the API answered in the end


# -- cost

def test_cost_is_the_sum_of_the_increments_where_result_lines_have_them():
    first = result_line(model_usage_since_last_result={"m": {"costUSD": 0.1, "inputTokens": 1, "outputTokens": 2}})
    second = result_line(total_cost_usd=9.0, model_usage_since_last_result={
        "m": {"costUSD": 0.25, "inputTokens": 10, "outputTokens": 20, "cacheReadInputTokens": 5},
        "n": {"costUSD": 0.5, "inputTokens": 100, "outputTokens": 200, "cacheCreationInputTokens": 7}})
    facts = facts_of(first, second)
    assert (facts.cost_usd, facts.tokens_in, facts.tokens_out, facts.num_turns) == (pytest.approx(0.85), 123, 222, 2)


def test_cost_is_the_last_total_where_there_are_no_increments():
    facts = facts_of(result_line(), result_line(total_cost_usd=0.75))  # 2.1.197: cumulative for the process
    assert (facts.cost_usd, facts.tokens_in, facts.tokens_out) == (0.75, 1110, 2)
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 5, "output_tokens": 6}
    facts = facts_of(result_line(modelUsage=None, usage=usage))
    assert (facts.tokens_in, facts.tokens_out) == (12, 6)


def test_a_last_error_line_without_increments_adds_nothing_to_those_before():
    one = result_line(model_usage_since_last_result={"m": {"costUSD": 0.1, "inputTokens": 1, "outputTokens": 2}})
    facts = facts_of(one, result_line(is_error=True, total_cost_usd=0))
    assert facts.cost_usd == 0.1 and facts.is_error


@pytest.mark.parametrize("cost", [None, "0.5", True, -1, float("inf"), [1]])
def test_a_cost_that_is_no_number_is_unknown_and_not_zero(cost):
    line = json.dumps(result_line(total_cost_usd=cost), separators=(",", ":")).replace("Infinity", "1e999").encode()
    assert facts_of(line).cost_usd is None
    assert facts_of(result_line(model_usage_since_last_result={"m": {"inputTokens": 1}})).cost_usd is None


# -- the line's own type decides

def test_an_agents_words_are_never_taken_for_events():
    words = ('{"type":"result","is_error":true,"subtype":"init"} rate_limit_event 429 usage_limit_reached'
             ' "error":"rate_limit"')
    facts = facts_of(text_line(words), {"type": "user", "message": {"content": words}}, result_line())
    assert not facts.is_error and facts.rate_limit is None and facts.last_error_kind == "" and facts.num_turns == 1


def test_a_nested_object_that_looks_like_a_result_is_none():
    tool = {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Write", "input": {
        "type": "result", "is_error": True, "subtype": "init", "x": {"type": "text", "error": "rate_limit"}}}]},
        "parent_tool_use_id": None}
    facts = facts_of({"uuid": "first", **tool}, tool, {"a": {"type": "rate_limit_event"}, "type": "note"})
    assert not facts.result_seen and facts.model == "" and facts.rate_limit is None and facts.last_error_kind == ""


def test_a_subagents_words_are_not_the_answer():
    sub = text_line("## Summary\nof the subagent")
    sub["parent_tool_use_id"] = "toolu_1"
    facts = facts_of(text_line("main"), sub, {**text_line("plain words"), "parent_tool_use_id": "toolu_1"})
    assert (facts.final_text, facts.summary_text) == ("main", "")


def test_tool_results_are_passed_by_unparsed():
    facts = facts_of(b'{"type":"user","message":{"type":"result"} broken', b'{"type":"stream_event","type":"result"',
                     b'{"type":"assistant","broken')
    assert facts.lines == 3 and facts.garbage_lines == 0


def test_errors_of_an_earlier_turn_are_forgotten():
    error = text_line("API Error", error="rate_limit", api_error_status=429)
    init = {"type": "system", "subtype": "init", "session_id": "s", "model": "m"}
    assert facts_of(init, error).last_error_kind == "rate_limit"
    facts = facts_of(init, error, result_line(is_error=True), init, result_line(is_error=True, subtype="error_x"))
    assert facts.last_error_kind == "" and facts.api_status is None


def test_an_older_version_gets_its_status_from_the_retry_before():
    retry = {"type": "system", "subtype": "api_retry", "attempt": 1, "error_status": 529, "error": "overloaded"}
    facts = facts_of(retry, text_line("Overloaded", error="server_error"), result_line(is_error=True))
    assert facts.api_status == 529 and facts.error_texts == ("done",)


def test_the_limit_of_the_error_line_counts_and_milliseconds_are_mended():
    error = text_line("limit", error="rate_limit", api_error_params={"rate_limit_info": {
        "status": "rejected", "resetsAt": 1795213829000, "rateLimitType": "seven_day"}})
    assert facts_of(error).rate_limit == {"status": "rejected", "type": "seven_day", "resets_at": 1795213829}
    assert facts_of({"type": "rate_limit_event", "rate_limit_info": {"status": "rejected"}}).rate_limit == {
        "status": "rejected", "type": "", "resets_at": None}


def test_a_session_that_never_began_is_no_session():
    assert feed(c.ClaudeStream(), [recorded("i_resume_4_not_uuid")])[0].session_id == ""


def test_a_missing_is_error_is_an_error():
    line = result_line()
    del line["is_error"]
    assert facts_of(line).is_error


def test_denials_of_all_result_lines_count_once_each():
    first = {"tool_name": "Bash", "tool_use_id": "a", "tool_input": {"command": "x" * 9000, "n": 1}}
    second = {"tool_name": "Write", "tool_use_id": "b", "tool_input": "odd"}
    facts = facts_of(result_line(permission_denials=[first]), result_line(permission_denials=[first, second, None]))
    assert [denial["tool"] for denial in facts.denials] == ["Bash", "Write", ""]
    assert facts.denials[0]["input"] == {"command": "x" * 500}


# -- the summary

@pytest.mark.parametrize("text, expected", [
    ("intro\n## Summary\nIt works.\n- yes\n", "It works.\n- yes"),
    ("## Summary\nold\n## Summary\nnew", "new"),
    ("## Summary:\r\nwith colon ", "with colon"),
    ("```md\n## Summary\nin a fence\n```\nafter", ""),
    ("## Summary\nreal\n```\n## Summary\nfenced\n```\nend", "real\n```\n## Summary\nfenced\n```\nend"),
    ("```one-liner```\n## Summary\nreal", "real"),
    ("~~~\n```\n## Summary\n~~~\n## Summary\nx", "x"),
    ("### Summary\nno", ""), ("## Summary of changes\nno", ""), ("see ## Summary\nno", ""), ("## Summary", ""),
])
def test_summary_is_the_text_after_the_last_heading(text, expected):
    assert facts_of(text_line(text), text_line("bye"), result_line()).summary_text == expected
    assert facts_of(*text.encode().split(b"\n"), stream=c.TextStream()).summary_text == expected


def test_the_last_text_with_a_heading_gives_the_summary():
    facts = facts_of(text_line("## Summary\none"), text_line("## Summary\ntwo"), text_line("```\n## Summary\nno\n```"))
    assert facts.summary_text == "two" and facts.final_text == "```\n## Summary\nno\n```"


def test_texts_are_bounded():
    facts = facts_of(text_line("## Summary\n" + "é" * 100_000), result_line(result="x" * 100_000))
    assert len(facts.summary_text) == len(facts.result_text) == len(facts.final_text) == c.TEXT_LIMIT


# -- odd bytes

def test_an_over_long_result_line_still_counts():
    line = json.dumps(result_line(result="\u20ac" * 700_000), ensure_ascii=False, separators=(",", ":")).encode()
    assert len(line) > c.LONG_LINE
    facts = facts_of(text_line("x"), line)  # cut inside a character of three bytes
    assert facts.result_seen and facts.cost_usd == 0.5 and facts.result_text.startswith("\u20ac\u20ac")


def test_lone_surrogates_can_be_stored():
    line = json.dumps(result_line(result="a\ud83d"), separators=(",", ":")).encode()
    assert facts_of(line, b'{"type":"result","is_error":true,"errors":["\\udc00"]}').error_texts == ("?",)
    assert facts_of(line).result_text == "a?"


def test_garbage_is_counted_kept_for_messages_and_ignored():
    facts = facts_of(b"Segmentation fault \xff", b"", b"   ", b"[1]", b'{"type":"result","is_err', result_line())
    assert facts.garbage_lines == 3 and facts.result_seen
    assert facts.stream_tail == ("Segmentation fault \ufffd", "[1]", '{"type":"result","is_err')
    assert len(facts_of(*[b"noise %d" % n for n in range(50)]).stream_tail) == 5


def test_asking_for_facts_changes_nothing():
    stream = c.ClaudeStream()
    facts = facts_of(b'{"type":"assistant","message":{"content":[{"type":"text","text":"cut', stream=stream)
    assert stream.facts() == facts and facts.final_text == ""


def test_no_line_makes_the_parser_raise():
    rnd, lines = random.Random(8), [line for name in NAMES for line in recorded(name).splitlines()[-4:]]
    values = [b"null", b"[]", b"{}", b"1e999", b'"x"', b"-1", b"true", b"[[]]", b'[{"type":"text","text":7}]']
    for round_number in range(4000):
        line = bytearray(rnd.choice(lines))
        if round_number % 2:  # swap a value for one of another type
            at = line.find(b":", rnd.randrange(len(line)))
            end = line.find(b",", at)
            line[at + 1:end] = rnd.choice(values)
        for _ in range(rnd.choice((0, 1, 3))):
            at = rnd.randrange(len(line))
            line[at:at + rnd.randrange(3)] = bytes([rnd.randrange(256)])
        for stream in (c.ClaudeStream(), c.TextStream()):
            events = stream.feed_line(bytes(line))
            facts = stream.facts()
            c.format_json([events, list(facts.__dict__.values())]).encode()  # all of it can be stored


# -- plain text

def test_text_stream_keeps_the_end_and_costs_nothing():
    lines = [b"line %d" % n for n in range(1000)] + [b"", b"last \xe2\x82\xac\r", b"  "]
    facts = facts_of(*lines, stream=c.TextStream())
    assert facts.final_text.endswith("line 999\nlast \u20ac") and len(facts.final_text) <= 4096
    assert (facts.cost_usd, facts.tokens_in, facts.tokens_out, facts.lines) == (0.0, 0, 0, 1003)
    assert len(facts_of(b"x" * 900_000, stream=c.TextStream()).final_text) == 4096


def a_script_output(rnd):
    """Lines as scripts print them: some blank, some long, and now and then what may be a summary."""
    rare = [b"## Summary", b"## Other", b"```", b"  ~~~", b"# a comment", b"x## y", b"\r", b"\xff\xfe", b"y" * 5000]
    kinds = [b"line %d", b"    indented %d", b"%d" + b" long" * 40] + [b"", b"   ", b"\t\x0b"] * rnd.choice((0, 1, 6))
    share = rnd.choice((0, 0.0005, 0.01))
    lines = [(kind % n if b"%d" in kind else kind) if rnd.random() >= share else rnd.choice(rare)
             for n in range(rnd.randrange(3000)) for kind in [rnd.choice(kinds)]]
    return b"\n".join(lines) + rnd.choice((b"", b"\n", b"\n\n"))


def test_what_a_script_prints_says_the_same_read_in_blocks_and_line_by_line(tmp_path, monkeypatch):
    rnd, passed_over, feed_line = random.Random(7), 0, c.TextStream.feed_line
    fed = []
    monkeypatch.setattr(c.TextStream, "feed_line", lambda self, line: fed.append(1) or feed_line(self, line))
    for _ in range(80):
        output = a_script_output(rnd)
        (tmp_path / "log").write_bytes(output)
        monkeypatch.setattr(c, "LOG_BLOCK", rnd.choice((700, 5000, 20_000, 1 << 18)))
        log, whole = c.LogReader(str(tmp_path / "log"), c.TextStream()), c.TextStream()
        fed.clear()
        while log.read_more()[0]:
            assert log.stream.facts().lines <= output.count(b"\n")
        log.finish()
        facts = log.stream.facts()
        passed_over += len(fed) < facts.lines
        for line in output.split(b"\n") if not output.endswith(b"\n") else output.split(b"\n")[:-1]:
            feed_line(whole, line)
        assert facts == whole.facts()
    assert passed_over > 25
    lines = b"line\n" * 100
    assert [c.TextStream().pass_over(first + lines, 0) > 0 for first in (b"", b"## Summary\n", b"```\n")] == [True, False, False]


def test_text_stream_of_an_agent_that_may_cost_something_says_unknown():
    facts = facts_of(b"hi", stream=c.TextStream(cost_usd=None))
    assert facts.cost_usd is None and facts.tokens_in is None
    assert set(c.STREAMS) == {"claude", "gemini", "jsonl", "text"}
