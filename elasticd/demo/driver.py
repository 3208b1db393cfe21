"""Plays the plan on a real cluster: an etcd, daemons, the training job, and SIGKILL when a cue is due.

One loop, in the main thread: read what was written, show it, act. Not here: any judgement (claims.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from elasticd.cluster.embedded import etcd_version, find_etcd
from elasticd.demo.claims import Summary, judge
from elasticd.demo.picture import draw_picture
from elasticd.demo.plan import JOB, LEDGER, NODES, Act, Cue, DemoOptions, Plan, is_due, make_plan
from elasticd.demo.record import Line, Mark, Record, parse_line
from elasticd.demo.scene import NodeState, Scene, look
from elasticd.demo.stage import Stage, open_stage
from elasticd.errors import ConfigError, OperatorError
from elasticd.testing.cgroups import Unsupported
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.history import Tail
from elasticd.testing.hosts import why_not_namespaces

_POLL_S = 0.05
#: Without a step for so long the demo gives up: the first one waits for three imports of torch.
_PATIENCE_S = 60.0
_EXIT_BROKEN = 1
_EXIT_INTERRUPTED = 130
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(options: DemoOptions) -> int:
    """0 when every claim held, 1 when one did not, 130 after Ctrl-C. OperatorError for what a person must mend."""
    plan = make_plan(options)
    logging.getLogger("elasticd").setLevel(logging.ERROR)  # an etcd that is "fine for a trial" is fine here
    machine = _describe_machine()
    stage = open_stage(
        sys.stderr if options.as_json else sys.stdout, _title(machine), plain=options.plain or options.as_json
    )
    folder = _open_folder(options.keep)
    status = _EXIT_BROKEN
    try:
        record = _play(plan, folder, stage)
        summary = judge(record, plan)
        stage.conclude(summary)
        _write_results(folder, record, plan, summary)
        if options.as_json:
            print(json.dumps({**summary.plain(), "machine": machine}), flush=True)
        status = 0 if summary.passed else _EXIT_BROKEN
    except Unsupported as error:
        raise OperatorError(f"the demo cannot run on this machine: {error}") from error
    except KeyboardInterrupt:
        status = _EXIT_INTERRUPTED
        print("elasticd demo: interrupted; all that it had started is gone", file=sys.stderr)
    finally:
        if options.keep or status == _EXIT_BROKEN:
            print(f"Logs, histories and checkpoints: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return status


def _play(plan: Plan, folder: Path, stage: Stage) -> Record:
    with _ending_in_order(), Cluster(ClusterSpec(nodes=0), folder=folder) as cluster:
        production = Production(cluster, plan)
        with stage:
            production.play(stage)
        return production.record()


class Production:
    """One performance: what was done so far, and what was read."""

    def __init__(self, cluster: Cluster, plan: Plan) -> None:
        self._cluster, self._plan = cluster, plan
        self._ledger = cluster.folder / LEDGER
        self._tail = Tail()
        self._lines: list[Line] = []
        self._marks: list[Mark] = []
        self._cues = list(plan.cues)
        self._started_at = self._progressed_at = time.monotonic()

    def play(self, stage: Stage) -> None:
        """Until the job is over on every node that is left, or stands still for too long."""
        for _ in range(NODES):
            self._cluster.start_node(self._cluster.add_node())
        stage.show(self._look())
        self._submit()
        while True:
            scene = self._look()
            stage.show(scene)
            if _is_over(scene) or time.monotonic() > self._progressed_at + _PATIENCE_S:
                return
            self._act(scene)
            time.sleep(_POLL_S)

    def record(self) -> Record:
        """All that is known by now."""
        new = [parse_line(plain) for plain in self._tail.read([self._ledger])]
        if new:
            self._lines = sorted([*self._lines, *new], key=lambda line: line.t)
            self._progressed_at = time.monotonic()
        # The daemons' own lines of steps say less than the ledger does, and are most of a history.
        history = [event for event in self._cluster.history() if event.name != "step"]
        return Record(history=history, lines=tuple(self._lines), marks=tuple(self._marks))

    def _look(self) -> Scene:
        addresses = {node.name: node.host.address for node in self._cluster.nodes}
        return look(self.record(), self._plan, addresses, start=self._started_at, now=time.monotonic())

    def _submit(self) -> None:
        # No restart is allowed: one that is charged to the script would end the job.
        command = self._plan.command(self._cluster.folder)
        self._cluster.submit(JOB, command, module=True, nodes=f"1:{NODES}", max_restarts=0)

    def _act(self, scene: Scene) -> None:
        if not self._cues:
            return
        cue = self._cues[0]
        if is_due(cue, world=scene.world, step=scene.step, steps_in_round=scene.steps_in_round):
            self._cues.pop(0)
            self._perform(cue, scene)

    def _perform(self, cue: Cue, scene: Scene) -> None:
        joins = cue.act is Act.JOIN
        index = self._cluster.add_node() if joins else self._victim(hosts_store=cue.hosts_store)
        self._marks.append(
            Mark(
                t=time.monotonic(),
                act=cue.act,
                node=self._cluster.nodes[index].name,
                step=scene.step,
                round_number=scene.round_number,
                hosts_store=cue.hosts_store,
            )
        )
        if joins:
            self._cluster.start_node(index)
        else:
            self._cluster.kill_node(index)

    def _victim(self, *, hosts_store: bool) -> int:
        store = self._cluster.store_host(JOB)
        if hosts_store:
            return store
        seated = [self._cluster.index_of(name) for name in self._cluster.seated(JOB)]
        return next(index for index in reversed(seated) if index != store)


def _is_over(scene: Scene) -> bool:
    return bool(scene.over) and all(node.state in (NodeState.DONE, NodeState.DEAD) for node in scene.nodes)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """The first of these signals ends the demo, and all that it has started; more of them do not disturb that."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for one in _ENDING:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [(one, signal.signal(one, interrupt)) for one in _ENDING]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)


def _open_folder(keep: str) -> Path:
    """An empty folder. ConfigError when that cannot be had."""
    if not keep:
        return Path(tempfile.mkdtemp(prefix="elasticd-demo-"))
    folder = Path(keep).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--keep {keep}: the folder is not empty; name a new one")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--keep {keep}: {error.strerror}; name a writable folder") from error
    return folder


def _write_results(folder: Path, record: Record, plan: Plan, summary: Summary) -> None:
    (folder / "summary.json").write_text(json.dumps(summary.plain(), indent=2) + "\n")
    (folder / "loss.svg").write_text(draw_picture(record, plan), encoding="utf-8")


def _describe_machine() -> dict[str, Any]:
    """OperatorError where there is no etcd."""
    return {
        "cpus": os.cpu_count(),
        "isolated": not why_not_namespaces(),
        "torch": version("torch"),
        "etcd": ".".join(map(str, etcd_version(find_etcd()))),
    }


def _title(machine: dict[str, Any]) -> str:
    hosts = "a network namespace each" if machine["isolated"] else "an address on loopback each"
    return f"a byte-level GPT reads Python's standard library; {NODES} nodes, {hosts}; etcd {machine['etcd']}"
