"""What the server tells those who watch it: `metrics` counts, `traces` follows a request. Depends on neither."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Stage = Literal["queue", "encode", "denoise", "decode", "write"]
"""Parts of a generation: waiting for its place, prompts to text states, steps, latents to pixels, pixels to a file."""

StepModel = Literal[
    "unet",
    "unet_with_features",
    "unet_from_features",
    "unet_lora",
    "vae_decoder",
    "vae_encoder",
    "clip_guidance",
    "unet_gradient",
    "depth_estimator",
]
"""Models that generations ask, each through a step scheduler of its own. The second and third are the two modes of
`unet_cache`."""

UNET_MODELS: tuple[StepModel, ...] = ("unet", "unet_with_features", "unet_from_features", "unet_lora")
"""Those that compute UNet rows."""

ANONYMOUS = "anonymous"
"""The tenant of everybody where there are no API keys."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of the service. What is not known at its beginning is filled in as it comes to be known."""

    method: str
    """Full name, such as `/sdapi.v1.GenerationService/Generate`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Headers that say of which trace it is a part."""
    tenant: str = ANONYMOUS
    request_id: str = ""
    engine: str = ""
    """The id of an engine that there is; empty where the call failed before it was known."""
    outcome: str = "ok"
    """ok, cancelled, or the name of the gRPC status in lower case."""
    reason: str = ""
    """The `reason` of the RequestError that ended it."""
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """What is worth knowing of the request."""


@dataclass(slots=True, eq=False)
class Work:
    """A generation that has its place."""

    started: float = field(default_factory=time.monotonic)
    in_a_call: bool = False
    """Whether a UNet call has taken a row of it."""


CURRENT_CALL: ContextVar[Call] = ContextVar("current call")
CURRENT_WORK: ContextVar[Work | None] = ContextVar("current work", default=None)


class StepObserver:
    """Hears of the calls of one step scheduler. This one does nothing with it."""

    def asked(self) -> object:
        """Somebody asks for rows: called in their context. `calling` is given what it returns."""
        return None

    def calling(self, asked: Sequence[object]) -> AbstractContextManager[None]:
        """A call of the model that takes rows of those, from its beginning to its end."""
        return nullcontext()

    def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
        """A call has taken `rows` of at most `bound`; for `useful` of them somebody still waited when it ended.

        `padded` rows more were computed for nobody.
        """


class Observer:
    """Hears of everything. This one does nothing with it. No method may raise or wait."""

    def call(self, call: Call) -> AbstractContextManager[None]:
        """A call of the service, from its beginning to its end."""
        return nullcontext()

    def stage(self, engine: str, stage: Stage, image: int | None = None) -> AbstractContextManager[None]:
        """A stage of a generation: of one of its images, or of all of it."""
        return nullcontext()

    def model(self, engine: str, model: str, rows: int) -> AbstractContextManager[None]:
        """A call of one of an engine's models."""
        return nullcontext()

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        """Who hears of the calls of a step scheduler."""
        return StepObserver()

    def admitted(self, seconds: float) -> None:
        """A generation starts that has waited so long for its place."""

    def text_asked(self, known: bool) -> None:
        """A text was asked for, and its states were known or have to be computed."""

    def image_done(self, engine: str, width: int, height: int) -> None:
        """An image was generated; its size in pixels."""

    def spent(self, tenant: str, pixel_steps: int) -> None:
        """A generation has ended, in whatever way, and so much was computed for it."""

    def close(self) -> None:
        """There is nothing more to hear. This one may wait."""


def together(observers: Sequence[Observer]) -> Observer:
    """One for any number of them."""
    match observers:
        case []:
            return Observer()
        case [only]:
            return only
    return _Observers(observers)


class _Observers(Observer):
    """Tells several, in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def call(self, call: Call) -> AbstractContextManager[None]:
        return _all(observer.call(call) for observer in self._observers)

    def stage(self, engine: str, stage: Stage, image: int | None = None) -> AbstractContextManager[None]:
        return _all(observer.stage(engine, stage, image) for observer in self._observers)

    def model(self, engine: str, model: str, rows: int) -> AbstractContextManager[None]:
        return _all(observer.model(engine, model, rows) for observer in self._observers)

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        return _StepObservers([observer.steps(engine, model) for observer in self._observers])

    def admitted(self, seconds: float) -> None:
        for observer in self._observers:
            observer.admitted(seconds)

    def text_asked(self, known: bool) -> None:
        for observer in self._observers:
            observer.text_asked(known)

    def image_done(self, engine: str, width: int, height: int) -> None:
        for observer in self._observers:
            observer.image_done(engine, width, height)

    def spent(self, tenant: str, pixel_steps: int) -> None:
        for observer in self._observers:
            observer.spent(tenant, pixel_steps)

    def close(self) -> None:
        for observer in self._observers:
            observer.close()


class _StepObservers(StepObserver):
    """Tells several, in their order."""

    def __init__(self, observers: Sequence[StepObserver]) -> None:
        self._observers = tuple(observers)

    def asked(self) -> tuple[object, ...]:
        return tuple(observer.asked() for observer in self._observers)

    def calling(self, asked: Sequence[object]) -> AbstractContextManager[None]:
        each = zip(*(answers for answers in asked if isinstance(answers, tuple)), strict=True)
        return _all(observer.calling(answers) for observer, answers in zip(self._observers, each, strict=True))

    def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
        for observer in self._observers:
            observer.called(rows, useful, bound, seconds, padded)


@contextmanager
def _all(managers: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield
