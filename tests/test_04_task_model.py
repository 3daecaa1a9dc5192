"""Section 04: task files, their errors, cycles, the JSON forms of the database, and the waits between tries."""
import datetime
import json
import random
import subprocess
import sys
import time

import pytest

import claudomator as c

NOW = 1_800_000_000.0
WHOLE = {
    "name": "Fix the flaky login test", "description": "for people",
    "agent": {"type": "claude", "model": "sonnet", "instructions": "do it\nwell\n", "project_dir": "/srv/repo",
              "isolation": "sandbox", "max_budget_usd": 1.5, "permission_mode": "default",
              "allowed_tools": ["Bash", "Read"], "disallowed_tools": ["Web"], "context_files": ["/docs"],
              "system_prompt_append": "be brief", "additional_args": ["--max-turns", "3"], "skip_planning": True,
              "temperature": 0, "max_tokens": 100},
    "timeout": "15m", "stall_timeout": "90s", "priority": "high", "tags": ["ci", "x"],
    "depends_on": ["other", {"task": "third", "on": "any"}], "start_at": "2027-12-01T22:00:00Z",
    "retry": {"max_attempts": 3, "backoff": "linear"}, "verify": "make test", "verify_rounds": 4,
    "acceptance_criteria": "it works", "auto_accept": True, "idempotency_key": "k", "parent_task_id": "p",
    "project": "repo", "story_id": "s",
}
SPEC = c.TaskSpec(
    name="Fix the flaky login test", description="for people",
    agent=c.AgentConfig(
        type="claude", model="sonnet", instructions="do it\nwell\n", project_dir="/srv/repo", repository_url="",
        isolation="sandbox", max_budget_usd=1.5, permission_mode="default", allowed_tools=("Bash", "Read"),
        disallowed_tools=("Web",), context_files=("/docs",), system_prompt_append="be brief",
        additional_args=("--max-turns", "3"), skip_planning=True, temperature=0.0, max_tokens=100),
    timeout_s=900.0, stall_timeout_s=90.0, priority="high", tags=("ci", "x"),
    depends_on=(c.Dependency(task="other"), c.Dependency(task="third", on="any")), start_at=1827698400.0,
    retry=c.RetryPolicy(max_attempts=3, backoff="linear"), verify="make test", verify_rounds=4,
    acceptance_criteria="it works", auto_accept=True, idempotency_key="k", parent_task_id="p", project="repo",
    story_id="s")


def with_changes(**changes) -> dict:
    """A small valid task; keys with ``__`` reach into it: ``agent__model``."""
    document = {"name": "t", "agent": {"instructions": "x"}}
    for name, value in changes.items():
        group, _, leaf = name.rpartition("__")
        (document[group] if group else document)[leaf] = value
    return document


def read(document) -> c.TaskSpec:
    (spec,) = c.parse_tasks(document, "t.yaml", NOW)
    return spec


def problems(document) -> list[str]:
    with pytest.raises(c.InvalidInput) as caught:
        c.parse_tasks(document, "t.yaml", NOW)
    return caught.value.problems


def only_problem(document) -> str:
    found = problems(document)
    assert len(found) == 1, found
    return found[0]


def text_error(text: str) -> str:
    with pytest.raises(c.InvalidInput) as caught:
        c.parse_task_text(text, "t.yaml", NOW)
    return str(caught.value)


# -- what is read


def test_every_key_of_a_task_is_read():
    assert read(WHOLE) == SPEC
    covered = {*WHOLE, *(f"agent.{name}" for name in WHOLE["agent"]), "agent.repository_url"} - {"agent"}
    assert covered == {key.name for key in c.TASK_KEYS if "[]" not in key.name and not key.name.startswith("retry.")}


def test_the_smallest_task_has_the_defaults():
    assert read(with_changes()) == c.TaskSpec(name="t", agent=c.AgentConfig(instructions="x"))


def test_null_means_absent():
    nulls = {key: None for key in c.TASK_GROUPS[""] if key != "name"}
    agent = {key: None for key in c.TASK_GROUPS["agent"] if key != "instructions"}
    assert read({**nulls, "name": "t", "agent": {**agent, "instructions": "x"}}) == read(with_changes())


def test_the_table_and_the_records_have_the_same_defaults():
    for key in c.TASK_KEYS:
        group, _, leaf = key.name.rpartition(".")
        record = {"": c.TaskSpec, "agent": c.AgentConfig}.get(group)
        if record and not key.required and leaf != "retry":
            field = leaf if leaf in record._fields else leaf + "_s"
            assert record._defaults[field] == key.default, key.name
        assert key.help and key.name


def test_old_spellings_are_read():
    spec = read({"name": "t", "claude": {"instructions": "x", "working_dir": "/w"}})
    assert spec.agent == c.AgentConfig(instructions="x", project_dir="/w")
    assert read({"name": "t", "agent": None, "claude": {"instructions": "x"}}).agent.instructions == "x"


def test_old_and_new_spelling_together_are_an_error():
    assert only_problem({"name": "t", "agent": {"instructions": "x"}, "claude": {"instructions": "x"}}) == (
        't.yaml: task 1 "t": claude: is an older name for agent, which is given too; keep one')
    assert only_problem(with_changes(agent__project_dir="/a", agent__working_dir="/b")) == (
        't.yaml: task 1 "t": agent.working_dir: is an older name for agent.project_dir, which is given too; keep one')


def test_isolation_stays_as_given():
    for agent in ({"repository_url": "git@h:x"}, {"project_dir": "/x"}, {}, {"project_dir": "/x", "isolation": "none"}):
        spec = read({"name": "t", "agent": {"instructions": "x", **agent}})
        assert spec.agent.isolation == agent.get("isolation", "")


@pytest.mark.parametrize("agent, words", [
    ({"repository_url": "u", "project_dir": "/x"}, "repository_url: cannot stand beside project_dir"),
    ({"repository_url": "u", "isolation": "sandbox"}, "isolation: sandbox cannot use repository_url"),
    ({"repository_url": "u", "isolation": "none"}, "isolation: none cannot use repository_url"),
    ({"isolation": "sandbox"}, "isolation: sandbox needs agent.project_dir or project"),
    ({"isolation": "container"}, "isolation: container needs agent.repository_url, agent.project_dir or project")])
def test_settings_that_exclude_each_other_are_refused(agent, words):
    assert f"agent.{words}" in only_problem({"name": "t", "agent": {"instructions": "x", **agent}})


def test_a_project_may_stand_for_the_directory_of_a_sandbox():
    assert read(with_changes(agent__isolation="sandbox", project="p")).agent.isolation == "sandbox"


def test_temperature_zero_and_absent_differ():
    assert read(with_changes(agent__temperature=0)).agent.temperature == 0.0
    assert read(with_changes()).agent.temperature is None


@pytest.mark.parametrize("retry, policy", [
    ({"max_attempts": 3}, c.RetryPolicy(max_attempts=3, backoff="exponential")),
    ({"max_attempts": 2, "backoff": "linear"}, c.RetryPolicy(max_attempts=2, backoff="linear")),
    ({"max_attempts": 5, "backoff": ["10s", "1m"]},
     c.RetryPolicy(max_attempts=5, backoff="list", delays_s=(10.0, 60.0))),
    ({"backoff": ["10s", "1m"]}, c.RetryPolicy(max_attempts=3, backoff="list", delays_s=(10.0, 60.0)))])
def test_retry_forms(retry, policy):
    assert read(with_changes(retry=retry)).retry == policy


@pytest.mark.parametrize("retry, words", [
    (3, "retry: expected a table, got 3 (write {max_attempts: 3})"), ({}, "retry.max_attempts: missing"),
    ({"backoff": "linear"}, "retry.max_attempts: missing"), ({"max_attempts": 0}, "expected an integer (>= 1), got 0"),
    ({"max_attempts": True}, "got true"),
    ({"max_attempts": 2, "backoff": "quadratic"}, "retry.backoff: expected exponential"),
    ({"max_attempts": 2, "backoff": []}, "retry.backoff: expected"),
    ({"max_attempts": 2, "backoff": 5}, "retry.backoff"),
    ({"max_attempts": 2, "backoff": ["1s", "x"]}, "retry.backoff[1]: expected a duration like 15m, got 'x'"),
    ({"max_atempts": 2, "max_attempts": 2}, "retry.max_atempts: unknown key (did you mean 'max_attempts'?)")])
def test_retry_faults(retry, words):
    assert words in only_problem(with_changes(retry=retry))


UTC = datetime.timezone.utc


@pytest.mark.parametrize("written, unix_s", [
    ("2026-12-01T22:00:00Z", 1796162400.0), ("2026-12-01T23:00:00.250+01:00", 1796162400.25), ("3h", NOW + 10800),
    ("0", NOW), (datetime.datetime(2026, 12, 1, 22), 1796162400.0), (datetime.date(2026, 12, 1), 1796083200.0),
    (datetime.datetime(2026, 12, 1, 22, 0, 0, 500000), 1796162400.5),
    (datetime.datetime(2026, 12, 1, 22, tzinfo=UTC), 1796162400.0),
    (datetime.datetime(2026, 12, 1, 20, tzinfo=datetime.timezone(datetime.timedelta(hours=-2))), 1796162400.0)])
def test_start_at_is_a_time_or_a_delay(written, unix_s):
    assert read(with_changes(start_at=written)).start_at == unix_s


@pytest.mark.parametrize("written", [
    "tomorrow", "2026-12-01", "2026-12-01T22:00:00", "-3h", 3, 1796162400, "", True, [], "1969-01-01T00:00:00Z",
    "9999-12-31T23:59:59-10:00", "4000d", datetime.time(22)])
def test_start_at_refuses_what_has_no_one_meaning(written):
    assert "start_at: expected a time like 2026-12-01T22:00:00Z or a delay like 3h" in only_problem(
        with_changes(start_at=written))


# -- faults of single keys


GARBAGE = {"a string": "x", "an integer": 3, "a float": 1.5, "a bool": True, "a list": [3], "a mapping": {"a": 3},
           "a date": datetime.date(2026, 1, 1), "bytes": b"x", "nan": float("nan"), "inf": float("inf"),
           "huge": 10 ** 400, "an object": object(), "a nested list": [[["x"]]], "empty list": [], "empty mapping": {}}
ACCEPTED = {
    "string": {"a string"}, "word": {"a string"}, "bool": {"a bool"}, "number": {"an integer", "a float"},
    "integer": {"an integer"}, "strings": {"empty list"}, "dependencies": {"empty list"}, "time": {"a date"}}


@pytest.mark.parametrize("key", [key for key in c.TASK_KEYS if not key.name.startswith(("retry.", "depends_on["))],
                         ids=lambda key: key.name)
def test_every_key_refuses_values_of_other_types_and_names_its_path(key):
    word, _, bound = key.kind.partition(" ")
    for what, value in GARBAGE.items():
        document = with_changes(**{key.name.replace(".", "__"): value})
        accepted = what in ACCEPTED.get(word, ()) and (bound != "0..2" or what == "a float")
        if accepted:
            read(document)
        else:
            found = problems(document)
            assert any(f": {key.name}" in line for line in found), (what, found)


@pytest.mark.parametrize("changes, words", [
    ({"agent__max_tokens": True}, "agent.max_tokens: expected an integer (>= 0), got true"),
    ({"agent__max_tokens": -1}, "agent.max_tokens: expected an integer (>= 0), got -1"),
    ({"agent__max_budget_usd": 0}, "agent.max_budget_usd: expected a number (> 0), got 0"),
    ({"agent__max_budget_usd": "1"}, "agent.max_budget_usd: expected a number (> 0), got '1'"),
    ({"agent__temperature": 2.1}, "agent.temperature: expected a number (0..2), got 2.1"),
    ({"agent__temperature": -0.1}, "agent.temperature: expected a number (0..2), got -0.1"),
    ({"agent__type": "Claude!"}, "agent.type: expected a word of a-z, 0-9, _ and -, got 'Claude!'"),
    ({"agent__skip_planning": "yes"}, "agent.skip_planning: expected true or false, got 'yes'"),
    ({"agent__allowed_tools": "Bash"}, "agent.allowed_tools: expected a list of strings, got 'Bash' (write [Bash])"),
    ({"agent__allowed_tools": ["Bash", 3]}, "agent.allowed_tools[1]: expected a string, got 3 (put it in quotes)"),
    ({"agent__allowed_tools": [None]}, "agent.allowed_tools[0]: expected a string, got nothing"),
    ({"agent__permission_mode": "bypassPermission"}, "(did you mean 'bypassPermissions'?)"),
    ({"agent__isolation": "conatiner"},
     "expected one of sandbox, container, none, got 'conatiner' (did you mean 'container'?)"),
    ({"agent__alowed_tools": []}, "agent.alowed_tools: unknown key (did you mean 'allowed_tools'?)"),
    ({"timeout": "0"}, "timeout: expected a duration like 15m (> 0), got '0'"),
    ({"timeout": 90}, "timeout: expected a duration like 15m (> 0), got 90 (write it like 90s)"),
    ({"timeout": "99999d"}, "at most 3650d"),
    ({"priority": "urgent"}, "priority: expected one of high, normal, low, got 'urgent'"),
    ({"verify_rounds": 0}, "verify_rounds: expected an integer (>= 1), got 0"),
    ({"name": 123}, "name: expected a string, got 123 (put it in quotes)"),
    ({"name": "a\nb"}, "name: expected one line of at most 200 characters"),
    ({"name": "x" * 201}, "name: expected one line of at most 200 characters"),
    ({"name": " \t"}, "name: e"), ({"name": "a\u2028b"}, "name: expected one line"),
    ({"agent__instructions": " \n"}, "agent.instructions: empty: what to do"),
    ({"agent__instructions": ""}, "agent.instructions: empty: what to do"),
    ({"agent__instructions": "a\0b"},
     "agent.instructions: expected a string, got 'a\\x00b' (it holds a NUL character)"),
    ({"description": "\ud800"}, "description: expected a string, got '\\ud800' (it holds half a surrogate pair)"),
    ({"depends_on": "x"}, "depends_on: expected a list of tasks, got 'x' (write [x])"),
    ({"depends_on": [3]}, "depends_on[0]: expected a name, an id or {task: X, on: WHEN}, got 3"),
    ({"depends_on": [{"on": "any"}]}, "depends_on[0].task: missing: a name in this file, or an id"),
    ({"depends_on": [""]}, "depends_on[0].task: empty"),
    ({"depends_on": [{"task": "x", "on": "done"}]},
     "depends_on[0].on: expected one of success, ready, failure, any, got 'done'"),
    ({"depends_on": [{"task": "x", "when": "any"}]}, "depends_on[0].when: unknown key"),
    ({"depends_on": ["x", {"task": "x", "on": "any"}]}, "depends_on[1]: 'x' is named twice"),
    ({"agnet": {}}, "agnet: unknown key (did you mean 'agent'?)"), ({3: 4}, "3: unknown key"),
    ({"model": "opus"}, "model: belongs under agent:")])
def test_a_fault_is_told_with_path_found_and_expected(changes, words):
    document = with_changes(**{str(key): value for key, value in changes.items()})
    assert words in "\n".join(problems(document))


def test_printable_names_in_any_script_are_fine():
    assert read(with_changes(name="Löse 登录 \U0001f469\u200d\U0001f4bb")).name.startswith("Löse")


def test_a_missing_agent_or_instructions_is_told():
    assert only_problem({"name": "t"}) == 't.yaml: task 1 "t": agent.instructions: missing: what to do'
    assert only_problem({"name": "t", "agent": "claude"}) == (
        't.yaml: task 1 "t": agent: expected a table, got \'claude\'')
    assert "name: missing" in only_problem({"agent": {"instructions": "x"}})


def test_all_problems_of_a_file_come_at_once_with_task_and_path():
    found = problems({"tasks": [
        {"name": "a", "agent": {"instructions": "x", "allowed_tools": ["Bash", 3]}, "depends_on": ["b"]},
        {"name": "b", "agnt": 3, "agent": {"instructions": "x"}, "priority": "hihg", "depends_on": ["a"]},
        7,
        {"agent": {"instructions": ""}}]})
    assert found == [
        't.yaml: task 1 "a": agent.allowed_tools[1]: expected a string, got 3 (put it in quotes)',
        't.yaml: task 2 "b": agnt: unknown key (did you mean \'agent\'?)',
        't.yaml: task 2 "b": priority: expected one of high, normal, low, got \'hihg\' (did you mean \'high\'?)',
        "t.yaml: task 3: expected a table, got 7",
        "t.yaml: task 4: name: missing: a line that names the task",
        "t.yaml: task 4: agent.instructions: empty: what to do",
        "t.yaml: depends_on: a dependency cycle: a -> b -> a"]


def test_control_characters_of_a_file_do_not_reach_the_terminal():
    for line in problems({"name": "\x1b[31m", "\x1b[32m": 1, "agent": {"instructions": "x", "model": ["\x1b"]}}):
        assert "\x1b" not in line


# -- batches and dependencies


def test_a_batch_keeps_its_order_and_may_be_a_bare_list():
    tasks = [with_changes(name=f"t{i}") for i in range(5)]
    for document in ({"tasks": tasks}, tasks):
        assert [spec.name for spec in c.parse_tasks(document, "f", NOW)] == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize("document, words", [
    ({"tasks": []}, "tasks: expected at least one task"), ([], "expected at least one task"),
    ({"tasks": None}, "tasks: expected a list of tasks, got nothing"),
    ({"tasks": {}}, "tasks: expected a list of tasks"),
    ({"tasks": [with_changes()], "name": "x"}, "tasks: no other key may stand beside it, but name does"),
    (None, "t.yaml: expected a task or a list of tasks, got nothing"), ("x", "expected a task or a list"),
    (3, "expected a task"),
    (True, "expected a task")])
def test_what_is_no_batch_is_told(document, words):
    assert words in only_problem(document)


def test_dependencies_keep_names_and_unresolved_ids_as_given():
    tasks = [with_changes(name="a"),
             with_changes(name="b", depends_on=["a", "3f2c9a1e", {"task": "x", "on": "failure"}])]
    assert c.parse_tasks(tasks, "f", NOW)[1].depends_on == (
        c.Dependency(task="a"), c.Dependency(task="3f2c9a1e"), c.Dependency(task="x", on="failure"))


def test_a_name_that_two_tasks_have_cannot_be_depended_on():
    twice = [with_changes(name="a"), with_changes(name="a")]
    assert len(c.parse_tasks(twice, "f", NOW)) == 2
    assert only_problem([*twice, with_changes(name="b", depends_on=["a"])]) == (
        "t.yaml: task 3 \"b\": depends_on[0]: 2 tasks are named 'a'")


@pytest.mark.parametrize("links, cycle", [
    ({"a": ["a"]}, "a -> a"), ({"a": ["b"], "b": ["a"]}, "a -> b -> a"),
    ({"x": ["a"], "a": ["b"], "b": ["c"], "c": ["a"]}, "a -> b -> c -> a"),
    ({"a": ["b", "c"], "b": [], "c": ["d", "b"], "d": ["c"]}, "c -> d -> c")])
def test_a_cycle_is_refused_and_printed(links, cycle):
    tasks = [with_changes(name=name, depends_on=targets) for name, targets in links.items()]
    assert only_problem(tasks) == f"t.yaml: depends_on: a dependency cycle: {cycle}"


def test_graphs_without_a_cycle_pass():
    assert c.find_cycle({}) is None and c.find_cycle({"a": ["unknown"]}) is None
    assert c.find_cycle({"a": ["b", "c", "b"], "b": ["d"], "c": ["d"], "d": []}) is None


def test_cycles_are_found_in_random_graphs_as_by_brute_force():
    rng = random.Random(4)
    for _ in range(400):
        nodes = [str(i) for i in range(rng.randrange(1, 7))]
        edges = {node: [rng.choice(nodes) for _ in range(rng.randrange(3))] for node in nodes}
        reach = {node: set(targets) for node, targets in edges.items()}
        for _ in nodes:
            for node in nodes:
                reach[node] |= {far for near in reach[node] for far in reach[near]}
        cycle = c.find_cycle(edges)
        assert (cycle is not None) == any(node in reach[node] for node in nodes)
        if cycle:
            assert cycle[0] == cycle[-1] and len(set(cycle)) == len(cycle) - 1
            assert all(after in edges[before] for before, after in zip(cycle, cycle[1:]))


def test_long_chains_and_dense_graphs_take_linear_time():
    size = 30_000
    chain = {str(i): [str(i + 1)] for i in range(size)}
    fan = {str(i): ["end"] for i in range(size)} | {"end": []}
    layers = {f"{layer}.{i}": [f"{layer + 1}.{j}" for j in range(30)] for layer in range(30) for i in range(30)}
    started = time.monotonic()
    assert c.find_cycle(chain) is None and c.find_cycle(fan) is None and c.find_cycle(layers) is None
    assert len(c.find_cycle({**chain, str(size): ["0"]})) == size + 2
    assert time.monotonic() - started < 5  # exponential or quadratic work would take minutes


# -- text: YAML and JSON


YAML = """
# as in the guide
name: "Fix the flaky login test"
description: for people
agent: &agent
  type: claude
  model: sonnet
  instructions: |
    do it
    well
  project_dir: /srv/repo
  isolation: sandbox
  max_budget_usd: 1.50
  permission_mode: default
  allowed_tools: [Bash, Read]
  disallowed_tools:
    - Web
  context_files: [/docs]
  system_prompt_append: be brief
  additional_args: [--max-turns, "3"]
  skip_planning: true
  temperature: 0
  max_tokens: 100
timeout: 15m
stall_timeout: 90s
priority: high
tags: [ci, x]
depends_on: [other, {task: third, on: any}]
start_at: 2027-12-01T22:00:00Z
retry: {max_attempts: 3, backoff: linear}
verify: make test
verify_rounds: 4
acceptance_criteria: it works
auto_accept: true
idempotency_key: k
parent_task_id: p
project: repo
story_id: s
"""


def test_yaml_and_json_of_one_file_give_equal_specs():
    assert c.parse_task_text(YAML, "t.yaml", NOW) == [SPEC]
    assert c.parse_task_text("\ufeff  \n" + json.dumps(WHOLE, indent=1), "t.json", NOW) == [SPEC]
    assert c.parse_task_text(json.dumps([WHOLE]), "t.json", NOW) == [SPEC]
    assert c.parse_task_text(json.dumps({"tasks": [WHOLE]}), "t.json", NOW) == [SPEC]


def test_on_is_a_key_and_not_the_boolean_that_yaml_1_1_makes_of_it():
    text = "name: t\nagent: {instructions: 'x'}\ndepends_on:\n- {task: a, on: failure}\ntags: [on, off, yes, no, y]\n"
    (spec,) = c.parse_task_text(text, "f", NOW)
    assert spec.depends_on[0].on == "failure" and spec.tags == ("on", "off", "yes", "no", "y")


@pytest.mark.parametrize("scalar, value", [
    ("010", "010"), ("1_000", "1_000"), ("0o17", "0o17"), ("1:30", "1:30"), ("=", "="), ("yes", "yes"), ("12", 12),
    ("-3", -3),
    ("0x1F", 31), ("1.5", 1.5), ("1e3", 1000.0), ("2.", 2.0), (".5", 0.5), ("true", True), ("False", False),
    ("~", None),
    ("null", None), ("", None), ("1.2.3", "1.2.3"), ("0", 0), ("e3", "e3"), ("'12'", "12"), (".inf", float("inf"))])
def test_yaml_scalars_are_those_of_yaml_1_2(scalar, value):
    found = c._yaml_document(f"a: {scalar}\n", "f")["a"]
    assert found == value and type(found) is type(value)


def test_anchors_and_merges_work():
    text = ("tasks:\n- name: a\n  agent: &base {instructions: 'x', model: m, tags_: 1}\n".replace(", tags_: 1", "")
            + "- name: b\n  agent: {<<: *base, model: n}\n- name: c\n  agent: *base\n")
    specs = c.parse_task_text(text, "f", NOW)
    assert [(spec.agent.instructions, spec.agent.model) for spec in specs] == [("x", "m"), ("x", "n"), ("x", "m")]
    chained = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\nd: {<<: *b}\n"
    assert c._yaml_document(chained, "f") == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2, "y": 3}, "d": {"x": 2}}


@pytest.mark.parametrize("text, words", [
    ("name: a\nagent: {}\nname: b\n", "t.yaml: line 3, column 1: the key 'name' is given twice"),
    ("agent:\n  model: a\n  'model': b\n", "line 3, column 3: the key 'model' is given twice"),
    ("a: [1, 2\nb: 3\n", "t.yaml: line 2, column 2"), ("a: b: c\n", "line 1, column 5"),
    ("a:\n\t- b\n", "line 2, column 1"),
    ("a: 1\n---\nb: 2\n", "line 2, column 1"), ("a: *nowhere\n", "line 1, column 4"), ("? [a]\n: b\n", "unhashable"),
    ("a: &a [*a]\n", "an alias inside its own anchor"), ("a: !!python/object:os.system x\n", "a tag such as"),
    ("a: !!set {x}\n", "a tag such as"), ("start_at: 2026-02-30\n", "line 1, column 11: day is out of range"),
    ("a: \x07\n", "line 1: the character U+0007"), ("a: 1\nb: \x07\n", "line 2: the character U+0007"),
    ("a: " + "9" * 5000, "line 1, column 4"), ('a: "\\U00110000"', "not YAML"), ("<<: 3\n", "line 1"),
    ("a: 0x" + "f" * 5000, "unknown key"), ("", "expected a task or a list of tasks, got nothing"),
    ("just words", "got 'just words'"),
    ("[" * 100_000, "nested too deeply"), ("a: " + "[" * 600, "nested too deeply"),
    ("- " * 5000, "nested too deeply"), ('{"a": 1,\n "b": }', "t.yaml: line 2, column 7: not JSON"),
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"), ("{name: x}", "line 1, column 2: not JSON"),
    ('{"a": 1} x', "not JSON"),
    ('{"name": ' + "9" * 5000 + "}", "not JSON")])
def test_a_text_that_is_no_document_is_told_with_its_place(text, words):
    assert words in text_error(text)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number):
    assert "agent.max_budget_usd: expected a number (> 0)" in text_error(
        f"name: t\nagent: {{instructions: 'x', max_budget_usd: {number}}}\n")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_in_json(number):
    assert "agent.max_budget_usd: expected a number (> 0)" in text_error(
        f'{{"name": "t", "agent": {{"instructions": "x", "max_budget_usd": {number}}}}}')


def test_nested_aliases_do_not_hang():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    merges = ["a0: &a0 {k0: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)]
    for bomb in (lines, merges):
        started = time.monotonic()
        assert "more than 100000 values, aliases expanded" in text_error("\n".join(bomb))
        assert time.monotonic() - started < 5


def test_aliases_are_counted_as_what_they_expand_to():
    anchor = "a: &a [" + "x, " * 997 + "x]\nb: ["  # 999 values
    assert len(c._yaml_document(anchor + ", ".join(["*a"] * 99) + "]", "f")["b"]) == 99
    assert "more than 100000 values" in text_error(anchor + ", ".join(["*a"] * 101) + "]")


def test_a_text_beyond_the_bound_is_refused_before_it_is_read():
    started = time.monotonic()
    assert "longer than 8 MiB" in text_error("[" * (c.MAX_TASK_TEXT + 1))
    assert time.monotonic() - started < 2


def test_without_pyyaml_a_yaml_file_says_what_to_install_and_json_works():
    program = ("import sys; sys.modules['yaml'] = None; import claudomator as c\n"
               "print(c.parse_task_text('{\"name\":\"t\",\"agent\":{\"instructions\":\"x\"}}', 'f', 0.0)[0].name)\n"
               "try: c.parse_task_text('name: t', 'f.yaml', 0.0)\n"
               "except c.InvalidInput as error: print(error)\n")
    root = c.__file__.rpartition("/")[0]
    out = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=30).stdout
    assert out.startswith("t\nf.yaml: reading YAML needs PyYAML (pip install pyyaml") and "JSON" in out


# -- totality


def test_any_document_gives_specs_or_invalid_input():
    rng = random.Random(7)
    names = [part for key in c.TASK_KEYS for part in key.name.replace("[]", "").split(".")]
    names += ["tasks", "claude", "working_dir"]
    leaves = [*GARBAGE.values(), None, "", "\ud800", "\0", "15m", "high", "exponential", "success", (), b"", -1, 0]

    def mutated(value, depth=0):
        roll = rng.random()
        if roll < 0.04 or depth > 6:
            return rng.choice(leaves)
        if isinstance(value, dict):
            items = [(rng.choice(names) if rng.random() < 0.02 else key, mutated(item, depth + 1))
                     for key, item in value.items() if rng.random() > 0.03]
            return dict(items + ([(rng.choice([*names, 3, None, ("x",)]), rng.choice(leaves))] if roll > 0.97 else []))
        if isinstance(value, list):
            return [mutated(item, depth + 1) for item in value] + ([rng.choice(leaves)] if roll > 0.95 else [])
        return value

    outcomes = {"good": 0, "bad": 0}
    batch = {"tasks": [with_changes(name="a"), with_changes(name="b", depends_on=["a"]), with_changes(name="c")]}
    for _ in range(1500):
        document = mutated(rng.choice([WHOLE, batch, with_changes()]))
        try:
            specs = c.parse_tasks(document, "f", NOW)
            assert specs and all(isinstance(spec, c.TaskSpec) for spec in specs)
            assert c.parse_tasks([c.spec_to_json(spec) for spec in specs], "f", 0.0) == specs
            c.format_json([c.spec_to_json(spec) for spec in specs]).encode()
            outcomes["good"] += 1
        except c.InvalidInput as error:
            assert error.problems and all(line.startswith("f: ") for line in error.problems)
            str(error).encode()
            outcomes["bad"] += 1
    assert outcomes["good"] > 100 and outcomes["bad"] > 300


@pytest.mark.parametrize("whole", [YAML, json.dumps(WHOLE)], ids=["yaml", "json"])
def test_any_text_gives_specs_or_invalid_input(whole):
    rng = random.Random(8)
    pieces = ["", "\n", "\t", ":", " ", "[", "}", "&a ", "*a", "!!int ", "<<", '"', "'", "-", "\x00", "\u2028", "%",
              "|",
              "2026-13-45", "\\", "\ud800"]
    for _ in range(150):
        text = list(whole)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(text))
            text[at:at + rng.randrange(3)] = rng.choice(pieces)
        try:
            assert c.parse_task_text("".join(text), "f", NOW)
        except c.InvalidInput:
            pass


# -- JSON forms


def test_a_spec_goes_through_json_unchanged():
    assert read(c.parse_json(c.format_json(c.spec_to_json(SPEC)))) == SPEC
    smallest = read(with_changes())
    assert c.spec_to_json(smallest) == with_changes() and read(c.spec_to_json(smallest)) == smallest


@pytest.mark.parametrize("changes", [
    {"timeout": "1h1m1s"}, {"timeout": "0.3s"}, {"stall_timeout": "0"}, {"timeout": "1ns"}, {"timeout": "3650d"},
    {"timeout": "7us"}, {"timeout": "33.333333333s"}, {"start_at": "2026-12-01T22:00:00.123456Z"},
    {"retry": {"backoff": ["1.5s", "1h1m1s", "0"]}}, {"retry": {"max_attempts": 9}}, {"agent__temperature": 0},
    {"agent__max_budget_usd": 0.1}, {"agent__project_dir": "rel"}, {"agent__repository_url": "u"}])
def test_fractions_and_long_durations_go_through_json_unchanged(changes):
    spec = read(with_changes(**changes))
    assert read(c.parse_json(c.format_json(c.spec_to_json(spec)))) == spec


def test_a_row_of_the_store_becomes_a_document_without_the_stores_own_fields():
    class Row(c.TaskSpec):
        id: str
        state: str = "PENDING"

    assert c.spec_to_json(Row(**SPEC.__dict__, id="1")) == c.spec_to_json(SPEC)


def test_agent_settings_go_through_the_databases_json_unchanged():
    for agent in (SPEC.agent, c.AgentConfig(), c.AgentConfig(instructions="x", temperature=None, max_budget_usd=None)):
        assert c.agent_from_json(c.parse_json(c.format_json(c.agent_to_json(agent)))) == agent
    assert c.agent_to_json(SPEC.agent) == {**WHOLE["agent"], "repository_url": ""}
    assert "temperature" not in c.agent_to_json(c.AgentConfig())


def test_what_the_go_server_wrote_is_read():
    written = ('{"type":"claude","model":"","context_files":null,"instructions":"do","repository_url":"",'
               '"max_budget_usd":0,"permission_mode":"newMode","allowed_tools":["Bash",null],"disallowed_tools":null,'
               '"system_prompt_append":"","additional_args":[],"project_dir":"","working_dir":"/w",'
               '"container_image":"x","skip_planning":false}')
    assert c.agent_from_json(c.parse_json(written)) == c.AgentConfig(
        type="claude", instructions="do", permission_mode="newMode", allowed_tools=("Bash",), project_dir="/w")
    assert c.agent_from_json({"project_dir": "/p", "working_dir": "/w"}).project_dir == "/p"
    for nonsense in (None, [], "x", 3, {"type": 3, "max_tokens": "x", "temperature": [], "skip_planning": "no"}):
        assert c.agent_from_json(nonsense) == c.AgentConfig()
    assert c.agent_from_json({"instructions": "a\0b"}).instructions == "a\0b"
    assert c.agent_from_json({"temperature": 0}).temperature == 0.0


def test_retry_policies_of_any_version_are_read():
    for policy in (c.RetryPolicy(), c.RetryPolicy(max_attempts=4, backoff="linear"),
                   c.RetryPolicy(max_attempts=3, backoff="list", delays_s=(1.5, 3661.0))):
        assert c.retry_from_json(c.parse_json(c.format_json(c.retry_to_json(policy)))) == policy
    assert c.retry_from_json({"max_attempts": 3, "backoff": ""}) == c.RetryPolicy(max_attempts=3)
    assert c.retry_from_json({"max_attempts": 3, "backoff": ["x", "5s"]}).delays_s == (5.0,)
    for nonsense in (None, [], {}, "x", {"max_attempts": 0}, {"max_attempts": "3", "backoff": 7}, {"backoff": ["x"]}):
        assert c.retry_from_json(nonsense) == c.RetryPolicy()


def test_dependencies_of_any_version_are_read():
    depends_on = (c.Dependency(task="a"), c.Dependency(task="b", on="any"))
    assert c.depends_to_json(depends_on) == ["a", {"task": "b", "on": "any"}]
    assert c.depends_from_json(c.depends_to_json(depends_on)) == depends_on
    assert c.depends_from_json(["id-1", "id-2"]) == (c.Dependency(task="id-1"), c.Dependency(task="id-2"))
    assert c.depends_from_json([{"task": "a", "on": "new"}, 3, None, {}]) == (c.Dependency(task="a"),)
    for nothing in (None, [], {}, "x", 3):
        assert c.depends_from_json(nothing) == ()


# -- waits


def test_priorities_rank_high_first():
    assert sorted(c.PRIORITY_RANK, key=c.PRIORITY_RANK.get) == ["high", "normal", "low"]


MIDDLE = 0.5


@pytest.mark.parametrize("policy, waits", [
    (c.RetryPolicy(), [5, 10, 20, 40, 80, 160, 300, 300]),
    (c.RetryPolicy(backoff="linear"), [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300]),
    (c.RetryPolicy(backoff="list", delays_s=(7.0, 1000.0)), [7, 1000, 1000])])
def test_waits_between_tries(policy, waits):
    assert [c.retry_delay_s(policy, n, MIDDLE) for n in range(1, len(waits) + 1)] == pytest.approx(waits)
    assert c.retry_delay_s(policy, 10 ** 9, MIDDLE) == pytest.approx(waits[-1])
    assert c.retry_delay_s(policy, 0, MIDDLE) == pytest.approx(waits[0])


def test_jitter_spreads_by_a_tenth_both_ways():
    assert c.retry_delay_s(c.RetryPolicy(), 2, 0.0) == pytest.approx(9.0)
    assert c.retry_delay_s(c.RetryPolicy(), 2, 0.999999) == pytest.approx(11.0, rel=1e-4)
    assert c.retry_delay_s(c.RetryPolicy(), 1, 0.0) == pytest.approx(4.5)
    assert c.retry_delay_s(c.RetryPolicy(delays_s=(10.0,)), 1, 0.25) == pytest.approx(9.5)


def test_a_whole_number_may_be_written_with_a_point_and_a_zero():
    one = c.parse_tasks({"name": "t", "verify_rounds": 3.0, "agent": {"instructions": "x"}, "retry": {"max_attempts": 2.0}}, "f", 0.0)[0]
    assert (one.verify_rounds, one.retry.max_attempts) == (3, 2) and type(one.verify_rounds) is type(one.retry.max_attempts) is int
    for wrong in (3.5, 1e300, float("inf"), float("nan")):
        with pytest.raises(c.InvalidInput, match="verify_rounds"):
            c.parse_tasks({"name": "t", "verify_rounds": wrong, "agent": {"instructions": "x"}}, "f", 0.0)
