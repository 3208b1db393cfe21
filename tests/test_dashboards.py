"""The dashboard and the rules, held to the metrics that exist, to promtool, and to a real Prometheus and a real job."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import need
from fake_gpus import ECC, HEALTHY, FakeGpus, why_not_fake_gpus

from elasticd.metrics import definitions
from elasticd.testing.cluster import METRICS_PORT, Cluster, ClusterSpec, NotInTime
from elasticd.testing.history import Event, events_of

FOLDER = Path(__file__).parent.parent / "dashboards"
DASHBOARD = json.loads((FOLDER / "elasticd.json").read_text())
RULES = (FOLDER / "rules.yml").read_text()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = re.findall(r"- alert: (\w+)", RULES)
RECORDED = set(re.findall(r"- record: (\S+)", RULES))
JOB = "gpt"


def queries() -> Iterator[tuple[str, str]]:
    """(panel's title, expression) of all panels."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def promtool(*arguments: str, folder: Path = FOLDER) -> tuple[bool, str]:
    need("" if shutil.which("promtool") else "promtool not found: apt install prometheus")
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


# --- the files ---


def test_the_dashboard_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    generate = importlib.import_module("generate")
    assert generate.dashboard() == DASHBOARD, "run python dashboards/generate.py"


def test_the_panels_fit_the_grid() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
        columns = range(place["x"], place["x"] + place["w"])
        for cell in itertools.product(columns, range(place["y"], place["y"] + place["h"])):
            assert cell not in cells, f"{panel['title']} lies over {cells[cell]}"
            cells[cell] = panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_panels_and_rules_use_metrics_that_exist() -> None:
    defined = {definition.name for definition in definitions.ALL}
    histograms = {one.name for one in definitions.ALL if isinstance(one, definitions.HistogramDefinition)}
    defined |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    text = "\n".join([expr for _, expr in queries()] + re.findall(r"^ +(?!summary|runbook).*$", RULES, re.M))
    used = {word for word in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", text) if "elasticd_" in word}
    assert len(used) > 50
    assert used <= defined | RECORDED
    assert used >= RECORDED


def test_promtool_accepts_rules_and_the_example() -> None:
    assert promtool("check", "rules", "rules.yml")[0]
    assert promtool("check", "config", "prometheus.yml")[0]


def test_the_rules_do_what_their_tests_say() -> None:
    passed, said = promtool("test", "rules", "rules_test.yml")
    assert passed, said


def test_every_alert_is_made_to_fire(tmp_path: Path) -> None:
    """Under another name, its test misses it."""
    renamed = re.sub(r"- alert: \w+", "- alert: Renamed", RULES)
    (tmp_path / "rules.yml").write_text(renamed)
    shutil.copy(FOLDER / "rules_test.yml", tmp_path)
    passed, said = promtool("test", "rules", "rules_test.yml", folder=tmp_path)
    assert not passed
    assert [alert for alert in ALERTS if alert not in said] == []


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for text in RULES.split("- alert: ")[1:]:
        for wanted in (r"for: \d+[mh]", r"severity: (info|warning|critical)", r"summary: \S", r"runbook: \S"):
            assert re.search(wanted, text), (text.split()[0], wanted)


# --- a real run ---


class Prometheus:
    """Debian's, on a host of its own, with the example's configuration made impatient."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.host = cluster.hosts.add("prometheus")
        self.url = f"http://{self.host.address}:9090"
        folder.mkdir()
        example = (FOLDER / "prometheus.yml").read_text()
        example = example.replace("http://node1.example:7421", f"http://{cluster.nodes[0].host.address}:{METRICS_PORT}")
        (folder / "prometheus.yml").write_text(re.sub(r"(_interval): 1[05]s", r"\1: 500ms", example))
        shutil.copy(FOLDER / "rules.yml", folder)
        arguments = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
        arguments |= {"web.listen-address": f"{self.host.address}:9090", "log.level": "warn"}
        self.log = folder / "log"
        command = ["prometheus", *(f"--{name}={value}" for name, value in arguments.items())]
        self.process = self.host.spawn(command, log=self.log)

    def get(self, path: str, **parameters: object) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def ready(self) -> bool:
        try:
            return bool(self.get("targets"))
        except OSError:
            assert self.process.poll() is None, self.log.read_text()
            return False

    def has_data(self, expr: str) -> bool:
        """A number: a ratio of nothing is none."""
        found = self.get("query", query=substitute(expr))["result"]
        return any(series["value"][1] != "NaN" for series in found)

    def values(self, label: str, match: str) -> list[str]:
        return self.get(f"label/{label}/values", **{"match[]": match})

    def close(self) -> None:
        self.host.kill()
        self.process.wait()


def substitute(expr: str) -> str:
    variables = {"$job": JOB, "$node": ".*", "$__rate_interval": "5s"}
    for name, value in variables.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


@pytest.mark.net
def test_every_panel_shows_data_of_a_real_run(namespaces: None, tmp_path: Path) -> None:
    """Two nodes train with checkpoints; one is killed and comes back. The GPUs are fake, all else is real."""
    need("" if shutil.which("prometheus") else "prometheus not found: apt install prometheus")
    need(why_not_fake_gpus())
    gpus = FakeGpus(tmp_path)
    gpus.set(0, **HEALTHY, **ECC)
    with Cluster(ClusterSpec(nodes=2, isolated=True, env=gpus.environment)) as cluster:
        prometheus = Prometheus(cluster, tmp_path / "prometheus")
        try:
            cluster.wait_until(prometheus.ready, 10, "prometheus answers")
            train(cluster, tmp_path / "checkpoints")
            scraped = f'count(elasticd_job_restarts_total{{job_id="{JOB}",cause="node_lost"}} == 0) == 2'
            cluster.wait_until(lambda: prometheus.has_data(scraped), 20, "both nodes scraped before the fault")
            lose_and_regain(cluster, 1)
            with suppress(NotInTime):
                cluster.wait_until(lambda: not without_data(prometheus), 20)
            assert without_data(prometheus) == []
            nodes = prometheus.values("node", "elasticd_build_info")
            assert nodes == prometheus.values("instance", "elasticd_build_info") == ["node0", "node1"]
            assert prometheus.values("job_id", "elasticd_job_round") == [JOB]
            assert annotated(prometheus) == {"node_lost", "join"}
            assert prometheus.get("query", query='ALERTS{alertstate="firing"}')["result"] == []
        finally:
            prometheus.close()


def train(cluster: Cluster, checkpoints: Path) -> None:
    arguments = {"--steps": 1_000_000, "--width": 32, "--save-every": 25, "--checkpoint-dir": checkpoints}
    arguments |= {"--memory-every": 8}
    flags = [str(part) for pair in arguments.items() for part in pair]
    command = ["elasticd.examples.byte_gpt", *flags]
    cluster.submit(JOB, command, module=True, nodes="1:2", max_restarts=3)
    wait_commit(cluster, 0.0)


def lose_and_regain(cluster: Cluster, index: int) -> None:
    cluster.kill_node(index)
    cluster.wait_until(lambda: len(cluster.seated(JOB)) == 1, 10, "a world without the lost node")
    wait_commit(cluster, time.monotonic())
    cluster.start_node(index)
    cluster.wait_until(lambda: len(cluster.seated(JOB)) == 2, 30, "a world with the node that is back")
    wait_commit(cluster, time.monotonic())


def wait_commit(cluster: Cluster, after: float) -> None:
    def found(history: list[Event]) -> bool:
        return any(event.t > after and event.details["committed"] for event in events_of(history, "commit"))

    cluster.wait_for(found, 40, "a committed checkpoint")


def without_data(prometheus: Prometheus) -> list[str]:
    return sorted({title for title, expr in queries() if not prometheus.has_data(expr)})


def annotated(prometheus: Prometheus) -> set[str]:
    """The causes of the restarts that are drawn through the panels."""
    (annotation,) = DASHBOARD["annotations"]["list"]
    now = time.time()
    span = {"start": now - 60, "end": now, "step": 1}
    found = prometheus.get("query_range", query=substitute(annotation["expr"]), **span)["result"]
    return {series["metric"]["cause"] for series in found}
