"""The procedural world: what a scene is, and how scenes are drawn at random.

A `Scene` says everything that a caption may name; `layout` seeds where things stand. Two scenes that differ in one
attribute alone share their layout, so that a pair shows the models exactly what one word changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

NATIVE = 128
"""Native image size, in pixels; the length that object sizes are measured against."""

FORMATS: tuple[tuple[int, int], ...] = (
    (128, 128),
    (192, 128),
    (256, 128),
    (384, 128),
    (96, 192),
    (128, 192),
    (128, 256),
)
"""Every (width, height) in training, native first."""

COLOURS = ("red", "blue", "yellow", "white")

VALUES: dict[str, tuple[str, ...]] = {
    "time": ("day", "sunset", "night"),
    "sky": ("clear", "cloudy", "overcast"),
    "orb": ("no", "yes"),
    "stars": ("no", "yes"),
    "ground": ("meadow", "sea", "desert", "snow"),
    "mountains": ("none", "rocky", "snowy"),
    "lake": ("no", "yes"),
    "trees": ("none", "round", "pine", "palm", "autumn"),
    "tree_count": ("none", "one", "few", "forest"),
    "house": ("none", *COLOURS),
    "boat": ("none", *COLOURS),
}
"""Every attribute that a caption may name, with its values; the order is the order of the classifier's heads."""

_TREES_ON: dict[str, tuple[str, ...]] = {
    "meadow": ("round", "round", "pine", "autumn", "palm"),
    "sea": ("palm",),
    "desert": ("palm",),
    "snow": ("pine",),
}


@dataclass(frozen=True)
class Scene:
    """One scene. `width`, `height` in pixels (multiples of 8); the other fields hold one of `VALUES[field]` each."""

    layout: int
    width: int
    height: int
    time: str = "day"
    sky: str = "clear"
    orb: str = "no"
    stars: str = "no"
    ground: str = "meadow"
    mountains: str = "none"
    lake: str = "no"
    trees: str = "none"
    tree_count: str = "none"
    house: str = "none"
    boat: str = "none"

    def __post_init__(self) -> None:
        for name, values in VALUES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(values)}")

    def attributes(self) -> dict[str, str]:
        """Attribute -> value, in the order of `VALUES`."""
        return {name: getattr(self, name) for name in VALUES}

    def codes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[len(VALUES)] index of each attribute's value in `VALUES`."""
        return np.array([values.index(getattr(self, name)) for name, values in VALUES.items()], np.uint8)

    @classmethod
    def from_codes(cls, layout: int, width: int, height: int, codes: np.ndarray[Any, Any]) -> Scene:
        """The scene whose `codes()` are these."""
        named = {name: values[int(code)] for (name, values), code in zip(VALUES.items(), codes, strict=True)}
        return cls(layout, width, height, **named)


def consistent(scene: Scene) -> Scene:
    """The nearest scene that can be painted: no moon behind overcast, no boat without water, no house in the sea."""
    changes: dict[str, str] = {}
    if scene.sky == "overcast":
        changes |= {"orb": "no", "stars": "no"}
    if scene.time != "night":
        changes |= {"stars": "no"}
    if scene.ground == "sea":
        changes |= {"lake": "no", "house": "none"}
    elif scene.lake == "no":
        changes |= {"boat": "none"}
    if scene.trees == "none" or scene.tree_count == "none":
        changes |= {"trees": "none", "tree_count": "none"}
    elif scene.trees not in _TREES_ON[scene.ground]:
        changes |= {"trees": _TREES_ON[scene.ground][0]}
    trees = changes.get("trees", scene.trees)
    if trees == "palm" and scene.tree_count == "forest":
        changes |= {"tree_count": "few"}
    return replace(scene, **changes)  # type: ignore[arg-type]  # the keys are attribute names, all of them str


def _pick(rng: np.random.Generator, values: tuple[str, ...], weights: tuple[float, ...]) -> str:
    return values[int(rng.choice(len(values), p=np.array(weights) / sum(weights)))]


def random_scene(seed: int, size: tuple[int, int] = FORMATS[0]) -> Scene:
    """The scene of this seed. About two in five show one single object (a house, a boat or a tree) and little else."""
    rng = np.random.default_rng([seed, 7])
    kind = _pick(rng, ("house", "boat", "tree", "open", "full"), (0.16, 0.16, 0.08, 0.12, 0.48))
    time = _pick(rng, VALUES["time"], (0.44, 0.28, 0.28))
    plain = Scene(
        layout=seed,
        width=size[0],
        height=size[1],
        time=time,
        sky=_pick(rng, VALUES["sky"], (0.55, 0.3, 0.15)),
        orb="yes" if rng.random() < 0.45 else "no",
        stars="yes" if rng.random() < 0.5 else "no",
        ground=_pick(rng, VALUES["ground"], (0.4, 0.25, 0.17, 0.18)),
    )
    colour = _pick(rng, COLOURS, (1, 1, 1, 1))
    if kind == "house":
        land = _pick(rng, ("meadow", "desert", "snow"), (0.55, 0.2, 0.25))
        return consistent(replace(plain, house=colour, ground=land))
    if kind == "boat":
        lake = rng.random() < 0.25
        land = _pick(rng, ("meadow", "desert", "snow"), (0.6, 0.15, 0.25))
        return consistent(replace(plain, boat=colour, ground=land if lake else "sea", lake="yes" if lake else "no"))
    if kind == "open":
        return consistent(plain)
    tree = _TREES_ON[plain.ground][int(rng.integers(len(_TREES_ON[plain.ground])))]
    if kind == "tree":
        return consistent(replace(plain, trees=tree, tree_count="one"))
    count = _pick(rng, VALUES["tree_count"], (0.4, 0.1, 0.2, 0.3))
    return consistent(
        replace(
            plain,
            mountains=_pick(rng, VALUES["mountains"], (0.45, 0.27, 0.28)),
            lake="yes" if rng.random() < 0.35 else "no",
            trees=tree,
            tree_count=count,
            house=colour if count != "forest" and rng.random() < 0.3 else "none",
            boat=_pick(rng, COLOURS, (1, 1, 1, 1)) if rng.random() < 0.35 else "none",
        )
    )


def random_variant(scene: Scene, seed: int) -> Scene:
    """The same layout with one attribute changed: the hard negative of contrastive training.

    Colours are changed first where there are any, since they are what text towers bind worst.
    """
    rng = np.random.default_rng([seed, 11])
    names = [name for name in VALUES if name not in ("orb", "stars", "sky")]
    weights = np.array([6.0 if name in ("house", "boat") and getattr(scene, name) != "none" else 1.0 for name in names])
    for _ in range(32):
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        others = [value for value in VALUES[name] if value not in (getattr(scene, name), "none")]
        changed: dict[str, str] = {name: others[int(rng.integers(len(others)))]} if others else {}
        if name == "trees" and scene.tree_count == "none":
            changed["tree_count"] = "one"
        if name == "tree_count" and scene.trees == "none":
            changed["trees"] = _TREES_ON[scene.ground][0]
        if name == "lake":
            changed = {"lake": "no" if scene.lake == "yes" else "yes"}
        variant = consistent(replace(scene, **changed))  # type: ignore[arg-type]  # attribute names, all of them str
        if variant != scene:
            return variant
    return replace(scene, time="night" if scene.time == "day" else "day", stars="no")
