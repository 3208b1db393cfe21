"""One node as torch's agent drives a rendezvous handler, without workers: ``BACKEND ENDPOINT RUN_ID ADDRESS FOLDER``.

Joins once there is ``FOLDER/go``, and again when the handler says that nodes wait, or when
``FOLDER/workers-fail-in-3`` appears while it counts itself in a world of three. Every change of what it knows is a JSON
line in ``FOLDER/<ADDRESS>.jsonl``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

POLL_S = 0.05
#: As quick as c10d's rendezvous can be made without breaking by itself (TESTHOSTS.md): dead after 3 s.
TUNED = {"keep_alive_interval": 1, "keep_alive_max_attempt": 3, "last_call_timeout": 1, "join_timeout": 60}


def main() -> None:
    backend, endpoint, run_id, address, folder = sys.argv[1:]
    config = {**TUNED, "is_host": "false"} if backend == "c10d" else {}
    handler = get_rendezvous_handler(
        RendezvousParameters(backend, endpoint, run_id, 1, 4, local_addr=address, **config)
    )
    fault = Path(folder, "workers-fail-in-3")
    with Path(folder, f"{address}.jsonl").open("w", buffering=1) as out:
        say(out, event="ready")
        while not Path(folder, "go").exists():
            time.sleep(POLL_S)
        world_size = join(handler, out)
        known = (0, -1)
        while True:
            now = (handler.num_nodes_waiting(), participants(handler))
            if now != known:
                known = now
                say(out, event="known", waiting=now[0], participants=now[1])
            if now[0] > 0 or (world_size == 3 and fault.exists()):
                world_size = join(handler, out)
            time.sleep(POLL_S)


def join(handler: RendezvousHandler, out) -> int:
    info = handler.next_rendezvous()
    place = info.bootstrap_store_info
    master = f"{place.master_addr}:{place.master_port}"
    say(out, event="world", rank=info.rank, size=info.world_size, master=master, answers=answers(master))
    return info.world_size


def answers(master: str) -> bool:
    host, port = master.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        return False
    return True


def participants(handler: RendezvousHandler) -> int:
    """Whom c10d's shared state names; elasticd's handler has no such thing."""
    holder = getattr(handler, "_state_holder", None)
    return len(holder.state.participants) if holder is not None else -1


def say(out, **line: object) -> None:
    out.write(json.dumps({"t": time.monotonic(), "pid": os.getpid(), **line}) + "\n")


if __name__ == "__main__":
    main()
