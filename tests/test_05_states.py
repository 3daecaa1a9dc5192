"""State machine: every pair of states is tried against the specification's table."""
import pytest

import claudomator as c

TABLE = """
PENDING: QUEUED CANCELLED
QUEUED: RUNNING PENDING CANCELLED FAILED
RUNNING: READY COMPLETED FAILED TIMED_OUT CANCELLED BUDGET_EXCEEDED BLOCKED QUEUED
READY: COMPLETED PENDING
BLOCKED: QUEUED READY CANCELLED FAILED
COMPLETED:
FAILED: QUEUED
TIMED_OUT: QUEUED
CANCELLED: QUEUED
BUDGET_EXCEEDED: QUEUED
"""
ALLOWED = {line.split(":")[0]: set(line.split(":")[1].split()) for line in TABLE.strip().splitlines()}
PAIRS = [(old, new) for old in ALLOWED for new in ALLOWED]


def test_the_states_are_the_ten_of_the_specification():
    assert set(c.STATES) == set(ALLOWED) and len(c.STATES) == 10
    for state in c.STATES:
        assert getattr(c, state) == state


@pytest.mark.parametrize("old, new", PAIRS)
def test_a_move_is_allowed_exactly_where_the_table_says(old, new):
    assert (new in c.MOVES[old]) == (new in ALLOWED[old])
    assert (old in c.sources_of(new)) == (new in ALLOWED[old])
    assert ((old, new) in c.MOVE_LABELS) == (new in ALLOWED[old])


def test_sources_come_in_the_order_of_the_table():
    assert c.sources_of("QUEUED") == ("PENDING", "RUNNING", "BLOCKED", "FAILED", "TIMED_OUT", "CANCELLED",
                                      "BUDGET_EXCEEDED")
    assert c.sources_of("RUNNING") == ("QUEUED",)


def test_the_sets_of_states_say_what_they_are_called():
    assert c.FAILURE_STATES == {"FAILED", "TIMED_OUT", "CANCELLED", "BUDGET_EXCEEDED"}
    assert c.ENDED_STATES == c.FAILURE_STATES | {"COMPLETED"}
    assert c.SETTLED_STATES == c.ENDED_STATES | {"READY"}
    assert c.FAILURE_STATES == {state for state in c.STATES if ALLOWED[state] == {"QUEUED"}}


def test_every_state_can_be_reached_from_pending():
    reached, edge = set(), {"PENDING"}
    while edge:
        reached |= edge
        edge = {new for old in edge for new in ALLOWED[old]} - reached
    assert reached == set(c.STATES)


def test_the_reasons_are_the_closed_list():
    assert set(c.REASONS) == set(
        "agent_error api_error auth rate_limited quota_exhausted budget max_turns permission_denied no_result "
        "timed_out stalled cancelled spawn_failed lost sandbox_failed build_failed verify_failed push_failed "
        "dependency_failed bad_task".split())


def test_limits_logins_and_losses_never_count_as_attempts_and_all_else_does():
    free = {reason for reason in c.REASONS if c.REASONS[reason].get("free")}
    assert free == {"rate_limited", "quota_exhausted", "auth", "lost"}


def test_only_reasons_that_another_try_can_mend_are_retried():
    retried = {reason for reason, facts in c.REASONS.items() if facts.get("retry")}
    assert retried == {"agent_error", "api_error", "no_result", "timed_out", "stalled", "sandbox_failed",
                       "build_failed",
                       "verify_failed", "push_failed"}


@pytest.mark.parametrize("reason", c.REASONS)
def test_every_reason_leads_from_running_to_a_failure_state_and_says_what_to_do_next(reason):
    facts = c.REASONS[reason]
    expected = {"budget": "BUDGET_EXCEEDED", "timed_out": "TIMED_OUT", "stalled": "TIMED_OUT",
                "cancelled": "CANCELLED"}
    assert facts["state"] == expected.get(reason, "FAILED") and facts["state"] in c.MOVES["RUNNING"]
    assert len(facts["next"]) > 10 and facts.keys() <= {"retry", "free", "state", "next"}
    assert not (facts.get("retry") and facts.get("free"))
    assert ("stderr" in facts["next"]) == ("logs ID --stderr" in facts["next"])  # --raw alone is stdout


def test_the_diagram_has_every_move_once_and_nothing_else():
    lines = [line.strip() for line in c.states_diagram().splitlines()]
    assert lines[0] == "stateDiagram-v2" and lines[1] == "[*] --> PENDING" and lines[-1] == "COMPLETED --> [*]"
    moves = [tuple(line.split(":")[0].split(" --> ")) for line in lines[2:-1]]
    assert sorted(moves) == sorted((old, new) for old, new in PAIRS if new in ALLOWED[old])
    assert all(line.split(": ", 1)[1] for line in lines[2:-1])
