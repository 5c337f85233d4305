"""The objects of every release: valid for Kubernetes 1.29 to 1.37, and consistent with each other."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import chart_invariants as laws
import charts
import kubernetes_validate
import kubernetes_validate.utils
import pytest
from charts import VALUES, Object

if TYPE_CHECKING:
    from collections.abc import Callable

# The library would read megabytes of schemas anew for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
# An OCI image as a volume is part of the API since then.
NEEDS = {"engines-volume": "1.31"}
COMPONENT = "app.kubernetes.io/component"
# Kinds of operators, whose schemas test_helm_custom_resources.py has.
CUSTOM = {"BackendTrafficPolicy", "Certificate", "GRPCRoute", "PrometheusRule", "ScaledObject", "ServiceMonitor"}


def release(name: str = "default") -> list[Object]:
    return charts.render(charts.values_of(name))


def validate(each: Object, version: str) -> None:
    """Strictly: what the API does not know is an error. Raises kubernetes_validate.ValidationError."""
    try:
        kubernetes_validate.validate(each, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        assert each["kind"] in CUSTOM, each["kind"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_for_kubernetes(version: str) -> None:
    seen: set[str] = set()
    for name in VALUES:
        if int(version[2:]) < int(NEEDS.get(name, version)[2:]):
            continue
        for each in charts.render(charts.values_of(name)):
            text = json.dumps(each, sort_keys=True)
            if text not in seen:
                validate(each, version)
            seen.add(text)


def test_only_what_says_so_needs_a_newer_kubernetes() -> None:
    [deployment] = charts.of_kind(release("engines-volume"), "Deployment", "triton")
    with pytest.raises(kubernetes_validate.ValidationError, match="'image' was unexpected"):
        validate(deployment, "1.30")


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_it_holds(law: Callable[[list[Object]], Any]) -> None:
    for name in VALUES:
        assert list(law(charts.render(charts.values_of(name)))) == [], name


def server(objects: list[Object]) -> Any:
    return charts.of_kind(objects, "Deployment", "server")[0]


def container(objects: list[Object], component: str = "server") -> Any:
    return charts.of_kind(objects, "Deployment", component)[0]["spec"]["template"]["spec"]["containers"][0]


def pod_spec(objects: list[Object]) -> Any:
    return server(objects)["spec"]["template"]["spec"]


def policy(objects: list[Object], component: str) -> Any:
    return charts.of_kind(objects, "NetworkPolicy", component)[0]["spec"]


def set_to(path: Callable[[list[Object]], Any], key: Any, value: Any) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        path(objects)[key] = value

    return change


# What an API server refuses and a schema lets pass, and what nobody refuses and still does not work.
BAD: list[tuple[str, str, Callable[[list[Object]], None], str]] = [
    ("a quantity", "default", set_to(lambda o: container(o)["resources"]["requests"], "cpu", "5x"), "no quantity"),
    ("two handlers", "default", set_to(lambda o: container(o)["livenessProbe"], "exec", {}), "has 2 handlers"),
    ("too much", "default", set_to(lambda o: container(o)["resources"]["requests"], "memory", "3Gi"), "more memory"),
    (
        "half a GPU",
        "one-gpu",
        set_to(lambda o: container(o, "triton")["resources"]["requests"], "nvidia.com/gpu", "2"),
        "must be the same",
    ),
    ("privileged", "default", set_to(lambda o: container(o)["securityContext"], "privileged", True), "gain privileges"),
    ("root", "default", set_to(lambda o: pod_spec(o)["securityContext"], "runAsUser", 0), "run as root"),
    ("no seccomp", "default", lambda o: pod_spec(o)["securityContext"].pop("seccompProfile"), "no seccomp"),
    (
        "capabilities",
        "default",
        set_to(lambda o: container(o)["securityContext"], "capabilities", {"drop": []}),
        "keeps capabilities",
    ),
    ("writable", "default", lambda o: container(o)["securityContext"].pop("readOnlyRootFilesystem"), "may write"),
    ("the node's", "default", set_to(pod_spec, "hostNetwork", True), "has hostNetwork"),
    (
        "a path of the node",
        "default",
        lambda o: pod_spec(o)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "not allowed",
    ),
    ("a short grace", "default", set_to(pod_spec, "terminationGracePeriodSeconds", 5), "before the drain ends"),
    (
        "both budgets",
        "default",
        set_to(lambda o: charts.of_kind(o, "PodDisruptionBudget")[0]["spec"], "minAvailable", 1),
        "minAvailable and maxUnavailable",
    ),
    (
        "another selector",
        "default",
        set_to(lambda o: server(o)["spec"]["selector"]["matchLabels"], "app.kubernetes.io/component", "servers"),
        "does not select its own pods",
    ),
    (
        "a wide selector",
        "default",
        lambda o: charts.of_kind(o, "Service", "server")[0]["spec"]["selector"].pop("app.kubernetes.io/component"),
        "and selects",
    ),
    (
        "a port that is none",
        "default",
        set_to(lambda o: container(o)["readinessProbe"]["grpc"], "port", 1),
        "which is none",
    ),
    (
        "a target that is none",
        "default",
        set_to(lambda o: charts.of_kind(o, "Service")[0]["spec"]["ports"][0], "targetPort", "http"),
        "no port http",
    ),
    (
        "the same probes",
        "default",
        lambda o: container(o).update(livenessProbe=container(o)["readinessProbe"]),
        "the same",
    ),
    ("no probe", "default", lambda o: container(o, "triton").pop("livenessProbe"), "has no livenessProbe"),
    (
        "a standing update",
        "default",
        set_to(lambda o: server(o)["spec"]["strategy"], "rollingUpdate", {"maxSurge": 0, "maxUnavailable": "0%"}),
        "neither a pod more nor one less",
    ),
    (
        "an impatient rollout",
        "engines-job",
        set_to(lambda o: server(o)["spec"], "progressDeadlineSeconds", 600),
        "failed before it can have its engines",
    ),
    (
        "no target",
        "hpa",
        set_to(lambda o: charts.of_kind(o, "HorizontalPodAutoscaler")[0]["spec"]["scaleTargetRef"], "name", "x"),
        "scales nothing",
    ),
    ("a lost volume", "default", lambda o: pod_spec(o)["volumes"].clear(), "is not there"),
    ("latest", "default", set_to(container, "image", "a/b:latest"), "can change its meaning"),
    ("no tag", "default", set_to(container, "image", "host:5000/a"), "can change its meaning"),
    (
        "a secret",
        "default",
        lambda o: container(o)["env"].append({"name": "SDCLIENT_API_KEY", "value": "abc"}),
        "stands in the manifest",
    ),
    (
        "an open Triton",
        "default",
        lambda o: policy(o, "triton")["ingress"][0].pop("from"),
        "others than the server reach Triton",
    ),
    (
        "a Triton for all pods",
        "default",
        lambda o: policy(o, "triton")["ingress"][0]["from"].append({"podSelector": {"matchLabels": {}}}),
        "others than the server reach Triton",
    ),
    (
        "a sidecar's HTTP",
        "sidecar-cpu",
        lambda o: policy(o, "server")["ingress"][0]["ports"].append({"port": "triton-http"}),
        "opens Triton's HTTP",
    ),
    (
        "a sidecar for all",
        "sidecar-cpu",
        lambda o: pod_spec(o)["initContainers"][-1]["env"].append({"name": "SDSERVER_TRITON_HOST", "value": "0.0.0.0"}),
        "beyond its pod",
    ),
    (
        "no way to Triton",
        "default",
        lambda o: policy(o, "server")["egress"].pop(),
        "does not let the server reach sd-sd-service-triton:8001",
    ),
    (
        "a way to no Triton",
        "default",
        lambda o: policy(o, "server")["egress"][1]["to"][0]["podSelector"]["matchLabels"].pop(COMPONENT),
        "does not let the server reach sd-sd-service-triton:8001",
    ),
    (
        "no way to another Triton",
        "external-triton",
        lambda o: policy(o, "server")["egress"].pop(),
        "does not let the server reach triton.gpu-farm.svc:8001",
    ),
    (
        "no way to the collector",
        "monitoring",
        lambda o: policy(o, "server")["egress"].pop(-2),
        "does not let the server reach collector.tracing.svc:4317",
    ),
    (
        "no way to time stamps",
        "safety-signing",
        lambda o: policy(o, "server")["egress"].pop(),
        "does not let the server reach timestamp.example.com:8318",
    ),
    (
        "no names",
        "default",
        lambda o: policy(o, "server")["egress"].pop(0),
        "does not let the server look names up",
    ),
    (
        "no way for the test",
        "many-gpus",
        lambda o: policy(o, "server")["ingress"][0]["from"].pop(),
        "does not let the test in",
    ),
    (
        "memory",
        "default",
        set_to(lambda o: container(o, "triton")["resources"]["limits"], "memory", "512Mi"),
        "as large as its limit",
    ),
    (
        "an impatient ingress",
        "tls",
        lambda o: charts.of_kind(o, "Ingress")[0]["metadata"]["annotations"].update(
            {"nginx.ingress.kubernetes.io/proxy-read-timeout": "60"}
        ),
        "cuts a stream off",
    ),
    (
        "the same job",
        "engines-job",
        set_to(lambda o: charts.of_kind(o, "Job")[0]["metadata"], "name", "a"),
        "same name",
    ),
]


@pytest.mark.parametrize(("values", "change", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_release_that_would_not_work_is_found(
    values: str, change: Callable[[list[Object]], None], words: str
) -> None:
    objects = release(values)
    change(objects)
    assert any(words in sentence for sentence in laws.breaches(objects)), laws.breaches(objects)


def test_an_old_or_misspelt_object_is_found() -> None:
    [scaler, _] = charts.of_kind(release("hpa"), "HorizontalPodAutoscaler")
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
        validate({**scaler, "apiVersion": "autoscaling/v2beta2"}, "1.29")
    objects = release()
    container(objects)["imagee"] = container(objects).pop("image")
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        validate(server(objects), "1.37")


def test_a_sidecar_starts_before_the_server_and_stops_after_it() -> None:
    [triton] = [each for each in pod_spec(release("many-gpus"))["initContainers"] if each["name"] == "triton"]
    assert triton["restartPolicy"] == "Always"
    assert [each["name"] for each in pod_spec(release("many-gpus"))["containers"]] == ["server"]
    assert triton["startupProbe"]
    # Both see the same /dev/shm, so that tensors need no gRPC.
    [server_container] = pod_spec(release("many-gpus"))["containers"]
    for each in (triton, server_container):
        assert {"name": "triton-shm", "mountPath": "/dev/shm"} in each["volumeMounts"]


def test_gpus_are_asked_for_where_triton_is_and_nowhere_else() -> None:
    for name in VALUES:
        for _, pod in charts.pod_templates(release(name)):
            for each in charts.containers(pod):
                asked = {key for key in each.get("resources", {}).get("limits", {}) if "/" in key}
                values = charts.values_of(name).get("triton", {})
                assert bool(asked) == (each["name"] == "triton" and values.get("device") == "gpu"), name
                assert not asked or each["image"].split(":")[-1].endswith("-gpu")


def test_a_tolerance_for_gpu_nodes_goes_with_the_gpu() -> None:
    [triton] = charts.of_kind(release("engines-volume"), "Deployment", "triton")
    spec = triton["spec"]["template"]["spec"]
    assert spec["tolerations"] == [{"key": "nvidia.com/mig-3g.40gb", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["runtimeClassName"] == "nvidia"
    assert "tolerations" not in pod_spec(release("engines-volume"))


def test_the_claim_survives_the_release_and_triton_only_reads_it() -> None:
    objects = release("engines-job")
    [claim] = charts.of_kind(objects, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for deployment in charts.of_kind(objects, "Deployment"):
        for each in charts.containers(deployment["spec"]["template"]):
            assert all(mount["readOnly"] for mount in each["volumeMounts"] if mount["name"] == "models")


def test_pods_wait_for_the_engines_that_the_job_adds() -> None:
    objects = release("engines-job")
    for deployment in charts.of_kind(objects, "Deployment"):
        first = deployment["spec"]["template"]["spec"]["initContainers"][0]
        assert first["name"] == "wait-for-engines"
        assert first["command"][4:] == ["stable-diffusion-2-1", "inkpunk"]
    assert "initContainers" not in pod_spec(release("external-triton"))


def test_no_budget_keeps_the_node_of_a_single_pod() -> None:
    assert [each["metadata"]["name"] for each in charts.of_kind(release(), "PodDisruptionBudget")] == ["sd-sd-service"]
    values = {"triton": {"replicas": 2}}
    assert len(charts.of_kind(charts.render(values), "PodDisruptionBudget")) == 2


def test_a_job_that_is_offline_reaches_nobody() -> None:
    assert policy(release("sidecar-cpu"), "engines")["egress"] == []
    assert {"port": 443, "protocol": "TCP"} in policy(release("engines-job"), "engines")["egress"][0]["ports"]
