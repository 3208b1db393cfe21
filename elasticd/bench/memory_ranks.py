"""What each rank of the memory experiment runs, as a job of elasticd: the same shard by every way into RAM and back.

Arguments: FOLDER GB TURNS, the size of one rank's shard. Rank 0 writes one JSON line a turn to FOLDER/turns.jsonl:
seconds by what was done, of the slowest rank; ``copying`` exists while copies are on their way.
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
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from elasticd.checkpoint.memory_restore import MemoryRestore
from elasticd.checkpoint.memory_save import MemoryCopies, Ranks
from elasticd.torch_defects import keep_destroyed_groups
from elasticd.worker.link import DaemonLink
from elasticd.worker.memory_host import MemoryHost
from elasticd.worker.world import Place

TENSORS = 16
TIMEOUT_S = 120.0
#: Buffers are made and page tables filled; of copies in RAM there are two.
WARM_UP = 2


def main() -> None:
    folder, gb, turns = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = _Ranks(folder, int(gb * 1e9))
    for _ in range(WARM_UP):
        ranks.turn()
    with (folder / "turns.jsonl").open("a") as file:
        for _ in range(turns):
            found = ranks.turn()
            if dist.get_rank() == 0:
                file.write(json.dumps(found) + "\n")
                file.flush()
    dist.barrier()
    ranks.close()
    keep_destroyed_groups()
    dist.destroy_process_group()


class _Ranks:
    def __init__(self, folder: Path, shard_bytes: int) -> None:
        place = Place.from_environment()
        rows = shard_bytes // TENSORS // 4 // 1024
        self._shards = [torch.full((rows, 1024), float(n + place.rank)) for n in range(TENSORS)]
        mesh = init_device_mesh("cpu", (place.world_size,))
        self._state = {f"w{n}": DTensor.from_local(shard, mesh, [Shard(0)]) for n, shard in enumerate(self._shards)}
        self._copies_here = [torch.empty_like(shard) for shard in self._shards]
        self._scratch = Path(os.environ["ELASTICD_BENCH_SHM"])
        self._mine, self._flag, self._turns = self._scratch / f"rank{place.rank}.pt", folder / "copying", 0
        hello = {"type": "worker_hello", "job": place.job_id, "round": place.round_number, "rank": place.rank}
        self._link = DaemonLink(place.socket_path, {**hello, "local_rank": place.local_rank, "pid": os.getpid()})
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
        self._host = MemoryHost(self._link, place.node_id, timeout_s=TIMEOUT_S)
        self._copies = MemoryCopies(
            self._host,
            Ranks(
                rank=place.rank,
                world_size=place.world_size,
                leads_node=place.local_rank == 0,
                job_id=place.job_id,
                round_number=place.round_number,
                group=self._group,
            ),
            every_steps=2,
        )

    def turn(self) -> dict[str, float]:
        self._turns += 1
        found = {"memory copy": _timed(self._copy)}
        ways = [self._by_elasticd, self._by_torch_save, self._by_dcp]
        for way in ways if self._turns % 2 else reversed(ways):
            way(found)
        return found

    def close(self) -> None:
        self._copies.close()
        self._link.close()

    def _copy(self) -> None:
        for copy, shard in zip(self._copies_here, self._shards, strict=True):
            copy.copy_(shard)

    def _by_elasticd(self, found: dict[str, float]) -> None:
        self._flag.touch()
        started = time.monotonic()
        self._copies.begin(lambda: self._state, self._turns)
        found["stall"] = _slowest(self._copies.counts.last_stall_s)
        self._copies.wait()
        found["safe"] = _slowest(time.monotonic() - started)
        dist.barrier()
        self._flag.unlink(missing_ok=True)
        self._wipe()
        restore = MemoryRestore(self._host, self._group)
        found["restore"] = _timed(lambda: restore.restore(lambda _: self._state, at_least=self._turns))
        self._check()

    def _by_torch_save(self, found: dict[str, float]) -> None:
        found["torch.save"] = _timed(lambda: torch.save(self._shards, self._mine))
        self._wipe()

        def load() -> None:
            for shard, read in zip(self._shards, torch.load(self._mine), strict=True):
                shard.copy_(read)

        found["torch.load"] = _timed(load)
        self._check()
        self._mine.unlink()

    def _by_dcp(self, found: dict[str, float]) -> None:
        target = self._scratch / "dcp"
        pending: list[Any] = []
        found["dcp stall"] = _timed(lambda: pending.append(dcp_async_save(self._state, checkpoint_id=target)))
        pending[0].result()
        self._wipe()
        found["dcp load"] = _timed(lambda: dcp_load(self._state, checkpoint_id=target))
        self._check()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(target)
        dist.barrier()

    def _wipe(self) -> None:
        for shard in self._shards:
            shard.zero_()

    def _check(self) -> None:
        """What was read is what was written: a way that brings nothing back must not count as fast."""
        for n, shard in enumerate(self._shards):
            assert bool((shard == float(n + dist.get_rank())).all()), "the state did not come back"


def _timed(work: Callable[[], object]) -> float:
    dist.barrier()
    started = time.monotonic()
    work()
    return _slowest(time.monotonic() - started)


def _slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


if __name__ == "__main__":
    main()
