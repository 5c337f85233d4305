"""Writes what is installed beside this interpreter as a bill of materials, CycloneDX 1.6: `python sbom.py > sbom.cdx.json`.

Names, versions, licences and files' digests of Python packages. What the base image holds is `docker buildx --sbom`'s.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import re
import sys
from typing import Any


def component(package: importlib.metadata.Distribution) -> dict[str, Any]:
    """A package as CycloneDX has it. Its digest is that of RECORD, which has the digests of all its files."""
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
    classified = [each.rsplit(" :: ", 1)[-1] for each in package.metadata.get_all("Classifier", []) if "License ::" in each]
    if licence:
        found["licenses"] = [{"expression": licence}]
    elif classified:
        found["licenses"] = [{"license": {"name": each}} for each in classified]
    elif words and "\n" not in words:
        found["licenses"] = [{"license": {"name": words}}]
    files = [
        {"name": f"{name}:file", "value": f"{file}={_hexadecimal(file.hash.value)}"}
        for file in package.files or ()
        if file.hash is not None and file.hash.mode == "sha256" and str(file).endswith(".so")
    ]
    if files:
        found["properties"] = files
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


def _hexadecimal(digest: str) -> str:
    return base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
