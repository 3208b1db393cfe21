"""What a training process asks of its daemon about copies in RAM. Over the link, from any thread.

Not here: what is copied, and how the ranks agree on it (checkpoint/memory_*.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elasticd.channel import Message
from elasticd.core.memory import Fetched, Generation, Holding
from elasticd.core.model import NodeId
from elasticd.core.records import from_plain
from elasticd.errors import ChannelClosed, MemoryRefused
from elasticd.worker.link import DaemonLink

#: So many parts, or their paths, are two thirds of the longest line that a channel takes where names are the longest.
PARTS_AT_ONCE = 500


class MemoryHost:
    """MemoryRefused from any method that answers: with the daemon's reason, or because it is gone."""

    def __init__(self, link: DaemonLink, node_id: str, *, timeout_s: float) -> None:
        self._link, self.node_id, self._timeout_s = link, NodeId(node_id), timeout_s

    def begin(self, generation: Generation, size_bytes: int, index_bytes: int) -> tuple[Path, Path | None]:
        """Files to fill: this rank's part, and the index where ``index_bytes`` is not 0."""
        answer = self._ask("begin", generation, size_bytes=size_bytes, index_bytes=index_bytes)
        index_path = answer.get("index_path")
        return Path(answer["path"]), Path(index_path) if index_path else None

    def seal(self, generation: Generation, index_bytes: int) -> tuple[bool, str]:
        """The files are written. Returns once this node's parts are kept: whether by a buddy too, or why not."""
        answer = self._ask("seal", generation, index_bytes=index_bytes)
        return bool(answer["at_buddy"]), str(answer["reason"])

    def commit(self, generation: Generation) -> None:
        self._say("commit", generation)

    def abandon(self, generation: Generation) -> None:
        self._say("abandon", generation)

    def refused(self, step: int, reason: str) -> None:
        self._link.post({"type": "memory", "op": "refused", "id": 0, "step": step, "reason": reason})

    def inventory(self) -> list[Holding]:
        answer = self._ask("inventory", None)
        return [from_plain(Holding, plain) for plain in answer["holdings"]]

    def fetch(
        self,
        generation: Generation,
        seal: int,
        wanted: Mapping[int, tuple[NodeId, Sequence[NodeId]]],
        index_from: Sequence[NodeId],
        damaged: Sequence[tuple[int, str]] = (),
    ) -> Fetched:
        """Have these ranks' parts brought here: by rank, who wrote it and who has it. The index comes along.

        ``damaged``: rank and path of parts that are here already, and are of no use.
        """
        plain = [[rank, writer, list(nodes)] for rank, (writer, nodes) in wanted.items()]
        paths: dict[int, str] = {}
        for first in range(0, max(1, len(plain)), PARTS_AT_ONCE):
            some = plain[first : first + PARTS_AT_ONCE]
            ranks = {rank for rank, *_ in some}
            where = {"index_from": list(index_from), "damaged": [each for each in damaged if each[0] in ranks]}
            answer = self._ask("fetch", generation, seal=seal, wanted=some, **where)
            paths |= {int(rank): str(path) for rank, path in answer["paths"]}
        return Fetched(paths=paths, index_path=str(answer["index_path"]), index_bytes=int(answer["index_bytes"]))

    def restored(self, generation: Generation | None) -> None:
        """Training goes on from this one; None: from elsewhere, and what is in RAM is void."""
        self._say("restored", generation)

    def _say(self, operation: str, generation: Generation | None) -> None:
        self._link.post({"type": "memory", "op": operation, "id": 0, **_plain(generation)})

    def _ask(self, operation: str, generation: Generation | None, **more: Any) -> Message:
        try:
            answer = self._link.request(
                {"type": "memory", "op": operation, **_plain(generation), **more}, self._timeout_s
            )
        except ChannelClosed as error:
            raise MemoryRefused(str(error)) from error
        if not answer.get("ok"):
            raise MemoryRefused(str(answer.get("reason", "no reason given")))
        return answer


def _plain(generation: Generation | None) -> dict[str, int]:
    return {} if generation is None else {"step": generation.step, "of_round": generation.round_number}
