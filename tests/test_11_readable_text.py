"""Section 11: what people see; nothing that an agent wrote may reach the terminal as a command."""
import glob
import json
import os
import random

import claudomator as c
import pytest

DATA = os.path.join(os.path.dirname(__file__), "data", "claude")
NOW = 1795213829.0  # 2026-11-20T22:30:29Z
EVIL = "\x1b[2J\x1b]0;owned\x07\x1bP1$r\x1b\\\x9b31mred\x08\x7f\u202etxt\x85\u2066"


def is_safe(text: str, color: bool = False) -> bool:
    """Whether a terminal would only print it; with ``color`` after our own colours are taken out."""
    if color:
        for code in ("0", *set(c.STATE_COLORS.values()), *"12", *map(str, range(31, 37))):
            text = text.replace(f"\x1b[{code}m", "")
    unsafe = {*range(32), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
    return not {*map(ord, text)} & (unsafe - {ord("\n"), ord("\t")})


def log(record, **more) -> str | None:
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    return c.render_log_line(line, more.pop("format", "claude"), **more)


def user(content, **more):
    return {"type": "user", "message": {"content": [{"type": "tool_result", "content": content, **more}]}}


def call(name, **given):
    return {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": name, "input": given}]}}


# -- safe text

def test_no_escape_sequence_survives():
    assert c.safe_text(EVIL) == "redtxt"
    assert c.safe_text("a\r\nb\rc\td\n") == "a\nb\nc\td\n"
    assert c.safe_text("\x1b]8;;http://x\x07link\x1b]8;;\x07 \x1b(B\x1bc€ü数") == "link €ü数"
    assert c.safe_text("\x1b]0;never ended\nnext") == "\nnext"
    assert c.safe_text("\ud83d") == "?"


def test_safe_text_leaves_nothing_for_the_terminal_to_act_on():
    rnd = random.Random(10)
    alphabet = "\x1b\x9b\x9d[]()?;0123mHJ\x07\\P^_ \n\tabc\u202e\x00\r数"
    for _ in range(5000):
        text = "".join(rnd.choice(alphabet) for _ in range(rnd.randrange(30)))
        assert is_safe(c.safe_text(text)), repr(text)


# -- numbers

def test_ages_costs_and_tokens():
    assert [c.format_age(s) for s in (-5, 0, 3.9, 59, 60, 3599, 3600, 86399, 86400, 30 * 86400)] == [
        "0s", "0s", "3s", "59s", "1m", "59m", "1h", "23h", "1d", "30d"]
    assert [c.format_cost(usd) for usd in (None, 0, 0.0025, 0.5, 1.25, 1234)] == [
        "?", "$0.00", "$0.0025", "$0.5000", "$1.25", "$1234.00"]
    assert [c.format_tokens(n) for n in (None, 0, 999, 1000, 2149, 999_949, 999_950, 1_300_000)] == [
        "?", "0", "999", "1.0k", "2.1k", "999.9k", "1.0M", "1.3M"]


def test_widths_and_cuts_count_columns_not_characters():
    assert c.text_width("abc") == 3 and c.text_width("数据") == 4 and c.text_width("e\u0301") == 1
    assert c.cut_to_width("abcdef", 6) == "abcdef" and c.cut_to_width("abcdef", 5) == "abcd…"
    assert c.cut_to_width("数据库", 5) == "数据…" and c.cut_to_width("数据库", 4) == "数…"
    assert c.cut_to_width("abc", 1) == "…" and c.cut_to_width("abc", 0) == ""
    assert c.one_line(" a\n\n b\t\x1b[1mc ") == "a b c" and c.one_line(None, 3) == "No…"


# -- an agent's log

def test_a_recorded_run_reads_like_a_conversation():
    with open(os.path.join(DATA, "d_oauth_429_after_tool.jsonl"), "rb") as file:
        shown = [c.render_log_line(line, "claude", tz_offset_s=3600) for line in file.read().splitlines()]
    assert shown == [
        "— claude-sonnet-5-5, session 11111111…", "working", "→ Bash: echo did some work", None, "    did some work",
        "… rate limit five hour: rejected, resets at 2026-11-20 23:30",
        "✘ You've hit your 5-hour limit · resets 10:30pm (UTC)",
        "✘ You've hit your 5-hour limit · resets 10:30pm (UTC) · 2 turns · 0.306s · $0.0025 · 1.1k tokens"]


@pytest.mark.parametrize("name, lines", [
    ("a_text", ["✔ success · 1 turn · 0.12s · $0.0025 · 1.1k tokens"]),
    ("i_resume_10_after_budget", ["✔ success · 1 turn · 0.139s · $0.0025 · 1.1k tokens"]),  # of this run alone
    ("d_429_retries2", ["… API error 429, retry 1 in 2.0 s", "… API error 429, retry 2 in 2.1 s"]),
    ("g_budget_loop", ["✘ Reached maximum budget ($0.5) · 2 turns · 0.192s · $0.8000 · 240.0k tokens"]),
    ("l_read_png", ["→ Read: /workspace/img.png", "    [image]"]), ("x_thinking", ["Thought about it."]),
    ("x_ask",
     ["→ AskUserQuestion: questions=(1)", "  ✘ Error: No such tool available: AskUserQuestion. AskUserQuestion is"
               " disabled for this session, in subagents as well as here."]),
    ("k_bg_task", ['… Background command "probe" completed (exit code 0)']),
    ("x_settings_deny",
     ["✘ Bash is not allowed: Permission to use Bash with command touch denied_probe.txt && echo done has"
                         " been denied."]),
])
def test_lines_of_recorded_runs(name, lines):
    with open(os.path.join(DATA, name + ".jsonl"), "rb") as file:
        shown = [c.render_log_line(line, "claude") for line in file.read().splitlines()]
    assert [line for line in shown if line in lines] == lines


def test_no_recorded_line_is_shown_as_json_or_harms_the_terminal():
    for path in glob.glob(os.path.join(DATA, "*.jsonl")):
        with open(path, "rb") as file:
            for line in file.read().splitlines():
                for color in (False, True):
                    text = c.render_log_line(line, "claude", color)
                    assert text is None or is_safe(text, color) and '"type"' not in text and '{"' not in text[:2], path


def test_tool_output_is_shortened_with_a_count():
    assert log(user("\n".join(f"line {n}" for n in range(10)))).split("\n") == [
        *(f"    line {n}" for n in range(6)), "    … 4 more lines"]
    assert log(user("\n".join("x" * 7))) == "\n".join(["    x"] * 7)  # one line more than the limit is just shown
    assert log(user("a\n\nb\n")) == "    a\n\n    b"
    assert log(user("y" * 500)) == "    " + "y" * (c.SHOWN_LINE - 1) + "…"
    assert log(user([{"type": "text", "text": "t"}, {"type": "image"}])) == "    t\n    [image]"
    assert log(user("bad", is_error=True)) == "  ✘ bad"
    assert log(user("")) == log(user(None)) == "    (no output)"


@pytest.mark.parametrize("given, shown", [
    ({"command": "make\n  test", "description": "d"}, "→ T: make test"),
    ({"file_path": "/x", "content": "y"}, "→ T: /x"),
    ({"b": "two", "a": [1, 2], "o": {}, "n": 3}, "→ T: b=two, a=(2), o=(0), n=3"), ({}, "→ T"),
    ({"command": "x" * 500}, "→ T: " + "x" * (c.SHOWN_LINE - 1) + "…"),
])
def test_tool_calls_take_one_line(given, shown):
    assert log(call("T", **given)) == shown


@pytest.mark.parametrize("record, shown", [
    (b"plain \x1b[31mwords", "plain words"), (b"", None), (b"[1, 2]", "[1, 2]"), (b"{not json", "{not json"),
    (b'{"type":"assistant","mess', "… a line of 25 bytes that cannot be read"), ({"type": "unknown"}, None),
    ({}, None),
    ({"type": "stream_event", "event": {}}, None), ({"type": "system", "subtype": "status", "status": "x"}, None),
    ({"type": "rate_limit_event", "rate_limit_info": {"status": "allowed"}}, None),
    ({"type": "rate_limit_event"}, None),
    ({"type": "rate_limit_event", "rate_limit_info": {"status": "rejected"}}, "… rate limit : rejected"),
    ({"type": "assistant", "message": {"content": [{"type": "thinking", "thinking": "hm"}]}}, None),
    ({"type": "assistant", "message": {"content": "as a string"}}, "as a string"),
    ({"type": "assistant", "message": {"content": [{"type": "text", "text": "two\nlines\n"}]}}, "two\nlines"),
    ({"type": "user", "message": {"content": [{"type": "text", "text": "go\non"}]}}, "› go on"),
    ({"type": "assistant", "error": "x", "message": {"content": [{"type": "text", "text": "no"}]}}, "✘ no"),
    ({"type": "system", "subtype": "api_retry", "attempt": 2, "error": "unknown", "error_status": None,
      "retry_delay_ms": 547.5}, "… API error unknown, retry 2 in 0.5 s"),
    ({"type": "result", "is_error": True, "subtype": "error_x"}, "✘ error_x · 0 turns · ? · ? tokens"),
])
def test_log_lines_of_every_kind(record, shown):
    assert log(record) == shown


def test_plain_text_is_shown_as_it_is():
    assert log(b'{"type":"result"}', format="text") == '{"type":"result"}'
    assert log(b"", format="text") == "" and log(b"\xff\x1b[0m!", format="text") == "\ufffd!"


def test_evil_strings_are_harmless_wherever_they_stand():
    rnd = random.Random(11)
    lines = []
    for path in sorted(glob.glob(os.path.join(DATA, "*.jsonl"))):
        with open(path, "rb") as file:
            lines += file.read().splitlines()[-3:]

    def poison(value):
        if isinstance(value, dict):
            return {key if rnd.random() < 0.9 else key + EVIL: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        roll = rnd.random()
        if isinstance(value, str) and roll < 0.3:
            return value + EVIL
        return rnd.choice([None, 7, -1, 1e300, True, [], {}, "\ud800", [EVIL],
                           {"text": EVIL}]) if roll < 0.4 else value
    for line in lines:
        for _ in range(6):
            record = poison(json.loads(line))
            text = log(record)
            assert text is None or is_safe(text)
            assert text is None or text.encode()


# -- tables

def test_columns_are_aligned_and_lines_have_no_trailing_space():
    table = c.render_table([["a", "10", "first"], ["数据", "7", ""], ["c", "", "third"]], ["X", "N", "NAME"], 80, False,
                           ("N",))
    assert table.split("\n") == ["X      N  NAME", "a     10  first", "数据   7", "c         third"]


def test_a_table_is_never_wider_than_the_terminal():
    rnd = random.Random(12)
    for _ in range(300):
        columns = rnd.randrange(1, 8)
        rows = [[("数" if rnd.random() < 0.2 else "ab") * rnd.randrange(30) for _ in range(columns)] for _ in range(4)]
        width = rnd.randrange(3 * columns, 150)
        for line in c.render_table(rows, [f"H{n}" for n in range(columns)], width, False, ("H0", "H2")).split("\n"):
            assert c.text_width(line) <= width and line == line.rstrip()


def test_the_widest_column_is_cut_first_and_the_last_keeps_more():
    line = c.render_table([["id", "x" * 100, "y" * 100]], ["ID", "NAME", "WHY"], 50, False).split("\n")[1]
    assert line == f"id  {'x' * 19}…  {'y' * 23}…"
    line = c.render_table([["id", "x" * 100, "y" * 100]], ["ID", "NAME", "WHY"], 40, False).split("\n")[1]
    assert line == f"id  {'x' * 11}…  {'y' * 21}…"


def test_colours_do_not_change_the_layout():
    rows = [[("RUNNING", "1;34"), "1", ("why", "2")], [("FAILED", "31"), "22", ("", "2")]]
    plain, painted = (c.render_table(rows, ["S", "N", "W"], 60, color, ("N",)) for color in (False, True))
    assert "\x1b[1;34mRUNNING\x1b[0m   1  \x1b[2mwhy\x1b[0m" in painted and "\x1b[2mN\x1b[0m" in painted
    for code in ("0", "1;34", "31", "2"):
        painted = painted.replace(f"\x1b[{code}m", "")
    assert painted == plain


def test_cells_are_one_safe_line():
    assert c.render_table([["a\nb" + EVIL, 7]], ["X", "Y"], 80, True).split("\n")[1] == "a bredtxt  7"


# -- status

def make_task(number: int, state: str, **more) -> dict:
    return {"id": f"{number:08x}-1111-4111-8111-111111111111", "name": f"task {number}", "state": state,
            "reason": None,
            "detail": "", "description": "", "agent": {"type": "claude", "model": "sonnet", "instructions": "do\nit",
                                                       "project_dir": "/srv/x"},
            "timeout_s": 900, "priority": "normal", "tags": ["ci", "x"], "depends_on": [], "parent_task_id": None,
            "project": None, "story_id": None, "summary": "", "question": None,
            "created_at": c.format_time(NOW - 3700),
            "updated_at": c.format_time(NOW), "execution": None, "why": "", **more}


def make_run(**more) -> dict:
    return {"id": "abcdef01-2222-4111-8111-111111111111", "task_id": "x", "status": "RUNNING", "reason": None,
            "detail": "",
            "agent": "claude", "round": 1, "start_time": c.format_time(NOW - 200), "end_time": None, "exit_code": None,
            "cost_usd": None, "tokens_in": None, "tokens_out": None, "session_id": None, "sandbox_dir": None,
            "changestats": None, "commits": [], "summary": "", "pushed_branch": None, **more}


def make_status(tasks, **daemon) -> dict:
    counts = {state: sum(task["state"] == state for task in tasks) for state in c.STATES}
    return {"daemon": {"version": "0.1.0", "started_at": c.format_time(NOW - 7300), "pid": 7, "max_concurrent": 3,
                       "running": 1,
                       "paused": False, "draining": False, "paused_kinds": [], "paused_projects": [], **daemon},
            "agents": [{"kind": "claude", "running": 1, "max_concurrent": 2, "parked_until": None, "park_reason": ""}],
            "tasks": tasks, "counts": {state: count for state, count in counts.items() if count}}


TASKS = [
    make_task(5, "FAILED", reason="agent_error", detail="exited with code 1", project="web",
              execution=make_run(status="FAILED", end_time=c.format_time(NOW - 100))),
    make_task(6, "COMPLETED", summary="Did it."), make_task(4, "PENDING"), make_task(3, "READY", summary="Fixed\nit."),
    make_task(2, "QUEUED", why="all 3 slots are busy"),
    make_task(1, "BLOCKED", question={"text": "Which DB?", "options": ["pg"]}),
    make_task(0, "RUNNING", execution=make_run(), why="round 2"),
]


def test_status_table():
    assert c.render_status(make_status(TASKS), NOW, 120, False).split("\n") == [
        "claudomator 0.1.0 · running for 2h · 1 running of 3 slots",
        "PENDING 1 · QUEUED 1 · RUNNING 1 · READY 1 · BLOCKED 1 · COMPLETED 1 · FAILED 1",
        "",
        "STATE      AGE  ELAPSED  AGENT   PROJECT  ID        NAME    WHY",
        "RUNNING     1h    3m20s  claude           00000000  task 0  round 2",
        "BLOCKED     1h           claude           00000001  task 1  asks: Which DB?",
        "QUEUED      1h           claude           00000002  task 2  all 3 slots are busy",
        "READY       1h           claude           00000003  task 3  Fixed it.",
        "PENDING     1h           claude           00000004  task 4",
        "FAILED      1h    1m40s  claude  web      00000005  task 5  agent_error: exited with code 1",
        "COMPLETED   1h           claude           00000006  task 6  Did it.",
        "",
        "claudomator ctl answer 00000001 TEXT    (ctl show tells the options)",
        "claudomator ctl accept 00000003    or reject ID -m COMMENT"]


def test_status_tells_what_is_held_and_parked():
    status = make_status(TASKS[:2], paused=True, draining=True, paused_kinds=["shell"], paused_projects=["web"])
    status["agents"] = [
        {"kind": "claude", "parked_until": c.format_time(NOW + 3600), "park_reason": "quota_exhausted"},
        {"kind": "local", "parked": True, "parked_until": None, "park_reason": "auth"},
        {"kind": "shell", "parked": False}]
    lines = c.render_status(status, NOW, 120, False, tz_offset_s=-7200).split("\n")
    assert lines[0].endswith("0 running of 3 slots · paused · draining · shell paused · project web paused")
    assert lines[1] == "claude is parked until 21:30: quota_exhausted"
    assert lines[2] == "local is parked (claudomator ctl agent unpark local): auth"
    assert "parked" not in "".join(lines[3:]) and "ctl answer" not in "".join(lines)


def test_an_empty_database_says_what_to_do_next():
    text = c.render_status(make_status([]), NOW, 120, True)
    assert "claudomator ctl add" in text and "claudomator demo" in text and "STATE" not in text


def test_status_fits_any_width_and_narrow_ones_show_what_matters():
    evil = [make_task(n, state, name=EVIL * 9 + "数" * 90, why="w" * 999, project="p" * 70, summary=EVIL,
                      detail="d" * 900,
                      question={"text": "q" * 999, "options": []} if state == "BLOCKED" else None,
                      execution=make_run())
            for n, state in enumerate(c.STATES)]
    for width in (40, 59, 60, 79, 80, 200):
        plain = c.render_status(make_status(evil), NOW, width, False)
        assert max(map(c.text_width, plain.split("\n"))) <= width and is_safe(plain)
        assert is_safe(c.render_status(make_status(evil), NOW, width, True), color=True)
        assert ("  AGE  " in plain, "AGENT" in plain, "  ID  " in plain) == (width >= 80, width >= 60, True)


def test_every_state_has_a_colour():
    assert set(c.STATE_COLORS) == set(c.STATES)
    assert c.paint_state("FAILED", True) == "\x1b[31mFAILED\x1b[0m" and c.paint_state("FAILED", False) == "FAILED"
    assert "\x1b[1;34mRUNNING\x1b[0m" in c.render_status(make_status(TASKS), NOW, 120, True)


def test_agent_kinds():
    agents = [{"kind": "claude", "running": 1, "max_concurrent": 2, "installed": True, "parked": True,
               "park_detail": "wait",
               "parked_until": c.format_time(NOW), "park_reason": "quota_exhausted"},
              {"kind": "shell", "running": 0, "max_concurrent": None, "parked_until": None, "park_reason": ""},
              {"kind": "local", "running": 0, "max_concurrent": 0, "installed": False, "parked": False,
               "parked_until": None}]
    assert c.render_agents(agents, 100, False).split("\n") == [
        "AGENT   STATE          RUNNING  UNTIL             WHY",
        "claude  parked             1/2  2026-11-20 22:30  quota_exhausted wait",
        "shell   open               0/-", "local   not installed      0/-"]


# -- one task and events

def test_show_of_a_blocked_task_has_the_command_to_answer():
    task = make_task(1, "BLOCKED", question={"text": "Which\nDB?", "options": ["it's pg", "b"]})
    lines = c.render_task(task, [], False).split("\n")
    assert lines[:8] == [
        "task         00000001-1111-4111-8111-111111111111", "name         task 1", "state        BLOCKED",
        "question     Which", "             DB?", "options      - it's pg", "             - b",
        "next         claudomator ctl answer 00000001 'it'\\''s pg'"]
    assert "instructions do\n             it" in "\n".join(lines)
    assert "timeout      15m" in lines and "tags         ci, x" in lines


def test_show_of_a_failed_task_has_its_runs_commits_and_what_to_do():
    runs = [make_run(status="FAILED", reason="agent_error", end_time=c.format_time(NOW), cost_usd=0.0025,
                     tokens_in=2000,
                     tokens_out=77, exit_code=1, commits=[{"hash": "abcdef0123456", "message": "mend it"}],
                     changestats={"files_changed": 1, "insertions": 2, "deletions": 3}),
            make_run(id="12345678-x", start_time=c.format_time(NOW - 999), end_time=c.format_time(NOW - 998),
                     status="FAILED",
                     changestats={"files_changed": 9, "insertions": 9, "deletions": 9}), make_run(id="ffffffff")]
    task = make_task(5, "FAILED", reason="auth", detail="no login", depends_on=["a", {"task": "b", "on": "any"}])
    text = c.render_task(task, runs, False, tz_offset_s=3600)
    assert "next         log the agent in, then: ctl agent unpark claude" in text
    assert "changes      1 files, +2 -3" in text and "depends on   a, b" in text and "abcdef0123  mend it" in text
    assert "abcdef01   FAILED   claude  2026-11-20 23:27:09    3m20s  $0.0025    2.1k     1  agent_error" in text
    assert "12345678   FAILED   claude  2026-11-20 23:13:50       1s        ?       ?" in text
    assert "ffffffff   RUNNING  claude  2026-11-20 23:27:09\n" in text
    assert "3m20s" in c.render_executions(runs[2:], NOW, 100, False)


def test_where_the_commits_are_stands_below_the_task():
    note = "main is checked out in /x, so the commits went to claudomator/s there (to have them: git merge claudomator/s)"
    run = make_run(status="COMPLETED", detail=note, commits=[{"hash": "a" * 40, "message": "m"}] * 2, pushed_branch="claudomator/s")
    task = make_task(7, "READY", summary="It is done.", execution=run)
    lines = c.render_task(task, [run, make_run(status="FAILED", detail="no note")], False).split("\n")
    assert "pushed       2 commits to claudomator/s" in lines and f"note         {note}" in lines and "no note" not in str(lines)
    assert c.task_line(task, False).split("\n") == [
        "READY  00000007  task 7  2 commits pushed to claudomator/s", "    It is done.", f"    {note}",
        "    next: claudomator ctl accept 00000007    or: claudomator ctl reject 00000007 -m 'what to change'"]
    assert "note" not in c.render_task(make_task(7, "READY"), [make_run(status="COMPLETED")], False)


@pytest.mark.parametrize("reason", sorted(c.REASONS))
def test_every_reason_says_what_to_do_next_for_this_task(reason):
    task = make_task(10, c.REASONS[reason]["state"], reason=reason, detail="d")
    line = next(line for line in c.render_task(task, [], False).split("\n") if line.startswith("next"))
    assert "ID" not in line and "KIND" not in line and len(line) > 20


def test_next_steps_of_other_states():
    def step(state):
        return [line[13:] for line in c.render_task(make_task(7, state), [],
                                                    False).split("\n") if line.startswith("next")]
    assert step("READY") == ["claudomator ctl accept 00000007    or: claudomator ctl reject 00000007 -m"
                             " 'what to change'"]
    assert step("PENDING") == ["claudomator ctl run 00000007"] and step("RUNNING") == step("COMPLETED") == []


def test_show_is_safe_and_bounded():
    task = make_task(1, "FAILED", name=EVIL, detail=EVIL, reason="lost", summary="s" + EVIL, tags=[EVIL],
                     description=EVIL,
                     agent={"type": "claude", "instructions": EVIL + "\nline" * 50, "model": EVIL,
                            "project_dir": EVIL})
    runs = [make_run(commits=[{"hash": EVIL, "message": EVIL}], agent=EVIL)]
    assert is_safe(c.render_task(task, runs, False)) and is_safe(c.render_task(task, runs, True), color=True)
    assert "… 39 more lines" in c.render_task(task, runs, False)


BASE = {"seq": 1, "time": c.format_time(NOW), "task_id": "0123456789", "execution_id": "abcdefabcdef"}


@pytest.mark.parametrize("event, words", [
    ({"kind": "task.state", "from": "QUEUED", "to": "RUNNING", "name": "n"}, "QUEUED → RUNNING n"),
    ({"kind": "task.state", "from": "RUNNING", "to": "FAILED", "reason": "auth", "name": "n"},
     "RUNNING → FAILED (auth) n"),
    ({"kind": "task.question", "text": "Which?", "options": ["a", "b"]}, "asks: Which? [a / b]"),
    ({"kind": "task.answer", "text": "pg"}, "answered: pg"),
    ({"kind": "task.created", "name": "n", "parent": None}, "created 'n'"),
    ({"kind": "execution.ended", "status": "FAILED", "reason": "auth", "cost_usd": 0.5},
     "execution abcdefab ended: FAILED (auth), $0.5000"),
    ({"kind": "execution.ended", "status": "COMPLETED", "cost_usd": None}, "execution abcdefab ended: COMPLETED, ?"),
    ({"kind": "agent.cooling", "agent": "claude", "until": c.format_time(NOW), "detail": "api_error: x"},
     "claude cools down until 2026-11-20 23:30: api_error: x"),
    ({"kind": "budget.reached", "scope": "all", "detail": "budget reached: 2 of 2 runs today for everything"},
     "budget reached: 2 of 2 runs today for everything"),
    ({"kind": "task.state", "from": "QUEUED", "to": "RUNNING", "name": "n", "agent": "gemini", "instead_of": "claude"},
     "QUEUED → RUNNING n (gemini instead of claude)"),
    ({"kind": "agent.parked", "agent": "claude", "until": c.format_time(NOW), "reason": "r", "detail": "why"},
     "claude is parked until 2026-11-20 23:30: why"),
    ({"kind": "agent.api_retry", "attempt": 1, "status": 429, "error": ""}, "api retry attempt=1 status=429"),
    ({"kind": "odd", "x": EVIL, "y": {}}, "x=redtxt y={}"),
])
def test_events_take_one_line(event, words):
    assert c.render_event({**BASE, **event}, False, tz_offset_s=3600) == "23:30:29  01234567  " + words
    assert is_safe(c.render_event({**BASE, **event, "task_id": None}, True), color=True)


def test_an_event_of_no_task_keeps_the_column():
    event = {**BASE, "task_id": None, "kind": "agent.unparked", "agent": "claude", "why": "reset"}
    assert c.render_event(event, False) == "22:30:29            unparked agent=claude why=reset"


# -- a log that grows


def delta(text) -> bytes:
    return c.format_json({"type": "stream_event", "event": {"delta": {"type": "text_delta", "text": text}}}).encode()


def said(text) -> bytes:
    return c.format_json({"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}}).encode()


def grown(*lines, format="claude") -> list[str]:
    renderer = c.LogRenderer(format)
    return [text for text in [*map(renderer.render, lines), renderer.finish()] if text is not None]


@pytest.mark.parametrize("text", ["one", "one\ntwo\n\nthree", "\n\none\n", "é\u2028x\ny", "x" * 5000, "a\n" * 50])
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_a_text_in_pieces_is_shown_once_and_line_by_line(text, size):
    pieces = [delta(text[at:at + size]) for at in range(0, len(text), size)]
    shown = grown(*pieces, said(text), said("next"))
    assert shown[-1] == "next"
    assert "\n".join(shown[:-1]).replace("\n", "") == text.replace("\n", "")
    if len(text) < 2000:
        assert "\n".join(shown[:-1]).strip("\n") == text.strip("\n")


def test_pieces_without_their_message_and_messages_without_pieces_are_shown():
    assert grown(delta("half\nof")) == ["half", "of"] and grown(said("all"), said("of it")) == ["all", "of it"]
    error = said("no").replace(b'"message"', b'"error":"unknown","message"')
    assert grown(delta("half"), error)[0] == "✘ no"
    assert grown(b'{"type":"stream_event"', b'{"type":"stream_event","event":{"delta":{"text":7}}}', delta("")) == []
    assert grown(delta("x"), format="text") == [delta("x").decode()]


def test_no_escape_sequence_survives_in_pieces():
    evil = EVIL * 3 + "\n"
    for size in (1, 2, 5):
        shown = grown(*(delta(evil[at:at + size]) for at in range(0, len(evil), size)))
        assert shown and all(map(is_safe, shown))


# Cool-downs and budgets

COOLING = {"kind": "claude", "parked": False, "parked_until": None, "running": 1, "max_concurrent": None, "failures": 5,
           "cooling_until": c.format_time(NOW + 300), "failure": "api_error: down"}
SPENT = {"usd": 12.5, "tokens": 900, "runs": 7, "minutes": 61.25, "unknown_usd": 3, "unknown_tokens": 0}
CAPS = [c.cap_to_json(cap) for cap in (c.Cap("all", "usd", 20.0, 12.5, 3), c.Cap("project.shop", "runs", 3, 3),
                                       c.Cap("agent.claude", "minutes", 60.0, 50.04))]


def test_a_cool_down_is_shown_with_its_reason_until_it_is_over():
    [_, line] = c.render_agents([COOLING], 120, False).split("\n")
    assert line.split()[:3] == ["claude", "cooling", "1/-"] and line.endswith(
        "5 runs in a row failed; the last one: api_error: down")
    status = {**make_status(TASKS[:1]), "agents": [COOLING]}
    assert c.render_status(status, NOW, 120, False).split("\n")[1] == \
        "claude cools down until 22:35: 5 runs in a row failed (api_error: down)"
    assert "cools" not in c.render_status(status, NOW + 300, 120, False)


def test_a_budget_shows_caps_spent_left_and_what_is_unknown():
    budget = {"day": "2026-11-21", "resets_at": "2026-11-22T00:00:00Z", "spent": SPENT, "caps": CAPS}
    assert c.render_budget(budget, 120, False).split("\n") == [
        "2026-11-21: 7 runs, $12.50 (+ 3 runs of unknown cost), 900 tokens, 61.2 minutes; resets 2026-11-22 00:00",
        "BUDGET        UNIT     SPENT    CAP  LEFT  UNKNOWN   STATE",
        "everything    USD      12.50  20.00  7.50  + 3 runs  ok",
        "project shop  runs         3      3     0            reached",
        "agent claude  minutes   50.0   60.0  10.0            warning"]
    assert "[budgets] in the configuration" in c.render_budget({**budget, "caps": []}, 100, False)
    assert all(c.text_width(line) <= 40 for line in c.render_budget(budget, 40, False).split("\n"))


def test_geminis_log_is_readable_text():
    path = os.path.join(os.path.dirname(__file__), "data", "gemini", "b_question_file.jsonl")
    with open(path, "rb") as file:
        shown = [c.render_log_line(line, "gemini") for line in file.read().splitlines()]
    assert shown[0] == "— auto, session 33333333…" and shown[2] == "I need to ask."
    assert shown[3].startswith("→ run_shell_command: printf") and shown[4] == "    wrote /workspace/q/g1.json"
    assert shown[-1] == "✔ success · 0.669s · 3.2k tokens"
    assert c.render_log_line(b'{"type":"error","message":"Loop\\u001b[31m"}', "gemini") == "✘ Loop"
    assert c.render_log_line(b'{"type":"result","status":"error"}', "gemini") == "✘ failed · ? tokens"
    for value in (b"null", b"3", b'"x"', b"[]", b"{}"):
        for kind in (b"init", b"message", b"tool_use", b"tool_result", b"error", b"result"):
            c.render_log_line(b'{"type":"' + kind + b'","role":"assistant","content":' + value + b',"parameters":' + value
                              + b',"stats":' + value + b',"error":' + value + b',"message":' + value + b"}", "gemini")
