"""``elasticd run`` on one node, for real: what workers are given, how they start, stop and end, and who survives whom."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elasticd.testing.cluster import Cluster, ClusterSpec
from tests.conftest import eventually, open_to_all

PATIENCE_S = 60.0


def script(folder: Path, text: str, name: str = "script.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ELASTICD_", "TORCHELASTIC_", "PYTEST_", "OMP_"))}
    return {**kept, **extra}


@contextlib.contextmanager
def started(*arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """``elasticd run``; ended at last with all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "elasticd.cli", "run", *arguments],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def run(*arguments: str, **env: str) -> tuple[int, str, str]:
    with started(*arguments, **env) as process:
        output, errors = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output, errors


def below(pid: int) -> dict[str, list[psutil.Process]]:
    """Everything that a daemon started, by what it is: server, forks (agent and workers), others."""
    found: dict[str, list[psutil.Process]] = {"server": [], "forks": [], "others": []}
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            is_server = "elasticd.supervisor.warm" in process.cmdline()
            parent_is_server = "elasticd.supervisor.warm" in psutil.Process(process.ppid()).cmdline()
            kind = "others" if not is_server else ("forks" if parent_is_server else "server")
            found[kind].append(process)
    return found


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- torchrun's command line, side by side ---

_DUMP = """
import json, os, sys
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump({"argv": sys.argv[2:], "env": dict(os.environ)}, file)
print("said by", os.environ["LOCAL_RANK"])
print("complained by", os.environ["LOCAL_RANK"], file=sys.stderr)
"""
#: Where torchrun and elasticd differ for a reason: a path or a port of this run, and the address instead of its name.
_OWN_VALUES = {"TORCHELASTIC_ERROR_FILE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}


def test_workers_are_given_all_that_torchrun_gives(tmp_path: Path) -> None:
    """The same script with the same flags under both: environment, macros, console and files."""
    main = script(tmp_path, _DUMP)
    flags = [
        "--nproc-per-node",
        "2",
        "--role",
        "trainer",
        "--max-restarts",
        "2",
        "--tee",
        "0:3,1:1",
        "--redirects",
        "1:2",
    ]
    flags += ["--local-ranks-filter", "1"]
    seen: dict[str, list[dict[str, object]]] = {}
    console: dict[str, list[str]] = {}
    for name, command in (("torch", "torch.distributed.run"), ("ours", "elasticd.cli")):
        folder = tmp_path / name
        folder.mkdir()
        where = ["--standalone", "--log-dir", str(folder / "log"), main, str(folder), "rank-${local_rank}", "$HOME"]
        done = subprocess.run(
            [sys.executable, "-m", command, *(["run"] if name == "ours" else []), *flags, *where],
            env=environment(COLOUR="blue"),
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        seen[name] = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
        console[name] = done.stdout.splitlines()
    for theirs, ours in zip(seen["torch"], seen["ours"], strict=True):
        assert ours["argv"] == theirs["argv"]
        assert theirs["env"].keys() - ours["env"].keys() == set()
        differ = {name for name, value in theirs["env"].items() if ours["env"][name] != value}
        assert differ <= _OWN_VALUES, differ
        added = ours["env"].keys() - theirs["env"].keys()
        assert added == {f"ELASTICD_{name}" for name in ("SOCKET", "JOB_ID", "ROUND", "NODE_ID", "LOCAL_RANK")}
    assert console["ours"] == console["torch"] == ["[trainer1]:said by 1"]
    (logs,) = (tmp_path / "ours/log").glob("*/round_1")
    files = {str(path.relative_to(logs)): path.read_text() for path in logs.glob("rank_*/std*")}
    assert files == {
        "rank_0/stdout.log": "said by 0\n",
        "rank_0/stderr.log": "complained by 0\n",
        "rank_1/stdout.log": "said by 1\n",
        "rank_1/stderr.log": "complained by 1\n",
    }


# --- restarts ---


@pytest.mark.parametrize("method", ["warm", "spawn"])
def test_a_restart_keeps_logs_and_respects_the_stop_time_out(tmp_path: Path, method: str) -> None:
    """torch's agent waits 30 s for a worker that ignores SIGTERM, whatever it was told, and removes the old logs."""
    main = script(
        tmp_path,
        """
        import os, signal, sys, time
        from pathlib import Path
        folder, rank, number = Path(sys.argv[1]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("rank", rank, "life", number, "warm" if "elasticd.supervisor.warm" in sys.modules else "plain")
        (folder / f"{rank}-{number}").write_text(str(time.monotonic()))
        while len(list(folder.glob(f"*-{number}"))) < 2: time.sleep(0.01)
        if number == "0":
            time.sleep(1000 if rank == "1" else 0)
            (folder / "failed").write_text(str(time.monotonic()))
            os._exit(3)
        """,
    )
    work = tmp_path / "work"
    work.mkdir()
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--shutdown-timeout", "1", "--start-method", method]
    status, _, errors = run(
        *flags, "--redirects", "3", "--log-dir", str(tmp_path / "log"), "--rdzv-id", "J", main, str(work)
    )
    assert status == 0, errors
    kind = "warm" if method == "warm" else "plain"
    for life in (0, 1):
        for rank in (0, 1):
            text = (tmp_path / f"log/J/round_{life + 1}/rank_{rank}/stdout.log").read_text()
            assert text == f"rank {rank} life {life} {kind}\n"
    took_s = float((work / "0-1").read_text()) - float((work / "failed").read_text())
    assert 0.9 < took_s < 15, "killed after the time-out that was asked for"


def test_a_job_that_runs_again_moves_its_old_logs_aside(tmp_path: Path) -> None:
    main = script(tmp_path, "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[1]))")
    flags = ["--redirects", "1", "--log-dir", str(tmp_path / "log"), "--nnodes", "1:2", "--rdzv-id", "again", main]
    assert run(*flags, "1")[0] == 1
    status, _, errors = run(*flags, "0")
    assert status == 0, errors
    round_1 = tmp_path / "log/again/round_1"
    assert (round_1 / "rank_0/stdout.log").read_text() == "0\n"
    assert (round_1 / "rank_0.1/stdout.log").read_text() == "1\n"


# --- the end of a job ---


def test_the_first_error_is_shown_with_its_traceback(tmp_path: Path) -> None:
    main = script(
        tmp_path,
        """
        import os, time
        def inner(): raise ValueError("bad batch")
        if os.environ["RANK"] == "1": inner()
        time.sleep(1000)
        """,
    )
    status, _, errors = run("--nproc-per-node", "2", main)
    assert status == 1
    report = errors[errors.index("first error on node") :]
    assert re.match(r"first error on node \S+, rank 1 \(exit code 1\): ValueError: bad batch\n", report), errors
    assert f'File "{main}", line 3, in inner' in report
    assert "elasticd/" not in report


def test_logs_that_cannot_be_written_end_the_job_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, errors = run("--log-dir", str(tmp_path / "file/log"), "--redirects", "3", script(tmp_path, ""))
    assert status != 0
    assert "Not a directory" in errors
    assert "Traceback" not in errors


# --- who survives whom ---

_LIVES = """
import os, subprocess, sys, time
from pathlib import Path
folder, rank, number = Path(sys.argv[1]), os.environ["RANK"], os.environ["ELASTICD_ROUND"]
subprocess.Popen(["sleep", "1000"])
(folder / f"{number}.{rank}").touch()
while not (folder / "finish").exists(): time.sleep(0.01)
"""


def newest(folder: Path, ranks: int = 2) -> int:
    """The newest round in which all ranks have begun."""
    begun = [path.name.split(".") for path in folder.glob("[0-9]*.*")]
    numbers = [int(number) for number, _ in begun]
    return max((number for number in numbers if numbers.count(number) == ranks), default=0)


def test_a_killed_server_or_agent_is_replaced_and_the_job_goes_on(tmp_path: Path) -> None:
    """Neither costs the job one of its restarts, of which it has none."""
    work = tmp_path / "work"
    work.mkdir()
    with started("--nproc-per-node", "2", "--max-restarts", "0", script(tmp_path, _LIVES), str(work)) as process:
        eventually(lambda: newest(work) == 1, PATIENCE_S, "the first round")
        for victim in ("server", "agent"):
            before, tree = newest(work), below(process.pid)
            everything = [*tree["server"], *tree["forks"], *(p for p in tree["others"] if p.name() == "sleep")]
            assert len(everything) == 1 + 3 + 2
            if victim == "server":
                tree["server"][0].kill()
            else:
                tree["forks"][0].kill()  # the first that the server forked
                everything.remove(tree["server"][0])
            eventually(lambda before=before: newest(work) > before, PATIENCE_S, f"a round after the {victim}'s death")
            eventually(
                lambda lost=everything: all(map(gone, lost)), what=f"all that lived below the {victim} to be gone"
            )
        (work / "finish").touch()
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors


def test_a_killed_daemon_leaves_no_process_behind(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with started("--nproc-per-node", "2", "--start-method", "spawn", script(tmp_path, _LIVES), str(work)) as process:
        eventually(lambda: newest(work) == 1, PATIENCE_S, "the first round")
        everything = psutil.Process(process.pid).children(recursive=True)
        names = [child.name() for child in everything]
        assert names.count("sleep") == 2
        assert len(everything) == 2 + 2 + 3  # and two workers; server, agent, etcd
        process.kill()
        eventually(lambda: all(map(gone, everything)), what="all that the daemon started to be gone")


def test_a_job_s_environment_and_user_reach_its_workers(tmp_path: Path) -> None:
    """Submitted to a daemon: with variables of its own, as another user, into a folder that only root can make."""
    main = script(
        tmp_path,
        """
        import getpass, os
        print(getpass.getuser(), os.getuid(), os.environ["COLOUR"], os.environ["HOME"])
        raise RuntimeError("for the report")
        """,
    )
    root = os.geteuid() == 0
    user = "nobody" if root else getpass_user()
    open_to_all(tmp_path)
    with Cluster(ClusterSpec(nodes=1, isolated=False)) as cluster:
        log_dir = tmp_path / "log"
        fields = {"env": {"COLOUR": "green"}, "log_dir": str(log_dir), "max_restarts": 0}
        cluster.submit("impossible", [main], user="no-such-user", **fields)
        says = "'no-such-user' cannot be used on this node"
        cluster.wait_until(lambda: cluster.last_words().count(says) >= 2, PATIENCE_S, "a second try")
        assert "Traceback" not in cluster.last_words()
        assert cluster.cli("cancel", "impossible").returncode == 0
        cluster.submit("possible", [main], user=user, **fields)
        out = log_dir / "possible/round_1/rank_0/stdout.log"
        cluster.wait_until(lambda: out.exists() and out.read_text().endswith("\n"), PATIENCE_S, "the worker's line")
        entry = pwd.getpwnam(user)
        assert out.read_text() == f"{user} {entry.pw_uid} green {entry.pw_dir}\n"
        failed = cluster.wait_for(lambda events: [e for e in events if e.name == "workers_failed"], PATIENCE_S)
        assert failed[0].details["message"] == "RuntimeError: for the report"


def getpass_user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
