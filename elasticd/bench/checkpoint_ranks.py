"""What each rank of the checkpoint experiment runs: every way to save and to load the same shard, in turn.

``python -m elasticd.bench.checkpoint_ranks DIRECTORY GB TURNS``, in torchrun's environment. Rank 0 prints one JSON
object a turn: seconds by what was done, of the slowest rank.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from elasticd.checkpoint.background import BackgroundSaver
from elasticd.checkpoint.disk import DISK, SealedFile
from elasticd.checkpoint.restore import restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saver

TENSORS = 16
#: With more state only what the goals are about is measured: a turn of 4 GB takes a quarter of a minute as it is.
ALL_UP_TO_GB = 1
CHUNK_BYTES = 16 * 1024 * 1024


def main() -> None:
    directory, gb, turns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=120)) if dist.get_world_size() > 1 else None
    ranks = _Ranks(directory, _shards(gb * 10**9), group, brief=gb > ALL_UP_TO_GB)
    ranks.turn()  # buffers are made and page tables filled
    for _ in range(turns):
        found = ranks.turn()
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def _shards(total_bytes: int) -> list[torch.Tensor]:
    """This rank's part, in float32."""
    rows = total_bytes // dist.get_world_size() // TENSORS // 4 // 1024
    return [torch.full((rows, 1024), float(n + dist.get_rank())) for n in range(TENSORS)]


class _Ranks:
    def __init__(
        self, directory: Path, shards: list[torch.Tensor], group: dist.ProcessGroup | None, *, brief: bool
    ) -> None:
        self._directory, self._shards, self._group, self._brief = directory, shards, group, brief
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._state = {f"w{n}": DTensor.from_local(shard, mesh, [Shard(0)]) for n, shard in enumerate(shards)}
        self._copies = [torch.empty_like(shard) for shard in shards]
        self._stager = DefaultStager(StagingOptions(False, False, False, False))  # what works without CUDA
        ours = directory / "ours"
        ours.mkdir(exist_ok=True)
        self._saver = Saver(ours, group=group, job_id="bench", round_number=1, keep=Keep(last=1))
        self._background = BackgroundSaver(self._saver, lambda *_: None)
        self._ours, self._mine = ours, directory / f"rank{dist.get_rank()}"
        self._turns = 0

    def turn(self) -> dict[str, float]:
        self._turns += 1
        found: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> None:
            found[name] = _timed(work)

        writes: list[tuple[str, Callable[[], Any]]] = [
            ("disk write", self._write),
            ("save", lambda: self._saver.save(self._state, 2 * self._turns)),
            ("dcp save", self._dcp_save),
            ("torch.save", self._torch_save),
        ]
        for name, work in writes if self._turns % 2 else reversed(writes):
            timed(name, work)
            if name == "disk write":
                timed("disk read", lambda: _read_cold(self._mine))
            if name == "save":
                self._drop_caches(self._ours)
                timed("restore", self._restore)
            if name == "dcp save":
                self._drop_caches(self._directory / "dcp")
                timed("dcp load", lambda: dcp_load(self._state, checkpoint_id=self._directory / "dcp"))
            self._clean()  # with 4 GB of state, what one has left in the page cache would slow the next one down
        timed("memory copy", self._copy)
        self._background.start(self._state, 2 * self._turns + 1)
        found["stall"] = _slowest(self._background.counts.last_stall_s)
        self._background.wait()
        if not self._brief:
            timed("sealed write", lambda: found.update(checksum=self._write_sealed()))
            timed("torch's stager", lambda: self._stager.stage(self._state))
            pending: list[Any] = []
            target = self._directory / "async"
            timed("dcp stall", lambda: pending.append(dcp_async_save(self._state, checkpoint_id=target)))
            pending[0].result()
        self._clean()
        return found

    def _copy(self) -> None:
        for copy, shard in zip(self._copies, self._shards, strict=True):
            copy.copy_(shard)

    def _write(self) -> None:
        with self._mine.open("wb", buffering=0) as file:
            for shard in self._shards:
                view = _bytes_of(shard)
                for start in range(0, len(view), CHUNK_BYTES):
                    file.write(view[start : start + CHUNK_BYTES])
            os.fsync(file.fileno())

    def _write_sealed(self) -> float:
        """The same bytes through our file; for how long it waited for checksums alone."""
        file = SealedFile(DISK, self._mine.with_suffix(".sealed"))
        for shard in self._shards:
            view = _bytes_of(shard)
            for start in range(0, len(view), CHUNK_BYTES):
                file.write(view[start : start + CHUNK_BYTES])
        file.close()
        return file.checksum_s

    def _torch_save(self) -> None:
        with self._mine.with_suffix(".pt").open("wb") as file:
            torch.save(self._shards, file)
            file.flush()
            os.fsync(file.fileno())

    def _dcp_save(self) -> None:
        dcp_save(self._state, checkpoint_id=self._directory / "dcp")

    def _restore(self) -> None:
        assert restore_newest(self._ours, self._group, lambda _: dict(self._state)) is not None

    def _drop_caches(self, path: Path) -> None:
        if dist.get_rank() == 0:
            for file in sorted(path.rglob("*.distcp")):
                _forget(file)
        dist.barrier()

    def _clean(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            for path in self._directory.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self._ours.mkdir()
            os.sync()
        dist.barrier()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def _timed(work: Callable[[], Any]) -> float:
    """Seconds from when all ranks are ready to when the slowest one is done."""
    dist.barrier()
    started = time.perf_counter()
    work()
    return _slowest(time.perf_counter() - started)


def _slowest(seconds: float) -> float:
    took = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


def _forget(path: Path) -> None:
    """Drop what the page cache holds of a file that has been flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_cold(path: Path) -> None:
    """Read it through from the disk, forgetting included: that is less than a millisecond."""
    _forget(path)
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
