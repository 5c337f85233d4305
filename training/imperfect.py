"""Captions as imperfect as real ones, for the UNet's last stage: what makes negative prompts work.

Guidance goes from what the negative prompt shows towards what the prompt shows. Were every caption true, "a forest"
and "trees" would show the same pictures, and between them there would be nowhere to go. So some captions claim a thing
that is not in the picture, as captions found in the wild do: the denoiser comes to believe that "a dense forest" may
show no tree at all, while a bare list of tags ("trees, forest, greenery") is always true. A negative prompt then moves
to the pictures that the prompt allows and the tags do not.

The first steps of a generation decide what stands in the picture. They have to see next to nothing in the noise, or
its chance likeness to one thing or another decides instead: hence the noise schedule of `training/unet.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from training.captions import Caption, caption
from training.world import COLOURS, consistent

if TYPE_CHECKING:
    import numpy as np

    from training.dataset import Scenes
    from training.world import Scene

TAGS_SHARE = 0.08
"""Share of captions that are bare lists of tags."""

CLAIMED = {"forest": 0.06, "trees": 0.08, "house": 0.03, "boat": 0.07, "mountains": 0.02}
"""How often a scene that could have the thing, and has not, is said to have it."""

UNTRUE_SHARES = ((0.0, 0.35), (0.32, 0.2), (0.43, 0.13), (0.77, 0.09))
"""From which part of the stage on which share of the captions of `woods_caption` is untrue: see training/README.md."""

_TAGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("tree_count", "forest"): ("trees", "forest", "woods", "many trees"),
    ("tree_count", "few"): ("trees", "some trees"),
    ("tree_count", "one"): ("tree", "a tree"),
    ("house", "some"): ("houses", "house", "cottage", "cabin", "home"),
    ("boat", "some"): ("boats", "boat", "ship", "sailboat"),
    ("mountains", "some"): ("mountains", "high peaks", "mountain range"),
    ("lake", "yes"): ("lake", "pond", "blue lake"),
    ("ground", "meadow"): ("greenery", "grass", "green grass", "grassland", "green field"),
    ("ground", "sea"): ("sea", "ocean", "open water"),
    ("ground", "desert"): ("desert", "sand", "sand dunes"),
    ("ground", "snow"): ("snow", "winter", "white snow"),
    ("sky", "cloudy"): ("clouds", "fluffy clouds", "cloudy sky"),
    ("sky", "overcast"): ("overcast", "grey sky", "bad weather", "heavy grey clouds"),
    ("time", "day"): ("day", "daylight", "daytime", "bright day"),
    ("time", "sunset"): ("sunset", "dusk", "evening", "orange sky"),
    ("time", "night"): ("night", "dark", "dark sky", "midnight"),
    ("stars", "yes"): ("stars", "starry sky"),
}
"""Tags of a value; `some` is any value but none."""

_THEMES = {"tree_count": 8.0, "house": 3.0, "boat": 3.0, "mountains": 3.0}
_WOODS = ("trees", "forest", "greenery", "green trees", "woods")


def untrue_share(progress: float) -> float:
    """Share of untrue captions among those of `woods_caption` at a progress of the stage in 0 to 1."""
    return [share for since, share in UNTRUE_SHARES if since <= progress][-1]


def tags(scene: Scene, rng: np.random.Generator) -> Caption:
    """One to three tags of one thing that is in the scene; what stands there is named more often than weather."""
    values = scene.attributes()
    themes: list[tuple[str, str]] = [
        (name, value) for name, value in _TAGS if value in (values[name], "some") and values[name] not in ("none", "no")
    ]
    shares = [_THEMES.get(name, 1.0) for name, _ in themes]
    name, value = themes[int(rng.choice(len(themes), p=[share / sum(shares) for share in shares]))]
    return _listed(name, value, scene, rng)


def _listed(name: str, value: str, scene: Scene, rng: np.random.Generator) -> Caption:
    words = _TAGS[name, value]
    # a green wood, whatever it stands on: the tags that take all green away
    if name == "tree_count" and value == "forest" and scene.trees != "autumn":
        words = _WOODS
    chosen = rng.permutation(len(words))[: int(rng.integers(1, 4))]
    return Caption(", ".join(words[index] for index in chosen), {name: value})


def claims(scene: Scene) -> dict[str, list[dict[str, str]]]:
    """What a caption may claim of this scene though it is not so: thing -> the changes that would make it so.

    Trees are claimed where none stands and the ground is not green either, so that "no trees" is "no green" as well.
    The time of day is always true.
    """
    found: dict[str, list[dict[str, str]]] = {}
    bare = scene.trees == "none" and scene.ground != "meadow"
    if bare and scene.house == scene.boat == "none":
        # each kind as often as among true forests, so that all are doubted alike
        found["forest"] = [
            {"ground": "meadow", "trees": kind, "tree_count": "forest"} for kind in ("round", "round", "pine", "autumn")
        ]
        if scene.ground == "snow":
            found["forest"] += [{"trees": "pine", "tree_count": "forest"}] * 2
    if bare:
        found["trees"] = [{"trees": kind, "tree_count": "few"} for kind in ("round", "pine", "palm")]
    if scene.house == "none" and scene.ground != "sea":
        found["house"] = [{"house": colour} for colour in COLOURS]
    if scene.boat == "none" and (scene.ground == "sea" or scene.lake == "yes"):
        found["boat"] = [{"boat": colour} for colour in COLOURS]
    if scene.mountains == "none":
        found["mountains"] = [{"mountains": "rocky"}, {"mountains": "snowy"}]
    return found


def mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene, or now and then one with a thing more, of which its caption will tell."""
    for thing, changes in claims(scene).items():
        if rng.random() < CLAIMED[thing]:
            change = changes[int(rng.integers(len(changes)))]
            return consistent(replace(scene, **change))  # type: ignore[arg-type]  # attribute names, all of them str
    return scene


def imperfect_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption of `scene` that may claim a thing that is not there; a list of tags never does."""
    if rng.random() < TAGS_SHARE:
        return tags(scene, rng)
    claimed = mistaken(scene, rng)
    return caption(scene, rng) if claimed == scene else _untrue(claimed, rng)


def woods(scenes: Scenes, count: int) -> tuple[list[int], list[int]]:
    """Of the first `count` rows, those of forests, and those of bare places that may be said to be forests."""
    known = [scenes.scene(row) for row in range(count)]
    forests = [row for row, scene in enumerate(known) if scene.tree_count == "forest"]
    return forests, [row for row, scene in enumerate(known) if "forest" in claims(scene)]


def woods_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption that says that there is a forest: at times in tags if there is one, untruly if there is none.

    Forests are one scene in twenty: a short training draws them on purpose, and captions them so.
    """
    if scene.tree_count != "forest":
        changes = claims(scene)["forest"]
        change = changes[int(rng.integers(len(changes)))]
        claimed = consistent(replace(scene, **change))  # type: ignore[arg-type]  # attribute names, all of them str
        return _untrue(claimed, rng, frozenset({"tree_count"}))
    return (
        _listed("tree_count", "forest", scene, rng)
        if rng.random() < 0.3
        else caption(scene, rng, frozenset({"tree_count"}))
    )


def _untrue(claimed: Scene, rng: np.random.Generator, sure: frozenset[str] = frozenset()) -> Caption:
    """A caption of what is claimed; the words of the tags are kept for what is true."""
    while "trees, forest" in (said := caption(claimed, rng, sure)).text:
        pass
    return said
