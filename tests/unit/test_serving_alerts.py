"""Dashboard and alerts name metrics that exist, with labels that they have: what nobody tells is a blind eye."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from eagleray.serving.paths import OPEN, target_of
from eagleray.serving.refusals import KINDS
from eagleray.serving.settings import SloConfig
from eagleray.serving.telemetry import LATENCY_S, METRICS, Metric
from eagleray.vision.image_headers import Reason

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "cluster" / "alerts.yaml"
DASHBOARD = ROOT / "cluster" / "dashboards" / "serving.json"
FROM_RAY = {"WorkerId", "NodeAddress", "application", "deployment", "replica", "le"}  # labels that Ray or a bucket adds
FUNCTIONS = {"rate", "increase", "sum", "min", "max", "avg", "count", "histogram_quantile", "vector"}
WORDS = {"by", "without", "and", "or", "unless", "bool"}
TOKEN = re.compile(r'"[^"]*"|\[[^\]]*\]|[A-Za-z_:][A-Za-z0-9_:.]*|\d+(?:\.\d+)?|=~|!~|!=|[<>=]=?|[-+*/(){},]|\s+')
ASKED = ("/v1/predict", "/v1/embed", "/v1/models", "/v2/models/a", "/v2/models/a/infer", "/no/such/path", *OPEN)
ROUTES = {target_of("POST", path, b"").route for path in ASKED}
OUTCOMES = {  # values that code gives a label; a matcher on another value would never fire
    "canary_checks": {"outcome": {"ok", "drift", "timeout", "error"}},
    "decisions": {"kind": {"decided", "abstained", "none"}},
    "images": {"status": {"scored", "quarantined"}, "reason": {str(reason) for reason in Reason} | {""}},
    "refusals": {"code": set(KINDS)},
    "request_seconds": {"route": ROUTES},
    "requests": {"route": ROUTES},
}


class Use(NamedTuple):
    """One metric in a query: its name, its matchers, the function around it, and the labels of the sum around that."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]
    function: str
    window: str


def tokens(query: str) -> list[str]:
    """The words of a PromQL query.

    Raises:
        ValueError: Something that is none, or brackets that do not pair.
    """
    found, end = [], 0
    for match in TOKEN.finditer(query):
        if match.start() != end:
            raise ValueError(f"not PromQL at {query[end : match.start()]!r}: {query}")
        end = match.end()
        if match[0].strip():
            found.append(match[0])
    if end != len(query):
        raise ValueError(f"not PromQL at {query[end:]!r}: {query}")
    pairs, stack = {")": "(", "}": "{"}, list[str]()
    for token in found:
        if token in "({":
            stack.append(token)
        elif token in pairs and (not stack or stack.pop() != pairs[token]):
            raise ValueError(f"brackets do not pair: {query}")
    if stack:
        raise ValueError(f"brackets do not pair: {query}")
    return found


def uses(query: str) -> Iterator[Use]:
    """Every metric in a query."""
    words = tokens(query)
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("by", "without"):
            position = words.index(")", position)
        elif re.fullmatch(r"[A-Za-z_:][\w:]*", word) and word not in FUNCTIONS | WORDS:
            matchers, after = [], position + 1
            if after < len(words) and words[after] == "{":
                close = words.index("}", after)
                inner = [token for token in words[after + 1 : close] if token != ","]
                matchers = [(inner[i], inner[i + 1], inner[i + 2].strip('"')) for i in range(0, len(inner), 3)]
                after = close + 1
            window = words[after] if after < len(words) and words[after].startswith("[") else ""
            function = words[position - 2] if position >= 2 and words[position - 1] == "(" else ""
            yield Use(word, tuple(matchers), function, window)
            position = after - 1
        position += 1


def groups(query: str) -> Iterator[set[str]]:
    """The labels of every ``by (...)``."""
    for found in re.finditer(r"\bby \(([^)]*)\)", query):
        yield {label.strip() for label in found[1].split(",")}


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def queries() -> list[tuple[str, str]]:
    """Every query of both files, with where it stands."""
    found = [(rule.get("record") or rule["alert"], " ".join(rule["expr"].split())) for rule in rules()]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


def exported() -> dict[str, Metric]:
    return {name: metric for metric in METRICS for name in metric.exported}


@cache
def names_of_ray() -> set[str]:
    """What Ray Serve exports, read from its source: names as Prometheus sees them."""
    spec = importlib.util.find_spec("ray")
    assert spec
    assert spec.origin
    made = re.compile(r'metrics\.(Counter|Gauge|Histogram)\(\s*(?:name=)?f?"(serve_[a-z_{}]+)"')
    names = set()
    for path in (Path(spec.origin).parent / "serve").rglob("*.py"):
        for kind, name in made.findall(path.read_text(encoding="utf-8")):
            full = "ray_" + name.replace("{protocol_name}", "http")
            ends = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}[kind]
            names |= {full if full.endswith("_total") else full + end for end in ends}
    return names


@pytest.mark.parametrize(("where", "query"), queries())
def test_every_metric_of_a_query_exists(where: str, query: str) -> None:
    known = set(exported()) | recorded() | names_of_ray()
    named = [use.name for use in uses(query)]
    assert named, f"{where} asks for nothing"
    assert [name for name in named if name not in known] == [], where


@pytest.mark.parametrize(("where", "query"), queries())
def test_labels_belong_to_their_metric(where: str, query: str) -> None:
    known = exported()
    ours = [use for use in uses(query) if use.name in known]
    for use in ours:
        labels = set(known[use.name].labels) | FROM_RAY
        assert [label for label, _, _ in use.matchers if label not in labels] == [], (where, use)
        short = known[use.name].name.removeprefix("eagleray_serving_").removesuffix("_total")
        for label, sign, value in use.matchers:
            values = OUTCOMES.get(short, {}).get(label)
            if values and sign in ("=", "=~") and "$" not in value:
                assert set(value.split("|")) <= values, (where, use)
    if ours:
        every = set.union(*(set(known[use.name].labels) for use in ours)) | FROM_RAY
        assert [group for group in groups(query) if not group <= every] == [], where


@pytest.mark.parametrize(("where", "query"), queries())
def test_counters_are_rated_and_quantiles_come_from_buckets(where: str, query: str) -> None:
    known = exported()
    for use in uses(query):
        metric = known.get(use.name)
        if metric is None:
            continue
        if metric.kind == "gauge":
            assert not use.window, (where, use)
        else:  # a counter or a part of a histogram only rises: alone it says nothing
            assert use.function in ("rate", "increase"), (where, use)
            assert use.window, (where, use)
    if "histogram_quantile" in query:
        assert all(use.name.endswith("_bucket") for use in uses(query)), where
        assert all("le" in group for group in groups(query)), where
    assert not re.search(r"_seconds_sum|_images_sum|_bytes_sum", query), "Ray makes sums from the middles of buckets"


def test_the_edge_of_the_latency_slo_is_an_edge_of_a_bucket() -> None:
    edges = {
        value
        for _, query in queries()
        for use in uses(query)
        for label, _, value in use.matchers
        if label == "le" and use.name.startswith("ray_eagleray_serving_request_seconds")
    }
    assert {float(edge) for edge in edges} == {SloConfig().latency_p99_ms / 1000}
    assert {float(edge) for edge in edges} <= set(LATENCY_S)


def test_what_is_promised_is_promised_of_answers_about_images() -> None:
    """A replica that loads answers /readyz with 503, thousands of times a day: no failure of anything."""
    for rule in rules():
        if "record" in rule:
            for use in uses(" ".join(rule["expr"].split())):
                routes = {value for label, _, value in use.matchers if label == "route"}
                assert routes == {"predict|embed|infer"}, rule["record"]


def test_burn_rates_are_of_the_default_slo() -> None:
    text = ALERTS.read_text()
    assert set(re.findall(r"failed_ratio:rate\w+ > [\d.]+ \* ([\d.]+)", text)) == {
        f"{1 - SloConfig().availability:.3f}"
    }
    assert set(re.findall(r"slow_ratio:rate\w+ > [\d.]+ \* ([\d.]+)", text)) == {"0.01"}


def test_every_recorded_name_is_used_and_made_over_its_window() -> None:
    used = {use.name for _, query in queries() for use in uses(query)}
    assert recorded() <= used
    for rule in rules():
        if "record" in rule:
            window = rule["record"].rpartition(":rate")[2]
            assert {use.window for use in uses(" ".join(rule["expr"].split()))} == {f"[{window}]"}, rule["record"]


def test_alerts_say_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        labels = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
        kept = set.union(set(), *groups(rule["expr"])) or {"model", *FROM_RAY}
        made_of = {rule["record"]: set.union(set(), *groups(rule["expr"])) for rule in rules() if "record" in rule}
        kept |= set.union(set(), *(made_of.get(use.name, set()) for use in uses(" ".join(rule["expr"].split()))))
        assert labels <= kept, f"{rule['alert']} names a label that its query drops"


def test_every_metric_is_shown() -> None:
    """What is counted and never looked at should not be counted."""
    named = {use.name for _, query in queries() for use in uses(query)}
    unseen = [metric.name for metric in METRICS if not named & set(metric.exported)]
    assert unseen == []


def test_panels_do_not_overlap_and_stand_under_their_own_number() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    "query", ["sum(rate(a[5m])", "a{b='c'}", "sum by (model) a)", 'a{b="c"', "a ?? b"], ids=lambda query: query
)
def test_what_is_not_promql_is_seen(query: str) -> None:
    with pytest.raises(ValueError, match=r"PromQL|brackets"):
        list(uses(query))


def test_the_reader_finds_metrics_matchers_and_windows() -> None:
    (one, two) = uses('sum by (le, model) (rate(a_bucket{le="0.1",m=~"x|y"}[5m])) / b_count > 2')
    assert one == Use("a_bucket", (("le", "=", "0.1"), ("m", "=~", "x|y")), "rate", "[5m]")
    assert two.name == "b_count"
