"""deploy/grafana-dashboard.json asks for metrics that the server publishes, in PromQL that can be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

for package in ("promql_parser", "starlette", "uvicorn", "prometheus_client", "openai"):
    if os.environ.get("CI") != "true":
        pytest.importorskip(package)

import httpx
import promql_parser
from prometheus_client.parser import text_string_to_metric_families
from support import serving

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
VALUES = {"$__rate_interval": "5m", "$model": ".*", "$job": ".*"}  # of Grafana's variables


def selectors(expression):
    """[(metric, labels)] of a PromQL expression of Grafana."""
    for variable, value in VALUES.items():
        expression = expression.replace(variable, value)
    found = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {one.name for one in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Sample names -> their labels, of a server that has answered, with drafts."""
    lm = serving.write_long_lm(tmp_path_factory.mktemp("dashboard") / "lm")
    with serving.running([f"lm={lm}"]) as server, server.client() as client:
        more = {"choices": ["one two three four five six seven"]}  # a grammar forces tokens: drafts that are right
        client.completions.create(model="lm", prompt="a", max_tokens=60, extra_body=more)
        found = {}
        for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
            for one in family.samples:
                found.setdefault(one.name, set()).update(one.labels)
    for labels in found.values():
        labels |= {"job", "instance"}  # Prometheus adds them
    return found


def check(expression, published):
    for metric, labels in selectors(expression):
        assert metric in published, f"/metrics has no {metric}"
        assert labels - {"__name__"} <= published[metric], f"{metric} has no such label"


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_a_panel_reads_what_the_server_publishes(title, expression, published):
    assert selectors(expression)
    check(expression, published)


@pytest.mark.parametrize(
    "expression",
    ["sum(rate(vllm:generated_tokens_total[5m]))", 'vllm:kv_cache_usage_perc{model="lm"}', "vllm:generation_tokens"],
)
def test_a_metric_that_is_not_published_is_seen(expression, published):
    with pytest.raises(AssertionError, match="has no"):
        check(expression, published)


def test_a_wrong_expression_is_seen():
    with pytest.raises(ValueError, match=r"."):
        selectors("sum(rate(vllm:generation_tokens_total[5m])")


def test_the_legends_name_labels_that_are_left(published):
    import re

    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                by = re.search(r"by \(([\w, ]+)\)", target["expr"])
                left = {one.strip() for one in by[1].split(",")} if by else published[selectors(target["expr"])[0][0]]
                assert label in left, panel["title"]


def test_the_panels_form_a_page():
    assert DASHBOARD["schemaVersion"] >= 42 and DASHBOARD["uid"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own
    sources = [panel["datasource"] for panel in PANELS] + [one["datasource"] for p in PANELS for one in p["targets"]]
    assert all(one["uid"] == "${datasource}" for one in sources)
