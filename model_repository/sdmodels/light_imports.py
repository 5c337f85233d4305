"""Leaves out what diffusers, open_clip and torchvision import and no model here needs.

It is more than half of the time that their imports take, and a third of the memory.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The libraries do without these where they are not installed. None marks for Python what is not to be found.
OPTIONAL = ("transformers", "timm", "peft", "accelerate")
COMPILER = "torch._dynamo"


def leave_out_unused(*, compiled: bool) -> None:
    """To be called in a process before torch and its libraries are imported.

    On import the libraries ask torch's compiler only how to treat a function of theirs, should it be compiled. It is
    imported when somebody asks it for more, and does not learn of the earlier questions: `compiled` processes have it
    from the beginning.
    """
    for name in OPTIONAL:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if not compiled and COMPILER not in sys.modules:
        for name, served in ((COMPILER, (allow_in_graph, disable)), (f"{COMPILER}.utils", (is_compile_supported,))):
            sys.modules[name] = _StandIn(name, served)
        sys.meta_path.insert(0, _Submodules())


def allow_in_graph(function: Any) -> Any:
    return function


def disable(function: Any = None, *_: Any, **__: Any) -> Any:
    return allow_in_graph if function is None else function


def is_compile_supported(_device: str) -> bool:
    return False


class _StandIn(ModuleType):
    """Serves `functions`; for anything else, the module that it stands for is imported in its place."""

    def __init__(self, name: str, functions: Sequence[Callable[..., Any]]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update((each.__name__, each) for each in functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Submodules(MetaPathFinder):
    """Finds the modules below a stand-in: the real ones, beside the real parent."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if name.startswith(f"{COMPILER}.") and isinstance(sys.modules.get(COMPILER), _StandIn):
            return ModuleSpec(name, _Loaded(_real(name)))
        return None


class _Loaded(Loader):
    """A loader of what is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._spec = self._module.__spec__
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _real(name: str) -> ModuleType:
    for module in [each for each, stands in sys.modules.items() if isinstance(stands, _StandIn)]:
        del sys.modules[module]
    return importlib.import_module(name)
