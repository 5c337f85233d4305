"""Captions: what a person might write about a scene.

A caption names some of a scene's attributes in varied words, as a sentence or as a comma list, at times with the
filler that prompts are full of; now and then it is empty, which teaches the unconditional branch. `told` records what
it says, so that auxiliary heads and evaluation ask for no more than the words do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training.world import VALUES

if TYPE_CHECKING:
    import numpy as np

    from training.world import Scene

EMPTY_SHARE = 0.12
"""Share of captions that say nothing."""

TOLD_VALUES: dict[str, tuple[str, ...]] = {
    name: ("untold", "some", *(value for value in values if value not in ("none", "no")), "absent")
    for name, values in VALUES.items()
}
"""What a caption can say of each attribute: nothing, that there is some, which value, or that there is none."""

_TIME = {
    "day": ("at noon", "by day", "in daylight", "on a bright day", "at midday", "in the daytime", "during the day"),
    "sunset": ("at sunset", "at dusk", "in the golden hour", "in the evening", "at sunrise", "at dawn", "at twilight"),
    "night": ("at night", "at midnight", "in the dark", "by night", "late at night", "in the night"),
}
_TIME_WORD = {
    "day": ("day", "daylight", "noon", "bright day", "sunny day", "daytime"),
    "sunset": ("sunset", "dusk", "golden hour", "evening", "sunrise", "orange sky"),
    "night": ("night", "midnight", "dark night", "nighttime", "dark sky"),
}
_SKY = {
    "clear": ("a clear sky", "clear sky", "cloudless sky", "clear weather"),
    "cloudy": ("clouds", "a cloudy sky", "fluffy clouds", "some clouds in the sky", "clouds in the sky"),
    "overcast": ("an overcast sky", "a grey sky", "gloomy weather", "overcast", "heavy grey clouds", "bad weather"),
}
_ORB = {
    "day": ("the sun", "a bright sun", "sunshine", "a yellow sun"),
    "sunset": ("the sun", "a low sun", "the setting sun", "sun on the horizon"),
    "night": ("the moon", "a full moon", "moonlight", "a bright moon"),
}
_STARS = ("stars", "a starry sky", "many stars", "stars in the sky", "bright stars")
_GROUND = {
    "meadow": ("a meadow", "green grass", "grassland", "a green field", "green hills", "a grassy plain", "greenery"),
    "sea": ("the sea", "the ocean", "open water", "the blue sea", "a calm sea", "the coast"),
    "desert": ("a desert", "sand dunes", "a sandy desert", "dry sand", "yellow sand"),
    "snow": ("snow", "a snowy field", "a winter landscape", "white snow", "a snow-covered plain", "winter"),
}
_MOUNTAINS = {
    "rocky": ("rocky mountains", "grey mountains", "bare mountains", "rocky peaks"),
    "snowy": ("snowy mountains", "snow-capped mountains", "the Alps", "snowy peaks", "white peaks"),
    "some": ("mountains", "a mountain range", "mountains in the distance", "high peaks"),
}
_LAKE = ("a lake", "a small lake", "a pond", "a blue lake", "a calm lake")
_TREE = {
    "round": ("green", "leafy", "round", "oak"),
    "pine": ("pine", "fir", "pine", "spruce"),
    "palm": ("palm", "palm", "tropical palm"),
    "autumn": ("autumn", "orange", "autumn-coloured", "fall"),
    "some": ("", "", "tall"),
}
_WALLS = ("house", "house", "house", "cottage", "cabin", "home")
_SAILS = ("boat", "boat", "sailboat", "sailing boat", "boat with {colour} sails", "ship")
_PLAIN_SAILS = ("boat", "boat", "sailboat", "sailing boat", "ship")
_ABSENT = {
    "trees": ("no trees", "without trees", "treeless"),
    "house": ("no house", "no houses"),
    "boat": ("no boat", "no boats"),
    "mountains": ("no mountains", "flat land"),
}
_MEDIUM = (
    "a picture of ", "an image of ", "a painting of ", "a photo of ", "a drawing of ", "an illustration of ",
    "a view of ", "a landscape with ",
)  # fmt: skip
_FILLER = (
    "epic vista", "4k", "8k", "highly detailed", "beautiful", "masterpiece", "wide shot", "trending on artstation",
    "digital art", "flat colours", "vector art", "peaceful", "scenic", "landscape", "best quality", "sharp",
    "minimalist", "concept art", "vivid colours", "postcard", "simple shapes", "panorama", "cinematic", "photograph",
    "realistic", "detailed", "artwork", "wallpaper", "oil on canvas", "watercolor", "stunning", "quiet", "dreamy",
    "soft light", "hdr", "intricate", "lovely", "calm", "nature", "travel", "wonderful scenery", "high quality",
)  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """`text`, and what it says: attribute -> one of `TOLD_VALUES[attribute]`, untold attributes left out."""

    text: str
    told: dict[str, str] = field(default_factory=dict)


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _trees(scene: Scene, rng: np.random.Generator, told: dict[str, str]) -> str:
    kind = scene.trees if rng.random() < 0.7 else "some"
    told |= {"trees": kind, "tree_count": scene.tree_count}
    adjective = _one(rng, _TREE[kind])
    if scene.tree_count == "one":
        article = _one(rng, ("a ", "one ", "a single ", "a lonely "))
        return f"{article}{adjective} tree".replace("  ", " ")
    if scene.tree_count == "few":
        return f"{_one(rng, ('a few ', 'some ', 'three ', ''))}{adjective} trees".replace("  ", " ").strip()
    if kind in ("round", "some") and rng.random() < 0.15:
        told |= {"trees": "some"}
        return "trees, forest, greenery"
    return (
        _one(
            rng,
            (f"a {adjective} forest", f"many {adjective} trees", f"{adjective} woods", f"a dense {adjective} forest"),
        )
        .replace("  ", " ")
        .strip()
    )


def _coloured(name: str, colour: str, rng: np.random.Generator, told: dict[str, str], sure: bool) -> str:
    if not sure and rng.random() < 0.12:
        told[name] = "some"
        return "a " + _one(rng, _WALLS if name == "house" else _PLAIN_SAILS)
    told[name] = colour
    if name == "house" and rng.random() < 0.1:
        return f"a house with {colour} walls"
    noun = _one(rng, _WALLS if name == "house" else _SAILS)
    if "{" in noun:
        return "a " + noun.format(colour=colour)
    return f"a {colour} {noun}"


def _objects(scene: Scene, rng: np.random.Generator, told: dict[str, str], sure: frozenset[str]) -> list[str]:
    """Phrases for the things that stand in the scene; attributes in `sure` are never left out."""

    def named(name: str, share: float) -> bool:
        return name in sure or rng.random() < share

    phrases = []
    if scene.house != "none" and named("house", 0.93):
        phrases.append(_coloured("house", scene.house, rng, told, "house" in sure))
    if scene.boat != "none" and named("boat", 0.93):
        phrases.append(_coloured("boat", scene.boat, rng, told, "boat" in sure))
    if scene.trees != "none" and (named("trees", 0.92) or "tree_count" in sure):
        phrases.append(_trees(scene, rng, told))
    if scene.lake == "yes" and named("lake", 0.85):
        told["lake"] = "yes"
        phrases.append(_one(rng, _LAKE))
    if scene.mountains != "none" and named("mountains", 0.85):
        kind = scene.mountains if rng.random() < 0.7 or "mountains" in sure else "some"
        told["mountains"] = kind
        phrases.append(_one(rng, _MOUNTAINS[kind]))
    return [phrases[i] for i in rng.permutation(len(phrases))]


def _absences(scene: Scene, rng: np.random.Generator, told: dict[str, str], sure: frozenset[str]) -> list[str]:
    missing = [name for name in _ABSENT if getattr(scene, name) == "none"]
    chosen = [name for name in missing if name in sure or rng.random() < 0.035]
    told |= dict.fromkeys(chosen, "absent")
    return [_one(rng, _ABSENT[name]) for name in chosen]


def caption(scene: Scene, rng: np.random.Generator, sure: frozenset[str] = frozenset()) -> Caption:
    """A caption of `scene`. Attributes in `sure` are named for certain (then the caption is never empty)."""
    if not sure and rng.random() < EMPTY_SHARE:
        return Caption("")
    told: dict[str, str] = {}
    things = _objects(scene, rng, told, sure)
    where = "ground" in sure or rng.random() < (0.6 if things else 0.92)
    when = "time" in sure or rng.random() < 0.8
    sky = "sky" in sure or rng.random() < (0.3 if scene.sky == "clear" else 0.55)
    details = []
    if sky:
        told["sky"] = scene.sky
        details.append(_one(rng, _SKY[scene.sky]))
    if scene.orb == "yes" and ("orb" in sure or rng.random() < 0.6):
        told["orb"] = "yes"
        details.append(_one(rng, _ORB[scene.time]))
    if scene.stars == "yes" and ("stars" in sure or rng.random() < 0.75):
        told["stars"] = "yes"
        details.append(_one(rng, _STARS))
    details += _absences(scene, rng, told, sure)
    if when:
        told["time"] = scene.time
    if where:
        told["ground"] = scene.ground
    ground = _one(rng, _GROUND[scene.ground])
    if scene.ground == "meadow" and scene.mountains != "none" and rng.random() < 0.25:
        ground = _one(
            rng, ("a valley", "a green valley", "a valley in the Alps" if scene.mountains == "snowy" else "a valley")
        )
        told |= {"mountains": "some"} if where and "mountains" not in told else {}
    listed = rng.random() < 0.35
    if listed:
        parts = [*things, *details]
        parts += [ground] if where else []
        parts += [_one(rng, _TIME_WORD[scene.time])] if when else []
        parts = [part.removeprefix("a ") if rng.random() < 0.5 else part for part in parts]
        parts = [parts[i] for i in rng.permutation(len(parts))]
        text = ", ".join(parts)
    else:
        text = _sentence(scene, rng, things, details, ground if where else "", when)
        if text and rng.random() < 0.3:
            text = _one(rng, _MEDIUM) + text
    if rng.random() < 0.3:
        extra = [_one(rng, _FILLER) for _ in range(int(rng.integers(1, 4)))]
        text = ", ".join([part for part in (text, *dict.fromkeys(extra)) if part])
    return Caption(text, told)


def _sentence(
    scene: Scene, rng: np.random.Generator, things: list[str], details: list[str], ground: str, when: bool
) -> str:
    preposition = "on" if scene.ground == "sea" else "in"
    if things:
        head = things[0]
        if len(things) > 1:
            link = _one(rng, (" and ", " with ", " near ", " beside "))
            head += link + " and ".join(things[1:])
        if ground:
            head += _one(rng, (f" {preposition} {ground}", f" and {ground}", f", {ground}"))
    else:
        head = ground
    if details:
        tail = " and ".join(details)
        head += (_one(rng, (" under ", " with ", ", ")) if head else "") + tail
    if when:
        time = _one(rng, _TIME[scene.time])
        if head and rng.random() < 0.15:
            head = f"{_one(rng, _TIME_WORD[scene.time])}, {head}"
        else:
            head = f"{head} {time}".strip()
    return head
