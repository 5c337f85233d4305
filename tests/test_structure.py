"""Imports flow one way, and the server runs without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    "sdapi": ROOT / "proto/sdapi",
    "sdclient": ROOT / "client/sdclient",
    "sdserver": ROOT / "server/sdserver",
    "sdmodels": ROOT / "model_repository/sdmodels",
}
# The server's modules: each may import only what stands above it.
LAYERS = [
    {"canvas", "pictures", "depth", "capacity"},
    {
        "samplers.query",
        "schedules",
        "parameterization",
        "noise",
        "windows",
        "block_list",
        "errors",
        "settings",
        "logs",
        "triton_host",
        "hardware",
    },
    {"observation", "fair_queue", "watched_files"},
    {"tenants", "tls", "traces", "figures", "batching", "capacity.events"},
    {"triton_process", "samplers.deterministic", "samplers.stochastic"},
    {"samplers"},
    {"engines", "safety_model", "inpainting"},
    {"engine_memory", "request", "xmp", "conversion", "engine_families", "triton_models", "capacity.workload"},
    {"infotext", "engine_store", "doctor"},
    {"metadata", "lora_store"},
    {"passes", "guidance", "images", "signing", "admission", "step_scheduler", "cost_model", "backends"},
    {"clip_guidance", "block_cache", "lora_rows", "backends.shared_memory", "capacity.outcome"},
    {"text_cache", "outbox", "denoiser", "decoding", "engine_schedulers", "backends.triton", "backends.in_process"},
    {"backends.observed", "metrics", "capacity.gpu"},
    {"image_writer", "safety", "encoding", "engine_pool", "capacity.server"},
    {"conditioning"},
    {"generation", "engine_watch", "capacity.simulation"},
    {"pipeline", "wire.names", "capacity.planning"},
    {"wire.reading_images", "wire.reading_windows", "wire.reading_loras", "wire.reading_clip_guidance", "wire.writing"},
    {"wire.reading"},
    {"wire"},
    {"service"},
    {"health"},
    {"server"},
    {"top_command", "engine_command", "lora_command", "plan_command", "calibrate"},
    {"doctor_command"},
    {"__main__"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> dict[str, Path]:
    folder = SOURCES[package]
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }


def importers(package: str, imported: str) -> set[str]:
    return {
        name
        for name, path in modules(package).items()
        if any(module == imported or module.startswith(f"{imported}.") for module in imports(path))
    }


def test_only_the_models_import_torch_and_only_the_in_process_backend_imports_the_models() -> None:
    for package in ("sdapi", "sdclient", "sdserver"):
        for library in ("torch", "diffusers", "open_clip", "transformers"):
            assert not importers(package, library), package
    assert importers("sdserver", "sdmodels") == {"backends.in_process"}


def test_client_and_server_know_the_contract_and_not_each_other() -> None:
    for package, other in (("sdclient", "sdserver"), ("sdserver", "sdclient"), ("sdmodels", "sdserver")):
        assert not importers(package, other)
    assert not importers("sdclient", "numpy")


def test_generated_code_has_one_door_on_each_side() -> None:
    assert importers("sdserver", "sdapi") == {
        "wire.names",
        "wire.reading",
        "wire.reading_clip_guidance",
        "wire.reading_images",
        "wire.reading_loras",
        "wire.reading_windows",
        "wire.writing",
        "service",
        "server",
    }
    assert importers("sdclient", "sdapi") == {"_wire", "_sync", "_async"}


def test_the_arithmetic_imports_nothing_but_numpy_and_the_standard_library() -> None:
    allowed = sys.stdlib_module_names | {"numpy"}
    samplers = {name for name in modules("sdserver") if name.split(".")[0] == "samplers"}
    for name in samplers | {"schedules", "parameterization", "noise", "windows", "depth"}:
        used = {module for module in imports(modules("sdserver")[name]) if not module.startswith("sdserver.samplers.")}
        assert {module.split(".")[0] for module in used} <= allowed, name


def test_the_server_modules_import_only_what_stands_below_them() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = {name for name in modules("sdserver") if name != "__init__"}
    assert found == level.keys()
    for name in found:
        used = {module.removeprefix("sdserver.") for module in imports(modules("sdserver")[name])}
        for other in used & level.keys():
            assert level[other] < level[name], f"{name} imports {other}"


def test_importing_the_server_does_not_import_torch() -> None:
    code = "import sys, sdserver.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
