"""``python -m elasticd.testing.campaign``: seeded runs of one job, in a layout and under faults that the seed chooses.

Every run must show the same curve, samples and (in exact mode) bits as a run without faults (curves.py). Stops at the
first that does not, and says its seed: ``--seed N --runs 1`` does it again. What was recorded is kept in ``--folder``.

Exit status 0: all runs were clean; 1: one was not; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elasticd.errors import ElasticdError
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.curves import EXACT, FLOAT, RANKS, SMALL, STEPS, CurveRun, Reference, Task, run_reference
from elasticd.testing.faults import CutNode, Fault, KillNode, KillWorker, SlowNode
from elasticd.testing.validators import Pause, Violation

NODES = 3
MAX_RESTARTS = 50
#: A later fault would strike a job that has ended.
LAST_STEP = STEPS - 30
_SLOW = (0.15, 0.3, 0.6)
#: A step in a layout takes several times as long, and a node may have two ranks.
_SLOW_LAYOUT = (0.6, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault when the job comes to a step, and its heal at a later one (or when the job is over)."""

    fault: Fault
    at_step: int
    heal_at_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. One node at least is only slowed down, so the job goes on."""

    seed: int
    exact: bool
    parallel: str
    balance: str
    max_nodes: int
    strikes: tuple[Strike, ...]

    @property
    def task(self) -> Task:
        if self.exact:
            return EXACT
        return FLOAT if self.parallel == "ddp" else SMALL


def choose_plan(seed: int) -> Plan:
    """The same seed gives the same plan."""
    chance = random.Random(seed)
    exact = chance.random() < 0.3
    layouts = [layout for layout in RANKS if layout != "ddp"]
    parallel = "ddp" if exact or chance.random() < 0.4 else chance.choice(layouts)
    slow = _SLOW if parallel == "ddp" else _SLOW_LAYOUT
    first, second, third = chance.sample(range(NODES), NODES)
    faults: list[Fault] = [KillNode(node=first), SlowNode(node=third, fraction=chance.choice(slow))]
    if chance.random() < 0.7:
        faults.append(KillNode(node=second) if chance.random() < 0.5 else CutNode(node=second))
    if chance.random() < 0.5:
        faults.append(KillWorker(rank=0))
    strikes = []
    for fault in faults:
        at = chance.randrange(10, LAST_STEP)
        strikes.append(Strike(fault=fault, at_step=at, heal_at_step=at + chance.randrange(10, 80)))
    return Plan(
        seed=seed,
        exact=exact,
        parallel=parallel,
        balance=chance.choice(["auto", "off", "1:2:5"]),
        max_nodes=chance.choice([1, 2, NODES, NODES]),
        strikes=tuple(sorted(strikes, key=lambda strike: strike.at_step)),
    )


def run_plan(plan: Plan, cluster: Cluster, reference: Reference) -> list[Violation]:
    """The cluster is whole again afterwards. ElasticdError when the job did not come to its end."""
    run = CurveRun(cluster, f"seed-{plan.seed}", plan.task)
    limits = {"nodes": f"1:{plan.max_nodes}", "spares": NODES, "max_restarts": MAX_RESTARTS}
    run.submit(balance=plan.balance, step_seconds=0.01, parallel=plan.parallel, **limits)
    for step, act in sorted(_schedule(plan, run), key=lambda item: item[0]):
        if step < STEPS:
            run.wait_step(step, timeout_s=60)
        act()
    run.wait_over()
    return run.judge(reference)


def _schedule(plan: Plan, run: CurveRun) -> list[tuple[int, Callable[[], None]]]:
    """What to do at which step."""
    since: dict[Strike, float] = {}

    def apply(strike: Strike) -> Callable[[], None]:
        def act() -> None:
            since[strike] = time.monotonic()
            strike.fault.apply(run.cluster)

        return act

    def heal(strike: Strike) -> Callable[[], None]:
        def act() -> None:
            strike.fault.heal(run.cluster)
            if isinstance(strike.fault, CutNode):
                name = run.cluster.nodes[strike.fault.node].name
                run.pauses.append(Pause(node=name, start=since[strike], end=time.monotonic()))

        return act

    found = []
    for strike in plan.strikes:
        found += [(strike.at_step, apply(strike)), (strike.heal_at_step, heal(strike))]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    folder = Path(asked.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    references: dict[Task, Reference] = {}
    with Cluster(ClusterSpec(nodes=NODES, etcd_members=1), folder=folder) as cluster:
        for seed in range(asked.seed, asked.seed + asked.runs):
            plan, started_at = choose_plan(seed), time.monotonic()
            _say(str(plan))
            if plan.task not in references:
                references[plan.task] = run_reference(folder, plan.task)
            try:
                wrong = [str(violation) for violation in run_plan(plan, cluster, references[plan.task])]
            except ElasticdError as error:
                wrong = [str(error)]
            if wrong:
                _say("\n".join([*wrong, f"seed {seed} failed; again: --seed {seed} --runs 1; recorded in {folder}"]))
                return 1
            _say(f"seed {seed}: clean, {time.monotonic() - started_at:.1f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m elasticd.testing.campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=1, help="of the first run; each further one has the next")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--folder", default="out/campaign", help="for logs, histories and ledgers")
    return parser


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
