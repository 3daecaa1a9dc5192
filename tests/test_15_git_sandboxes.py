"""Git sandboxes with real git and real repositories (section 15)."""
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


@pytest.fixture
def env(tmp_path):
    """A host with nothing but PATH and an empty home: no identity, no git configuration."""
    home = tmp_path / "home"
    home.mkdir()
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

    def commit(self, where, name, text="x\n", message=None):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
        self.git(where, "add", "-A")
        self.git(where, "commit", "-q", "-m", message or f"add {name}")
        head = where / ".git" / "HEAD"
        if head.exists() and head.read_text().startswith("ref: "):
            head = where / ".git" / head.read_text()[5:].strip()
        return head.read_text().strip() if head.exists() else ""

    def project(self, name="project", branch="main", **files):
        where, files = self.root / name, files or {"readme": "hello\n"}
        key = (branch, *files.items())
        if key not in self.templates or not self.templates[key].is_dir():
            template = self.templates[key] = self.root / f"template-{len(self.templates)}"
            self.git(self.root, "init", "-q", "-b", branch, str(template))
            for file, text in files.items():
                self.commit(template, file, text)
        shutil.copytree(self.templates[key], where)
        return where

    def with_bare(self, name="project", branch="main", remote="origin", **files):
        """(working copy, bare repository that is its remote)."""
        where, bare = self.project(name, branch, **files), self.root / (name + ".git")
        shutil.copytree(where / ".git", bare)
        with open(where / ".git" / "config", "a") as config:
            config.write(f'[remote "{remote}"]\n\turl = "{quoted(bare)}"\n'
                         f"\tfetch = +refs/heads/*:refs/remotes/{remote}/*\n")
        self.git(bare, "config", "core.bare", "true")
        return where, bare

    def sandbox(self, project, name="s1", **options):
        return c.create_sandbox(str(project), str(self.boxes / name), env=self.env, **options)

    def finish(self, sandbox, **options):
        options = {"pause_s": 0.02, "timeout_s": 60.0, **options}
        return c.finish_sandbox(sandbox, env=self.env, **options)

    def write(self, sandbox, name, text="work\n"):
        with open(os.path.join(sandbox.path, name), "w") as file:
            file.write(text)

    def agent_commit(self, sandbox, name, text="work\n", message=None):
        return self.commit(Path(sandbox.path), name, text, message)

    def subjects(self, where, branch="main"):
        return self.git(where, "log", "--format=%s", branch).splitlines()[::-1]

    def fails(self, sandbox, reason, **options):
        with pytest.raises(c.SandboxError) as caught:
            self.finish(sandbox, **options)
        assert caught.value.reason == reason, str(caught.value)
        assert os.path.isdir(sandbox.path), "a failure keeps the sandbox"
        return caught.value


def quoted(path):
    return str(path).replace("\\", "\\\\").replace('"', '\\"')


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


def test_only_the_last_bytes_of_the_output_are_kept_and_the_log_has_all(env, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    result = run(env, "seq 1 20000; echo last", keep_bytes=100, log_path=str(log))
    assert len(result.output) == 100 and result.output.endswith("20000\nlast\n")
    assert log.read_text().startswith("before\n1\n2\n") and len(log.read_text()) > 100000
    assert run(env, "true", log_path=str(log)).output == "", "what was in the log before is not this command's output"


def test_a_quiet_commands_stderr_counts_only_where_it_fails(env):
    assert run(env, "echo warning >&2; echo fact", quiet=True).output == "fact\n"
    assert run(env, "echo why >&2; echo fact; exit 1", quiet=True).output == "fact\nwhy\n"


def test_a_new_log_is_private(env, tmp_path):
    run(env, "echo x", log_path=str(tmp_path / "log"))
    assert stat.S_IMODE(os.stat(tmp_path / "log").st_mode) == 0o600


def test_a_timeout_ends_the_whole_group_even_one_that_ignores_sigterm(env, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "STOP_WAIT_S", 0.2)
    began = time.monotonic()
    result = run(env, f"trap '' TERM; sh -c \"trap '' TERM; echo \\$\\$ > {tmp_path}/pid; sleep 60; sleep 60\" & "
                      f"while ! [ -s {tmp_path}/pid ]; do sleep 0.01; done; echo up; wait; sleep 60", timeout_s=1.0)
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
    thread = threading.Thread(target=lambda: done.append(run({**env, c.MARK: "to-be-cancelled"}, "sleep 60")))
    thread.start()
    deadline = time.monotonic() + 10
    while not c.marked_processes(["to-be-cancelled"]):
        assert time.monotonic() < deadline
    while thread.is_alive() and time.monotonic() < deadline:
        c.signal_marked(["to-be-cancelled"], 9)
        thread.join(0.01)
    assert done[0].exit_code < 0 and not done[0].timed_out


def test_a_program_that_is_not_there_is_a_result_and_no_exception(env, tmp_path):
    result = c.run_command(["no-such-program"], env=env)
    assert result.exit_code == 127 and "no-such-program" in result.output
    assert run(env, "true", cwd=str(tmp_path / "gone")).exit_code == 127


def test_without_git_the_error_says_so(lab):
    project = lab.project()
    with pytest.raises(c.SandboxError, match="cannot run git"):
        c.create_sandbox(str(project), str(lab.boxes / "s1"), env={**lab.env, "PATH": "/nowhere"})


# -- clone sources


def test_the_source_is_remote_local_before_origin_before_the_project(lab):
    project = lab.project()
    assert c.clone_source(str(project), lab.env) == str(project)
    lab.git(project, "remote", "add", "origin", str(lab.root / "o.git"))
    assert c.clone_source(str(project), lab.env) == str(lab.root / "o.git")
    lab.git(project, "remote", "add", "local", f"file://{lab.root}/l.git")
    assert c.clone_source(str(project), lab.env) == f"file://{lab.root}/l.git"


@pytest.mark.parametrize("url", ["https://example.com/x.git", "http://x/y", "ssh://git@host/x", "git://host/x",
                                 "git@host:x.git", "host:/srv/x", "~/x.git", "ext::sh -c x/y"])
def test_a_network_remote_is_never_a_source(lab, url):
    project = lab.project()
    lab.git(project, "remote", "add", "local", url)
    lab.git(project, "remote", "add", "origin", url)
    assert c.clone_source(str(project), lab.env) == str(project)


def test_a_network_local_falls_back_to_a_path_origin(lab):
    project = lab.project()
    lab.git(project, "remote", "add", "local", "git@host:x")
    lab.git(project, "remote", "add", "origin", "/srv/x.git")
    assert c.clone_source(str(project), lab.env) == "/srv/x.git"


@pytest.mark.parametrize("url", ["../o.git", "./../o.git", "../o.git/"])
def test_a_relative_remote_is_relative_to_the_repository_even_from_a_subdirectory(lab, url):
    project = lab.project(**{"sub/file": "x\n"})
    lab.git(project, "remote", "add", "origin", url)
    assert c.clone_source(str(project / "sub"), lab.env) == str(lab.root / "o.git")


@pytest.mark.parametrize("remote,form", [("local", "{}"), ("origin", "{}"), ("origin", "file://{}")])
def test_commits_arrive_in_the_remote_that_was_cloned(lab, remote, form):
    project, bare = lab.with_bare(remote=remote)
    lab.git(project, "remote", "set-url", remote, form.format(bare))
    before = snapshot(project)
    sandbox = lab.sandbox(project)
    assert (sandbox.source, sandbox.branch) == (form.format(bare), "main")
    assert lab.git(sandbox.path, "remote", "get-url", "origin") == sandbox.source
    first, second = lab.agent_commit(sandbox, "a"), lab.agent_commit(sandbox, "b")
    result = lab.finish(sandbox)
    assert result.commits == [{"hash": first, "message": "add a"}, {"hash": second, "message": "add b"}]
    assert (result.pushed_branch, result.rebased, result.note) == ("main", False, "")
    assert result.changestats == {"files_changed": 2, "insertions": 2, "deletions": 0}
    assert lab.git(bare, "rev-parse", "main") == second
    assert snapshot(project) == before


def test_the_project_itself_as_source_gets_a_branch_beside_the_checked_out_one(lab):
    project = lab.project()
    (project / "readme").write_text("the developer is editing\n")
    (project / "new").write_text("untracked\n")
    before, head = snapshot(project), lab.git(project, "rev-parse", "main")
    sandbox = lab.sandbox(project)
    assert (sandbox.source, sandbox.start_head) == (str(project), head)
    commit = lab.agent_commit(sandbox, "a")
    result = lab.finish(sandbox)
    assert result.pushed_branch == "claudomator/s1" and "main is checked out" in result.note
    assert lab.git(project, "rev-parse", "claudomator/s1") == commit
    assert lab.git(project, "rev-parse", "main") == head and snapshot(project) == before
    assert lab.git(project, "config", "--get", "receive.denyCurrentBranch", check=False) == ""


def test_a_project_that_went_on_meanwhile_is_no_conflict_for_the_branch_beside_it(lab):
    project = lab.project()
    sandbox = lab.sandbox(project)
    commit = lab.agent_commit(sandbox, "readme", "agent\n")
    lab.commit(project, "readme", "developer\n")
    result = lab.finish(sandbox)
    assert (result.pushed_branch, result.rebased) == ("claudomator/s1", False)
    assert lab.git(project, "rev-parse", "claudomator/s1") == commit


def test_an_owner_who_allows_pushes_to_the_checked_out_branch_gets_them_there(lab):
    project = lab.project()
    lab.git(project, "config", "receive.denyCurrentBranch", "updateInstead")
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "main" and (project / "a").exists()


def test_a_branch_checked_out_in_a_linked_worktree_is_not_touched_either(lab):
    project, bare = lab.with_bare()
    lab.git(bare, "worktree", "add", "-q", str(lab.root / "tree"), "main")
    before = snapshot(lab.root / "tree")
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "claudomator/s1" and snapshot(lab.root / "tree") == before


def test_a_bare_repository_as_project_is_its_own_source(lab):
    _, bare = lab.with_bare()
    sandbox = lab.sandbox(bare)
    assert sandbox.source == str(bare)
    commit = lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "main" and lab.git(bare, "rev-parse", "main") == commit


def test_a_named_source_needs_no_project(lab):
    _, bare = lab.with_bare()
    sandbox = c.create_sandbox("", str(lab.boxes / "s1"), env=lab.env, source=str(bare))
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "main"


def test_a_remote_with_another_default_name_on_the_host_is_still_origin(lab):
    lab.root.joinpath("home/.gitconfig").write_text("[clone]\n\tdefaultRemoteName = upstream\n")
    project, bare = lab.with_bare()
    assert lab.git(lab.sandbox(project).path, "remote") == "origin"


def test_a_source_that_cannot_be_copied_file_by_file_is_cloned_all_the_same(lab):
    """Copying fails where another task pushes to the source meanwhile; a link among the objects stands in for that."""
    project, bare = lab.with_bare()
    (bare / "objects" / "link").symlink_to("/etc")
    copy = subprocess.run(["git", "clone", "-q", str(bare), str(lab.root / "copy")], env=lab.env, capture_output=True)
    assert copy.returncode != 0
    assert lab.sandbox(project).start_head


def test_a_source_that_is_gone_is_a_clear_error(lab):
    project = lab.project()
    lab.git(project, "remote", "add", "origin", "/no/such.git")
    with pytest.raises(c.SandboxError, match="git clone of /no/such.git failed") as caught:
        lab.sandbox(project)
    assert caught.value.reason == "sandbox_failed" and not (lab.boxes / "s1").exists()


@pytest.mark.parametrize("project", ["/no/such", "relative", "/etc/passwd", ""])
def test_a_project_dir_that_is_no_directory_is_named(lab, project):
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


def test_an_empty_directory_becomes_a_repository(lab):
    (lab.root / "plain").mkdir()
    assert lab.sandbox(lab.root / "plain").start_head


def test_two_tasks_on_one_plain_directory_make_one_repository(lab):
    plain = lab.root / "plain"
    plain.mkdir()
    (plain / "a").write_text("a\n")
    boxes = in_threads([lambda at=at: lab.sandbox(plain, f"s{at}") for at in range(4)])
    assert len({box.start_head for box in boxes}) == 1 and lab.subjects(plain, "HEAD") == ["chore: initial commit"]


def test_a_repository_whose_first_commit_was_cut_by_a_kill_is_mended(lab):
    plain = lab.root / "plain"
    (plain / ".git").mkdir(parents=True)
    (plain / "a").write_text("a\n")
    (plain / ".git" / "claudomator-init").write_text("")
    assert lab.sandbox(plain).start_head
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
    project = lab.project()
    (project / ".git" / "HEAD").unlink()
    before = sorted(os.listdir(project / ".git"))
    with pytest.raises(c.SandboxError, match="cannot read the repository"):
        lab.sandbox(project)
    assert sorted(os.listdir(project / ".git")) == before


def test_a_subdirectory_of_a_repository_starts_the_agent_in_the_same_subdirectory(lab):
    project, bare = lab.with_bare(**{"svc/api/main": "x\n", "svc/Makefile": "build:\n\ttouch built-here\n"})
    sandbox = lab.sandbox(project / "svc" / "api")
    assert sandbox.workdir == os.path.join(sandbox.path, "svc/api") and sandbox.source == str(bare)
    assert c.open_sandbox(sandbox.path).workdir == sandbox.workdir
    lab.write(sandbox, "top", "found too\n")
    result = lab.finish(sandbox, verify="pwd > ../../where")
    assert [commit["message"] for commit in result.commits] == [AUTOCOMMIT]
    assert open(sandbox.path + "/where").read().strip() == sandbox.workdir
    assert "top" in lab.git(bare, "ls-tree", "-r", "--name-only", "main").split()


def test_a_directory_that_an_outer_repository_does_not_track_is_a_project_of_its_own(lab):
    outer = lab.project("outer")
    (outer / "mine").mkdir()
    (outer / "mine" / "file").write_text("x\n")
    sandbox = lab.sandbox(outer / "mine")
    assert sorted(os.listdir(sandbox.path)) == [".git", "file"] and (outer / "mine" / ".git").is_dir()


def test_a_linked_worktree_is_cloned_at_its_own_head(lab):
    project = lab.project()
    lab.git(project, "worktree", "add", "-q", "-b", "topic", str(lab.root / "tree"))
    lab.commit(lab.root / "tree", "t")
    commit = lab.git(lab.root / "tree", "rev-parse", "HEAD")
    sandbox = lab.sandbox(lab.root / "tree")
    assert (sandbox.branch, sandbox.start_head) == ("topic", commit)


def test_an_empty_repository_gets_its_branch_from_the_first_push(lab):
    bare, project = lab.root / "e.git", lab.root / "e"
    lab.git(lab.root, "init", "-q", "--bare", "-b", "first", str(bare))
    lab.git(lab.root, "clone", "-q", str(bare), str(project))
    sandbox = lab.sandbox(project)
    assert (sandbox.branch, sandbox.start_head) == ("first", "")
    assert lab.finish(sandbox).commits == [] and c.sandbox_summary(sandbox.path, lab.env)["ahead"] == 0
    assert c.sandbox_diff(sandbox, "", lab.env, 1000) == ""
    lab.env[c.MARK] = "execution-2"
    lab.write(sandbox, "a")
    result = lab.finish(sandbox)
    assert result.pushed_branch == "first" and [x["message"] for x in result.commits] == [AUTOCOMMIT]
    assert result.changestats == {"files_changed": 1, "insertions": 1, "deletions": 0}
    assert lab.git(bare, "log", "--format=%s", "first") == AUTOCOMMIT
    assert "+work" in c.sandbox_diff(sandbox, "", lab.env, 1000)
    assert "+work" in c.commits_diff(str(project), str(bare), [result.commits[0]["hash"]], lab.env, 1000)


def test_two_tasks_in_an_empty_repository_both_arrive(lab):
    bare = lab.root / "e.git"
    lab.git(lab.root, "init", "-q", "--bare", "-b", "main", str(bare))
    one, two = lab.sandbox(bare, "s1"), lab.sandbox(bare, "s2")
    lab.agent_commit(one, "a")
    lab.agent_commit(two, "b")
    lab.finish(one)
    result = lab.finish(two)
    assert result.rebased and [x["message"] for x in result.commits] == ["add b"]
    assert lab.subjects(bare) == ["add a", "add b"]
    assert result.changestats == {"files_changed": 1, "insertions": 1, "deletions": 0}


def test_a_branch_that_is_neither_main_nor_master_is_cloned_rebased_and_pushed(lab):
    project, bare = lab.with_bare(branch="größe/trunk v2".replace(" ", "-"))
    branch = "größe/trunk-v2"
    one, two = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    assert one.branch == branch
    lab.agent_commit(one, "a")
    lab.agent_commit(two, "b")
    assert lab.finish(one).pushed_branch == branch
    result = lab.finish(two)
    assert (result.pushed_branch, result.rebased) == (branch, True)
    assert lab.subjects(bare, branch) == ["add readme", "add a", "add b"]
    assert lab.git(bare, "for-each-ref", "--format=%(refname:short)", "refs/heads") == branch


def test_a_detached_head_is_cloned_at_its_commit_and_pushed_to_a_branch_of_its_own(lab):
    project = lab.project(a="1\n", b="2\n")
    lab.git(project, "checkout", "-q", "HEAD~1")
    head = lab.git(project, "rev-parse", "HEAD")
    before = snapshot(project)
    sandbox = lab.sandbox(project, "run 7.é")
    assert (sandbox.branch, sandbox.start_head) == ("claudomator/run-7--", head) and "detached" in sandbox.note
    commit = lab.agent_commit(sandbox, "c")
    result = lab.finish(sandbox)
    assert result.pushed_branch == "claudomator/run-7--" and "detached" in result.note
    assert lab.git(project, "rev-parse", result.pushed_branch) == commit and snapshot(project) == before


def test_a_bare_repository_whose_head_names_no_branch_uses_the_one_that_is_there(lab):
    project, bare = lab.with_bare(branch="main")
    lab.git(bare, "symbolic-ref", "HEAD", "refs/heads/master")
    sandbox = lab.sandbox(project)
    assert sandbox.branch == "main" and sandbox.start_head and os.path.exists(sandbox.path + "/readme")


def test_with_several_branches_and_a_wrong_head_the_projects_own_branch_is_used_or_asked_for(lab):
    project, bare = lab.with_bare(branch="main")
    lab.git(bare, "branch", "other", "main")
    lab.git(bare, "symbolic-ref", "HEAD", "refs/heads/master")
    assert lab.sandbox(project).branch == "main"
    with pytest.raises(c.SandboxError, match="symbolic-ref HEAD") as caught:
        lab.sandbox(bare, "s2")
    assert "main, other" in str(caught.value)


def test_spaces_and_non_ascii_in_every_path(lab):
    project, bare = lab.with_bare("prøject mit Leer zeichen'\"", **{"dir ü/f ö.txt": "x\n"})
    sandbox = lab.sandbox(project / "dir ü", "sånd böx")
    lab.write(sandbox, "dir ü/neu – 文.txt")
    result = lab.finish(sandbox, verify="test -e 'neu – 文.txt'")
    assert result.pushed_branch == "main" and result.changestats["files_changed"] == 1
    assert "dir ü/neu – 文.txt" in lab.git(bare, "ls-tree", "-r", "-z", "--name-only", "main").split("\0")
    other = lab.sandbox(project, "än other")
    lab.agent_commit(other, "größe")
    lab.agent_commit(sandbox, "zwei")
    lab.finish(other)
    assert lab.finish(sandbox).rebased
    assert lab.subjects(bare)[-2:] == ["add größe", "add zwei"]


# -- preparing


def test_setup_runs_in_the_clone_and_its_output_is_logged(lab, tmp_path):
    project = lab.project(**{".gitignore": "made\n"})
    sandbox = lab.sandbox(project, setup="echo preparing; pwd > made", log_path=str(tmp_path / "log"))
    assert open(sandbox.path + "/made").read().strip() == sandbox.path
    assert (tmp_path / "log").read_text() == "$ echo preparing; pwd > made\npreparing\n"


def test_a_failing_setup_is_sandbox_failed_with_the_outputs_end(lab):
    with pytest.raises(c.SandboxError) as caught:
        lab.sandbox(lab.project(), setup="seq 1 9999; echo no network >&2; exit 7")
    assert caught.value.reason == "sandbox_failed" and str(caught.value).endswith("9999\nno network")
    assert "exit 7" in str(caught.value) and len(str(caught.value)) < 5000


def test_a_setup_out_of_time_says_so(lab):
    with pytest.raises(c.SandboxError, match="ran out of time"):
        lab.sandbox(lab.project(), setup="sleep 30", timeout_s=0.3)


def test_what_an_interrupted_clone_left_is_replaced(lab):
    project = lab.project()
    sandbox = lab.sandbox(project)
    (lab.boxes / "s1" / "junk").write_text("x")
    os.unlink(sandbox.path + "/.git/claudomator.json")
    with pytest.raises(c.SandboxError):
        c.open_sandbox(sandbox.path)
    again = lab.sandbox(project)
    assert again == sandbox and not os.path.exists(sandbox.path + "/junk") and c.open_sandbox(sandbox.path) == sandbox


def test_submodules_are_there_also_nested_ones_and_by_relative_url(lab):
    deep = lab.project("deep")
    lib = lab.project("lib")
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


def test_a_relative_submodule_url_means_what_it_means_in_the_project(lab):
    """The project's origin is on the network, so the project is cloned; its submodule lies beside the origin."""
    hub = lab.root / "hub"
    hub.mkdir()
    lab.project("hub/lib")
    project = lab.project("home/project")
    lab.git(project, "remote", "add", "origin", "https://example.invalid/project")
    lab.git(project, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(hub / "lib"), "lib")
    lab.git(project, "config", "-f", ".gitmodules", "submodule.lib.url", "../lib")
    lab.git(project, "commit", "-q", "-a", "-m", "lib")
    assert lab.git(project, "config", "submodule.lib.url") == str(hub / "lib")
    assert os.path.exists(lab.sandbox(project).path + "/lib/readme")


def test_work_inside_a_submodule_is_never_lost_silently(lab):
    lib = lab.project("lib")
    project, bare = lab.with_bare()
    lab.git(project, "submodule", "add", "-q", str(lib), "lib")
    lab.git(project, "commit", "-q", "-m", "lib")
    lab.git(project, "push", "-q", "origin", "main")
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "lib/readme", "changed\n")
    assert "inside submodules (lib)" in str(lab.fails(sandbox, "push_failed"))
    lab.git(sandbox.path + "/lib", "commit", "-q", "-a", "-m", "inner")
    assert "lib" in str(lab.fails(sandbox, "push_failed")), "the commit is nowhere but here"
    assert lab.subjects(bare) == ["add readme", "lib"]


@needs_root
def test_a_repository_of_another_user_is_cloned_and_pushed_to(lab):
    lib = lab.project("lib")
    project, bare = lab.with_bare()
    lab.git(project, "submodule", "add", "-q", "../lib", "lib")
    lab.git(project, "commit", "-q", "-m", "lib")
    lab.git(project, "push", "-q", "origin", "main")
    for where in (lib, project, bare):
        subprocess.run(["chown", "-R", "12345:12345", str(where)], check=True)
    plain_git = subprocess.run(["git", "-C", str(project), "status"], env=lab.env, capture_output=True, text=True)
    assert "dubious ownership" in plain_git.stderr
    one, two = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    assert os.path.exists(one.path + "/lib/readme")
    lab.write(one, "a")
    lab.write(two, "b")
    assert lab.finish(one).pushed_branch == "main" and lab.finish(two).rebased
    assert lab.git(bare, "rev-list", "--count", "main") == "4"
    agent = {**lab.env, **c.agent_git_env(lab.env, two.workdir)}
    assert subprocess.run(["git", "-C", one.path, "fetch"], env=agent).returncode == 0
    assert subprocess.run(["git", "-C", str(project), "status"], env=agent, stdout=subprocess.DEVNULL).returncode == 0


@needs_root
def test_a_plain_clone_of_another_users_project_gets_a_branch(lab):
    project = lab.project()
    subprocess.run(["chown", "-R", "12345:12345", str(project)], check=True)
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "claudomator/s1"


# -- the host's configuration and environment


def hostile_host(lab):
    """A home as developers have it: signing with a program that fails, hooks that refuse, colours, odd defaults."""
    hooks = lab.root / "home" / "hooks"
    hooks.mkdir()
    for name in ("pre-commit", "commit-msg", "pre-rebase", "post-checkout"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    (lab.root / "home" / ".gitconfig").write_text(
        "[commit]\n\tgpgsign = true\n[tag]\n\tgpgsign = true\n[push]\n\tgpgSign = false\n\trecurseSubmodules = only\n"
        "[gpg]\n\tprogram = /bin/false\n[user]\n\tsigningkey = ABC\n\tuseConfigOnly = true\n"
        "[log]\n\tshowSignature = true\n"
        f"[core]\n\thooksPath = {hooks}\n\tquotePath = true\n[color]\n\tui = always\n[diff]\n\tnoprefix = true\n"
        "\texternal = /bin/false\n[status]\n\tshowUntrackedFiles = no\n[init]\n\tdefaultBranch = fromconfig\n"
        "[rebase]\n\tautoSquash = true\n\tautoStash = true\n[submodule]\n\trecurse = true\n"
        "[i18n]\n\tlogOutputEncoding = latin1\n")


def test_signing_hooks_and_tastes_of_the_host_do_not_matter(lab):
    project, bare = lab.with_bare(**{"f": "1\n", "ä": "1\n"})
    plain = lab.root / "plain"
    plain.mkdir()
    hostile_host(lab)
    assert lab.sandbox(plain, "p").branch == "fromconfig"
    one, two = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    lab.write(one, "a")
    lab.write(two, "b")
    assert lab.finish(one).pushed_branch == "main"
    agent = {**lab.env, **c.agent_git_env(lab.env, two.workdir), "GIT_CONFIG_GLOBAL": "/dev/null"}
    script = "echo 2 >>f; echo 2 >>ä; git commit -qam 'zweite größe'"
    subprocess.run(["sh", "-c", script], cwd=two.workdir, env=agent, check=True)
    assert c.sandbox_diff(two, two.start_head, lab.env, 9999).startswith("diff --git a/f b/f\n")
    result = lab.finish(two)
    assert [commit["message"] for commit in result.commits] == ["zweite größe", AUTOCOMMIT] and result.rebased
    assert result.changestats == {"files_changed": 3, "insertions": 3, "deletions": 0}
    assert lab.git(bare, "--no-pager", "log", "-1", "--format=%an %ae %G?", "main") == \
        "Claudomator claudomator@localhost N"


def test_an_agent_can_commit_on_a_host_that_signs_and_knows_no_identity(lab):
    (lab.root / "home" / ".gitconfig").write_text("[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = /bin/false\n"
                                                  "[user]\n\tuseConfigOnly = true\n")
    repo = lab.root / "r"
    subprocess.run(["git", "init", "-q", str(repo)], env=lab.env, check=True)
    settings = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "x.y", "GIT_CONFIG_VALUE_0": "z"}
    agent = {**lab.env, **settings, **c.agent_git_env({**lab.env, **settings}, str(repo))}
    subprocess.run(["git", "commit", "-q", "--allow-empty", "-m", "x"], cwd=repo, env=agent, check=True)
    assert subprocess.run(["git", "config", "x.y"], env=agent, capture_output=True, text=True).stdout == "z\n"
    assert not {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"} & agent.keys()


def test_a_configured_identity_is_kept_and_only_what_is_missing_is_filled(lab):
    (lab.root / "home" / ".gitconfig").write_text("[user]\n\tname = Zoë Host\n")
    project, bare = lab.with_bare()
    found = c.agent_git_env(lab.env, str(project))
    assert {name for name in found if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER"))} == \
        {"GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"}
    assert "GIT_AUTHOR_EMAIL" not in c.agent_git_env({**lab.env, "GIT_AUTHOR_EMAIL": "me@x"}, str(project))
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    lab.finish(sandbox)
    assert lab.git(bare, "log", "-1", "--format=%an %ae %cn", "main") == "Zoë Host claudomator@localhost Zoë Host"


def test_variables_of_an_outer_git_change_nothing(lab):
    outer = lab.project("outer")
    before = lab.git(outer, "log", "--format=%H"), snapshot(outer)
    lab.env.update({"GIT_DIR": f"{outer}/.git", "GIT_WORK_TREE": str(outer), "GIT_INDEX_FILE": f"{outer}/.git/index",
                    "GIT_PREFIX": "sub/", "GIT_OBJECT_DIRECTORY": f"{outer}/.git/objects", "GIT_TRACE": "1",
                    "GIT_CONFIG_PARAMETERS": "'core.bare'='true'", "GIT_CONFIG_COUNT": "x",
                    "GIT_CEILING_DIRECTORIES": "/", "GIT_LITERAL_PATHSPECS": "1", "GIT_EDITOR": "false",
                    "GIT_EXTERNAL_DIFF": "false"})
    project, bare = lab.root / "project", lab.root / "project.git"
    clean = Lab(lab.root, {"PATH": lab.env["PATH"], "HOME": lab.env["HOME"]})
    project, bare = clean.with_bare()
    one, two = lab.sandbox(project, "s1"), lab.sandbox(project, "s2", setup="git rev-parse --show-toplevel")
    lab.write(one, "a")
    lab.write(two, "b")
    lab.finish(one)
    result = lab.finish(two, verify="test \"$(git rev-parse --show-toplevel)\" = \"$PWD\"")
    assert result.rebased and clean.subjects(bare) == ["add readme", AUTOCOMMIT, AUTOCOMMIT]
    assert (clean.git(outer, "log", "--format=%H"), snapshot(outer)) == before


def test_a_sandbox_that_lost_its_git_directory_never_falls_through_to_an_outer_repository(lab):
    outer = lab.project("data")  # the sandboxes lie in lab.root/data
    before = lab.git(outer, "rev-parse", "HEAD")
    for name, damage in (("s1", "rm -rf .git"), ("s2", "rm .git/HEAD")):
        sandbox = lab.sandbox(lab.project("p" + name), name)
        lab.write(sandbox, "a")
        subprocess.run(["sh", "-c", damage], cwd=sandbox.path, check=True)
        message = str(lab.fails(sandbox, "sandbox_failed"))
        assert "no git repository any more" in message or "not a git repository" in message
        assert c.sandbox_summary(sandbox.path, lab.env) == {"branch": None, "ahead": None, "dirty": None}
    assert lab.git(outer, "rev-parse", "HEAD") == before


# -- what a success leaves: autocommit, build gate, verify


def test_what_the_agent_left_uncommitted_is_committed(lab):
    project, bare = lab.with_bare(old="old\n", gone="x\n", **{".gitignore": "ignored\n"})
    sandbox = lab.sandbox(project)
    for name in ("new", "ignored", "old", "with\nnewline"):
        lab.write(sandbox, name)
    os.unlink(sandbox.path + "/gone")
    result = lab.finish(sandbox)
    assert [commit["message"] for commit in result.commits] == [AUTOCOMMIT]
    assert result.changestats == {"files_changed": 4, "insertions": 3, "deletions": 2}
    assert lab.git(bare, "ls-tree", "-z", "--name-only", "main").strip("\0").split("\0") == \
        [".gitignore", "new", "old", "with\nnewline"]


def test_without_changes_nothing_is_committed_or_pushed_but_verify_still_counts(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\tfalse\n"})
    head = lab.git(bare, "rev-parse", "main")
    sandbox = lab.sandbox(project)
    assert lab.finish(sandbox, verify="true") == c.SandboxResult([], None, "", False, "")
    lab.fails(sandbox, "verify_failed", verify="false")
    assert lab.git(bare, "rev-parse", "main") == head


def test_commits_of_the_agent_alone_need_no_build(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\tfalse\n"})
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    assert lab.finish(sandbox).pushed_branch == "main"


def test_a_failing_build_stops_the_autocommit_and_nothing_is_pushed(lab, tmp_path):
    project, bare = lab.with_bare(**{"Makefile": "all:\n\nbuild:\n\t@echo broken at line 3; exit 4\n"})
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    lab.write(sandbox, "b")
    error = lab.fails(sandbox, "build_failed", log_path=str(tmp_path / "log"))
    assert "broken at line 3" in str(error) and "make build" in str(error) and "broken" in error.data["output"]
    assert error.data["sandbox"] == sandbox.path and "broken at line 3" in (tmp_path / "log").read_text()
    assert lab.subjects(bare) == ["add Makefile"] and AUTOCOMMIT not in lab.subjects(sandbox.path, "HEAD")
    lab.write(sandbox, "Makefile", "build:\n\ttrue\n")
    assert [x["message"] for x in lab.finish(sandbox).commits] == ["add a", AUTOCOMMIT]
    assert lab.git(bare, "show", "main:Makefile") == "build:\n\ttrue", "what the agent mended afterwards is in it"


def test_a_build_that_passes_lets_the_work_through_and_its_products_stay_out(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\techo product > product\n"})
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    lab.finish(sandbox)
    assert os.path.exists(sandbox.path + "/product")
    assert lab.git(bare, "ls-tree", "--name-only", "main").split() == ["Makefile", "a"]


def test_the_projects_build_setting_goes_before_what_the_repository_names(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\tfalse\n"})
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    lab.fails(sandbox, "build_failed", build="exit 9")
    assert lab.finish(sandbox, build="test -e a").pushed_branch == "main"


@pytest.mark.parametrize("files,expected", [
    ({"Makefile": "build:\n\ttrue\n"}, "make build"), ({"makefile": "a b build c: x\n"}, "make build"),
    ({"GNUmakefile": ".PHONY: build\nbuild ::\n"}, "make build"),
    ({"Makefile": "build := x\nbuilder:\nrebuild:\nall: build\n\tbuild: no\n#build:\nbuild-x:\n"}, ""),
    ({"Makefile": "all:\n", "gradlew": "x"}, "sh ./gradlew build"), ({"gradlew": "x", "+x": ""}, "./gradlew build"),
    ({"Makefile": "build:\n", "gradlew": "x"}, "make build"), ({"gradlew": "x", "go.mod": "x"}, "sh ./gradlew build"),
    ({"go.mod": "module x\n", "bin/go": ""}, "go build ./..."), ({"go.mod": "module x\n"}, ""), ({"readme": "x"}, ""),
    ({"sub/": "", "Makefile": "build:\n"}, "make build")])
def test_the_build_is_what_the_repository_names(tmp_path, files, expected):
    (tmp_path / "bin").mkdir()
    for tool in ("make", *(["go"] if "bin/go" in files else [])):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    for name, text in files.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        elif "bin" not in name and name != "+x":
            (tmp_path / name).write_text(text)
    if "+x" in files:
        (tmp_path / "gradlew").chmod(0o755)
    env = {"PATH": str(tmp_path / "bin")}
    assert c.find_build(str(tmp_path / "sub"), str(tmp_path), env)[0] == expected
    if expected == "make build":
        assert c.find_build(str(tmp_path), str(tmp_path), {"PATH": "/nowhere"})[0] != "make build"


def test_verify_runs_on_what_will_be_pushed_and_its_output_comes_back(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a", "wrong\n")
    verify = "git status --porcelain; grep right a || { echo want right; exit 1; }"
    error = lab.fails(sandbox, "verify_failed", verify=verify)
    assert error.data["output"] == "want right\n" and lab.subjects(bare) == ["add readme"]


def test_verify_rounds_go_on_in_the_same_sandbox(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    verify = "date >> report; test -e a && test -e b"
    lab.write(sandbox, "a")
    lab.fails(sandbox, "verify_failed", verify=verify)
    lab.write(sandbox, "b")  # the agent's second round
    result = lab.finish(sandbox, verify=verify)
    assert [x["message"] for x in result.commits] == [AUTOCOMMIT, AUTOCOMMIT] and result.pushed_branch == "main"
    assert {"a", "b"} <= set(lab.git(bare, "ls-tree", "--name-only", "main").split())


def test_a_verify_out_of_time_fails_and_says_so(lab):
    sandbox = lab.sandbox(lab.project())
    assert "ran out of time" in str(lab.fails(sandbox, "verify_failed", verify="sleep 30", timeout_s=0.5))


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
    assert lab.git(bare, "ls-tree", "-r", "--name-only", "main").split() == ["a", "readme"]


# -- which commits are the task's own


def messages(found):
    return [commit["message"] for commit in found]


def test_an_agent_that_switched_branches_amended_or_reset_is_understood(lab):
    project, bare = lab.with_bare(a="1\n", b="2\n")
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
    assert lab.subjects(bare)[-1] == 'odd | subject "x"\t$(y) ü'


def test_an_agent_that_reset_to_before_the_start_pushes_nothing(lab):
    project, bare = lab.with_bare(a="1\n", b="2\n")
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "reset", "-q", "--hard", "HEAD~1")
    assert lab.finish(sandbox).commits == [] and lab.subjects(bare) == ["add a", "add b"]


def test_an_agent_that_amended_a_commit_of_others_does_not_overwrite_it(lab):
    project, bare = lab.with_bare(a="1\n", b="2\n")
    head = lab.git(bare, "rev-parse", "main")
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "c")
    lab.git(sandbox.path, "add", "-A")
    lab.git(sandbox.path, "commit", "-q", "--amend", "-m", "amended")
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["amended"] and lab.subjects(bare) == ["add a", "add b", "amended"]
    assert lab.git(bare, "rev-parse", "main~1") == head


def test_a_merge_commit_survives_a_rebase(lab):
    project, bare = lab.with_bare(**{"a": "1\n"})
    sandbox, other = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    lab.git(sandbox.path, "checkout", "-q", "-b", "side")
    lab.agent_commit(sandbox, "side")
    lab.git(sandbox.path, "checkout", "-q", "main")
    lab.agent_commit(sandbox, "straight")
    lab.git(sandbox.path, "merge", "-q", "--no-edit", "side")
    lab.agent_commit(other, "other")
    lab.finish(other)
    result = lab.finish(sandbox)
    assert result.rebased and sorted(messages(result.commits)) == ["Merge branch 'side'", "add side", "add straight"]
    assert lab.git(bare, "rev-list", "--merges", "--count", "main") == "1"
    assert result.changestats["files_changed"] == 2


def test_commits_that_the_agent_pulled_are_not_its_own_and_those_it_pushed_are(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.commit(project, "human", message="human work")
    lab.git(project, "push", "-q", "origin", "main")
    lab.agent_commit(sandbox, "a")
    lab.git(sandbox.path, "pull", "-q", "--rebase", "origin", "main")
    lab.agent_commit(sandbox, "b")
    lab.git(sandbox.path, "push", "-q", "origin", "HEAD:main")
    lab.agent_commit(sandbox, "c")
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["add a", "add b", "add c"] and result.changestats["files_changed"] == 3
    assert lab.subjects(bare) == ["add readme", "human work", "add a", "add b", "add c"]


def test_commits_on_another_branch_than_the_one_the_agent_stopped_on_are_not_lost(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "checkout", "-q", "-b", "feature")
    lab.agent_commit(sandbox, "a")
    lab.git(sandbox.path, "checkout", "-q", "main")
    assert "feature" in str(lab.fails(sandbox, "sandbox_failed"))
    lab.agent_commit(sandbox, "b")
    result = lab.finish(sandbox)
    assert result.note == "not pushed: feature" and messages(result.commits) == ["add b"]


@pytest.mark.parametrize("command,word", [("rebase other", "rebase"), ("merge other", "merge"),
                                          ("cherry-pick other", "cherry-pick"), ("bisect start", "bisect")])
def test_an_operation_that_the_agent_left_unfinished_is_not_pushed(lab, command, word):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.git(sandbox.path, "checkout", "-q", "-b", "other")
    lab.agent_commit(sandbox, "readme", "theirs\n")
    lab.git(sandbox.path, "checkout", "-q", "main")
    lab.agent_commit(sandbox, "readme", "ours\n")
    lab.git(sandbox.path, *command.split(), check=False)
    error = lab.fails(sandbox, "sandbox_failed")
    assert f"left a {word}" in str(error) and lab.subjects(bare) == ["add readme"]


def test_conflict_markers_are_not_committed(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "readme", "stashed\n")
    lab.git(sandbox.path, "stash", "-q")
    lab.agent_commit(sandbox, "readme", "committed\n")
    lab.git(sandbox.path, "stash", "pop", check=False)
    assert "unresolved conflicts in readme" in str(lab.fails(sandbox, "sandbox_failed"))
    assert lab.subjects(bare) == ["add readme"]


def test_stats_count_binary_files_and_renames(lab):
    (lab.root / "home" / ".gitconfig").write_text("[diff]\n\trenames = false\n")
    project, _ = lab.with_bare(old="1\n2\n3\n4\n5\n")
    sandbox = lab.sandbox(project)
    assert c.changestats(sandbox, lab.env) is None
    with open(sandbox.path + "/bin", "wb") as file:
        file.write(b"\0\1\2" * 100)
    os.rename(sandbox.path + "/old", sandbox.path + "/new name")
    assert lab.finish(sandbox).changestats == {"files_changed": 2, "insertions": 0, "deletions": 0}


def test_a_diff_is_bounded_and_covers_uncommitted_changes(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a", "one\n")
    lab.write(sandbox, "readme", "changed\n")
    text = c.sandbox_diff(sandbox.path, sandbox.start_head, lab.env, 1 << 20)
    assert "+one" in text and "+changed" in text and "-hello" in text
    short = c.sandbox_diff(sandbox.path, sandbox.start_head, lab.env, 40)
    assert short == text[:40] + f"\n... {len(text) - 40} more bytes\n"


def test_the_diff_of_pushed_commits_is_read_from_the_source_or_the_project(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    hashes = [lab.agent_commit(sandbox, "a", "one\n"), lab.agent_commit(sandbox, "b", "two\n")]
    lab.finish(sandbox)
    text = c.commits_diff(str(project), f"file://{bare}", hashes, lab.env, 9999)
    assert "+one" in text and "+two" in text and "hello" not in text
    with pytest.raises(c.NotFound):
        c.commits_diff(str(project), "/gone", hashes, lab.env, 9999)
    lab.git(project, "fetch", "-q")
    assert c.commits_diff(str(project), "/gone", hashes, lab.env, 9999) == text


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


@pytest.mark.parametrize("shared_lock", [True, False])
def test_ten_tasks_pushing_at_once_all_arrive(lab, shared_lock):
    """Once as one daemon's tasks, which take turns, once as four strangers, who know nothing of each other."""
    project, bare = lab.with_bare()
    count = 10 if shared_lock else 4
    boxes = [lab.sandbox(project, f"s{at}" if shared_lock else f"d{at}/s{at}") for at in range(count)]
    for at, box in enumerate(boxes):
        lab.agent_commit(box, f"file{at}")
    attempts = {} if shared_lock else {"attempts": 30}
    results = in_threads([lambda box=box: lab.finish(box, **attempts) for box in boxes])
    assert [messages(result.commits) for result in results] == [[f"add file{at}"] for at in range(count)]
    assert sorted(lab.subjects(bare)) == sorted(["add readme", *(f"add file{at}" for at in range(count))])
    assert lab.git(bare, "rev-list", "--merges", "--count", "main") == "0"
    assert {result.commits[0]["hash"] for result in results} < set(lab.git(bare, "rev-list", "main").split())
    assert [result.rebased for result in results].count(False) >= 1


def test_verify_runs_again_on_the_rebased_work_and_its_failure_keeps_it_back(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    lab.commit(project, "forbidden")
    lab.git(project, "push", "-q", "origin", "main")
    steps = []
    error = lab.fails(sandbox, "verify_failed", verify="echo checking; ! test -e forbidden", on_step=steps.append)
    assert "checking" in str(error) and steps == ["commit", "verify", "push", "rebase", "verify"]
    assert lab.subjects(bare) == ["add readme", "add forbidden"]
    lab.git(sandbox.path, "rm", "-q", "forbidden")
    result = lab.finish(sandbox, verify="! test -e forbidden")
    assert messages(result.commits) == ["add a", AUTOCOMMIT] and result.rebased
    assert result.changestats == {"files_changed": 2, "insertions": 1, "deletions": 1}


def test_a_rebase_conflict_keeps_the_sandbox_and_names_the_way_on(lab):
    project, bare = lab.with_bare("my project", **{"readme": "1\n", "other": "1\n"})
    sandbox = lab.sandbox(project, "s 1")
    mine = lab.agent_commit(sandbox, "readme", "mine\n")
    lab.commit(project, "readme", "theirs\n")
    lab.git(project, "push", "-q", "origin", "main")
    theirs = lab.git(bare, "rev-parse", "main")
    error = lab.fails(sandbox, "push_failed")
    assert "conflicts in readme" in str(error) and error.data["sandbox"] == sandbox.path
    assert lab.git(bare, "rev-parse", "main") == theirs, "nothing was forced"
    assert lab.git(sandbox.path, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert lab.git(sandbox.path, "rev-parse", "HEAD") == mine and lab.git(sandbox.path, "status", "--porcelain") == ""
    assert messages(c.new_commits(sandbox, lab.env)) == ["add readme"]
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
    one, two = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    for box in (one, two):
        lab.agent_commit(box, "a", "same\n", message=f"in {box.path[-2:]}")
    lab.finish(one)
    result = lab.finish(two)
    assert result.commits == [] and result.pushed_branch == "" and "already in main" in result.note
    assert result.changestats is None and lab.subjects(bare) == ["add readme", "in s1"]


def test_what_build_and_verify_left_in_the_tree_does_not_stop_a_rebase(lab):
    project, bare = lab.with_bare(f="1\n", lock="1\n")
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    lab.commit(project, "report", "theirs\n")
    lab.git(project, "push", "-q", "origin", "main")
    result = lab.finish(sandbox, verify="echo changed >> lock; test -e report || echo mine > report")
    assert result.rebased and lab.git(bare, "show", "main:report") == "theirs"
    assert lab.git(bare, "show", "main:lock") == "1"


def test_history_that_its_owner_rewrote_does_not_come_back(lab):
    project, bare = lab.with_bare(a="1\n", secret="oops\n")
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "b")
    lab.git(project, "reset", "-q", "--hard", "HEAD~1")
    lab.commit(project, "c")
    lab.git(project, "push", "-q", "--force", "origin", "main")
    assert messages(lab.finish(sandbox).commits) == ["add b"] and lab.subjects(bare) == ["add a", "add c", "add b"]


def test_a_push_that_the_source_refuses_is_push_failed_at_once(lab):
    project, bare = lab.with_bare()
    (bare / "hooks").mkdir()
    (bare / "hooks" / "pre-receive").write_text("#!/bin/sh\necho policy says no >&2\nexit 1\n")
    (bare / "hooks" / "pre-receive").chmod(0o755)
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    steps = []
    error = lab.fails(sandbox, "push_failed", on_step=steps.append)
    assert "policy says no" in str(error) and steps.count("push") == 1 and sandbox.path in str(error)


def test_attempts_are_bounded_when_others_always_come_first(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    count = []

    def somebody_pushes(name):
        if name == "push":
            lab.commit(project, f"other{len(count)}")
            lab.git(project, "push", "-q", "origin", "main")
            count.append(name)
    lab.fails(sandbox, "push_failed", attempts=3, on_step=somebody_pushes)
    assert len(count) == 3 and "add a" not in lab.subjects(bare)
    assert lab.finish(sandbox).rebased and lab.subjects(bare)[-1] == "add a"


def test_a_hook_that_carries_large_files_runs_at_the_push(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    hook = sandbox.path + "/.git/hooks/pre-push"
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

    def cancelled(name):
        steps.append(name)
        if steps.count("waiting") == 3:
            raise InterruptedError
    with pytest.raises(InterruptedError):
        lab.finish(sandbox, on_step=cancelled)
    assert "push" not in steps
    os.close(held)
    assert lab.finish(sandbox).pushed_branch == "main"


# -- killed in the middle, called again


def test_called_again_after_the_autocommit_it_does_not_commit_what_the_build_made(lab):
    project, bare = lab.with_bare(**{"Makefile": "build:\n\techo x > product\n"})
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    work = c._Finish(sandbox, lab.env, "", "", 60.0, None, None)
    work.recover()
    work.commit_leftovers()
    assert messages(lab.finish(sandbox).commits) == [AUTOCOMMIT]
    assert lab.git(bare, "ls-tree", "--name-only", "main").split() == ["Makefile", "a"]


def test_called_again_after_staging_it_builds_and_commits_only_what_was_staged(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    with pytest.raises(KeyboardInterrupt):
        work = c._Finish(sandbox, lab.env, "true", "", 60.0, None, raise_at("build"))
        work.commit_leftovers()
    lab.write(sandbox, "half-a-product")
    lab.write(sandbox, ".git/index.lock", "")
    assert messages(lab.finish(sandbox).commits) == [AUTOCOMMIT]
    assert lab.git(bare, "ls-tree", "--name-only", "main").split() == ["a", "readme"]


def raise_at(step):
    def on_step(name):
        if name == step:
            raise KeyboardInterrupt
    return on_step


def test_another_run_in_the_same_sandbox_is_not_mistaken_for_a_repeated_call(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    lab.finish(sandbox)
    lab.write(sandbox, "b")
    lab.env[c.MARK] = "execution-2"
    assert messages(lab.finish(sandbox).commits) == [AUTOCOMMIT, AUTOCOMMIT]
    assert lab.git(bare, "ls-tree", "--name-only", "main").split() == ["a", "b", "readme"]


def test_called_again_after_the_push_it_returns_the_same(lab):
    project, bare = lab.with_bare()
    sandbox, other = lab.sandbox(project, "s1"), lab.sandbox(project, "s2")
    lab.agent_commit(other, "o")
    lab.finish(other)
    lab.agent_commit(sandbox, "a")
    lab.write(sandbox, "b")
    verify = "date >> report"
    first = lab.finish(sandbox, verify=verify)
    head = lab.git(bare, "rev-parse", "main")
    assert first.rebased and len(first.commits) == 2
    assert lab.finish(sandbox, verify=verify) == first and lab.git(bare, "rev-parse", "main") == head
    lab.git(project, "pull", "-q", "origin", "main")
    lab.commit(project, "later")
    lab.git(project, "push", "-q", "origin", "main")
    assert lab.finish(sandbox, verify=verify) == first, "others have gone on from there"
    assert lab.subjects(bare)[-1] == "add later"


def test_called_again_after_the_push_to_a_branch_beside_it_returns_the_same(lab):
    project = lab.project()
    sandbox = lab.sandbox(project)
    lab.agent_commit(sandbox, "a")
    first = lab.finish(sandbox)
    assert lab.finish(sandbox) == first and first.pushed_branch == "claudomator/s1"


@pytest.mark.parametrize("on_branch", [True, False])
@pytest.mark.parametrize("when", ["before", "stopped", "torn", "done"])
def test_called_again_in_the_middle_of_its_own_rebase_it_starts_it_over(lab, when, on_branch):
    project, bare = lab.with_bare(f="1\n")
    sandbox = lab.sandbox(project)
    if not on_branch:
        lab.git(sandbox.path, "checkout", "-q", "--detach")
    lab.agent_commit(sandbox, "a")
    lab.agent_commit(sandbox, "b")
    lab.commit(project, "theirs")
    lab.git(project, "push", "-q", "origin", "main")
    head = lab.git(sandbox.path, "rev-parse", "HEAD")
    # what _Finish.rebase has done up to there
    lab.git(sandbox.path, "fetch", "-q", str(bare), "+refs/heads/main:refs/claudomator/fetched")
    base = lab.git(sandbox.path, "rev-parse", "refs/claudomator/fetched")
    lab.write(sandbox, ".git/claudomator-base", base)
    lab.write(sandbox, ".git/claudomator-rebase", "main" if on_branch else head)
    if when in ("stopped", "torn"):
        lab.git(sandbox.path, "rebase", "-q", "--exec", "false", base, check=False)
        assert os.path.isdir(sandbox.path + "/.git/rebase-merge")
    if when == "torn":
        os.unlink(sandbox.path + "/.git/rebase-merge/head-name")
        lab.write(sandbox, ".git/index.lock", "")
        lab.write(sandbox, "a", "half\n")
    if when == "done":
        lab.git(sandbox.path, "rebase", "-q", base)
    result = lab.finish(sandbox)
    assert messages(result.commits) == ["add a", "add b"] and result.rebased
    assert lab.subjects(bare) == ["add f", "add theirs", "add a", "add b"]
    assert not os.path.exists(sandbox.path + "/.git/claudomator-rebase")


def test_stale_locks_of_a_killed_git_are_removed(lab):
    project, bare = lab.with_bare()
    sandbox = lab.sandbox(project)
    lab.write(sandbox, "a")
    for name in ("index.lock", "HEAD.lock", "refs/heads/main.lock"):
        lab.write(sandbox, ".git/" + name, "")
    assert lab.finish(sandbox).pushed_branch == "main"


def test_killed_at_any_moment_and_called_again_the_work_arrives_once(lab):
    """Real SIGKILLs: a process finishes the sandbox and is killed, with its git, after a random time."""
    project, bare = lab.with_bare(**{"Makefile": "build:\n\techo x > product\n"})
    rng, expected = random.Random(7), []
    script = ("import sys, os, claudomator as c; "
              "c.finish_sandbox(c.open_sandbox(sys.argv[1]), env=dict(os.environ), verify='echo r >> report')")
    path = os.path.dirname(os.path.abspath(c.__file__))
    for at in range(4):
        box = lab.sandbox(project, f"k{at}")
        lab.agent_commit(box, f"one{at}")
        lab.write(box, f"two{at}")
        lab.commit(project, f"theirs{at}")
        lab.git(project, "pull", "-q", "--rebase", "origin", "main")
        lab.git(project, "push", "-q", "origin", "main")
        env = {**lab.env, c.MARK: f"kill-{at}", "PYTHONPATH": path}
        child = subprocess.Popen([sys.executable, "-c", script, box.path], env=env)
        try:
            child.wait(0.05 + rng.random() * 0.25)
        except subprocess.TimeoutExpired:
            pass
        child.kill()
        child.wait()
        deadline = time.monotonic() + 10
        while c.signal_marked([f"kill-{at}"], 9):
            assert time.monotonic() < deadline
        result = c.finish_sandbox(box, env=env, verify="echo r >> report")
        assert messages(result.commits) == [f"add one{at}", AUTOCOMMIT]
        assert result.changestats == {"files_changed": 2, "insertions": 2, "deletions": 0}
        expected += [f"one{at}", f"two{at}", f"theirs{at}"]
    assert sorted(lab.git(bare, "ls-tree", "--name-only", "main").split()) == sorted([*expected, "Makefile"])
    assert len(lab.subjects(bare)) == 1 + 3 * 4


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
    assert not (root / "s").exists() and (outside / "keep").exists()
    c.remove_sandbox(str(root / "link"), str(root))
    assert not (root / "link").exists() and (outside / "keep").exists()
    c.remove_sandbox(str(root / "gone"), str(root))


@pytest.mark.parametrize("path", ["../outside", ".", "..", "link/inside", "/etc/passwd"])
def test_nothing_outside_the_root_is_removed(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside" / "inside").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(c.SandboxError, match="not below"):
        c.remove_sandbox(os.path.join(root, path), str(root))
    assert (tmp_path / "outside" / "inside").is_dir() and root.is_dir()
