"""Errors: each carries what the three edges need, and the codes are stable."""
import pytest

import claudomator as c

ERRORS = [value for value in vars(c).values() if isinstance(value, type) and issubclass(value, c.ClaudomatorError)]


@pytest.mark.parametrize("name, code, http_status, exit_code", [
    ("ClaudomatorError", "internal", 500, 1), ("UsageError", "usage", 400, 2), ("InvalidInput", "invalid", 422, 2),
    ("NotFound", "not_found", 404, 3), ("WrongState", "wrong_state", 409, 3), ("Forbidden", "forbidden", 403, 1),
    ("Unreachable", "unreachable", 503, 4), ("StorageError", "storage", 507, 1),
    ("SandboxError", "sandbox", 500, 1), ("SpawnError", "spawn_failed", 500, 1),
])
def test_code_http_status_and_exit_code_are_the_documented_ones(name, code, http_status, exit_code):
    error = getattr(c, name)("it is so")
    assert (error.code, error.http_status, error.exit_code, str(error)) == (code, http_status, exit_code, "it is so")


def test_no_two_errors_share_a_code_and_all_have_the_one_base():
    codes = [error.code for error in ERRORS]
    assert len(set(codes)) == len(codes) >= 11
    for value in vars(c).values():
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == c.__name__:
            assert issubclass(value, c.ClaudomatorError), value


def test_exit_codes_are_those_of_the_manual():
    names = ("EXIT_OK", "EXIT_FAILED", "EXIT_USAGE", "EXIT_NOT_FOUND", "EXIT_UNREACHABLE", "EXIT_BLOCKED",
             "EXIT_PARKED",
             "EXIT_TIMEOUT", "EXIT_INTERRUPTED")
    assert [getattr(c, name) for name in names] == [0, 1, 2, 3, 4, 5, 75, 124, 130]
    assert {error.exit_code for error in ERRORS} <= {getattr(c, name) for name in names}


def test_data_goes_with_the_error():
    assert c.WrongState("no", state="RUNNING", id="t1").data == {"state": "RUNNING", "id": "t1"}
    assert c.ClaudomatorError("no").data == {}


def test_invalid_input_lists_every_problem_in_its_text_and_in_its_data():
    error = c.InvalidInput("the file has 2 faults", ["tasks[0].name: missing", "tasks[1].agnet: unknown"],
                           file="a.yaml")
    assert str(error) == "the file has 2 faults\n  tasks[0].name: missing\n  tasks[1].agnet: unknown"
    assert error.data == {"problems": error.problems, "file": "a.yaml"} and len(error.problems) == 2
    assert c.InvalidInput("bad").problems == [] and str(c.InvalidInput("bad")) == "bad"


def test_a_sandbox_error_has_a_reason_of_the_closed_list():
    assert c.SandboxError("clone failed").reason == "sandbox_failed"
    error = c.SandboxError("rejected", "push_failed", branch="main")
    assert error.reason == "push_failed" and error.data == {"reason": "push_failed", "branch": "main"}
    assert {"sandbox_failed", "push_failed"} <= set(c.REASONS)
