"""Metrics of the pictures that each sampling step expects (`infer.py --save-steps`), over timesteps.

ConsisSR Fig. 6 and 8, CCSR Fig. 2 (left).
"""

import re
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation.evaluate import Evaluation, evaluate
from consissr.evaluation.folders import STEPS, Method, Pairs, list_runs, pair
from consissr.evaluation.protocols import Measure, Protocol


def step_pictures(folder: Path) -> dict[str, dict[int, Path]]:
    """Pictures of sampling steps beside the results in `folder`: image name -> timestep -> file, noisiest first."""
    pictures: dict[str, dict[int, Path]] = {}
    for steps in sorted(folder.rglob(f"*{STEPS}")):
        name = Path(steps.relative_to(folder).as_posix().removesuffix(STEPS)).with_suffix("").as_posix()
        for path in sorted(steps.glob("*_t*.png")):
            if match := re.fullmatch(r"\d+_t(\d+)", path.stem):
                pictures.setdefault(name, {})[int(match[1])] = path
    if not pictures:
        raise UserError(f"{folder} holds no pictures of sampling steps: restore with infer.py --save-steps")
    return pictures


def step_evaluation(
    results: dict[str, Path],
    hr: Path,
    measures: list[Measure],
    protocol: Protocol,
    cache: Path,
    **options,
) -> tuple[Evaluation, list[tuple[str, int]]]:
    """Each method at each timestep as a method of its own, and for each of these (method, timestep), noisiest first.

    Repeated runs are averaged (Fig. 8, ConsisSR averages ten). `options` go to `evaluate` (weights, device, jobs).
    """
    base = pair(results, hr, None)
    methods, places = [], []
    for name, folder in results.items():
        runs = [step_pictures(run) for run in list_runs(folder)]
        for timestep in timesteps(runs, base.images, folder):
            methods.append(Method(f"{name} t={timestep}", [{i: run[i][timestep] for i in base.images} for run in runs]))
            places.append((name, timestep))
    pairs = Pairs(methods, base.images, base.hr, None, base.sizes)
    return evaluate(pairs, measures, protocol, cache, **options), places


def timesteps(runs: list[dict[str, dict[int, Path]]], images: list[str], folder: Path) -> list[int]:
    """The timesteps that every image of every run has."""
    grids = {tuple(run.get(image, {})) for run in runs for image in images}
    if len(grids) != 1 or not next(iter(grids)):
        raise UserError(f"{folder}: the images' sampling steps differ; restore all with the same plan and --save-steps")
    return list(grids.pop())


def step_curves(
    evaluation: Evaluation, places: list[tuple[str, int]], measures: list[Measure]
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """`step_evaluation`'s results as curves: method -> metric -> [(timestep, mean)]."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for method, (name, timestep) in zip(evaluation.pairs.methods, places, strict=True):
        for measure in measures:
            if measure.name not in evaluation.unavailable:
                value = evaluation.mean(method.name, measure.name)
                curves.setdefault(name, {}).setdefault(measure.name, []).append((timestep, value))
    return curves


def lr_values(lr: Path, hr: Path, measures: list[Measure], protocol: Protocol, output: Path, **options) -> dict:
    """The metrics of the bicubic upscaled LR images (Fig. 6, ConsisSR draws them for scale): metric -> mean."""
    from consissr.evaluation.check import BICUBIC, scale_between, write_baselines

    folder = write_baselines(lr, output / "baselines", scale_between(lr, hr))[BICUBIC]
    done = evaluate(pair({"LR": folder}, hr, None), measures, protocol, output / "scores.jsonl", **options)
    return {m.name: done.mean("LR", m.name) for m in measures if m.name not in done.unavailable}
