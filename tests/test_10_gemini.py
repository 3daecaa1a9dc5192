"""Section 10 for gemini: the verdict, cost, tokens and summary of every recorded run, and the rules one by one."""
import glob
import json
import os
import re

import claudomator as c
import pytest

DATA = os.path.join(os.path.dirname(__file__), "data", "gemini")
OK, FAIL = ("COMPLETED", ""), "FAILED"
PRICES = {name: {"input": 1.25, "cached": 0.5, "output": 10.0} for name in
          ("gemini-2.5-flash", "gemini-3.5-flash-lite", "gemini-3.8-flash")}
CALL = (800 * 1.25 + 200 * 0.5 + 60 * 10) / 1e6  # 1000 tokens in, 200 of them cached; 50 out, and 10 thoughts
ONE, TWO, THREE = (CALL, 1000, 60), (2 * CALL, 2000, 120), (3 * CALL, 3000, 180)
NOTHING, NONE = (0, 0, 0), (None, None, None)
HELLO, AFTER = "Hello from the fake Gemini.", "Finished after the tool."
ENDED = 1_795_212_000.0  # 2026-11-20 22:00 UTC

# name -> (state, reason, USD, tokens in, tokens out, the last text), by hand from what the CLI was made to do
EXPECTED = {
    "a_text": (*OK, *ONE, HELLO), "a_text_skiptrust": (FAIL, "auth", *NONE, ""),
    "a_untrusted_yolo": (FAIL, "bad_task", *NONE, ""), "c_untrusted_default": (FAIL, "bad_task", *NONE, ""),
    "b_question_file": (*OK, *THREE, "I wrote the question and stop here."),
    "c_autoedit_shell": (FAIL, "permission_denied", *THREE, AFTER),
    "c_denied_default": (FAIL, "permission_denied", *THREE, AFTER),
    "d_429_after_tool": (FAIL, "quota_exhausted", *ONE, ""), "d_429_bare": (FAIL, "agent_error", *NONE, ""),
    "d_429_daily": (FAIL, "quota_exhausted", *NOTHING, ""), "d_429_daily_json": (FAIL, "quota_exhausted", *NONE, ""),
    "d_429_minute": (FAIL, "agent_error", *NONE, ""),  # killed by the probe
    "d_429_minute_then_ok": (*OK, *ONE, HELLO), "e_503": (FAIL, "rate_limited", *NOTHING, ""),
    "f_400_bad_key": (FAIL, "auth", *NOTHING, ""), "f_404": (FAIL, "bad_task", *NOTHING, ""),
    **{f"i_lost_{name}": (*OK, *ONE, HELLO) for name in (
        "0_first", "1_resume_next_minute", "2_resume_again", "3_resume_third", "4_other_session_retention_off",
        "5_other_session")},
    "i_lost_6_resume": (FAIL, "agent_error", *NONE, ""), "i_resume_by_id": (*OK, *ONE, HELLO),
    "i_resume_latest": (*OK, *ONE, HELLO), "i_resume_other_cwd": (FAIL, "agent_error", *NONE, ""),
    "i_resume_unknown": (FAIL, "agent_error", *NONE, ""), "j_bad_session_id": (*OK, *ONE, HELLO),
    "j_resume_and_session_id": (FAIL, "bad_task", *NONE, ""), "j_same_session_id": (FAIL, "bad_task", *NONE, ""),
    **{name: (FAIL, "no_result", *NONE, "starting") for name in ("k_pg_sigint_tool", "k_sigterm_norelaunch_tool")},
    **{name: (FAIL, "no_result", *NONE, ...) for name in (
        "k_pg_sigterm_streaming", "k_sigint_norelaunch_streaming", "k_sigterm_norelaunch_streaming")},
    "k_pg_sigkill_tool": (FAIL, "agent_error", *NONE, "starting"),
    "k_sigkill_parent": (FAIL, "agent_error", *NONE, "starting"),
    "k_sigint_streaming": (FAIL, "agent_error", *NONE, ...), "k_sigterm_streaming": (FAIL, "agent_error", *NONE, ...),
    "k_sigterm_tool": (FAIL, "agent_error", *TWO, "done"),  # a whole result, but killed: exit code -9
    "l_shell_200KB": (*OK, *TWO, AFTER), "l_shell_5MB": (FAIL, "no_result", *NONE, ""),  # cut by a pipe
    "l_shell_5MB_norelaunch": (FAIL, "no_result", *NONE, ""), "l_text_2MB": (FAIL, "agent_error", *NONE, ""),
    "n_list_sessions": (FAIL, "no_result", *NONE, ""), "x_approval_plan": (*OK, *TWO, "Finished after write_file."),
    "x_ask": (*OK, *TWO, "after ask"), "x_badtool": (*OK, *TWO, "done"),
    "x_bashfail": (*OK, *TWO, "The command failed."), "x_maxtok": (*OK, *ONE, "cut off he"),
    "x_no_auth": (FAIL, "auth", *NONE, ""), "x_stdin_prompt": (*OK, *ONE, HELLO),
    "x_thought": (*OK, *ONE, "Thought about it."), "x_unknown_flag": (FAIL, "bad_task", *NONE, ""),
    "x_write_outside": (*OK, *TWO, "Finished after write_file."),
}


def facts_of(data: bytes, stream=None) -> c.AgentFacts:
    splitter, stream = c.LineSplitter(), stream or c.GeminiStream()
    for line in [*splitter.feed(data, stream.BORING), splitter.finish()]:
        if line is not None:
            stream.feed_line(line)
    return stream.facts()


def recording(name: str) -> tuple[bytes, dict]:
    with open(os.path.join(DATA, name + ".jsonl"), "rb") as file:
        data = re.sub(rb"(.)\.\.\.<(\d+) chars>", lambda run: run[1] * int(run[2]), file.read())
    with open(os.path.join(DATA, name + ".meta.json"), encoding="utf-8") as file:
        return data, json.load(file)


def replay(name: str, **more) -> tuple:
    """(facts, verdict) of a recorded run."""
    data, meta = recording(name)
    agent, code = facts_of(data), meta["exit_code"]
    given = dict(agent=agent, exit_code=128 - code if code < 0 else code, stderr_tail=meta["stderr_tail"],
                 resumed="--resume" in meta["argv"], format="gemini", kind="gemini", ended_at=ENDED)
    return agent, c.judge(**{**given, **more})


def lines(*records: dict) -> bytes:
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)


def says(text: str) -> dict:
    return {"type": "message", "role": "assistant", "content": text, "delta": True}


INIT = {"type": "init", "session_id": "s", "model": "m"}
TOOL = {"type": "tool_result", "tool_id": "x__1", "status": "success", "output": "## Summary\nnot the agent's"}
DONE = {"type": "result", "status": "success", "stats": {"models": {"m": {"input_tokens": 1, "output_tokens": 2}}}}


def verdict(*records, code=0, **more) -> c.Verdict:
    return c.judge(agent=facts_of(lines(*records)), exit_code=code, format="gemini", kind="gemini", **more)


def dump(name="TerminalQuotaError", status=429, delay="undefined", reason="undefined") -> str:
    return (f"Error when talking to Gemini API Full report available at: /tmp/x.json {name}: words\n"
            "    at classifyGoogleError (file:///x.js:1:1) {\n  cause: {\n    code: 418,\n    retryDelayMs: 5\n  },\n"
            f"  retryDelayMs: {delay},\n  reason: {reason},\n  status: {status}\n}}\n")


# -- recorded runs

def test_the_table_covers_every_recorded_stream():
    assert set(EXPECTED) == {os.path.basename(path)[:-6] for path in glob.glob(os.path.join(DATA, "*.jsonl"))}


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict_cost_tokens_and_text_of_a_recorded_run(name):
    agent, judged = replay(name)
    state, reason, cost, tokens_in, tokens_out, text = EXPECTED[name]
    assert (judged.state, judged.reason, judged.ok) == (state, reason, reason == ""), judged.detail
    assert c.price(agent.usage, PRICES) == (cost if cost is None else pytest.approx(cost))
    assert (agent.tokens_in, agent.tokens_out) == (tokens_in, tokens_out)
    assert agent.final_text.startswith("slow ") if text is ... else agent.final_text == text
    assert bool(judged.detail) == (not judged.ok)
    argv = recording(name)[1]["argv"]
    if agent.lines and "--session-id" in argv:
        assert agent.session_id == argv[argv.index("--session-id") + 1]


@pytest.mark.parametrize("name, words", [
    ("d_429_daily", "You have exhausted your daily quota on this model"), ("e_503", "overloaded. Please try again"),
    ("e_503", "HTTP 503"), ("f_400_bad_key", "API key not valid"), ("f_404", "models/x is not found"),
    ("a_untrusted_yolo", "does not trust the working directory: Gemini CLI is not running in a trusted directory"),
    ("x_no_auth", "GEMINI_API_KEY"), ("i_lost_6_resume", "cannot be resumed: Error resuming session"),
    ("j_same_session_id", "already exists"), ("k_sigterm_streaming", "Loop detected"),
    ("k_sigterm_norelaunch_tool", "without a result line"), ("c_denied_default", "leave agent.permission_mode out"),
    ("c_denied_default", "run_shell_command"), ("d_429_daily_json", "exhausted your daily quota"),
])
def test_the_detail_says_what_a_person_needs(name, words):
    assert words in replay(name)[1].detail


@pytest.mark.parametrize("name, resumable", [
    ("a_text", True), ("d_429_after_tool", True), ("k_pg_sigterm_streaming", True), ("i_lost_6_resume", False),
    ("i_resume_other_cwd", False), ("x_no_auth", False), ("j_same_session_id", False),
])
def test_a_session_is_resumed_only_where_it_exists(name, resumable):
    assert replay(name)[1].resume is resumable


def test_a_daily_quota_is_full_again_at_midnight_in_california():
    assert c.format_time(replay("d_429_daily")[1].retry_at) == "2026-11-21T08:00:00.000Z"
    assert c.format_time(replay("d_429_daily", ended_at=ENDED + 10.5 * 3600)[1].retry_at) == "2026-11-22T08:00:00.000Z"
    assert replay("d_429_daily", ended_at=None)[1].retry_at is None


@pytest.mark.parametrize("name", ["k_pg_sigterm_streaming", "k_sigterm_norelaunch_tool"])
def test_a_run_that_was_stopped_and_exits_with_0_was_stopped(name):
    assert replay(name, stop_reason="cancelled")[1].state == "CANCELLED"
    assert replay(name, stop_reason="timed_out", limit_s=60.0)[1].state == "TIMED_OUT"


# -- exit codes

@pytest.mark.parametrize("code, reason", [
    (41, "auth"), (42, "bad_task"), (44, "spawn_failed"), (52, "bad_task"), (53, "max_turns"), (54, "agent_error"),
    (55, "bad_task"), (130, "agent_error"), (144, "bad_task"), (145, "auth"), (147, "auth"), (148, "bad_task"),
    (173, "rate_limited"), (244, "api_error"), (247, "api_error"), (137, "agent_error"), (127, "agent_error")])
def test_an_exit_code_is_decoded(code, reason):
    judged = verdict(INIT, code=code)
    assert judged.reason == reason and "signal 45" not in judged.detail
    assert ("HTTP" in judged.detail) is (code >= 144)


def test_a_program_that_is_not_there_is_named_with_its_key():
    judged = verdict(code=127, program_key="gemini_binary_path")
    assert judged.reason == "spawn_failed" and "set gemini_binary_path" in judged.detail


# -- limits

@pytest.mark.parametrize("stderr, reason, wait_s", [
    (dump(), "quota_exhausted", 10 * 3600), (dump(delay="3600000"), "rate_limited", 3600),
    (dump("RetryableQuotaError", delay="60000"), "rate_limited", 60),
    (dump("RetryableQuotaError"), "rate_limited", None),
    (dump(delay="7200000", reason="'QUOTA_EXHAUSTED'"), "quota_exhausted", 7200),
    (dump(reason="'MODEL_CAPACITY_EXHAUSTED'"), "rate_limited", None),
    (dump(reason="'INSUFFICIENT_G1_CREDITS_BALANCE'"), "quota_exhausted", 10 * 3600),
    ("", "rate_limited", None), ("TerminalQuotaError retryDelayMs: 5", "rate_limited", None),
    (dump() + dump("RetryableQuotaError", delay="2000"), "rate_limited", 2),  # the last one counts
])
def test_a_429_is_told_apart_by_the_error_that_the_cli_made_of_it(stderr, reason, wait_s):
    judged = verdict(INIT, code=173, stderr_tail=stderr, ended_at=ENDED)
    assert (judged.reason, judged.retry_at) == (reason, wait_s and ENDED + wait_s)


def test_words_of_the_agent_and_of_its_tools_decide_nothing():
    words = "TerminalQuotaError 429 [API Error: You have exhausted your daily quota on this model.] Loop detected"
    error = {"type": "tool_result", "tool_id": "x__1", "status": "error", "output": words, "error": {"type": words}}
    assert verdict(INIT, says(words), error, says(words), DONE, stderr_tail=words + dump()).ok
    assert verdict(INIT, says(words), DONE, code=1, stderr_tail=words).reason == "agent_error"


def test_an_overload_is_waited_out_and_a_server_error_is_an_api_error():
    assert verdict(INIT, code=247, stderr_tail=dump("RetryableQuotaError", 503)).reason == "rate_limited"
    assert verdict(INIT, code=244, stderr_tail=dump("ServerError", 500)).reason == "api_error"


# -- ends that look like a success

def test_a_result_of_error_with_exit_code_0_gives_the_last_error_line():
    errors = [{"type": "error", "severity": "error", "message": words} for words in ("first", "blocked for SAFETY")]
    judged = verdict(INIT, *errors, {"type": "result", "status": "error", "stats": {}})
    assert judged.reason == "api_error" and "blocked for SAFETY" in judged.detail and "first" not in judged.detail
    assert "no message" in verdict(INIT, {"type": "result", "status": "error"}).detail


@pytest.mark.parametrize("words, reason", [("Loop detected, stopping execution", "agent_error"),
                                           ("Maximum session turns exceeded", "max_turns")])
def test_an_agent_that_stopped_itself_did_not_succeed(words, reason):
    judged = verdict(INIT, says("x"), {"type": "error", "severity": "warning", "message": words}, DONE)
    assert (judged.reason, judged.ok) == (reason, False) and words in judged.detail


def test_other_warnings_do_not_matter():
    assert verdict(INIT, {"type": "error", "severity": "warning", "message": "Agent execution blocked"}, DONE).ok


def test_a_question_blocks_also_where_a_tool_was_denied():
    judged = replay("c_denied_default", question=c.parse_question('{"text": "Which?", "options": ["a"]}'))[1]
    assert (judged.state, judged.reason) == ("BLOCKED", "")


def test_a_tool_that_the_task_forbids_is_no_denial():
    assert replay("c_denied_default", disallowed_tools=("run_shell_command",))[1].ok


# -- the stream

def test_the_text_after_the_last_tool_result_is_the_answer_and_the_last_summary_counts():
    agent = facts_of(lines(INIT, says("a\n## Sum"), says("mary\nfirst"), TOOL, says("b\n## Summary\nsecond"), TOOL,
                           says("the "), says("end"), DONE))
    assert (agent.final_text, agent.summary_text) == ("the end", "second")
    agent = facts_of(lines(INIT, says("## Summary\nold"), TOOL, says("## Summary\n"), says("new")))
    assert agent.summary_text == "new"


def test_a_whole_message_begins_anew():
    whole = {"type": "message", "role": "assistant", "content": "whole"}
    assert facts_of(lines(INIT, says("piece"), whole)).final_text == "whole"


def test_an_older_versions_fence_is_no_output():
    data = b"```json\n" + lines(INIT, says("x"), DONE) + b"```\n"
    agent = facts_of(data)
    assert agent.garbage_lines == 0 and agent.session_id == "s" and agent.result_seen


@pytest.mark.parametrize("name", ["b_question_file", "d_429_after_tool", "c_denied_default"])
def test_every_split_of_the_stream_gives_the_same_facts(name):
    data = recording(name)[0]
    whole = facts_of(data)
    for at in range(0, len(data), 7):
        splitter, stream = c.LineSplitter(), c.GeminiStream()
        for line in splitter.feed(data[:at], stream.BORING) + splitter.feed(data[at:], stream.BORING):
            stream.feed_line(line)
            stream.facts()
        assert stream.facts().replace(lines=0) == whole.replace(lines=0)


def test_any_bytes_are_taken():
    data = recording("b_question_file")[0]
    for at in range(0, len(data), 5):
        c.judge(agent=facts_of(data[:at] + b"\xff{" + data[at + 3:]), exit_code=0, format="gemini", kind="gemini")
    for value in (None, 3, "x", [], {}, True):
        for kind in ("init", "message", "tool_result", "error", "result"):
            agent = facts_of(lines(INIT, {"type": kind, **dict.fromkeys(
                ("session_id", "model", "role", "content", "message", "status", "error", "stats", "tool_id"), value)}))
            c.judge(agent=agent, exit_code=0, format="gemini", kind="gemini")
    bad = {"models": {"m": {"input_tokens": "1", "output_tokens": 2}}}
    assert facts_of(lines(INIT, {**DONE, "stats": bad})).tokens_in is None


def test_a_long_text_keeps_its_end_and_bounded_memory():
    stream = c.GeminiStream()
    for number in range(80):
        stream.feed_line(json.dumps(says("y" * 100_000)).encode())
    stream.feed_line(json.dumps(says("\n## Summary\nall is well")).encode())
    assert stream.facts().summary_text == "all is well" and sum(map(len, stream._pieces)) < 3 << 20


# -- prices

def test_an_unknown_price_is_an_unknown_cost():
    usage = {"a": {"input": 10, "cached": 0, "output": 1}, "b": {"input": 0, "cached": 0, "output": 0}}
    assert c.price(usage, {"a": {"input": 1e6, "cached": 0, "output": 0}}) == pytest.approx(10)
    assert c.price(usage, {"b": {"input": 1, "cached": 0, "output": 1}}) is None
    assert c.price({"a": {"input": 10, "cached": 4, "output": 0}}, {"a": {"input": 1e6, "cached": None, "output": 0}}) == pytest.approx(10)
    assert c.price(None, {}) is None and c.price({}, {}) is None
    assert c.price({"": usage["a"]}, {"m": {"input": 0, "cached": 0, "output": 2e6}}, "m") == pytest.approx(2)
