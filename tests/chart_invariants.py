"""What must hold between the objects of a release, and what an API server would refuse: a schema sees neither.

Each law yields a sentence for each breach.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from charts import Object, containers, environment, of_kind, pod_templates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUFFIXES: dict[str, int | Fraction] = {
    "": 1,
    "m": Fraction(1, 1000),
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "P": 10**15,
    "E": 10**18,
}
SUFFIXES |= {f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("KMGTPE", 1)}
EXTENDED = re.compile(r"^(?!kubernetes\.io/)[a-z0-9.-]+/")
HANDLERS = {"exec", "grpc", "httpGet", "tcpSocket"}
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Variables of the server that say whom it asks.
ASKED = ("SDSERVER_TRITON_URL", "OTEL_EXPORTER_OTLP_ENDPOINT", "SDSERVER_C2PA_TIMESTAMP_AUTHORITY")
# Names of variables whose values nobody but the process should read.
SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")


def quantity(text: str | int | float) -> Fraction:
    """A quantity as Kubernetes reads it. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(m|[kMGTPE]i?|Ki|)", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    return Fraction(match[1]) * SUFFIXES[match[2]]


def _title(each: Object) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


def _selects(selector: Object, labels: Object) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def _pods(objects: list[Object]) -> dict[str, Object]:
    """Pods by their component."""
    return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for _, pod in pod_templates(objects)}


def _selected(objects: list[Object], selector: Object) -> set[str]:
    return {name for name, pod in _pods(objects).items() if _selects(selector, pod["metadata"]["labels"])}


def _port_names(pod: Object) -> set[str]:
    return {port["name"] for container in containers(pod) for port in container.get("ports", [])}


def names_are_valid_and_unique(objects: list[Object]) -> Iterator[str]:
    counts = Counter((each["kind"], each["metadata"]["name"]) for each in objects)
    yield from (f"there are {count} of {kind} {name}" for (kind, name), count in counts.items() if count > 1)
    for each in objects:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", each["metadata"]["name"]):
            yield f"{_title(each)} has no valid name"
        if not each["metadata"].get("namespace"):
            yield f"{_title(each)} has no namespace"
    for each, pod in pod_templates(objects):
        for labels in (each["metadata"]["labels"], pod["metadata"]["labels"]):
            yield from (
                f"{_title(each)}: the label {value!r} is no valid one" for value in labels.values() if len(value) > 63
            )
        names = Counter(container["name"] for container in containers(pod))
        yield from (f"{_title(each)} has {count} containers {name}" for name, count in names.items() if count > 1)
        for container in containers(pod):
            if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", container["name"]):
                yield f"{_title(each)}: {container['name']} is no name of a container"
            for port in container.get("ports", []):
                if len(port["name"]) > 15:
                    yield f"{_title(each)}: the port's name {port['name']} is longer than 15 characters"


def workloads_select_their_own_pods(objects: list[Object]) -> Iterator[str]:
    for each in of_kind(objects, "Deployment"):
        selector = each["spec"]["selector"]["matchLabels"]
        if not _selects(selector, each["spec"]["template"]["metadata"]["labels"]):
            yield f"{_title(each)} does not select its own pods"
        if (found := _selected(objects, selector)) != {each["metadata"]["labels"]["app.kubernetes.io/component"]}:
            yield f"{_title(each)} selects {sorted(found)}"
        if {"helm.sh/chart", "app.kubernetes.io/version"} & set(selector):
            yield f"{_title(each)} could not be upgraded: its selector changes with the chart's version"


def selectors_hit_exactly_their_component(objects: list[Object]) -> Iterator[str]:
    for each in objects:
        component = each["metadata"]["labels"].get("app.kubernetes.io/component")
        match each["kind"]:
            case "Service":
                selector = each["spec"]["selector"]
            case "PodDisruptionBudget":
                selector = each["spec"]["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = each["spec"]["podSelector"]["matchLabels"]
            case _:
                continue
        if (found := _selected(objects, selector)) != {component}:
            yield f"{_title(each)} is for {component} and selects {sorted(found)}"
    for each in of_kind(objects, "ServiceMonitor"):
        for endpoint in each["spec"]["endpoints"]:
            services = [
                service
                for service in of_kind(objects, "Service")
                if _selects(each["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
                and endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
            ]
            if len(services) != 1:
                yield f"{_title(each)} finds the port {endpoint['port']} in {len(services)} services"


def named_ports_exist(objects: list[Object]) -> Iterator[str]:
    pods = _pods(objects)
    for each in of_kind(objects, "Service"):
        for component in _selected(objects, each["spec"]["selector"]):
            for port in each["spec"]["ports"]:
                if port["targetPort"] not in _port_names(pods[component]):
                    yield f"{_title(each)}: the pods of {component} have no port {port['targetPort']}"
    for each in of_kind(objects, "NetworkPolicy"):
        for component in _selected(objects, each["spec"]["podSelector"]["matchLabels"]):
            for rule in each["spec"].get("ingress", []):
                for port in rule.get("ports", []):
                    if isinstance(port["port"], str) and port["port"] not in _port_names(pods[component]):
                        yield f"{_title(each)}: the pods of {component} have no port {port['port']}"
    services = {each["metadata"]["name"]: each for each in of_kind(objects, "Service")}
    for each in of_kind(objects, "Ingress"):
        for path in each["spec"]["rules"][0]["http"]["paths"]:
            backend = path["backend"]["service"]
            if backend["port"]["name"] not in {port["name"] for port in services[backend["name"]]["spec"]["ports"]}:
                yield f"{_title(each)} leads nowhere"
    for each in of_kind(objects, "GRPCRoute"):
        for backend in each["spec"]["rules"][0]["backendRefs"]:
            if backend["port"] not in {port["port"] for port in services[backend["name"]]["spec"]["ports"]}:
                yield f"{_title(each)} leads nowhere"


def probes_have_one_handler_and_their_port(objects: list[Object]) -> Iterator[str]:
    for each, pod in pod_templates(objects):
        for container in containers(pod):
            ports = container.get("ports", [])
            known = {port["name"] for port in ports} | {port["containerPort"] for port in ports}
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = container.get(name)
                if probe is None:
                    continue
                handlers = HANDLERS & set(probe)
                if len(handlers) != 1:
                    yield f"{_title(each)}: {name} has {len(handlers)} handlers"
                for handler in handlers & {"grpc", "httpGet", "tcpSocket"}:
                    if probe[handler]["port"] not in known:
                        yield f"{_title(each)}: {name} asks the port {probe[handler]['port']}, which is none"
                if probe.get("timeoutSeconds", 1) > probe["periodSeconds"]:
                    yield f"{_title(each)}: {name} takes longer than its period"
            if container.get("livenessProbe") and container["livenessProbe"] == container.get("readinessProbe"):
                yield f"{_title(each)}: liveness and readiness are the same"


def what_runs_for_ever_has_probes(objects: list[Object]) -> Iterator[str]:
    for each in of_kind(objects, "Deployment"):
        for container in containers(each["spec"]["template"]):
            initial = container in each["spec"]["template"]["spec"].get("initContainers", [])
            if initial and container.get("restartPolicy") != "Always":
                continue
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                if name not in container:
                    yield f"{_title(each)}: {container['name']} has no {name}"


def resources_are_consistent(objects: list[Object]) -> Iterator[str]:
    for each, pod in pod_templates(objects):
        for container in containers(pod):
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            for name, text in [*requests.items(), *limits.items()]:
                try:
                    quantity(text)
                except ValueError as error:
                    yield f"{_title(each)}: {name}: {error}"
                    return
            for name in requests.keys() & limits.keys():
                if quantity(requests[name]) > quantity(limits[name]):
                    yield f"{_title(each)}: {container['name']} requests more {name} than its limit"
            for name in requests.keys() | limits.keys():
                if EXTENDED.match(name) and requests.get(name) != limits.get(name):
                    yield f"{_title(each)}: request and limit of {name} must be the same"
        for volume in pod["spec"].get("volumes", []):
            quantity(volume.get("emptyDir", {}).get("sizeLimit", 0))
    for each in of_kind(objects, "PersistentVolumeClaim"):
        quantity(each["spec"]["resources"]["requests"]["storage"])


def memory_volumes_fit_into_the_limit(objects: list[Object]) -> Iterator[str]:
    """A volume in memory counts against the limit of the container that writes it."""
    for each, pod in pod_templates(objects):
        sizes = {
            volume["name"]: quantity(volume["emptyDir"]["sizeLimit"])
            for volume in pod["spec"].get("volumes", [])
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        }
        for container in containers(pod):
            limit = container.get("resources", {}).get("limits", {}).get("memory")
            used = sum(sizes.get(mount["name"], 0) for mount in container.get("volumeMounts", []))
            if used and limit is not None and used >= quantity(limit):
                yield f"{_title(each)}: {container['name']} has a volume in memory that is as large as its limit"


def pods_are_restricted(objects: list[Object]) -> Iterator[str]:
    """Pod Security Standards, level restricted, and a root file system that cannot be written."""
    for each, pod in pod_templates(objects):
        spec = pod["spec"]
        yield from (f"{_title(each)} has {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{_title(each)} mounts the token of its service account"
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            yield f"{_title(each)} may run as root"
        if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{_title(each)} has no seccomp profile"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= RESTRICTED_VOLUMES:
                yield f"{_title(each)} has a volume {volume['name']} that is not allowed"
        for container in containers(pod):
            own = container.get("securityContext", {})
            where = f"{_title(each)}: {container['name']}"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{where} may gain privileges"
            if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
                yield f"{where} keeps capabilities"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{where} may write its root file system"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{where} takes a port of the node"


def stopping_has_its_time(objects: list[Object]) -> Iterator[str]:
    """preStop, then the drain, then a margin, all before SIGKILL; nothing ends a generation sooner than the drain."""
    for each, pod in pod_templates(objects):
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        for container in containers(pod):
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
            variables = environment(container)
            drain = float(variables.get("SDSERVER_DRAIN_SECONDS", 0))
            margin = 10 if drain else 0
            if int(command[-1]) + drain + margin > grace:
                yield f"{_title(each)}: SIGKILL comes after {grace} s, before the drain ends"
            if drain < float(variables.get("SDSERVER_MAX_GENERATION_SECONDS", 0)):
                yield f"{_title(each)}: the drain is shorter than a generation may be"
            if float(variables.get("SDSERVER_MAX_CONNECTION_AGE_GRACE_SECONDS", drain)) < drain:
                yield f"{_title(each)}: an aged connection ends before its generations"
    for each in of_kind(objects, "Ingress"):
        for name, value in each["metadata"].get("annotations", {}).items():
            if name.endswith(("proxy-read-timeout", "proxy-send-timeout")):
                [server] = [
                    container for container in containers(_pods(objects)["server"]) if container["name"] == "server"
                ]
                if int(value) <= float(environment(server)["SDSERVER_DRAIN_SECONDS"]):
                    yield f"{_title(each)} cuts a stream off that the server would finish"


def rollouts_wait_for_engines(objects: list[Object]) -> Iterator[str]:
    """A rollout counts as failed no sooner than the job that adds engines and the models' start may take."""
    waits = sum(job["spec"]["activeDeadlineSeconds"] for job in of_kind(objects, "Job"))
    for _, pod in pod_templates(objects):
        for container in containers(pod):
            waits += int(environment(container).get("SDSERVER_TRITON_START_SECONDS", 0))
    for each in of_kind(objects, "Deployment"):
        if each["spec"].get("progressDeadlineSeconds", 600) <= waits:
            yield f"{_title(each)} has failed before it can have its engines"


def updates_can_begin(objects: list[Object]) -> Iterator[str]:
    for each in of_kind(objects, "Deployment"):
        rolling = each["spec"]["strategy"]["rollingUpdate"]
        if {str(value).rstrip("%") for value in rolling.values()} == {"0"}:
            yield f"{_title(each)} allows neither a pod more nor one less"
    for each in of_kind(objects, "PodDisruptionBudget"):
        if {"minAvailable", "maxUnavailable"} <= set(each["spec"]):
            yield f"{_title(each)} has minAvailable and maxUnavailable"
        if str(each["spec"].get("maxUnavailable", 1)).rstrip("%") == "0":
            yield f"{_title(each)} lets no node be drained"


def autoscalers_have_their_target(objects: list[Object]) -> Iterator[str]:
    deployments = {each["metadata"]["name"]: each for each in of_kind(objects, "Deployment")}
    for each in [*of_kind(objects, "HorizontalPodAutoscaler"), *of_kind(objects, "ScaledObject")]:
        spec = each["spec"]
        target = deployments.get(spec["scaleTargetRef"]["name"])
        if target is None:
            yield f"{_title(each)} scales nothing"
            continue
        least = spec.get("minReplicas", spec.get("minReplicaCount"))
        most = spec.get("maxReplicas", spec.get("maxReplicaCount"))
        if not least <= target["spec"]["replicas"] <= most:
            yield f"{_title(each)} and its target disagree on the number of pods"
        window = spec.get("behavior", spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior"))
        if window["scaleDown"]["policies"][0]["value"] != 1:
            yield f"{_title(each)} stops several pods at once"


def volumes_and_mounts_are_the_same(objects: list[Object]) -> Iterator[str]:
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    for each, pod in pod_templates(objects):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        mounts = [mount for container in containers(pod) for mount in container.get("volumeMounts", [])]
        for name in {mount["name"] for mount in mounts} ^ set(volumes):
            yield f"{_title(each)}: the volume {name} is not there, or nobody has it"
        for container in containers(pod):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            if len(set(paths)) != len(paths):
                yield f"{_title(each)}: {container['name']} has two volumes in one place"
            # Where the image's own engines are not meant, the volume must be where the settings look.
            repository = environment(container).get("SDSERVER_MODEL_REPOSITORY")
            if "models" in volumes and repository is not None and repository not in paths:
                yield f"{_title(each)}: {container['name']} does not see its model repository"
        claimed = volumes.get("models", {}).get("persistentVolumeClaim", {}).get("claimName")
        if claims and claimed is not None and claimed not in claims:
            yield f"{_title(each)} has another claim than the chart makes"


def images_are_pinned(objects: list[Object]) -> Iterator[str]:
    for each, pod in pod_templates(objects):
        for container in containers(pod):
            name, _, digest = container["image"].partition("@")
            tag = name.rsplit("/", 1)[-1].partition(":")[2]
            if not (tag or digest) or tag == "latest":
                yield f"{_title(each)}: {container['image']} can change its meaning"


def secrets_stay_secrets(objects: list[Object]) -> Iterator[str]:
    yield from (f"{_title(each)} is in the release's history" for each in of_kind(objects, "Secret"))
    for each, pod in pod_templates(objects):
        for container in containers(pod):
            for name, value in environment(container).items():
                if SECRET.search(name) and not value.startswith("/"):
                    yield f"{_title(each)}: {name} stands in the manifest"


def only_server_and_prometheus_reach_triton(objects: list[Object]) -> Iterator[str]:
    for container in containers(_pods(objects)["server"]):
        if container["name"] == "triton" and "SDSERVER_TRITON_HOST" in environment(container):
            yield "a sidecar's Triton listens beyond its pod"
    policies = of_kind(objects, "NetworkPolicy")
    if not policies:
        return
    for component, pod in _pods(objects).items():
        selecting = [
            policy
            for policy in policies
            if _selects(policy["spec"]["podSelector"]["matchLabels"], pod["metadata"]["labels"])
        ]
        if "triton-grpc" in _port_names(pod) and not selecting:
            yield f"no policy protects the Triton of {component}"
        for policy in selecting:
            for rule in policy["spec"]["ingress"]:
                ports = {port["port"] for port in rule.get("ports", [])}
                peers = rule.get("from", [])
                if not ports or "triton-http" in ports:
                    yield f"{_title(policy)} opens Triton's HTTP"
                if "triton-grpc" in ports:
                    reach = [
                        _selected(objects, peer["podSelector"]["matchLabels"])
                        for peer in peers
                        if set(peer) == {"podSelector"}
                    ]
                    if reach != [{"server"}] or len(peers) != 1:
                        yield f"{_title(policy)}: others than the server reach Triton"
                if "triton-metrics" in ports and not peers:
                    yield f"{_title(policy)}: everybody reads Triton's metrics"


def policies_let_pods_reach_what_they_ask(objects: list[Object]) -> Iterator[str]:
    """Those whom its settings name, and their names, for the server; the server for the pod of `helm test`."""
    for each in of_kind(objects, "NetworkPolicy", "server"):
        [server] = [container for container in containers(_pods(objects)["server"]) if container["name"] == "server"]
        variables = environment(server)
        asked = [variables.get(name, "") for name in ASKED]
        egress = each["spec"]["egress"]
        for url in (url for url in asked if url and not url.startswith("127.0.0.1:")):
            parts = urlsplit(url if "://" in url else f"grpc://{url}")
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
            own = next((one for one in of_kind(objects, "Service") if one["metadata"]["name"] == host), None)
            ways = [rule for rule in egress if port in {opened["port"] for opened in rule.get("ports", [])}]
            meant = {own["metadata"]["labels"]["app.kubernetes.io/component"]} if own else None
            if not any("to" not in rule or (meant and _peers(objects, rule["to"]) == meant) for rule in ways):
                yield f"{_title(each)} does not let the server reach {host}:{port}"
        if not any("to" not in rule and 53 in {port["port"] for port in rule["ports"]} for rule in egress):
            yield f"{_title(each)} does not let the server look names up"
        peers = [rule.get("from") for rule in each["spec"]["ingress"] if rule["ports"][0]["port"] == "grpc"]
        if "test" in _pods(objects) and not any(rule is None or "test" in _peers(objects, rule) for rule in peers):
            yield f"{_title(each)} does not let the test in"


def _peers(objects: list[Object], peers: list[Object]) -> set[str]:
    """Components that peers of a policy select in the release's own namespace."""
    found = [
        _selected(objects, peer["podSelector"].get("matchLabels", {})) for peer in peers if set(peer) == {"podSelector"}
    ]
    return set().union(*found)


def jobs_can_be_changed(objects: list[Object]) -> Iterator[str]:
    for each in of_kind(objects, "Job"):
        if not re.search(r"-[0-9a-f]{10}$", each["metadata"]["name"]):
            yield f"{_title(each)} has the same name whatever it does, and jobs cannot be changed"


LAWS: list[Callable[[list[Object]], Iterator[str]]] = [
    names_are_valid_and_unique,
    workloads_select_their_own_pods,
    selectors_hit_exactly_their_component,
    named_ports_exist,
    probes_have_one_handler_and_their_port,
    what_runs_for_ever_has_probes,
    resources_are_consistent,
    memory_volumes_fit_into_the_limit,
    pods_are_restricted,
    stopping_has_its_time,
    rollouts_wait_for_engines,
    updates_can_begin,
    autoscalers_have_their_target,
    volumes_and_mounts_are_the_same,
    images_are_pinned,
    secrets_stay_secrets,
    only_server_and_prometheus_reach_triton,
    policies_let_pods_reach_what_they_ask,
    jobs_can_be_changed,
]


def breaches(objects: list[Object]) -> list[str]:
    """What is wrong with a release, by all laws."""
    return [sentence for law in LAWS for sentence in law(objects)]
