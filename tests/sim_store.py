"""The store of a simulated cluster: revisions, leases, and the invariants of every round that is written."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elasticd.core.model import Round
from elasticd.core.records import from_json
from elasticd.core.view import Entry

if TYPE_CHECKING:
    from simulation import Sim

TTL_S = 5.0


@dataclass
class Held:
    value: str
    create: int
    mod: int
    lease: int


class SimStore:
    """Revisions, leases and guarded transactions, as etcd has them."""

    def __init__(self, sim: Sim) -> None:
        self.sim, self.kv, self.revision, self.leases = sim, {}, 1, {}
        self.up = True
        self.rounds: dict[tuple[str, int], str] = {}
        self._ids = itertools.count(1)

    def grant(self, ttl_s: float = TTL_S) -> int:
        lease = next(self._ids)
        self.leases[lease] = self.sim.now + ttl_s
        return lease

    def apply(self, puts: dict[str, tuple[str, int]], deletes: list[str]) -> None:
        self.revision += 1
        entries = []
        for key, (value, lease) in puts.items():
            old = self.kv.get(key)
            self.kv[key] = Held(value, old.create if old else self.revision, self.revision, lease)
            entries.append(Entry(key=key, value=value, create_revision=self.kv[key].create, mod_revision=self.revision))
            if key.endswith("/round"):
                self._check_round(key, value)
        entries += [Entry(key=key, value=None) for key in deletes if self.kv.pop(key, None)]
        self.sim.broadcast(tuple(entries), self.revision)

    def _check_round(self, key: str, value: str) -> None:
        written = from_json(Round, value)
        seats = (written.number, tuple((s.node_id, s.boot_id) for s in written.seats))
        known = self.rounds.setdefault((key, written.number), repr(seats))
        assert known == repr(seats), f"two worlds in round {written.number}"
        ranks = [r for s in written.seats for r in range(s.first_rank, s.first_rank + s.nproc)]
        assert ranks == list(range(written.world_size))
        assert len({s.node_id for s in written.seats}) == len(written.seats)
        assert written.world_size % self.sim.spec.ranks_per_replica == 0

    def expire(self) -> None:
        if not self.up:
            return
        dead = [lease for lease, at in self.leases.items() if at <= self.sim.now]
        for lease in dead:
            del self.leases[lease]
            doomed = [key for key, held in self.kv.items() if held.lease == lease]
            if doomed:
                self.apply({}, doomed)
