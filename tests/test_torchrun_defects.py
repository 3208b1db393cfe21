"""Five defects of torchrun 2.13 that elasticd must not have: each is shown on torchrun, then the same fault on elasticd.

The first by the same script under both commands. The others are torch's rendezvous alone: processes that drive a
handler as torch's agent does (rendezvous_node.py), with the c10d backend and with elasticd's. A test of the c10d half
that fails says that torch has mended the defect: delete the half, keep the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elasticd.cluster.embedded import EmbeddedEtcd
from tests.conftest import eventually

PATIENCE_S = 60.0
_NODE = Path(__file__).with_name("rendezvous_node.py")
_STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1000)
"""


class Nodes:
    """Processes of rendezvous_node.py that meet through one backend; node i has the address 127.0.0.(11 + i)."""

    def __init__(self, folder: Path, backend: str, endpoint: str, coordinator: int, pause_s: float) -> None:
        self.folder, self.backend, self.endpoint = folder, backend, endpoint
        self.coordinator, self.pause_s = coordinator, pause_s
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, count: int = 1) -> None:
        for _ in range(count):
            address = f"127.0.0.{11 + len(self.processes)}"
            command = [sys.executable, str(_NODE), self.backend, self.endpoint, "job", address, str(self.folder)]
            with (self.folder / f"{address}.log").open("wb") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def meet(self, count: int) -> None:
        """So many at once: their imports are done, so that the first round takes them all (see the last defect)."""
        self.start(count)
        self.wait(lambda: all(self.lines(node, "ready") for node in range(count)), "all imports")
        (self.folder / "go").touch()
        self.wait(lambda: self.sizes() == [count] * count, f"a world of {count}")

    def lines(self, node: int, event: str) -> list[dict]:
        file = self.folder / f"127.0.0.{11 + node}.jsonl"
        text = file.read_text() if file.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in found if line["event"] == event]

    def world(self, node: int) -> dict:
        """What this node counts itself in."""
        return (self.lines(node, "world") or [{"size": 0, "master": "", "rank": -1, "answers": False}])[-1]

    def sizes(self) -> list[int]:
        return [self.world(node)["size"] for node in range(len(self.processes))]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        try:
            eventually(condition, PATIENCE_S, what)
        except AssertionError as error:
            for path in sorted(self.folder.iterdir()):
                error.add_note(f"{path.name}: {path.read_text()[-1000:]}")
            raise

    def kill(self, node: int) -> None:
        self.processes[node].kill()
        self.processes[node].wait()

    def pause_coordination(self) -> None:
        """Longer than it takes for a node's sign of life to expire; the nodes themselves run on."""
        os.kill(self.coordinator, signal.SIGSTOP)
        time.sleep(self.pause_s)  # the fault itself, and not a wait for an effect
        os.kill(self.coordinator, signal.SIGCONT)


@pytest.fixture
def c10d(tmp_path: Path) -> Iterator[Nodes]:
    """torch's own: its state is in a TCPStore on a host that stays."""
    folder = tmp_path / "c10d"
    folder.mkdir()
    store = subprocess.Popen([sys.executable, "-c", _STORE], stdout=subprocess.PIPE, text=True)
    assert store.stdout is not None
    nodes = Nodes(folder, "c10d", f"127.0.0.1:{int(store.stdout.readline())}", store.pid, pause_s=5.0)
    with ended(nodes):
        yield nodes
    store.kill()
    store.communicate()


@pytest.fixture
def elasticd(tmp_path: Path) -> Iterator[Nodes]:
    folder = tmp_path / "elasticd"
    folder.mkdir()
    with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        nodes = Nodes(folder, "elasticd", etcd.endpoint, etcd.pid, pause_s=7.0)
        with ended(nodes):
            yield nodes


@contextlib.contextmanager
def ended(nodes: Nodes) -> Iterator[None]:
    try:
        yield
    finally:
        for number in range(len(nodes.processes)):
            nodes.kill(number)


# --- 1: a restart meets the keys of the life before ---

_STALE = """
import os, sys
import torch.distributed as dist
store, rank, world = next(dist.rendezvous("env://"))
life = os.environ["TORCHELASTIC_RESTART_COUNT"]
with open(sys.argv[1], "a") as out:
    out.write(f"life {life} sees {'stale keys' if store.check(['left behind']) else 'a fresh store'}\\n")
store.set("left behind", life)
sys.exit(1 if life == "0" else 0)
"""


@pytest.mark.parametrize(
    ("command", "second_life"),
    [(["torch.distributed.run"], "stale keys"), (["elasticd.cli", "run"], "a fresh store")],
    ids=["torchrun", "elasticd"],
)
def test_defect_1_a_restart_meets_the_keys_of_the_life_before(
    tmp_path: Path, command: list[str], second_life: str
) -> None:
    script, out = tmp_path / "stale.py", tmp_path / "out"
    script.write_text(_STALE)
    done = subprocess.run(
        [sys.executable, "-m", *command, "--standalone", "--max-restarts", "1", str(script), str(out)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == f"life 0 sees a fresh store\nlife 1 sees {second_life}\n"


# --- 2: the node of rank 0 is lost, and with it the workers' store ---


def lose_rank_0(nodes: Nodes) -> tuple[dict, dict]:
    """The worlds of the two survivors after their workers have failed."""
    nodes.meet(3)
    first = next(node for node in range(3) if nodes.world(node)["rank"] == 0)
    nodes.kill(first)
    (nodes.folder / "workers-fail-in-3").touch()
    rest = [node for node in range(3) if node != first]
    nodes.wait(lambda: all(nodes.world(node)["size"] == 2 for node in rest), "a world of the survivors")
    return nodes.world(rest[0]), nodes.world(rest[1])


def test_defect_2_survivors_keep_the_lost_store_torchrun(c10d: Nodes) -> None:
    worlds = sorted(lose_rank_0(c10d), key=lambda world: world["rank"])
    assert [world["answers"] for world in worlds] == [True, False]
    of_three = [line["master"] for line in c10d.lines(2, "world") if line["size"] == 3]
    assert worlds[1]["master"] == of_three[-1], "the dead one's"


def test_defect_2_survivors_keep_the_lost_store_elasticd(elasticd: Nodes) -> None:
    one, other = lose_rank_0(elasticd)
    assert one["master"] == other["master"]
    assert one["answers"]
    assert other["answers"]


# --- 3: a node is lost, and nothing else tells ---


def lose_one(nodes: Nodes) -> None:
    nodes.meet(3)
    last = next(node for node in range(3) if nodes.world(node)["rank"] == 2)
    nodes.kill(last)


def test_defect_3_a_lost_node_alone_changes_nothing_torchrun(c10d: Nodes) -> None:
    """The survivors know that it is dead, and no handler asks for a new world."""
    lose_one(c10d)
    for node in (0, 1):
        c10d.wait(lambda node=node: c10d.lines(node, "known")[-1]["participants"] == 2, "the dead node to be purged")
    known_at = time.monotonic()
    eventually(lambda: time.monotonic() > known_at + 3.0, what="sixty polls of the handler")
    assert c10d.sizes()[:2] == [3, 3]
    assert [c10d.lines(node, "known")[-1]["waiting"] for node in (0, 1)] == [0, 0]


def test_defect_3_a_lost_node_alone_changes_nothing_elasticd(elasticd: Nodes) -> None:
    lose_one(elasticd)
    elasticd.wait(lambda: elasticd.sizes().count(2) == 2, "a world of the survivors")


# --- 4: coordination pauses for longer than signs of life last, and two worlds train at once ---


def pause_and_join(nodes: Nodes) -> float:
    """When the pause began."""
    nodes.meet(3)
    paused_at = time.monotonic()
    nodes.pause_coordination()
    nodes.start()
    nodes.wait(lambda: nodes.sizes()[3] > 0, "a world for the newcomer")
    return paused_at


def test_defect_4_a_pause_splits_the_job_torchrun(c10d: Nodes) -> None:
    pause_and_join(c10d)
    split_at = time.monotonic()
    eventually(lambda: time.monotonic() > split_at + 3.0, what="sixty polls of the handler")
    assert c10d.sizes() == [3, 3, 3, 1]
    assert [c10d.lines(node, "known")[-1]["waiting"] for node in range(3)] == [0, 0, 0]


def test_defect_4_a_pause_splits_the_job_elasticd(elasticd: Nodes) -> None:
    paused_at = pause_and_join(elasticd)
    elasticd.wait(lambda: elasticd.sizes() == [4, 4, 4, 4], "one world of all")
    assert len({elasticd.world(node)["master"] for node in range(4)}) == 1
    later = [line for node in range(4) for line in elasticd.lines(node, "world") if line["t"] > paused_at]
    assert {line["size"] for line in later} == {4}, "nobody was ever put out, or alone"


# --- 5: a node joins a world whose first node stays ---


def join_later(nodes: Nodes) -> None:
    nodes.meet(2)
    nodes.start()
    nodes.wait(lambda: nodes.sizes()[:2] == [3, 3], "those who were there count three")


def test_defect_5_who_joins_later_is_not_told_the_store_torchrun(c10d: Nodes) -> None:
    """It waits for an address that rank 0 has written in the first round only, until the store's time-out (60 s)."""
    join_later(c10d)
    joined_at = time.monotonic()
    eventually(lambda: time.monotonic() > joined_at + 3.0, what="time enough to read a key")
    assert c10d.sizes() == [3, 3, 0]


def test_defect_5_who_joins_later_is_not_told_the_store_elasticd(elasticd: Nodes) -> None:
    join_later(elasticd)
    elasticd.wait(lambda: elasticd.sizes() == [3, 3, 3], "one world of all")
    assert len({elasticd.world(node)["master"] for node in range(3)}) == 1
    assert all(elasticd.world(node)["answers"] for node in range(3))
