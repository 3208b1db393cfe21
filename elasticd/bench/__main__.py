"""``python -m elasticd.bench``: runs the experiments, prints the table, writes out/bench.json.

Exit status 0: every goal is reached; 1: not; 2: wrong arguments. An experiment that breaks is a goal missed, and the
others go on.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from elasticd.bench import (
    balance,
    checkpoint,
    compression,
    idle,
    join,
    memory,
    node_kill,
    overhead,
    rendezvous,
    restart,
    session_cost,
    silent_loss,
    store_node_kill,
)
from elasticd.bench.figures import ELASTICD, Figure, Goal, all_hold
from elasticd.bench.machine import describe_machine
from elasticd.bench.options import Options
from elasticd.bench.report import document, make_markdown, print_report, write_document
from elasticd.errors import ElasticdError

OUT = Path("out/bench.json")

EXPERIMENTS: dict[str, Callable[[Options], list[Figure]]] = {
    module.__name__.rpartition(".")[2]: module.measure
    for module in (
        node_kill,
        store_node_kill,
        silent_loss,
        join,
        restart,
        rendezvous,
        idle,
        overhead,
        session_cost,
        balance,
        compression,
        checkpoint,
        memory,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    machine, started = describe_machine(), time.monotonic()
    figures: list[Figure] = []
    for name in asked.only or EXPERIMENTS:
        options = Options(
            repeat=asked.repeat, quick=asked.quick, checkpoint_gb=asked.checkpoint_gb, say=_say_of(name, started)
        )
        figures += run_experiment(name, options)
        written = document(machine, figures, time.monotonic() - started)
        write_document(asked.out, written)  # after each: an hour is long, and may be broken off
        asked.out.with_suffix(".md").write_text(make_markdown(machine, figures))
    print_report(machine, figures)
    if asked.json:
        print(json.dumps(written))
    return 0 if all_hold(figures) else 1


def run_experiment(name: str, options: Options) -> list[Figure]:
    """Its figures; one that says what went wrong, and reaches no goal, when it breaks."""
    options.say("begins")
    try:
        return EXPERIMENTS[name](options)
    except (ElasticdError, OSError, ValueError, TimeoutError) as error:
        options.say(f"broke: {error}")
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"{name.replace('_', ' ')}: broke"
        return [
            Figure(experiment=name, what=what, system=ELASTICD, unit="", samples=(first_line,), goal=Goal(at_most=0))
        ]


def _say_of(name: str, started: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {name}: {text}", file=sys.stderr, flush=True)

    return say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m elasticd.bench", description="Measures elasticd beside torchrun.")
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), metavar="NAME", help=f"some of: {names}")
    parser.add_argument("--repeat", type=_count, default=0, metavar="N", help="samples of elasticd in each experiment")
    parser.add_argument("--quick", action="store_true", help="few samples and short runs: a look, not a measurement")
    parser.add_argument("--checkpoint-gb", type=_count, default=0, metavar="GB", help="state to save (1 and 4)")
    parser.add_argument("--json", action="store_true", help="the whole document as the last line")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"where it goes (default {OUT})")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what runs on test hosts is removed
    sys.exit(main())
