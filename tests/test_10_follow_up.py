"""Section 10, its end: what becomes of a task after an execution, for every reason and retry policy."""
import claudomator as c
import pytest

NOW = 1_795_213_829.0
CONTINUATION = {"session_id": "s", "sandbox_dir": "/sandbox", "branch": "main", "start_head": "abc",
                "source": "/origin", "agent": "claude"}
GOES_ON = {**CONTINUATION, "kind": "interrupted"}
ONCE, THRICE = c.RetryPolicy(), c.RetryPolicy(max_attempts=3, backoff="list", delays_s=(10.0, 100.0))


def task(**fields) -> c.Task:
    return c.Task(name="t", id="task-1", **fields)


def failed(reason, **fields) -> c.Verdict:
    return c.failed_verdict(reason, "because").replace(**fields)


def follow(task_, verdict, continuation=CONTINUATION, jitter=0.5) -> c.FollowUp:
    """With a jitter of one half every delay is what its policy says."""
    return c.decide_follow_up(task_, verdict, continuation, NOW, jitter)


RETRIED = sorted(reason for reason, facts in c.REASONS.items() if facts.get("retry"))
FREE = sorted(reason for reason, facts in c.REASONS.items() if facts.get("free"))
FINAL = sorted(c.REASONS.keys() - {*RETRIED, *FREE})


def test_the_reasons_fall_into_three_groups():
    assert FREE == ["auth", "lost", "quota_exhausted", "rate_limited"]  # never count against max_attempts
    assert FINAL == ["bad_task", "budget", "cancelled", "dependency_failed", "max_turns", "permission_denied",
                     "spawn_failed"]  # no try can mend these
    assert len(RETRIED) == 9 and not {*RETRIED} & {*FREE}


@pytest.mark.parametrize("reason", FINAL)
@pytest.mark.parametrize("policy", [ONCE, THRICE])
def test_a_reason_that_no_try_can_mend_is_final(reason, policy):
    result = follow(task(retry=policy), failed(reason, resume=True))
    assert result == c.FollowUp(c.REASONS[reason]["state"], reason, "because", attempts=1)


@pytest.mark.parametrize("reason", RETRIED)
@pytest.mark.parametrize("attempts, policy, wait_s", [
    (0, ONCE, None), (0, THRICE, 10), (1, THRICE, 100), (2, THRICE, None),
    (0, c.RetryPolicy(max_attempts=2), 5), (3, c.RetryPolicy(max_attempts=9), 40),
    (1, c.RetryPolicy(max_attempts=9, backoff="linear"), 60)])
def test_other_reasons_are_retried_from_the_beginning_as_often_as_the_policy_says(reason, attempts, policy, wait_s):
    before = task(retry=policy, attempts=attempts, free_tries=2, round=2, verify_rounds=2)
    result = follow(before, failed(reason, resume=True))
    if wait_s is None:
        assert result == c.FollowUp(c.REASONS[reason]["state"], reason, "because", attempts=attempts + 1)
    else:  # a fresh session, a fresh sandbox, the first round
        assert result == c.FollowUp(c.QUEUED, reason, "because", not_before=NOW + wait_s, attempts=attempts + 1,
                                    idle_runs=1)


@pytest.mark.parametrize("policy", [ONCE, THRICE])
@pytest.mark.parametrize("free_tries, wait_s", [(0, 5), (1, 10), (2, 20)])
def test_a_rate_limit_waits_in_the_queue_and_goes_on_in_the_same_session(policy, free_tries, wait_s):
    before = task(retry=policy, attempts=1, free_tries=free_tries, round=2)
    result = follow(before, failed("rate_limited", resume=True))
    assert result == c.FollowUp(c.QUEUED, "rate_limited", "because", not_before=NOW + wait_s, attempts=1,
                                free_tries=free_tries + 1, idle_runs=1, round=2, resume=GOES_ON)


def test_a_rate_limit_waits_for_its_reset_time_where_that_is_later():
    assert follow(task(), failed("rate_limited", retry_at=NOW + 90)).not_before == NOW + 90
    assert follow(task(), failed("rate_limited", retry_at=NOW + 1)).not_before == NOW + 5
    assert follow(task(), failed("rate_limited", retry_at=NOW - 900)).not_before == NOW + 5


def test_jitter_spreads_the_waits():
    waits = [follow(task(), failed("rate_limited"), jitter=jitter).not_before - NOW for jitter in (0.0, 0.5, 0.999)]
    assert waits == sorted(waits) and 4.5 <= waits[0] < waits[1] < waits[2] < 5.5


def test_a_lost_run_starts_again_at_once_without_counting():
    assert follow(task(attempts=1, round=2), failed("lost", resume=True)) == c.FollowUp(
        c.QUEUED, "lost", "because", attempts=1, free_tries=1, idle_runs=1, round=2, resume=GOES_ON)
    assert follow(task(), failed("lost")).resume is None  # it has no session to go on in


@pytest.mark.parametrize("reason", ["rate_limited", "lost"])
def test_free_tries_end_somewhere(reason):
    before = task(retry=THRICE, free_tries=c.FREE_TRIES, attempts=1)
    result = follow(before, failed(reason))
    assert result == c.FollowUp(c.FAILED, reason, "because", attempts=1, free_tries=c.FREE_TRIES)


@pytest.mark.parametrize("free_tries", [0, 3, 99])
@pytest.mark.parametrize("reason, retry_at, until", [
    ("auth", None, None), ("auth", NOW + 90, None),
    ("quota_exhausted", NOW + 7200, NOW + 7200), ("quota_exhausted", None, NOW + 3600),
    ("quota_exhausted", NOW - 5, NOW + 60), ("quota_exhausted", NOW + 1, NOW + 60)])
def test_a_limit_of_the_account_parks_the_kind_and_keeps_the_task(reason, retry_at, until, free_tries):
    before = task(retry=THRICE, attempts=2, free_tries=free_tries, round=2)
    result = follow(before, failed(reason, resume=True, retry_at=retry_at))
    assert result == c.FollowUp(c.QUEUED, reason, "because", attempts=2, round=2, resume=GOES_ON, park=True,
                                park_until=until)


def test_no_session_and_no_sandbox_is_nothing_to_go_on_from():
    for reason in FREE:
        assert follow(task(), failed(reason, resume=True), continuation=None).resume is None
        assert follow(task(), failed(reason, resume=False)).resume is None


@pytest.mark.parametrize("round_, rounds, goes_back", [
    (1, 2, True), (2, 2, False), (1, 1, False), (2, 3, True), (1, 0, False)])
def test_a_failed_check_goes_back_to_the_agent_for_the_remaining_rounds(round_, rounds, goes_back):
    feedback = {**CONTINUATION, "kind": "verify_failed", "text": "1 failed"}
    result = follow(task(round=round_, verify_rounds=rounds, attempts=1), failed("verify_failed"), feedback)
    if goes_back:  # in the same session, now, and it is no attempt
        assert result == c.FollowUp(c.QUEUED, "verify_failed", "because", attempts=1, idle_runs=1, round=round_ + 1,
                                    resume=feedback)
    else:
        assert result == c.FollowUp(c.FAILED, "verify_failed", "because", attempts=2)


@pytest.mark.parametrize("fields, state", [
    ({}, c.READY), ({"auto_accept": True}, c.COMPLETED), ({"parent_task_id": "p"}, c.COMPLETED)])
def test_success_waits_for_a_person_unless_it_is_a_subtask_or_accepted_beforehand(fields, state):
    result = follow(task(attempts=1, free_tries=2, round=2, **fields), c.Verdict(True, c.COMPLETED))
    assert result == c.FollowUp(state, attempts=1, free_tries=2, round=2)


@pytest.mark.parametrize("policy", [ONCE, THRICE])
def test_a_question_blocks_and_keeps_the_session_for_the_answer(policy):
    verdict = c.Verdict(False, c.BLOCKED, detail="it asks: a?", question=c.Question("question", "a?"))
    result = follow(task(retry=policy, attempts=1, round=2), verdict)
    assert result == c.FollowUp(c.BLOCKED, attempts=1, round=2, resume=CONTINUATION)


def test_a_continuation_needs_a_session_or_a_sandbox():
    assert c.continuation_of(None) is None
    assert c.continuation_of(c.Execution(id="e", task_id="t")) is None
    run = c.Execution(id="e", task_id="t", **CONTINUATION)
    assert c.continuation_of(run) == CONTINUATION
    assert c.continuation_of(run.replace(session_id=""))["sandbox_dir"] == "/sandbox"
    assert c.continuation_of(run.replace(sandbox_dir=""))["session_id"] == "s"


def test_a_verdict_without_a_run_has_its_reasons_state_and_a_bounded_detail():
    for reason, facts in c.REASONS.items():
        verdict = c.failed_verdict(reason, "é" * 10_000)
        assert (verdict.ok, verdict.state, verdict.reason, verdict.resume) == (False, facts["state"], reason, False)
        assert 0 < len(verdict.detail.encode()) <= c.DETAIL_LIMIT


def test_every_follow_up_is_a_move_that_a_running_task_may_make():
    for reason in c.REASONS:
        for policy in (ONCE, THRICE):
            for free_tries in range(5):
                result = follow(task(retry=policy, free_tries=free_tries), failed(reason))
                assert result.state in c.MOVES[c.RUNNING]
                assert result.reason == reason and (result.state == c.QUEUED or result.not_before is None)


# -- what a continuing run was told

ANSWERED = {**CONTINUATION, "kind": "answer", "question": "Which?", "text": "pg"}


@pytest.mark.parametrize("reason", FREE)
def test_an_answer_is_told_again_when_the_run_that_brought_it_was_refused(reason):
    result = follow(task(resume=ANSWERED), failed(reason, resume=True))
    assert result.resume == ANSWERED


@pytest.mark.parametrize("reason", FREE)
def test_an_answer_is_not_lost_where_no_session_can_be_resumed(reason):
    assert follow(task(resume=ANSWERED), failed(reason), None).resume == ANSWERED


def test_a_session_that_is_gone_is_replaced_by_a_new_one_that_is_told_the_same():
    result = follow(task(resume=ANSWERED), failed("agent_error", resume=False))
    assert result.state == c.QUEUED and result.resume == {**ANSWERED, "session_id": ""} and result.attempts == 0
    again = follow(task(resume=ANSWERED, free_tries=c.FREE_TRIES), failed("agent_error", resume=False))
    assert again.state == c.FAILED
    assert follow(task(resume=result.resume), failed("agent_error", resume=False)).state == c.FAILED


# -- quota, breaker, cool-down


def test_on_quota_fail_ends_the_run_and_parks_the_kind_all_the_same():
    rules = c.FollowUpRules(on_quota="fail")
    verdict = failed("quota_exhausted", resume=True, retry_at=NOW + 7200)
    result = c.decide_follow_up(task(retry=THRICE, attempts=1), verdict, CONTINUATION, NOW, 0.5, rules)
    assert (result.state, result.reason, result.attempts, result.resume) == (c.FAILED, "quota_exhausted", 1, None)
    assert result.park and result.park_until == NOW + 7200 and "on_quota" in result.detail
    login = c.decide_follow_up(task(), failed("auth"), None, NOW, 0.5, rules)
    assert login.state == c.QUEUED and login.park  # a login is no quota
    for word in ("wait", "other_agent"):
        assert c.decide_follow_up(task(), verdict, None, NOW, 0.5, c.FollowUpRules(on_quota=word)).state == c.QUEUED


@pytest.mark.parametrize("reason", ["rate_limited", "lost", "api_error", "verify_failed", "stalled"])
@pytest.mark.parametrize("idle_runs, limit, made_commit, is_stopped", [
    (3, 5, False, False), (4, 5, False, True), (9, 5, False, True), (4, 5, True, False), (99, 0, False, False),
    (0, 1, False, True)])
def test_the_breaker_stops_what_the_queue_would_try_again(reason, idle_runs, limit, made_commit, is_stopped):
    before = task(retry=c.RetryPolicy(max_attempts=99), verify_rounds=99, idle_runs=idle_runs, attempts=2)
    result = c.decide_follow_up(before, failed(reason), CONTINUATION, NOW, 0.5,
                                c.FollowUpRules(no_progress_runs=limit), made_commit)
    assert result.state == (c.FAILED if is_stopped else c.QUEUED) and result.reason == reason
    assert ("no-progress breaker" in result.detail) == is_stopped and len(result.detail) <= c.DETAIL_LIMIT
    assert result.idle_runs == (0 if made_commit else idle_runs + 1)


def test_a_question_a_quota_and_an_end_are_no_idle_runs():
    stuck, rules = task(idle_runs=4, retry=ONCE), c.FollowUpRules(no_progress_runs=5)
    def after(verdict):
        return c.decide_follow_up(stuck, verdict, None, NOW, 0.5, rules)
    assert after(c.Verdict(False, c.BLOCKED)).idle_runs == after(c.Verdict(True, c.COMPLETED)).idle_runs == 0
    for reason in ("quota_exhausted", "auth"):
        assert after(failed(reason)).state == c.QUEUED and after(failed(reason)).idle_runs == 4
    assert "breaker" not in after(failed("api_error")).detail  # it was the last attempt anyway


def test_no_task_goes_on_for_ever_without_progress():
    for reason in sorted(c.REASONS.keys() - {"quota_exhausted", "auth"}):
        stuck, count = task(retry=c.RetryPolicy(max_attempts=1000), verify_rounds=1000), 0
        while stuck.state != c.FAILED and count < 20:
            result = c.decide_follow_up(stuck, failed(reason), CONTINUATION, NOW, 0.5)
            count += 1
            if result.state != c.QUEUED:
                break
            stuck = task(retry=stuck.retry, verify_rounds=1000, attempts=result.attempts, free_tries=result.free_tries,
                         idle_runs=result.idle_runs, round=result.round, resume=result.resume)
        assert count <= 5, reason


def health_after(reasons, kind="claude", every_s=0.0):
    health, now = c.Health(), NOW
    for reason in reasons:
        health = c.next_health(health, kind, failed(reason) if reason else c.Verdict(True, c.COMPLETED), now)
        now += every_s
    return health


@pytest.mark.parametrize("reason", sorted(c.KIND_FAULTS))
def test_five_failures_in_a_row_pause_a_kind(reason):
    assert health_after([reason] * 4) == c.Health(4, None, f"{reason}: because")
    assert health_after([reason] * 5) == c.Health(5, NOW + 60, f"{reason}: because")
    assert health_after([reason] * 9) == c.Health(5, NOW + 60, f"{reason}: because")  # they were under way already


def test_the_pause_doubles_up_to_half_an_hour():
    waits, health, now = [], health_after(["api_error"] * 4), NOW
    for _ in range(8):
        health = c.next_health(health, "claude", failed("api_error"), now)
        waits.append(health.cooling_until - now)
        now = health.cooling_until
    assert waits == [60, 120, 240, 480, 960, 1800, 1800, 1800]
    assert c.next_health(health.replace(failures=10 ** 6), "claude", failed("api_error"), now).cooling_until == now + 1800


def test_what_worked_forgives_and_what_is_the_tasks_fault_says_nothing():
    for reason in ("", *sorted(c.KIND_WORKS)):
        assert health_after(["api_error"] * 7 + [reason]) == c.Health()
    asks = c.next_health(health_after(["api_error"] * 5), "claude", c.Verdict(False, c.BLOCKED), NOW)
    assert asks == c.Health()
    for reason in sorted(c.REASONS.keys() - c.KIND_FAULTS - c.KIND_WORKS):
        assert health_after(["api_error"] * 4 + [reason]).failures == 4
    assert health_after(["agent_error", "api_error"] * 9, kind="shell") == c.Health()  # a script's exit code is its own
    assert health_after(["spawn_failed"] * 5, kind="shell").cooling_until


@pytest.mark.parametrize("old, until, reason, expected", [
    (None, NOW, "quota_exhausted", (True, True)),
    ({"until": NOW, "reason": "quota_exhausted"}, NOW, "quota_exhausted", (False, False)),
    ({"until": NOW, "reason": "quota_exhausted"}, NOW - 9, "quota_exhausted", (False, False)),
    ({"until": NOW, "reason": "quota_exhausted"}, NOW + 9, "quota_exhausted", (True, False)),
    ({"until": NOW, "reason": "quota_exhausted"}, NOW + 86400, "quota_exhausted", (True, True)),  # the weekly one too
    ({"until": NOW, "reason": "quota_exhausted"}, None, "auth", (True, True)),
    ({"until": NOW, "reason": "operator"}, NOW + 9, "quota_exhausted", (True, True)),
    ({"until": None, "reason": "auth"}, NOW, "quota_exhausted", (False, False)),
    ({"until": None, "reason": "auth"}, None, "auth", (False, False)),
    ({"until": None, "reason": "operator"}, None, "auth", (False, False))])
def test_a_park_grows_and_is_told_once(old, until, reason, expected):
    assert c.merged_park(old, until, reason) == expected
