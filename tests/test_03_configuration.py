"""Section 03: the configuration file, its table of keys, and the checker that task files share."""
import random
import tomllib

import pytest

import claudomator as c

HOME = "/home/op"


def read(text: str) -> c.Config:
    return c.parse_config_text(text, "config.toml", HOME)


def problems(text: str) -> list[str]:
    with pytest.raises(c.InvalidInput) as caught:
        read(text)
    return caught.value.problems


def only_problem(text: str) -> str:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


# -- defaults, paths, lookups


def test_an_empty_file_gives_the_documented_defaults():
    config = read("")
    assert (config.data_dir, config.max_concurrent, config.on_shutdown) == ("/home/op/.claudomator", 3, "leave")
    assert (config.default_timeout_s, config.stall_timeout_s, config.shutdown_timeout_s) == (900.0, 1200.0, 30.0)
    assert (config.keep_logs_s, config.keep_sandboxes_s, config.keep_executions) == (30 * 86400.0, 7 * 86400.0, 0)
    assert (config.claude_binary_path, config.claude_config_dir) == ("claude", "")
    assert (config.agents, config.projects, config.warnings) == ({}, (), ())
    assert config.server_addr == "127.0.0.1:8484" and config.local_model.endpoint == ""
    assert config.budgets == {"all": {"usd": 0.0, "tokens": 0, "runs": 0, "minutes": 0.0}}


def test_paths_derive_from_the_data_directory_and_follow_it():
    config = read('data_dir = "~/x/"')
    assert config.data_dir == "/home/op/x"
    assert config.socket_path == "/home/op/x/claudomator.sock"
    assert config.db_path == "/home/op/x/claudomator.db"
    assert config.executions_dir == "/home/op/x/executions"
    assert config.sandboxes_dir == "/home/op/x/sandboxes"
    assert config.lock_path == "/home/op/x/daemon.lock"
    assert config.replace(data_dir="/srv").socket_path == "/srv/claudomator.sock"
    assert read('socket_path = "/run/c.sock"').replace(data_dir="/srv").socket_path == "/run/c.sock"


@pytest.mark.parametrize("written, meant", [
    ("~", "/home/op"), ("~/a/../b", "/home/op/b"), ("/a//b/./c/", "/a/b/c"), ("//a", "/a"), ("/", "/")])
def test_paths_are_made_absolute_and_plain(written, meant):
    assert read(f'data_dir = "{written}"').data_dir == meant


@pytest.mark.parametrize("written", ["", "relative/dir", "~bob/x", "./x"])
def test_relative_paths_are_refused(written):
    assert "config.toml: data_dir: expected an absolute path" in only_problem(f'data_dir = "{written}"')


def test_a_tilde_without_a_home_directory_is_a_problem_not_a_guess():
    with pytest.raises(c.InvalidInput, match="data_dir: .*no home directory"):
        c.parse_config({}, "config.toml", "")
    assert c.parse_config({"data_dir": "/d"}, "config.toml", "").data_dir == "/d"


def test_a_program_is_a_name_or_an_absolute_path():
    assert read('claude_binary_path = "claude-next"').claude_binary_path == "claude-next"
    assert read('claude_binary_path = "~/bin/claude"').claude_binary_path == "/home/op/bin/claude"
    assert "program's name" in only_problem('claude_binary_path = "bin/claude"')
    assert "program's name" in only_problem('claude_binary_path = ""')


def test_agent_settings_fall_back_to_defaults():
    config = read('[agents.claude]\nmax_concurrent = 2\nmodel = "opus"\nenv = {A = "b"}\npass_env = ["PATH_X"]')
    claude = config.agent_settings("claude")
    assert (claude.kind, claude.max_concurrent, claude.model) == ("claude", 2, "opus")
    assert (claude.env, claude.pass_env) == ({"A": "b"}, ("PATH_X",))
    assert config.agent_settings("shell") == c.AgentSettings(
        kind="shell", max_concurrent=None, model="", env={}, pass_env=(), on_quota="wait")


def test_a_project_is_found_by_name_and_by_its_exact_directory():
    config = read('[[projects]]\nname = "p"\ndir = "~/src/p/"\nverify = "make test"\n'
                  '[[projects]]\nname = "q"\ndir = "/q"')
    project = config.project_named("p")
    assert (project.dir, project.verify, project.build) == ("/home/op/src/p", "make test", "")
    assert config.project_for_dir("/home/op/src/../src/p/") is project
    assert config.project_for_dir("/home/op/src") is None and config.project_for_dir("/home/op/src/p/sub") is None
    assert config.project_for_dir("") is None and config.project_for_dir("q") is None
    assert config.project_named("q").dir == "/q" and config.project_named("P") is None


# -- every key


GOOD = {"string": '"some-text"', "word": '"codex"', "bool": "true", "integer": "7", "number": "1.5", "duration": '"1h"',
        "strings": '["a", "b"]', "table": '{A = "b"}', "path": '"/p"', "program": '"/bin/x"',
        "url": '"https://example.org/x"', "address": '"127.0.0.1:1"'}
BAD = {"string": ["3", "[]", "true", "{}", "2026-01-01", r'"a\u0000b"'], "bool": ['"true"', "1", "0"],
       "integer": ['"3"', "true", "1.5", "-1", "9223372036854775808", "nan"],
       "number": ['"3"', "false", "-0.1", "nan", "inf", "-inf"],
       "duration": ["30", '"soon"', '"-1s"', '"3651d"', '"15"', "true", '""', '"' + "9" * 400 + 's"'],
       "choice": ['"other"', "3", "[]"], "strings": ['"a"', '["a", 3]', "{}", "[[]]"],
       "table": ['"a"', "[]", "{A = 3}"], "path": ["3", '"x/y"'], "program": ["3", '"x/y"'],
       "url": ['"example.org"', '"ftp://x"', "3", '"http://a b"', '"http://"', '"http:///v1"', '"http://x:port/v1"', '"http://x:99999"',
               '"http://::1/v1"', '"http://[::1/v1"', '"http://x/\\u00fc"', '"http://u@/v1"', '"http://x\\n"'],
       "address": ['"8484"', '"a:b"', '":99999"', '"::1:80"', '":+5"', "8484", '"a:"']}


def toml_for(key: c.Key, value: str) -> str:
    """A file that sets just this key (and what its table requires)."""
    group, _, leaf = key.name.rpartition(".")
    name = {"agents.*": "claude", "budgets.agent.*": "claude"}.get(group, "some")
    project = group == "budgets.project.*"
    lines = ['[[projects]]\nname = "some"\ndir = "/some"'] if project else []
    lines += [] if not group else [f"[[{group[:-2]}]]"] if group.endswith("[]") else [f"[{group.replace('*', name)}]"]
    for other in c.CONFIG_GROUPS[group].values():
        if other.required and other is not key:
            lines.append(f"{other.name.rpartition('.')[2]} = {c._toml_value(other.example)}")
    return "\n".join([*lines, f"{leaf} = {value}"])


FITTING = {"runners.*.resume": '["x", "{session}", "{prompt}"]\nformat = "claude"',
           "runners.*.fields": '{text = "a.b"}\nformat = "jsonl"',
           "containers.ssh_agent": "false"}  # true needs ssh_auth_sock


def good_value(key: c.Key) -> str:
    word, _, bound = key.kind.partition(" ")
    if key.name in FITTING:
        return FITTING[key.name]
    return f'"{bound.split("|")[-1]}"' if word == "choice" else GOOD[word]


@pytest.mark.parametrize("key", c.CONFIG_KEYS, ids=lambda key: key.name)
def test_every_key_takes_a_good_value_and_says_whether_it_is_used(key):
    config = read(toml_for(key, good_value(key)))
    assert bool(config.warnings) is not key.active
    for warning in config.warnings:
        assert warning.startswith("config.toml: ") and "is set, but this version does not use it yet" in warning
        assert warning.split(": ")[1].split(" ")[0].split(".")[0].split("[")[0] == c._top_name(key.name)


@pytest.mark.parametrize("key", c.CONFIG_KEYS, ids=lambda key: key.name)
def test_every_key_refuses_bad_values_and_names_file_key_and_expectation(key):
    word = key.kind.partition(" ")[0]
    for bad in BAD[word]:
        if bad == '""' and key.default == "":
            continue
        found = problems(toml_for(key, bad))
        leaf = key.name.rpartition(".")[2]
        assert all(line.startswith("config.toml: ") for line in found)
        assert any(leaf in line and "expected" in line for line in found), (bad, found)


def test_the_bounds_of_numbers_and_durations_are_kept():
    assert "max_concurrent: expected an integer (>= 1), got 0" in only_problem("max_concurrent = 0")
    assert "default_timeout: expected a duration like 15m (> 0), got '0s'" in only_problem('default_timeout = "0s"')
    assert read('stall_timeout = "0"').stall_timeout_s == 0.0 and read("stall_timeout = 0").stall_timeout_s == 0.0
    assert "at most 3650d" in only_problem('keep_logs = "4000d"')
    assert read('keep_logs = "3650d"').keep_logs_s == 3650 * 86400
    assert read("[local_model]\ndefault_temperature = 2").local_model.default_temperature == 2.0
    assert "0..2" in only_problem("[local_model]\ndefault_temperature = 2.01")
    assert "(> 0)" in only_problem("[local_model]\ntimeout_seconds = 0")
    assert read("keep_executions = 0").keep_executions == 0


def test_named_tables_are_kept_by_name():
    config = read('[budgets]\nusd = 20\n[budgets.project.p]\nruns = 3\n[budgets.agent.claude]\nminutes = 1.5\n'
                  '[[projects]]\nname = "p"\ndir = "/p"\n'
                  '[prices."gemini-2.5-pro"]\ninput = 1.25\n[runners.codex]\ncommand = ["codex"]\n'
                  '[launchers.far]\nkind = "ssh"\n[scripts.go]\ncommand = ["./go"]\n[agents.codex]\nmodel = "m"')
    assert config.budgets["all"]["usd"] == 20.0 and config.budgets["project.p"]["runs"] == 3
    assert config.budgets["agent.claude"] == {"usd": 0.0, "tokens": 0, "runs": 0, "minutes": 1.5}
    assert config.prices == {"gemini-2.5-pro": {"input": 1.25, "cached": None, "output": 0.0}}
    assert config.runners == {"codex": {"command": ("codex",), "resume": (), "format": "text", "fields": {}}}
    assert config.launchers["far"]["kind"] == "ssh" and config.scripts["go"]["command"] == ("./go",)
    assert config.agent_settings("codex").model == "m"
    names = [warning.split(": ")[1].split(" ")[0] for warning in config.warnings]
    assert names == ["launchers", "scripts"]


# -- problems


def test_all_problems_come_at_once_each_with_file_key_and_expectation():
    found = problems('max_concurent = 3\nmax_concurrent = true\nkeep_logs = 30\n'
                     '[agents.claude]\nmodel = 3\nmodle = "x"\n[[projects]]\nname = "a"\n'
                     '[[projects]]\nname = "a"\ndir = "x"\n[budgets.project]\np = 3')
    assert found == [
        "config.toml: max_concurent: unknown key (did you mean 'max_concurrent'?)",
        "config.toml: max_concurrent: expected an integer (>= 1), got true",
        "config.toml: keep_logs: expected a duration like 15m, got 30 (write it like 90s)",
        "config.toml: agents.claude.modle: unknown key (did you mean 'model'?)",
        "config.toml: agents.claude.model: expected a string, got 3 (put it in quotes)",
        "config.toml: projects[0].dir: missing: its repository",
        "config.toml: projects[1].dir: expected an absolute path or one that begins with ~/, got 'x'",
        "config.toml: projects[1].name: projects[0] has this name already",
        "config.toml: budgets.project.p: expected a table, got 3",
        "config.toml: budgets.project.p: no such project: a, a",
    ]


@pytest.mark.parametrize("text, problem", [
    ("[budgets.agent.cluade]", "budgets.agent.cluade: no such agent kind (did you mean 'claude'?): claude, gemini,"),
    ('[[projects]]\nname = "shop"\ndir = "/s"\n[budgets.project.shpo]',
     "budgets.project.shpo: no such project (did you mean 'shop'?): shop"),
    ("[budgets.project.shop]", "budgets.project.shop: no such project: none is configured"),
    ("[budgets]\nuds = 3", "budgets.uds: unknown key (did you mean 'usd'?)"),
    ("[budgets]\nusd = -1", "budgets.usd: expected a number (>= 0), got -1"),
    ("[agents.claude]\non_quota = 'others'", "agents.claude.on_quota: expected one of wait, other_agent, fail, got"),
    ("no_progress_runs = -1", "no_progress_runs: expected an integer (>= 0), got -1")])
def test_a_budget_or_a_limit_that_could_never_apply_is_a_problem(text, problem):
    assert f"config.toml: {problem}" in only_problem(text)


def test_an_unknown_agent_kind_is_a_problem_unless_a_runner_has_the_name():
    assert "agents.cluade: no such agent kind (did you mean 'claude'?)" in only_problem("[agents.cluade]")
    assert read('[agents.codex]\n[runners.codex]\ncommand = ["codex"]').agents["codex"].kind == "codex"


def test_a_choice_names_what_there_is_and_what_was_meant():
    assert only_problem('on_shutdown = "drian"') == (
        "config.toml: on_shutdown: expected one of leave, drain, got 'drian' (did you mean 'drain'?)")


@pytest.mark.parametrize("text", [
    "agents = 3", "agents = []", "projects = 3", "[projects]", "projects = [3]", "budgets = 3", "local_model = []",
    "runners = 'x'", "[prices]\nx = 3", "[agents]\nclaude = 3"])
def test_a_value_where_a_table_belongs_is_a_problem(text):
    assert "expected" in problems(text)[0]


def test_an_empty_required_value_is_a_problem():
    assert "projects[0].name: empty" in only_problem('[[projects]]\nname = " "\ndir = "/x"')
    assert "runners.x.command: empty" in only_problem("[runners.x]\ncommand = []")


@pytest.mark.parametrize("line", [
    'env = {"A=b" = "x"}', 'env = {"" = "x"}', 'pass_env = ["A=secret"]', 'pass_env = [""]'])
def test_names_that_no_environment_can_hold_are_refused_without_showing_values(line):
    found = only_problem(f"[agents.claude]\n{line}")
    assert "agents.claude: a name in env or pass_env" in found and "secret" not in found


def test_a_toml_syntax_error_names_file_and_line():
    for text in ("a = 1\nb = = 2", "a = 1\na = 2", "[" * 5000, "x = " + "[" * 5000):
        with pytest.raises(c.InvalidInput, match="config.toml: not TOML: "):
            read(text)
    with pytest.raises(c.InvalidInput, match="line 2"):
        read("a = 1\nb = = 2")


def test_a_byte_order_mark_is_passed_over():
    assert read("\ufeffmax_concurrent = 4").max_concurrent == 4


def test_control_characters_of_a_file_do_not_reach_the_terminal():
    for text in ('"\\u001b[31m" = 1', 'on_shutdown = "\\u001b[31m"'):
        assert "\x1b" not in only_problem(text)


# -- what is reachable from outside wants a secret


@pytest.mark.parametrize("address", [":8484", "0.0.0.0:8484", "[::]:8484", "10.0.0.1:80", "host.example:80"])
def test_an_address_that_others_reach_wants_a_webhook_secret(address):
    assert "server_addr" in only_problem(f'server_addr = "{address}"') and "webhook_secret" in str(problems(
        f'server_addr = "{address}"'))
    assert read(f'server_addr = "{address}"\nwebhook_secret = "s"').server_addr == address
    assert read(f'server_addr = "{address}"\nallow_unsigned_webhooks = true').server_addr == address


@pytest.mark.parametrize("address", ["127.0.0.1:8484", "127.9.9.9:0", "localhost:1", "[::1]:8484", ""])
def test_loopback_or_no_address_wants_none(address):
    assert read(f'server_addr = "{address}"').server_addr == address


@pytest.mark.parametrize("token", ["1234567", "with a space", "t\u00f6kent\u00f6ken", "tab\\ttab-tab"])
def test_a_token_that_is_too_short_or_cannot_be_sent_is_a_problem_and_not_shown(token):
    found = only_problem(f'api_token = "{token}"')
    assert found.endswith(": api_token: expected at least 8 ASCII characters without spaces, for it is sent as a bearer token")
    assert read('api_token = "12345678"').api_token == "12345678"


@pytest.mark.parametrize("url", ["http://x", "https://x:1", "http://[::1]:8080/v1?a=b@c#d", "http://b\u00fccher.example/v1/", "http://1.2.3.4?x:y"])
def test_urls_that_can_be_asked(url):
    assert read(f'[local_model]\nendpoint = "{url}"').local_model.endpoint == url


def test_a_password_in_the_model_servers_address_would_not_be_sent_and_is_not_shown():
    found = only_problem('[local_model]\nendpoint = "http://ann:hunter2@x/v1"')
    assert found.endswith("local_model.endpoint: a user or password in it is not sent; leave it out, and set api_key")


def test_an_ssh_agent_to_lend_must_be_named():
    found = only_problem("[containers]\nssh_agent = true")
    assert found.endswith("containers.ssh_agent: there is no agent to lend: set ssh_auth_sock to the path of its socket")
    assert read('ssh_auth_sock = "/s"\n[containers]\nssh_agent = true').containers.ssh_agent


@pytest.mark.parametrize("text, parts", [
    (":8484", ("", 8484)), ("a.b:1", ("a.b", 1)), ("[::1]:65535", ("::1", 65535)), ("1.2.3.4:0", ("1.2.3.4", 0))])
def test_addresses_are_split_at_the_port(text, parts):
    assert c.split_address(text) == parts


# -- secrets


def test_secrets_are_never_shown():
    config = read('api_token = "token-one"\nwebhook_secret = "hook-two"\n'
                  'github_token = "gh-three"\nvapid_private_key = "v-four"\n'
                  '[local_model]\napi_key = "lm-five"\n[agents.claude]\nenv = {KEY = "sk-ant-six", CI = "1"}')
    values = ("token-one", "hook-two", "gh-three", "v-four", "lm-five", "sk-ant-six")
    assert not [value for value in values if value in repr(config)] and "***" in repr(config)


def test_a_wrong_secret_is_not_shown_in_the_problem():
    for text in ("api_token = 918273645", "[local_model]\napi_key = 918273645",
                 "[agents.claude]\nenv = {A = 918273645}",
                 "[agents.claude]\nenv = 918273645", 'github_token = "918273645\\u0000"'):
        assert "918273645" not in only_problem(text)


def test_the_table_marks_exactly_the_secret_keys():
    assert {key.name for key in c.CONFIG_KEYS if key.secret} == {
        "api_token", "webhook_secret", "github_token", "vapid_private_key", "local_model.api_key", "agents.*.env"}


# -- template and differences


def test_the_template_as_it_is_gives_the_defaults():
    assert tomllib.loads(c.config_template()) == {}
    assert read(c.config_template()) == read("")


def test_the_template_with_every_key_line_uncommented_has_no_problem():
    lines = c.config_template().splitlines()
    text = "\n".join(line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in lines)
    config = read(text)
    assert config.agents["claude"].max_concurrent == 2 and config.projects[0].name == "myrepo"
    assert config.max_concurrent == 3 and config.budgets.keys() == {"all", "project.myrepo", "agent.claude"}
    key_lines = [line for line in lines if line.startswith("#") and line[1] not in " [" and " = " in line]
    assert len(key_lines) == len(c.CONFIG_KEYS)


def test_the_template_documents_every_key_and_marks_the_unused():
    lines = c.config_template().splitlines()
    for key in c.CONFIG_KEYS:
        at = next(i for i, line in enumerate(lines)
                  if line.startswith(f"#{key.name.rpartition('.')[2]} = ") and key.help in lines[i - 1])
        assert ("(not used by this version yet)" in lines[at - 1]) is not key.active


def test_the_keys_of_this_version_are_the_active_ones():
    assert {key.name for key in c.CONFIG_KEYS if key.active} == {
        "claude_image", "gemini_image", "container_engine", "ssh_auth_sock", "containers.memory", "containers.cpus",
        "containers.pids", "containers.network", "containers.ssh_agent",
        "data_dir", "socket_path", "server_addr", "server_names", "api_token", "max_concurrent", "default_timeout",
        "stall_timeout", "shutdown_timeout",
        "on_shutdown", "stop_grace", "claude_binary_path", "gemini_binary_path", "claude_config_dir",
        "keep_logs", "keep_sandboxes",
        "keep_executions",
        "no_progress_runs", "agents.*.on_quota", *(f"budgets.{scope}{unit}" for scope in ("", "project.*.", "agent.*.")
                                                   for unit in ("usd", "tokens", "runs", "minutes")),
        "agents.*.max_concurrent", "agents.*.model", "agents.*.env", "agents.*.pass_env", "projects[].name",
        "projects[].dir", "projects[].setup", "projects[].build", "projects[].verify",
        "local_model.endpoint", "local_model.model", "local_model.timeout_seconds", "local_model.default_temperature",
        "local_model.api_key",
        "prices.*.input", "prices.*.cached", "prices.*.output", "runners.*.command", "runners.*.resume",
        "runners.*.format", "runners.*.fields", "classifier", "agents.*.models", "agents.*.good_for", "agents.*.mcp"}


def test_differences_name_changed_keys_and_those_that_need_a_restart():
    old = read("")
    new = read('data_dir = "/d"\nmax_concurrent = 4\nstall_timeout = "1m"\n[agents.claude]\nmodel = "opus"\n'
               '[[projects]]\nname = "p"\ndir = "/p"')
    assert c.config_differences(old, new) == [
        "data_dir (needs a restart)", "max_concurrent", "stall_timeout", "agents", "projects"]
    assert c.config_differences(old, read('socket_path = "/s"')) == ["socket_path (needs a restart)"]
    assert c.config_differences(old, read("")) == []
    for key in c.CONFIG_KEYS:
        if "." not in key.name and key.name != "server_addr":
            changed = read(f"{key.name} = {good_value(key)}")
            assert [name.split(" ")[0] for name in c.config_differences(old, changed)] == [key.name]


# -- [runners.NAME]


def runner_problem(text: str, name="codex") -> str:
    return only_problem(f"[runners.{name}]\n{text}")


@pytest.mark.parametrize("text, words", [
    ('command = ["codex", "{promt}"]', "runners.codex.command: unknown name {promt} (did you mean 'prompt'?)"),
    ('command = ["{model}"]', "runners.codex.command[0]: expected the program"),
    ('command = ["./codex"]', "runners.codex.command[0]: expected a program's name or its absolute path"),
    ('command = ["x"]\nfromat = "text"', "runners.codex.fromat: unknown key (did you mean 'format'?)"),
    ('command = ["x"]\nformat = "jsonl"', "runners.codex.fields.text: missing"),
    ('command = ["x"]\nformat = "jsonl"\nfields = {text = "a", tokns_in = "b"}',
     "runners.codex.fields.tokns_in: unknown field (did you mean 'tokens_in'?)"),
    ('command = ["x"]\nformat = "jsonl"\nfields = {text = "a if b"}', "runners.codex.fields.text: expected PATH"),
    ('command = ["x"]\nformat = "jsonl"\nfields = {text = ""}', "runners.codex.fields.text: expected PATH"),
    ('command = ["x"]\nformat = "jsonl"\nfields = {text = "a..b"}', "runners.codex.fields.text: expected PATH"),
    ('command = ["x"]\nfields = {text = "a"}', "runners.codex.fields: only the format jsonl has fields"),
    ('command = ["x", "{prompt}"]\nresume = ["x", "{session}"]\nformat = "claude"', "in command and in resume"),
    ('command = ["x"]\nresume = ["x", "again"]\nformat = "claude"', "runners.codex.resume: {session} is missing"),
    ('command = ["x"]\nresume = ["x", "{session}"]', "runners.codex.resume: the session is not known"),
])
def test_a_runner_that_cannot_work_is_a_problem_at_its_key(text, words):
    assert words in runner_problem(text)


def test_a_runner_has_a_name_of_its_own():
    assert "runners.claude: this agent kind is built in" in runner_problem('command = ["x"]', "claude")
    assert "runners.Codex: expected a word" in runner_problem('command = ["x"]', "Codex")


def test_braces_that_hold_no_name_are_text_and_a_home_directory_is_filled_in():
    row = read('[runners.x]\ncommand = ["~/bin/x", "--config={\\"a\\": 1}", "{}"]').runners["x"]
    assert row["command"] == ("/home/op/bin/x", '--config={"a": 1}', "{}")


# -- totality


def test_any_document_gives_a_configuration_or_invalid_input():
    rng = random.Random(3)
    names = [part for key in c.CONFIG_KEYS for part in key.name.replace("[]", "").split(".")] + ["claude", "x", ""]
    leaves = [None, True, 0, -1, 10 ** 400, 1.5, float("nan"), float("inf"), "", "x", "~", "/p", "15m", ":1", b"x",
              "\ud800",
              "\0", (), [], {}, ["a"], [None], {"a": "b"}, {3: 4}, object()]

    def value(depth: int):
        if depth and rng.random() < 0.5:
            return {rng.choice(names): value(depth - 1) for _ in range(rng.randrange(4))}
        if depth and rng.random() < 0.2:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        return rng.choice(leaves)

    outcomes = {"good": 0, "bad": 0}
    for _ in range(700):
        try:
            document = {rng.choice(names): value(3) for _ in range(rng.randrange(4))}
            assert isinstance(c.parse_config(document, "f", HOME), c.Config)
            outcomes["good"] += 1
        except c.InvalidInput as error:
            assert error.problems
            outcomes["bad"] += 1
    assert outcomes["good"] > 50 and outcomes["bad"] > 300
    for document in (None, [], 3, "x"):
        with pytest.raises(c.InvalidInput):
            c.parse_config(document, "f", HOME)
