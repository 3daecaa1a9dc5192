"""The parts of docs/ that come from the program's own tables.

Each stands in a page between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.  ``python3 -m tests.docs_tables``
writes them; tests/test_docs.py fails where a page differs from the program.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import claudomator as c  # noqa: E402


def table(headers, rows):
    """A Markdown table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(headers) + " |", "| " + " | ".join("---" for _ in headers) + " |"]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def shown(value):
    """A default as a reader wants to see it."""
    if value in (None, "", (), {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(map(str, value))}`" if isinstance(value, tuple) else f"`{value}`"


def task_keys():
    return table(("key", "value", "default", "meaning"),
                 [(f"`{key.name}`" + (" (required)" if key.required else ""), c.kind_words(key.kind), shown(key.default),
                   key.help) for key in c.TASK_KEYS])


def config_keys():
    return table(("key", "value", "default", "meaning", "used"),
                 [(f"`{key.name}`", c.kind_words(key.kind), shown(key.default), key.help, "yes" if key.active else "not yet")
                  for key in c.CONFIG_KEYS])


def states_diagram():
    return "```mermaid\n" + c.states_diagram() + "\n```"


def states_table():
    return table(("from", "to", "by"), [(old, new, c.MOVE_LABELS[old, new]) for old, news in c.MOVES.items() for new in news])


def reasons():
    def retried(facts):
        return "by itself, not counted" if facts.get("free") else "up to `retry.max_attempts`" if facts.get("retry") else "no"
    return table(("reason", "tried again", "task ends as", "what to do"),
                 [(f"`{name}`", retried(facts), facts["state"], facts["next"]) for name, facts in c.REASONS.items()])


def operations():
    lines = []
    for operation in c.OPERATIONS.values():
        lines += [f"### `{operation.name}`", "", operation.help[0].upper() + operation.help[1:] + "."
                  + (" A stream." if operation.stream else ""), ""]
        if operation.params:
            lines += [table(("parameter", "value", "meaning"),
                            [(f"`{p.name}`" + (" (required)" if p.required else ""), c.PARAM_CHECKS[p.kind][0],
                              p.help + (f" (default `{c.format_json(p.default)}`)" if p.default not in (None, "") else ""))
                             for p in operation.params]), ""]
    return "\n".join(lines).rstrip()


def routes():
    lines = []
    for operation in c.OPERATIONS.values():
        for route in operation.routes:
            free = c.free_params(operation, route)
            where = "query" if route.method == "GET" else "body"
            rows = [(f"`{name}`" + (" (required)" if param.required else ""), where, c.PARAM_CHECKS[param.kind][0],
                     param.help + (f" (default `{c.format_json(param.default)}`)" if param.default not in (None, "") else ""))
                    for name, param in free.items()]
            if route.body:
                rows.insert(0, ("", "body", "JSON", {"tasks": "a task document, or an object with it as `tasks` and the"
                                                     " parameters below", "changes": "an object: keys of a task file with"
                                                     " their new values"}[route.body]))
            answer = {"json": f"`{c.format_json(operation.result)}`", "text": "`text/plain`: the log as it is",
                      "events": "`text/event-stream`", "socket": "a WebSocket ([live](live.md))"}[route.form]
            lines += [f"### `{route.method} {route.path}`", "",
                      f"`{operation.name}`: {operation.help}. Answer {route.status}: {answer}", ""]
            lines += [table(("parameter", "in", "value", "meaning"), rows), ""] if rows else []
    return "\n".join(lines).rstrip()


def shapes():
    def words(shape):
        return f"[{words(shape[0])}]" if isinstance(shape, list) else shape
    return table(("name", "fields"), [(f"`{name}`", ", ".join(f"`{field}` {words(shape)}" for field, shape in fields.items()))
                                      for name, fields in c.RESULT_SHAPES.items() if name != "Error"])


def callers():
    rows = []
    for operation in c.OPERATIONS.values():
        local = f" (control socket only: {operation.local})" if operation.local else ""
        rows.append((f"`{operation.name}`", operation.help, c.SCOPES[operation.scope] + local))
        rows += [(f"`{operation.name}` by `{route.method} {route.path}`", f"{operation.help} over a WebSocket",
                  f"{c.SCOPES[operation.scope]}; its Origin is checked too")
                 for route in operation.routes if route.form == "socket"]
    return table(("operation", "what it does", "who may call it"), rows)


def commands():
    return table(("command", "what it does"),
                 [(f"`claudomator {name} {command.usage}`".replace(" `", "`"), command.help)
                  for name, command in c.COMMANDS.items()])


def tools():
    def described(tool):
        keys = [f"`{key.name}`{' (required)' * key.required}: {key.help}" for key in tool.params]
        return f"{tool.description}<br>{'<br>'.join(keys)}"
    return table(("tool", "what the agent reads of it"), [(f"`{name}`", described(tool)) for name, tool in c.MCP_TOOLS.items()])


def exit_codes():
    return table(("code", "meaning"), c.EXIT_CODES)


def contents():
    return "\n".join(f"- {line}" for line in re.findall(r"^    (\d\d .+)$", c.__doc__, re.M))


BLOCKS = {
    "docs/task-files.md": {"task keys": task_keys},
    "docs/configuration.md": {"config keys": config_keys},
    "docs/states.md": {"diagram": states_diagram, "moves": states_table, "reasons": reasons},
    "docs/control-protocol.md": {"operations": operations},
    "docs/http-api.md": {"routes": routes, "shapes": shapes},
    "docs/security.md": {"callers": callers},
    "docs/cli.md": {"commands": commands, "exit codes": exit_codes},
    "docs/architecture.md": {"contents": contents},
    "docs/mcp.md": {"tools": tools},
}


def filled(page, blocks):
    """The page's text with each block replaced by what the program says now."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"{page} has no block {name!r}")
        body = make()
        text = pattern.sub(lambda match: match[1] + body + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    for page, blocks in BLOCKS.items():
        (ROOT / page).write_text(filled(page, blocks), encoding="utf-8")
        print(page)
