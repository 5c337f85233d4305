"""The held-out prompts: written by hand, with what a right picture shows. None of them is a training caption."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A prompt and its expectations: attribute -> the values that are right, `|` between them."""

    prompt: str
    expected: dict[str, str]


_SEEN = "round|pine|palm|autumn"


def _case(prompt: str, **expected: str) -> Case:
    return Case(prompt, expected)


CASES: tuple[Case, ...] = (
    # time of day and terrain
    _case("wide green meadow at high noon", time="day", ground="meadow"),
    _case("a meadow when the day ends, sunset colours", time="sunset", ground="meadow"),
    _case("grassland deep in the night", time="night", ground="meadow"),
    _case("the sea on a bright day, nothing else", time="day", ground="sea"),
    _case("the ocean in the golden hour, epic vista", time="sunset", ground="sea"),
    _case("the open sea at midnight with stars", time="night", ground="sea"),
    _case("sand dunes of a hot desert at noon", time="day", ground="desert"),
    _case("desert dunes, evening, sunset", time="sunset", ground="desert"),
    _case("dry sandy desert, dark night", time="night", ground="desert"),
    _case("fresh white snow everywhere, daylight", time="day", ground="snow"),
    _case("snow-covered plain at dusk, highly detailed", time="sunset", ground="snow"),
    _case("a winter landscape late at night under the moon", time="night", ground="snow"),
    _case("a valley in the Alps at sunset, epic vista", time="sunset", mountains="snowy|rocky"),
    _case("rocky mountains behind a green field by day", time="day", ground="meadow", mountains="rocky"),
    _case("snowy peaks above the sea at noon", time="day", ground="sea", mountains="snowy"),
    _case("snow-capped mountains in the night", time="night", mountains="snowy"),
    _case("mountain range beyond the desert, midday", time="day", ground="desert", mountains="rocky|snowy"),
    _case("grassy plain beneath heavy grey clouds", ground="meadow", sky="overcast"),
    _case("the coast in bad weather, overcast", ground="sea", sky="overcast"),
    _case("fluffy white clouds over a green meadow in daylight", time="day", ground="meadow", sky="cloudy"),
    # water
    _case("a calm blue lake in a green meadow by day", time="day", lake="yes"),
    _case("a small pond on the grass at sunset", time="sunset", lake="yes"),
    _case("a lake between snowfields at noon, snow", ground="snow", lake="yes"),
    _case("a pond at night with snowy mountains", time="night", lake="yes"),
    # trees, and none
    _case("a dense pine forest in the daytime", time="day", trees="pine", tree_count="forest"),
    _case("pine woods in deep snow at noon", ground="snow", trees="pine", tree_count="forest"),
    _case("a leafy green forest on a bright day", time="day", trees="round", tree_count="forest"),
    _case("a forest of oaks at sunset", time="sunset", trees=_SEEN, tree_count="forest"),
    _case("an autumn forest, orange leaves, daylight", time="day", trees="autumn", tree_count="forest"),
    _case("a dark fir forest at night", time="night", trees="pine", tree_count="forest"),
    _case("a few palm trees in the desert at noon", ground="desert", trees="palm", tree_count="few"),
    _case("palm trees by the ocean at sunset", time="sunset", ground="sea", trees="palm"),
    _case("one lonely green tree on a meadow at midday", time="day", trees="round", tree_count="one"),
    _case("a single fir tree in the snow", ground="snow", trees="pine", tree_count="one"),
    _case("a single autumn tree at dusk", time="sunset", trees="autumn", tree_count="one"),
    _case("a treeless green meadow by day", ground="meadow", trees="none"),
    _case("an empty desert without trees at noon", ground="desert", trees="none"),
    _case("snow at night, no trees", time="night", ground="snow", trees="none"),
    _case("open sea with no trees, sunset", time="sunset", ground="sea", trees="none"),
    # houses
    _case("one red house on a meadow, high noon", time="day", house="red"),
    _case("one blue house on a meadow, high noon", time="day", house="blue"),
    _case("one yellow house on a meadow, high noon", time="day", house="yellow"),
    _case("one white house on a meadow, high noon", time="day", house="white"),
    _case("a red cabin standing in the snow", ground="snow", house="red"),
    _case("a blue cottage standing in the snow", ground="snow", house="blue"),
    _case("the yellow home in the desert by day", ground="desert", house="yellow"),
    _case("the white cottage, grass, sunset", time="sunset", house="white"),
    _case("red cottage, midnight, meadow", time="night", house="red"),
    _case("blue cabin, evening, grass", time="sunset", house="blue"),
    _case("yellow cottage at night in the snow", time="night", house="yellow"),
    # boats
    _case("one red sailboat out at sea, bright noon", time="day", ground="sea", boat="red"),
    _case("one blue sailboat out at sea, bright noon", time="day", ground="sea", boat="blue"),
    _case("one yellow sailboat out at sea, bright noon", time="day", ground="sea", boat="yellow"),
    _case("one white sailboat out at sea, bright noon", time="day", ground="sea", boat="white"),
    _case("ship with red sails in the evening, ocean", time="sunset", ground="sea", boat="red"),
    _case("ship with white sails in the evening, ocean", time="sunset", ground="sea", boat="white"),
    _case("yellow boat, midnight, the open sea", time="night", ground="sea", boat="yellow"),
    _case("blue boat, midnight, the open sea", time="night", ground="sea", boat="blue"),
    _case("a red boat on a lake in a meadow", lake="yes", boat="red"),
    _case("a yellow boat on a lake in a meadow", lake="yes", boat="yellow"),
)

FOREST_PROMPTS = (
    ("a dense forest in daylight, wide shot", "day"),
    ("a leafy green forest at noon", "day"),
    ("a pine forest at sunset", "sunset"),
    ("deep woods in the evening", "sunset"),
    ("a dark forest at night", "night"),
    ("many green trees on a bright day", "day"),
)
"""Prompts, with their time of day, from which the negative prompt takes the trees."""

NEGATIVE = "trees, forest, greenery"

GUIDED_PROMPTS = (
    "a red house on a meadow by day",
    "a blue boat on the sea at sunset",
    "a pine forest in the snow",
    "a lake below snowy mountains at noon",
    "palm trees in the desert at dusk",
    "a starry night over the ocean",
    "a yellow house at night",
    "an autumn forest on a bright day",
)
"""Prompts for CLIP guidance on and off."""

LONG_PROMPTS = (
    ("the sea at sunset", "sunset", "sea"),
    ("green meadow with mountains on a bright day", "day", "meadow"),
    ("a snowy field at night", "night", "snow"),
    ("a pine forest in the snow at noon", "day", "snow"),
    ("a desert in daylight", "day", "desert"),
    ("a white boat on the ocean by day", "day", "sea"),
)
"""Prompts for the wide and the tall format, with time of day and ground."""

AXES: dict[str, tuple[str, ...]] = {
    "time of day": ("time",),
    "terrain": ("ground", "mountains"),
    "water": ("lake",),
    "trees": ("trees",),
    "tree count": ("tree_count",),
    "house colour": ("house",),
    "boat colour": ("boat",),
    "sky": ("sky",),
}
"""What the report calls each group of attributes."""
