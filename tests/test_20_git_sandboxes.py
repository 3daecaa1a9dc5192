"""Git sandboxes with real git and real repositories (section 20)."""
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import claudomator as c

AUTOCOMMIT = "chore: autocommit uncommitted changes"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A directory in memory, where the machine has one: git renames files all the time, and a disk takes a while."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path_factory.getbasetemp()))
    yield place
    shutil.rmtree(place)


@pytest.fixture
def tmp_path(memory):
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture
def env(tmp_path):
    """A host with nothing but PATH and a home without identity; its git leaves out what costs tests time only."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text("[core]\n\tfsync = none\n[init]\n\ttemplateDir =\n[gc]\n\tauto = 0\n"
                                     "[maintenance]\n\tauto = false\n[receive]\n\tautogc = false\n")
    return {"PATH": os.environ["PATH"], "HOME": str(home), c.MARK: "execution-1"}


@pytest.fixture
def lab(tmp_path, env):
    return Lab(tmp_path, env)


class Lab:
    """Repositories below ``tmp_path`` and what a person or an agent would do with them."""

    templates = {}  # repositories that several tests begin with are made once and then copied

    def __init__(self, root, env):
        self.root, self.env, self.boxes = root, env, root / "data" / "sandboxes"
        self.person = {**env, "GIT_AUTHOR_NAME": "Ann", "GIT_AUTHOR_EMAIL": "ann@x", "GIT_COMMITTER_NAME": "Ann",
                       "GIT_COMMITTER_EMAIL": "ann@x", "LC_ALL": "C", "GIT_TEMPLATE_DIR": ""}

    def git(self, where, *args, check=True):
        command = ["git", "-c", "safe.directory=*", "-c", "protocol.file.allow=always", "-C", str(where), *args]
        done = subprocess.run(command, env=self.person, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"git {args}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def commit(self, where, name, text="x\n", message=None, into=()):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
        self.git(where, *into, "add", "-A")
        self.git(where, *into, "commit", "-q", "-m", message or f"add {name}")
        head = where / ".git" / "HEAD"
        if head.exists() and head.read_text().startswith("ref: "):
            head = where / ".git" / head.read_text()[5:].strip()
        return head.read_text().strip() if head.exists() else ""

    def others_push(self, project, name, text="x\n", message=None):
        """Somebody else's commit arrives in the project's bare repository."""
        self.commit(project, name, text, message, ("--git-dir", f"{project}.git", "--work-tree", "."))

    def repository(self, where, branch="main", **files):
        files = files or {"readme": "hello\n"}
        key = (branch, *files.items())
        if key not in self.templates:
            template = self.templates[key] = self.root.parent / f"template-{len(self.templates)}"
            self.git(self.root, "init", "-q", "-b", branch, str(template))
            for file, text in files.items():
                self.commit(template, file, text)
        return shutil.copytree(self.templates[key], self.root / where)

    def with_bare(self, name="project", branch="main", remote="origin", url="{}", **files):
        """(working copy, bare repository that is its remote)."""
        where, bare = self.repository(name, branch, **files), self.root / (name + ".git")
        shutil.copytree(where / ".git", bare)
        config = (bare / "config").read_text()
        (bare / "config").write_text(config.replace("bare = false", "bare = true"))
        self.set_remote(where, remote, url.format(bare))
        return where, bare

    def set_remote(self, where, name, url):
        url = str(url).replace("\\", "\\\\").replace('"', '\\"')
        with open(where / ".git" / "config", "a") as config:
            config.write(f'[remote "{name}"]\n\turl = "{url}"\n\tfetch = +refs/heads/*:refs/remotes/{name}/*\n')

    def sandbox(self, project, name="s1", **options):
        return c.create_sandbox(str(project), str(self.boxes / name), env=self.env, **options)

    def finish(self, sandbox, **options):
        return c.finish_sandbox(sandbox, env=self.env, **{"pause_s": 0.02, "timeout_s": 60.0, **options})

    def write(self, sandbox, name, text="work\n"):
        with open(os.path.join(sandbox.path, name), "w") as file:
            file.write(text)

    def agent_commit(self, sandbox, name, text="work\n", message=None):
        return self.commit(Path(sandbox.path), name, text, message)

    def subjects(self, where, branch="main"):
        return self.git(where, "log", "--format=%s", branch).splitlines()[::-1]

    def files(self, where, branch="main"):
        return self.git(where, "ls-tree", "-r", "-z", "--name-only", branch).strip("\0").split("\0")

    def fails(self, sandbox, reason, **options):
        with pytest.raises(c.SandboxError) as caught:
            self.finish(sandbox, **options)
        assert caught.value.reason == reason, str(caught.value)
        assert os.path.isdir(sandbox.path), "a failure keeps the sandbox"
        return caught.value


def messages(found):
    return [commit["message"] for commit in found]


def snapshot(where):
    """Every file of a working copy with its content, the index and HEAD included, refs and objects not."""
    found = {}
    for directory, names, files in os.walk(where):
        if directory == os.path.join(str(where), ".git"):
            names[:] = []
            files = [name for name in files if name in ("HEAD", "index")]
        for name in files:
            path = os.path.join(directory, name)
            found[path] = open(path, "rb").read()
    return found


def in_threads(functions):
    """Run all at once; the results in order, exceptions included."""
    results, gate = [None] * len(functions), threading.Barrier(len(functions))

    def run(at, function):
        gate.wait(20)
        try:
            results[at] = function()
        except Exception as error:
            results[at] = error
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


# -- run_command


def run(env, script, **options):
    return c.run_command(["/bin/sh", "-c", script], env=env, **options)


def test_a_command_returns_both_streams_its_exit_code_and_has_no_input(env):
    result = run(env, "echo out; echo err >&2; cat; exit 3")
    assert (result.exit_code, result.output, result.timed_out) == (3, "out\nerr\n", False)


def test_a_quiet_commands_stderr_counts_only_where_it_fails(env):
    assert run(env, "echo warning >&2; echo fact", quiet=True).output == "fact\n"
    assert run(env, "echo why >&2; echo fact; exit 1", quiet=True).output == "fact\nwhy\n"


def test_only_the_last_bytes_of_the_output_are_kept_and_a_private_log_has_all(env, tmp_path):
    log = tmp_path / "log"
    run(env, "echo before", log_path=str(log))
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600
    result = run(env, "seq 1 20000; echo last", keep_bytes=100, log_path=str(log))
    assert len(result.output) == 100 and result.output.endswith("20000\nlast\n")
    assert log.read_text().startswith("$ echo before\nbefore\n$ seq 1 20000; echo last\n1\n2\n")
    assert len(log.read_text()) > 100000
    assert run(env, "true", log_path=str(log)).output == "", "what was in the log before is not this command's output"


def test_a_timeout_ends_the_whole_group_even_one_that_ignores_sigterm(env, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "STOP_WAIT_S", 0.1)
    began = time.monotonic()
    result = run(env, f"sh -c \"trap '' TERM; echo \\$\\$ > {tmp_path}/pid; sleep 60; sleep 60\" & "
                      f"while ! [ -s {tmp_path}/pid ]; do sleep 0.01; done; echo up; wait; sleep 60", timeout_s=0.3)
    assert result.timed_out and result.exit_code < 0 and result.output == "up\n" and time.monotonic() - began < 10
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_background_child_with_the_output_open_holds_nobody_up(env, tmp_path):
    began = time.monotonic()
    result = run(env, f"sleep 30 & echo $! > {tmp_path}/pid; echo done")
    os.kill(int((tmp_path / "pid").read_text()), 9)
    assert result.output == "done\n" and time.monotonic() - began < 10


def test_a_command_killed_from_outside_by_its_mark_returns_a_negative_code(env):
    done = []
    thread = threading.Thread(target=lambda: done.append(run({**env, c.MARK: f"to-be-cancelled-{os.getpid()}"}, "sleep 60")))
    thread.start()
    deadline = time.monotonic() + 10
    while not c.marked_processes([f"to-be-cancelled-{os.getpid()}"]):
        assert time.monotonic() < deadline
    while thread.is_alive() and time.monotonic() < deadline:
        c.signal_marked([f"to-be-cancelled-{os.getpid()}"], 9)
        thread.join(0.01)
    assert done[0].exit_code < 0 and not done[0].timed_out


def test_a_program_that_is_not_there_is_a_result_and_without_git_the_error_says_so(lab):
    result = c.run_command(["no-such-program"], env=lab.env)
    assert result.exit_code == 127 and "no-such-program" in result.output
    assert run(lab.env, "true", cwd=str(lab.root / "gone")).exit_code == 127
    with pytest.raises(c.SandboxError, match="cannot run git"):
        c.create_sandbox(str(lab.root), str(lab.boxes / "s1"), env={**lab.env, "PATH": "/nowhere"})


# -- clone sources


def test_the_source_is_remote_local_before_origin_before_the_project(lab):
    project = lab.repository("project")
    assert c.clone_source(str(project), lab.env) == str(project)
    lab.set_remote(project, "origin", lab.root / "o.git")
    assert c.clone_source(str(project), lab.env) == str(lab.root / "o.git")
    lab.set_remote(project, "local", f"file://{lab.root}/l.git")
    assert c.clone_source(str(project), lab.env) == f"file://{lab.root}/l.git"


def test_a_network_remote_is_never_a_source(lab):
    project = lab.repository("project")
    config = (project / ".git" / "config").read_text()
    for url in ("https://example.com/x.git", "http://x/y", "ssh://git@host/x", "git://host/x", "git@host:x.git",
                "host:/srv/x", "~/x.git", "ext::sh -c x/y"):
        (project / ".git" / "config").write_text(config)
        lab.set_remote(project, "origin", url)
        assert c.clone_source(str(project), lab.env) == str(project), url
        lab.set_remote(project, "local", "/srv/x.git")
        assert c.clone_source(str(project), lab.env) == "/srv/x.git"


@pytest.mark.parametrize("remote,url", [("local", "{}"), ("origin", "file://{}")])
def test_commits_arrive_in_the_remote_that_was_cloned(lab, remote, url):
    project, bare = lab.with_bare(remote=remote, url=url)
    before = snapshot(project)
    sandbox = lab.sandbox(project)
    assert (sandbox.source, sandbox.branch) == (url.format(bare), "main")
    assert lab.git(sandbox.path, "remote", "get-url", "origin") == sandbox.source
    first, second = lab.agent_commit(sandbox, "a"), lab.agent_commit(sandbox, "b")
    result = lab.finish(sandbox)
    assert result.commits == [{"hash": first, "message": "add a"}, {"hash": second, "message": "add b"}]
    assert (result.pushed_branch, result.rebased, result.note) == ("main", False, "")
    assert result.changestats == {"files_changed": 2, "insertions": 2, "deletions": 0}
    assert lab.git(bare, "rev-parse", "main") == second
    assert snapshot(project) == before


def test_the_project_itself_as_source_gets_a_branch_beside_the_checked_out_one(lab):
    """Also where its owner allows a push into the working copy."""
    project = lab.repository("project")
    lab.git(project, "config", "receive.denyCurrentBranch", "updateInstead")
    sandbox = lab.sandbox(project)
    commit = lab.agent_commit(sandbox, "readme", "agent\n")
    lab.commit(project, "readme", "developer\n")  # no conflict: the branch beside it has nothing of that
    (project / "readme").write_text("the developer is editing\n")
    (project / "new").write_text("untracked\n")
    before, head = snapshot(project), lab.git(project, "rev-parse", "main")
    result = lab.finish(sandbox)
    assert (result.pushed_branch, result.rebased) == ("claudomator/s1", False) and "main is checked out" in result.note
    assert "git merge claudomator/s1" in result.note
    assert lab.git(project, "rev-parse", "claudomator/s1") == commit
    assert lab.git(project, "rev-parse", "main") == head and snapshot(project) == before
    assert lab.finish(sandbox) == result, "called again after the push"


def test_a_linked_worktree_is_cloned_at_its_own_head_and_not_touched(lab):
    project, tree = lab.repository("project"), lab.root / "tree"
    lab.git(project, "worktree", "add", "-q", "-b", "topic", str(tree))
    before, head = snapshot(tree), lab.git(tree, "rev-parse", "HEAD")
    sandbox = lab.sandbox(tree)
    assert (sandbox.branch, sandbox.start_head) == ("topic", head)
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "claudomator/s1" and snapshot(tree) == before


def test_a_source_that_cannot_be_copied_file_by_file_is_cloned_all_the_same(lab):
    """Copying fails where another task pushes to the source meanwhile; a link among the objects stands in for that."""
    project, bare = lab.with_bare()
    (bare / "objects" / "link").symlink_to("/etc")
    copy = subprocess.run(["git", "clone", "-q", str(bare), str(lab.root / "copy")], env=lab.env, capture_output=True)
    assert copy.returncode != 0
    assert lab.sandbox(project).start_head


def test_a_source_that_is_gone_is_a_clear_error(lab):
    project = lab.repository("project")
    lab.set_remote(project, "origin", "/no/such.git")
    with pytest.raises(c.SandboxError, match="git clone of /no/such.git failed") as caught:
        lab.sandbox(project)
    assert caught.value.reason == "sandbox_failed" and not (lab.boxes / "s1").exists()


def test_a_project_dir_that_is_no_directory_is_named(lab):
    for project in ("/no/such", "relative", "/etc/passwd", ""):
        with pytest.raises(c.SandboxError, match="not the full path of a directory that exists") as caught:
            lab.sandbox(project)
        assert repr(project) in str(caught.value) and caught.value.reason == "sandbox_failed"


# -- plain directories, subdirectories, empty repositories, odd HEADs


def test_a_plain_directory_becomes_a_repository_with_a_first_commit(lab):
    plain = lab.root / "plain"
    plain.mkdir()
    (plain / "a").write_text("a\n")
    (plain / "junk").write_text("junk\n")
    (plain / ".gitignore").write_text("junk\n")
    sandbox = lab.sandbox(plain)
    assert sorted(os.listdir(sandbox.path)) == [".git", ".gitignore", "a"]
    assert lab.git(plain, "log", "--format=%s by %an <%ae>") == \
        "chore: initial commit by Claudomator <claudomator@localhost>"
    assert lab.git(plain, "status", "--porcelain") == "" and (plain / "junk").exists()
    commit = lab.agent_commit(sandbox, "b")
    result = lab.finish(sandbox)
    assert lab.git(plain, "rev-parse", result.pushed_branch) == commit


def test_tasks_that_meet_on_one_empty_plain_directory_make_one_repository(lab):
    plain = lab.root / "plain"
    plain.mkdir()
    boxes = in_threads([lambda at=at: lab.sandbox(plain, f"s{at}") for at in range(3)])
    assert len({box.start_head for box in boxes}) == 1 and lab.subjects(plain, "HEAD") == ["chore: initial commit"]


def test_a_repository_whose_first_commit_was_cut_by_a_kill_is_mended(lab):
    plain = lab.root / "plain"
    plain.mkdir()
    (plain / "a").write_text("a\n")
    (plain / ".gitattributes").write_text("* filter=broken\n")
    with open(lab.root / "home" / ".gitconfig", "a") as config:
        config.write('[filter "broken"]\n\tclean = false\n\trequired = true\n')
    with pytest.raises(c.SandboxError, match="git add"):
        lab.sandbox(plain)
    (plain / ".gitattributes").unlink()
    assert lab.sandbox(plain).start_head, "an attempt that failed half-way is no empty repository"
    lab.git(plain, "update-ref", "-d", "HEAD")
    (plain / ".git" / "claudomator-init").write_text("")
    (plain / ".git" / "index.lock").write_text("")
    sandbox = lab.sandbox(plain, "s2")
    assert sandbox.start_head and os.path.exists(sandbox.path + "/a")
    assert not (plain / ".git" / "claudomator-init").exists()


def test_a_directory_that_contains_the_sandboxes_is_not_made_a_repository(lab):
    with pytest.raises(c.SandboxError, match="is not made one, for it contains"):
        lab.sandbox(lab.root)
    assert not (lab.root / ".git").exists()


def test_a_broken_repository_is_an_error_and_not_initialised_anew(lab):
    project = lab.repository("project")
    (project / ".git" / "HEAD").unlink()
    before = sorted(os.listdir(project / ".git"))
    with pytest.raises(c.SandboxError, match="cannot read the repository"):
        lab.sandbox(project)
    assert sorted(os.listdir(project / ".git")) == before


def test_a_subdirectory_of_a_repository_starts_the_agent_in_the_same_subdirectory(lab):
    files = {"svc/api/main": "x\n", "svc/Makefile": "build:\n\ttouch built-here\n"}
    project, bare = lab.with_bare(url="../project.git", **files)  # relative to the repository, not to the directory
    sandbox = lab.sandbox(project / "svc" / "api")
    assert sandbox.workdir == os.path.join(sandbox.path, "svc/api") and sandbox.source == str(bare)
    assert c.open_sandbox(sandbox.path) == sandbox
    lab.write(sandbox, "top", "found too\n")
    result = lab.finish(sandbox, verify="pwd > ../../where")
    assert messages(result.commits) == [AUTOCOMMIT]
    assert open(sandbox.path + "/where").read().strip() == sandbox.workdir
    assert "top" in lab.files(bare)


def test_a_directory_that_an_outer_repository_does_not_track_is_a_project_of_its_own(lab):
    outer = lab.repository("outer")
    (outer / "mine").mkdir()
    (outer / "mine" / "file").write_text("x\n")
    sandbox = lab.sandbox(outer / "mine")
    assert sorted(os.listdir(sandbox.path)) == [".git", "file"] and (outer / "mine" / ".git").is_dir()


def test_an_empty_repository_gets_its_branch_from_the_first_push(lab):
    bare, project = lab.root / "e.git", lab.root / "e"
    lab.git(lab.root, "init", "-q", "--bare", "-b", "first", str(bare))
    lab.git(lab.root, "clone", "-q", str(bare), str(project))
    sandbox = lab.sandbox(project)
    assert (sandbox.branch, sandbox.start_head) == ("first", "")
    assert lab.finish(sandbox).commits == [] and c.sandbox_summary(sandbox.path, lab.env)["ahead"] == 0
    assert c.sandbox_diff(sandbox.path, lab.env) == ""
    lab.env[c.MARK] = "execution-2"
    lab.write(sandbox, "a")
    result = lab.finish(sandbox)
    assert result.pushed_branch == "first" and messages(result.commits) == [AUTOCOMMIT]
    assert result.changestats == {"files_changed": 1, "insertions": 1, "deletions": 0}
    assert lab.git(bare, "log", "--format=%s", "first") == AUTOCOMMIT
    assert "+work" in c.sandbox_diff(sandbox.path, lab.env)
    assert "+work" in c.commits_diff(str(project), str(bare), [result.commits[0]["hash"]], lab.env)


def test_two_tasks_in_an_empty_repository_both_arrive(lab):
    bare = lab.root / "e.git"
    lab.git(lab.root, "init", "-q", "--bare", "-b", "main", str(bare))
    one, two = lab.sandbox(bare, "s1"), lab.sandbox(bare, "s2")
    assert one.source == str(bare), "a bare repository as project is its own source"
    lab.agent_commit(one, "a")
    lab.agent_commit(two, "b")
    lab.finish(one)
    result = lab.finish(two)
    assert result.rebased and messages(result.commits) == ["add b"]
    assert lab.subjects(bare) == ["add a", "add b"]
    assert result.changestats == {"files_changed": 1, "insertions": 1, "deletions": 0}


def test_a_detached_head_is_cloned_at_its_commit_and_pushed_to_a_branch_of_its_own(lab):
    project = lab.repository("project", a="1\n", b="2\n")
    lab.git(project, "checkout", "-q", "HEAD~1")
    head = lab.git(project, "rev-parse", "HEAD")
    before = snapshot(project)
    sandbox = lab.sandbox(project)
    assert (sandbox.branch, sandbox.start_head) == ("claudomator/s1", head) and "detached" in sandbox.note
    commit = lab.agent_commit(sandbox, "c")
    result = lab.finish(sandbox)
    assert result.pushed_branch == "claudomator/s1" and "detached" in result.note
    assert lab.git(project, "rev-parse", result.pushed_branch) == commit and snapshot(project) == before


def test_where_the_bare_repositorys_head_names_no_branch_the_projects_own_is_used_or_asked_for(lab):
    project, bare = lab.with_bare()
    lab.git(bare, "branch", "other", "main")
    lab.git(bare, "symbolic-ref", "HEAD", "refs/heads/master")
    sandbox = lab.sandbox(project)
    assert sandbox.branch == "main" and sandbox.start_head and os.path.exists(sandbox.path + "/readme")
    with pytest.raises(c.SandboxError, match="symbolic-ref HEAD") as caught:
        lab.sandbox(bare, "s2")
    assert "main, other" in str(caught.value)


def test_spaces_and_non_ascii_in_every_path_and_a_branch_that_is_neither_main_nor_master(lab):
    branch = "größe/trunk-v2"
    project, bare = lab.with_bare("prøject mit Leer zeichen'\"", branch, **{"dir ü/f ö.txt": "x\n"})
    lab.boxes = lab.root / "dåta dir" / "sånd böxes"
    sandbox = lab.sandbox(project / "dir ü")
    assert sandbox.branch == branch
    lab.write(sandbox, "dir ü/neu – 文.txt")
    lab.others_push(project, "größe", message="zwei")
    result = lab.finish(sandbox, verify="test -e 'neu – 文.txt'")
    assert result.pushed_branch == branch and result.changestats["files_changed"] == 1 and result.rebased
    assert {"dir ü/neu – 文.txt", "größe"} <= set(lab.files(bare, branch))
    assert lab.subjects(bare, branch)[1:] == ["zwei", AUTOCOMMIT]
    assert lab.git(bare, "for-each-ref", "--format=%(refname:short)", "refs/heads") == branch


# -- preparing


def test_setup_runs_in_the_clone_and_its_output_is_logged(lab, tmp_path):
    project = lab.repository("project", **{".gitignore": "made\n"})
    sandbox = lab.sandbox(project, setup="echo preparing; pwd > made", log_path=str(tmp_path / "log"))
    assert open(sandbox.path + "/made").read().strip() == sandbox.path
    assert (tmp_path / "log").read_text() == "$ echo preparing; pwd > made\npreparing\n"


def test_a_failing_setup_is_sandbox_failed_with_the_outputs_end(lab):
    project = lab.repository("project")
    with pytest.raises(c.SandboxError) as caught:
        lab.sandbox(project, setup="seq 1 9999; echo no network >&2; exit 7")
    assert caught.value.reason == "sandbox_failed" and str(caught.value).endswith("9999\nno network")
    assert "exit 7" in str(caught.value) and len(str(caught.value)) < 5000
    with pytest.raises(c.SandboxError, match="ran out of time"):
        lab.sandbox(project, setup="sleep 30", timeout_s=0.2)


def test_what_an_interrupted_clone_left_is_replaced(lab):
    project = lab.repository("project")
    sandbox = lab.sandbox(project)
    (lab.boxes / "s1" / "junk").write_text("x")
    os.unlink(sandbox.path + "/.git/claudomator.json")
    with pytest.raises(c.SandboxError, match="not made to its end"):
        c.open_sandbox(sandbox.path)
    again = lab.sandbox(project)
    assert again == sandbox and not os.path.exists(sandbox.path + "/junk") and c.open_sandbox(sandbox.path) == sandbox


def test_submodules_are_there_also_nested_ones_and_work_inside_them_is_never_lost_silently(lab):
    deep, lib = lab.repository("deep"), lab.repository("lib")
    lab.git(lib, "submodule", "add", "-q", str(deep), "deep")
    lab.git(lib, "commit", "-q", "-m", "deep")
    project, bare = lab.with_bare()
    lab.git(project, "submodule", "add", "-q", "../lib", "lib dir")
    lab.git(project, "commit", "-q", "-m", "lib")
    lab.git(project, "push", "-q", "origin", "main")
    sandbox = lab.sandbox(project)
    assert os.path.exists(sandbox.path + "/lib dir/readme") and os.path.exists(sandbox.path + "/lib dir/deep/readme")
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "main"
    lab.env[c.MARK] = "execution-2"
    lab.write(sandbox, "lib dir/readme", "changed\n")
    assert "inside submodules (lib dir)" in str(lab.fails(sandbox, "push_failed"))
    lab.git(sandbox.path + "/lib dir", "commit", "-q", "-a", "-m", "inner")
    assert "lib" in str(lab.fails(sandbox, "push_failed", attempts=1)), "the commit is nowhere but here"
    assert lab.subjects(bare) == ["add readme", "lib", "add a"]


def test_a_relative_submodule_url_means_what_it_means_in_the_project(lab):
    """The project's origin is on the network, so the project is cloned; its submodule lies beside the origin."""
    (lab.root / "hub").mkdir()
    (lab.root / "away").mkdir()
    hub, project = lab.repository("hub/lib"), lab.repository("away/project")
    lab.set_remote(project, "origin", "https://example.invalid/project")
    lab.git(project, "submodule", "add", "-q", str(hub), "lib")
    lab.git(project, "config", "-f", ".gitmodules", "submodule.lib.url", "../lib")
    lab.git(project, "commit", "-q", "-a", "-m", "lib")
    assert os.path.exists(lab.sandbox(project).path + "/lib/readme")


@needs_root
def test_a_repository_of_another_user_is_cloned_and_pushed_to(lab):
    project, bare = lab.with_bare()
    own = lab.repository("own")
    for where in (project, bare, own):
        subprocess.run(["chown", "-R", "12345:12345", str(where)], check=True)
    plain_git = subprocess.run(["git", "-C", str(project), "status"], env=lab.env, capture_output=True, text=True)
    assert "dubious ownership" in plain_git.stderr
    one, two, three = lab.sandbox(project, "s1"), lab.sandbox(project, "s2"), lab.sandbox(own, "s3")
    for box in (one, two, three):
        lab.write(box, box.path[-2:])
    assert lab.finish(one).pushed_branch == "main" and lab.finish(two).rebased
    assert lab.finish(three).pushed_branch == "claudomator/s3"
    assert lab.files(bare) == ["readme", "s1", "s2"]
    agent = {**lab.env, **c.agent_git_env(lab.env, two.workdir)}
    assert subprocess.run(["git", "-C", one.path, "fetch", "-q"], env=agent).returncode == 0
    assert subprocess.run(["git", "-C", str(project), "status"], env=agent, stdout=subprocess.DEVNULL).returncode == 0


# -- the host's configuration and environment


def hostile_host(lab):
    """A home as developers have it: signing with a program that fails, hooks that refuse, colours, odd defaults."""
    hooks = lab.root / "home" / "hooks"
    hooks.mkdir()
    for name in ("pre-commit", "commit-msg", "pre-rebase", "post-checkout"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    (lab.root / "home" / ".gitconfig").write_text(
        "[commit]\n\tgpgsign = true\n[tag]\n\tgpgsign = true\n[push]\n\tgpgSign = true\n"
        "[gpg]\n\tprogram = /bin/false\n[user]\n\tsigningkey = ABC\n\tuseConfigOnly = true\n"
        "[log]\n\tshowSignature = true\n[clone]\n\tdefaultRemoteName = upstream\n"
        f"[core]\n\thooksPath = {hooks}\n\tquotePath = true\n[color]\n\tui = always\n[diff]\n\tnoprefix = true\n"
        "\texternal = /bin/false\n\trenames = false\n[status]\n\tshowUntrackedFiles = no\n"
        "[init]\n\tdefaultBranch = fromconfig\n[rebase]\n\tautoSquash = true\n\tautoStash = true\n"
        "[submodule]\n\trecurse = true\n[i18n]\n\tlogOutputEncoding = latin1\n")


def test_signing_hooks_and_tastes_of_the_host_do_not_matter(lab):
    project, bare = lab.with_bare(**{"f": "1\n2\n3\n4\n", "ä": "1\n"})
    (lab.root / "plain").mkdir()
    hostile_host(lab)
    assert lab.sandbox(lab.root / "plain", "p").branch == "fromconfig"
    sandbox = lab.sandbox(project)
    assert lab.git(sandbox.path, "remote") == "origin"
    agent = {**lab.env, **c.agent_git_env(lab.env, sandbox.workdir), "GIT_CONFIG_GLOBAL": "/dev/null"}
    script = "mv f g; echo 2 >>ä; git add .; git commit -qm 'zweite größe'; echo new >b"
    subprocess.run(["sh", "-c", script], cwd=sandbox.workdir, env=agent, check=True)
    lab.person["GIT_CONFIG_GLOBAL"] = "/dev/null"
    lab.others_push(project, "theirs")
    assert "diff --git a/f b/g\n" in c.sandbox_diff(sandbox.path, lab.env, 9999)
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["zweite größe", AUTOCOMMIT] and result.rebased
    assert result.changestats == {"files_changed": 3, "insertions": 2, "deletions": 0}
    assert lab.git(bare, "--no-pager", "log", "-1", "--format=%an %ae %G?", "main") == \
        "Claudomator claudomator@localhost N"


def test_an_agent_can_commit_on_a_host_that_signs_and_knows_no_identity(lab):
    (lab.root / "home" / ".gitconfig").write_text("[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = /bin/false\n"
                                                  "[user]\n\tuseConfigOnly = true\n")
    repo = lab.root / "r"
    subprocess.run(["git", "init", "-q", str(repo)], env=lab.env, check=True)
    agent = {**lab.env, **c.agent_git_env(lab.env, str(repo))}
    subprocess.run(["git", "commit", "-q", "--allow-empty", "-m", "x"], cwd=repo, env=agent, check=True)
    assert not {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"} & agent.keys()


def test_a_configured_identity_is_kept(lab):
    project, bare = lab.with_bare()
    assert c.agent_git_env({**lab.env, "GIT_AUTHOR_EMAIL": "me@x"}, str(project))["GIT_AUTHOR_EMAIL"] == "me@x"
    (lab.root / "home" / ".gitconfig").write_text("[user]\n\tname = Zoë Host\n\temail = z@host\n")
    assert not [name for name in c.agent_git_env(lab.env, str(project)) if name.startswith(("GIT_A", "GIT_COMM"))]
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    lab.finish(sandbox)
    assert lab.git(bare, "log", "-1", "--format=%an %ae %cn", "main") == "Zoë Host z@host Zoë Host"


def test_variables_of_an_outer_git_change_nothing(lab):
    outer = lab.repository("outer")
    project, bare = lab.with_bare()
    before = lab.git(outer, "log", "--format=%H"), snapshot(outer)
    lab.env.update({"GIT_DIR": f"{outer}/.git", "GIT_WORK_TREE": str(outer), "GIT_INDEX_FILE": f"{outer}/.git/index",
                    "GIT_PREFIX": "sub/", "GIT_OBJECT_DIRECTORY": f"{outer}/.git/objects", "GIT_TRACE": "1",
                    "GIT_CONFIG_PARAMETERS": "'core.bare'='true'", "GIT_CONFIG_COUNT": "x",
                    "GIT_CEILING_DIRECTORIES": "/", "GIT_LITERAL_PATHSPECS": "1", "GIT_EDITOR": "false",
                    "GIT_EXTERNAL_DIFF": "false"})
    sandbox = lab.sandbox(project, setup="git rev-parse --show-toplevel")
    lab.write(sandbox, "a")
    result = lab.finish(sandbox, verify="test \"$(git rev-parse --show-toplevel)\" = \"$PWD\"")
    assert result.pushed_branch == "main" and lab.subjects(bare) == ["add readme", AUTOCOMMIT]
    assert (lab.git(outer, "log", "--format=%H"), snapshot(outer)) == before


def test_a_sandbox_that_lost_its_git_directory_never_falls_through_to_an_outer_repository(lab):
    outer, project = lab.repository("data"), lab.repository("project")  # the sandboxes lie in lab.root/data
    before = lab.git(outer, "rev-parse", "HEAD")
    for name, damage in (("s1", "rm -rf .git"), ("s2", "rm .git/HEAD")):
        sandbox = lab.sandbox(project, name)
        lab.write(sandbox, "a")
        subprocess.run(["sh", "-c", damage], cwd=sandbox.path, check=True)
        message = str(lab.fails(sandbox, "sandbox_failed"))
        assert "no git repository any more" in message or "not a git repository" in message
        assert c.sandbox_summary(sandbox.path, lab.env) == {"branch": None, "ahead": None, "dirty": None}
    assert lab.git(outer, "rev-parse", "HEAD") == before


# -- what a success leaves: autocommit, build gate, verify


def test_what_the_agent_left_uncommitted_is_committed(lab):
    project, bare = lab.with_bare(old="old\n", gone="x\n", moved="1\n2\n3\n4\n", **{".gitignore": "ignored\n"})
    sandbox = lab.sandbox(project)
    for name in ("new", "ignored", "old", "with\nnewline"):
        lab.write(sandbox, name)
    with open(sandbox.path + "/binary", "wb") as file:
        file.write(b"\0\1\2" * 100)
    os.unlink(sandbox.path + "/gone")
    os.rename(sandbox.path + "/moved", sandbox.path + "/to")
    result = lab.finish(sandbox)
    assert messages(result.commits) == [AUTOCOMMIT]
    assert result.changestats == {"files_changed": 6, "insertions": 3, "deletions": 2}, "a renamed file is one"
    assert lab.files(bare) == [".gitignore", "binary", "new", "old", "to", "with\nnewline"]


def test_without_changes_nothing_is_committed_or_pushed_but_verify_still_counts(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\tfalse\n"})
    head = lab.git(bare, "rev-parse", "main")
    sandbox = lab.sandbox(project)
    assert lab.finish(sandbox, verify="true") == c.SandboxResult([], None, "", False, "")
    lab.fails(sandbox, "verify_failed", verify="false")
    assert lab.git(bare, "rev-parse", "main") == head
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "main", "commits of the agent alone need no build"


def test_a_failing_build_stops_the_autocommit_and_nothing_is_pushed(lab, tmp_path):
    project, bare = lab.with_bare(**{"Makefile": "all:\n\nbuild:\n\t@echo broken at line 3; exit 4\n"})
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    lab.write(sandbox, "b")
    error = lab.fails(sandbox, "build_failed", log_path=str(tmp_path / "log"))
    assert "broken at line 3" in str(error) and "make build" in str(error) and "broken" in error.data["output"]
    assert "$ make build\nbroken at line 3" in (tmp_path / "log").read_text()
    assert lab.subjects(bare) == ["add Makefile"] and AUTOCOMMIT not in lab.subjects(sandbox.path, "HEAD")
    lab.write(sandbox, "Makefile", "build:\n\ttrue\n")
    assert messages(lab.finish(sandbox).commits) == ["add a", AUTOCOMMIT]
    assert lab.git(bare, "show", "main:Makefile") == "build:\n\ttrue", "what the agent mended afterwards is in it"


def test_the_projects_build_setting_goes_first_and_a_builds_products_stay_out(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\tfalse\n"})
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    lab.fails(sandbox, "build_failed", build="exit 9")
    assert lab.finish(sandbox, build="test -e a && echo x > product").pushed_branch == "main"
    assert os.path.exists(sandbox.path + "/product") and lab.files(bare) == ["Makefile", "a"]


@pytest.mark.parametrize("files,expected", [
    ({"Makefile": "build:\n\ttrue\n"}, "make build"), ({"makefile": "a b build c: x\n"}, "make build"),
    ({"GNUmakefile": ".PHONY: build\nbuild ::\n"}, "make build"),
    ({"Makefile": "build := x\nbuilder:\nrebuild:\nall: build\n\tbuild: no\n#build:\nbuild-x:\n"}, ""),
    ({"Makefile": "all:\n", "gradlew": "x"}, "./gradlew build"), ({"Makefile": "build:\n", "gradlew": "x"}, "make build"),
    ({"gradlew": "x", "go.mod": "x"}, "./gradlew build"), ({"go.mod": "module x\n", "bin/go": ""}, "go build ./..."),
    ({"go.mod": "module x\n"}, ""), ({"readme": "x"}, ""), ({"sub/": "", "Makefile": "build:\n"}, "make build")])
def test_the_build_is_what_the_repository_names(tmp_path, files, expected):
    (tmp_path / "bin").mkdir()
    for tool in ("make", "sh", *(["go"] if "bin/go" in files else [])):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    for name, text in files.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        elif "bin" not in name:
            (tmp_path / name).write_text(text)
    command, _, directory = c.find_build(str(tmp_path / "sub"), str(tmp_path), {"PATH": str(tmp_path / "bin")})
    assert (command, directory) == (expected, str(tmp_path))
    if expected == "make build":
        assert c.find_build(str(tmp_path), str(tmp_path), {"PATH": "/nowhere"})[0] != "make build"


def test_verify_rounds_go_on_in_the_same_sandbox_and_its_output_comes_back(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    verify = "date >> report; git status --porcelain a; grep -h right a && test -e b || { echo want right; exit 1; }"
    lab.write(sandbox, "a", "wrong\n")
    error = lab.fails(sandbox, "verify_failed", verify=verify)
    assert error.data["output"] == "want right\n" and lab.subjects(bare) == ["add readme"]
    lab.write(sandbox, "a", "right\n")
    lab.fails(sandbox, "verify_failed", verify=verify)
    lab.write(sandbox, "b")  # the agent's third round
    result = lab.finish(sandbox, verify=verify)
    assert messages(result.commits) == [AUTOCOMMIT] * 3 and result.pushed_branch == "main"
    assert {"a", "b"} <= set(lab.files(bare))


def test_steps_are_told_and_may_stop_the_work(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n"})
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")

    def stop(name):
        raise InterruptedError(name)
    with pytest.raises(InterruptedError, match="commit"):
        lab.finish(sandbox, on_step=stop)
    steps = []
    lab.finish(sandbox, verify="true", on_step=steps.append)
    assert steps == ["commit", "build", "verify", "push"]


def test_a_repository_inside_the_sandbox_is_left_out_and_named(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.git(lab.root, "clone", "-q", str(bare), sandbox.path + "/vendored [1]")
    lab.git(lab.root, "init", "-q", sandbox.path + "/sub/empty")
    lab.write(sandbox, "a")
    result = lab.finish(sandbox)
    assert "sub/empty" in result.note and "vendored [1]" in result.note
    assert lab.files(bare) == ["a", "readme"]


# -- which commits are the task's own


def test_an_agent_that_switched_branches_and_amended_is_understood(lab):
    project, bare = lab.with_bare(a="1\n", b="2\n")
    head = lab.git(bare, "rev-parse", "main")
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "checkout", "-q", "-b", "feature")
    lab.agent_commit(sandbox, "c", message="draft")
    lab.git(sandbox.path, "commit", "-q", "--amend", "-m", 'odd | subject "x"\t$(y) ü\n\nbody')
    assert messages(c.new_commits(sandbox, lab.env)) == ['odd | subject "x"\t$(y) ü']
    assert c.sandbox_summary(sandbox.path, lab.env) == {"branch": "feature", "ahead": 1, "dirty": False}
    lab.write(sandbox, "x")
    assert c.sandbox_summary(sandbox.path, lab.env)["dirty"]
    os.unlink(sandbox.path + "/x")
    assert lab.finish(sandbox).pushed_branch == "main"
    assert lab.subjects(bare)[-1] == 'odd | subject "x"\t$(y) ü' and lab.git(bare, "rev-parse", "main~1") == head


def test_an_agent_that_amended_a_commit_of_others_does_not_overwrite_it(lab):
    project, bare = lab.with_bare(a="1\n", b="2\n")
    head = lab.git(bare, "rev-parse", "main")
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "reset", "-q", "--hard", "HEAD~1")
    assert lab.finish(sandbox).commits == [], "it went back to before the start"
    lab.git(sandbox.path, "reset", "-q", "--hard", "origin/main")
    lab.write(sandbox, "c")
    lab.git(sandbox.path, "add", "-A")
    lab.git(sandbox.path, "commit", "-q", "--amend", "-m", "amended")
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["amended"] and lab.subjects(bare) == ["add a", "add b", "amended"]
    assert lab.git(bare, "rev-parse", "main~1") == head


def test_a_merge_commit_survives_a_rebase(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "checkout", "-q", "-b", "side")
    lab.agent_commit(sandbox, "side")
    lab.git(sandbox.path, "checkout", "-q", "main")
    lab.agent_commit(sandbox, "straight")
    lab.git(sandbox.path, "merge", "-q", "--no-edit", "side")
    lab.others_push(project, "other")
    result = lab.finish(sandbox)
    assert result.rebased and sorted(messages(result.commits)) == ["Merge branch 'side'", "add side", "add straight"]
    assert lab.git(bare, "rev-list", "--merges", "--count", "main") == "1"
    assert result.changestats["files_changed"] == 2


def test_commits_that_the_agent_pulled_are_not_its_own_and_those_it_pushed_are(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.others_push(project, "human", message="human work")
    lab.agent_commit(sandbox, "a")
    lab.git(sandbox.path, "pull", "-q", "--rebase", "origin", "main")
    lab.agent_commit(sandbox, "b")
    lab.git(sandbox.path, "push", "-q", "origin", "HEAD:main")
    lab.agent_commit(sandbox, "c")
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["add a", "add b", "add c"] and result.changestats["files_changed"] == 3
    assert lab.subjects(bare) == ["add readme", "human work", "add a", "add b", "add c"]


def test_work_that_is_not_where_the_agent_stopped_is_not_lost(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "readme", "hidden\n")
    lab.git(sandbox.path, "stash", "push", "-q", "-m", "stashed work")
    assert "stashed work" in str(lab.fails(sandbox, "sandbox_failed"))
    lab.git(sandbox.path, "stash", "drop", "-q")
    lab.git(sandbox.path, "checkout", "-q", "-b", "feature")
    lab.agent_commit(sandbox, "hidden", message="hidden work")
    lab.git(sandbox.path, "checkout", "-q", "main")
    assert "hidden work" in str(lab.fails(sandbox, "sandbox_failed"))
    lab.agent_commit(sandbox, "b")
    assert messages(lab.finish(sandbox).commits) == ["add b"]


def test_an_operation_that_the_agent_left_unfinished_is_not_pushed(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "checkout", "-q", "-b", "other")
    lab.agent_commit(sandbox, "readme", "theirs\n")
    lab.git(sandbox.path, "checkout", "-q", "main")
    lab.agent_commit(sandbox, "readme", "ours\n")
    for command in ("rebase", "merge", "cherry-pick"):
        lab.git(sandbox.path, command, "other", check=False)
        assert "left a rebase, merge or cherry-pick" in str(lab.fails(sandbox, "sandbox_failed"))
        lab.git(sandbox.path, command, "--abort")
    assert lab.subjects(bare) == ["add readme"]


def test_conflict_markers_are_not_committed(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "readme", "stashed\n")
    lab.git(sandbox.path, "stash", "-q")
    lab.agent_commit(sandbox, "readme", "committed\n")
    lab.git(sandbox.path, "stash", "pop", check=False)
    assert "unresolved conflicts in readme" in str(lab.fails(sandbox, "sandbox_failed"))
    assert lab.subjects(bare) == ["add readme"]


def test_a_diff_is_bounded_covers_uncommitted_changes_and_is_found_after_the_push(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    hashes = [lab.agent_commit(sandbox, "a", "one\n"), lab.agent_commit(sandbox, "b", "two\n")]
    lab.finish(sandbox)
    lab.write(sandbox, "readme", "changed\n")
    text = c.sandbox_diff(sandbox.path, lab.env)
    assert "+one" in text and "+changed" in text and "-hello" in text
    assert c.sandbox_diff(sandbox.path, lab.env, 40) == text[:40] + f"\n... {len(text) - 40} more bytes\n"
    text = c.commits_diff(str(project), f"file://{bare}", hashes, lab.env)
    assert "+one" in text and "+two" in text and "hello" not in text
    with pytest.raises(c.SandboxError):
        c.commits_diff(str(project), "/gone", hashes, lab.env)
    lab.git(project, "fetch", "-q")
    assert c.commits_diff(str(project), "/gone", hashes, lab.env) == text


# -- pushing against others


def test_two_tasks_pushing_at_once_both_arrive_and_the_later_is_recorded_anew(lab):
    project, bare = lab.with_bare()
    one, two = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    lab.agent_commit(one, "a")
    lab.agent_commit(two, "b")
    results = in_threads([lambda: lab.finish(one), lambda: lab.finish(two)])
    assert sorted(result.rebased for result in results) == [False, True]
    assert sorted(lab.subjects(bare)) == ["add a", "add b", "add readme"]
    for result in results:
        assert len(result.commits) == 1 and result.changestats["files_changed"] == 1
        lab.git(bare, "merge-base", "--is-ancestor", result.commits[0]["hash"], "main")


@pytest.mark.slow
@pytest.mark.parametrize("shared_lock", [True, False])
def test_ten_tasks_pushing_at_once_all_arrive(lab, shared_lock):
    """Once as one daemon's tasks, which take turns, once as three strangers, who know nothing of each other."""
    project, bare = lab.with_bare()
    count = 10 if shared_lock else 3
    boxes = in_threads([lambda at=at: lab.sandbox(project, f"s{at}" if shared_lock else f"d{at}/s{at}")
                        for at in range(count)])
    for at, box in enumerate(boxes):
        lab.write(box, f"file{at}")
    options = {} if shared_lock else {"attempts": 30}
    results = in_threads([lambda box=box: lab.finish(box, **options) for box in boxes])
    assert [messages(result.commits) for result in results] == [[AUTOCOMMIT]] * count
    assert lab.files(bare) == [*(f"file{at}" for at in range(count)), "readme"]
    assert {result.commits[0]["hash"] for result in results} < set(lab.git(bare, "rev-list", "main").split())
    assert lab.git(bare, "rev-list", "--merges", "--count", "main") == "0" and len(lab.subjects(bare)) == count + 1
    assert [result.rebased for result in results].count(False) >= 1


def test_verify_runs_again_on_the_rebased_work_and_its_failure_keeps_it_back(lab):
    project, bare = lab.with_bare(lock="1\n")
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    lab.others_push(project, "report", "theirs\n")
    steps = []
    verify = "echo checking; echo changed >> lock; test -e report || echo mine > report; ! grep theirs report"
    error = lab.fails(sandbox, "verify_failed", verify=verify, on_step=steps.append)
    assert "checking" in str(error) and steps == ["commit", "verify", "push", "rebase", "verify"]
    assert "theirs" in str(error), "what the first verify left in the tree did not stop the rebase"
    assert lab.subjects(bare) == ["add lock", "add report"]
    lab.git(sandbox.path, "checkout", "-q", "lock")
    lab.git(sandbox.path, "rm", "-q", "report")
    result = lab.finish(sandbox, verify=verify)
    assert messages(result.commits) == ["add a", AUTOCOMMIT] and result.rebased
    assert result.changestats == {"files_changed": 2, "insertions": 1, "deletions": 1}
    assert lab.git(bare, "show", "main:lock") == "1"


def test_a_rebase_conflict_keeps_the_sandbox_and_names_the_way_on(lab):
    project, bare = lab.with_bare("my project")
    lab.boxes = lab.root / "my boxes"
    sandbox = lab.sandbox(project)
    mine = lab.agent_commit(sandbox, "readme", "mine\n")
    lab.others_push(project, "readme", "theirs\n")
    theirs = lab.git(bare, "rev-parse", "main")
    error = lab.fails(sandbox, "push_failed")
    assert "Merge conflict in readme" in str(error)
    assert lab.git(bare, "rev-parse", "main") == theirs, "nothing was forced"
    assert lab.git(sandbox.path, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert lab.git(sandbox.path, "rev-parse", "HEAD") == mine and lab.git(sandbox.path, "status", "--porcelain") == ""
    assert messages(c.new_commits(sandbox, lab.env)) == ["add readme"]
    assert "-hello\n+mine" in c.sandbox_diff(sandbox.path, lab.env)
    assert str(lab.fails(sandbox, "push_failed")) == str(error), "once more, the same"
    begin, end = str(error).split("by hand: ")[1].split(", then ")[0], str(error).split(", then ")[1].split(")")[0]
    begin = begin.split(", mend")[0]
    assert f"cd '{sandbox.path}'" in begin
    script = f"{begin}; echo both > readme; git add -A; git -c core.editor=true rebase --continue && {end}"
    done = subprocess.run(["sh", "-c", script], env=lab.person, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lab.git(bare, "show", "main:readme") == "both" and lab.git(bare, "rev-parse", "main~1") == theirs


def test_changes_that_somebody_else_made_too_leave_nothing_to_push(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a", "same\n", message="mine")
    lab.others_push(project, "a", "same\n", message="theirs")
    result = lab.finish(sandbox)
    assert result.commits == [] and result.pushed_branch == "" and "already in main" in result.note
    assert result.changestats is None and lab.subjects(bare) == ["add readme", "theirs"]


def test_history_that_its_owner_rewrote_does_not_come_back(lab):
    project, bare = lab.with_bare(a="1\n", secret="oops\n")
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "b")
    lab.git(bare, "update-ref", "refs/heads/main", "main~1")
    os.unlink(project / "secret")
    lab.others_push(project, "c")
    assert messages(lab.finish(sandbox).commits) == ["add b"] and lab.subjects(bare) == ["add a", "add c", "add b"]


def test_a_push_that_the_source_refuses_is_push_failed_with_its_words(lab):
    project, bare = lab.with_bare()
    (bare / "hooks").mkdir()
    (bare / "hooks" / "pre-receive").write_text("#!/bin/sh\necho policy says no >&2\nexit 1\n")
    (bare / "hooks" / "pre-receive").chmod(0o755)
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    steps = []
    error = lab.fails(sandbox, "push_failed", attempts=2, on_step=steps.append)
    assert steps == ["commit", "push", "rebase", "push"]
    assert "policy says no" in str(error) and sandbox.path in str(error) and lab.subjects(bare) == ["add readme"]


def test_attempts_are_bounded_when_others_always_come_first(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    count = []

    def somebody_pushes(name):
        if name == "push":
            lab.others_push(project, f"other{len(count)}")
            count.append(name)
    lab.fails(sandbox, "push_failed", attempts=2, on_step=somebody_pushes)
    assert len(count) == 2 and "add a" not in lab.subjects(bare)
    assert lab.finish(sandbox).rebased and lab.subjects(bare)[-1] == "add a"


def test_a_hook_that_carries_large_files_runs_at_the_push(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    hook = sandbox.path + "/.git/hooks/pre-push"
    os.makedirs(os.path.dirname(hook), exist_ok=True)
    with open(hook, "w") as file:
        file.write("#!/bin/sh\ntouch \"$GIT_DIR/carried\"\n")
    os.chmod(hook, 0o755)
    lab.agent_commit(sandbox, "a")
    lab.finish(sandbox)
    assert os.path.exists(sandbox.path + "/.git/carried")


def test_waiting_for_another_task_is_told_and_can_be_stopped(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    held, steps = c._acquire_lock(sandbox.path, sandbox.source, lambda: None), []
    deadline = threading.Timer(5, held.close)
    deadline.start()

    def cancelled(name):
        steps.append(name)
        if steps.count("waiting") == 2:
            raise InterruptedError
    with pytest.raises(InterruptedError):
        lab.finish(sandbox, on_step=cancelled)
    assert "push" not in steps
    deadline.cancel()
    held.close()
    assert lab.finish(sandbox).pushed_branch == "main"


# -- killed in the middle, called again


class Killed(SystemExit):
    """Stops ``finish_sandbox`` like a SIGKILL: what it would still write is undone by ``killed_at``."""


def killed_at(lab, sandbox, step, **options):
    """The sandbox as a daemon killed at ``step`` leaves it."""
    marker = Path(sandbox.path) / ".git" / "claudomator-commit"

    def on_step(name):
        if name == step:
            raise Killed(marker.read_text())
    with pytest.raises(Killed) as caught:
        lab.finish(sandbox, on_step=on_step, **options)
    marker.write_text(str(caught.value))


def test_called_again_after_the_autocommit_it_does_not_commit_what_the_build_made(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\techo x > product\n"})
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    killed_at(lab, sandbox, "push")
    assert messages(lab.finish(sandbox).commits) == [AUTOCOMMIT]
    assert lab.files(bare) == ["Makefile", "a"] and os.path.exists(sandbox.path + "/product")


def test_called_again_after_staging_it_builds_and_commits_only_what_was_staged(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    killed_at(lab, sandbox, "build", build="true")
    lab.write(sandbox, "half-a-product")
    for name in ("index.lock", "HEAD.lock", "refs/heads/main.lock"):  # as a killed git leaves them
        lab.write(sandbox, ".git/" + name, "")
    assert messages(lab.finish(sandbox).commits) == [AUTOCOMMIT]
    assert lab.files(bare) == ["a", "readme"]
    lab.write(sandbox, "b")
    lab.env[c.MARK] = "execution-2"
    assert messages(lab.finish(sandbox).commits) == [AUTOCOMMIT, AUTOCOMMIT], "another run is no repeated call"
    assert lab.files(bare) == ["a", "b", "half-a-product", "readme"]


def test_called_again_after_the_push_it_returns_the_same(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.others_push(project, "o")
    lab.agent_commit(sandbox, "a")
    lab.write(sandbox, "b")
    verify = "date >> report"
    first = lab.finish(sandbox, verify=verify)
    head = lab.git(bare, "rev-parse", "main")
    assert first.rebased and len(first.commits) == 2
    assert lab.finish(sandbox, verify=verify) == first and lab.git(bare, "rev-parse", "main") == head
    lab.others_push(project, "later")
    assert lab.finish(sandbox, verify=verify) == first, "others have gone on from there"
    assert lab.subjects(bare)[-1] == "add later"


@pytest.mark.parametrize("when,on_branch", [("before", False), ("torn", True), ("done", False)])
def test_called_again_in_the_middle_of_its_own_rebase_it_starts_it_over(lab, when, on_branch):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    if not on_branch:
        lab.git(sandbox.path, "checkout", "-q", "--detach")
    lab.agent_commit(sandbox, "a")
    lab.agent_commit(sandbox, "b")
    lab.others_push(project, "theirs")
    head = lab.git(sandbox.path, "rev-parse", "HEAD")
    # what _Finish.rebase has done up to there
    lab.git(sandbox.path, "fetch", "-q", str(bare), "refs/heads/main")
    base = lab.git(sandbox.path, "rev-parse", "FETCH_HEAD")
    lab.write(sandbox, ".git/claudomator-base", base)
    lab.write(sandbox, ".git/claudomator-rebase", "main" if on_branch else head)
    if when == "torn":
        lab.git(sandbox.path, "rebase", "-q", "--exec", "false", base, check=False)
        os.unlink(sandbox.path + "/.git/rebase-merge/head-name")
        lab.write(sandbox, ".git/index.lock", "")
        lab.write(sandbox, "a", "half\n")
    if when == "done":
        lab.git(sandbox.path, "rebase", "-q", base)
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["add a", "add b"] and result.rebased
    assert lab.subjects(bare) == ["add readme", "add theirs", "add a", "add b"]
    assert not os.path.exists(sandbox.path + "/.git/claudomator-rebase")


@pytest.mark.slow
def test_killed_at_any_moment_and_called_again_the_work_arrives_once(lab):
    """Real SIGKILLs: a process finishes the sandbox and is killed, with its git, after a random time."""
    project, bare = lab.with_bare(**{"Makefile": "build:\n\techo x > product\n"})
    rng, expected = random.Random(7), ["Makefile"]
    script = ("import sys, os, claudomator as c; "
              "c.finish_sandbox(c.open_sandbox(sys.argv[1]), env=dict(os.environ), verify='echo r >> report')")
    path = os.path.dirname(os.path.abspath(c.__file__))
    for at in range(3):
        box = lab.sandbox(project, f"k{at}")
        lab.agent_commit(box, f"one{at}")
        lab.write(box, f"two{at}")
        (project / f"one{at - 1}").write_text("work\n")  # what arrived so far, for the commit straight into the bare one
        (project / f"two{at - 1}").write_text("work\n")
        if at == 0:
            os.unlink(project / "one-1")
            os.unlink(project / "two-1")
        lab.others_push(project, f"theirs{at}")
        env = {**lab.env, c.MARK: f"kill-{at}-{os.getpid()}", "PYTHONPATH": path}
        child = subprocess.Popen([sys.executable, "-c", script, box.path], env=env)
        try:
            child.wait(0.08 + rng.random() * 0.2)
        except subprocess.TimeoutExpired:
            pass
        child.kill()
        child.wait()
        deadline = time.monotonic() + 10
        while c.signal_marked([f"kill-{at}-{os.getpid()}"], 9):
            assert time.monotonic() < deadline
        result = c.finish_sandbox(box, env=env, verify="echo r >> report")
        assert messages(result.commits) == [f"add one{at}", AUTOCOMMIT]
        assert result.changestats == {"files_changed": 2, "insertions": 2, "deletions": 0}
        expected += [f"one{at}", f"two{at}", f"theirs{at}"]
    assert lab.files(bare) == sorted(expected)
    assert len(lab.subjects(bare)) == 1 + 3 * 3


# -- removing


@pytest.fixture
def open_place():
    """A directory that another user can reach, as pytest's own are not."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def test_removing_opens_read_only_directories_and_does_not_follow_links(open_place):
    root, outside = open_place / "boxes", open_place / "outside"
    (root / "s" / "mod" / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "keep").write_text("x")
    outside.chmod(0o500)
    (root / "s" / "mod" / "deep" / "file").write_text("x")
    (root / "s" / "link").symlink_to(outside)
    (root / "link").symlink_to(outside)
    for name in ("s/mod/deep/file", "s/mod/deep", "s/mod", "s"):
        (root / name).chmod(0o400 if name.endswith("file") else 0o500)
    if os.geteuid() == 0:  # permissions mean nothing to root, so another user does it
        subprocess.run(["chown", "-R", "65534:65534", str(open_place)], check=True)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            c.remove_sandbox(str(root / "s"), str(root))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not (root / "s").exists() and (outside / "keep").exists() and stat.S_IMODE(outside.stat().st_mode) == 0o500
    c.remove_sandbox(str(root / "link"), str(root))
    assert not (root / "link").is_symlink() and (outside / "keep").exists()
    c.remove_sandbox(str(root / "gone"), str(root))
    outside.chmod(0o700)


@pytest.mark.parametrize("path", ["../outside", ".", "..", "link/inside", "/etc/passwd"])
def test_nothing_outside_the_root_is_removed(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside" / "inside").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(c.SandboxError, match="not below"):
        c.remove_sandbox(os.path.join(root, path), str(root))
    assert (tmp_path / "outside" / "inside").is_dir() and root.is_dir()


def test_a_tree_deeper_than_python_recurses_is_removed_as_well(tmp_path):
    top = tmp_path / "root" / "s"
    top.mkdir(parents=True)
    deep = os.open(top, os.O_PATH)
    for _ in range(1500):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_PATH, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    c.remove_sandbox(str(top), str(top.parent))
    assert not top.exists()
