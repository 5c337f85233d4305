"""A safety model as data: a folder below `<model repository>/safety/` with a descriptor, `safety.json`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from pathlib import Path


class SafetyError(Exception):
    """The safety model cannot be used; says which file or setting is wrong and why."""


class SafetyClass(BaseModel):
    """What the model has a score for, and the score from which the check acts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    threshold: Annotated[float, Field(gt=0, le=1)]


class SafetyModel(BaseModel):
    """One safety model, as its `safety.json` describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    description: str = ""
    # Width and height, in pixels, of what the model looks at.
    image_size: Annotated[int, Field(ge=16, le=1024)]
    # In the order of the model's scores.
    classes: Annotated[tuple[SafetyClass, ...], Field(min_length=1, max_length=64)]
    # For `sdmodels.safety` alone; another model behind the same interface needs none.
    clip_classifier: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SafetyModel:
        if len({each.label for each in self.classes}) < len(self.classes):
            raise ValueError("two classes have the same label; give each its own")
        return self

    @property
    def model(self) -> str:
        """Name of its Triton model, such as `nsfw.safety`."""
        return f"{self.id}.safety"


def load_safety_model(model_repository: Path, name: str) -> SafetyModel:
    """Reads and checks `<model repository>/safety/<name>/safety.json`. Raises SafetyError."""
    path = model_repository / "safety" / name / "safety.json"
    try:
        model = SafetyModel.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise SafetyError(
            f"cannot read {path}: {error.strerror}; safety_model must be the name of a folder that has one"
        ) from error
    except ValueError as error:
        raise SafetyError(f"{path} is not a valid safety descriptor: {error}") from error
    if model.id != name:
        raise SafetyError(f"{path} names its model {model.id!r}, but its folder is {name!r}; make them equal")
    return model
