"""For tests on a real etcd: what time mends is repeated, what comes by a watch is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.store import Changes
from elasticd.errors import ElasticdError, StoreUnavailable

PREFIX = "/elasticd/test/"


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
    return value


def patiently(call: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Repeats what time mends."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except StoreUnavailable:
            assert time.monotonic() < end
            time.sleep(0.02)


class Follower:
    """Watches a prefix in a thread and keeps all that it sees."""

    def __init__(self, store: EtcdStore, prefix: str, after_revision: int) -> None:
        self.seen: list[Changes] = []
        self.signs = 0
        self.error: BaseException | None = None
        self._watch = store.watch(prefix, after_revision)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for changes in self._watch:
                self.signs += 1
                if changes.changes:
                    self.seen.append(changes)
        except ElasticdError as error:
            self.error = error

    @property
    def values(self) -> list[str]:
        return [c.entry.value for changes in self.seen for c in changes.changes if c.entry is not None]

    def next_sign(self) -> None:
        now = self.signs
        until(lambda: self.signs > now)

    def close(self) -> None:
        self._watch.close()
        self._thread.join(5)
        assert not self._thread.is_alive()
