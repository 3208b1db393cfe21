"""Three nodes agree on a world: from the last one's arrival until all three have entered it.

Two clocks. *Daemons*: from the last ``agent_ready`` of a new job in the histories to the last ``round_seen``; between
them lie the member's record, its watch, one transaction and its watch. *Handlers*: torch's interface on both sides,
as torchrun uses it (rendezvous_handlers.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from elasticd.bench.figures import DEFAULT, ELASTICD, TUNED, Figure, Goal
from elasticd.bench.jobs import BEST
from elasticd.bench.options import Options
from elasticd.bench.rendezvous_handlers import measure_handlers
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.history import Event, events_of

NODES = 3
ROUND_TIMEOUT_S = 30.0
#: Until the last job's processes have ended, whose exit would take the machine from the next one's start.
CALM_S = 1.0
WHAT = "rendezvous of three nodes"


def milliseconds_to_enter(history: Sequence[Event], job: str, nodes: int) -> float | None:
    """From the last node's readiness to the last one's entry into round 1; None while one is missing. Pure."""
    ready = {event.node: event.t for event in events_of(history, "agent_ready", job=job)}
    entered = {e.node: e.t for e in events_of(history, "round_seen", job=job) if e.round_number == 1}
    if len(ready) < nodes or len(entered) < nodes:
        return None
    return 1e3 * (max(entered.values()) - max(ready.values()))


def measure(options: Options) -> list[Figure]:
    figure = partial(Figure, experiment="rendezvous", unit="ms")
    daemons = _daemons(options)
    figures = [figure(what=WHAT, system=ELASTICD, samples=daemons, goal=Goal(at_most=50.0))]
    backends = [(f"{ELASTICD}, torchrun's agent", "elasticd", ""), (TUNED, "c10d", BEST.rdzv_conf)]
    if not options.quick:
        backends.append((DEFAULT, "c10d", ""))
    for system, backend, conf in backends:
        samples = measure_handlers(backend, conf, NODES, options.theirs(5))
        options.say(f"{system}: {', '.join(f'{sample:.1f} ms' for sample in samples)}")
        figures.append(figure(what=f"{WHAT}: handlers", system=system, samples=samples))
    return figures


def _daemons(options: Options) -> tuple[float, ...]:
    """One short job after the other: ``true`` needs no interpreter, so it is over at once."""
    samples: list[float] = []
    with Cluster(ClusterSpec(nodes=NODES)) as cluster:
        for index in range(options.ours(10)):
            job = f"rendezvous-{index}"
            time.sleep(CALM_S)
            cluster.submit(job, ["true"], nodes=f"{NODES}:{NODES}", no_python=True)
            cluster.wait_for(partial(_over, job=job), ROUND_TIMEOUT_S, f"{job} over")
            sample = milliseconds_to_enter(cluster.history(), job, NODES)
            assert sample is not None, "a job was over that nobody had entered"
            samples.append(sample)
            options.say(f"{ELASTICD}: {sample:.1f} ms")
    return tuple(samples)


def _over(history: Sequence[Event], job: str) -> bool:
    return len(events_of(history, "job_over", job=job)) == NODES
