"""The Helm chart, rendered; `python tests/charts.py` writes what is derived from it (`make chart`)."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_engine
import yaml
from sdserver.settings import ServeSettings

CHART = Path(__file__).parents[1] / "helm"
README = CHART / "README.md"
SCHEMA = CHART / "values.schema.json"
GOLDEN = CHART / "golden"
VALUES = {
    path.name.removesuffix("-values.yaml"): path
    for folder in ("ci", "examples")
    for path in sorted((CHART / folder).glob("*-values.yaml"))
}
RELEASE, NAMESPACE = "sd", "images"
TABLE_START, TABLE_END = "<!-- values: written by `make chart` -->\n", "<!-- end of values -->\n"

Object = dict[str, Any]


@cache
def schema() -> Object:
    loaded: Object = json.loads(SCHEMA.read_text())
    return loaded


def values_of(name: str) -> Object:
    """The values of a file of ci/ or examples/."""
    loaded: Object = yaml.safe_load(VALUES[name].read_text())
    return loaded


def defaults() -> Object:
    loaded: Object = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def merged(first: Object, second: Object) -> Object:
    """Values with others over them, as Helm puts them together."""
    result = copy.deepcopy(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def templates(values: Object, name: str = RELEASE, namespace: str = NAMESPACE, upgrade: bool = False) -> dict[str, str]:
    """Rendered templates by file, without the empty ones. Raises ChartRefused."""
    files = helm_engine.render(
        CHART, values, name=name, namespace=namespace, is_install=not upgrade, is_upgrade=upgrade
    )
    return {Path(file).name: text.strip() for file, text in sorted(files.items()) if text.strip()}


def render(values: Object, name: str = RELEASE, namespace: str = NAMESPACE, upgrade: bool = False) -> list[Object]:
    """All objects of a release, at its install or at an upgrade. Raises ChartRefused."""
    objects: list[Object] = json.loads(_rendered(json.dumps(values), name, namespace, upgrade))
    return objects


@cache
def _rendered(values: str, name: str, namespace: str, upgrade: bool) -> str:
    files = templates(json.loads(values), name, namespace, upgrade)
    files.pop("NOTES.txt")
    # The same as safe_load, in C.
    return json.dumps([each for text in files.values() for each in yaml.load_all(text, yaml.CSafeLoader) if each])


def notes(values: Object) -> str:
    return templates(values)["NOTES.txt"]


def golden(values: Object) -> str:
    """A release as one text for the eye and for git."""
    files = templates(values)
    words = "\n".join(f"# {line}".rstrip() for line in files.pop("NOTES.txt").splitlines())
    parts = [
        f"---\n# {name}\n{re.sub(chr(10) + '(?: *' + chr(10) + ')+', chr(10), text)}\n" for name, text in files.items()
    ]
    return "".join(parts).replace("---\n---\n", "---\n") + words + "\n"


@dataclass(frozen=True, slots=True)
class Line:
    """One value of values.yaml and what its comment says."""

    path: str
    default: str
    text: str


def documented_values() -> list[Line]:
    """All values in their order; each has a comment above it."""
    lines: list[Line] = []
    above: list[tuple[int, str]] = []
    comment: list[str] = []
    flat = _leaves(defaults())
    for line in (CHART / "values.yaml").read_text().splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("# "):
            comment.append(line.strip()[2:])
            continue
        if match := re.match(r" *([A-Za-z]+):", line):
            above = [(depth, key) for depth, key in above if depth < indent] + [(indent, match[1])]
            path = ".".join(key for _, key in above)
            if path in flat:
                default = json.dumps(flat[path])
                lines.append(Line(path, default, " ".join(comment)))
        comment = []
    return lines


def _leaves(values: Object, above: str = "") -> dict[str, Any]:
    """Values by their dotted path. Maps that users fill (labels, resources) and lists are values as a whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{above}{key}"
        whole = not isinstance(value, dict) or not value or set(value) & {"cpu", "memory", "grafana_dashboard"}
        found |= {path: value} if whole else _leaves(value, f"{path}.")
    return found


def leaves() -> dict[str, Any]:
    """All values of values.yaml by their dotted path."""
    return _leaves(defaults())


def values_table() -> str:
    rows = [f"| `{line.path}` | `{line.default}` | {line.text} |" for line in documented_values()]
    return "\n".join(["| value | default | what it means |", "| --- | --- | --- |", *rows]) + "\n"


def readme() -> str:
    """The README as it should be: with the table of the values as they are."""
    before, rest = README.read_text().split(TABLE_START)
    _, after = rest.split(TABLE_END)
    return f"{before}{TABLE_START}{values_table()}{TABLE_END}{after}"


def open_settings() -> list[str]:
    """Settings of `sdserver serve` that the chart leaves to `server.settings`."""
    source = (CHART / "templates/_server.tpl").read_text()
    [body] = re.findall(r'define "sd-service.server.settings"(.*?)\{\{- end -\}\}\n\n', source, re.DOTALL)
    decided = set(re.findall(r"^([a-z0-9_]+): ", body, re.MULTILINE))
    # A server of a release always asks Triton.
    return sorted(ServeSettings.model_fields.keys() - decided - {"backend"})


def schema_text() -> str:
    """The schema as it should be: with the settings that there are."""
    names = json.dumps(open_settings())
    return re.sub(
        r'("settings": \{\s*"type": "object",\s*"propertyNames": )\{[^}]*\}',
        rf'\1{{"enum": {names}}}',
        SCHEMA.read_text(),
    )


def write() -> None:
    SCHEMA.write_text(schema_text())
    GOLDEN.mkdir(exist_ok=True)
    for stale in set(GOLDEN.glob("*.yaml")) - {GOLDEN / f"{name}.yaml" for name in VALUES}:
        stale.unlink()
    for name in VALUES:
        (GOLDEN / f"{name}.yaml").write_text(golden(values_of(name)))
    README.write_text(readme())


def pod_templates(objects: list[Object]) -> list[tuple[Object, Object]]:
    """Each object that has or is a pod, with its pod: its `metadata` and `spec`."""
    found = []
    for each in objects:
        if each["kind"] == "Pod":
            found.append((each, each))
        elif each["kind"] in ("Deployment", "Job"):
            found.append((each, each["spec"]["template"]))
    return found


def containers(pod: Object) -> list[Object]:
    """All containers of a pod, the initial ones first."""
    found: list[Object] = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    return found


def environment(container: Object) -> dict[str, str]:
    """The variables that stand in the manifest itself."""
    return {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


def of_kind(objects: list[Object], kind: str, component: str = "") -> list[Object]:
    return [
        each
        for each in objects
        if each["kind"] == kind and component in ("", each["metadata"]["labels"].get("app.kubernetes.io/component"))
    ]


if __name__ == "__main__":
    write()
