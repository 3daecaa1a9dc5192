"""Section 16: the command, environment and stdin of every agent kind.  Nothing is started here."""
import re

import claudomator as c
import pytest

HOST = {"PATH": "/usr/bin:/bin", "HOME": "/home/ann", "LANG": "C.UTF-8", "LC_TIME": "de_DE.UTF-8",
        "ANTHROPIC_API_KEY": "sk-key", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "HTTPS_PROXY": "http://proxy:3128"}
LEAKS = {"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": "x", "CLAUDE_CODE_OAUTH_TOKEN": "token", "CLAUDE_PID": "7",
         "AWS_SECRET_ACCESS_KEY": "aws", "GITHUB_TOKEN": "gh", "DATABASE_URL": "postgres://", "OPENAI_API_KEY": "sk",
         "CLAUDOMATOR_EXECUTION_ID": "outer", "CLAUDOMATOR_CONFIG": "/c", "LD_PRELOAD": "/evil.so", "PYTHONPATH": "/p",
         "GIT_DIR": "/g", "NOTIFY_SOCKET": "/run/n", "LISTEN_FDS": "3"}


def config(text="") -> c.Config:
    return c.parse_config_text(text, "config.toml", "/home/ann")


def task(instructions="Do it.", more=None, **agent) -> c.Task:
    return c.Task(name="t", id="task-1", agent=c.AgentConfig(instructions=instructions, **agent), **(more or {}))


def context(**changes) -> c.RunContext:
    base = dict(execution_id="run-1", execution_dir="/data/executions/run-1", cwd="/data/sandboxes/run-1",
                project_dir="/srv/repo", sandboxed=True, session_id="0c0ffee0-0000-4000-8000-000000000001")
    return c.RunContext(**{**base, **changes})


def claude(configuration="", host=None, where=None, more=None, **agent) -> c.Launch:
    return c.build_claude(task(more=more, **agent), context(**(where or {})), config(configuration), host or HOST)


def shell(configuration="", host=None, where=None, more=None, **agent) -> c.Launch:
    return c.build_shell(task(more=more, **agent), context(**(where or {})), config(configuration), host or HOST)


def options(launch: c.Launch, flag: str) -> list[str]:
    """Every value that the command line gives to a flag."""
    return [launch.argv[at + 1] for at, word in enumerate(launch.argv) if word == flag]


# -- claude's command line


def test_a_plain_task_is_this_command_line():
    assert claude().argv == (
        "claude", "-p", "--session-id", "0c0ffee0-0000-4000-8000-000000000001", "--output-format", "stream-json",
        "--verbose", "--permission-mode", "bypassPermissions", "--allowedTools", "Bash")


@pytest.mark.parametrize("agent, flag, values", [
    (dict(model="opus"), "--model", ["opus"]),
    (dict(max_budget_usd=1.0), "--max-budget-usd", ["1.00"]),
    (dict(max_budget_usd=2.999), "--max-budget-usd", ["3.00"]),
    (dict(max_budget_usd=0.001), "--max-budget-usd", ["0.01"]),  # claude refuses 0.00
    (dict(max_budget_usd=12345.5), "--max-budget-usd", ["12345.50"]),
    (dict(permission_mode="plan"), "--permission-mode", ["plan"]),
    (dict(permission_mode="default"), "--permission-mode", ["default"]),
    (dict(allowed_tools=("Read", "Bash(git:*)")), "--allowedTools", ["Read", "Bash(git:*)", "Bash"]),
    (dict(allowed_tools=("Bash", "Read")), "--allowedTools", ["Bash", "Read"]),
    (dict(disallowed_tools=("WebFetch", "Bash(rm:*)")), "--disallowedTools", ["WebFetch", "Bash(rm:*)"]),
    (dict(context_files=("/srv/docs", "/srv/a b")), "--add-dir", ["/srv/docs", "/srv/a b"]),
    (dict(system_prompt_append="Be\nbrief."), "--append-system-prompt", ["Be\nbrief."]),
    (dict(skip_planning=True), "--allowedTools", []),
    (dict(skip_planning=True, allowed_tools=("Read",)), "--allowedTools", ["Read"]),
    (dict(), "--model", []), (dict(), "--max-budget-usd", []), (dict(), "--append-system-prompt", []),
    (dict(), "--disallowedTools", []), (dict(), "--add-dir", []),
])
def test_each_key_of_the_agent_becomes_its_flag(agent, flag, values):
    assert options(claude(**agent), flag) == values


def test_keys_of_other_agents_change_nothing():
    assert claude(temperature=0.5, max_tokens=10, isolation="none", repository_url="x") == claude()


def test_the_model_is_the_tasks_then_the_configurations_then_claudes_own():
    default = '[agents.claude]\nmodel = "sonnet"'
    assert options(claude(default), "--model") == ["sonnet"]
    assert options(claude(default, model="opus"), "--model") == ["opus"]
    assert options(claude('[agents.shell]\nmodel = "sonnet"'), "--model") == []


def test_the_binary_is_the_configured_one():
    assert claude('claude_binary_path = "/opt/claude"').argv[0] == "/opt/claude"
    assert c.runner_binary("claude", config('claude_binary_path = "/opt/claude"')) == "/opt/claude"
    assert c.runner_binary("shell", config()) == "/bin/sh"


def test_additional_arguments_come_last_and_are_not_interpreted():
    launch = claude(additional_args=("--max-turns", "3", "--add-dir", "/x y", "--", "-"), context_files=("/srv/docs",))
    assert launch.argv[-6:] == ("--max-turns", "3", "--add-dir", "/x y", "--", "-")


def test_a_resumed_session_gets_resume_and_no_new_session_id():
    launch = claude(where=dict(resume=True, feedback="The answer is: 4"), model="opus")
    assert options(launch, "--resume") == ["0c0ffee0-0000-4000-8000-000000000001"]
    assert "--session-id" not in launch.argv and launch.stdin == "The answer is: 4"
    assert options(launch, "--model") == ["opus"] and "--verbose" in launch.argv
    assert launch.session_id == "0c0ffee0-0000-4000-8000-000000000001"


def test_the_format_is_claudes_stream():
    assert claude().format == "claude" and shell().format == "text"
    for kind, runner in c.RUNNERS.items():
        assert runner.kind == kind and runner.format in c.STREAMS


# -- the prompt


@pytest.mark.parametrize("text", [
    "plain", "--fix the bug", "-", "two\nlines\r\n\ttab", "{braces} {0} %s $HOME `id` \"'\\",
    "\u2028 \u0000 \U0001f600 é", "x" * (1 << 20)])
def test_any_instructions_go_whole_by_stdin_and_never_by_argv(text):
    for launch in (claude(instructions=text), claude(instructions=text, skip_planning=True)):
        assert launch.stdin.endswith(text) and not any(text in word for word in launch.argv if text != "-")
        assert sum(map(len, launch.argv)) < 4096
    assert claude(instructions=text, skip_planning=True).stdin == text


def test_the_preamble_says_where_how_to_ask_and_how_to_report():
    text = claude(instructions="Mend it.").stdin
    for word in ("unattended", "/data/sandboxes/run-1 is a throw-away git clone", "Commit your work", "is pushed",
                 "/data/executions/run-1/question.json", '{"text": "your question", "options": ["a", "b"]}',
                 "/data/executions/run-1/summary.txt"):
        assert word in text
    assert text.endswith("Your task:\nMend it.")


def test_ct_is_first_on_the_path_and_in_the_preamble_only_where_it_is_installed():
    tools = {"tools_dir": "/data/bin"}
    assert claude(where=tools).env["PATH"] == "/data/bin:/usr/bin:/bin" and claude().env["PATH"] == "/usr/bin:/bin"
    assert shell('[agents.shell]\nenv = {PATH = "/mine"}', where=tools).env["PATH"] == "/data/bin:/mine"
    assert not re.search(r"\bct\b", claude().stdin) and "ct ask" in claude(where=tools).stdin
    assert "ct summary" in claude(where=tools).stdin and "ct task" not in claude(where=tools).stdin


def test_subtasks_are_promised_and_possible_only_where_the_api_and_ct_are_there():
    api = {"api_url": "unix:///data/agent.sock", "api_token": "agent-1"}
    both = claude(where={**api, "tools_dir": "/data/bin"})
    assert "ct task submit --name NAME" in both.stdin and "without your commits" in both.stdin
    assert (both.env["CLAUDOMATOR_API_URL"], both.env["CLAUDOMATOR_API_TOKEN"]) == ("unix:///data/agent.sock", "agent-1")
    assert "ct task" not in claude(where=api).stdin and "agent-1" not in both.stdin
    assert "agent-1" not in repr(context(**api)) and "CLAUDOMATOR_API_URL" not in claude(where=dict(tools_dir="/d")).env


def test_the_preamble_promises_no_commit_where_there_is_no_sandbox():
    text = claude(where=dict(sandboxed=False, cwd="/srv/repo")).stdin
    assert "Your working directory is /srv/repo. Work only there.\n" in text
    assert "commit" not in text.lower() and "pushed" not in text and "question.json" in text


def test_a_directory_with_braces_is_no_format():
    text = claude(where=dict(cwd="/srv/{where}{0}", execution_dir="/e/{question}")).stdin
    assert "/srv/{where}{0}" in text and "/e/{question}/question.json" in text


def test_a_rejection_reaches_the_next_fresh_prompt():
    text = claude(instructions="Mend it.", more=dict(rejection_comment="Too {slow}.")).stdin
    assert text.index("Mend it.") < text.index("not accepted") < text.index("Too {slow}.")


def test_an_answer_reaches_a_fresh_session_with_the_task_where_the_old_session_is_gone():
    text = claude(instructions="Mend it.", where=dict(feedback="The answer is: 4")).stdin
    assert text.endswith("Mend it.\n\nThe answer is: 4") and "Your task:" in text


# -- environments


@pytest.mark.parametrize("build", [claude, shell])
def test_nothing_of_the_daemons_environment_leaks(build):
    env = build(host={**HOST, **LEAKS}).env
    assert not {name for name in LEAKS if env.get(name) == LEAKS[name]}
    assert {"PATH", "HOME", "LANG", "LC_TIME", "HTTPS_PROXY"} <= env.keys()
    allowed = c.ENVIRONMENT_ALLOWED | {*c.CLAUDE_CREDENTIALS, "LC_TIME", "CLAUDE_CODE_MAX_RETRIES"}
    assert {name for name in env if not name.startswith("CLAUDOMATOR_")} <= allowed


def test_an_outer_agents_variables_pass_only_where_the_configuration_names_them():
    named = '[agents.claude]\npass_env = ["CLAUDE_CODE_OAUTH_TOKEN", "GITHUB_TOKEN", "NOT_SET"]'
    env = claude(named, host={**HOST, **LEAKS}).env
    assert (env["CLAUDE_CODE_OAUTH_TOKEN"], env["GITHUB_TOKEN"]) == ("token", "gh")
    assert "CLAUDECODE" not in env and "NOT_SET" not in env
    assert "GITHUB_TOKEN" not in shell(named, host={**HOST, **LEAKS}).env


def test_only_claude_gets_claudes_credentials():
    assert claude().env["ANTHROPIC_API_KEY"] == "sk-key" and claude().env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9"
    assert not {name for name in shell().env if name.startswith("ANTHROPIC")}


def test_the_configured_environment_wins_over_the_hosts_and_ours_over_both():
    text = '[agents.claude]\nenv = {HOME = "/other", MINE = "1", CLAUDOMATOR_TASK_ID = "forged"}'
    env = claude(text).env
    assert (env["HOME"], env["MINE"], env["CLAUDOMATOR_TASK_ID"]) == ("/other", "1", "task-1")


@pytest.mark.parametrize("build", [claude, shell])
def test_an_agent_is_told_its_task_run_files_and_round(build):
    env = build(where=dict(round=2, api_url="unix:///data/agent.sock", api_token="t0ken")).env
    assert {name: value for name, value in env.items() if name.startswith("CLAUDOMATOR_")} == {
        "CLAUDOMATOR_TASK_ID": "task-1", "CLAUDOMATOR_EXECUTION_ID": "run-1", "CLAUDOMATOR_PROJECT_DIR": "/srv/repo",
        "CLAUDOMATOR_ROUND": "2", "CLAUDOMATOR_QUESTION_FILE": "/data/executions/run-1/question.json",
        "CLAUDOMATOR_SUMMARY_FILE": "/data/executions/run-1/summary.txt",
        "CLAUDOMATOR_API_URL": "unix:///data/agent.sock", "CLAUDOMATOR_API_TOKEN": "t0ken"}


def test_the_token_shows_in_no_repr():
    where = dict(api_token="t0ken", api_url="unix:///x")
    assert "t0ken" not in repr(context(**where)) + repr(claude(where=where)) and claude(where=where).env["CLAUDOMATOR_API_TOKEN"]


def test_secrets_are_the_configurations_the_keys_and_what_pass_env_names():
    given = config('api_token = "first-token"\ngithub_token = "two"\n[local_model]\napi_key = "three"\n[agents.shell]\n'
                   'env = {A = "four"}\npass_env = ["B", "ABSENT"]')
    host = {"B": "five", "ANTHROPIC_API_KEY": "six", "GEMINI_API_KEY": "seven", "HOME": "/root", "GOOGLE_CLOUD_PROJECT": "x"}
    assert given.secrets == {"first-token", "two", "three", "four"} and "first-token" not in repr(given)
    assert c.secrets_given(given, host) == {"first-token", "two", "three", "four", "five", "six", "seven"}


def test_a_host_without_a_path_gets_a_usual_one():
    assert claude(host={"HOME": "/"}).env["PATH"] == "/usr/local/bin:/usr/bin:/bin"


@pytest.mark.parametrize("is_root, mode, expected", [
    (True, "", "1"), (True, "bypassPermissions", "1"), (True, "default", None), (True, "plan", None),
    (False, "", None)])
def test_root_is_declared_a_sandbox_only_where_claude_would_refuse(is_root, mode, expected):
    assert claude(where=dict(is_root=is_root), permission_mode=mode).env.get("IS_SANDBOX") == expected
    assert claude('[agents.claude]\nenv = {IS_SANDBOX = "0"}', where=dict(is_root=True)).env["IS_SANDBOX"] == "0"


def test_claudes_own_retries_are_capped_unless_configured():
    assert claude().env["CLAUDE_CODE_MAX_RETRIES"] == "2"
    assert claude('[agents.claude]\nenv = {CLAUDE_CODE_MAX_RETRIES = "9"}').env["CLAUDE_CODE_MAX_RETRIES"] == "9"
    assert "CLAUDE_CODE_MAX_RETRIES" not in shell().env


def test_the_config_directory_is_the_configured_one():
    assert claude('claude_config_dir = "/srv/claude"').env["CLAUDE_CONFIG_DIR"] == "/srv/claude"
    assert "CLAUDE_CONFIG_DIR" not in claude(host={**HOST, "CLAUDE_CONFIG_DIR": "/outer"}).env


def test_a_launch_does_not_show_its_environment():
    assert "sk-key" not in repr(claude())


# -- shell


def test_a_script_is_run_as_it_is_from_its_file():
    launch = shell(instructions="echo '{x}'\nexit 3", model="m", allowed_tools=("Read",))
    assert launch.argv == ("/bin/sh", "/data/executions/run-1/prompt.txt") and launch.stdin == "echo '{x}'\nexit 3"
    assert launch.session_id == "" and not c.RUNNERS["shell"].reads_stdin and not c.RUNNERS["shell"].resumable


def test_a_script_finds_the_answer_and_what_came_back():
    env = shell(where=dict(answer="pg\nline 2", feedback="You asked ...", round=2)).env
    assert (env["CLAUDOMATOR_ANSWER"], env["CLAUDOMATOR_FEEDBACK_FILE"]) == (
        "pg\nline 2", "/data/executions/run-1/feedback.txt")
    assert shell(more=dict(rejection_comment="no")).env["CLAUDOMATOR_FEEDBACK_FILE"]
    assert not {"CLAUDOMATOR_ANSWER", "CLAUDOMATOR_FEEDBACK_FILE"} & shell().env.keys()


@pytest.mark.parametrize("answer", ["x" * 131072, "é" * 60_000, "a\0b"])
def test_an_answer_that_no_variable_can_hold_is_only_in_the_file(answer):
    env = shell(where=dict(answer=answer, feedback=answer)).env
    assert "CLAUDOMATOR_ANSWER" not in env and "CLAUDOMATOR_FEEDBACK_FILE" in env


# -- local

LOCAL = '[local_model]\nendpoint = "http://127.0.0.1:9/v1"\n'


def local(configuration=LOCAL, host=None, where=None, more=None, **agent) -> c.Launch:
    where = {"program": ("/usr/bin/python3", "/opt/claudomator.py"), "sandboxed": False, **(where or {})}
    return c.build_local(task(more=more, **agent), context(**where), config(configuration), host or HOST)


def request(launch: c.Launch) -> dict:
    return c.parse_json(launch.stdin)


def test_a_local_agent_is_this_program_with_the_request_on_stdin():
    launch = local(instructions="Think.", skip_planning=True)
    assert launch.argv == ("/usr/bin/python3", "/opt/claudomator.py", "_local") and launch.format == "claude"
    assert request(launch) == {"endpoint": "http://127.0.0.1:9/v1", "timeout_s": 60.0, "body": {
        "model": "llama3.1:8b", "messages": [{"role": "user", "content": "Think."}], "temperature": 0.2}}


@pytest.mark.parametrize("configuration, agent, expected", [
    ("", {}, {"temperature": 0.2}), ("", {"temperature": 0.0}, {"temperature": 0.0}),
    ("default_temperature = 0", {}, {"temperature": 0.0}),
    ("default_temperature = 1.5", {"temperature": 0.5}, {"temperature": 0.5}),
    ("", {"max_tokens": 7}, {"max_tokens": 7}), ("", {"max_tokens": 0}, {"max_tokens": None}),
    ('model = "m"', {}, {"model": "m"}), ('model = "m"\n[agents.local]\nmodel = "n"', {}, {"model": "n"}),
    ('model = "m"\n[agents.local]\nmodel = "n"', {"model": "o"}, {"model": "o"})])
def test_keys_of_the_task_come_before_those_of_the_configuration(configuration, agent, expected):
    body = request(local(LOCAL + configuration, **agent))["body"]
    assert {name: body.get(name) for name in expected} == expected


def test_what_came_back_stands_behind_the_prompt_as_there_is_no_session():
    launch = local(instructions="Think.", more=dict(rejection_comment="Too short."), where=dict(
        resume=True, feedback="The check fails."))
    text = request(launch)["body"]["messages"][-1]["content"]
    assert text.startswith(c.LOCAL_PREAMBLE) and text.endswith("The check fails.")
    assert text.index("Think.") < text.index("Too short.") < text.index("The check fails.")
    assert not c.RUNNERS["local"].resumable and not c.RUNNERS["local"].sandboxed and not c.RUNNERS["local"].chosen


def test_the_preamble_of_a_model_without_tools_promises_none():
    text = request(local())["body"]["messages"][-1]["content"]
    assert "no tools" in text and "## Summary" in text and "question.json" not in text and "commit" not in text.lower()


def test_an_appended_system_prompt_is_the_system_message():
    messages = request(local(system_prompt_append="Be brief."))["body"]["messages"]
    assert [message["role"] for message in messages] == ["system", "user"] and messages[0]["content"] == "Be brief."


def test_the_key_goes_by_the_environment_alone():
    launch = local(LOCAL + 'api_key = "sk-local"', host={**HOST, **LEAKS})
    assert launch.env["CLAUDOMATOR_LOCAL_API_KEY"] == "sk-local" and "sk-local" not in repr(launch)
    assert "sk-local" not in launch.stdin + " ".join(launch.argv)
    assert not {name for name in LEAKS if launch.env.get(name) == LEAKS[name]}
    assert "CLAUDOMATOR_LOCAL_API_KEY" not in {**claude(LOCAL + 'api_key = "sk-local"').env, **local().env}


def test_without_an_endpoint_there_is_nothing_to_start():
    with pytest.raises(c.SpawnError, match=r"\[local_model\] endpoint"):
        local("")


# -- gemini


def gemini(configuration="", host=None, where=None, more=None, **agent) -> c.Launch:
    return c.build_gemini(task(more=more, **agent), context(**(where or {})), config(configuration), host or HOST)


def test_a_plain_gemini_task_is_this_command_line():
    launch = gemini()
    assert launch.argv == ("gemini", "--output-format", "stream-json", "--yolo", "--skip-trust", "--session-id",
                           "0c0ffee0-0000-4000-8000-000000000001")
    assert launch.stdin.endswith("Your task:\nDo it.") and launch.format == "gemini"


def test_a_resumed_gemini_session_gets_the_feedback_alone():
    launch = gemini(where=dict(resume=True, feedback="The answer is: 4"), system_prompt_append="Be brief.")
    assert options(launch, "--resume") == ["0c0ffee0-0000-4000-8000-000000000001"]
    assert "--session-id" not in launch.argv
    assert launch.stdin == "The answer is: 4"


@pytest.mark.parametrize("agent, flag, values", [
    (dict(model="gemini-2.5-pro"), "--model", ["gemini-2.5-pro"]), (dict(), "--model", []),
    (dict(context_files=("/srv/docs", "/srv/a b")), "--include-directories", ["/srv/docs", "/srv/a b"]),
    (dict(permission_mode="acceptEdits"), "--approval-mode", ["auto_edit"]),
    (dict(permission_mode="auto"), "--approval-mode", ["auto_edit"]), (dict(), "--approval-mode", []),
    (dict(permission_mode="plan"), "--approval-mode", ["plan"]),
    (dict(permission_mode="dontAsk"), "--approval-mode", ["default"]),
    (dict(permission_mode="default"), "--approval-mode", ["default"]),
    (dict(permission_mode="bypassPermissions"), "--approval-mode", []),
    (dict(disallowed_tools=("Bash",)), "--policy", ["/data/executions/run-1/gemini-policy.toml"]),
    (dict(), "--policy", []),
])
def test_each_key_of_the_agent_becomes_geminis_flag(agent, flag, values):
    launch = gemini(**agent)
    assert options(launch, flag) == values
    assert ("--yolo" in launch.argv) is (agent.get("permission_mode", "bypassPermissions") == "bypassPermissions")


def test_geminis_model_binary_and_further_arguments_come_from_configuration_and_task():
    text = 'gemini_binary_path = "/opt/gemini"\n[agents.gemini]\nmodel = "m"'
    launch = gemini(text, additional_args=("--debug",), system_prompt_append="Be brief.")
    assert launch.argv[0] == "/opt/gemini" and options(launch, "--model") == ["m"] and launch.argv[-1] == "--debug"
    assert launch.stdin.startswith("Be brief.\n\nYou are running unattended")


def test_gemini_gets_its_own_credentials_and_nobody_elses():
    host = {**HOST, **LEAKS, "GEMINI_API_KEY": "g-key", "GOOGLE_CLOUD_PROJECT": "p", "GEMINI_CLI_HOME": "/h"}
    env = gemini(host=host).env
    assert (env["GEMINI_API_KEY"], env["GOOGLE_CLOUD_PROJECT"]) == ("g-key", "p")
    assert gemini(host=host).links[0][0] == "/h/.gemini"
    assert not {name for name in LEAKS if env.get(name) == LEAKS[name]}
    assert not {name for name in env if name.startswith("ANTHROPIC")} and "GEMINI_API_KEY" not in claude(host=host).env


def test_gemini_must_not_relaunch_itself():
    assert gemini().env["GEMINI_CLI_NO_RELAUNCH"] == "true"
    text = '[agents.gemini]\nenv = {GEMINI_CLI_NO_RELAUNCH = "false"}'
    assert gemini(text).env["GEMINI_CLI_NO_RELAUNCH"] == "false"


def test_each_gemini_session_has_a_home_of_its_own_that_shares_the_operators_login():
    own = "/data/executions/0c0ffee0-0000-4000-8000-000000000001/gemini-home"
    for where in (dict(), dict(resume=True, execution_id="run-2", execution_dir="/data/executions/run-2")):
        launch = gemini(where=where)
        assert (launch.env["GEMINI_CLI_HOME"], launch.env["HOME"]) == (own, "/home/ann")
        assert launch.links == (("/home/ann/.gemini", own + "/.gemini", ("tmp", "history", "projects.json")),)
    assert gemini('[agents.gemini]\nenv = {GEMINI_CLI_HOME = "/srv/g"}').links[0][0] == "/srv/g/.gemini"


def test_disallowed_tools_become_a_policy_that_denies_them():
    import tomllib
    text = c.gemini_policy(("Bash(git push:*)", "WebFetch", 'odd"name', "Edit"))
    assert [(rule["toolName"], rule.get("commandPrefix")) for rule in tomllib.loads(text)["rule"]] == [
        ("run_shell_command", "git push"), ("web_fetch", None), ('odd"name', None), ("replace", None)]
    assert {rule["decision"] for rule in tomllib.loads(text)["rule"]} == {"deny"}


# -- [runners.NAME]

CODEX = """
[runners.codex]
command = ["codex", "exec", "-C", "{cwd}", "-m", "{model}", "--", "{prompt}"]
resume = ["codex", "resume", "{session}", "--", "{prompt}"]
format = "jsonl"
fields = {text = "text", session = "id"}
[agents.codex]
pass_env = ["OPENAI_API_KEY"]
env = {MINE = "1"}
"""


def codex(text=CODEX, host=None, where=None, kind="codex", **agent) -> c.Launch:
    configured = config(text)
    return c.runner_of(kind, configured).build(task(**agent), context(**(where or {})), configured, host or HOST)


def test_a_configured_command_is_filled_in():
    launch = codex(model="gpt-5", skip_planning=True, additional_args=("--more",))
    assert launch.argv == ("codex", "exec", "-C", "/data/sandboxes/run-1", "-m", "gpt-5", "--", "Do it.", "--more")
    assert codex(skip_planning=True).argv == ("codex", "exec", "-C", "/data/sandboxes/run-1", "--", "Do it.")
    assert codex(where=dict(resume=True, session_id="abc", feedback="{model} 4")).argv == (
        "codex", "resume", "abc", "--", "{model} 4")
    assert launch.format == "jsonl"


def test_a_configured_agent_gets_only_what_its_table_names():
    env = codex(host={**HOST, **LEAKS}).env
    assert (env["OPENAI_API_KEY"], env["MINE"]) == ("sk", "1") and "ANTHROPIC_API_KEY" not in env
    assert env["CLAUDOMATOR_EXECUTION_ID"] == "run-1"


@pytest.mark.parametrize("prompt", ["x" * 100_001, "a\0b"])
def test_a_prompt_that_no_argument_can_hold_is_the_tasks_fault(prompt):
    with pytest.raises(c.SandboxError) as caught:
        codex(instructions=prompt)
    assert caught.value.reason == "bad_task" and "runners.codex.command" in str(caught.value)
    by_stdin = '[runners.x]\ncommand = ["x", "--id={session}"]\nresume = ["x", "{session}"]'
    launch = codex(by_stdin, kind="x", instructions=prompt)
    assert launch.argv == ("x", "--id=0c0ffee0-0000-4000-8000-000000000001") and launch.stdin.endswith(prompt)


def test_a_runner_is_what_its_templates_say():
    runner = c.runner_of("codex", config(CODEX))
    assert (runner.resumable, runner.reads_stdin, runner.names_session, runner.chosen) == (True, False, True, False)
    runner = c.runner_of("x", config('[runners.x]\ncommand = ["~/x", "{session}"]'))
    assert (runner.resumable, runner.reads_stdin, runner.names_session, runner.format) == (False, True, False, "text")
    assert c.new_stream(runner).facts().cost_usd is None and c.new_stream(c.RUNNERS["shell"]).facts().cost_usd == 0.0
    assert c.runner_of("gone", config()) is c.RUNNERS["shell"]


def test_the_kinds_are_the_built_in_ones_and_the_configured_ones():
    assert c.known_kinds(config(CODEX)) == (*c.RUNNERS, "codex")
    assert c.runner_binary("codex", config(CODEX)) == "codex" and c.runner_binary("gemini", config()) == "gemini"
    assert config(CODEX).program_key("codex") == "runners.codex.command"
    assert config(CODEX).program_key("gemini") == "gemini_binary_path"
    assert config(CODEX).program_key("local") == config(CODEX).program_key("shell") == ""
