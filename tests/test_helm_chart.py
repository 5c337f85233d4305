"""The chart is whole: values, schema, README and golden files agree; wrong values are refused in sentences."""

from __future__ import annotations

import re
import shlex
import tarfile
import tomllib
from typing import TYPE_CHECKING, Any

import charts
import helm_engine
import pytest
import yaml
from chart_invariants import LAWS, breaches
from charts import CHART, VALUES, Object
from helm_engine import ChartRefused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def at(path: str, value: Any) -> Object:
    """`value` as the chart's values have it: at("server.replicas", 3)."""
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def resolved(part: Object) -> Object:
    """A part of the schema without its reference."""
    if "$ref" in part:
        found: Object = charts.schema()["definitions"][part["$ref"].removeprefix("#/definitions/")]
        return found
    return part


def subschemas(part: Any) -> Iterator[Object]:
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from subschemas(value)
    elif isinstance(part, list):
        for value in part:
            yield from subschemas(value)


def test_the_chart_is_without_a_complaint() -> None:
    for values in VALUES:
        found = helm_engine.lint(CHART, charts.values_of(values))
        complaints = [message["error"] for message in found["messages"] if message["severity"] > 0]
        # There is no picture that stands for this service.
        assert set(complaints) <= {"icon is recommended"}
        assert not found["errors"]


@pytest.mark.parametrize("name", VALUES)
def test_a_release_is_what_its_golden_file_says(name: str) -> None:
    golden = charts.GOLDEN / f"{name}.yaml"
    assert golden.read_text() == charts.golden(charts.values_of(name)), "run `make chart`, and look at what has changed"


def test_there_is_no_golden_file_too_many() -> None:
    assert {path.stem for path in charts.GOLDEN.glob("*")} == set(VALUES)


def test_every_object_of_the_schema_is_closed() -> None:
    # What Kubernetes writes and we hand on is checked by Kubernetes.
    handed_on = {"nodeAffinity", "podAffinity", "podAntiAffinity", "secretKeyRef", "configMapKeyRef", "fieldRef"}
    handed_on |= {"resourceFieldRef", "matchExpressions", "ports", "global"}
    for part in subschemas(charts.schema()):
        if not isinstance(part.get("properties"), dict):
            continue
        assert part["additionalProperties"] is False, part
        for name, value in part["properties"].items():
            inner = value.get("items", value) if isinstance(value, dict) else {}
            if inner.get("type") == "object" and name not in handed_on:
                assert "additionalProperties" in inner, name


def test_the_schema_knows_every_value_and_no_other() -> None:
    def paths(part: Object, above: str = "") -> set[str]:
        found = set()
        for key, value in part["properties"].items():
            inner = resolved(value)
            is_map = "properties" not in inner or f"{above}{key}" in charts.leaves()
            found |= {f"{above}{key}"} if is_map else paths(inner, f"{above}{key}.")
        return found

    assert paths(charts.schema()) - {"global"} == set(charts.leaves())


def test_the_schema_knows_the_settings_that_there_are_and_the_chart_does_not_decide() -> None:
    assert {"send_timeout_seconds", "engine_watch_seconds"} <= set(charts.open_settings())
    assert not {"max_active", "port", "triton_url", "backend", "tls_private_key"} & set(charts.open_settings())
    assert charts.SCHEMA.read_text() == charts.schema_text(), "run `make chart`"


def test_every_value_is_used_by_a_template_and_every_used_one_is_there() -> None:
    source = "\n".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    words = set(re.findall(r"\.([A-Za-z]+)", source))
    for path in charts.leaves():
        # Requests and limits are handed on together.
        *_, above, key = ("", *path.split("."))
        assert (above if above == "resources" else key) in words, path
    known = charts.defaults()
    for used in re.findall(r"\.Values\.([A-Za-z.]+)", source):
        part: Any = known
        for key in used.split("."):
            assert key in part, f".Values.{used}"
            part = part[key]


def test_every_value_says_what_it_means_in_one_place_that_the_readme_shows() -> None:
    lines = charts.documented_values()
    assert [line.path for line in lines] == list(charts.leaves())
    assert not [line.path for line in lines if not line.text.endswith((".", ":"))]
    assert charts.README.read_text() == charts.readme(), "run `make chart`"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("replicas", 1, "additional properties 'replicas' not allowed"),
        ("server.imagee", {}, "additional properties 'imagee' not allowed"),
        ("server.replicas", -1, "minimum"),
        ("server.replicas", "2", "got string, want integer"),
        ("server.maxActive", 0, "minimum"),
        ("server.image.tag", "latest", "/server/image/tag"),
        ("server.image.digest", "sha256:12", "/server/image/digest"),
        ("server.resources.requests", {"cpu": "5x"}, "/server/resources/requests/cpu"),
        ("server.rollout.maxSurge", "101%", "/server/rollout/maxSurge"),
        ("server.podLabels", {"a b": "c"}, "invalid propertyName 'a b'"),
        ("server.settings", {"send_timeout": 1}, "invalid propertyName 'send_timeout'"),
        ("server.settings", {"max_active": 9}, "invalid propertyName 'max_active'"),
        ("triton.device", "tpu", "/triton/device"),
        ("triton.placement", "beside", "/triton/placement"),
        ("triton.gpu.count", 0, "/triton/gpu/count"),
        ("triton.url", "http://triton:8001", "/triton/url"),
        ("triton.sharedMemory", "lots", "/triton/sharedMemory"),
        ("engines.add", [{"name": "Engine", "source": "x"}], "/engines/add/0/name"),
        ("engines.add", [{"name": "engine"}], "missing property 'source'"),
        ("engines.add", [{"name": "engine", "source": "--help"}], "/engines/add/0/source"),
        ("engines.claim.accessModes", [], "/engines/claim/accessModes"),
        ("engines.claim.subPath", "../up", "/engines/claim/subPath"),
        ("tls.certificate.duration", "90 days", "/tls/certificate/duration"),
        ("service.port", 65536, "/service/port"),
        ("ingress.host", "http://x", "/ingress/host"),
        ("networkPolicy.prometheus", [], "/networkPolicy/prometheus"),
        ("networkPolicy.clients", [{}], "/networkPolicy/clients/0"),
        ("traces.ratio", 1.5, "/traces/ratio"),
        ("signing.timestampAuthority", "http://x:y", "/signing/timestampAuthority"),
        ("traces.endpoint", "collector:4317", "/traces/endpoint"),
        ("helmTest.prompt", "--help", "/helmTest/prompt"),
    ],
)
def test_the_schema_refuses_what_is_wrong_and_names_it(path: str, value: Any, words: str) -> None:
    with pytest.raises(ChartRefused) as caught:
        charts.render(at(path, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server.drainSeconds": 100}, "server.drainSeconds is 100: make it at least server.maxGenerationSeconds, 120"),
        ({"server.maxConnectionAgeGraceSeconds": 149}, "make it at least server.drainSeconds, 150"),
        (
            {"server.terminationGracePeriodSeconds": 164},
            "server.terminationGracePeriodSeconds is 164: make it at least 165",
        ),
        (
            {"server.terminationGracePeriodSeconds": 194, "triton.placement": "sidecar"},
            "server.terminationGracePeriodSeconds is 194: make it at least 195",
        ),
        (
            {"triton.terminationGracePeriodSeconds": 34},
            "triton.terminationGracePeriodSeconds is 34: make it at least 35",
        ),
        ({"server.rollout": {"maxSurge": 0, "maxUnavailable": 0}}, "an update could never begin"),
        ({"triton.rollout": {"maxSurge": "0%", "maxUnavailable": 0}}, "an update could never begin"),
        ({"server.autoscaling.minReplicas": 9}, "server.autoscaling.minReplicas is 9, more than maxReplicas, 8"),
        ({"server.autoscaling.kind": "hpa", "metrics.enabled": False}, "set metrics.enabled"),
        ({"triton.enabled": False}, "name another Triton with triton.url"),
        ({"triton.url": "triton:8001"}, "set triton.enabled to false"),
        ({"triton.placement": "sidecar", "triton.autoscaling.kind": "keda"}, "server.autoscaling scales both"),
        ({"engines.add": [{"name": "a", "source": "a"}]}, "set engines.source to claim"),
        ({"engines.source": "volume"}, "name an image with engines.volume.reference"),
        ({"engines.source": "claim"}, "name one with engines.claim.existingClaim"),
        ({"tls.enabled": True}, "tls.certificate.issuer.name for cert-manager"),
        ({"safety.mode": "blur"}, "name a model with safety.model"),
        ({"ingress.enabled": True}, "needs ingress.host and ingress.tlsSecret"),
        ({"grpcRoute.enabled": True}, "needs grpcRoute.parentRefs"),
        (
            {"grpcRoute.enabled": True, "grpcRoute.parentRefs": [{"name": "a"}], "tls.enabled": True},
            "end TLS at the gateway",
        ),
        ({"apiKeys.existingSecret": "keys"}, "name its key with helmTest.apiKeySecretKey"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_what_to_change(values: Object, words: str) -> None:
    together: Object = {}
    for path, value in values.items():
        together = charts.merged(together, at(path, value))
    with pytest.raises(ChartRefused) as caught:
        charts.render(together)
    assert words in str(caught.value)


def test_all_that_does_not_go_together_is_said_at_once() -> None:
    with pytest.raises(ChartRefused) as caught:
        charts.render({"triton": {"enabled": False}, "tls": {"enabled": True}, "server": {"drainSeconds": 1}})
    assert str(caught.value).count("sd-service: ") == 3


def test_the_least_that_is_asked_for_is_enough() -> None:
    charts.render({"server": {"terminationGracePeriodSeconds": 165}, "triton": {"terminationGracePeriodSeconds": 35}})


def test_a_changed_setting_starts_new_pods() -> None:
    def pods(values: Object) -> list[Object]:
        return [pod for _, pod in charts.pod_templates(charts.render(values))]

    assert pods({"server": {"maxActive": 9}}) != pods({})
    assert pods({"metrics": {"serviceMonitor": {"enabled": True}}, "ingress": {"controller": "none"}}) == pods({})


def test_two_releases_of_one_namespace_have_nothing_in_common() -> None:
    values = charts.values_of("many-gpus")
    titles = [
        {(each["kind"], each["metadata"]["name"]) for each in charts.render(values, name=name)}
        for name in ("one", "two")
    ]
    assert not titles[0] & titles[1]


def test_a_release_of_the_longest_name_is_valid() -> None:
    for values in VALUES:
        assert breaches(charts.render(charts.values_of(values), name="a" * 53)) == []


def test_optional_resources_are_asked_for_by_values_and_not_by_what_a_cluster_has() -> None:
    source = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    assert "Capabilities" not in source
    assert "lookup" not in source
    custom = {each["apiVersion"] for each in charts.render({})}
    assert custom <= {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}


def test_the_notes_say_what_to_do_next_and_no_secret() -> None:
    assert "helm test sd -n images" in charts.notes({})
    assert "Everybody who reaches it may call it" in charts.notes({})
    assert "one spare GPU" in charts.notes({"triton": {"device": "gpu"}})
    secured = charts.notes(charts.values_of("one-gpu"))
    assert "SDCLIENT_API_KEY" in secured
    assert "Everybody" not in secured
    assert "component=engines" in secured


def test_the_packaged_chart_is_reproducible_and_has_what_it_needs(tmp_path: Path) -> None:
    packages, digests = zip(*(helm_engine.package(CHART, tmp_path / name) for name in ("first", "second")), strict=True)
    assert digests[0] == digests[1]
    assert [str(path).rsplit("/", 1)[-1] for path in packages] == ["sd-service-0.1.0.tgz"] * 2
    with tarfile.open(packages[0]) as archive:
        names = {name.removeprefix("sd-service/") for name in archive.getnames()}
    assert {"Chart.yaml", "values.yaml", "values.schema.json", "README.md"} <= names
    assert {"alerts/sd-service.yaml", "dashboards/sd-service.json"} <= names
    assert not [name for name in names if name.startswith(("ci/", "golden/", "examples/"))]
    first, second = (helm_engine.render(chart, {}, name="sd", namespace="images") for chart in (packages[0], CHART))
    assert first == second


def test_the_chart_has_the_version_of_the_project() -> None:
    project = tomllib.loads((CHART.parent / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]


def test_the_readme_has_values_that_the_chart_takes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", charts.README.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert breaches(charts.render(yaml.safe_load(block))) == []


def test_the_readmes_commands_are_of_files_and_values_that_there_are() -> None:
    commands = "".join(re.findall(r"```sh\n(.*?)```", charts.README.read_text(), re.DOTALL)).splitlines()
    installs = [shlex.split(command) for command in commands if command.startswith("helm install")]
    assert len(installs) == 2
    for _, _, release, chart, *options in installs:
        assert (CHART.parent / chart) == CHART
        given = dict(zip(options[::2], options[1::2], strict=False))
        values = yaml.safe_load((CHART.parent / given["--values"]).read_text()) if "--values" in given else {}
        if "--set" in given:
            values = charts.merged(values, helm_engine.parse_set(given["--set"]))
        assert breaches(charts.render(values, name=release, namespace=given["--namespace"])) == []
    for command in commands:
        if command.startswith("docker build"):
            assert (CHART.parent / shlex.split(command)[3]).exists()


def test_the_readmes_links_lead_somewhere_and_its_numbers_are_true() -> None:
    text = charts.README.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (CHART / target).exists(), target
    assert f"renders {len(VALUES)} releases" in text
    assert f"against {len(LAWS)} laws" in text


def test_every_example_is_in_the_readme() -> None:
    examples = {path.name for path in (CHART / "examples").glob("*.yaml")}
    assert examples == set(re.findall(r"\(examples/([^)]+)\)", charts.README.read_text()))
