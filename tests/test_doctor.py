"""`sdserver doctor`: what it reads of machines that are not this one, what it says of them, and with which status."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from sdserver import doctor_command
from sdserver.doctor import EngineFacts, Finding, findings, kind_of
from sdserver.engine_memory import EngineMemory, engine_memory
from sdserver.engines import load_engine
from sdserver.hardware import Cpu, Gpu, Hardware, Torch, parse_gpus, read, read_torch
from sdserver.triton_host import why_not

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.settings import ServeSettings

GB = 10**9
A10 = Gpu(0, "NVIDIA A10", (8, 6), 24 * GB, 23 * GB, "580.65.06")
MACHINE = Hardware(
    Cpu("Xeon", 8, 16, ("avx2", "avx512f", "avx512_bf16", "amx_bf16")), 64 * GB, 50 * GB, GB, GB, (), "", None
)
SMALL = EngineMemory(2 * GB, GB // 2, GB // 2)
ENGINE = EngineFacts("small", 4, "KIND_AUTO", SMALL, SMALL, False, None)


def processor(number: int, core: int, flags: str) -> str:
    lines = {"processor": number, "model name": "A Processor", "physical id": 0, "core id": core, "flags": flags}
    return "".join(f"{name}\t: {value}\n" for name, value in lines.items()) + "\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a machine with two cores of two threads, and 32 GB of which 20 are free."""
    files = {
        "proc/cpuinfo": "".join(processor(number, number // 2, "fpu avx2 avx512_bf16 amx_bf16") for number in range(4)),
        "proc/meminfo": "MemTotal: 31250000 kB\nMemFree: 100 kB\nMemAvailable: 19531250 kB\nHugePages_Total: 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def looked_at(root: Path, said: str | Exception | None = None, torch: Path | None = None) -> Hardware:
    def ask() -> str | None:
        if isinstance(said, Exception):
            raise said
        return said

    return read(root, ask, lambda path: (64 * 2**20, 4 * 2**20, 60 * 2**20), torch or root)


def group(root: Path, **files: str) -> None:
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name.replace("_", ".")).write_text(text)


def test_cores_threads_memory_and_the_flags_that_matter_are_read(root: Path) -> None:
    machine = looked_at(root)
    assert machine.cpu == Cpu("A Processor", 2, 4, ("avx2", "avx512_bf16", "amx_bf16"))
    assert machine.cpu.has_bf16
    assert (machine.memory, machine.available) == (32 * GB, 20 * GB)
    assert (machine.shared_memory, machine.shared_memory_free) == (64 * 2**20, 60 * 2**20)
    assert (machine.gpus, machine.gpu_problem, machine.torch) == ((), "", None)


def test_a_containers_limits_count_and_its_read_files_do_not(root: Path) -> None:
    group(
        root,
        cpu_max="150000 100000\n",
        memory_max="8000000000\n",
        memory_current="5000000000\n",
        memory_stat="anon 1\ninactive_file 3000000000\n",
    )
    machine = looked_at(root)
    assert (machine.cpu.cores, machine.cpu.threads) == (2, 2)
    assert (machine.memory, machine.available) == (8 * GB, 6 * GB)


def test_no_limit_is_no_limit(root: Path) -> None:
    group(root, cpu_max="max 100000\n", memory_max="max\n", memory_current="5000000000\n", memory_stat="")
    assert looked_at(root) == looked_at(root)
    assert (looked_at(root).cpu.threads, looked_at(root).memory) == (4, 32 * GB)


def test_gpus_are_those_of_nvidia_smi() -> None:
    said = "0, NVIDIA A10, 8.6, 23028, 22515, 580.65.06\n1, Tesla T4, 7.5, 15360, [N/A], 580.65.06\n"
    first, second = parse_gpus(said)
    assert first == Gpu(0, "NVIDIA A10", (8, 6), 23028 * 2**20, 22515 * 2**20, "580.65.06")
    assert (first.has_bf16, second.has_bf16, second.free) == (True, False, None)
    assert parse_gpus("0, Old, [N/A], 100, 50, 400.1")[0].capability is None
    with pytest.raises(ValueError, match="No devices"):
        parse_gpus("No devices were found")


@pytest.mark.parametrize(
    "failure",
    [
        OSError("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."),
        subprocess.TimeoutExpired("nvidia-smi", 30),
        'Field "compute_cap" is not a valid field to query.',
    ],
)
def test_a_driver_that_fails_is_a_problem_and_no_crash(root: Path, failure: str | Exception) -> None:
    machine = looked_at(root, failure)
    assert machine.gpus == ()
    assert machine.gpu_problem.startswith("nvidia-smi fails: ")
    assert wrong(machine)["gpu"].advice


def test_a_device_without_nvidia_smi_is_a_problem(root: Path) -> None:
    (root / "dev").mkdir()
    (root / "dev/nvidiactl").write_text("")
    assert "no nvidia-smi" in looked_at(root).gpu_problem


def test_torch_is_read_and_not_imported(tmp_path: Path) -> None:
    assert read_torch(tmp_path) is None
    (tmp_path / "version.py").write_text("__version__ = '2.9.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert read_torch(tmp_path) == Torch("2.9.0+cu130", "13.0")
    (tmp_path / "version.py").write_text("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\n")
    assert read_torch(tmp_path) == Torch("2.9.0+cpu", None)


# What is said


def found(machine: Hardware, *engines: EngineFacts, why: str | None = None, answers: bool = False) -> list[Finding]:
    return list(findings(machine, why, "localhost:8001", answers, engines or (ENGINE,)))


def wrong(machine: Hardware, *engines: EngineFacts, **more: Any) -> dict[str, Finding]:
    faults = {each.name: each for each in found(machine, *engines, **more) if each.state == "wrong"}
    assert all(each.advice for each in faults.values())
    return faults


def test_a_machine_that_has_all_has_no_faults() -> None:
    assert not wrong(MACHINE)
    assert not wrong(dataclasses.replace(MACHINE, gpus=(A10,), torch=Torch("2.15.0", "13.2")))


def test_triton_is_wanted_somewhere() -> None:
    reason = "Triton needs glibc 2.35 or newer"
    assert reason in wrong(MACHINE, why=reason)["triton"].text
    assert not wrong(MACHINE, why=reason, answers=True)


@pytest.mark.parametrize(
    ("driver", "faults"), [("520.1", {"driver", "torch"}), ("550.54.14", {"torch"}), ("580.1", set())]
)
def test_a_driver_must_be_new_enough_for_triton_and_torch(driver: str, faults: set[str]) -> None:
    gpu = dataclasses.replace(A10, driver=driver)
    assert wrong(dataclasses.replace(MACHINE, gpus=(gpu,), torch=Torch("2.15.0", "13.2"))).keys() == faults


def test_a_torch_without_cuda_beside_a_gpu_is_a_fault_and_alone_is_none() -> None:
    machine = dataclasses.replace(MACHINE, torch=Torch("2.15.0+cpu", None))
    assert not wrong(machine)
    assert wrong(dataclasses.replace(machine, gpus=(A10,))).keys() == {"torch"}


def test_an_engine_must_fit_where_its_models_run() -> None:
    large = dataclasses.replace(ENGINE, on_cpu=EngineMemory(60 * GB, 0, 0), on_gpu=EngineMemory(10 * GB, 0, 0))
    with_gpu = dataclasses.replace(MACHINE, gpus=(A10,))
    assert wrong(MACHINE, large).keys() == {"engine small"}
    assert not wrong(with_gpu, large)
    assert wrong(with_gpu, dataclasses.replace(large, kind="KIND_CPU")).keys() == {"engine small"}
    full = dataclasses.replace(A10, index=1, free=GB)
    assert "each GPU" in wrong(dataclasses.replace(MACHINE, gpus=(A10, full)), large)["engine small"].text


def test_a_model_for_gpus_needs_one() -> None:
    assert "KIND_GPU" in wrong(MACHINE, dataclasses.replace(ENGINE, kind="KIND_GPU"))["engine small"].text


def test_engines_that_fit_alone_may_not_fit_together() -> None:
    half = dataclasses.replace(ENGINE, on_cpu=EngineMemory(30 * GB, 0, 0))
    assert not wrong(MACHINE, half)
    assert wrong(MACHINE, half, dataclasses.replace(half, id="other")).keys() == {"engines"}


def test_what_is_served_fits_and_tells_its_step_time() -> None:
    served = dataclasses.replace(ENGINE, on_cpu=EngineMemory(90 * GB, 0, 0), is_served=True, step_seconds=0.0123)
    tight = dataclasses.replace(MACHINE, shared_memory_free=0)
    assert not wrong(tight, served, answers=True)
    assert "12.3 ms" in {each.name: each for each in found(tight, served)}["engine small"].text


def test_dockers_little_shared_memory_is_a_fault() -> None:
    tight = dataclasses.replace(MACHINE, shared_memory=64 * 2**20, shared_memory_free=20 * 2**20)
    assert "--shm-size" in wrong(tight)["shared memory"].advice


def test_no_engine_is_a_fault() -> None:
    assert [each.name for each in findings(MACHINE, None, "", False, ()) if each.state == "wrong"] == ["engines"]


def test_the_kind_is_the_instance_groups() -> None:
    assert kind_of("instance_group [ { kind: KIND_GPU } ]") == "KIND_GPU"
    assert kind_of("instance_group [ { count: 2 kind: KIND_CPU } ]") == "KIND_CPU"
    assert kind_of("instance_group [ { kind: KIND_AUTO } ]") == kind_of("# KIND_GPU\n") == "KIND_AUTO"


def test_weights_are_counted_once_for_each_model_that_reads_them(settings: ServeSettings) -> None:
    folder = settings.model_repository / "engines/tiny-landscape"
    engine = load_engine(folder)
    bare = engine.model_copy(update={"optional_roles": ()})
    # In float32; the files are in fp16.
    size = {part: 2 * next((folder / part).glob("*.safetensors")).stat().st_size for part in ("unet", "vae")}
    gradient = engine.model_copy(update={"optional_roles": ("unet_gradient",)})
    more = engine_memory(folder, gradient, on_gpu=False).weights - engine_memory(folder, bare, on_gpu=False).weights
    assert 0.98 * size["unet"] < more < size["unet"]
    both = engine.model_copy(update={"optional_roles": ("vae_encoder",)})
    encoder = engine_memory(folder, both, on_gpu=False).weights - engine_memory(folder, bare, on_gpu=False).weights
    assert 0 < encoder < size["vae"]
    # Gradients are computed in float32 on a GPU, too; the UNet is not.
    on_gpu = [engine_memory(folder, each, on_gpu=True).weights for each in (bare, gradient)]
    assert on_gpu[1] - on_gpu[0] == more
    in_float32 = engine_memory(folder, bare, on_gpu=False).weights
    assert on_gpu[0] == engine_memory(folder, bare, on_gpu=False, in_bf16=True).weights < in_float32


# The command


def doctor(capsys: pytest.CaptureFixture[str], *flags: str, hardware: Hardware | None = None) -> tuple[int, str]:
    status = doctor_command.main(["--triton-url", "127.0.0.1:1", *flags], hardware)
    return status, capsys.readouterr().out


def test_the_status_says_whether_anything_is_wrong(capsys: pytest.CaptureFixture[str], settings: ServeSettings) -> None:
    if why_not() is not None:
        pytest.skip("Triton's wheel does not run here")
    repository = "--model-repository", str(settings.model_repository)
    status, text = doctor(capsys, *repository, "--json", hardware=MACHINE)
    report = json.loads(text)
    assert (status, report["ok"]) == (0, True)
    assert report["hardware"]["cpu"]["cores"] == 8
    assert [engine["id"] for engine in report["engines"]] == ["tiny-landscape"]
    faulty = dataclasses.replace(MACHINE, gpu_problem="nvidia-smi fails: [no] driver")
    status, text = doctor(capsys, *repository, hardware=faulty)
    assert status == 1
    assert "nvidia-smi fails: [no] driver" in text
    assert "container toolkit" in " ".join(text.split())


async def test_a_triton_that_answers_tells_how_long_a_step_takes(
    capsys: pytest.CaptureFixture[str], triton_settings: ServeSettings
) -> None:
    flags = ["--triton-url", triton_settings.triton_url, "--model-repository", str(triton_settings.model_repository)]
    assert await asyncio.to_thread(doctor_command.main, [*flags, "--json"], MACHINE) == 0
    [engine] = json.loads(capsys.readouterr().out)["engines"]
    assert engine["is_served"]
    assert 0 < engine["step_seconds"] < 60


def test_this_machine_is_looked_at(capsys: pytest.CaptureFixture[str], settings: ServeSettings) -> None:
    _, text = doctor(capsys, "--model-repository", str(settings.model_repository), "--json")
    hardware = json.loads(text)["hardware"]
    assert hardware["cpu"]["cores"] >= 1
    assert hardware["memory"] > hardware["available"] > 0


def test_damage_is_said_without_a_traceback(
    capsys: pytest.CaptureFixture[str], settings: ServeSettings, tmp_path: Path
) -> None:
    shutil.copytree(
        settings.model_repository / "engines", tmp_path / "engines", ignore=shutil.ignore_patterns("openvino")
    )
    (tmp_path / "engines/tiny-landscape/engine.json").write_text("{")
    status, text = doctor(capsys, "--model-repository", str(tmp_path), "--json", hardware=MACHINE)
    assert status == 1
    assert "engine.json" in text
