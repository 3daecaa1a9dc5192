"""The docs say what the program does, and name nothing that does not exist."""
import re

import pytest

import claudomator as c
from tests import docs_tables

ROOT = docs_tables.ROOT
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", docs_tables.BLOCKS)
def test_tables_in_the_docs_are_those_of_the_program(page):
    assert (ROOT / page).read_text(encoding="utf-8") == docs_tables.filled(page, docs_tables.BLOCKS[page]), \
        "run: python3 -m tests.docs_tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def commands_in(text):
    """(command, rest of the line) of every ``claudomator ...`` in code."""
    for code in re.findall(r"`([^`\n]+)`|^\s*(claudomator .+)$", text, re.M):
        line = (code[0] or code[1]).strip()
        if line.startswith(("claudomator ", "ctl ")):
            yield line.removeprefix("claudomator ")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_docs_name_no_command_or_option_that_does_not_exist(page):
    for line in commands_in(page.read_text(encoding="utf-8")):
        if line.split()[0].isupper():
            continue
        words = line.split(" #")[0].split()
        name, rest = c.find_command(words)
        options = {spelling for option in (*c.COMMANDS[name].options, *c.GLOBAL_OPTIONS) for spelling in option.names}
        used = {word.partition("=")[0] for word in re.sub(r'"[^"]*"', "", line).split("#")[0].split() if re.match(r"--?[a-z]", word)}
        assert used <= options, f"{page.name}: {line}"


def test_docs_name_every_reason_and_state():
    text = (ROOT / "docs/states.md").read_text(encoding="utf-8")
    assert all(f"`{reason}`" in text for reason in c.REASONS)
    assert all(state in text for state in c.STATES)


def test_readme_begins_with_the_two_commands_and_ci_runs_the_test_command():
    blocks = re.findall(r"```sh\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert "claudomator demo" in blocks[0] and "pytest" in blocks[1]
    assert blocks[1].strip() in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_top_level_holds_only_what_the_owner_allows():
    allowed = {"claudomator.py", "pyproject.toml", "ct.py", "tests", "web", "systemd", "docs", "README.md", "CHANGELOG.md",
               "CONTRIBUTING.md"}
    made = {"build", "claudomator.egg-info", "__pycache__"}  # by pip and python, not in the repository
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - made <= allowed
