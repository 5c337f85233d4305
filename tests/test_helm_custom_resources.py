"""What the chart says to operators (cert-manager, Envoy Gateway, Gateway API, KEDA, Prometheus) they understand.

`make check-helm` installs the definitions by npm, as CI does; without them these tests are skipped.
"""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import charts
import pytest
from charts import VALUES, Object
from test_helm_objects import CUSTOM

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).with_name("custom_resources")
pytestmark = pytest.mark.skipif(
    not (FOLDER / "node_modules").exists(), reason="`make check-helm` runs it: it needs npm"
)


def problems(objects: list[Object]) -> list[str]:
    done = subprocess.run(
        ["node", "check.mjs"], cwd=FOLDER, input=json.dumps(objects), capture_output=True, text=True, timeout=240
    )
    assert done.returncode in (0, 1), done.stderr
    found = done.stdout.splitlines()
    assert bool(any(found)) == bool(done.returncode), done.stderr
    return [line for line in found if line]


def custom(name: str) -> list[Object]:
    return [each for each in charts.render(charts.values_of(name)) if each["kind"] in CUSTOM]


def scaler(objects: list[Object]) -> Any:
    return objects[0]["spec"]


BAD: list[tuple[str, str, Callable[[list[Object]], object], str]] = [
    ("a misspelt field", "keda", lambda o: scaler(o).update(pollInterval=15), "pollInterval"),
    ("a wrong type", "keda", lambda o: scaler(o).update(maxReplicaCount="12"), "ScaledObject"),
    ("a field too little", "tls", lambda o: scaler(o).pop("secretName"), "Certificate"),
    ("a field of another kind", "grpcroute", lambda o: scaler(o)["rules"][0].update(timeouts={}), "timeouts"),
    (
        "no duration",
        "grpcroute",
        lambda o: o[1]["spec"]["timeout"]["http"].update(requestTimeout=0),
        "BackendTrafficPolicy",
    ),
    ("a misspelt rule", "monitoring", lambda o: o[0]["spec"]["groups"][0]["rules"][0].update(four="1m"), "four"),
    ("a misspelt endpoint", "monitoring", lambda o: o[1]["spec"]["endpoints"][0].update(intervall="1m"), "intervall"),
]


@pytest.fixture(scope="module")
def found() -> list[list[str]]:
    """The problems of each release and of each bad one, by one run of TypeScript's compiler."""
    groups = [custom(name) for name in VALUES]
    for _, name, change, _ in BAD:
        groups.append(copy.deepcopy(custom(name)))
        change(groups[-1])
    of = [number for number, group in enumerate(groups) for _ in group]
    lines: list[list[str]] = [[] for _ in groups]
    for line in problems([each for group in groups for each in group]):
        lines[of[int(line.split()[0])]].append(line)
    return lines


def test_every_custom_resource_is_valid(found: list[list[str]]) -> None:
    assert {each["kind"] for name in VALUES for each in custom(name)} == CUSTOM
    assert [line for lines in found[: len(VALUES)] for line in lines] == []


def test_what_an_operator_would_not_understand_is_found(found: list[list[str]]) -> None:
    for (title, _, _, word), lines in zip(BAD, found[len(VALUES) :], strict=True):
        assert any(word in line for line in lines), (title, lines)
