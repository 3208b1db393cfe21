"""Copying the state into the daemon's memory behind the steps: the step waits for one pass over its share of it.

Copies are begun twice as often as they are asked for, and a step that is due for one counts as completed only once the
copy before is safe on every rank. So of the steps that count, fewer than ``every_steps`` are lost by a kill, while
checksums and the way to the buddy are hidden behind the steps between. With ``every_steps=1`` nothing can hide: each
step waits for its own copy.

A copy is one of these, on every rank alike: *committed* (every rank's part is whole on its own node, and at a buddy's
where there is one: older ones may go), or *void* (a rank was refused room, or its part was damaged on the way: the one
before stays). That is agreed by two small exchanges of the ranks, in the thread that copies. Nothing is overwritten
that belongs to a committed copy, or to one that might yet be.

Not here: where the bytes go (memory_layout.py), the way back (memory_restore.py), the daemon's part (daemon/memory*).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from elasticd.checkpoint.exchange import share
from elasticd.checkpoint.memory_layout import Layout, Outgrown, checksum_of, copy_state, plan_together
from elasticd.core.memory import Generation, Index, Part, encode_index
from elasticd.core.model import NodeId
from elasticd.errors import MemoryRefused

log = logging.getLogger(__name__)

#: An index names every rank's part; the line is made before it is known how long the numbers in it are.
_PART_LINE_BYTES = 256
_OUTGROWN = "outgrown"


class SavingHost(Protocol):
    """The daemon, as far as saving goes. MemoryRefused from what answers."""

    node_id: NodeId

    def begin(self, generation: Generation, size_bytes: int, index_bytes: int) -> tuple[Path, Path | None]: ...

    def seal(self, generation: Generation, index_bytes: int) -> tuple[bool, str]: ...

    def commit(self, generation: Generation) -> None: ...

    def abandon(self, generation: Generation) -> None: ...

    def refused(self, step: int, reason: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that copy together. ``leads_node``: it alone writes the index on its node."""

    rank: int
    world_size: int
    leads_node: bool
    job_id: str
    round_number: int
    group: dist.ProcessGroup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """How a copy ended on this rank. ``at_buddies``: every rank's part is kept by another node too."""

    step: int
    size_bytes: int
    seconds: float
    stall_s: float
    committed: bool
    at_buddies: bool
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class MemoryCounts:
    """What copies in RAM have done and cost on this rank. ``stall_s``: all that steps have waited for them."""

    committed: int = 0
    void: int = 0
    copied_bytes: int = 0
    stall_s: float = 0.0
    last_stall_s: float = 0.0


@dataclass(slots=True)
class _Begun:
    """A copy under way on this rank. ``problem``: why it can only be void."""

    generation: Generation
    started: float
    target: memoryview | None = None
    index_path: Path | None = None
    problem: str = ""
    stall_s: float = 0.0


class MemoryCopies:
    """All ranks call the same methods in the same order, from their training threads.

    What ends a copy other than a refusal (a rank died or was silent; a bug) is raised by whatever is called next.
    """

    def __init__(
        self, host: SavingHost, ranks: Ranks, *, every_steps: int, told: Callable[[Copied], None] = lambda _: None
    ) -> None:
        self._host, self._ranks, self._told = host, ranks, told
        self._waits_for_each = every_steps == 1
        self._interval = max(1, every_steps // 2)
        self._layout: Layout | None = None
        self._off = ""
        self._mapped: dict[int, mmap.mmap] = {}
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._last: Copied | None = None
        self._hashing = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="elasticd-checksum")
        self.counts = MemoryCounts()

    def step_completed(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """After each step, before it counts. Begins a copy where one is due, when the one before has ended."""
        self.check()
        if step % self._interval == 0 and not self._off:
            self.begin(state, step)

    def begin(self, state: Callable[[], dict[str, Any]], step: int) -> None:
        """Returns once the state may be changed again; where each step waits for its own copy, once that has ended."""
        started = time.monotonic()
        self.wait()
        begun = _Begun(Generation(step=step, round_number=self._ranks.round_number), started)
        if not self._off:
            self._copy(begun, state())
            self._launch(begun)
            if self._waits_for_each:
                self.wait()
        self._stalled(begun)

    def save(self, state: Callable[[], dict[str, Any]], step: int) -> Copied | None:
        """A copy of this step that has ended, the one under way if it is of this step; None where there can be none."""
        self.wait()
        for _ in range(2):  # the state may have outgrown its plan: then a second one is made
            if self._last is not None and self._last.step == step and self._last.committed:
                return self._last
            if self._off:
                return None
            self.begin(state, step)
            self.wait()
        return self._last

    def wait(self) -> None:
        """Until no copy is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what broke a copy. Costs nothing."""
        if self._broken is not None:
            raise self._broken

    def close(self, timeout_s: float | None = None) -> bool:
        """Wait for a copy under way; whether none is."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        self._hashing.shutdown(wait=False)
        return thread is None or not thread.is_alive()

    # --- in the training thread ---

    def _copy(self, begun: _Begun, state: dict[str, Any]) -> None:
        """One pass over this rank's share of the state. What goes wrong is told to the others by the thread."""
        if self._layout is None:
            try:
                self._layout = plan_together(state, self._ranks.group)
            except CheckpointException as error:  # on every rank
                begun.problem = f"the state cannot be planned for: {next(iter(error.failures.values()))[0]}"
                return
        layout = self._layout
        index_bytes = self._index_bytes(layout) if self._ranks.leads_node else 0
        try:
            path, begun.index_path = self._host.begin(begun.generation, layout.size_bytes, index_bytes)
            begun.target = self._map(path, layout.size_bytes)
            copy_state(layout, state, begun.target)
        except MemoryRefused as error:
            begun.problem = str(error)
        except OSError as error:
            begun.problem = f"shared memory of node {self._host.node_id} cannot be used: {error}"
        except Outgrown:
            begun.problem = _OUTGROWN

    def _map(self, path: Path, size_bytes: int) -> memoryview:
        """The same mapping for the same memory: the daemon hands a file out again under another name."""
        number = path.stat().st_ino
        found = self._mapped.get(number)
        if found is None or len(found) != size_bytes:
            with path.open("r+b", buffering=0) as file:
                found = mmap.mmap(file.fileno(), size_bytes) if size_bytes else None
            if found is None:
                return memoryview(bytearray())
            while len(self._mapped) > 1:  # two generations are all that can be in use
                del self._mapped[next(iter(self._mapped))]
            self._mapped[number] = found
        return memoryview(found)

    def _index_bytes(self, layout: Layout) -> int:
        return 1024 + _PART_LINE_BYTES * self._ranks.world_size + len(layout.metadata)

    def _launch(self, begun: _Begun) -> None:
        def run() -> None:
            try:
                self._ended(self._finish(begun))
            except BaseException as error:  # noqa: BLE001 - the top of a thread: raised again in the training thread
                self._broken = error

        begun.stall_s = time.monotonic() - begun.started
        self._thread = threading.Thread(target=run, name="elasticd-memory")
        self._thread.start()

    def _stalled(self, begun: _Begun) -> None:
        self.counts.last_stall_s = time.monotonic() - begun.started
        self.counts.stall_s += self.counts.last_stall_s

    # --- in the thread that copies ---

    def _finish(self, begun: _Begun) -> Copied:
        size_bytes = 0 if begun.target is None else len(begun.target)
        crc32 = 0 if begun.target is None or begun.problem else checksum_of(begun.target, self._hashing)
        mine = {"node": self._host.node_id, "size_bytes": size_bytes, "crc32": crc32, "problem": begun.problem}
        said = share(mine, self._ranks.group)
        problems = [one["problem"] for one in said if one["problem"]]
        if problems:
            return self._void(begun, problems, off=True)
        at_buddy, reason = self._seal(begun, said)
        levels = share([at_buddy, reason], self._ranks.group)
        refused = [why for level, why in levels if level is None]
        if refused:
            return self._void(begun, refused, off=False)
        self._host.commit(begun.generation)
        return self._copied(begun, size_bytes, committed=True, at_buddies=all(level for level, _ in levels))

    def _seal(self, begun: _Begun, said: list[Any]) -> tuple[bool | None, str]:
        """(kept by a buddy too, or None when it is not kept; why not)."""
        try:
            index_bytes = self._write_index(begun, said)
            return self._host.seal(begun.generation, index_bytes)
        except MemoryRefused as error:
            reason = str(error)
        except OSError as error:
            reason = f"shared memory of node {self._host.node_id} cannot be used: {error}"
        self._host.abandon(begun.generation)  # now: the node's other ranks must not wait for this one
        return None, reason

    def _write_index(self, begun: _Begun, said: list[Any]) -> int:
        """On one rank of each node; how long it is. Every part is written by now, whoever's it is."""
        if begun.index_path is None:
            return 0
        assert self._layout is not None
        metadata = self._layout.metadata
        index = Index(
            generation=begun.generation,
            job_id=self._ranks.job_id,
            metadata_bytes=len(metadata),
            metadata_crc32=zlib.crc32(metadata),
            parts=tuple(
                Part(rank=rank, node_id=NodeId(one["node"]), size_bytes=one["size_bytes"], crc32=one["crc32"])
                for rank, one in enumerate(said)
            ),
        )
        content = encode_index(index) + metadata
        with begun.index_path.open("r+b") as file:
            file.write(content)
        return len(content)

    def _void(self, begun: _Begun, problems: list[str], *, off: bool) -> Copied:
        """``off``: a rank has no room, and will have none for the next copy either. The same on every rank."""
        self._host.abandon(begun.generation)
        refusals = [problem for problem in problems if problem != _OUTGROWN]
        if not refusals:
            self._layout = None  # on every rank: the next one is planned anew
            return self._copied(begun, 0, committed=False, reason="the form of the state has changed")
        if begun.problem and begun.problem != _OUTGROWN:
            self._host.refused(begun.generation.step, begun.problem)
        if off:
            self._off = refusals[0]
        if self._ranks.rank == 0:
            until = "; there are none until the job's next round" if off else ""
            why = "; ".join(sorted(set(refusals)))
            log.warning("elasticd: no copy of step %d in RAM: %s%s", begun.generation.step, why, until)
        return self._copied(begun, 0, committed=False, reason=refusals[0])

    def _copied(
        self, begun: _Begun, size_bytes: int, *, committed: bool, at_buddies: bool = False, reason: str = ""
    ) -> Copied:
        seconds = time.monotonic() - begun.started
        return Copied(
            step=begun.generation.step,
            size_bytes=size_bytes,
            seconds=seconds,
            stall_s=seconds if self._waits_for_each else begun.stall_s,
            committed=committed,
            at_buddies=at_buddies,
            reason=reason,
        )

    def _ended(self, copied: Copied) -> None:
        self._last = copied
        if copied.committed:
            self.counts.committed += 1
            self.counts.copied_bytes += copied.size_bytes
        else:
            self.counts.void += 1
        self._told(copied)
