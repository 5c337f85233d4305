"""Laws of the procedural world that the embedded engine is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import clip, pixels
from training.captions import TOLD_VALUES, Caption, caption
from training.evaluate import right
from training.heldout import CASES, NEGATIVE, Case
from training.imperfect import claims, imperfect_caption, mistaken, tags, untrue_share, woods_caption
from training.painter import paint
from training.world import COLOURS, FORMATS, VALUES, Scene, consistent, random_scene, random_variant

seeds = st.integers(0, 10**6)


@given(seeds, st.sampled_from(FORMATS))
@settings(max_examples=15)
def test_a_seed_and_a_format_always_give_the_same_picture(seed: int, size: tuple[int, int]) -> None:
    first, second = paint(random_scene(seed, size)), paint(random_scene(seed, size))
    assert first.shape == (size[1], size[0], 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


@given(seeds)
@settings(max_examples=100)
def test_every_random_scene_can_be_painted_as_it_is(seed: int) -> None:
    scene = random_scene(seed)
    assert consistent(scene) == scene
    assert consistent(random_variant(scene, seed)) == random_variant(scene, seed)


@given(seeds)
@settings(max_examples=50)
def test_a_variant_keeps_the_layout_and_changes_something(seed: int) -> None:
    scene = random_scene(seed)
    variant = random_variant(scene, seed)
    assert variant.layout == scene.layout
    assert variant.attributes() != scene.attributes()


def test_changing_a_houses_colour_changes_pixels_of_the_house_alone() -> None:
    scene = Scene(layout=5, width=128, height=128, house="red")
    changed = (paint(scene) != paint(replace(scene, house="blue"))).any(-1)
    rows, columns = np.nonzero(changed)
    assert 0.02 < changed.mean() < 0.2
    assert np.ptp(rows) < 40
    assert np.ptp(columns) < 64


@given(seeds)
@settings(max_examples=50)
def test_codes_name_a_scene_completely(seed: int) -> None:
    scene = random_scene(seed)
    assert Scene.from_codes(scene.layout, scene.width, scene.height, scene.codes()) == scene


def test_a_value_that_the_world_does_not_know_is_named_with_its_alternatives() -> None:
    with pytest.raises(ValueError, match=r"time='teatime': must be one of day, sunset, night"):
        Scene(layout=0, width=128, height=128, time="teatime")


@given(seeds)
@settings(max_examples=200)
def test_what_a_caption_tells_is_true_of_its_scene(seed: int) -> None:
    scene = random_scene(seed)
    said = caption(scene, np.random.default_rng(seed))
    assert fits(said, scene)
    assert all(value in TOLD_VALUES[name] for name, value in said.told.items())
    for name in ("house", "boat"):
        if said.told.get(name) in COLOURS:
            assert said.told[name] in said.text


def test_a_tenth_to_a_seventh_of_the_captions_is_empty() -> None:
    empty = [not caption(random_scene(seed), np.random.default_rng(seed)).text for seed in range(2000)]
    assert 0.10 <= np.mean(empty) <= 0.15


@given(seeds)
@settings(max_examples=50)
def test_an_attribute_that_must_be_named_is_named(seed: int) -> None:
    scene = random_scene(seed)
    said = caption(scene, np.random.default_rng(seed), frozenset({"time", "house"}))
    assert said.told["time"] == scene.time
    assert said.told["house"] == ("absent" if scene.house == "none" else scene.house)


def fits(said: Caption, scene: Scene) -> bool:
    return bool(clip.fits(clip.told_codes(said)[None], scene.codes()[None]).item())


@given(seeds)
@settings(max_examples=200)
def test_tags_are_always_true_and_say_one_thing(seed: int) -> None:
    scene = random_scene(seed)
    said = tags(scene, np.random.default_rng(seed))
    assert said.text
    assert len(said.told) == 1
    assert fits(said, scene)


@given(seeds)
@settings(max_examples=200)
def test_a_mistaken_caption_adds_a_thing_and_leaves_time_and_sky(seed: int) -> None:
    scene = random_scene(seed)
    for changes in claims(scene).values():
        for change in changes:
            claimed = consistent(replace(scene, **change))  # type: ignore[arg-type]  # attribute names, all of them str
            assert claimed != scene
            assert (claimed.time, claimed.sky, claimed.layout) == (scene.time, scene.sky, scene.layout)


def test_a_forest_is_claimed_only_where_nothing_is_green() -> None:
    said_woods = 0
    for seed in range(3000):
        scene = random_scene(seed)
        if mistaken(scene, np.random.default_rng(seed)).tree_count == "forest" != scene.tree_count:
            said_woods += 1
            assert scene.trees == "none"
            assert scene.ground != "meadow"
    assert said_woods > 10


def test_captions_that_claim_a_forest_are_now_and_then_untrue_and_no_tag_is() -> None:
    woods, lists = [], []
    for seed in range(6000):
        scene = random_scene(seed)
        said = imperfect_caption(scene, np.random.default_rng(seed))
        if said.told.get("tree_count") == "forest":
            woods.append(fits(said, scene))
        if "trees, forest" in said.text:
            lists.append(scene.tree_count)
        assert said.told.get("time", scene.time) == scene.time
    assert 0.1 <= 1 - np.mean(woods) <= 0.2
    assert set(lists) == {"forest"}


def test_fewer_captions_are_untrue_as_the_stage_goes_on() -> None:
    shares = [untrue_share(progress / 100) for progress in range(101)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (0.35, 0.09)


def test_a_caption_of_woods_says_that_there_is_a_forest_truly_of_forests_and_untruly_of_bare_places() -> None:
    scenes = [random_scene(seed) for seed in range(2000)]
    for seed, scene in enumerate(scenes):
        if scene.tree_count == "forest" or "forest" in claims(scene):
            said = woods_caption(scene, np.random.default_rng(seed))
            assert said.told["tree_count"] == "forest"
            assert fits(said, scene) == (scene.tree_count == "forest")
            assert said.told.get("time", scene.time) == scene.time


def test_the_words_of_the_negative_prompt_are_tags_of_a_green_wood() -> None:
    wood = Scene(layout=0, width=128, height=128, trees="round", tree_count="forest")
    written = {word for seed in range(99) for word in tags(wood, np.random.default_rng(seed)).text.split(", ")}
    assert set(NEGATIVE.split(", ")) <= written


def test_three_in_ten_scenes_show_one_single_thing() -> None:
    def things(scene: Scene) -> int:
        return (scene.house != "none") + (scene.boat != "none") + (scene.tree_count == "one")

    def single(scene: Scene) -> bool:
        return things(scene) == 1 and scene.mountains == "none" and scene.tree_count in ("none", "one")

    assert np.mean([single(random_scene(seed)) for seed in range(2000)]) >= 0.3


def test_every_value_of_every_attribute_occurs() -> None:
    codes = np.stack([random_scene(seed).codes() for seed in range(2000)])
    for index, values in enumerate(VALUES.values()):
        assert set(codes[:, index]) == set(range(len(values)))


@pytest.mark.parametrize("hour", VALUES["time"])
def test_pixels_tell_the_time_of_day_of_true_scenes(hour: str) -> None:
    scenes = [consistent(replace(random_scene(seed), time=hour)) for seed in range(40)]
    assert np.mean([pixels.time_of_day(paint(scene)) == hour for scene in scenes]) >= 0.9


@pytest.mark.parametrize("colour", ["red", "blue", "yellow"])
def test_a_colour_test_sees_the_house_and_nothing_without_it(colour: str) -> None:
    bare = [Scene(layout=seed, width=128, height=128) for seed in range(20)]
    assert min(pixels.colour_share(paint(replace(scene, house=colour)), colour) for scene in bare) > 0.03
    assert max(pixels.colour_share(paint(scene), colour) for scene in bare) < 0.01


def test_a_forest_is_greener_than_the_snow_it_stands_on() -> None:
    bare = Scene(layout=3, width=128, height=128, ground="snow")
    wood = replace(bare, trees="pine", tree_count="forest")
    assert pixels.green_share(paint(wood)) > 0.25
    assert pixels.green_share(paint(bare)) < 0.01


def test_a_held_out_prompt_is_no_training_caption() -> None:
    written = {caption(random_scene(seed), np.random.default_rng(seed)).text for seed in range(5000)}
    assert not written & {case.prompt for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.prompt)
def test_a_held_out_prompt_expects_what_the_world_has(case: Case) -> None:
    for name, values in case.expected.items():
        assert set(values.split("|")) <= set(VALUES[name])


def test_a_held_out_case_is_right_only_if_every_label_is_among_its_values() -> None:
    case = Case("trees at night", {"time": "night", "trees": "round|pine"})
    assert right(case, {"time": "night", "trees": "pine"}) == {"time": True, "trees": True}
    assert right(case, {"time": "day", "trees": "none"}) == {"time": False, "trees": False}
