"""The replaying fake refuses the command lines that the real CLI refuses, with the same words."""
import json
import os
import pathlib
import subprocess

import pytest
from tests import support

FAKE = pathlib.Path(__file__).parent / "fakes" / "claude"
DATA = pathlib.Path(__file__).parent / "data" / "claude"
SESSION = "0c0ffee0-0000-4000-8000-000000000001"
PLAIN = ["-p", "--output-format", "stream-json", "--verbose", "--permission-mode", "default"]


def run(argv, home, version="2.1.329", stdin="Do it.", cwd=None, **more):
    env = {**support.clean_environment(home), "ANTHROPIC_API_KEY": "x", "IS_SANDBOX": "1",
           "FAKE_CLAUDE_VERSION": version, **more}
    env = {name: value for name, value in env.items() if value}
    return subprocess.run([FAKE, *argv], env=env, cwd=cwd or home, input=stdin, capture_output=True, text=True,
                          timeout=20)


@pytest.mark.parametrize("name", ["j_bad_session_id", "i_resume_7_resume_and_sid", "x_budget_zero", "x_empty_prompt",
                                  "x_no_verbose", "x_unknown_flag", "x_prompt_dash", "x_root_no_sandbox_env"])
def test_a_bad_command_line_ends_as_it_did_when_recorded(name, tmp_path):
    meta = json.loads((DATA / f"{name}.meta.json").read_text())
    if "root" in name and os.geteuid() != 0:
        pytest.skip("only root is refused")
    done = run(meta["argv"][1:], tmp_path, stdin="", IS_SANDBOX="" if "root" in name else "1")
    assert (done.returncode, done.stdout, done.stderr) == (meta["exit_code"], "", meta["stderr_tail"])


def test_a_session_id_is_taken_once_per_directory_and_resumed_where_it_is_known(tmp_path):
    (tmp_path / "other").mkdir()
    first = run([*PLAIN, "--session-id", SESSION], tmp_path)
    assert first.returncode == 0 and f'"session_id":"{SESSION}"' in first.stdout
    again = run([*PLAIN, "--session-id", SESSION], tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"Error: Session ID {SESSION} is already in use.\n"
    assert run([*PLAIN, "--session-id", SESSION], tmp_path, cwd=tmp_path / "other").returncode == 0
    assert run([*PLAIN, "--resume", SESSION], tmp_path).returncode == 0


@pytest.mark.parametrize("version, code", [("2.1.329", 0), ("2.1.197", 1)])
def test_only_the_newer_version_resumes_from_another_directory(version, code, tmp_path):
    (tmp_path / "other").mkdir()
    assert run([*PLAIN, "--session-id", SESSION], tmp_path, version).returncode == 0
    done = run([*PLAIN, "--resume", SESSION], tmp_path, version, "Go on.", tmp_path / "other")
    assert done.returncode == code
    if code:
        assert json.loads(done.stdout)["errors"] == [f"No conversation found with session ID: {SESSION}"]


def test_a_missing_credential_is_told_as_the_real_one_tells_it(tmp_path):
    done = run(PLAIN, tmp_path, ANTHROPIC_API_KEY="")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, result["is_error"], result["result"]) == (1, True, "Not logged in · Please run /login")
