# SPDX-License-Identifier: Apache-2.0
"""Ends `make demo-qsd`: says how training on the best pairs compares with training on all of them.

python shapes/report_qsd.py outputs/demo-qsd
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats


METHODS = {
    "qsd": "best pairs by Q, in order",
    "steps": "all pairs, random, the same steps",
    "epoch": "all pairs, random, a full epoch",
}


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over prompts."""
    found = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0)
    return found.confidence_interval.low, found.confidence_interval.high


def main(demo: Path) -> None:
    folder = demo / "evaluation" / "scores" / "accuracy"
    scores = {
        file.stem: np.array(json.loads(file.read_text())["scores"]).mean(axis=1) for file in folder.glob("*.json")
    }
    seeds = sorted(name.removeprefix("qsd-") for name in scores if name.startswith("qsd-"))
    for seed in seeds:
        counts = json.loads((demo / f"pairs-{seed}" / "counts.json").read_text())
        print(f"seed {seed}: {counts['labelled']} labelled pairs, {counts['wrong']} of the labels wrong")
    mean = {method: np.mean([scores[f"{method}-{seed}"] for seed in seeds], axis=0) for method in METHODS}
    rows = [("base", scores["base"], None)]
    rows += [(title, mean[method], mean[method] - scores["base"]) for method, title in METHODS.items()]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"
    print(f"\n| {which}, {len(scores['base'])} held-out prompts | accuracy | lift, paired 95 % interval |")
    print("|---|---|---|")
    for title, accuracy, lift in rows:
        cell = "" if lift is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(lift.mean(), *interval(lift))
        print(f"| {title} | {accuracy.mean():.3f} | {cell} |")
    for other in ("steps", "epoch"):
        difference = mean["qsd"] - mean[other]
        cell = "{:+.3f} ({:+.3f} to {:+.3f})".format(difference.mean(), *interval(difference))
        print(f"| {METHODS['qsd']} − {METHODS[other]} | | {cell} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
