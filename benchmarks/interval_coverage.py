# SPDX-License-Identifier: Apache-2.0
"""How often the 95 % intervals of user_study.py hold the truth, in simulated studies whose prompts and raters differ.

    python benchmarks/interval_coverage.py

The chance that a rater votes for the first model is a logistic function of a constant, an effect of the prompt and one
of the rater; in some worlds a share of the votes, at random, are ties. The truth is the same figure for all prompts and
raters of such a world. "prompts only" resamples the prompts alone, for comparison. In a world of equal models, the
statement that people prefer one of them is wrong as often as the interval misses one half.
"""

import argparse
import sys
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import user_study


# prompts, raters, mean (0: equal models), deviation over prompts and over raters, share of ties
WORLDS = [(100, 10, 0.4, 1.0, 0.0, 0), (100, 10, 0.4, 1.0, 0.5, 0), (100, 5, 0.4, 1.0, 0.5, 0)]
WORLDS += [(100, 25, 0.4, 1.0, 0.5, 0), (450, 30, 0.4, 1.5, 0.3, 0), (40, 8, 0.8, 1.0, 0.3, 0)]
WORLDS += [(100, 10, 0.0, 1.0, 0.5, 0), (100, 10, 0.4, 1.0, 0.5, 0.3), (100, 10, 0.0, 1.0, 0.5, 0.3)]
WORLDS += [(100, 5, 0.0, 1.0, 0.5, 0), (100, 3, 0.0, 1.0, 0.5, 0), (100, 1, 0.0, 1.0, 0.5, 0)]
VOTES = 5  # on each comparison; fewer if there are fewer raters


def draw(rng: np.random.Generator, effects: np.ndarray, ties: float) -> tuple[np.ndarray, np.ndarray]:
    """Votes for the first and for the second model, in the shape of `effects`; the others are ties."""
    first = rng.random(effects.shape) < 1 / (1 + np.exp(-effects))
    said = rng.random(effects.shape) >= ties if ties else np.ones_like(first)
    return first & said, ~first & said


def decide(first: np.ndarray, second: np.ndarray, votes: int) -> np.ndarray:
    """1, 0 or, without a majority, 0.5 for each row."""
    return 0.5 + 0.5 * (2 * first.sum(axis=1) > votes) - 0.5 * (2 * second.sum(axis=1) > votes)


def spread_votes(rng: np.random.Generator, n_prompts: int, n_raters: int) -> np.ndarray:
    """Who votes on what, (n_prompts, n_raters): each prompt has VOTES votes, raters about as many as each other."""
    votes = np.zeros((n_prompts, n_raters))
    for row in votes:
        row[np.lexsort((rng.random(n_raters), votes.sum(axis=0)))[:VOTES]] = 1
    return votes


def coverage(world: tuple, studies: int, seed: int) -> list[float]:
    """Shares of the studies whose interval holds the truth: share of votes, win rate, win rate over prompts only."""
    n_prompts, n_raters, mean, of_prompts, of_raters, ties = world
    n_votes = min(VOTES, n_raters)
    rng, held = np.random.default_rng(seed), np.zeros(3)
    many = mean + of_prompts * rng.normal(size=(200_000, 1)) + of_raters * rng.normal(size=(200_000, n_votes))
    many = draw(rng, many, ties)
    truth = (0.5 + (many[0].mean() - many[1].mean()) / 2, decide(*many, n_votes).mean())
    if not mean:
        truth = (0.5, 0.5)
    for study in range(studies):
        votes = spread_votes(rng, n_prompts, n_raters)
        effects = of_prompts * rng.normal(size=(n_prompts, 1)) + of_raters * rng.normal(size=n_raters)
        first, second = (votes * answers for answers in draw(rng, mean + effects, ties))
        decisions = decide(first, second, n_votes)
        plain = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=1000) @ decisions / n_prompts
        of_wins, of_votes = user_study.bootstrap(first, second, votes, study, 1000)
        intervals = [of_votes, of_wins, np.percentile(plain, [2.5, 97.5])]
        held += [low <= truth[min(n, 1)] <= high for n, (low, high) in enumerate(intervals)]
    return (held / studies).tolist()


def main():
    parser = argparse.ArgumentParser(description="Coverage of the intervals of user_study.py.")
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(
        "| prompts | raters | mean | deviation over prompts, raters | ties | share of votes | win rate | prompts only |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for world in WORLDS:
        cells = [f"{value:.3f}" for value in coverage(world, args.studies, args.seed)]
        settings = [*world[:3], f"{world[3]}, {world[4]}", world[5]]
        print("| " + " | ".join(map(str, settings + cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
