"""Writes what is installed beside this interpreter as a CycloneDX 1.6 bill of materials to standard output.

Names, versions and licences of Python packages; the locks have their digests. What the base image holds says
`docker buildx build --sbom=true`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from typing import Any


def component(package: importlib.metadata.Distribution) -> dict[str, Any]:
    """A package as CycloneDX has it."""
    name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
    found: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": package.version,
        "purl": f"pkg:pypi/{name}@{package.version}",
        "bom-ref": f"pkg:pypi/{name}@{package.version}",
    }
    licence = package.metadata.get("License-Expression")
    words = package.metadata.get("License") or ""
    classified = [
        each.rsplit(" :: ", 1)[-1] for each in package.metadata.get_all("Classifier", []) if "License ::" in each
    ]
    if licence:
        found["licenses"] = [{"expression": licence}]
    elif classified:
        found["licenses"] = [{"license": {"name": each}} for each in classified]
    elif words and "\n" not in words:
        found["licenses"] = [{"license": {"name": words}}]
    return found


def bill() -> dict[str, Any]:
    """All packages of this environment, by name."""
    packages = {each.metadata["Name"]: each for each in importlib.metadata.distributions()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "sd-service"}},
        "components": [component(packages[name]) for name in sorted(packages, key=str.lower)],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
