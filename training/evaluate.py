"""Evaluates the engine without a network: figures into `evaluation.json`, pictures into PNG sheets.

The judges are the attribute classifier (trained on the true world alone), pixel statistics whose base rates are
measured on true pictures with and without the thing, and CLIP for what CLIP guidance claims.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from training import classifier, dataset, pixels, sample, sheets, vae
from training.common import pid_file, train_dir, write_atomically
from training.heldout import AXES, CASES, FOREST_PROMPTS, GUIDED_PROMPTS, LONG_PROMPTS, NEGATIVE
from training.world import FORMATS, VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.heldout import Case

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Judges:
    """What generates and what judges; `steps` and `guidance_scale` of every sample, `seeds` a prompt."""

    models: sample.Models
    classifier: classifier.Classifier
    seeds: int = 4
    steps: int = 25
    guidance_scale: float = 5.0

    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], size: tuple[int, int] = (128, 128), **more: Any
    ) -> Images:
        """[len(texts), H, W, 3], one picture for each text (weights as in `"trees : 1 | sea : -1"`) and seed."""
        requests = [(sample.parse(text), seed) for text, seed in zip(texts, seeds, strict=True)]
        more = {"guidance_scale": self.guidance_scale} | more
        return sample.generate(self.models, requests, size=size, steps=self.steps, **more)


def right(case: Case, found: dict[str, str]) -> dict[str, bool]:
    """For each expected attribute: whether what was found is among the right values."""
    return {name: found[name] in values.split("|") for name, values in case.expected.items()}


def world(judges: Judges, count: int = 256) -> dict[str, Any]:
    """How well the autoencoder keeps the held-out world, and how well the judges know it."""
    scenes = dataset.load(FORMATS[0])
    rows = np.arange(len(scenes) - min(count, len(scenes) - scenes.trained), len(scenes))
    truth = np.asarray(scenes.images[rows])
    values = vae.psnr(judges.models.vae, truth)
    decoded = vae.round_trip(judges.models.vae, truth)
    kept = {}
    for name in ("house", "boat"):
        index = list(VALUES).index(name)
        has = scenes.codes[rows, index] > 0
        found = classifier.accuracy(judges.classifier, scenes, decoded[has], rows[has])
        kept[name] = found[name]
    return {
        "psnr_db": float(values.mean()),
        "psnr_db_pooled": float(10 * np.log10(255**2 / np.mean(np.square(255 / 10 ** (values / 20))))),
        "psnr_db_worst_tenth": float(np.sort(values)[: max(1, len(values) // 10)].mean()),
        "colour_kept_by_autoencoder": kept,
        "classifier_accuracy": classifier.accuracy(judges.classifier, scenes, truth, rows),
        "classifier_accuracy_after_autoencoder": classifier.accuracy(judges.classifier, scenes, decoded, rows),
        "pixel_tests": pixel_test_rates(scenes, rows),
    }


def pixel_test_rates(scenes: dataset.Scenes, rows: Any) -> dict[str, Any]:
    """Each pixel statistic on true pictures with the thing and without it."""
    pictures = [scenes.images[row] for row in rows]
    real = [scenes.scene(int(row)) for row in rows]
    times = [pixels.time_of_day(picture) == scene.time for picture, scene in zip(pictures, real, strict=True)]
    rates: dict[str, Any] = {"time_of_day_right": float(np.mean(times))}

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    for colour in ("red", "blue", "yellow"):
        shares = [pixels.colour_share(picture, colour) > 0.012 for picture in pictures]
        has = [colour in (scene.house, scene.boat) for scene in real]
        rates[f"{colour}_object"] = {
            "with": mean([float(hit) for hit, there in zip(shares, has, strict=True) if there]),
            "without": mean([float(hit) for hit, there in zip(shares, has, strict=True) if not there]),
        }
    for name, share, there in (
        ("green_share_forest", pixels.green_share, [s.tree_count == "forest" and s.trees != "autumn" for s in real]),
        ("blue_share_sea", pixels.blue_share, [s.ground == "sea" for s in real]),
    ):
        values = [share(picture) for picture in pictures]
        rates[name] = {
            "with": mean([value for value, hit in zip(values, there, strict=True) if hit]),
            "without": mean([value for value, hit in zip(values, there, strict=True) if not hit]),
        }
    return rates


def adherence(judges: Judges) -> tuple[dict[str, Any], Images, list[str]]:
    """Share of samples that match, for each axis; the pictures, one row of seeds a case; and the failures."""
    texts = [case.prompt for case in CASES for _ in range(judges.seeds)]
    seeds = [1000 + seed for _ in CASES for seed in range(judges.seeds)]
    images = judges.draw(texts, seeds)
    found = classifier.labels(judges.classifier, images)
    hits: dict[str, list[bool]] = {name: [] for name in VALUES}
    presence: list[bool] = []
    failures = []
    for index, labels in enumerate(found):
        case = CASES[index // judges.seeds]
        checks = right(case, labels)
        for name, hit in checks.items():
            hits[name].append(hit)
        if "trees" in case.expected:
            presence.append((labels["trees"] == "none") == (case.expected["trees"] == "none"))
        failures += [
            f"{case.prompt} (seed {seeds[index]}): {name} is {labels[name]}, not {case.expected[name]}"
            for name, hit in checks.items()
            if not hit
        ]
    by_pixels = [
        pixels.time_of_day(image) == CASES[index // judges.seeds].expected["time"]
        for index, image in enumerate(images)
        if "time" in CASES[index // judges.seeds].expected
    ]
    result = {axis: float(np.mean([hit for name in names for hit in hits[name]])) for axis, names in AXES.items()}
    result |= {"trees present or absent": float(np.mean(presence)), "time of day by pixels": float(np.mean(by_pixels))}
    return result, images, failures


def negative_prompt(judges: Judges) -> tuple[dict[str, Any], Images]:
    """Green share of forest prompts without and with the negative prompt, and the time of day with it."""
    seeds = [2000 + seed for seed in range(judges.seeds)] * len(FOREST_PROMPTS)
    texts = [text for text, _ in FOREST_PROMPTS for _ in range(judges.seeds)]
    times = [hour for _, hour in FOREST_PROMPTS for _ in range(judges.seeds)]
    plain = judges.draw(texts, seeds)
    against = judges.draw([f"{text} : 1 | {NEGATIVE} : -1" for text in texts], seeds)
    before, after = (np.array([pixels.green_share(image) for image in images]) for images in (plain, against))
    found = classifier.labels(judges.classifier, against)
    result = {
        "green_share_before": float(before.mean()),
        "green_share_after": float(after.mean()),
        "cut": float(1 - after.mean() / max(before.mean(), 1e-6)),
        "time_of_day_right": float(
            np.mean([labels["time"] == hour for labels, hour in zip(found, times, strict=True)])
        ),
    }
    rows = [
        part[first : first + judges.seeds] for first in range(0, len(plain), judges.seeds) for part in (plain, against)
    ]
    return result, np.concatenate(rows)


def curves(judges: Judges) -> tuple[dict[str, Any], Images, list[str]]:
    """What weights do: trees against sea, and a growing negative weight; the pictures, and each row's prompt."""
    seeds = [3000 + seed for seed in range(judges.seeds)]
    rows, images, texts = [], [], []
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        texts.append(f"trees : {weight} | sea : {1 - weight}")
        drawn = judges.draw([texts[-1]] * judges.seeds, seeds)
        images.append(drawn)
        green, blue = (np.mean([f(image) for image in drawn]) for f in (pixels.green_share, pixels.blue_share))
        rows.append({"trees": weight, "green_share": float(green), "blue_share": float(blue)})
    negative = []
    for weight in (0.0, 0.25, 0.5, 1.0):
        texts.append(f"{FOREST_PROMPTS[0][0]} : 1" + (f" | {NEGATIVE} : -{weight}" if weight else ""))
        drawn = judges.draw([texts[-1]] * judges.seeds, seeds)
        images.append(drawn)
        trees = 1 - classifier.probabilities(judges.classifier, drawn)["trees"][:, 0]
        green = np.mean([pixels.green_share(image) for image in drawn])
        negative.append({"weight": -weight, "trees_probability": float(trees.mean()), "green_share": float(green)})
    return {"trees_against_sea": rows, "negative_weight": negative}, np.concatenate(images), texts


def clip_guidance(judges: Judges, scale: float = 0.25) -> tuple[dict[str, Any], Images]:
    """CLIP score with guidance on and off, seed by seed. CLIP cannot judge its own guidance, so AXES are not here."""
    seeds = [4000 + seed for seed in range(judges.seeds)]
    off, on, images = [], [], []
    for text in GUIDED_PROMPTS:
        without = judges.draw([text] * judges.seeds, seeds)
        guided = judges.draw([text] * judges.seeds, seeds, clip_scale=scale)
        off.append(sample.clip_score(judges.models, without, text))
        on.append(sample.clip_score(judges.models, guided, text))
        images += [without, guided]  # a row a prompt
    before, after = np.concatenate(off), np.concatenate(on)
    result = {
        "scale": scale,
        "score_off": float(before.mean()),
        "score_on": float(after.mean()),
        "share_raised": float(np.mean(after > before)),
    }
    return result, np.concatenate(images)


def formats(judges: Judges) -> tuple[dict[str, Any], dict[tuple[int, int], Images]]:
    """Wide and tall: whether each part of the picture shows the same time of day, and the whole the right one."""
    results, images = {}, {}
    for size in ((384, 128), (128, 256)):
        count = max(2, judges.seeds // 2)
        texts = [text for text, _, _ in LONG_PROMPTS for _ in range(count)]
        drawn = judges.draw(texts, [5000 + index for index in range(len(texts))], size=size)
        images[size] = drawn
        whole = classifier.labels(judges.classifier, drawn)
        wanted = [(hour, ground) for _, hour, ground in LONG_PROMPTS for _ in range(count)]
        result = {
            "time_right": float(np.mean([f["time"] == hour for f, (hour, _) in zip(whole, wanted, strict=True)])),
            "ground_right": float(np.mean([f["ground"] == land for f, (_, land) in zip(whole, wanted, strict=True)])),
        }
        if size[0] > size[1]:
            parts = [
                [part["time"] for part in classifier.labels(judges.classifier, drawn[:, :, left : left + 128])]
                for left in (0, 128, 256)
            ]
            result["parts_agree"] = float(np.mean([len(set(hours)) == 1 for hours in zip(*parts, strict=True)]))
        results[f"{size[0]}x{size[1]}"] = result
    return results, images


def diversity(judges: Judges, images: Images) -> dict[str, float]:
    """Over the seeds of a prompt: mean pixel distance and CLIP similarity, beside those of unrelated true scenes."""
    groups = [images[first : first + judges.seeds] for first in range(0, len(images), judges.seeds)]

    def distance(group: Images) -> float:
        scaled = group.astype(np.float32) / 255
        pairs = [(i, j) for i in range(len(group)) for j in range(i)]
        return float(np.mean([np.sqrt(np.mean((scaled[i] - scaled[j]) ** 2)) for i, j in pairs]))

    scenes = dataset.load(FORMATS[0])
    unrelated = np.asarray(scenes.images[scenes.trained : scenes.trained + 64 : 2])
    return {
        "pixel_distance": float(np.mean([distance(group) for group in groups])),
        "pixel_distance_unrelated": distance(unrelated),
        "clip_similarity": float(np.mean([sample.similarity(judges.models, group) for group in groups])),
        "clip_similarity_unrelated": sample.similarity(judges.models, unrelated),
    }


def evaluate(judges: Judges) -> dict[str, Any]:
    """Run everything; writes `evaluation.json` and the sheets, and returns the figures."""
    folder = train_dir() / "sheets"
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    result: dict[str, Any] = {"steps": judges.steps, "guidance_scale": judges.guidance_scale, "seeds": judges.seeds}
    result["world"] = world(judges)
    sheets.world(folder / "world.png")
    sheets.reconstructions(judges.models.vae, folder / "autoencoder.png")
    result["adherence"], images, result["failures"] = adherence(judges)
    sheets.grid(images, judges.seeds, folder / "prompts.png", [case.prompt for case in CASES])
    sheets.labelled(images[:: judges.seeds], [case.prompt for case in CASES], 8, folder / "first-seed.png")
    result["diversity"] = diversity(judges, images)
    result["negative_prompt"], images = negative_prompt(judges)
    titles = [f"{text}; on the right: | {NEGATIVE} : -1" for text, _ in FOREST_PROMPTS]
    sheets.grid(images, 2 * judges.seeds, folder / "negative.png", titles)
    result["curves"], images, titles = curves(judges)
    sheets.grid(images, judges.seeds, folder / "weights.png", titles)
    result["clip_guidance"], images = clip_guidance(judges)
    titles = [f"{text}; on the right: CLIP guidance" for text in GUIDED_PROMPTS]
    sheets.grid(images, 2 * judges.seeds, folder / "clip-guidance.png", titles)
    result["formats"], long = formats(judges)
    for size, drawn in long.items():
        sheets.grid(drawn, 2 if size[0] > size[1] else 6, folder / f"format-{size[0]}x{size[1]}.png")
    result["seconds"] = round(time.monotonic() - started)
    write_atomically(json.dumps(result, indent=1), train_dir() / "evaluation.json")
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="pictures a prompt (default: 4)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    with pid_file("evaluate"):
        judge = classifier.load_trained()
        result = evaluate(Judges(sample.load(), judge, options.seeds, options.steps, options.guidance_scale))
    shown = ("world", "adherence", "negative_prompt", "clip_guidance", "formats", "diversity")
    print(json.dumps({name: result[name] for name in shown}, indent=1))


if __name__ == "__main__":
    main()
