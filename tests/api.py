"""A daemon in a thread of the test's process, asked over the router of section 26."""
import asyncio
import json
import threading

import claudomator as c
from tests.support import shell_task, wait_until


class ApiDaemon:
    """A real daemon with real agents; ``ask`` is one request."""

    def __init__(self, home, config_text="", ends_agents=True):
        self.ends_agents = ends_agents
        self.data_dir = home / "data"
        self.config = c.parse_config_text(f'data_dir = "{self.data_dir}"\nserver_addr = ""\n{config_text}', "config.toml", str(home))
        self.log: list[str] = []
        self.daemon = c.Daemon(self.config, lambda: self.config, lambda level, text: self.log.append(text))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        self.run(self.daemon.start())
        self.core = self.daemon.core
        self.token = self.core.api_token
        self.client = c.ControlClient(self.config.socket_path)
        return self

    def __exit__(self, *error):
        self.client.close()
        ids = [run.id for run in self.here(self.core.store.running_executions)]
        self.run(self.daemon.close())
        while self.ends_agents and c.signal_marked(ids, 9):
            pass
        self.run(self._leave())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _leave(self):
        """What ``asyncio.run`` does at its end, so that no transport is left to the garbage collector."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # a transport closes its socket in a callback

    def run(self, coroutine, timeout_s=30):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def here(self, function, *args):
        """Call a function in the daemon's thread."""
        async def call():
            return function(*args)
        return self.run(call())

    def request(self, method, path, token="operator", body=None, headers=None):
        path, _, query = path.partition("?")
        pairs = [pair.partition("=")[::2] for pair in query.split("&") if pair]
        token = self.token if token == "operator" else token
        given = {"authorization": f"Bearer {token}"} if token else {}
        if body is not None and not isinstance(body, bytes):
            body, given["content-type"] = json.dumps(body).encode(), "application/json"
        return Request(method, path, pairs, {**given, **(headers or {})}, body or b"")

    def answer(self, *args, **more):
        """The ``HttpResponse`` or ``HttpStream``."""
        return self.run(c.handle_api(self.core, self.request(*args, **more)))

    def ask(self, *args, **more):
        """(status, document)."""
        answer = self.answer(*args, **more)
        if isinstance(answer, c.HttpStream):
            self.run(answer.chunks.aclose())
            return 200, {}
        is_json = answer.content_type == "application/json"
        return answer.status, json.loads(answer.body) if is_json else answer.body.decode()

    def events(self, answer, until, timeout_s=15):
        """The server-sent events of a stream up to one for which ``until`` holds: (id, event, data) each."""
        async def read():
            found, text = [], b""
            async for chunk in answer.chunks:
                text += chunk
                *whole, text = text.split(b"\n\n")
                for lines in (block.decode().split("\n") for block in whole):
                    fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
                    if "data" in fields:  # EventSource tells of no other
                        found.append((fields.get("id"), fields.get("event"), json.loads(fields["data"])))
                        if until(found[-1]):
                            await answer.chunks.aclose()
                            return found
            return found
        return self.run(read(), timeout_s)

    def add(self, script, queue=True, **more):
        return self.client.call("task.create", tasks=shell_task(script, **more), queue=queue)["tasks"][0]["id"]

    def wait(self, task_id):
        result = self.client.call("task.wait", ids=[task_id], timeout_s=20)
        assert not result["timed_out"], result
        return result["tasks"][0]

    def running(self, script="sleep 60", **more):
        """(task id, execution id, its agent's token) of a task that runs."""
        task_id = self.add(script, **more)
        run = wait_until(lambda: next((run for run in self.client.call("execution.list", id=task_id)["executions"]
                                       if run["status"] == "RUNNING"), None))
        return task_id, run["id"], c.agent_token(self.core.agent_key, run["id"])


class Request(c.Record):
    """What the router reads of a request."""

    method: str
    path: str
    query: list
    headers: dict
    body: bytes
    minor: int = 1
