"""What the models' processes leave out when they import diffusers and open_clip, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMPILED = "import torch\nassert torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(1)).item() == 2"
START = """
import sys
from sdmodels.light_imports import leave_out_unused
leave_out_unused(compiled={compiled})
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from open_clip import CLIP
unused = ("transformers", "timm", "peft", "accelerate", "torch._dynamo.eval_frame")
print(*(name for name in unused if sys.modules.get(name)))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_the_libraries_come_without_what_no_model_needs() -> None:
    assert python(START.format(compiled=False)) == ""


def test_the_compiler_is_there_from_the_beginning_where_models_are_compiled() -> None:
    assert python(START.format(compiled=True) + COMPILED) == "torch._dynamo.eval_frame"


@pytest.mark.parametrize(
    "wanted",
    [
        COMPILED,
        "from torch._dynamo import config\nassert config.verbose is False",
        "from torch._dynamo.utils import counters\nassert counters == {}",
        "from torch._dynamo.eval_frame import innermost_fn",
    ],
)
def test_the_compiler_is_imported_when_more_of_it_is_wanted(wanted: str) -> None:
    real = """
import importlib, sys, torch, torch._dynamo
for name in ("torch._dynamo", "torch._dynamo.utils", "torch._dynamo.config", "torch._dynamo.eval_frame"):
    module = sys.modules[name]
    assert module is importlib.import_module(name), name
    assert module.__spec__.origin == module.__file__, name
assert sys.modules["torch._dynamo"] is torch._dynamo
assert torch._dynamo.eval_frame.innermost_fn
"""
    python("from sdmodels.light_imports import leave_out_unused\nleave_out_unused(compiled=False)\n" + wanted + real)


def test_the_compiler_that_is_there_already_stays() -> None:
    python(f"import torch._dynamo\n{START.format(compiled=False)}\nassert torch._dynamo.eval_frame.innermost_fn")
