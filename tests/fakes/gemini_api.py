"""A stand-in for the Gemini API (generativelanguage v1beta) on loopback, for tests with the real ``gemini`` CLI.

What the "model" does is chosen by a line ``SCENARIO: name`` in the conversation's prompts; an answer depends on how
many prompts the conversation has had (``prompt``, from 1) and on how many answers were given since the last one (``step``,
from 0), so that a resumed session goes on.  The commands are those of the replaying fake beside this file.
``python3 -m tests.fakes.gemini_api`` prints its URL and serves, for tries by hand.
"""
import json
import re
import uuid

from tests.fakes import stand_in

USAGE = {"promptTokenCount": 1000, "candidatesTokenCount": 50, "totalTokenCount": 1060, "thoughtsTokenCount": 10,
         "cachedContentTokenCount": 200}
ASK = """printf '%s' '{"text": "TEXT", "options": ["pg", "sqlite"]}' > "$CLAUDOMATOR_QUESTION_FILE\""""
COMMIT = "echo NAME > NAME.txt && git add NAME.txt && git commit -q -m 'feat: NAME'"
WRITE = 'echo made by the agent > made.txt; echo The file is there. > "$CLAUDOMATOR_SUMMARY_FILE"'
SLOW = "touch tool-started; python3 -c 'import time; time.sleep(120)' & python3 -c 'import time; time.sleep(121)'"
DAILY = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "You exceeded your current quota.", "details": [
    {"@type": "type.googleapis.com/google.rpc.QuotaFailure",
     "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}]}}


def text(words: str) -> list:
    return [{"text": words}]


def shell(command: str) -> list:
    args = {"command": command, "description": "work"}
    return [{"functionCall": {"name": "run_shell_command", "args": args, "id": uuid.uuid4().hex[:12]}}]


def question(prompt: int, step: int) -> list:
    """Commits, asks; asks again; commits and reports."""
    if step:
        return text("I asked." if prompt < 3 else "All is decided.\n\n## Summary\nThe database is set up.")
    name, words = {1: ("a", "Which database?"), 2: ("b", "Which version?")}.get(prompt, ("c", ""))
    return shell(COMMIT.replace("NAME", name) + (" && " + ASK.replace("TEXT", words) if words else ""))


SCENARIOS = {
    "text": lambda prompt, step: text("Hello from the ") + text("fake Gemini."),
    "write": lambda prompt, step: text("Written.") if step else shell(WRITE),
    "question": question,
    "slow_tool": lambda prompt, step: text("Done.") if step or prompt > 1 else shell(SLOW),
    "forbidden": lambda prompt, step: text("It is forbidden.") if step else shell("touch forbidden.txt"),
    "daily": lambda prompt, step: DAILY if step else shell("echo did work"),
}


def place_of(contents: list) -> tuple[str, int, int]:
    """(scenario, prompt, step) of a conversation; the CLI's own words stand in front of the first prompt."""
    scenario, prompt, step = "text", 0, 0
    for content in contents:
        parts = content.get("parts", [])
        words = "\n".join(part.get("text", "") for part in parts)
        if content.get("role") == "model":
            step += 1
        elif not any("functionResponse" in part for part in parts):
            prompt, step = prompt + 1, 0
        scenario = ([scenario] + re.findall(r"^SCENARIO: (\S+)", words, re.MULTILINE))[-1]
    return scenario, max(prompt, 1), step


class Handler(stand_in.Handler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        path = self.path.partition("?")[0]
        if path.endswith(":countTokens"):
            return self._json(200, {"totalTokens": 100})
        if not path.endswith(":streamGenerateContent"):  # the CLI's own side questions
            return self._json(200, self._chunk(text('{"ok": true}'), "STOP"))
        scenario, prompt, step = place_of(request.get("contents", []))
        self.server.seen.append({"scenario": scenario, "prompt": prompt, "step": step})
        parts = SCENARIOS.get(scenario, SCENARIOS["text"])(prompt, step)
        if isinstance(parts, dict):
            return self._json(parts["error"]["code"], parts)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for chunk in [*(self._chunk([part], None) for part in parts), self._chunk([], "STOP")]:
                self.wfile.write(f"data: {json.dumps(chunk)}\r\n\r\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the CLI was killed

    def _chunk(self, parts: list, finish: str | None) -> dict:
        candidate = {"content": {"parts": parts, "role": "model"}, "index": 0}
        candidate.update({"finishReason": finish} if finish else {})
        return {"candidates": [candidate], "modelVersion": "gemini-2.5-flash", "usageMetadata": USAGE}


class StandIn(stand_in.StandIn):
    """The server in a thread; ``seen`` lists what the CLI asked.  A context manager."""

    handler = Handler


if __name__ == "__main__":
    stand_in.serve(StandIn)
