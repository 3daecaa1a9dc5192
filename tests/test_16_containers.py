"""Section 16, containers: the engine's command line, the script inside, and whose word an exit code is."""
import random
import shlex
import subprocess

import claudomator as c
import pytest

ID = "00000000-0000-4000-8000-000000000001"


def config(**more):
    return c.parse_config({"data_dir": "/data", **more}, "test", "/home/me")


def run_argv(mounts=(), **more):
    settings = {name: more.pop(name) for name in ("containers", "container_engine") if name in more}
    facts = dict(name="claudomator-x", execution_id=ID, user="1000:1000", mounts=mounts, cpus=8, command=("/run/x",))
    return c.container_argv(config(**settings), "img:1", **{**facts, **more})


def test_the_whole_command_line_of_docker():
    argv = run_argv((("/a", "/workspace", False), ("/b", "/login", True)), workdir="/workspace/sub", is_kept=True)
    assert shlex.join(argv) == (
        f"docker run --name claudomator-x --label claudomator.execution={ID} --label claudomator.data=/data"
        f" --env CLAUDOMATOR_EXECUTION_ID={ID} --env HOME=/home/agent --init --pull never --log-driver none"
        " --user 1000:1000 --cap-drop ALL --security-opt no-new-privileges --memory 4g --cpus 2 --pids-limit 2048"
        " --mount type=bind,source=/a,target=/workspace --mount type=bind,source=/b,target=/login,readonly"
        " --workdir /workspace/sub --entrypoint /bin/sh img:1 /run/x")


def difference(left, right):
    """What the second command line has more, in order."""
    left, more = list(left), []
    for word in right:
        if left and left[0] == word:
            left.pop(0)
        else:
            more.append(word)
    assert not left, left
    return more


def test_podman_differs_in_the_user_name_space_the_labels_of_selinux_and_who_waits():
    podman = run_argv(container_engine="podman", is_kept=True)
    assert podman[0] == "podman"
    assert difference(run_argv(is_kept=True)[1:], podman[1:]) == [
        "--detach", "--security-opt", "label=disable", "--stop-timeout", "0", "--userns", "keep-id"]
    root = run_argv(container_engine="podman", user="0:0")
    assert "keep-id" not in root and "label=disable" in root and "--detach" not in root


def test_a_short_container_removes_itself_and_one_with_a_status_does_not():
    assert difference(run_argv(is_kept=True), run_argv()) == ["--rm"]


def test_limits_of_zero_are_none_and_more_processors_than_there_are_are_not_asked_for():
    none = run_argv(containers={"memory": "", "cpus": 0, "pids": 0})
    assert not {"--memory", "--cpus", "--pids-limit", "--network"} & set(none)
    words = run_argv(containers={"cpus": 2.5, "network": "agents"}, cpus=1)
    assert words[words.index("--cpus") + 1] == "1" and words[words.index("--network") + 1] == "agents"
    words = run_argv(containers={"network": "agents"}, network="none", capabilities=("CHOWN",))
    assert words[words.index("--network") + 1] == "none" and words[words.index("--cap-add") + 1] == "CHOWN"
    assert run_argv(containers={"cpus": 0.5})[run_argv().index("--cpus") + 1] == "0.5"


def test_a_path_with_commas_and_quotes_stays_one_mount():
    import csv
    path = '/a,readonly=x,"b" c'
    words = run_argv(((path, "/workspace", True),))
    value = words[words.index("--mount") + 1]
    assert next(csv.reader([value])) == ["type=bind", f"source={path}", "target=/workspace", "readonly"]


def test_the_script_sets_the_environment_takes_the_login_and_becomes_the_agent(tmp_path):
    """The script itself is run, with other places and the time limit looked at."""
    values = {"A": "it's $HOME `id`\n\\x", "B_1": "", "bad-name": "x", "BASH_FUNC_x%%": "() { :; }"}
    launch = c.Launch(("sh", "-c", 'printf "%s|%s|%s|" "$A" "${B_1-unset}" "$1"; cat; pwd; echo e >&2; exit 3', "sh",
                       "a 'b' $c"), values, "", "text")
    script = c.entry_script(launch, "/workspace/my dir", "/run/claudomator/prompt.txt", 2.5, 1.0)
    assert "exec timeout -k 1 2.500 sh -c " in script and "bad-name" not in script and "BASH_FUNC" not in script
    places = {"/run/claudomator-login": tmp_path / "login", "/run/claudomator": tmp_path / "files",
              "/workspace": tmp_path / "work", "/home/agent": tmp_path / "home"}
    for inside, outside in places.items():
        outside.mkdir()
        script = script.replace(inside, str(outside))
    (tmp_path / "work" / "my dir").mkdir()
    (tmp_path / "login" / ".claude").mkdir()
    (tmp_path / "login" / ".claude" / "token").write_text("t")
    (tmp_path / "files" / "prompt.txt").write_text("prompt\n")
    (tmp_path / "files" / "run").write_text(script)
    done = subprocess.run(["sh", tmp_path / "files" / "run"], stdin=subprocess.DEVNULL, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")
    assert (tmp_path / "files" / "stdout.log").read_text() == (
        f"it's $HOME `id`\n\\x||a 'b' $c|prompt\n{tmp_path}/work/my dir\n")
    assert (tmp_path / "files" / "stderr.log").read_text() == "e\n" and not (tmp_path / "files" / "run").exists()
    copied = tmp_path / "home" / ".claude" / "token"
    assert copied.read_text() == "t" and copied.stat().st_mode & 0o77 == 0


def test_any_value_survives_the_script():
    rng = random.Random(7)
    for _ in range(30):
        value = "".join(rng.choice("a'\"\\$`\n\t;&|(){}[]<>!*?~# =\u00e9\u2028") for _ in range(rng.randrange(30)))
        launch = c.Launch(("printf", "%s", value), {"V": value}, "", "text")
        script = c.entry_script(launch, "/", "/dev/null", 0, 5).split("\n")
        assert "\n".join(script[1:]).startswith(f"export V={shlex.quote(value)}\n")
        words = shlex.split("\n".join(script)[script and "\n".join(script).index("exec timeout"):])
        assert words[:8] == ["exec", "timeout", "-k", "5", "0.000", "printf", "%s", value]


@pytest.mark.parametrize("code, state, said, whose", [
    (0, {"Status": "exited", "ExitCode": 0}, "", "agent"),
    (125, {"Status": "exited", "ExitCode": 125, "Error": ""}, "", "agent"),  # the agent's own 125
    (127, {"Status": "exited", "ExitCode": 127}, "", "agent"),
    (127, {"Status": "created", "ExitCode": 127, "Error": "OCI runtime create failed"}, "", "engine"),
    (126, {"Status": "exited", "ExitCode": 126, "Error": "permission denied"}, "", "engine"),
    (125, {"Status": "missing"}, "docker: invalid reference format", "engine"),
    (125, None, "Cannot connect", "engine"), (126, None, "", "engine"), (127, {"Status": "missing"}, "", "engine"),
    (137, {"Status": "missing"}, "", "agent"), (3, None, "", "agent"), (0, None, "", "agent"),
    (143, None, "", "lost"), (137, None, "", "lost"), (128, None, "", "agent"),  # it was stopped with the engine
    (125, None, "error waiting for container: unexpected EOF", "lost"),
    (125, {"Status": "exited", "ExitCode": 0}, "error waiting for container: unexpected EOF", "lost"),
    (137, {"Status": "running", "ExitCode": 0}, "", "lost"),  # only the client was killed
    (137, {"Status": "exited", "ExitCode": 143}, "", "lost"),
    (3, {"Status": "stopped", "ExitCode": 3, "Error": ""}, "", "agent"),  # podman has not cleaned up yet
    (127, {"Status": "created", "ExitCode": 0, "Error": ""}, "Error: runc: exec: no such file", "engine"),  # podman's
    (125, {"Status": "dead", "ExitCode": 0}, "no such exit code", "lost"),
    (None, {"Status": "exited", "ExitCode": 0}, "", "lost"), (None, None, "", "lost")])
def test_whose_word_an_exit_code_is(code, state, said, whose):
    assert c.container_end(code, state, said) == whose


@pytest.mark.parametrize("said, reason, words", [
    ("Error: No such image: img:1\n", "spawn_failed", "run `claudomator image build`, or set claude_image"),
    ("Error response from daemon: No such image: img:1", "spawn_failed", "image build"),
    ("Error: img:1: image not known", "spawn_failed", "image build"),
    ("Unable to find image 'img:1' locally", "spawn_failed", "image build"),
    ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", "sandbox_failed", "start docker"),
    ("error during connect: dial tcp: connection refused", "sandbox_failed", "start docker"),
    ('error during connect: Get "http://h:1/v1.50/x": dial tcp: lookup h: no such host', "sandbox_failed", "set DOCKER_HOST"),
    ("failed to connect to the docker API at unix:///x; check if the path is correct", "sandbox_failed", "start docker"),
    ("permission denied while trying to connect to the Docker daemon socket at unix:///x: dial unix /x: connect: permission"
     " denied", "spawn_failed", "make it a member of the group docker"),
    ("cannot run docker: [Errno 2] No such file", "spawn_failed", "install docker, put it on the daemon's PATH, or set container_e"),
    ("docker: invalid argument \"lots\" for \"-m\"\n\nUsage:  docker run [OPTIONS]\n\nRun 'docker run --help' for more", "spawn_failed",
     'docker refuses: docker: invalid argument "lots" for "-m"; correct [containers] or claude_image in the configuration'),
    ("Error: unable to connect to Podman socket", "sandbox_failed", "does not answer"),
    ("docker: Error response from daemon: range of CPUs\n is from 0.01", "spawn_failed", "range of CPUs is from 0.01"),
    ("", "spawn_failed", "it says nothing")])
def test_what_an_engine_says_becomes_a_reason_and_a_way_out(said, reason, words):
    found, text = c.engine_fault("docker", said, "img:1", "claude_image")
    assert (found, words in text) == (reason, True), text
    assert c.REASONS[found].get("retry", False) is (reason == "sandbox_failed")


@pytest.mark.parametrize("said, reason, words", [
    ("Error: inspecting object: img:1: image not known", "spawn_failed", "run `claudomator image build`, or set claude_image"),
    ("Error: inspecting object: repository name must have at least one component", "spawn_failed", "claudomator image build"),
    ("Error: img:1: image not known", "spawn_failed", "claudomator image build"),
    ("Cannot connect to Podman. Please verify your connection\nError: unable to connect to Podman socket: Get \"http://d/v4.3.1/libpod"
     "/_ping\": dial unix /x.sock: connect: no such file or directory", "sandbox_failed", "start podman, or set CONTAINER_HOST"),
    ("Error: unable to connect to Podman socket: Get \"http://d/v4.3.1/libpod/_ping\": dial unix /x.sock: connect: permission denied",
     "spawn_failed", "may not use the socket of CONTAINER_HOST"),
    ("Error: container-init binary not found on the host: stat /usr/libexec/podman/catatonit: no such file or directory",
     "spawn_failed", "install catatonit"),
    ("Error: invalid value for memory: invalid size: 'lots'", "spawn_failed", "'lots'; correct [containers] or claude_image"),
    ("Error: unable to find network with name or ID agents: network not found", "spawn_failed", "correct [containers]")])
def test_what_podman_4_says_becomes_a_reason_and_a_way_out(said, reason, words):
    found, text = c.engine_fault("podman", said, "img:1", "claude_image")
    assert (found, words in text) == (reason, True), text


@pytest.mark.parametrize("state, alive, status", [
    ({"Status": "running", "Pid": 5, "ConmonPid": 4}, (4, 5), "running"),
    ({"Status": "running", "Pid": 5, "ConmonPid": 4}, (5,), "dead"),  # nobody will write down how it ends
    ({"Status": "running", "Pid": 5, "ConmonPid": 4}, (4,), "dead"),
    ({"Status": "running", "Pid": 5}, (), "running"),  # docker's own daemon knows
    ({"Status": "exited", "Pid": 0, "ConmonPid": 4}, (), "exited")])
def test_a_container_whose_conmon_was_killed_is_not_waited_for(state, alive, status):
    assert c.known_dead(state, lambda pid: 1 if pid in alive else None) == {**state, "Status": status}


@pytest.mark.parametrize("engine, state, code, note", [
    ("docker", {"OOMKilled": True}, 1, c.OUT_OF_MEMORY), ("docker", {"OOMKilled": False}, 137, ""),
    ("podman", {"OOMKilled": True}, 137, c.OUT_OF_MEMORY), ("podman", {"OOMKilled": False}, 137, c.PERHAPS_MEMORY),
    ("podman", {"OOMKilled": False}, 1, ""), ("podman", {"OOMKilled": True}, 0, ""), ("podman", None, 137, "")])
def test_memory_is_named_where_it_ran_out_or_may_have(engine, state, code, note):
    assert c.memory_note(engine, state, code) == note


def test_without_an_image_an_engine_is_not_said_to_lack_one():
    assert c.engine_fault("docker", "Error: No such image: ", "", "claude_image")[1].startswith("the container image '' is not there: run")
    assert c.engine_fault("podman", "Error: no such image\n") == ("spawn_failed", "podman refuses: Error: no such image")


def test_the_default_image_installs_the_clis_and_another_base_nothing():
    text = c.dockerfile(c.DEFAULT_BASE, 1000, 1001, has_ct=True)
    assert text.startswith(f"FROM {c.DEFAULT_BASE}\n") and "npm install -g @anthropic-ai/claude-code" in text
    assert "agent:x:1000:1001::/home/agent:/bin/sh" in text and "COPY ct.py /usr/local/bin/ct\n" in text
    own = c.dockerfile("mine:1", 0, 0, has_ct=False)
    assert own.startswith("FROM mine:1\n") and "apt-get" not in own and "npm" not in own and "ct.py" not in own
    assert "<<" not in text and "--mount" not in text, "the classic builder does not know this"


def test_what_means_something_only_on_the_host_does_not_go_inside():
    host = {"PATH": "/p", "HOME": "/home/me", "SSH_AUTH_SOCK": "/s", "LANG": "C", "HTTPS_PROXY": "http://p",
            "ANTHROPIC_API_KEY": "k", "SSL_CERT_FILE": "/c", "GEMINI_CLI_HOME": "/g", "GOOGLE_APPLICATION_CREDENTIALS": "/g"}
    kept = c.boxed_host(host, c.AgentSettings(kind="claude"))
    assert kept == {"LANG": "C", "HTTPS_PROXY": "http://p", "ANTHROPIC_API_KEY": "k"}
    assert c.boxed_host(host, c.AgentSettings(kind="claude", pass_env=("SSL_CERT_FILE",)))["SSL_CERT_FILE"] == "/c"


def test_inside_the_programs_are_those_of_the_image():
    inside = c.boxed_config(config(claude_binary_path="/opt/x/claude", gemini_binary_path="/g", claude_config_dir="/c"))
    assert (inside.claude_binary_path, inside.gemini_binary_path) == ("claude", "gemini")
    assert inside.claude_config_dir == "/home/agent/.claude"


@pytest.mark.parametrize("agent, sandboxed, isolation", [
    ({}, True, "none"), ({"project_dir": "/x"}, True, "sandbox"), ({"project_dir": "/x"}, False, "none"),
    ({"repository_url": "u"}, True, "container"), ({"project_dir": "/x", "isolation": "container"}, True, "container"),
    ({"project_dir": "/x", "isolation": "none"}, True, "none")])
def test_where_a_task_works(agent, sandboxed, isolation):
    assert c.isolation_of(c.AgentConfig(instructions="x", **agent), sandboxed) == isolation


def test_each_kind_names_its_image():
    assert [config().image_key(kind) for kind in ("claude", "shell", "codex", "gemini")] == [
        "claude_image"] * 3 + ["gemini_image"]
