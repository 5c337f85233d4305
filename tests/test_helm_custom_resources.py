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


def test_every_custom_resource_is_valid() -> None:
    objects = [each for name in VALUES for each in custom(name)]
    assert {each["kind"] for each in objects} == CUSTOM
    assert problems(objects) == []


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


def test_what_an_operator_would_not_understand_is_found() -> None:
    objects, words = [], []
    for _, name, change, word in BAD:
        changed = copy.deepcopy(custom(name))
        change(changed)
        objects.append(changed)
        words.append(word)
    found = problems([each for group in objects for each in group])
    for (title, *_), word in zip(BAD, words, strict=True):
        assert any(word in line for line in found), (title, found)
