"""The warm server for real: what it learns to import, and that what it forks is like a new interpreter."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticd.channel import Channel
from elasticd.errors import ChannelClosed, OperatorError
from elasticd.supervisor.warm_client import WarmServer
from tests.conftest import eventually, open_to_all
from tests.warm_forks import PATIENCE_S, Forks, alive, forks, script


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """One preloaded server for the tests that leave it as it was."""
    with forks(tmp_path_factory.mktemp("warm")) as made:
        made.preload()
        yield made


# --- what the server makes of it ---


def test_the_script_s_imports_are_loaded_and_its_own_code_is_not(tmp_path: Path) -> None:
    script(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')", "own.py")
    main = script(
        tmp_path,
        """
        import sys
        loaded = set(sys.modules)
        import own, wave, does_not_exist_at_all
        """,
    )
    probe = script(tmp_path, "import sys; print('wave' in sys.modules, 'own' in sys.modules)", "probe.py")
    with forks(tmp_path) as made:
        assert made.preload()["why_not_warm"] == ""
        assert made.run(probe)[:2] == (0, "False False\n")
        answer = made.preload("script.py", working_dir=str(tmp_path))
        assert (answer["failed"], answer["why_not_warm"]) == (["does_not_exist_at_all"], "")
        assert made.run(probe)[:2] == (0, "True False\n")
        assert not (tmp_path / "ran").exists()
        assert made.run(main)[0] == 1
        assert (tmp_path / "ran").exists()
        made.preload("no.such.module", is_module=True, working_dir=str(tmp_path))
        made.preload("no_such_script.py", working_dir=str(tmp_path))
        assert made.run(probe)[0] == 0


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()", "thread"),
        ("import sys; sys.exit('a module that ends the process that imports it')", ""),
    ],
    ids=["threads", "exits"],
)
def test_a_module_that_spoils_the_server_costs_speed_and_nothing_else(tmp_path: Path, module: str, why: str) -> None:
    """``installed`` is on PYTHONPATH below site-packages' rules: an installed module that nobody can mend."""
    site = Path(next(path for path in sys.path if path.endswith("site-packages")))
    name = f"elasticd_test_spoiler_{os.getpid()}"
    spoiler = site / f"{name}.py"
    spoiler.write_text(module)
    try:
        main = script(tmp_path, f"import {name}", "imports_it.py")
        probe = script(tmp_path, f"import sys; print({name!r} in sys.modules, 'torch' in sys.modules)", "probe.py")
        with forks(tmp_path) as made:
            assert why in made.preload(main)["why_not_warm"]
            assert made.run(probe)[1] == ("False False\n" if why else "False True\n")
    finally:
        spoiler.unlink()


def test_a_fork_is_much_faster_than_a_new_interpreter(warm: Forks, tmp_path: Path) -> None:
    main = script(tmp_path, "import torch.distributed")

    def seconds(**fields: object) -> float:
        start = time.perf_counter()
        assert warm.run(main, **fields)[0] == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5 * seconds(fresh=True)


# --- like a new interpreter ---

_INTROSPECT = """
'''Its docstring.'''
import json, multiprocessing.process, os, re, signal, sys, threading
import torch
sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
hidden = {"PYTEST_CURRENT_TEST"}
main = sys.modules["__main__"]
vars(main).pop("__warningregistry__", None)
facts = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "cwd": os.getcwd(), "flags": repr(sys.flags),
    "main": {name: re.sub(" at 0x[0-9a-f]+", "", repr(value)) for name, value in vars(main).items() if name[:2] == "__"},
    "is_main": main.__dict__ is globals(), "doc": __doc__,
    "env": {name: value for name, value in sorted(os.environ.items()) if name not in hidden},
    "fds": sorted(fd for fd in sockets if int(fd) < 256), "umask": status["Umask"], "threads": int(status["Threads"]),
    "ignored": status["SigIgn"], "caught": status["SigCgt"], "blocked": status["SigBlk"],
    "sigint": repr(signal.getsignal(signal.SIGINT)), "sigterm": repr(signal.getsignal(signal.SIGTERM)),
    "stdin": os.readlink("/proc/self/fd/0"), "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
    "torch_threads": torch.get_num_threads(), "mp_dir": multiprocessing.process.ORIGINAL_DIR,
    "main_thread": threading.current_thread().name, "unbuffered": sys.stdout.write_through,
}
print(json.dumps(facts))
"""


@pytest.mark.parametrize(
    ("kind", "threads"), [("script", ""), ("script", "1"), ("script", "2"), ("link", "1"), ("module", "1")]
)
def test_a_forked_worker_sees_what_a_new_interpreter_sees(warm: Forks, tmp_path: Path, kind: str, threads: str) -> None:
    script(tmp_path, _INTROSPECT, "real/program.py")
    (tmp_path / "link.py").symlink_to(tmp_path / "real/program.py")
    command = {"script": ["real/program.py"], "link": ["link.py"], "module": ["real.program"]}[kind]
    env = {"COLOUR": "blue", **({"OMP_NUM_THREADS": threads} if threads else {})}
    status, output, errors = warm.run(
        *command, "a", "-b", is_module=kind == "module", working_dir=str(tmp_path), env=env
    )
    assert status == 0, errors
    plain = subprocess.run(
        [sys.executable, "-u", *(["-m"] if kind == "module" else []), *command, "a", "-b"],
        check=True,
        cwd=tmp_path,
        env={**{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}, **env},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup: a worker ends with its daemon
    )
    forked, expected = json.loads(output), json.loads(plain.stdout)
    faults = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
    assert caught(forked.pop("caught")) - caught(expected.pop("caught")) == faults  # for tracebacks of crashes in C
    # numpy's BLAS takes threads when it is loaded: a worker that is alone on its node has one there, and all in torch.
    assert (forked.pop("threads"), expected.pop("threads")) == (
        1,
        int(threads) if threads else expected["torch_threads"],
    )
    for fact, value in expected.items():
        assert forked[fact] == value, fact
    assert forked.keys() == expected.keys()


def caught(mask: str) -> set[int]:
    """The signals that a process catches, without those of the C library itself."""
    return {number for number in range(1, 32) if int(mask, 16) >> (number - 1) & 1}


def test_random_numbers_are_fresh_in_each_worker(warm: Forks, tmp_path: Path) -> None:
    main = script(
        tmp_path,
        """
        import random, numpy, os, tempfile, uuid, multiprocessing, torch
        print(random.random(), numpy.random.rand(), uuid.uuid4(), next(tempfile._get_candidate_names()),
              multiprocessing.current_process().authkey.hex(), torch.initial_seed())
        """,
    )
    one, other = (warm.run(main)[1].split() for _ in range(2))
    assert len(one) == 6
    assert [a == b for a, b in zip(one, other, strict=True)] == [False] * 5 + [True]  # torch's seed is a fixed one


def test_what_training_scripts_do_works(warm: Forks, tmp_path: Path) -> None:
    """Data loaders by fork and by spawn, classes of __main__ in pickles, modules beside the script, the main guard."""
    script(tmp_path, "VALUE = 7", "beside.py")
    script(tmp_path, "from ..other import WORD", "pkg/sub/mod.py")
    script(tmp_path, "WORD = 'relative'", "pkg/other.py")
    main = script(
        tmp_path,
        """
        import multiprocessing, pickle, sys
        from concurrent.futures import ProcessPoolExecutor
        import torch
        import beside
        from pkg.sub.mod import WORD

        class Squares(torch.utils.data.Dataset):
            def __len__(self): return 6
            def __getitem__(self, index): return index * index

        def double(number): return 2 * number

        if __name__ == "__main__":
            assert (beside.VALUE, WORD) == (7, "relative")
            assert type(pickle.loads(pickle.dumps(Squares()))) is Squares
            for method in ("fork", "spawn"):
                loader = torch.utils.data.DataLoader(Squares(), 2, num_workers=1, multiprocessing_context=method)
                assert torch.cat(list(loader)).tolist() == [0, 1, 4, 9, 16, 25]
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                assert list(pool.map(double, [1, 2])) == [2, 4]
            assert torch.randn(500, 500).matmul(torch.randn(500, 500)).shape == (500, 500)
            sys.stdout.write("no newline at the end")
        """,
    )
    assert warm.run(main) == (0, "no newline at the end", "")


def test_files_that_a_script_leaves_open_are_whole(warm: Forks, tmp_path: Path) -> None:
    """The numbers of what was inherited are free for the script, and stay its own until it ends."""
    main = script(
        tmp_path,
        f"""
        kept = [open({str(tmp_path)!r} + f"/file{{i}}", "w") for i in range(12)]
        for i, file in enumerate(kept):
            file.write(f"line {{i}}")
        """,
    )
    assert warm.run(main) == (0, "", "")
    assert [(tmp_path / f"file{i}").read_text() for i in range(12)] == [f"line {i}" for i in range(12)]


def test_programs_and_plain_interpreters_start_like_any(warm: Forks, tmp_path: Path) -> None:
    ignored = script(tmp_path, "print([l for l in open('/proc/self/status') if l.startswith('SigIgn')][0].split()[1])")
    found = subprocess.run(["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True).stdout
    inherited = int(found.split()[1], 16) & ~(1 << signal.SIGHUP - 1)  # under nohup: a worker ends with its daemon
    by_python = inherited | 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    shell = warm.run(
        "sh", "-c", "echo $0 $1 $COLOUR; grep SigIgn /proc/self/status", "a", "b", no_python=True, env={"COLOUR": "red"}
    )
    assert shell[:2] == (0, f"a b red\nSigIgn:\t{inherited:016x}\n")  # and nothing that Python ignores
    assert warm.run(ignored, fresh=True)[:2] == (0, f"{by_python:016x}\n")
    assert warm.run("json.tool", "--help", is_module=True, fresh=True)[0] == 0
    status, _, errors = warm.run(
        "no-such-program", no_python=True, env={"TORCHELASTIC_ERROR_FILE": str(tmp_path / "e")}
    )
    assert status == 127
    assert errors == f"elasticd: cannot run 'no-such-program' in {Path.cwd()}: No such file or directory\n"
    assert "cannot run" in json.loads((tmp_path / "e").read_text())["message"]["message"]


# --- how it ends ---


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise SystemExit", 0),
        ("import sys; sys.exit('in words')", 1),
        ("1 / 0", 1),
        ("def broken(:", 1),
        ("import os; os._exit(9)", 9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    ],
)
def test_the_end_of_a_script_is_reported_as_python_has_it(warm: Forks, tmp_path: Path, text: str, status: int) -> None:
    assert warm.run(script(tmp_path, text))[0] == status


@pytest.mark.parametrize("decorated", [False, True])
def test_an_error_is_shown_and_recorded_without_our_frames(warm: Forks, tmp_path: Path, decorated: bool) -> None:
    main = script(
        tmp_path,
        f"""
        from torch.distributed.elastic.multiprocessing.errors import record
        def inner(): raise ValueError("too large")
        {"@record" if decorated else ""}
        def main(): inner()
        if __name__ == "__main__": main()
        """,
    )
    report = tmp_path / "error.json"
    status, _, errors = warm.run(main, env={"TORCHELASTIC_ERROR_FILE": str(report)})
    assert status == 1
    recorded = json.loads(report.read_text())["message"]
    assert recorded["message"] == "ValueError: too large"
    for text in (errors, recorded["extraInfo"]["py_callstack"]):
        assert f'File "{main}", line 3, in inner' in text
        assert text.rstrip().endswith("ValueError: too large")
        assert "elasticd/supervisor" not in text


def test_a_syntax_error_names_the_line(warm: Forks, tmp_path: Path) -> None:
    main, report = script(tmp_path, "x = 1\ny = (\n"), tmp_path / "error.json"
    _, _, errors = warm.run(main, env={"TORCHELASTIC_ERROR_FILE": str(report)})
    assert f'File "{main}", line 2' in errors
    assert "SyntaxError" in json.loads(report.read_text())["message"]["message"]


@pytest.mark.parametrize(
    ("command", "fields", "says"),
    [
        ("missing.py", {}, "cannot read the script 'missing.py'"),
        ("/", {}, "Is a directory"),
        ("missing", {"is_module": True}, "there is no module 'missing'"),
        ("json.missing", {"is_module": True}, "there is no module 'json.missing'"),
        ("script.py", {"working_dir": "/no/such/folder"}, "/no/such/folder"),
        ("script.py", {"user": "no-such-user"}, "no-such-user"),
        ("script.py", {"stdout": "/no/such/folder/out"}, "/no/such/folder/out"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    warm: Forks, tmp_path: Path, command: str, fields: dict[str, object], says: str
) -> None:
    report = tmp_path / "error.json"
    err = tmp_path / "err"
    pid = warm.fork(command, env={"TORCHELASTIC_ERROR_FILE": str(report)}, **{"stderr": str(err), **fields})
    assert warm.status(pid) == 127
    recorded = json.loads(report.read_text())["message"]
    assert says in recorded["message"]
    assert recorded["extraInfo"]["py_callstack"] == ""
    if err.exists():
        assert err.read_text().count("\n") == 1


_FAMILY = """
import os, subprocess, sys, time
children = [subprocess.Popen(["sleep", "1000"]), subprocess.Popen(["sh", "-c", "trap '' TERM HUP; sleep 1000 & wait"])]
if os.fork() == 0:
    time.sleep(1000)
while len(pids := subprocess.run(["pgrep", "-g", str(os.getpid())], capture_output=True, text=True).stdout.split()) < 5:
    time.sleep(0.01)
print("\\n".join(pids), flush=True)
with open(sys.argv[1], "w") as done:
    done.write("\\n".join(pids))
time.sleep(float(sys.argv[2]))
"""


def family(made: Forks, folder: Path, lives_s: float = 1000) -> tuple[int, list[int]]:
    """A worker with children and grandchildren of all sorts: its pid and theirs."""
    told = folder / "family"
    pid = made.fork(script(folder, _FAMILY), str(told), str(lives_s))
    eventually(lambda: told.exists() and len(told.read_text().split()) >= 5, 20.0, "children of the worker")
    return pid, [int(word) for word in told.read_text().split() if alive(int(word))]


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_grandchildren_end_with_their_worker(warm: Forks, tmp_path: Path, how: str) -> None:
    pid, pids = family(warm, tmp_path, lives_s=0.2 if how == "ends" else 1000)
    assert len(pids) >= 4
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    assert warm.status(pid) == (0 if how == "ends" else -signal.SIGKILL)
    eventually(lambda: not any(map(alive, pids)), what="the worker's process group to be gone")


def hangs_up(server: WarmServer) -> bool:
    try:
        server.messages()
    except ChannelClosed:
        return True
    return False


@pytest.mark.parametrize("victim", ["agent", "daemon", "server"])
def test_whoever_dies_takes_all_below_with_it(tmp_path: Path, victim: str) -> None:
    """The daemon here: its end of the control socket; that its own death is enough, test_agent.py shows."""
    with forks(tmp_path) as made:
        made.preload()
        _, pids = family(made, tmp_path)
        if victim == "agent":
            assert made.agent is not None
            made.agent.close()
        elif victim == "server":
            os.kill(made.server.pid, signal.SIGKILL)
            eventually(lambda: hangs_up(made.server), what="the end of the control socket")
            made.server.close()  # what the daemon does when it hears of it
        else:
            made.server.close()
        eventually(lambda: not any(map(alive, pids)), what="everything below to be gone")
        assert alive(made.server.pid) == (victim == "agent")


def test_a_daemon_that_dies_during_an_import_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's signal reaches the server while it imports something slow and reads no socket."""
    site = Path(next(path for path in sys.path if path.endswith("site-packages")))
    name = f"elasticd_test_slow_{os.getpid()}"
    begun = tmp_path / "begun"
    (site / f"{name}.py").write_text(f"import time; open({str(begun)!r}, 'w').close(); time.sleep(1000)")
    slow = script(tmp_path, f"import {name}", "slow.py")
    sleeper = script(tmp_path, "import time; time.sleep(1000)", "sleeper.py")
    daemon = script(
        tmp_path,
        f"""
        import os, sys, time
        from pathlib import Path
        from elasticd.channel import Channel
        from elasticd.supervisor.warm_client import WarmServer
        server = WarmServer(sys.executable, Path({str(tmp_path / "warm")!r}), dict(os.environ))
        server.preload()
        while not server.messages(): time.sleep(0.01)
        agent = Channel.connect({str(tmp_path / "warm")!r})
        agent.send({{"type": "fork", "id": 0, "command": [{sleeper!r}]}})
        worker = agent.receive()["pid"]
        server.preload({slow!r})
        Path({str(tmp_path / "pids.tmp")!r}).write_text(f"{{server.pid}} {{worker}}")
        Path({str(tmp_path / "pids.tmp")!r}).rename({str(tmp_path / "pids")!r})
        time.sleep(1000)
        """,
        "daemon.py",
    )
    process = subprocess.Popen([sys.executable, daemon])
    try:
        eventually(lambda: (tmp_path / "pids").exists() and begun.exists(), PATIENCE_S, "the slow import to begin")
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        assert all(map(alive, pids))
        process.kill()
        eventually(lambda: not any(map(alive, pids)), what="server and worker to be gone")
    finally:
        process.kill()
        process.wait()
        (site / f"{name}.py").unlink()


def test_nonsense_closes_one_connection_only(warm: Forks) -> None:
    for message in (
        {"type": "fork"},
        {"type": "fork", "id": 1, "command": ["x"], "colour": 1},
        {"type": "start_agent"},
        {"type": "?"},
    ):
        stranger = Channel.connect(str(warm.server.socket_path))
        stranger.send(message)
        with pytest.raises(ChannelClosed):
            stranger.receive(PATIENCE_S)
        stranger.close()
    assert warm.run("/dev/null")[0] == 0


def test_the_socket_is_for_the_daemon_s_user_alone(warm: Forks) -> None:
    assert warm.server.socket_path.stat().st_mode & 0o777 == 0o600


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"cannot run /no/python: No such file or directory; set node\.python"):
        WarmServer("/no/python", tmp_path / "warm", {})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_job_s_user_runs_it_without_the_daemon_s_privileges(warm: Forks, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    nobody = pwd.getpwnam("nobody")
    main = script(
        tmp_path,
        """
        import os
        print(os.getresuid(), os.getresgid(), os.getgroups(), os.environ["HOME"], os.environ["USER"])
        try:
            os.setuid(0)
        except PermissionError:
            print("not root")
        import ctypes, signal
        number = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(number))
        print(number.value == signal.SIGKILL)
        """,
    )
    status, output, errors = warm.run(main, user="nobody", env={"HOME": "/elsewhere"})
    assert status == 0, errors
    ids = f"({nobody.pw_uid}, {nobody.pw_uid}, {nobody.pw_uid}) ({nobody.pw_gid}, {nobody.pw_gid}, {nobody.pw_gid})"
    groups = os.getgrouplist("nobody", nobody.pw_gid)
    assert output == f"{ids} {groups} /elsewhere nobody\nnot root\nTrue\n"
