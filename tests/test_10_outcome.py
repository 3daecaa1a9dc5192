"""Section 10: the verdict on every recorded run, and the rules one by one."""
import glob
import json
import os
import random

import claudomator as c
import pytest

DATA = os.path.join(os.path.dirname(__file__), "data", "claude")
OK, FAIL = ("COMPLETED", ""), "FAILED"

# Written by hand from what the CLI was made to do: name -> (state, reason, USD, tokens in, tokens out) of that run.
ONE, TWO, NONE = (0.0025, 1000, 50), (0.005, 2000, 100), (None, None, None)
OPUS = (0.005, 1000, 50)  # one answer of a model at twice the price
NOTHING = (0, 0, 0)
EXPECTED = {
    "a_text": (*OK, *ONE), "b_question_file": (*OK, *TWO), "c_allowedtools": (*OK, *TWO),
    "c_denied_default": (FAIL, "permission_denied", *TWO), "c_denied_manual": (FAIL, "permission_denied", *TWO),
    "c_disallowed_pattern": (*OK, *TWO),  # the task itself forbids it
    "c_disallowedtools": (*OK, *TWO),
    "d_429_bare_default": (FAIL, "rate_limited", *NOTHING), "d_429_default": (FAIL, "rate_limited", *NOTHING),
    "d_429_retries0": (FAIL, "rate_limited", *NOTHING), "d_429_retries2": (FAIL, "rate_limited", *NOTHING),
    "d_429_retryafter_3600": (FAIL, "rate_limited", *NOTHING), "d_429_retryafter_60": (FAIL, "rate_limited", *NOTHING),
    "d_429_then_ok": (*OK, *ONE), "d_429_unified": (FAIL, "rate_limited", *NOTHING),
    "d_oauth_429_after_tool": (FAIL, "quota_exhausted", *ONE), "d_oauth_429_plain": (FAIL, "rate_limited", *NOTHING),
    "d_oauth_429_unified_5h": (FAIL, "quota_exhausted", *NOTHING), "d_oauth_allowed": (*OK, *ONE),
    "d_oauth_allowed_warning": (*OK, *ONE), "e_500_retries1": (FAIL, "api_error", *NOTHING),
    "e_529_default": (FAIL, "rate_limited", *NOTHING), "e_529_retries0": (FAIL, "rate_limited", *NOTHING),
    "e_529_retries2": (FAIL, "rate_limited", *NOTHING), "e_hang_default": (FAIL, "agent_error", *NONE),
    "f_400": (FAIL, "bad_task", *NOTHING), "f_401": (FAIL, "agent_error", *NONE),  # killed by the probe
    "f_401_default": (FAIL, "auth", *NOTHING), "f_401_retries1": (FAIL, "auth", *NOTHING),
    "f_403": (FAIL, "auth", *NOTHING), "f_no_credentials": (FAIL, "auth", *NOTHING),
    "f_oauth_401": (FAIL, "auth", *NOTHING),
    "f_toolong": (FAIL, "bad_task", *NOTHING), "g_budget_loop": ("BUDGET_EXCEEDED", "budget", 0.8, 200_000, 40_000),
    "g_budget_text": ("BUDGET_EXCEEDED", "budget", 0.4, 100_000, 20_000),
    "h_maxturns": (FAIL, "max_turns", 0.0075, 3000, 150), "i_resume_0_first": (*OK, *TWO),
    "i_resume_10_after_budget": (*OK, *ONE),  # total_cost_usd says 0.8025: the session's, not the run's
    "i_resume_11_noprompt": (FAIL, "bad_task", *NONE), "i_resume_1_same_cwd": (*OK, *ONE),
    "i_resume_2_other_cwd": (*OK, *ONE), "i_resume_4_not_uuid": (FAIL, "agent_error", *NOTHING),
    "i_resume_5_fork": (*OK, *ONE), "i_resume_6_fork_sid": (*OK, *ONE),
    "i_resume_7_resume_and_sid": (FAIL, "bad_task", *NONE),
    "i_resume_8_continue": (*OK, *ONE), "i_resume_9_by_path": (*OK, *ONE),
    "j_bad_session_id": (FAIL, "bad_task", *NONE),
    "j_same_session_id_again": (FAIL, "bad_task", *NONE), "j_same_session_id_other_cwd": (*OK, *ONE),
    "k_attached_child": (*OK, *TWO), "k_bg_task": (*OK, 0.0075, 3000, 150),  # two result lines
    "k_bg_task_disabled": (*OK, *TWO), "k_detached_child": (*OK, *TWO),
    "k_sigint_streaming": (FAIL, "agent_error", 0.00213, 1000, 13),
    "k_sigkill_streaming_then_resume_0": (FAIL, "agent_error", *NONE),
    "k_sigkill_streaming_then_resume_1": (*OK, *ONE),
    "k_sigkill_tool": (FAIL, "agent_error", *NONE), "k_sigterm_hang": (FAIL, "agent_error", *NONE),
    "k_sigterm_streaming": (FAIL, "agent_error", *NONE), "k_sigterm_tool": (FAIL, "agent_error", *NONE),
    "k_sigterm_tool_then_resume": (*OK, *ONE), "k_sleep_blocked": (*OK, *TWO), "l_bash_5MB": (*OK, *TWO),
    "l_read_200KB": (*OK, *TWO), "l_read_png": (*OK, *TWO), "l_text_5MB": (*OK, *ONE), "l_write_3MB": (*OK, *TWO),
    "m_partial": (*OK, *TWO), "n_no_persistence": (*OK, *ONE),
    "x_acceptedits_write": (FAIL, "permission_denied", *TWO),
    "x_acceptedits_write_adddir": (*OK, *TWO), "x_adddir_missing": (*OK, *OPUS),
    "x_allowedtools_eats_prompt": (FAIL, "bad_task", *NONE), "x_ask": (*OK, *TWO),
    "x_bad_mcp": (FAIL, "bad_task", *NONE),
    "x_bad_model": (*OK, *OPUS), "x_badtool": (*OK, *TWO), "x_bare": (*OK, *OPUS), "x_bashfail": (*OK, *TWO),
    "x_budget_zero": (FAIL, "bad_task", *NONE), "x_dontask": (FAIL, "permission_denied", *TWO), "x_empty": (*OK, *TWO),
    "x_empty_prompt": (FAIL, "bad_task", *NONE), "x_input_stream_json": (*OK, *TWO), "x_json_schema": (*OK, *ONE),
    "x_json_schema_bad": (*OK, 0.01, 4000, 200), "x_json_schema_never": (*OK, *TWO), "x_mcp_fail": (*OK, *OPUS),
    "x_midstream_error": (*OK, *ONE), "x_no_verbose": (FAIL, "bad_task", *NONE), "x_output_json": (*OK, *ONE),
    "x_plan_mode": (FAIL, "permission_denied", *TWO), "x_prompt_dash": (FAIL, "bad_task", *NONE),
    "x_prompt_dash_ok": (*OK, *ONE), "x_prompt_stdin": (*OK, *ONE), "x_resume_system_snapshot_off": (*OK, *ONE),
    "x_root_no_sandbox_env": (FAIL, "bad_task", *NONE), "x_settings_deny": (FAIL, "permission_denied", *TWO),
    "x_stdin_never_closed": (*OK, *ONE), "x_stdin_pipe_open": (*OK, *ONE), "x_thinking": (*OK, *ONE),
    "x_tools_empty": (*OK, *OPUS), "x_unknown_flag": (FAIL, "bad_task", *NONE),
}

# What fakes/record_claude.py recorded, alike for both versions; USD for 2.1.197 and 2.1.329, whose prices differ.
JOBS = {
    "text_1": (*OK, (0.00375, 0.0025), 1000, 50), "big_line_1": (*OK, (0.00375, 0.0025), 1000, 50),
    "slow_tool_2": (*OK, (0.00375, 0.0025), 1000, 50), "write_1": (*OK, (0.0075, 0.005), 2000, 100),
    "gated_1": (*OK, (0.0075, 0.005), 2000, 100), "question_1": (*OK, (0.0075, 0.005), 2000, 100),
    "question_2": (*OK, (0.0075, 0.005), 2000, 100), "question_3": (*OK, (0.0075, 0.005), 2000, 100),
    "budget_1": ("BUDGET_EXCEEDED", "budget", (1.0, 0.8), 100_000, 20_000),
    "error_401_1": (FAIL, "auth", (0, 0), 0, 0), "error_500_1": (FAIL, "api_error", (0, 0), 0, 0),
    "limit_429_1": (FAIL, "rate_limited", (0, 0), 0, 0), "no_model_1": (FAIL, "bad_task", (0, 0), 0, 0),
    "unknown_session_1": (FAIL, "agent_error", (0, 0), 0, 0),
    "escape_1": (FAIL, "agent_error", (None, None), None, None),  # both were ended by the probe's SIGTERM
    "slow_tool_1": (FAIL, "agent_error", (None, None), None, None),
}
EXPECTED |= {f"job_{version}_{name}": (state, reason, costs[at], tokens_in, tokens_out)
             for name, (state, reason, costs, tokens_in, tokens_out) in JOBS.items()
             for at, version in enumerate(("2.1.197", "2.1.329"))}


def stream_facts(data: bytes) -> c.AgentFacts:
    splitter, stream = c.LineSplitter(), c.ClaudeStream()
    for line in splitter.feed(data):
        stream.feed_line(line)
    last = splitter.finish()
    if last is not None:
        stream.feed_line(last)
    return stream.facts()


def replay(name: str, **more) -> tuple:
    """(facts, verdict) of a recorded run."""
    with open(os.path.join(DATA, name + ".jsonl"), "rb") as file:
        agent = stream_facts(file.read())
    with open(os.path.join(DATA, name + ".meta.json"), encoding="utf-8") as file:
        meta = json.load(file)
    argv, code = meta["argv"], meta["exit_code"]
    given = dict(agent=agent, exit_code=128 - code if code < 0 else code, stderr_tail=meta["stderr_tail"],
                 resumed="--resume" in argv,
                 disallowed_tools=tuple(argv[at + 1] for at, word in enumerate(argv) if word == "--disallowedTools"))
    return agent, c.judge(**{**given, **more})


def done(**more) -> c.AgentFacts:
    return c.AgentFacts(lines=3, session_id="s", model="m", result_seen=True, subtype="success", **more)


def failed(**more) -> c.AgentFacts:
    return done(is_error=True, terminal_reason="api_error", error_texts=("message",), **more)


def reason_of(agent: c.AgentFacts, exit_code=1, **more) -> str:
    return c.judge(agent=agent, exit_code=exit_code, **more).reason


# -- recorded runs

def test_the_table_covers_every_recorded_stream():
    assert set(EXPECTED) == {os.path.basename(path)[:-6] for path in glob.glob(os.path.join(DATA, "*.jsonl"))}


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict_cost_and_tokens_of_a_recorded_run(name):
    agent, verdict = replay(name)
    state, reason, cost, tokens_in, tokens_out = EXPECTED[name]
    assert (verdict.state, verdict.reason, verdict.ok) == (state, reason, reason == "")
    assert agent.cost_usd == (cost if cost is None else pytest.approx(cost))
    assert (agent.tokens_in, agent.tokens_out) == (tokens_in, tokens_out)
    assert bool(verdict.detail) == (not verdict.ok)
    assert verdict.reason == "" or c.REASONS[verdict.reason]["state"] == state


def test_the_cost_of_a_resumed_session_adds_up_to_its_total():
    runs = ["i_resume_0_first", "i_resume_1_same_cwd", "i_resume_2_other_cwd"]
    assert sum(replay(name)[0].cost_usd for name in runs) == pytest.approx(0.01)  # total_cost_usd of the last one
    runs = [f"job_2.1.329_question_{number}" for number in (1, 2, 3)]
    assert sum(replay(name)[0].cost_usd for name in runs) == pytest.approx(0.015)


@pytest.mark.parametrize("name, words", [
    ("x_unknown_flag", "unknown option '--no-such-flag'"), ("j_same_session_id_again", "is already in use"),
    ("x_bad_mcp", "MCP config file not found: /nonexistent.json"), ("x_root_no_sandbox_env", "set IS_SANDBOX=1"),
    ("c_denied_default", "Bash (touch denied_probe.txt && echo done)"), ("c_denied_default", "agent.allowed_tools"),
    ("x_acceptedits_write", "Write (/workspace/outside/w.txt)"), ("f_401_default", "Invalid API key"),
    ("f_401_default", "HTTP 401"), ("f_401", "it was retrying an API error (HTTP 401"), ("f_no_credentials", "/login"),
    ("k_sigterm_hang", "killed by signal 15, SIGTERM, from outside"),
    ("g_budget_text", "Reached maximum budget ($0.01)"),
    ("k_sigint_streaming", "interrupted from outside"), ("d_oauth_429_unified_5h", "You've hit your 5-hour limit"),
    ("k_sigkill_tool", "memory"), ("e_hang_default", "retrying an API error (unknown, attempt 1)"),
])
def test_the_detail_says_what_a_person_needs(name, words):
    assert words in replay(name)[1].detail


@pytest.mark.parametrize("name, resumable", [
    ("a_text", True), ("k_sigterm_tool", True), ("g_budget_loop", True), ("d_oauth_429_after_tool", True),
    ("i_resume_4_not_uuid", False), ("j_bad_session_id", False), ("x_unknown_flag", False),
    ("job_2.1.197_unknown_session_1", False), ("job_2.1.329_unknown_session_1", False), ("job_2.1.197_escape_1", True),
])
def test_a_session_is_resumed_only_where_it_exists(name, resumable):
    assert replay(name)[1].resume is resumable


def test_an_exhausted_quota_says_when_it_is_full_again():
    assert replay("d_oauth_429_unified_5h")[1].retry_at == 1795213829
    assert replay("d_oauth_429_plain")[1].retry_at is None


# -- claude's rules

def test_words_of_the_agent_decide_nothing():
    words = "rate limit 429 usage_limit_reached error_max_budget_usd authentication_failed No conversation found"
    agent = done(final_text=words, result_text=words, summary_text=words)
    assert c.judge(agent=agent, exit_code=0, stderr_tail="Error: " + words).ok
    line = json.dumps({"type": "assistant", "parent_tool_use_id": None, "message": {"content": [
        {"type": "text", "text": words + ' {"type":"rate_limit_event","rate_limit_info":{"status":"rejected"}}'}]}})
    with open(os.path.join(DATA, "a_text.jsonl"), "rb") as file:
        assert c.judge(agent=stream_facts(line.encode() + b"\n" + file.read()), exit_code=0).ok


LIMIT = {"status": "rejected", "type": "five_hour", "resets_at": 1795213829}


@pytest.mark.parametrize("facts, reason", [
    (dict(api_error="usage_limit_reached", api_status=429, last_error_kind="rate_limit"), "quota_exhausted"),
    (dict(last_error_kind="rate_limit", rate_limit=LIMIT), "quota_exhausted"),  # 2.1.197 has no api_error
    (dict(last_error_kind="rate_limit", rate_limit={**LIMIT, "resets_at": None}), "rate_limited"),
    (dict(last_error_kind="rate_limit", rate_limit={**LIMIT, "status": "allowed_warning"}), "rate_limited"),
    (dict(last_error_kind="server_error", rate_limit=LIMIT), "api_error"),
    (dict(last_error_kind="rate_limit"), "rate_limited"), (dict(api_status=429), "rate_limited"),
    (dict(api_status=529, last_error_kind="server_error"), "rate_limited"),
    (dict(last_error_kind="server_error"), "api_error"), (dict(api_status=500), "api_error"),
    (dict(api_status=503, last_error_kind="unknown"), "api_error"), (dict(last_error_kind="unknown"), "api_error"),
    (dict(last_error_kind="billing_error", api_status=400), "auth"),
    (dict(last_error_kind="authentication_failed", api_status=429), "auth"),
    (dict(api_status=401), "auth"), (dict(api_status=403, last_error_kind="unknown"), "auth"),
    (dict(last_error_kind="model_not_found", api_status=404), "bad_task"),
    (dict(last_error_kind="invalid_request"), "bad_task"), (dict(api_status=413), "bad_task"),
    (dict(last_error_kind="max_output_tokens", api_error="max_output_tokens"), "agent_error"),
    (dict(stop_reason="refusal"), "agent_error"),
])
def test_an_api_error_has_the_reason_that_its_fields_name(facts, reason):
    assert reason_of(failed(**facts)) == reason


def test_an_unpaid_account_and_a_refusal_are_said_in_words():
    assert "credit balance" in c.judge(agent=failed(last_error_kind="billing_error"), exit_code=1).detail
    assert "refuses the task" in c.judge(agent=failed(stop_reason="refusal"), exit_code=1).detail


@pytest.mark.parametrize("subtype, terminal, reason", [
    ("error_max_turns", "", "max_turns"), ("error_max_budget_usd", "", "budget"),
    ("error_during_execution", "", "agent_error"),
    ("error_max_structured_output_retries", "", "agent_error"), ("success", "prompt_too_long", "bad_task"),
    ("error_during_execution", "aborted_tools", "agent_error"), ("success", "completed", "agent_error"),
])
def test_other_errors_by_subtype_and_terminal_reason(subtype, terminal, reason):
    agent = done(is_error=True, error_texts=("why",)).replace(subtype=subtype, terminal_reason=terminal)
    assert reason_of(agent) == reason


def test_an_allowed_rate_limit_event_has_no_effect():
    assert c.judge(agent=done(rate_limit={**LIMIT, "status": "allowed"}), exit_code=0).ok
    assert c.judge(agent=done(rate_limit=LIMIT, last_error_kind="rate_limit"), exit_code=0).ok  # overage took over


def test_success_needs_exit_0_and_a_last_result_that_is_no_error():
    assert reason_of(done(), 0) == ""
    assert reason_of(done(), 3) == "agent_error" and reason_of(done(), None) == "lost"
    assert reason_of(done(is_error=True), 0) == "agent_error"
    assert reason_of(c.AgentFacts(lines=3, session_id="s"), 0) == "no_result"
    assert reason_of(c.AgentFacts(), 0) == "no_result"
    assert reason_of(c.AgentFacts(lines=3, session_id="s"), 1) == "agent_error"
    assert reason_of(c.AgentFacts(), 1) == "agent_error"  # and nothing on stderr


def test_a_truncated_stream_has_no_result():
    with open(os.path.join(DATA, "a_text.jsonl"), "rb") as file:
        data = file.read()
    verdict = c.judge(agent=stream_facts(data[:-30]), exit_code=0)
    assert (verdict.state, verdict.reason, verdict.resume) == ("FAILED", "no_result", True)


@pytest.mark.parametrize("stop, state",
                         [("cancelled", "CANCELLED"), ("timed_out", "TIMED_OUT"), ("stalled", "TIMED_OUT")])
def test_a_stop_wins_over_all_but_a_finished_run(stop, state):
    for agent in (c.AgentFacts(), failed(api_status=429), done(is_error=True).replace(subtype="error_max_turns")):
        for code in (0, 1, 143, 137, None):
            verdict = c.judge(agent=agent, exit_code=code, stop_reason=stop)
            assert (verdict.state, verdict.reason) == (state, stop)
    assert c.judge(agent=done(), exit_code=0, stop_reason=stop).ok  # it ended just before
    assert not c.judge(agent=done(), exit_code=143, stop_reason=stop).ok
    assert replay("k_sigint_streaming", stop_reason=stop)[1].reason == stop


def test_a_timeout_says_the_limit_and_what_the_agent_was_waiting_for():
    verdict = replay("e_hang_default", stop_reason="timed_out", limit_s=900.0)[1]
    assert verdict.detail == "it reached its timeout of 15m; it was retrying an API error (unknown, attempt 1)"
    assert "stall_timeout of 1h" in c.judge(agent=c.AgentFacts(), exit_code=143, stop_reason="stalled",
                                            limit_s=3600).detail


def test_an_agent_that_cannot_be_started():
    verdict = c.judge(agent=c.AgentFacts(), exit_code=127,
                      stderr_tail="timeout: failed to run command 'claude': No such file")
    assert verdict.reason == "spawn_failed" and "not on PATH" in verdict.detail
    assert "claude_binary_path" in verdict.detail
    verdict = c.judge(agent=c.AgentFacts(), exit_code=127, kind="local", program_key="")
    assert verdict.detail == "local is not installed or not on PATH; install it"
    assert reason_of(c.AgentFacts(), 126) == reason_of(c.AgentFacts(), 125) == "spawn_failed"
    assert reason_of(c.AgentFacts(lines=1), 127) == "agent_error"
    verdict = c.judge(agent=c.AgentFacts(), exit_code=None, spawn_error="no such program: claude",
                      stop_reason="cancelled")
    assert (verdict.reason, verdict.detail) == ("spawn_failed", "no such program: claude")


def test_a_lost_session_is_an_agent_error_and_is_not_resumed_again():
    gone = c.AgentFacts(lines=1, result_seen=True, is_error=True, subtype="error_during_execution",
                        error_texts=("No conversation found with session ID: x",))
    for run in (dict(agent=gone), dict(agent=c.AgentFacts(), stderr_tail="No conversation found with session ID: x")):
        verdict = c.judge(exit_code=1, resumed=True, **run)
        assert (verdict.reason, verdict.resume) == ("agent_error", False)
        assert "No conversation found" in verdict.detail


def test_a_resumed_run_that_was_stopped_before_its_first_line_can_be_resumed():
    assert c.judge(agent=c.AgentFacts(), exit_code=143, stop_reason="cancelled", resumed=True).resume
    assert not c.judge(agent=c.AgentFacts(), exit_code=143, stop_reason="cancelled").resume


def denied(tool, **given):
    return done(denials=({"tool": tool, "input": given},))


@pytest.mark.parametrize("agent, entries, is_fine", [
    (denied("Bash", command="touch x && ls"), ("Bash",), True),
    (denied("Bash", command="ls; touch x"), ("Bash(touch:*)",), True),
    (denied("Bash", command="ls"), ("Bash(touch:*)",), False),
    (denied("Bash", command="ls"), ("Write", " Bash(ls)"), True),
    (denied("Bash", command="cat touch"), ("Bash(touch:*)",), False),
    (denied("Write", file_path="/x"), ("Bash",), False),
    (denied("mcp__db__drop"), ("mcp__db",), True), (denied("mcp__dbx__drop"), ("mcp__db",), False),
    (denied("Read", file_path="/etc/x"), ("Read(/etc/**)",), True), (denied("Bash"), (), False),
    (done(denials=({"tool": "Bash", "input": {}}, {"tool": "Write", "input": {}})), ("Bash",), False),
])
def test_denied_tools_fail_the_run_unless_the_task_disallows_them(agent, entries, is_fine):
    assert reason_of(agent, 0, disallowed_tools=entries) == ("" if is_fine else "permission_denied")


def test_many_denials_are_named_in_short():
    denials = tuple({"tool": "Bash", "input": {"command": "x" * 400}} for _ in range(9))
    detail = c.judge(agent=done(denials=denials), exit_code=0).detail
    assert "and 6 more" in detail and "allowed_tools: [Bash]" in detail and len(detail) <= c.DETAIL_LIMIT


# -- plain text

def test_a_script_is_judged_by_its_exit_status():
    def run(code, stderr="", **more):
        return c.judge(agent=c.AgentFacts(lines=1), exit_code=code, format="text", kind="shell", stderr_tail=stderr,
                       **more)
    assert run(0).ok and run(0, "Warning: x\nerror y").ok
    verdict = run(75, "first\nlast line\n\n")
    assert (verdict.state, verdict.reason, verdict.detail) == ("FAILED", "agent_error",
                                                               "shell exited with code 75: last line")
    assert run(127, "sh: 1: nope: not found").reason == "agent_error"
    assert "SIGTERM" in run(143).detail and run(None).reason == "lost"
    assert run(0, stop_reason="timed_out").state == "TIMED_OUT"  # a trap that exits with 0 proves nothing
    assert run(0, spawn_error="no").reason == "spawn_failed"
    assert not run(1).resume


# -- questions and summaries

QUESTIONS = [
    ("", "none", "", ()), (" \n", "none", "", ()), ("{}", "none", "", ()), ("null", "none", "", ()),
    ('""', "none", "", ()),
    ('{"text": "Which DB?", "options": ["pg", "sqlite"]}', "question", "Which DB?", ("pg", "sqlite")),
    ('{"text": "Pick one", "options": ["a"]}', "question", "Pick one", ("a",)),
    ('{"text": "Go on?"}', "question", "Go on?", ()),
    ('{"question": "Go on?", "options": null}', "question", "Go on?", ()),
    ('{"text": "All done, tests pass.", "options": []}', "report", "All done, tests pass.", ()),
    ('{"text": " Done. "}', "report", "Done.", ()), ('"Done."', "report", "Done.", ()),
    ('"Sure?"', "question", "Sure?", ()),
    ('{"text": "\\u7d9a\\u3051\\u307e\\u3059\\u304b\\uff1f"}', "question", "続けますか？", ()),
    ("All done, I think", "question", "All done, I think", ()), ('{"text": "cut', "question", '{"text": "cut', ()),
    ('["a"]', "question", '["a"]', ()), ("7", "question", "7", ()), ('{"note": 1}', "question", '{"note": 1}', ()),
    ('{"options": ["a", 2, null, {"label": "c", "description": "d"}, {"label": "e"}, {"text": "f"}, []]}', "question",
     "Which one?", ("a", "2", "c - d", "e", "f", "[]")),
]


@pytest.mark.parametrize("text, kind, words, options", QUESTIONS)
def test_question_file(text, kind, words, options):
    assert c.parse_question(text) == c.Question(kind, words, options)


def test_a_question_file_is_bounded_and_never_raises():
    assert len(c.parse_question("x" * 1_000_000).text) == c.QUESTION_LIMIT
    assert c.parse_question('{"text": "a?\\ud800"}').text == "a??"
    rnd = random.Random(9)
    for _ in range(2000):
        text = list(rnd.choice(QUESTIONS)[0] or "{")
        for _ in range(3):
            text.insert(rnd.randrange(len(text) + 1), rnd.choice('{}[]",:\\\ud800n1'))
        c.format_json(c.parse_question("".join(text)).__dict__).encode()


def test_a_question_blocks_a_run_that_ended_well():
    question = c.parse_question('{"text": "Which?", "options": ["a"]}')
    verdict = c.judge(agent=done(), exit_code=0, question=question)
    assert (verdict.ok, verdict.state, verdict.reason, verdict.resume) == (False, "BLOCKED", "", True)
    assert verdict.question_json() == {"text": "Which?", "options": ["a"]}
    assert c.judge(agent=denied("Bash"), exit_code=0, question=question).state == "BLOCKED"
    assert c.judge(agent=c.AgentFacts(), exit_code=0, format="text", question=question).state == "BLOCKED"


def test_a_failure_wins_over_a_question_which_is_kept():
    question = c.parse_question("Which one?")
    for run in (dict(agent=failed(api_status=429), exit_code=1), dict(agent=done(), exit_code=1),
                dict(agent=c.AgentFacts(), exit_code=143, stop_reason="cancelled"),
                dict(agent=done(), exit_code=None)):
        verdict = c.judge(question=question, **run)
        assert verdict.reason and verdict.state != "BLOCKED" and verdict.question_json()["text"] == "Which one?"


def test_a_completion_report_is_the_summary_and_does_not_block():
    verdict = c.judge(agent=done(summary_text="from the text"), exit_code=0,
                      question=c.parse_question('{"text": "Did it."}'))
    assert verdict.ok and verdict.summary == "Did it." and verdict.question_json() is None


def test_the_summary_is_the_first_there_is():
    report, agent = c.Question("report", "report"), c.AgentFacts(summary_text="heading")
    assert c.choose_summary(" file\n", report, agent) == "file"
    assert c.choose_summary(" \n", report, agent) == "report"
    assert c.choose_summary("", c.Question("question", "q?"), agent) == "heading"
    assert c.choose_summary("", c.Question(), c.AgentFacts()) == ""
    assert c.choose_summary("a" + "é" * 5000, report, agent) == "a" + "é" * 2047  # 4 KB, no half character
    assert c.judge(agent=agent, exit_code=1, summary_file="f").summary == "f"


@pytest.mark.parametrize("text, expected", [
    (" 3 files changed, 12 insertions(+), 4 deletions(-)\n", (3, 12, 4)),
    (" 1 file changed, 2 deletions(-)", (1, 0, 2)),
    ("1 file changed, 1 insertion(+)", (1, 1, 0)), ("2 files changed", (2, 0, 0)),
    ("1 file changed, 9 deletions(-)\nthen\n 2 files changed, 3 insertions(+)", (2, 3, 0)),
    (r'{"content":"[main 1a2b] x\n 2 files changed, 5 insertions(+), 1 deletion(-)\n"}', (2, 5, 1)),
    ("no files changed", None), ("", None), ("٣ files changed", None),
])
def test_changestats(text, expected):
    names = ("files_changed", "insertions", "deletions")
    assert c.parse_changestats(text) == (expected and dict(zip(names, expected)))


@pytest.mark.parametrize("stderr, line", [
    ("", ""), ("a\nb\n", "b"), ("Error: x\nmore\n", "Error: x more"), ("error: a\nnoise\nERROR b\n", "ERROR b"),
    ("real\n[claude-code:unrecognized_model] {}\nWarning: no stdin data\n", "real"), ("\x1b[31mred\x1b[0m\x07", "red"),
])
def test_the_useful_line_of_a_stderr(stderr, line):
    assert c.useful_line(stderr) == line


# -- what goes back to the agent

def test_feedback_prompts():
    text = c.build_feedback_prompt("verify", command="make test", output="head\n" + "é" * 20_000 + "\nFAILED {x}\n")
    assert "$ make test\n[... " in text and "FAILED {x}" in text and len(text.encode()) < c.FEEDBACK_OUTPUT_LIMIT + 600
    assert "head" not in text and "\ufffd" not in text
    text = c.build_feedback_prompt("answer", question="Which {db}?", answer=" pg ")
    assert "You asked:\nWhich {db}?" in text and "The answer is:\npg\n" in text
    assert "not accepted" in c.build_feedback_prompt("reject", comment="too slow")
    assert "too slow" in c.build_feedback_prompt("reject", comment="too slow")
    assert c.build_feedback_prompt("interrupted").endswith("where you stopped.")
    assert c.build_feedback_prompt("interrupted", text="hurry").endswith("where you stopped.\n\nhurry")
