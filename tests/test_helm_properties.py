"""Whatever satisfies the schema is either refused in a sentence, or a release that holds all laws."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import charts
import kubernetes_validate
import pytest
from chart_invariants import LAWS, resources_are_consistent
from charts import Object
from helm_engine import ChartRefused
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_helm_objects import VERSIONS, validate

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Handed on as they are: what is wrong with them is for Kubernetes to say.
HANDED_ON = {"affinity", "egress", "env", "tolerations", "clients", "prometheus", "settings"}
# Whether a request is above its limit is the user's.
USERS = {"requests", "limits", "sharedMemory"}
SWITCHES = {
    "server.autoscaling.kind",
    "server.terminationGracePeriodSeconds",
    "triton.placement",
    "triton.device",
    "triton.autoscaling.kind",
    "engines.source",
    "engines.claim.existingClaim",
    "tls.enabled",
    "tls.existingSecret",
    "apiKeys.existingSecret",
    "metrics.enabled",
    "metrics.serviceMonitor.enabled",
}


TEXT = st.characters(min_codepoint=32, max_codepoint=126)


def resolved(part: Object) -> Object:
    if "$ref" in part:
        found: Object = charts.schema()["definitions"][part["$ref"].removeprefix("#/definitions/")]
        return found
    return part


def schema_of(path: str) -> Object:
    part = charts.schema()
    for key in path.split("."):
        part = resolved(part["properties"][key])
    return part


def text(pattern: str) -> SearchStrategy[str]:
    # Python's `$` also stands before a last newline.
    return st.from_regex(re.sub(r"\$$", r"\\Z", pattern), alphabet=TEXT)


def strategy(part: Object) -> SearchStrategy[Any]:
    """What satisfies a part of the schema, as far as this chart's schema goes."""
    part = resolved(part)
    if "enum" in part:
        return st.sampled_from(part["enum"])
    if "anyOf" in part:
        return st.one_of([strategy(each) for each in part["anyOf"]])
    if isinstance(part["type"], list):
        return st.one_of([strategy({**part, "type": each}) for each in part["type"]])
    match part["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(part.get("minimum", 0), part.get("maximum", 10**6))
        case "number":
            low: Any = part.get("minimum", part.get("exclusiveMinimum", 0))
            floats = st.floats(low, part.get("maximum", 1e6), exclude_min="exclusiveMinimum" in part, width=32)
            return floats | st.integers(int(low) + 1, int(part.get("maximum", 10**6)))
        case "string":
            found = text(part["pattern"]) if "pattern" in part else st.text(TEXT, min_size=part.get("minLength", 0))
            wrong = part.get("not", {})
            return found.filter(
                lambda value: (
                    len(value) >= part.get("minLength", 0)
                    and value != wrong.get("const")
                    and not ("pattern" in wrong and re.search(wrong["pattern"], value))
                )
            )
        case "array":
            items = strategy(part["items"])
            least, unique = part.get("minItems", 0), part.get("uniqueItems", False)
            return st.lists(items, min_size=least, max_size=least + 2, unique=unique)
    assert part["type"] == "object", part
    if "properties" not in part:
        return st.dictionaries(
            text(part["propertyNames"]["pattern"]), strategy(part["additionalProperties"]), max_size=2
        )
    required = set(part.get("required", ()))
    fields = {name: strategy(value) for name, value in part["properties"].items()}
    return st.fixed_dictionaries(
        {name: value for name, value in fields.items() if name in required},
        optional={name: value for name, value in fields.items() if name not in required},
    )


LEAVES = [path for path in charts.leaves() if path.rsplit(".", 1)[-1] not in HANDED_ON | USERS]


@st.composite
def values(draw: st.DrawFn) -> Object:
    """Values that satisfy the schema: up to ten of them changed, those that choose what is rendered more often."""
    paths = draw(st.lists(st.sampled_from(sorted(SWITCHES)), max_size=4, unique=True))
    paths += draw(st.lists(st.sampled_from(LEAVES), max_size=6, unique=True))
    found: Object = {}
    for path in paths:
        inner = found
        *above, last = path.split(".")
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = draw(strategy(schema_of(path)))
    return found


def test_all_switches_are_values() -> None:
    assert set(LEAVES) >= SWITCHES


@pytest.mark.timeout(1500)
@settings(max_examples=500 if "CHECK_HELM" in os.environ else 25, suppress_health_check=list(HealthCheck))
@given(values())
def test_a_release_is_refused_in_a_sentence_or_holds_all_laws(chosen: Object) -> None:
    try:
        objects = charts.render(chosen)
    except ChartRefused as refusal:
        # By the chart, for what does not go together; the schema has nothing against it.
        if "sd-service: " not in str(refusal):
            raise
        event("refused")
        return
    event("rendered")
    for law in LAWS:
        if law is not resources_are_consistent:
            assert list(law(objects)) == [], json.dumps(chosen)
    for version in (
        (VERSIONS[0], VERSIONS[-1]) if chosen.get("engines", {}).get("source") != "volume" else VERSIONS[-1:]
    ):
        for each in objects:
            try:
                validate(each, version)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{error.message} with {json.dumps(chosen)}")
