"""A stand-in for the Anthropic Messages API on loopback, for tests with the real ``claude`` CLI.

What the "model" does is chosen by a line ``SCENARIO: name`` in a conversation's first prompt; a model named
``no-such-model`` does not exist.  An answer depends on how many prompts the conversation has had (``prompt``, from 1)
and on how many answers were given since the last one (``step``, from 0), so that a resumed session goes on.
``python3 -m tests.fakes.anthropic_api`` prints its URL and serves, for tries by hand.
"""
import json
import os
import sys
import uuid

from tests.fakes import stand_in

BIG = 5_000_000
NOTHING = {"input_tokens": 0, "output_tokens": 0}
ORDINARY = {"input_tokens": 1000, "output_tokens": 50}
EXPENSIVE = {"input_tokens": 100_000, "output_tokens": 20_000}
ASK = """printf '%s' '{"text": "TEXT", "options": ["pg", "sqlite"]}' > "$CLAUDOMATOR_QUESTION_FILE\""""
COMMIT = "echo NAME > NAME.txt && git add NAME.txt && git commit -q -m 'feat: NAME'"
GATED_TOOL = "touch tool-started; until [ -e go ]; do sleep 0.1; done; rm go tool-started; " \
    + COMMIT.replace("NAME", "late")
SLOW_TOOL = "touch tool-started; python3 -c 'import time; time.sleep(120)' & python3 -c 'import time; time.sleep(121)'"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def bash(command: str) -> dict:
    return {"type": "tool_use", "id": "toolu_" + uuid.uuid4().hex[:24], "name": "Bash",
            "input": {"command": command, "description": "work"}}


def mcp(tool: str, **given) -> dict:
    """A call of one of Claudomator's tools."""
    return {"type": "tool_use", "id": "toolu_" + uuid.uuid4().hex[:24], "name": f"mcp__claudomator__{tool}", "input": given}


def say(*blocks: dict, usage: dict = ORDINARY) -> dict:
    return {"blocks": blocks, "usage": usage}


def refuse(status: int, kind: str, message: str) -> dict:
    return {"status": status, "error": {"type": kind, "message": message}}


def question(prompt: int, step: int) -> dict:
    """Commits, asks; asks again; commits and reports."""
    words = {1: ("Which database?", "first"), 2: ("Which version?", "second")}.get(prompt)
    if step:
        return say(text("I asked." if words else "All is decided.\n\n## Summary\nThe database is set up."))
    if words:
        command = COMMIT.replace("NAME", words[1]) + " && " + ASK.replace("TEXT", words[0])
        return say(text("I need a decision."), bash(command))
    return say(bash(COMMIT.replace("NAME", "third")))


SCENARIOS = {
    "text": lambda prompt, step: say(text("I looked.\n\n## Summary\nNothing had to change.")),
    "write": lambda prompt, step: say(text("Written.\n\n## Summary\nThe file is there.")) if step else
    say(text("I write a file."), bash("echo made by the agent > made.txt")),
    "question": question,
    "budget": lambda prompt, step: say(text(f"turn {step}"), bash(f"echo turn {step}"), usage=EXPENSIVE),
    "error_500": lambda prompt, step: refuse(500, "api_error", "Internal server error"),
    "error_401": lambda prompt, step: refuse(401, "authentication_error", "invalid x-api-key"),
    "limit_429": lambda prompt, step: refuse(429, "rate_limit_error", "This request would exceed your rate limit."),
    "big_line": lambda prompt, step: say(text("Very long.\n\n## Summary\n" + "z" * BIG)),
    "slow_tool": lambda prompt, step: say(text("It ended.")) if step or prompt > 1 else
    say(text("This takes long."), bash(SLOW_TOOL)),
    # works until somebody makes the file ``go``, then commits and ends
    "gated": lambda prompt, step: say(text("Ready.\n\n## Summary\nIt took its time.")) if step else
    say(text("This takes a while."), bash(GATED_TOOL)),
    # a child that escapes every process group, and an agent that goes on working
    "escape": lambda prompt, step: say(bash(SLOW_TOOL)) if step else
    say(bash("setsid nohup python3 -c 'import time; time.sleep(122)' >/dev/null 2>&1 & echo started")),
}

SUBTASK = {"name": "Fix tests", "instructions": "Run the tests and fix what fails."}
MCP_SCENARIOS = {  # of a claude that has Claudomator's MCP server; the fake CLI has none, and replays none of these
    "mcp_subtask": lambda prompt, step: (
        say(mcp("create_subtask", **SUBTASK)),
        say(mcp("report_summary", summary="A subtask fixes the tests."), mcp("get_task")),
        say(text("It is on its way.")))[step],
    "mcp_ask": lambda prompt, step: say(text("That was it.")) if step else say(
        mcp("ask_operator", question="Which database", options=["pg", "sqlite"]) if prompt == 1 else
        mcp("report_summary", summary="It is decided.")),
}


def words_of(message: dict) -> str:
    """The text of a message without what the CLI itself adds."""
    content = message.get("content")
    blocks = [content] if isinstance(content, str) else [b.get("text", "") for b in content if b.get("type") == "text"]
    return "\n".join(block for block in blocks if not block.lstrip().startswith("<system-reminder>")).strip()


def is_tool_result(message: dict) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(block.get("type") == "tool_result" for block in content)


def results_of(message: dict) -> list:
    """What the tools of a message gave: the text that the model reads, and whether it is an error."""
    content = message.get("content")
    found = [block for block in content if block.get("type") == "tool_result"] if isinstance(content, list) else []
    return [(block["content"] if isinstance(block["content"], str) else "".join(
        part.get("text", "") for part in block["content"]), bool(block.get("is_error"))) for block in found]


def place_of(messages: list) -> tuple[str, int, int, str]:
    """(scenario, prompt, step, the last prompt's text) of a conversation."""
    scenario, prompt, step, last = "text", 0, 0, ""
    for message in messages:
        if message["role"] == "assistant":
            step += 1
        elif message["role"] == "user" and not is_tool_result(message) and (words := words_of(message)):
            prompt, step, last = prompt + 1, 0, words
            for line in words.split("\n"):
                if line.startswith("SCENARIO: "):
                    scenario = line.removeprefix("SCENARIO: ").strip()
    return scenario, prompt, step, last


class Handler(stand_in.Handler):
    def do_HEAD(self) -> None:
        self._json(200, {})

    def do_GET(self) -> None:
        self._json(200, {"data": [], "has_more": False})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if not self.path.startswith("/v1/messages") or "count_tokens" in self.path:
            return self._json(200, {"input_tokens": 100})
        answer = self._decide(request)
        if "status" in answer:
            return self._json(answer["status"], {"type": "error", "error": answer["error"]})
        message = {"id": "msg_" + uuid.uuid4().hex[:24], "type": "message", "role": "assistant",
                   "model": request["model"], "stop_sequence": None}
        usage = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, **answer["usage"]}
        stop = "tool_use" if any(block["type"] == "tool_use" for block in answer["blocks"]) else "end_turn"
        if not request.get("stream"):
            return self._json(200, {**message, "content": answer["blocks"], "stop_reason": stop, "usage": usage})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._stream(message, answer["blocks"], stop, usage)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the CLI was killed

    def _decide(self, request: dict) -> dict:
        scenario, prompt, step, last = place_of(request.get("messages", []))
        if not request.get("tools"):
            return say(text("A title"), usage=NOTHING)  # the CLI's own side questions (2.1.197)
        self.server.seen.append({"scenario": scenario, "prompt": prompt, "step": step, "last": last,
                                 "model": request["model"], "system": json.dumps(request.get("system", "")),
                                 "tools": [tool["name"] for tool in request["tools"]],
                                 "results": results_of(request["messages"][-1])})
        if request["model"] == "no-such-model":
            return refuse(404, "not_found_error", "model: no-such-model")
        return {**SCENARIOS, **MCP_SCENARIOS}.get(scenario, SCENARIOS["text"])(prompt, step)

    def _event(self, name: str, **fields) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode())

    def _stream(self, message: dict, blocks, stop: str, usage: dict) -> None:
        self._event("message_start", message={**message, "content": [], "stop_reason": None,
                                              "usage": {**usage, "output_tokens": 1}})
        for index, block in enumerate(blocks):
            is_text = block["type"] == "text"
            empty = {**block, "text": ""} if is_text else {**block, "input": {}}
            self._event("content_block_start", index=index, content_block=empty)
            whole = block["text"] if is_text else json.dumps(block["input"])
            for begin in range(0, len(whole), 65536):
                piece = whole[begin:begin + 65536]
                self._event("content_block_delta", index=index, delta={"type": "text_delta", "text": piece} if is_text
                            else {"type": "input_json_delta", "partial_json": piece})
            self._event("content_block_stop", index=index)
        self._event("message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage=usage)
        self._event("message_stop")


class StandIn(stand_in.StandIn):
    """The server in a thread; ``seen`` lists what the CLI asked.  A context manager."""

    handler = Handler


if __name__ == "__main__":
    stand_in.serve(StandIn)
