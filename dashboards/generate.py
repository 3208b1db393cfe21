"""Writes elasticd.json: the Grafana dashboard, from the panels that lie beside. Standard library only.

    python dashboards/generate.py

A test holds the JSON to these files, every query to the metrics that exist, and every panel to data from a real run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster_panels import FLEET, NODE
from job_panels import JOB
from panel import RATE, J, Panel

OUTPUT = Path(__file__).with_name("elasticd.json")
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

ROWS = {"Fleet": FLEET, "Job $job": JOB, "Node $node": NODE}


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(len(panels) + 1, title, top))
        top = _place(panels, row, top + 1)
    return {
        "uid": "elasticd",
        "title": "elasticd",
        "tags": ["elasticd", "training"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": [_restarts()]},
        "panels": panels,
    }


def _place(panels: list[dict[str, Any]], row: tuple[Panel, ...], top: int) -> int:
    """From left to right, and then below; returns where the next row begins."""
    left, height = 0, 0
    for panel in row:
        if left + panel.width > COLUMNS:
            left, top, height = 0, top + height, 0
        place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
        panels.append(_panel(len(panels) + 1, panel, place))
        left, height = left + panel.width, max(height, panel.height)
    return top + height


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(panel, index, *query) for index, query in enumerate(panel.queries.items())],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(panel: Panel, index: int, legend: str, expr: str) -> dict[str, Any]:
    table = panel.kind == "table"
    return {
        "refId": chr(ord("A") + index),
        "datasource": SOURCE,
        "expr": expr,
        "legendFormat": legend or "__auto",
        "instant": table,
        "range": not table,
        "format": "table" if table else "time_series",
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": panel.unit}
    ends = {"min": panel.low, "max": panel.high}
    found |= {name: value for name, value in ends.items() if value is not None}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        found["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 60 if panel.stacked else 10}
        found["custom"] |= {"showPoints": "never", "spanNulls": False, "stacking": stacking}
    if panel.names:
        texts = {str(value): {"text": text, "index": value} for value, text in panel.names.items()}
        found["mappings"] = [{"type": "value", "options": texts}]
    return found


def _options(panel: Panel) -> dict[str, Any]:
    match panel.kind:
        case "stat":
            reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {"reduceOptions": reduce, "colorMode": "value", "graphMode": "area", "textMode": "value"}
        case "timeseries":
            legend = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        case "state-timeline":
            return {"showValue": "auto", "mergeValues": True, "legend": {"showLegend": False}}
        case _:
            return {"showHeader": True}


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    job = _variable("job", "Job", "label_values(elasticd_job_round, job_id)")
    node = _variable("node", "Node", "label_values(elasticd_build_info, node)")
    return [source, job, node | {"multi": True, "includeAll": True, "allValue": ".*"}]


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    asked = {"query": query, "refId": name}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": asked,
        "refresh": 2,
        "sort": 1,
    }


def _restarts() -> dict[str, Any]:
    """A line through all panels at each restart."""
    return {
        "name": "Restarts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": f"max by (cause) (increase(elasticd_job_restarts_total{{{J}}}{RATE})) > 0",
        "titleFormat": "restart: {{cause}}",
        "step": "10s",
    }


if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(dashboard(), indent=1) + "\n")
