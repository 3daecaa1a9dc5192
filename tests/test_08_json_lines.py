"""Sections 08 and 10 for ``format = "jsonl"``: codex and opencode by the examples of docs/agents/runners.md."""
import json
import pathlib
import re

import claudomator as c
import pytest

ROOT = pathlib.Path(__file__).resolve().parent
PAGE = (ROOT.parent / "docs/agents/runners.md").read_text(encoding="utf-8")
EXAMPLES = "\n".join(re.findall(r"```toml\n(.+?)```", PAGE, re.S))
CONFIG = c.parse_config_text(EXAMPLES, "runners.md", "/home/ann")
# (state, reason, USD, tokens in, tokens out, session, text) and what a person reads; by hand from the recordings
OK, FAIL = ("COMPLETED", ""), "FAILED"
RUNS = [
    ("codex", "codex_ok", 0, *OK, None, 2000, 100, "01a1faf9-677c-7ec1-89d3-6ed5e90ef246", "All done.", ""),
    ("codex", "codex_unreachable", 137, FAIL, "agent_error", None, None, None,
     "01a1faf7-a49e-7a73-b065-8022a918a494", "", "SIGKILL"),
    ("opencode", "opencode_bash", 0, *OK, 0.0075, 2000, 100, "ses_e04fea800ffemM21e3b9eJbJSO",
     "Finished after the tool.", ""),
    ("opencode", "opencode_text", 0, *OK, 0.00375, 1000, 50, "ses_e04fe5023ffe4W0WXP3IfpcYan",
     "Hello from the fake model.", ""),
    ("opencode", "opencode_401", 1, FAIL, "auth", None, None, None, "ses_e04fe9449ffeQNoT5TKfZ1xF3r", "",
     "invalid x-api-key (HTTP 401)"),
    ("opencode", "opencode_429_noretry", 1, FAIL, "rate_limited", None, None, None,
     "ses_e04fe875bffetj5TzoMGNthK5o", "",
     "rate limit of 50,000 input tokens per minute"),
]


def facts_of(data: bytes, fields: dict) -> c.AgentFacts:
    splitter, stream = c.LineSplitter(), c.JsonLinesStream(fields)
    for line in [*splitter.feed(data), splitter.finish()]:
        if line is not None:
            stream.feed_line(line)
    return stream.facts()


def judge(agent, code=0, **more) -> c.Verdict:
    return c.judge(agent=agent, exit_code=code, format="jsonl", kind="x", **more)


def told(fields, *records, code=0, **more) -> c.Verdict:
    return judge(facts_of("\n".join(map(json.dumps, records)).encode(), fields), code, **more)


def test_every_recording_is_in_the_table():
    names = {path.stem for folder in ("codex", "opencode") for path in (ROOT / "data" / folder).glob("*.jsonl")}
    assert names == {run[1] for run in RUNS}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[1])
def test_a_recorded_run_means_what_it_should(run):
    kind, name, code, state, reason, cost, tokens_in, tokens_out, session, text, words = run
    folder = ROOT / "data" / kind
    agent = facts_of((folder / f"{name}.jsonl").read_bytes(), c.runner_of(kind, CONFIG).fields)
    verdict = judge(agent, code, stderr_tail=(folder / f"{name}.stderr.txt").read_text())
    assert (verdict.state, verdict.reason) == (state, reason), verdict.detail
    assert (agent.cost_usd, agent.tokens_in, agent.tokens_out) == (cost, tokens_in, tokens_out)
    assert (agent.session_id, agent.final_text) == (session, text) and words in verdict.detail
    assert verdict.resume and agent.garbage_lines == 0


def test_codex_is_priced_by_the_model_that_it_was_asked_for():
    agent = facts_of((ROOT / "data/codex/codex_ok.jsonl").read_bytes(), c.runner_of("codex", CONFIG).fields)
    prices = {"gpt-5": {"input": 1.25, "cached": 0.125, "output": 10.0}}
    assert c.price(agent.usage, prices, "gpt-5") == pytest.approx((1600 * 1.25 + 400 * 0.125 + 100 * 10) / 1e6)
    assert c.price(agent.usage, prices, "other") is None


@pytest.mark.parametrize("path, record, value", [
    ("a.b", {"a": {"b": "x"}}, "x"), ("a.1.b", {"a": [0, {"b": "x"}]}, "x"), ("a.1", {"a": [0]}, None),
    ("a.b", {"a": "x"}, None), ("a if type=t", {"a": "x", "type": "t"}, "x"), ("a if type=t", {"a": "x"}, None),
    ("a if n=3 and ok=true", {"a": "x", "n": 3, "ok": True}, "x"), ("a if n=3", {"a": "x", "n": "3"}, "x"),
    ("a + b", {"b": "y"}, "y"),
])
def test_a_field_is_a_path_with_conditions(path, record, value):
    assert c.JsonLinesStream({"text": path}).read(record).get("text") == value


def test_numbers_are_added_over_paths_and_lines():
    agent = facts_of(b'{"a":1,"b":{"c":2}}\n{"a":4}\n{}\n', {"text": "t", "tokens_in": "a + b.c", "tokens_out": "a"})
    assert (agent.tokens_in, agent.tokens_out, agent.cost_usd) == (7, 5, None)
    assert facts_of(b'{"a":"x"}\n{"a":1}', {"text": "t", "cost_usd": "a"}).cost_usd is None


def test_an_error_that_the_agent_got_over_is_none():
    fields = {"text": "text", "error": "error", "status": "status"}
    assert told(fields, {"error": "e"}, {"text": "done"}).ok
    verdict = told(fields, {"text": "done"}, {"error": {"no": "way"}, "status": 500})
    assert (verdict.reason, verdict.detail) == ("api_error", 'the API failed: {"no":"way"} (HTTP 500)')
    assert told(fields, {"error": "e"}).reason == "agent_error"


def test_where_done_is_named_a_run_without_it_is_not_done():
    fields = {"text": "text", "done": "x if type=end"}
    assert told(fields, {"text": "a"}).reason == "no_result"
    assert told(fields, {"text": "a"}, {"type": "end", "x": 1}).ok
    assert told(fields, {"text": "a"}, {"type": "end", "x": 1}, stop_reason="timed_out").ok  # just in time
    assert told({"text": "text"}, {"text": "a"}).ok
    assert told({"text": "text"}, {"text": "a"}, stop_reason="timed_out").reason == "timed_out"
    assert told({"text": "text"}, {"text": "a"}, code=3).reason == "agent_error"


def test_a_session_that_is_gone_is_not_resumed_again():
    fields = {"text": "text", "session": "id"}
    assert told(fields, code=1, resumed=True).resume is False
    assert told(fields, {"id": "s"}, code=1, resumed=True).resume is True


def test_any_line_is_taken():
    fields = {name: "a" for name in c.JSONL_FIELDS}
    for value in (None, True, 3, -1.5, "x", [], {}, [1], {"a": 1}, "\ud800"):
        judge(facts_of(json.dumps({"a": value}).encode() + b"\n[1]\nno json\n\n\xff\n", fields), 0)
    agent = facts_of(b"no json\n\n", fields)
    assert (agent.lines, agent.garbage_lines, agent.stream_tail) == (2, 1, ("no json",))


@pytest.mark.parametrize("line", [b'{"code":1e999,"text":"x","error":{"left":-1e999}}', b'{"code":[1e999],"error":[1e999]}'])
def test_a_number_beyond_every_float_is_taken_too(line):
    fields = {"text": "text if code=200", "error": "error"}
    assert "inf" in facts_of(line, fields).error_texts[0]
    assert "inf" in c.LogRenderer("jsonl", fields=fields).render(line)


def test_lines_that_no_field_is_in_are_passed_over_and_say_nothing_else():
    fields = {"text": "item.text if item.type=message", "status": "error.code if ok=false", "tokens_in": "usage.in"}
    passed, read = b'{"a":"' + b"x" * 5000 + b'"}\n', b'{"item":{"type":"message","text":"hello"}}\n'
    agent = facts_of(passed + b'{"a":\n' + read + b'{"usage":{"in":5}}\n{ "usage": {"in": 6} }\r\n' + passed, fields)
    assert (agent.lines, agent.garbage_lines, agent.final_text, agent.tokens_in) == (6, 1, "hello", 11)
    assert set(c.JsonLinesStream(fields)._needles) == {b"message", b"false", b'"usage"'}
    sums = {"text": "t", "tokens_in": "a.x + b.y if n=1 and kind=turn.done", "tokens_out": "c + d"}
    assert set(c.JsonLinesStream(sums)._needles) == {b'"t"', b"turn.done", b'"c"', b'"d"'}
    agent = facts_of(b'{"n":1,"kind":"turn.done","b":{"y":4}}\n{"d":2}\n{"c":1}\n', sums)
    assert (agent.tokens_in, agent.tokens_out) == (4, 3)


def test_a_log_is_shown_as_text():
    fields = c.runner_of("codex", CONFIG).fields
    shown = [c.render_log_line(line, "jsonl", reader=c.JsonLinesStream(fields)) for line in
             (ROOT / "data/codex/codex_ok.jsonl").read_bytes().splitlines()]
    assert [text for text in shown if text] == ["All done."]
