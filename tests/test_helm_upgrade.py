"""A release can become any other of its kind: what an API server lets nobody change stays as it is."""

from __future__ import annotations

import shutil
from itertools import product
from typing import TYPE_CHECKING, Any

import charts
import helm_engine
import pytest
import yaml
from charts import CHART, VALUES, Object

if TYPE_CHECKING:
    from pathlib import Path

Key = tuple[str, str]


def fixed(each: Object) -> Any:
    """What cannot be changed of an object that is there."""
    spec = each.get("spec", {})
    match each["kind"]:
        case "Deployment":
            return spec["selector"]
        case "Job":
            return spec["template"]
        case "Service":
            return spec.get("clusterIP")
        case "PersistentVolumeClaim":
            return {key: value for key, value in spec.items() if key != "resources"}
    return None


def fixed_parts(objects: list[Object]) -> dict[Key, Any]:
    return {(each["kind"], each["metadata"]["name"]): fixed(each) for each in objects}


def refused(before: list[Object], after: list[Object]) -> set[Key]:
    """The objects whose change an API server would refuse."""
    old, new = fixed_parts(before), fixed_parts(after)
    return {key for key in old.keys() & new.keys() if old[key] != new[key]}


def labels(component: str) -> Object:
    return {
        "matchLabels": {
            "app.kubernetes.io/name": "sd-service",
            "app.kubernetes.io/instance": "sd",
            "app.kubernetes.io/component": component,
        }
    }


def test_an_upgrade_from_the_first_version_finds_its_workloads_again() -> None:
    # As version 0.1.0 of the chart has them, to be changed never.
    first = {
        ("Deployment", "sd-sd-service"): labels("server"),
        ("Deployment", "sd-sd-service-triton"): labels("triton"),
        ("Service", "sd-sd-service"): None,
        ("Service", "sd-sd-service-headless"): "None",
        ("Service", "sd-sd-service-triton"): "None",
        ("PersistentVolumeClaim", "sd-sd-service-engines"): {"accessModes": ["ReadWriteMany"]},
    }
    now = fixed_parts(charts.render(charts.values_of("engines-job")))
    assert {key: part for key, part in now.items() if key[0] in {kind for kind, _ in first} - {"Job"}} == first


@pytest.fixture(scope="module")
def next_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same chart with another version."""
    copied = tmp_path_factory.mktemp("next") / CHART.name
    shutil.copytree(CHART, copied, ignore=shutil.ignore_patterns("golden", "ci", "examples"))
    described = yaml.safe_load((copied / "Chart.yaml").read_text()) | {"version": "9.8.7"}
    (copied / "Chart.yaml").write_text(yaml.safe_dump(described))
    return copied


def test_another_version_of_the_chart_alone_starts_no_pod_and_no_job_anew(next_chart: Path) -> None:
    for name in VALUES:
        files = helm_engine.render(next_chart, charts.values_of(name), name=charts.RELEASE, namespace=charts.NAMESPACE)
        files.pop(next(file for file in files if file.endswith("NOTES.txt")))
        after = [each for text in files.values() for each in yaml.load_all(text, yaml.CSafeLoader) if each]
        assert {each["metadata"]["labels"]["helm.sh/chart"] for each in after} == {"sd-service-9.8.7"}
        pods = [
            {each["metadata"]["name"]: pod["spec"] for each, pod in charts.pod_templates(objects)}
            for objects in (charts.render(charts.values_of(name)), after)
        ]
        assert pods[0] == pods[1], name
        assert not refused(charts.render(charts.values_of(name)), after)


def test_any_values_can_follow_any_others() -> None:
    # A claim's class and modes are the owner's of the data to change.
    for before, after in product(VALUES, repeat=2):
        found = refused(charts.render(charts.values_of(before)), charts.render(charts.values_of(after)))
        assert {kind for kind, _ in found} <= {"PersistentVolumeClaim"}, (before, after)


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"pullPolicy": "Always", "pullSecrets": ["pull"]}},
        {"commonLabels": {"team": "images"}},
        {"serviceAccount": {"name": "other"}},
        {"triton": {"image": {"tag": "0.1.1"}}},
        {"engines": {"claim": {"subPath": "models"}}},
        {"engines": {"job": {"resources": {"limits": {"memory": "8Gi"}}}}},
        {"engines": {"job": {"backoffLimit": 9, "activeDeadlineSeconds": 60}}},
        {"engines": {"verify": False, "default": "inkpunk"}},
    ],
    ids=str,
)
def test_another_pod_is_another_job_and_the_same_pod_the_same(change: Object) -> None:
    def job(values: Object) -> Object:
        [found] = charts.of_kind(charts.render(values), "Job")
        return found

    plan = charts.values_of("engines-job")
    before, after = job(plan), job(charts.merged(plan, change))
    same = before["metadata"]["name"] == after["metadata"]["name"]
    assert same == (before["spec"]["template"] == after["spec"]["template"])


def test_another_plan_is_another_job() -> None:
    plan = charts.values_of("engines-job")
    other = charts.merged(plan, {"engines": {"add": [{"name": "a", "source": "a"}]}})
    names = [charts.of_kind(charts.render(values), "Job")[0]["metadata"]["name"] for values in (plan, other)]
    assert names[0] != names[1]


def test_an_autoscaled_deployment_starts_with_its_least_pods_and_an_upgrade_leaves_their_number_alone() -> None:
    [server, triton] = charts.of_kind(charts.render(charts.values_of("keda")), "Deployment")
    assert (server["spec"]["replicas"], triton["spec"]["replicas"]) == (3, 1)
    for each in charts.of_kind(charts.render(charts.values_of("keda"), upgrade=True), "Deployment"):
        assert "replicas" not in each["spec"]


def test_an_upgrade_with_the_same_values_changes_nothing_but_that() -> None:
    for name in VALUES:
        upgraded = charts.render(charts.values_of(name), upgrade=True)
        for before, after in zip(charts.render(charts.values_of(name)), upgraded, strict=True):
            if before["kind"] == "Deployment":
                before["spec"].pop("replicas")
                after["spec"].pop("replicas", None)
            assert before == after
