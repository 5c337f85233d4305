"""LoRA files of kohya's scripts, diffusers and PEFT become one form; what is none, or another engine's, is refused."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from checkpoints import Model
from loras import Form, Lora
from safetensors.torch import load_file, save_file
from sdmodels.conversion.convert import Options, convert
from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.lora import LoraOptions, add_lora
from sdserver import lora_command
from sdserver.engine_command import main as engine_command
from sdserver.engine_store import EngineStore
from sdserver.engines import load_engine
from sdserver.lora_store import GRACE_SECONDS, LoraStore, lora_name_of
from sdserver.triton_models import Placement

if TYPE_CHECKING:
    from pathlib import Path

FORMS: tuple[Form, ...] = get_args(Form)
MODELS = {"1.x": Model("1", "epsilon"), "2.x": Model("2", "v_prediction")}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of both families, named like them."""
    repository = tmp_path_factory.mktemp("repository")
    store = EngineStore(repository)
    for name, model in MODELS.items():
        source = model.save_original(repository / f"v2-1_768-{name}.safetensors")
        engine = name.replace(".", "-")
        facts = convert(Options(str(source), str(store.folder(engine)), dtype="fp16"), lambda _: None)
        store.complete(engine, "", "", facts, Placement("cpu", "bf16", "openvino", "2,4", threads=1))
    return repository


def engine_of(repository: Path, name: str) -> Path:
    return repository / "engines" / name.replace(".", "-")


def added(engine: Path, file: Path) -> dict[str, Any]:
    return add_lora(LoraOptions(str(file), str(engine)))


@pytest.mark.parametrize("name", MODELS)
def test_all_forms_of_a_lora_are_one(repository: Path, tmp_path: Path, name: str) -> None:
    lora = Lora(MODELS[name], 1, text=True)
    made = {
        form: added(engine_of(repository, name), lora.save(tmp_path / form / "x.safetensors", form)) for form in FORMS
    }
    assert len({facts["sha256"] for facts in made.values()}) == 1
    counts = {(facts["unet_modules"], facts["text_encoder_modules"], facts["rank"]) for facts in made.values()}
    assert counts == {(128, 18, 4)}


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_and_alpha_are_the_same_in_the_forms_that_have_them(
    repository: Path, tmp_path: Path, name: str
) -> None:
    lora = Lora(MODELS[name], 2, alpha=2.0, text=True, convolutions=True)
    forms: list[Form] = ["kohya", "kohya-original", "peft", "peft-adapter"]
    made = {
        form: added(engine_of(repository, name), lora.save(tmp_path / form / "x.safetensors", form)) for form in forms
    }
    assert len({facts["sha256"] for facts in made.values()}) == 1
    tensors = load_file(engine_of(repository, name) / f"loras/{made['peft']['sha256']}.safetensors")
    assert {float(value) for key, value in tensors.items() if key.endswith(".scale")} == {0.5}
    assert tensors["unet.conv_in.down"].shape == (4, 4, 3, 3)
    # Every linear layer and every convolution of the UNet, and all of the text encoder.
    assert sum(key.endswith(".down") for key in tensors) == len(lora.changes)


def test_peft_says_alpha_for_parts_by_patterns_and_ranks_that_are_stable(repository: Path, tmp_path: Path) -> None:
    lora = Lora(MODELS["2.x"], 3)
    tensors = load_file(lora.save(tmp_path / "x.safetensors", "peft"))
    said = {"unet.lora_alpha": 8, "unet.use_rslora": True, "unet.alpha_pattern": {"mid_block.*to_q": 2.0}}
    save_file(tensors, tmp_path / "y.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    engine = engine_of(repository, "2.x")
    made = load_file(engine / f"loras/{added(engine, tmp_path / 'y.safetensors')['sha256']}.safetensors")
    scales = {key: float(value) for key, value in made.items() if key.endswith(".scale")}
    assert {scale for key, scale in scales.items() if re.search(r"mid_block.*to_q\.scale", key)} == {1.0}
    assert {scale for key, scale in scales.items() if not re.search(r"mid_block.*to_q\.scale", key)} == {4.0}


def test_a_linear_layer_may_be_written_as_a_1x1_convolution_and_the_other_way_round(
    repository: Path, tmp_path: Path
) -> None:
    for name in MODELS:
        lora = Lora(MODELS[name], 4, convolutions=True)
        path = lora.save(tmp_path / "x.safetensors")
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if "proj_in.lora" in key:
                tensors[key] = tensor[:, :, 0, 0].contiguous() if tensor.ndim == 4 else tensor[:, :, None, None]
        save_file(tensors, tmp_path / "y.safetensors")
        engine = engine_of(repository, name)
        assert added(engine, path)["sha256"] == added(engine, tmp_path / "y.safetensors")["sha256"]


def refusal(engine: Path, path: Path) -> ConversionError:
    before = sorted(engine.rglob("*"))
    with pytest.raises(ConversionError) as failure:
        added(engine, path)
    assert sorted(engine.rglob("*")) == before
    return failure.value


def test_a_lora_of_another_engine_is_refused_module_by_module(repository: Path, tmp_path: Path) -> None:
    path = Lora(MODELS["1.x"], 1, text=True).save(tmp_path / "x.safetensors", header={"ss_base_model_version": "sd_v1"})
    refused = refusal(engine_of(repository, "2.x"), path)
    assert refused.message == "x.safetensors is no LoRA for this engine, and says that it was made for sd_v1"
    assert refused.problems[0] == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k: down is [4, 32] and must be [4, 64]"
    )
    assert re.fullmatch(r"\.\.\. and \d+ more like it", refused.problems[-1])


NAN = torch.full((4, 128), float("nan"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"lora_unet_nowhere.lora_down.weight": torch.zeros(1)},
            r"lora_unet_nowhere.lora_down.weight \[1\] belongs to no",
        ),
        ({"surprise": torch.zeros(1)}, r"surprise \[1\] belongs to no module"),
        ({"lora_unet_mid_block.hada_w1_a": torch.zeros(1)}, "it is LoHa: only LoRA"),
        ({"lora_te1_text_model.lora_up.weight": torch.zeros(1)}, "it is Stable Diffusion XL"),
        ({"KEY.dora_scale": torch.zeros(1)}, "it is DoRA"),
        ({"KEY.lora_mid.weight": torch.zeros(1)}, "it is LoCon in Tucker's form"),
        ({"KEY.lora_up.weight": None}, "KEY: its up is missing"),
        ({"KEY.lora_up.weight": torch.zeros(128, 3)}, r"KEY: up is \[128, 3\] and must be \[128, 4\]"),
        ({"KEY.lora_down.weight": torch.zeros(0, 128), "KEY.lora_up.weight": torch.zeros(128, 0)}, "KEY: has rank 0"),
        ({"KEY.alpha": torch.zeros(2)}, r"KEY: alpha is \[2\] and must be one number"),
        ({"KEY.alpha": torch.tensor(float("inf"))}, "KEY: alpha is inf"),
        ({"KEY.lora_down.weight": NAN}, "KEY.lora_down.weight has values that are no numbers"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(1)}, "its up is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    repository: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], problem: str
) -> None:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors: dict[str, Any] = load_file(Lora(MODELS["2.x"], 1).save(tmp_path / "x.safetensors"))
    tensors |= {name.replace("KEY", key): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "x.safetensors")
    refused = refusal(engine_of(repository, "2.x"), tmp_path / "x.safetensors")
    assert re.search(problem.replace("KEY", key), "\n".join([refused.message, *refused.problems]))


def test_only_safetensors_are_read(repository: Path, tmp_path: Path) -> None:
    engine = engine_of(repository, "2.x")
    torch.save({"lora": torch.zeros(1)}, tmp_path / "x.pt")
    assert "can run code when they are loaded" in refusal(engine, tmp_path / "x.pt").message
    assert "does not exist" in refusal(engine, tmp_path / "x.safetensors").message
    (tmp_path / "x.safetensors").write_bytes(b"no safetensors")
    assert "is damaged or no safetensors file" in refusal(engine, tmp_path / "x.safetensors").message
    save_file({}, tmp_path / "x.safetensors")
    assert "holds no tensors" in refusal(engine, tmp_path / "x.safetensors").message


def test_an_adapter_of_peft_without_its_configuration_is_refused(repository: Path, tmp_path: Path) -> None:
    path = Lora(MODELS["2.x"], 1).save(tmp_path / "x.safetensors", "peft-adapter")
    (tmp_path / "adapter_config.json").unlink()
    assert (
        "put its adapter_config.json, which says alpha, beside it"
        in refusal(engine_of(repository, "2.x"), path).message
    )


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            {
                "modelspec.title": "Ink\nand wash",
                "modelspec.description": "Draws\x1b[31m",
                "modelspec.trigger_phrase": "ink style, wash",
                "modelspec.license": "MIT",
            },
            {
                "title": "Ink and wash",
                "description": "Draws [31m",
                "trigger_words": ["ink style", "wash"],
                "license": "MIT",
            },
        ),
        (
            {
                "ss_output_name": "ink_v2",
                "ss_tag_frequency": json.dumps({"4_a": {"inkstyle": 20, "tree": 3}, "1_b": {"inkstyle": 5, "hut": 5}}),
            },
            {"title": "ink_v2", "description": "", "trigger_words": ["inkstyle", "hut"], "license": ""},
        ),
        ({"ss_tag_frequency": "[1]"}, {"title": "", "description": "", "trigger_words": [], "license": ""}),
    ],
)
def test_what_the_file_says_of_itself_is_kept(
    repository: Path, tmp_path: Path, header: dict[str, Any], said: dict[str, Any]
) -> None:
    path = Lora(MODELS["2.x"], 1).save(tmp_path / "x.safetensors", header=header)
    facts = added(engine_of(repository, "2.x"), path)
    assert {name: facts[name] for name in said} == said


# The commands


def run(repository: Path, *arguments: str) -> int:
    return lora_command.main([arguments[0], "--model-repository", str(repository), *arguments[1:]])


def test_the_commands_add_list_and_remove(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of(repository, "2.x")
    digest = load_engine(engine).digest
    path = Lora(MODELS["2.x"], 7, text=True).save(tmp_path / "Ink & Wash_v2.safetensors")
    assert run(repository, "add", "2-x", str(path), "--license", "mit", "--trigger-words", "ink, wash") == 0
    assert capsys.readouterr().out == (
        "Ink-Wash_v2: 128 layers of the UNet and 18 layers of the text encoder, rank 4\n"
        "  trigger words: ink, wash\n  licence: MIT\n"
    )
    model = (repository / "2-x.unet_lora/config.pbtxt").read_text()
    assert '"lora_digest" data_type: TYPE_UINT8 dims: [ 8, 32 ]' in model
    # Where the UNet runs, but always by torch.
    assert "KIND_CPU" in model
    assert dict(re.findall(r'key: "(\w+)" value: { string_value: "([^"]*)"', model)) == {
        "engine": "engines/2-x",
        "precision": "bf16",
        "row_buckets": "2,4",
        "threads": "1",
    }
    assert load_engine(engine).digest == digest
    assert load_engine(engine).roles[-1] == "unet_lora"

    # Another file under its name is refused, and a damaged one is repaired.
    other = Lora(MODELS["2.x"], 8).save(tmp_path / "other.safetensors")
    assert run(repository, "add", "2-x", str(other), "--name", "Ink-Wash_v2") == 1
    assert "Ink-Wash_v2 is another LoRA already" in capsys.readouterr().err
    [lora] = load_engine(engine).loras
    (engine / lora.file).write_bytes(b"")
    assert engine_command(["verify", "--model-repository", str(repository), "2-x"]) == 1
    assert f"{lora.file} is not what it was" in capsys.readouterr().out
    assert run(repository, "add", "2-x", str(path)) == 0
    assert engine_command(["verify", "--model-repository", str(repository), "2-x"]) == 0

    capsys.readouterr()
    assert run(repository, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["1-x"], [each["name"] for each in listed["2-x"]]) == ([], ["Ink-Wash_v2"])
    assert run(repository, "list") == 0
    assert "Ink-Wash_v2" in capsys.readouterr().out
    assert run(repository, "remove", "2-x", "ink") == 1
    assert "2-x, which has Ink-Wash_v2" in capsys.readouterr().err
    assert run(repository, "remove", "2-x", "Ink-Wash_v2") == 0
    assert not load_engine(engine).loras
    assert not (repository / "2-x.unet_lora").exists()
    assert run(repository, "add", "no-such", str(path)) == 1
    assert "there is no engine 'no-such'" in capsys.readouterr().err
    assert run(repository, "add", "2-x", str(path), "--name", "../x") == 1


def test_tensors_outlive_their_lora_for_the_requests_that_still_use_it(repository: Path, tmp_path: Path) -> None:
    engine = engine_of(repository, "1.x")
    store = LoraStore(repository, "1-x")
    for number in (1, 2):
        path = Lora(MODELS["1.x"], number).save(tmp_path / "x.safetensors")
        store.complete(f"{number}", added(engine, path))
    one, two = (engine / lora.file for lora in load_engine(engine).loras)
    # However old it is.
    os.utime(one, (0, 0))
    store.remove("1")
    assert one.is_file()
    os.utime(one, (one.stat().st_mtime - GRACE_SECONDS - 1,) * 2)
    store.remove("2")
    assert not one.exists()
    assert two.is_file()


def test_adding_the_engine_again_keeps_its_loras(repository: Path, tmp_path: Path) -> None:
    path = Lora(MODELS["1.x"], 5).save(tmp_path / "x.safetensors")
    LoraStore(repository, "1-x").complete("kept", added(engine_of(repository, "1.x"), path))
    source = repository / "v2-1_768-1.x.safetensors"
    command = ["add", "--model-repository", str(repository), str(source), "--name", "1-x", "--device", "gpu"]
    assert engine_command(command) == 0
    assert [lora.name for lora in load_engine(engine_of(repository, "1.x")).loras] == ["kept"]
    assert "KIND_GPU" in (repository / "1-x.unet_lora/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("file", "name"), [("/x/Add Detail_v2.safetensors", "Add-Detail_v2"), (".hidden", "hidden"), ("é.safetensors", "")]
)
def test_a_name_comes_from_the_file(file: str, name: str) -> None:
    assert lora_name_of(file) == name
