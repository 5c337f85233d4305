"""The container images, as far as they can be judged without a container engine and without installing anything."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import charts
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sdserver.server import Server
from sdserver.settings import ServeSettings, TritonSettings

if TYPE_CHECKING:
    from fakes import FakeBackend
    from sdserver.settings import Settings
    from sdserver.triton_process import TritonProcess

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "images"
LOCKS = {path.stem: path for path in sorted((IMAGES / "locks").glob("*.txt"))}
EXTRAS = {
    "server": ("3.11", ["server", "traces"]),
    "server-signing": ("3.11", ["server", "traces", "c2pa"]),
    "triton-cpu": ("3.11", ["server", "models", "triton"]),
    "triton-gpu": ("3.12", ["server", "models"]),
}
FINAL = {"server": "server.Dockerfile", "cpu": "triton.Dockerfile", "gpu": "triton.Dockerfile"}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (IMAGES / dockerfile).read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, re.sub(r"\s+", " ", rest)) for name, _, rest in (line.partition(" ") for line in lines)]


def stages(dockerfile: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name; the last one of the server has none."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in instructions(dockerfile):
        if instruction == "FROM":
            name = rest.split(" AS ")[1] if " AS " in rest else "server"
        found.setdefault(name, []).append((instruction, rest))
    return found


def stage(image: str) -> list[tuple[str, str]]:
    return stages(FINAL[image])[image]


def environment(image: str) -> dict[str, str]:
    [text] = [rest for name, rest in stage(image) if name == "ENV"]
    return dict(each.split("=", 1) for each in shlex.split(text))


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> its version and its hashes."""
    found: dict[str, tuple[str, list[str]]] = {}
    text = re.sub(r" \\\n", " ", LOCKS[name].read_text())
    for line in text.splitlines():
        if line and line[0] not in " #":
            package, version = line.split()[0].split("==")
            found[canonicalize_name(package)] = version, re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)
    return found


# Locks


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_one_version_and_hashes_and_no_host(name: str) -> None:
    packages = locked(name)
    assert packages
    assert all(hashes for _, hashes in packages.values())
    text = LOCKS[name].read_text()
    assert "://" not in text
    assert "--index" not in text
    assert text.count("==") == len(packages)


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_has_what_the_project_asks_for_in_versions_that_it_allows(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, extras = EXTRAS[name]
    packages = locked(name)

    def asked(extra: str) -> list[Requirement]:
        return [Requirement(each) for each in project["optional-dependencies"][extra]]

    wanted = [Requirement(each) for each in project["dependencies"]]
    wanted += [each for extra in [*extras, "cli"] for each in asked(extra)]
    there = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
    for requirement in wanted:
        if requirement.name == "sd-service" or (requirement.marker and not requirement.marker.evaluate(there)):
            continue
        version, _ = packages[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement


def test_the_server_is_locked_without_what_only_models_need() -> None:
    for name in ("server", "server-signing"):
        assert not locked(name).keys() & {
            "torch",
            "torchvision",
            "diffusers",
            "openvino",
            "transformers",
            "nvidia-pytriton",
        }
    assert "c2pa-python" not in locked("server")
    # numpy 2 gives empty outputs in the Python backend of the wheel's Triton.
    assert all(locked(name)["numpy"][0].startswith("1.") for name in EXTRAS)


# Dockerfiles


def test_hadolint_has_nothing_to_say() -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in IMAGES.glob("*.Dockerfile"))
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("there is no hadolint for this machine")
    done = subprocess.run([hadolint, "--no-color", *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("image", FINAL)
def test_an_image_ends_as_a_user_with_a_health_check_and_nothing_of_the_build(image: str) -> None:
    steps = stage(image)
    names = [name for name, _ in steps]
    assert [rest for name, rest in steps if name == "USER"] == ["1000:1000"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("COPY", "RUN", "FROM"))
    assert "HEALTHCHECK" in names
    assert all(rest.startswith("--from=") for name, rest in steps if name == "COPY")
    assert not [rest for name, rest in steps if name == "RUN" and ("apt-get" in rest or "pip" in rest)]
    assert environment(image)["PATH"].startswith("/opt/sd-service/bin:")


@pytest.mark.parametrize("dockerfile", sorted(set(FINAL.values())))
def test_an_image_installs_only_what_is_locked(dockerfile: str) -> None:
    for name, rest in instructions(dockerfile):
        assert name != "ADD"
        if name == "RUN":
            assert not re.search(r"\bpip3? install|\bcurl\b|\bwget\b", rest), rest
    bases = [rest for name, rest in instructions(dockerfile) if name == "ARG" and "_IMAGE=" in rest]
    assert all(":" in base and not base.endswith(":latest") for base in bases)


@pytest.mark.parametrize("dockerfile", sorted(set(FINAL.values())))
def test_what_is_copied_is_there_and_part_of_the_context(dockerfile: str) -> None:
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, rest in instructions(dockerfile):
        if name == "COPY" and not rest.startswith("--from="):
            *sources, _ = rest.split()
            for source in sources:
                for lock in ("server", "server-signing"):
                    path = source.replace("${LOCK}", lock)
                    assert (ROOT / path).exists(), path
                    assert path.split("/")[0] in context, path


def test_the_wheel_of_the_project_is_built_from_what_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for dockerfile, name in (
        ("server.Dockerfile", "build"),
        ("triton.Dockerfile", "cpu-build"),
        ("triton.Dockerfile", "gpu-build"),
    ):
        copied = {rest.split()[0] for step, rest in stages(dockerfile)[name] if step == "COPY"}
        assert {package.split("/")[0] for package in packages} <= copied
        assert "pyproject.toml" in copied


@pytest.mark.parametrize(
    ("image", "kind"), [("server", ServeSettings), ("cpu", TritonSettings), ("gpu", TritonSettings)]
)
def test_the_real_settings_read_an_images_environment(
    image: str, kind: type[ServeSettings | TritonSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(image).items():
        if name.startswith("SDSERVER_"):
            assert name.removeprefix("SDSERVER_").lower() in kind.model_fields, name
            monkeypatch.setenv(name, value)
    assert kind().model_repository == Path("/models")
    if image == "gpu":
        assert environment(image)["SDSERVER_TRITON_EXECUTABLE"] == "/opt/tritonserver/bin/tritonserver"


def test_images_have_the_names_versions_and_ports_that_chart_and_compose_file_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    built = {
        tag
        for dockerfile in set(FINAL.values())
        for tag in re.findall(r"--tag (\S+)", (IMAGES / dockerfile).read_text())
    }
    version = project["version"]
    assert built == {f"sd-service-server:{version}{end}" for end in ("", "-signing")} | {
        f"sd-service-triton:{version}{end}" for end in ("-cpu", "-gpu")
    }
    asked = set()
    for values in ({}, {"triton": {"device": "gpu"}, "signing": {"existingSecret": "c2pa"}}):
        for _, pod in charts.pod_templates(charts.render(values)):
            for container in charts.containers(pod):
                asked.add(container["image"])
                image = "server" if container["name"] == "server" else "cpu"
                exposed = {int(port) for name, rest in stage(image) if name == "EXPOSE" for port in rest.split()}
                ports = {port["containerPort"] for port in container.get("ports", []) if port["name"] != "metrics"}
                assert ports <= exposed
    assert asked == built
    composed = {each["image"] for name in ("compose.yaml", "compose.gpu.yaml") for each in services(name).values()}
    assert composed < built


# Compose file


def services(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((IMAGES / name).read_text())["services"]
    return found


def test_the_compose_file_starts_what_the_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, type[Settings]] = {"server": ServeSettings, "triton": TritonSettings}
    for name, service in services().items():
        kind = kinds[name]
        for variable, value in service["environment"].items():
            assert variable.removeprefix("SDSERVER_").lower() in kind.model_fields, variable
            monkeypatch.setenv(variable, value)
        kind()
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        build = service["build"]
        assert (IMAGES / build["context"] / build["dockerfile"]).exists()
        assert build.get("target", "server") in stages(Path(build["dockerfile"]).name)


def test_the_compose_file_shows_the_service_to_this_machine_and_triton_to_nobody() -> None:
    assert "ports" not in services()["triton"]
    assert all(port.startswith("127.0.0.1:") for port in services()["server"]["ports"])
    server = services()["server"]
    assert int(server["stop_grace_period"].rstrip("s")) >= int(server["environment"]["SDSERVER_DRAIN_SECONDS"]) + 10


# Health check and bill of materials


async def healthcheck(*what: str, **variables: str) -> int:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(IMAGES / "healthcheck.py"), *what), env=variables, stderr=asyncio.subprocess.DEVNULL
    )
    return await asyncio.wait_for(process.wait(), 30)


async def test_the_health_check_says_what_a_real_server_says(settings: ServeSettings, backend: FakeBackend) -> None:
    async with Server(settings.model_copy(update={"health_port": 0}), backend) as server:
        port = str(server.health_port)
        assert await healthcheck("server", SDSERVER_HEALTH_PORT=port) == 0
    assert await healthcheck("server", SDSERVER_HEALTH_PORT=port) == 1
    assert await healthcheck("triton", SDSERVER_TRITON_HTTP_PORT=port) == 1


async def test_the_health_check_says_what_a_real_triton_says(triton: TritonProcess) -> None:
    port = str(triton.http_port)
    assert await healthcheck("triton", SDSERVER_TRITON_HTTP_PORT=port) == 0
    assert await healthcheck("triton", "live", SDSERVER_TRITON_HTTP_PORT=port) == 0


def bill(python: Path) -> dict[str, dict[str, Any]]:
    made = json.loads(subprocess.run([python, IMAGES / "sbom.py"], capture_output=True, text=True, check=True).stdout)
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    return {each["name"]: each for each in made["components"]}


def test_the_bill_of_materials_names_packages_with_version_and_licence() -> None:
    numpy = bill(Path(sys.executable))["numpy"]
    assert numpy["purl"] == f"pkg:pypi/numpy@{numpy['version']}"
    assert "BSD" in json.dumps(numpy["licenses"])
