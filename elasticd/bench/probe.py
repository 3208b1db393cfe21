"""One process of rendezvous_handlers.py: makes torch's handler of some backend, and calls it, when it is told to.

``python -m elasticd.bench.probe PROBE_AS_JSON``. It is told and tells through files in a folder that all share.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

POLL_S = 0.001


class Said(TypedDict):
    """On the monotonic clock, in seconds."""

    asked: float
    returned: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """``index`` 0 hosts the store of c10d."""

    backend: str
    endpoint: str
    conf: str
    address: str
    index: int
    nodes: int
    times: int
    folder: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    probe = Probe(**json.loads(sys.argv[1]))
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    conf = _parse_rendezvous_config(probe.conf) | ({"is_host": probe.index == 0} if probe.backend == "c10d" else {})
    folder, kept = Path(probe.folder), []
    for number in range(probe.times):
        parameters = RendezvousParameters(
            backend=probe.backend,
            endpoint=probe.endpoint,
            run_id=f"probe-{number}",
            min_nodes=probe.nodes,
            max_nodes=probe.nodes,
            local_addr=probe.address,
            **conf,
        )
        (folder / f"ready-{number}-{probe.index}").touch()
        while not (folder / f"go-{number}").exists():
            time.sleep(POLL_S)
        asked = time.monotonic()
        handler = get_rendezvous_handler(parameters)
        round_ = handler.next_rendezvous()
        said: Said = {"asked": asked, "returned": time.monotonic()}
        kept.append((handler, round_))  # a round's store lives as long as whoever hosts it
        draft = folder / f"draft-{number}-{probe.index}"
        draft.write_text(json.dumps(said))
        draft.rename(folder / f"done-{number}-{probe.index}")
    time.sleep(3600)  # until killed: those who leave would be noticed by those who measure


if __name__ == "__main__":
    main()
