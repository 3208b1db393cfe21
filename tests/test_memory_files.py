"""The files of one daemon that keeps copies in RAM, on real shared memory: their limits, their owner, and their end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually
from memory_nodes import JOB, generation

from elasticd.core.memory import Generation, Index, Part, encode_index
from elasticd.core.model import NodeId
from elasticd.daemon.memory import MemoryStore
from elasticd.daemon.memory_files import MemorySettings
from elasticd.daemon.memory_folder import sweep
from elasticd.errors import MemoryRefused

MIB = 1024**2


@pytest.fixture
def memory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="edm-", dir="/dev/shm"))
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert left == []


@pytest.fixture
def store(memory: Path) -> Iterator[MemoryStore]:
    store = MemoryStore(MemorySettings(folder=str(memory), limit_bytes=8 * MIB), NodeId("n0"))
    store.enter(JOB, os.geteuid())
    yield store
    store.close()


def test_a_first_copy_is_refused_where_two_of_them_do_not_fit(store: MemoryStore) -> None:
    with pytest.raises(MemoryRefused) as refusal:
        store.begin(JOB, 0, generation(1), 5 * MIB, "w0")
    for told in ("node n0", "5.0 MiB", "two generations", "8.0 MiB", "memory.limit_bytes"):
        assert told in str(refusal.value)
    assert store.held().own_bytes == 0
    store.begin(JOB, 0, generation(1), 4 * MIB, "w0")  # half of it does


def test_tmpfs_that_is_full_refuses_before_a_worker_is_killed_for_it(memory: Path) -> None:
    size = 10 * shutil.disk_usage(memory).total
    store = MemoryStore(MemorySettings(folder=str(memory), limit_bytes=4 * size), NodeId("n0"))
    store.enter(JOB, os.geteuid())
    with pytest.raises(MemoryRefused, match=r"cannot be had in /dev/shm/edm-\S+ on node n0, which has .* free"):
        store.begin(JOB, 0, generation(1), size, "w0")
    assert store.held().own_bytes == 0
    store.close()


def test_memory_of_a_superseded_copy_is_used_again_and_not_more_than_two_are_held(store: MemoryStore) -> None:
    inodes = set()
    for step in range(1, 8):
        file = store.begin(JOB, 0, generation(step), 3 * MIB, "w0")
        inodes.add(file.path.stat().st_ino)
        store.commit(JOB, generation(step))
    assert len(inodes) == 2
    assert store.held().own_bytes == 6 * MIB


def copy_whole(store: MemoryStore, step: int, round_number: int) -> Generation:
    """As the workers of a round do, this node's and one that this node keeps copies for; which it was."""
    made, other = generation(step, round_number), NodeId(f"n{round_number}")
    parts = tuple(Part(rank=rank, node_id=NodeId(f"n{rank}"), size_bytes=MIB, crc32=0) for rank in (0, round_number))
    index = Index(generation=made, job_id=JOB, metadata_bytes=0, metadata_crc32=0, parts=parts)
    line = encode_index(index)
    store.begin(JOB, 0, made, MIB, f"w{round_number}")
    written = store.begin_index(JOB, made, 4096, f"w{round_number}")
    os.pwrite(written.descriptor, line, 0)
    assert store.seal(JOB, 0, made, len(line))
    received = store.receive_index(JOB, other, len(line), "from")
    os.pwrite(received.descriptor, line, 0)
    part = store.receive_part(JOB, other, round_number, MIB, "from", fetched=False)
    store.take_copy(JOB, other, index, received, {round_number: part})
    store.commit(JOB, made)
    return made


def test_rounds_that_are_over_hold_nothing_that_nobody_will_use_again(store: MemoryStore) -> None:
    """In each round other workers write, here and on another node whose copies this one keeps."""
    for number in range(1, 6):
        for step in range(3):
            last = copy_whole(store, 10 * number + step, number)
        held = store.held()
        assert (held.own_bytes + held.copied_bytes) // MIB == 4
        store.forget_writer(f"w{number}")
        store.keep_only(JOB, last)


def test_what_a_lost_worker_did_not_finish_goes_with_it(store: MemoryStore) -> None:
    store.begin(JOB, 0, generation(1), MIB, "w0")
    store.begin(JOB, 1, generation(1), MIB, "w1")
    store.forget_writer("w0")
    assert store.held().own_bytes == MIB
    store.forget_writer("w1")
    assert store.held().own_bytes == 0


def test_a_job_that_is_over_leaves_nothing(store: MemoryStore, memory: Path) -> None:
    store.begin(JOB, 0, generation(1), MIB, "w0")
    store.drop_job(JOB)
    assert store.held().own_bytes == 0
    assert [path.name for path in memory.rglob("*") if path.is_file()] == ["lock"]
    with pytest.raises(MemoryRefused, match="does not take part"):
        store.begin(JOB, 0, generation(2), MIB, "w0")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand files to another user")
def test_files_are_the_job_users_and_the_folder_is_the_daemons(memory: Path) -> None:
    """The user can fill a file and cannot put another one in its place; a copy is handed over once it is whole."""
    nobody = 65534
    store = MemoryStore(MemorySettings(folder=str(memory), limit_bytes=8 * MIB), NodeId("n0"))
    store.enter(JOB, nobody)
    file = store.begin(JOB, 0, generation(1), MIB, "w0")
    copy = store.receive_part(JOB, NodeId("n1"), 1, MIB, "copy", fetched=False)
    assert (file.path.stat().st_uid, file.path.stat().st_mode & 0o777) == (nobody, 0o600)
    assert copy.path.stat().st_uid == 0
    for folder in (file.path.parent, file.path.parent.parent):
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (0, 0o711)
    store.discard(JOB, [copy])
    store.close()


HOLD = """
import os, sys, time
from pathlib import Path
from elasticd.core.memory import Generation
from elasticd.daemon.memory import MemoryStore
from elasticd.daemon.memory_files import MemorySettings
store = MemoryStore(MemorySettings(folder=sys.argv[1], limit_bytes=2**24), "n0")
store.enter("j", os.geteuid())
store.begin("j", 0, Generation(step=1, round_number=1), 2**20, "w0")
if sys.argv[2] == "alone":
    os.kill(store._folder._janitor.pid, 9)
print("holds", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("janitor", ["beside", "alone"])
def test_a_daemon_that_is_killed_leaves_nothing(memory: Path, janitor: str) -> None:
    """A shell beside it sees to it; when that was killed too, the next daemon does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(memory), janitor], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    assert sweep(memory) == []  # it lives
    process.kill()
    process.wait()
    if janitor == "alone":
        (left,) = memory.iterdir()
        assert sweep(memory) == [left]
    eventually(lambda: list(memory.iterdir()) == [], 5)
