"""Section 06: who takes a task that names no agent: the classifier's question, and what is made of its answer."""
import json
import random

import pytest

import claudomator as c

CLAUDE = c.AgentSettings(kind="claude", models=("sonnet", "opus"), good_for="large changes")
GEMINI = c.AgentSettings(kind="gemini")
BOTH = [CLAUDE, GEMINI]
GOOD = '{"agent": "claude", "model": "opus"}'


def test_the_question_names_the_agents_and_the_task_and_keeps_its_size():
    prompt = c.choice_prompt("tidy {up}", "Sort the é imports.\n" + "x" * 100_000, BOTH)
    assert "- claude: large changes (models: sonnet, opus)\n- gemini\n" in prompt
    assert "The task: tidy {up}\nSort the é imports.\n" in prompt and '{"agent": "NAME", "model": "MODEL"}' in prompt
    assert len(prompt) < 5000 and len(c.choice_prompt("n" * 9999, "", BOTH)) < 1000


@pytest.mark.parametrize("answer, choice", [
    (GOOD, ("claude", "opus")),
    ('{"agent": "gemini"}', ("gemini", "")),
    ('{\n  "agent": " Claude ",\n  "why": "big"\n}', ("claude", "")),
    (f"```json\n{GOOD}\n```", ("claude", "opus")),
    (f"Sure! I weighed both.\n\n{GOOD}\n\nTell me if you want {{another}} one.", ("claude", "opus")),
    ('First I thought {"agent": "gemini"}, but {"agent": "claude"} fits.', ("claude", "")),
    ('{"agent": "gemini"} {"agent": "codex"} {"verdict": 1} {broken', ("gemini", "")),
    ('{"choice": {"agent": "gemini"}}', ("gemini", "")),
    ('{"agent": "claude", "model": "gpt-9"}', ("claude", "")),  # not offered
    ('{"agent": "gemini", "model": "opus"}', ("gemini", "")),  # another agent's
    ('{"agent": "claude", "model": ["opus"]}', ("claude", "")),
    ("x" * 100_000 + GOOD, ("claude", "opus")),
    (GOOD + "x" * 100_000, None),
    ("", None), ("claude", None), ("{}", None), ("{" * 100_000, None), ('{"agent": null}', None), ("[1]", None),
    ('{"agent": ["claude"]}', None), ('{"agent": "local"}', None), ('{"agent": "shell"}', None), ('"claude"', None),
    ('{"agent": "claude"', None), ("{'agent': 'claude'}", None), ('{"agent": {"agent": 1}}', None),
])
def test_an_answer_is_found_in_fences_and_chatter_or_it_is_none(answer, choice):
    assert c.read_choice(answer, BOTH) == choice


def test_a_kind_that_was_not_offered_is_no_choice():
    assert c.read_choice(GOOD, [GEMINI]) is None and c.read_choice(GOOD, []) is None


def test_any_mutated_answer_is_a_choice_among_what_was_offered_or_none():
    random_ = random.Random(7)
    whole, seen = f"Here:\n```json\n{GOOD}\n```\nor {{\"agent\": \"gemini\"}} {{x}}", set()
    for _ in range(4000):
        text = list(whole)
        for _ in range(random_.randint(1, 6)):
            at = random_.randrange(len(text))
            text[at:at + random_.randint(0, 4)] = random_.choice(['"', "{", "}", "\\", "\ud800", "é", "", "null", ":", "\0"])
        choice = c.read_choice("".join(text), BOTH)
        assert choice is None or choice in {("claude", ""), ("claude", "opus"), ("gemini", "")}
        seen.add(choice)
    assert len(seen) == 4


def test_whatever_json_stands_in_the_fields_is_taken():
    for value in (None, True, 3, 1.5, "x", [], {}, [1], "\ud800"):
        assert c.read_choice(json.dumps({"agent": value, "model": value}), BOTH) is None
        found = c.read_choice(json.dumps({"agent": "gemini", "model": value}), BOTH)
        assert found == (None if isinstance(value, dict) else ("gemini", ""))


def test_open_kinds_are_neither_paused_parked_cooling_nor_out_of_budget():
    limits = c.Limits(3, available_kinds=("claude", "gemini"), per_kind={"claude": 0})
    assert c.open_kinds(limits, 100.0) == ("claude", "gemini")  # a full one has room later
    assert c.open_kinds(limits.replace(paused_kinds=frozenset({"claude"})), 100.0) == ("gemini",)
    assert c.open_kinds(limits.replace(parked={"claude": 100.5}), 100.0) == ("gemini",)
    assert c.open_kinds(limits.replace(parked={"claude": 100.0}), 100.0) == ("claude", "gemini")
    assert c.open_kinds(limits.replace(cooling={"gemini": float("inf")}), 100.0) == ("claude",)
    cap = c.Cap("agent.gemini", "runs", 2, 2)
    assert c.open_kinds(limits.replace(caps=(cap,), resets_at=200.0), 100.0) == ("claude",)
