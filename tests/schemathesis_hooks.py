"""Hooks of ``tests.run_schemathesis``: what a request may not do to the campaign, and a check of our own."""
import re

import schemathesis

POLL_S = 0.2
# Nothing in a schema can say these: a request of the right form is refused for what it means to this daemon now.
MEANT = re.compile(
    "depends_on: (a dependency cycle|there is no task|.* is not unique)|depends_on\\[.*(is named twice|tasks are named)|parent_task_id"
    "|isolation: .* needs |cannot stand beside|cannot use repository_url|there is no project|is not available here|no tools for a"
    "|no checker yet|a time to come|Idempotency-Key|idempotency_key")


def _leave_stream(response, *args, **kwargs):
    """A stream has no end: of its answer only the head is taken."""
    if response.headers.get("Content-Type") == "text/event-stream":
        response._content = b""
        response.close()
    return response


@schemathesis.hook
def before_call(context, case, kwargs):
    kwargs["hooks"] = {"response": _leave_stream}
    if case.path.endswith("/wait"):
        try:
            is_long = float((case.query or {}).get("timeout_s", 60)) > POLL_S
        except (TypeError, ValueError):
            is_long = False  # a wrong one, which is to be refused
        if is_long:
            case.query = {**(case.query or {}), "timeout_s": POLL_S}


@schemathesis.check
def refused_for_its_meaning(context, response, case):
    """A request as the document wants it may be refused with 422 for what no schema can say, and for nothing else."""
    mode = case.meta.generation.mode if case.meta else None
    if response.status_code == 422 and mode == schemathesis.GenerationMode.POSITIVE:
        error = response.json()["error"]
        for words in error.get("problems") or [error["message"]]:
            assert MEANT.search(words), f"a request of the right form was refused: {words}"
