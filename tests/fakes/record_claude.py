"""Records what a real ``claude`` prints for each scenario of ``anthropic_api.py`` into tests/data/claude/.

    python3 -m tests.fakes.record_claude PATH_OF_CLAUDE [SCENARIO...]

A run of one character is kept as ``c...<5000000 chars>``, as in the other recordings; ``claude`` beside this file
undoes that.  Paths of this machine become /workspace.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid

from tests.fakes import anthropic_api

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "claude")
ANSWERS = {"question": ["The answer is: pg", "The answer is: 16"], "slow_tool": ["You were interrupted. Go on."]}
OPTIONS = {"budget": ["--max-budget-usd", "0.50"], "no_model": ["--model", "no-such-model"]}


def record(claude: str, version: str, name: str, url: str) -> None:
    with tempfile.TemporaryDirectory(prefix="record-") as root:
        cwd, home, session = f"{root}/work", f"{root}/home", str(uuid.uuid4())
        os.makedirs(home)
        subprocess.run(["git", "init", "-q", cwd], check=True)
        env = {"PATH": os.environ["PATH"], "HOME": home, "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "sk-ant-fake",
               "IS_SANDBOX": "1", "CLAUDE_CODE_MAX_RETRIES": "2", "CLAUDOMATOR_QUESTION_FILE": f"{root}/question.json",
               **{f"GIT_{who}": "x@example.org" for who in
                  ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")}}
        for number, prompt in enumerate([f"Do the task.\nSCENARIO: {name}", *ANSWERS.get(name, [])], 1):
            resume = number > 1 or name == "unknown_session"
            argv = ["-p", "--resume" if resume else "--session-id", session, "--output-format", "stream-json",
                    "--verbose", "--permission-mode", "bypassPermissions", *OPTIONS.get(name, ["--model", "sonnet"])]
            # files, as under the daemon: 2.1.197 truncates 5 MB on a pipe
            with open(f"{root}/stdout", "w") as stdout, open(f"{root}/stderr", "w") as stderr:
                process = subprocess.Popen([claude, *argv], cwd=cwd, env=env, text=True, stdin=subprocess.PIPE,
                                           stdout=stdout, stderr=stderr)
            process.stdin.write(prompt)
            process.stdin.close()
            if name in ("slow_tool", "escape", "gated") and number == 1:
                while not os.path.exists(f"{cwd}/tool-started"):
                    time.sleep(0.1)
                time.sleep(1)
                if name == "gated":
                    open(f"{cwd}/go", "w").close()
                else:
                    process.send_signal(signal.SIGTERM)
            exit_code = process.wait()
            with open(f"{root}/stdout") as stdout_file, open(f"{root}/stderr") as stderr_file:
                stdout, stderr = stdout_file.read(), stderr_file.read()
            stdout = stdout.replace(root, "/workspace")
            stdout = re.sub(r"(.)\1{999,}", lambda run: f"{run[1]}...<{len(run[0])} chars>", stdout)
            path = os.path.join(DATA, f"job_{version}_{name}_{number}")
            with open(path + ".jsonl", "w") as file:
                file.write(stdout)
            with open(path + ".meta.json", "w") as file:
                json.dump({"name": name, "version": version, "argv": ["claude", *argv], "cwd": "/workspace/work",
                           "exit_code": exit_code, "stderr_tail": stderr[-2000:]}, file, indent=1)
            print(path, exit_code, len(stdout), "bytes")


def main(claude: str, *names: str) -> None:
    version = subprocess.run([claude, "--version"], capture_output=True, text=True, check=True).stdout.split()[0]
    with anthropic_api.StandIn() as api:
        for name in names or (*anthropic_api.SCENARIOS, "no_model", "unknown_session"):
            record(os.path.abspath(claude), version, name, api.url)


if __name__ == "__main__":
    main(*sys.argv[1:])
