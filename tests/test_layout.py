"""The layout of claudomator.py: one order, pure sections first, nothing too long, and every public name explained.

Each check takes the source and returns the faults it found, as sentences with a line number; the second half of this
file shows each check a small source that breaks its rule.
"""
import ast
import bisect
import builtins
import functools
import re

import pytest

import claudomator

# The file's length is a ratchet (docs/adr/0010): only a new capability raises it.
MAX_LINES, MAX_FUNCTION, MAX_CLASS, MAX_WIDTH = 14033, 60, 300, 125
BANNER = re.compile(r"# ---- (\d\d) (\S.*?) -{3,}")
RULE = re.compile(r"\s*#.*[-=#*~_+]{4,}")  # a comment that looks like a line across the page
IMPURE = set(
    "asyncio concurrent datetime fcntl getpass glob http importlib logging mmap multiprocessing os pathlib platform "
    "posix pty pwd random resource secrets select selectors shutil signal smtplib socket socketserver sqlite3 ssl "
    "subprocess sys tempfile termios threading time urllib uuid _socket".split())
EFFECTS = {"open", "print", "input", "exec", "eval", "breakpoint", "exit", "quit", "__import__"}
MODULE_IMPORTS = {"__future__", "os", "sys", "time", "_json"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Program:
    """A parsed source and its sections."""

    def __init__(self, source: str):
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        marks = ((line, BANNER.fullmatch(text)) for line, text in enumerate(self.lines, 1))
        self.sections = [(line, int(mark[1]), mark[2]) for line, mark in marks if mark]

    def section(self, line: int) -> tuple[int, str]:
        """(number, title) of the section in which a line is; (0, "") in the head."""
        at = bisect.bisect_right(self.sections, (line, 100))
        return self.sections[at - 1][1:] if at else (0, "")

    @functools.cached_property
    def reads(self) -> list[tuple[str, int]]:
        """(name, line) of each reading of a name of the module."""
        return [read for statement in self.tree.body for read in global_reads(statement)]

    def is_pure(self, line: int) -> bool:
        return self.section(line)[1].endswith("(pure)")


# The checks


def contents_faults(program: Program) -> list[str]:
    """Contents in the module's docstring is the list of banners."""
    promised = re.findall(r"^\s+(\d\d) (.+)$", ast.get_docstring(program.tree) or "", re.M)
    found = [(f"{number:02}", title) for _, number, title in program.sections]
    return [f"Contents says {mine}, the banners say {theirs}" for mine, theirs in
            zip(promised + [None] * len(found), found + [None] * len(promised)) if mine != theirs]


def order_faults(program: Program) -> list[str]:
    """Section numbers ascend, and no pure section follows one that is not."""
    faults, pairs = [], list(zip(program.sections, program.sections[1:]))
    faults += [f"line {line}: section {number} follows {before}"
               for (_, before, _), (line, number, _) in pairs if number <= before]
    return faults + [f"line {line}: pure section {number} follows {before}, which is not pure"
                     for (_, before, shell), (line, number, title) in pairs
                     if title.endswith("(pure)") and not shell.endswith("(pure)")]


def banner_faults(program: Program) -> list[str]:
    """No comment draws a line in another shape than the banner's."""
    return [f"line {line}: {text.strip()[:40]!r} looks like a banner and is none"
            for line, text in enumerate(program.lines, 1) if RULE.match(text) and not BANNER.fullmatch(text)]


def bound_names(body: list[ast.AST]) -> dict[str, int]:
    """The names that statements bind in their own scope, and the first line of each."""
    names: dict[str, int] = {}
    elsewhere: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.setdefault(node.name, node.lineno)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                names.setdefault(alias.asname or alias.name.split(".")[0], node.lineno)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.setdefault(node.id, node.lineno)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Global):
            elsewhere.update(node.names)
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                if not (isinstance(node, ast.comprehension) and child is node.target):  # bound in there only
                    visit(child)

    for statement in body:
        visit(statement)
    return {name: line for name, line in names.items() if name not in elsewhere}


def arguments(node: ast.arguments) -> set[str]:
    both_kinds = (*node.posonlyargs, *node.args, *node.kwonlyargs, node.vararg, node.kwarg)
    return {argument.arg for argument in both_kinds if argument}


def global_reads(root: ast.AST) -> list[tuple[str, int]]:
    """(name, line) of each name that a top-level statement reads from the module, however deep inside."""
    reads = []

    def visit(node: ast.AST, here: frozenset, inner: frozenset) -> None:
        """``here`` are the names that are not the module's at this place, ``inner`` those in functions inside it."""
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load) and node.id not in here:
                reads.append((node.id, node.lineno))
            return
        body = []
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            body = node.body if isinstance(node.body, list) else [node.body]
            own = inner | arguments(node.args) | bound_names(body).keys()
            for child in body:
                visit(child, own, own)
        elif isinstance(node, ast.ClassDef):  # its names are not seen from inside its methods
            body, own = node.body, inner | bound_names(node.body).keys()
            for child in body:
                visit(child, own, inner)
        elif isinstance(node, COMPREHENSIONS):
            own = {name.id for loop in node.generators for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
            here, inner = here | own, inner | own
        for child in ast.iter_child_nodes(node):
            if child not in body:
                visit(child, here, inner)

    visit(root, frozenset(), frozenset())
    return reads


def reference_faults(program: Program) -> list[str]:
    """A section uses names of sections above it only, inside functions and in annotations too."""
    home = {name: program.section(line)[0] for name, line in bound_names(program.tree.body).items()}
    return [f"line {line}: section {program.section(line)[0]} uses {name} of section {home[name]}"
            for name, line in program.reads if home.get(name, 0) > program.section(line)[0]]


def purity_faults(program: Program) -> list[str]:
    """A pure section does not await, and names no clock, randomness, file, socket, process or environment."""
    faults = []
    for node in ast.walk(program.tree):
        line, bad = getattr(node, "lineno", 0), None
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
            bad = "async"
        elif isinstance(node, ast.Name) and node.id in IMPURE | EFFECTS:
            bad = node.id
        elif isinstance(node, ast.Import):
            bad = next((alias.name for alias in node.names if alias.name.split(".")[0] in IMPURE), None)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPURE:
            bad = node.module
        if bad and program.is_pure(line):
            faults.append(f"line {line}: {bad} in the pure section {program.section(line)[0]}")
    return faults


def import_faults(program: Program) -> list[str]:
    """The module imports next to nothing; what one function needs is imported there (docs: the client's start)."""
    faults = []

    def visit(node: ast.AST) -> None:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        faults.extend(f"line {node.lineno}: {module} is imported with the module" for module in modules
                      if module not in MODULE_IMPORTS)
        if not isinstance(node, (*FUNCTIONS, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(program.tree)
    return faults


def size_faults(program: Program) -> list[str]:
    """The file, its functions, classes and lines stay short."""
    faults = [f"{len(program.lines)} lines in the file"] if len(program.lines) >= MAX_LINES else []
    faults += [f"line {line}: {len(text)} characters wide"
               for line, text in enumerate(program.lines, 1) if len(text) > MAX_WIDTH]
    for node in ast.walk(program.tree):
        limit = MAX_FUNCTION if isinstance(node, FUNCTIONS) else MAX_CLASS if isinstance(node, ast.ClassDef) else None
        if limit and node.end_lineno - node.lineno + 1 > limit:
            faults.append(f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    return faults


def public(body: list[ast.stmt]) -> list[ast.AST]:
    """The public functions and classes of a body, and of its public classes."""
    own = [node for node in body if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")]
    return own + [inner for node in own if isinstance(node, ast.ClassDef) for inner in public(node.body)]


def docstring_faults(program: Program) -> list[str]:
    """Every public function and class has a docstring, every function but ``__init__`` says what it returns."""
    faults = []
    for node in public(program.tree.body):
        if not ast.get_docstring(node):
            faults.append(f"line {node.lineno}: {node.name} has no docstring")
    return faults + [f"line {node.lineno}: {node.name} does not say what it returns" for node in ast.walk(program.tree)
                     if isinstance(node, FUNCTIONS) and node.returns is None and node.name != "__init__"]


def unknown_faults(program: Program) -> list[str]:
    """Every name that is read exists: in a scope, in the module or in Python; annotations may name typing's words."""
    known = {*bound_names(program.tree.body), *dir(builtins), "__file__", "__name__", "Callable", "Any", "Iterable",
             "Iterator", "Coroutine", "Awaitable"}
    return [f"line {line}: nobody defines {name}"
            for name, line in program.reads if name not in known]


def twice_faults(program: Program) -> list[str]:
    """A name of the module is defined once: a merge that takes a line from both sides is seen."""
    faults, seen = [], {}
    for node in program.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [name.id for target in targets for name in ast.walk(target)
                 if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
        for name in [node.name] if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else names:
            if seen.setdefault(name, node.lineno) != node.lineno:
                faults.append(f"line {node.lineno}: {name} is defined in line {seen[name]} already")
    return faults


CHECKS = [contents_faults, order_faults, banner_faults, reference_faults, purity_faults, import_faults, size_faults,
          docstring_faults, unknown_faults, twice_faults]


# The program


@pytest.fixture(scope="module")
def source() -> str:
    with open(claudomator.__file__, encoding="utf-8") as file:
        return file.read()


@pytest.fixture(scope="module")
def program(source) -> Program:
    return Program(source)


def test_the_program_compiles_and_has_its_sections(source, program):
    compile(source, "claudomator.py", "exec")
    assert len(program.sections) > 15
    assert any(title.endswith("(pure)") for _, _, title in program.sections)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_program_keeps_the_rule(program, check):
    assert check(program) == []


# The checks themselves

SOUND = '''"""A program.

Contents
    01 Facts (pure)
    02 Deeds
"""
from __future__ import annotations

import os


# ---- 01 Facts (pure) -------------------------------------------
# Theory --- with a dash, and x = 1 ---


LIMIT = 5


def double(number: int) -> int:
    """Twice the number."""
    import heapq
    later = [act for act in (number, LIMIT)]  # ``act`` is a local name here
    return heapq.heappop(later) and sum(map(lambda act: act * 2, later))


class Fact:
    """A fact."""

    act = 1

    def hold(self, act: int) -> Fact:
        """Itself."""
        def inner() -> int:
            return act
        return self if inner() else Fact()


# ---- 02 Deeds --------------------------------------------------


try:
    act = double(1)
except ValueError as error:
    act = None


async def deed() -> int:
    """Does it."""
    print(os.getpid(), act)
    return double(LIMIT)
'''


def faults_of(source: str) -> dict[str, list[str]]:
    return {check.__name__: faults for check in CHECKS if (faults := check(Program(source)))}


def test_a_sound_program_has_no_faults():
    assert faults_of(SOUND) == {}


FACT, DEED = "    import heapq\n", "    print(os.getpid(), act)\n"
BANNER_2 = "# ---- 02 Deeds --------------------------------------------------\n"
BREAKS = {
    "a section missing in Contents": ("contents_faults", "    02 Deeds\n", ""),
    "a section too many in Contents": ("contents_faults", "    02 Deeds\n", "    02 Deeds\n    03 More\n"),
    "another title in Contents": ("contents_faults", "    02 Deeds\n", "    02 Deed\n"),
    "another number in Contents": ("contents_faults", "    02 Deeds\n", "    03 Deeds\n"),
    "a number that does not ascend": ("order_faults contents_faults", "# ---- 02 Deeds -", "# ---- 01 Deeds -"),
    "a banner of equal signs": ("banner_faults", DEED, DEED + "    # ===== helpers =====\n"),
    "a banner with a short rule": ("banner_faults contents_faults purity_faults", BANNER_2, "# --- 02 Deeds ----\n"),
    "a banner without a number": ("banner_faults", DEED, DEED + "# ---- Helpers ----------\n"),
    "a name of a later section in a function": ("reference_faults", FACT, FACT + "    return deed\n"),
    "a later name in a method": ("reference_faults", "        return self if",
                                 "        self.x = act and deed\n        return self if"),
    "a later name in a lambda": ("reference_faults", "lambda act: act * 2", "lambda number: number * deed"),
    "a later name in a comprehension": ("reference_faults", "[act for act in (number, LIMIT)]",
                                        "[act for number in (1, 2)]"),
    "a later name in a nested function": ("reference_faults", "            return act\n", "            return deed\n"),
    "a later name as a default": ("reference_faults", "def double(number: int)", "def double(number: int = act)"),
    "a later name as an annotation": ("reference_faults", "def double(number: int) -> int",
                                      "def double(number: deed) -> int"),
    "a later name as a decorator": ("reference_faults", "class Fact:", "@deed\nclass Fact:"),
    "a later name as a base class": ("reference_faults", "class Fact:", "class Fact(deed):"),
    "a later name that only a try binds": ("reference_faults", "    return heapq.heappop(later)",
                                           "    return act(later)"),
    "a later name made global": ("reference_faults", FACT, FACT + "    global act\n    act = 1\n    return act\n"),
    "await": ("purity_faults", "def double(number: int)", "async def double(number: int)"),
    "the clock": ("purity_faults unknown_faults", FACT, FACT + "    time.time()\n"),
    "the environment": ("purity_faults", FACT, FACT + "    os.environ.get('HOME')\n"),
    "sys": ("purity_faults unknown_faults", FACT, FACT + "    sys.exit(1)\n"),
    "print": ("purity_faults", FACT, FACT + "    print(number)\n"),
    "open": ("purity_faults", FACT, FACT + "    open('x')\n"),
    "input": ("purity_faults", FACT, FACT + "    input()\n"),
    "an import of random": ("purity_faults", FACT, FACT + "    import random\n"),
    "an import of a submodule": ("purity_faults", FACT, FACT + "    import os.path as path\n"),
    "an import out of a module": ("purity_faults", FACT, FACT + "    from socket import create_connection\n"),
    "an import at the head of the pure section": ("purity_faults import_faults", "LIMIT = 5\n",
                                                  "LIMIT = 5\nimport random\n"),
    "a slow import with the module": ("import_faults", "import os\n", "import os\nimport json\n"),
    "a slow import in a try": ("import_faults", "    act = double(1)\n",
                               "    from re import match\n    act = double(1)\n"),
    "a slow import in a class body": ("import_faults", "    act = 1\n", "    act = 1\n    import json\n"),
    "a long function": ("size_faults", FACT, FACT + "    number += 1\n" * 60),
    "a long class": ("size_faults", "    act = 1\n", "    act = 1\n" * 300),
    "a wide line": ("size_faults", "LIMIT = 5\n", "LIMIT = 5  # " + "x" * 120 + "\n"),
    "a long file": ("size_faults", "LIMIT = 5\n", "LIMIT = 5\n" + "\n" * MAX_LINES),
    "a constant twice": ("twice_faults", "LIMIT = 5\n", "LIMIT = 5\nLIMIT = 5\n"),
    "a constant twice, once in a pair": ("twice_faults", "LIMIT = 5\n", "LIMIT = 5\nOTHER, LIMIT = 5, 6\n"),
    "a constant twice, once with its type": ("twice_faults", "LIMIT = 5\n", "LIMIT = 5\nLIMIT: int = 5\n"),
    "a function twice": ("twice_faults", BANNER_2, 'def double() -> int:\n    """A function."""\n\n\n' + BANNER_2),
    "a class twice": ("twice_faults", BANNER_2, 'class Fact:\n    """A class."""\n\n\n' + BANNER_2),
    "a pure section below": ("order_faults purity_faults", BANNER_2, BANNER_2 + "# ---- 03 X (pure) ---\n"),
    "a function without a docstring": ("docstring_faults", '    """Twice the number."""\n', ""),
    "a class without a docstring": ("docstring_faults", '    """A fact."""\n', ""),
    "a method without a docstring": ("docstring_faults", '        """Itself."""\n', ""),
    "a coroutine without a docstring": ("docstring_faults", '    """Does it."""\n', ""),
    "a function that does not say what it returns": ("docstring_faults", "def double(number: int) -> int:",
                                                     "def double(number):"),
    "a method that does not say what it returns": ("docstring_faults", "def hold(self, act: int) -> Fact:",
                                                   "def hold(self, act):"),
    "an inner function that does not say what it returns": ("docstring_faults", "def inner() -> int:", "def inner():"),
    "a private function that does not say what it returns": (
        "docstring_faults", BANNER_2, "def _helper(x):\n    return x\n\n\n" + BANNER_2),
    "a name that nobody defines": ("unknown_faults", DEED, DEED + "    prnt(1)\n"),
    "a class's name used bare in its method": ("unknown_faults", "        return self if",
                                               "        self.own\n        return held if"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_the_checker_sees(case):
    names, old, new = BREAKS[case]
    assert SOUND.count(old) == 1, "the example has changed"
    found = faults_of(SOUND.replace(old, new))
    assert found.keys() - {"contents_faults"} == set(names.split()) - {"contents_faults"}, found
    assert "contents_faults" in found or "contents_faults" not in names


def test_private_names_need_no_docstring_and_nobody_says_that_init_returns_none():
    private = ("def _helper(x) -> int:\n    return x\n\n\n"
               "class _Inner:\n    def __init__(self):\n        self.x = 1\n\n    def go(self) -> int:\n        return 1\n")
    assert faults_of(SOUND + "\n\n" + private) == {}


def test_a_fault_says_where_it_is():
    broken = SOUND.replace(FACT, FACT + "    print(number)\n")
    line = broken.splitlines().index("    print(number)") + 1
    assert faults_of(broken)["purity_faults"] == [f"line {line}: print in the pure section 1"]
