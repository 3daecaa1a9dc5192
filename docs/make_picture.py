"""Write docs/status.svg: the status table of a real daemon at work, as the terminal shows it.

    python3 docs/make_picture.py

It starts a daemon on a scratch data directory, gives it a few shell tasks, waits until they are in the states that the
picture shall show, and turns what ``claudomator ctl --color always`` prints into an SVG.
"""
import html
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLORS = {"30": "#6b7280", "31": "#f87171", "32": "#4ade80", "33": "#facc15", "34": "#60a5fa", "35": "#c084fc", "36": "#22d3ee",
          "37": "#e5e7eb", "90": "#9ca3af"}
COLUMNS, LINE_PX, CHARACTER_PX = 108, 19, 8.43

QUESTION = """printf '{"text": "Which database?", "options": ["pg", "sqlite"]}' > "$CLAUDOMATOR_QUESTION_FILE\""""


def task(name: str, script: str, **more) -> dict:
    """A task document for the shell agent."""
    return {"name": name, "agent": {"type": "shell", "instructions": script}, **more}


TASKS = {"tasks": [
    task("Fix the flaky login test", "sleep 60", priority="high"), task("Upgrade the HTTP client", "sleep 60"),
    task("Choose a database", QUESTION), task("Describe the API", "echo ok"),
    task("Port to Python 3.13", "echo 'no module named imp' >&2; exit 3"),
    task("Release notes", "true", depends_on=["Upgrade the HTTP client"]), task("Nightly clean-up", "true", start_at="3h")]}


def to_svg(text: str) -> str:
    """ANSI text as an SVG picture of a terminal."""
    lines = text.rstrip("\n").split("\n")
    width, height = COLUMNS * CHARACTER_PX + 32, len(lines) * LINE_PX + 40
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="ui-monospace, Menlo, Consolas,'
           ' DejaVu Sans Mono, monospace" font-size="14">', f'<rect width="100%" height="100%" rx="8" fill="#111827"/>']
    for number, line in enumerate(lines):
        spans, style = [], ""
        for piece in re.split(r"(\x1b\[[0-9;]*m)", line):
            if piece.startswith("\x1b"):
                codes = piece[2:-1].split(";")
                color = next((COLORS[code] for code in codes if code in COLORS), None)
                style = "" if codes in ([""], ["0"]) else (f' fill="{color}"' if color else "") \
                    + (' opacity="0.6"' if "2" in codes else "") + (' font-weight="bold"' if "1" in codes else "")
            elif piece:
                spans.append(f"<tspan{style}>{html.escape(piece)}</tspan>")
        out.append(f'<text x="16" y="{number * LINE_PX + 32}" fill="#e5e7eb" xml:space="preserve">{"".join(spans)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    """Run a daemon, fill it, take the picture."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, str(ROOT / "claudomator.py"), "--data-dir", f"{root}/data"]
        env = {**os.environ, "HOME": root, "COLUMNS": str(COLUMNS)}
        daemon = subprocess.Popen([*command, "serve"], env=env, stderr=subprocess.DEVNULL)
        try:
            while subprocess.run([*command, "ctl", "--json"], env=env, capture_output=True).returncode:
                time.sleep(0.1)
            subprocess.run([*command, "ctl", "submit", "-"], env=env, input=json.dumps(TASKS), text=True, check=True, stdout=subprocess.DEVNULL)
            time.sleep(4)
            shown = subprocess.run([*command, "ctl", "--color", "always"], env=env, capture_output=True, text=True, check=True)
            subprocess.run([*command, "ctl", "cancel", "--all", "--state", "RUNNING"], env=env, capture_output=True)
        finally:
            daemon.terminate()
            daemon.wait()
    (ROOT / "docs" / "status.svg").write_text(to_svg(shown.stdout), encoding="utf-8")


if __name__ == "__main__":
    main()
