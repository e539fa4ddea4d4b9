# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets", "fastapi", "gradio", "huggingface_hub", "matplotlib", "numpy", "pillow", "pyarrow", "pyyaml", "scipy",
#     "tqdm", "transformers", "trl", "uvicorn",
# ]
# ///
"""A blinded user study: people say which of two pictures is better, and their votes become figures and data.

    python user_study.py serve --study_dir outputs/study --evaluation_dir outputs/evaluation --prompts heldout.txt \
        --num_prompts 100 --attention_checks 4

This takes the images that evaluate.py drew, samples prompts, and shows a page at http://127.0.0.1:7860: a prompt, two
pictures, three questions. Raters do not see which model drew what. `--questions overall` asks one question, as the
RankDPO paper does. The study and all votes are in `--study_dir`; after a crash, `serve --study_dir outputs/study` goes
on. Images of any models:

    python user_study.py serve --study_dir outputs/study --images ours=/data/ours/{index:05d}.png \
        theirs=/data/theirs/{index:05d}.png --prompts hpsv2 --per_category 25

Majorities, win rates with intervals, agreement, a table and a chart; and into the card of a LoRA on the Hub:

    python user_study.py tally --study_dir outputs/study
    python user_study.py tally --study_dir outputs/study --push_to_hub --hub_model_id user/rankdpo-sdxl

The votes as preference pairs, for score_pairs.py and train_dpo_qsd.py, or as rankings, for train_rankdpo_*.py:

    python user_study.py export --study_dir outputs/study --output_dir outputs/people-pairs
    python user_study.py export --study_dir outputs/study --export_format ranked --output_dir outputs/people-ranked

The page as a Space on the Hub, with the votes in a private dataset:

    python user_study.py space --study_dir outputs/study --hub_dataset_id user/votes --hub_space_id user/study \
        --push_to_hub
"""

import argparse
import csv
import errno
import fcntl
import hashlib
import hmac
import itertools
import json
import logging
import operator
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load ends without a traceback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import DatasetInfo, Features, Image, List, SplitDict, SplitInfo, Value, load_dataset, load_dataset_builder
from datasets import config as datasets_config
from datasets.info import DatasetInfosDict
from huggingface_hub import CardData, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, parse_ratelimit_headers
from matplotlib.figure import Figure
from PIL import Image as PILImage
from PIL import ImageOps
from scipy.stats import binomtest
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from trl import TrlParser


# The questions of the DPO-QSD paper, and RankDPO's one.
QUESTIONS = {
    "general": "Which image do you prefer given the prompt?",
    "appeal": "Which image is more visually appealing? Leave the prompt aside.",  # the page hides it
    "alignment": "Which image better fits the text description?",
    "overall": "Which image is better overall, in how well it fits the text and in how good it looks?",
}
CONSENT = (
    "You compare pictures that computers drew. Your answers are stored under a random number, without your name or "
    "address, and may be published. You may stop at any time. Some pictures may be unpleasant."
)
STUDY, VOTES, PICTURES = "study.json", "votes.jsonl", "pictures"  # what a study's folder holds
MAKING = ("evaluation_dir", "images", "prompts", "num_prompts", "per_category", "seed", "questions", "allow_ties")
MAKING += (
    "category_column",
    "models",
    "baseline",
    "votes_per_comparison",
    "comparisons_per_rater",
    "attention_checks",
    "max_failed_checks",
    "picture_size",
    "consent",
)
HELD_MINUTES = 60  # a comparison that was shown and not answered goes to somebody else after this time
PUBLISH_SECONDS = 60  # between two commits of votes
GREY = (128, 128, 128)
FEW_PROMPTS, FEW_RATERS = 25, 5  # an interval over fewer prompts or raters carries a warning
CHECK_SPACING = 10  # a test pair comes after so many comparisons, or sooner where a rater sees few
DATA_FILES = ("data/train-*-of-*.parquet",)
# Copied from build_synpic.CARD_FACTS
CARD_FACTS = ("size_categories", "configs", "dataset_info")  # the metadata of the card that every run replaces
CARD_BEGIN = "<!-- user_study.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what user_study.py wrote. -->"


# Copied from build_synpic.flag
def flag(default, help: str, **metadata):
    """A field with its help, its range (see RANGES), `may_change`: whether a resumed run may set it differently, and
    `group`: the title of the flags from here on in --help."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


@dataclass
class ScriptArguments:
    command: Literal["serve", "space", "tally", "export"] = flag(
        "serve", "What to do; stands as the first word, without the flag's name.", group="Study"
    )
    study_dir: str = flag("outputs/study", "Folder of the study: prompts, pictures and votes.")
    output_dir: str | None = flag(None, "Folder that tally, export or space writes. Default: in --study_dir.")
    seed: int = flag(0, "Seeds the sample and the bootstrap.", min=0, max=2**32 - 1)
    evaluation_dir: str | None = flag(None, "Folder of evaluate.py, with the images that it drew.", group="A new study")
    models: list[str] = flag(list, "Which models of --evaluation_dir. Default: all.")
    images: list[str] = flag(list, "name=TEMPLATE of other models' pictures, e.g. a=/data/a/{index:05d}.png.")
    baseline: str | None = flag(None, "Compare every model with this one only. Default: every two models.")
    prompts: str | None = flag(None, "File, URL, dataset or named set that the images were drawn from, in its order.")
    prompt_column: str | None = flag(None, "Column of the prompts. Default: prompt, or the named set's.")
    prompt_split: str | None = flag(None, "Split of a dataset. Default: train, or the named set's.")
    category_column: str | None = flag(None, "Column of categories. Default: the named set's.")
    max_prompts: int | None = flag(None, "The images are of the first N distinct prompts.", min=1)
    num_prompts: int = flag(100, "Prompts to sample.", min=1)
    per_category: int | None = flag(None, "Prompts to sample from each category, instead of --num_prompts.", min=1)
    questions: list[str] = flag(
        lambda: ["general", "appeal", "alignment"],
        f"{', '.join(QUESTIONS)}, or name=text of your own; the answer must be the better picture.",
    )
    allow_ties: bool = flag(False, "Raters may answer that they see no difference.")
    votes_per_comparison: int = flag(5, "Raters who see each comparison.", min=1)
    comparisons_per_rater: int | None = flag(None, "At most so many comparisons for one rater. Default: all.", min=1)
    attention_checks: int = flag(0, "Hidden test pairs per rater: a picture and noise; with ties, also itself.", min=0)
    max_failed_checks: int | None = flag(
        None, "Raters who fail more test pairs are left out. Default: 0; for tally and export, the study's.", min=0
    )
    picture_size: int = flag(1024, "Longest side of the pictures that raters see, in pixels.", min=16, max=4096)
    consent: str = flag(CONSENT, "What raters read before they begin.")
    host: str = flag("127.0.0.1", "Address to listen on. 0.0.0.0: all of this machine's.", group="Page")
    port: int = flag(7860, "Port to listen on.", min=1, max=65535)
    question: str | None = flag(
        None, "The question whose votes are exported. Default: the study's first.", group="Tally and export"
    )
    export_format: Literal["pairs", "ranked"] = flag("pairs", "pairs: Pick-a-Pic's columns. ranked: Syn-Pic's.")
    push_to_hub: bool = flag(False, "Upload: votes (serve), Space, results (tally) or dataset (export).", group="Hub")
    hub_dataset_id: str | None = flag(None, "Dataset of the votes (serve, space; private), or of the export.")
    hub_space_id: str | None = flag(None, "Repository of the Space.")
    hub_model_id: str | None = flag(None, "Repository of the LoRA whose card gets the results.")
    hub_private_repo: bool = flag(False, "Make a new repository private. The dataset of the votes always is.")

    def __post_init__(self):
        check_ranges(self)
        if self.command == "serve" and self.output_dir:
            raise SystemExit("--output_dir is for the other commands: serve writes to --study_dir")
        if self.prompts:
            complete_prompt_flags(self)
        parse_questions(self.questions)
        folders = {"serve": "", "space": "space", "tally": "tally", "export": self.export_format}
        self.output_dir = self.output_dir or str(Path(self.study_dir, folders[self.command]))
        ids = {"serve": "hub_dataset_id", "space": "hub_space_id", "tally": "hub_model_id", "export": "hub_dataset_id"}
        needed = [ids[self.command]] * self.push_to_hub + ["hub_dataset_id"] * (self.command == "space")
        if missing := [name for name in needed if not getattr(self, name)]:
            raise SystemExit(f"--{missing[0]} is missing: name the repository, e.g. user/study")


# ----------------------------------------------------------------------------------------------------------------------
# Who sees what
# ----------------------------------------------------------------------------------------------------------------------


def sample_prompts(categories: list[str], num_prompts: int, per_category: int | None, seed: int) -> list[int]:
    """Numbers of the prompts of a study, ascending: drawn without replacement, from all or from each category.

    Exits with one line if there are too few.
    """
    rng = np.random.default_rng(seed)
    groups = {"": range(len(categories))}
    if per_category:
        groups = {name: [i for i, c in enumerate(categories) if c == name] for name in dict.fromkeys(categories)}
    wanted, flag_name = (per_category, "--per_category") if per_category else (num_prompts, "--num_prompts")
    for name, members in groups.items():
        if len(members) < wanted:
            where = f"category {name!r} has" if name else "there are"
            raise SystemExit(f"{flag_name} {wanted}: {where} only {len(members)} prompts: choose fewer")
    return sorted(int(i) for members in groups.values() for i in rng.choice(members, wanted, replace=False))


def model_pairs(models: list[str], baseline: str | None) -> list[tuple[str, str]]:
    """Which models are compared: every other one with the baseline, or every two."""
    if baseline:
        return [(name, baseline) for name in models if name != baseline]
    return list(itertools.combinations(models, 2))


def keyed(secret: str, *parts) -> str:
    """A number in hex that looks random without the study's secret, and is the same at every start."""
    return hmac.new(secret.encode(), "|".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()[:32]


def next_comparison(loads: dict[str, int], seen: set[str], wanted: int, secret: str, rater: str) -> str | None:
    """The comparison that a rater sees next: the one with the fewest raters, of those that still want some and that
    this rater has not seen; among equals in an order of the rater's own.

    Args:
        loads: comparison → raters who have answered it, or are looking at it.
    """
    left = [item for item, load in loads.items() if load < wanted and item not in seen]
    return min(left, key=lambda item: (loads[item], keyed(secret, "order", rater, item)), default=None)


def first_goes_left(secret: str, rater: str, pair: Sequence[str], number: int) -> bool:
    """Whether the first model of a pair stands on the left, the `number`-th time that a rater sees this pair of models:
    once in every two times, at random. So nobody sees a model on one side more often."""
    first = int(keyed(secret, "side", rater, *pair, number // 2), 16) % 2 == 0
    return first == (number % 2 == 0)


def check_is_due(comparisons: int, checks: int, limit: int, all_checks: int) -> bool:
    """Whether a test pair comes next, after so many comparisons and test pairs: they are spread evenly, and no wider
    than CHECK_SPACING, since most raters end before the limit of what one may see."""
    spread = min(limit, CHECK_SPACING * (all_checks + 1))
    return checks < all_checks and comparisons >= (checks + 1) * spread // (all_checks + 1)


def is_failed(left: str, right: str, answer: str) -> bool:
    """Whether an answer to a test pair is wrong: the noise was chosen, or one of two equal pictures."""
    chosen = {"left": left, "right": right}.get(answer, answer)
    return chosen != "tie" if left == right else chosen in ("noise", "tie")


# ----------------------------------------------------------------------------------------------------------------------
# What the votes say
# ----------------------------------------------------------------------------------------------------------------------


def final_votes(log: Iterable[dict]) -> list[dict]:
    """The votes that count: of every rater, comparison and question the last one, with the two sides as they were
    shown. "chosen": the model's name, or "tie"."""
    shown, votes = {}, {}
    for line in log:
        key = line["rater"], line["item"]
        if "left" in line:
            shown[key] = {"left": line["left"], "right": line["right"]}
        elif key in shown:
            votes[*key, line["question"]] = line | shown[key]
    sides = {"left", "right"}
    return [vote | {"chosen": vote[vote["answer"]] if vote["answer"] in sides else "tie"} for vote in votes.values()]


def failed_checks(votes: list[dict]) -> dict[str, int]:
    """Rater → test pairs with a wrong answer."""
    wrong = {
        (vote["rater"], vote["item"])
        for vote in votes
        if vote["item"].startswith("check") and is_failed(vote["left"], vote["right"], vote["answer"])
    }
    return dict(Counter(rater for rater, _ in wrong))


def kept_votes(votes: list[dict], max_failed_checks: int) -> tuple[list[dict], list[str]]:
    """The votes on comparisons without those of excluded raters, and these raters: who failed more test pairs."""
    excluded = sorted(rater for rater, number in failed_checks(votes).items() if number > max_failed_checks)
    left_out = set(excluded)
    return [v for v in votes if v["rater"] not in left_out and not v["item"].startswith("check")], excluded


def majority(counts: np.ndarray) -> np.ndarray:
    """The decision of each comparison: the option with more than half of the votes.

    Args:
        counts: (n, 3), votes for the first model, for the second, for a tie; at least one a row.

    Returns:
        (n,): 1 the first model, 0 the second, 0.5 neither: an even split, or a tie.
    """
    more_than_half = 2 * counts > counts.sum(axis=1, keepdims=True)
    return np.where(more_than_half[:, 0], 1.0, np.where(more_than_half[:, 1], 0.0, 0.5))


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Fleiss' kappa: agreement beyond chance, 1 at most, 0 as by chance. Rows with a single vote say nothing about
    agreement; rows may have different numbers of votes (then each row weighs the same).

    Args:
        counts: (n, options), votes for each option; None if all votes are equal, or no row has two.
    """
    counts = counts[counts.sum(axis=1) >= 2].astype(np.float64)
    if not len(counts):
        return None
    n = counts.sum(axis=1)
    agreement = ((counts * (counts - 1)).sum(axis=1) / (n * (n - 1))).mean()
    chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return float((agreement - chance) / (1 - chance)) if chance < 1 else None


def bootstrap_share(wins: np.ndarray, votes: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the share of votes. Prompts and raters are both resampled, with replacement: a vote
    counts as often as its prompt was drawn, times as often as its rater was.

    Args:
        wins, votes: (n_prompts, n_raters); wins for the first model (a tie is half a win), and all votes.
    """
    rng, shares, block = np.random.default_rng(seed), [], 500
    for _ in range(0, resamples, block):
        prompts, raters = (rng.multinomial(n, np.full(n, 1 / n), size=block).astype(np.float64) for n in votes.shape)
        total = ((prompts @ votes) * raters).sum(axis=1)
        with np.errstate(invalid="ignore"):  # no vote was drawn: only with very few votes
            shares.append(((prompts @ wins) * raters).sum(axis=1) / total)
    low, high = np.nanpercentile(np.concatenate(shares), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_majority(
    first: np.ndarray, second: np.ndarray, votes: np.ndarray, seed: int, resamples: int = 10_000
) -> tuple[float, float]:
    """95 % interval of the share of comparisons that the first model wins by majority; undecided ones count half.

    Prompts and raters are resampled as above, and every resample decides anew. Its raters are fewer than there were
    (some are drawn twice), so its majorities are closer to one half; the spread of the resamples is therefore laid
    around the figure itself.

    Args:
        first, second, votes: (n_prompts, n_raters); votes for each of the two models, and all votes.
    """
    rng, shares, block = np.random.default_rng(seed), [], 500
    for _ in range(0, resamples, block):
        prompts, raters = (rng.multinomial(n, np.full(n, 1 / n), size=block).astype(np.float64) for n in votes.shape)
        twice_first, twice_second, all_votes = 2 * raters @ first.T, 2 * raters @ second.T, raters @ votes.T
        decisions = 0.5 + 0.5 * (twice_first > all_votes) - 0.5 * (twice_second > all_votes)
        weights = prompts * (all_votes > 0)
        with np.errstate(invalid="ignore"):  # no vote was drawn: only with very few votes
            shares.append((weights * decisions).sum(axis=1) / weights.sum(axis=1))
    shares = np.concatenate(shares)
    ties = votes - first - second
    figure = majority(np.stack([first.sum(axis=1), second.sum(axis=1), ties.sum(axis=1)], axis=1)).mean()
    low, high = np.nanpercentile(shares - np.nanmean(shares) + figure, [2.5, 97.5])
    return float(max(low, 0.0)), float(min(high, 1.0))


def agreement_with_others(votes: list[dict]) -> dict[str, float]:
    """Rater → share of the rater's votes that agree with the majority of the other raters, where they have one."""
    counts, agreed = {}, {}
    for vote in votes:
        counts.setdefault((vote["item"], vote["question"]), Counter())[vote["chosen"]] += 1
    for vote in votes:
        others = counts[vote["item"], vote["question"]] - Counter([vote["chosen"]])
        top, number = max(others.items(), key=operator.itemgetter(1), default=(None, 0))
        if 2 * number > others.total():
            agreed.setdefault(vote["rater"], []).append(top == vote["chosen"])
    return {rater: float(np.mean(values)) for rater, values in agreed.items()}


def tally(record: dict, log: Iterable[dict], max_failed_checks: int, seed: int) -> dict:
    """All figures of a study.

    Args:
        record: of study.json; log: the lines of votes.jsonl.

    Returns:
        {"raters": counts and each rater's figures, "pairs": model → other → question → figures}.
    """
    everything = final_votes(log)
    kept, excluded = kept_votes(everything, max_failed_checks)
    checks = {(vote["rater"], vote["item"]) for vote in everything if vote["item"].startswith("check")}
    failed, seen = failed_checks(everything), Counter(rater for rater, _ in checks)
    n_votes = sum(not vote["item"].startswith("check") for vote in everything)
    agreement, counts = agreement_with_others(kept), Counter(vote["rater"] for vote in kept)
    raters = {
        "n_raters": len({vote["rater"] for vote in everything}),
        "n_excluded": len(excluded),
        "n_votes": len(kept),
        "n_votes_excluded": n_votes - len(kept),
        "excluded": excluded,
        "each": {
            rater: {
                "votes": counts[rater],
                "checks": seen[rater],
                "failed_checks": failed.get(rater, 0),
                "agreement": agreement.get(rater),
            }
            for rater in sorted(counts)
        },
    }
    pairs = {}
    for name, other in record["pairs"]:
        of_pair = [vote for vote in kept if {vote["left"], vote["right"]} == {name, other}]
        for question in record["questions"]:
            chosen = [vote for vote in of_pair if vote["question"] == question]
            figures = pair_figures(chosen, name, other, seed) if chosen else {"n_comparisons": 0, "n_votes": 0}
            pairs.setdefault(name, {}).setdefault(other, {})[question] = figures
    return {"raters": raters, "pairs": pairs}


def pair_figures(votes: list[dict], name: str, other: str, seed: int) -> dict:
    """The figures of one question about two models."""
    items, raters = (sorted({vote[key] for vote in votes}) for key in ("item", "rater"))
    rows, columns = ({key: i for i, key in enumerate(keys)} for keys in (items, raters))
    # One comparison of two models per prompt: the rows are the prompts.
    answers = np.zeros((3, len(items), len(raters)))
    for vote in votes:
        answers[(name, other, "tie").index(vote["chosen"]), rows[vote["item"]], columns[vote["rater"]]] = 1.0
    counts, all_votes = answers.sum(axis=2).T, answers.sum(axis=0)
    decisions, wins = majority(counts), answers[0] + 0.5 * answers[2]
    decided = decisions != 0.5
    low, high = bootstrap_majority(answers[0], answers[1], all_votes, seed)
    n_wins = int((decisions == 1).sum())
    figures = {
        "n_comparisons": len(items),
        "n_votes": len(votes),
        "n_raters": len(raters),
        "votes_per_comparison": [int(counts.sum(axis=1).min()), int(counts.sum(axis=1).max())],
        "wins": n_wins,
        "losses": int((decisions == 0).sum()),
        "undecided": int((~decided).sum()),
        "win_rate": float(decisions.mean()),
        "win_rate_ci95": (low, high),
        "win_rate_decided": float(decisions[decided].mean()) if decided.any() else None,
        "sign_test_p": float(binomtest(n_wins, int(decided.sum())).pvalue) if decided.any() else None,
        "vote_share": float(wins.sum() / all_votes.sum()),
        "vote_share_ci95": bootstrap_share(wins, all_votes, seed),
        "tie_share": float(answers[2].sum() / all_votes.sum()),
        "fleiss_kappa": fleiss_kappa(counts),
        "left_share": float(np.mean([vote["answer"] == "left" for vote in votes if vote["answer"] != "tie"] or [0.5])),
    }
    return figures | {"verdict": verdict(name, other, figures)}


def verdict(name: str, other: str, figures: dict) -> str:
    """What the interval of the win rate says, in plain words."""
    low, high = figures["win_rate_ci95"]
    shown = f"{figures['win_rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"
    few = f" Only {figures['n_comparisons']} comparisons: the interval says little." * (
        figures["n_comparisons"] < FEW_PROMPTS
    )
    if figures["n_raters"] < FEW_RATERS:
        few += f" Only {figures['n_raters']} raters: other people may judge otherwise, and the interval is too narrow."
    if low > 0.5:
        text = f"People prefer {name} to {other}: {shown}. Chance alone is an unlikely cause."
    elif high < 0.5:
        text = f"People prefer {other} to {name}: {name} wins {shown}. Chance alone is an unlikely cause."
    else:
        text = f"No preference is shown: {name} wins {shown}, which contains 50 %."
    return text + few


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


def main(args: ScriptArguments) -> None:
    {"serve": serve, "space": write_space, "tally": report, "export": export}[args.command](args)


def serve(args: ScriptArguments) -> None:
    """Shows the page until a signal ends it. Makes the study first, unless it exists."""
    need_gradio()
    folder = Path(args.study_dir)
    repo_id = open_vote_repository(args) if args.push_to_hub else None
    if repo_id:
        fetch_study(repo_id, folder)
    check_study_dir(folder)
    remove_temporary_files(folder / PICTURES)
    if args.prompts or not (folder / STUDY).exists():
        make_study(args)
    check_settings(folder, given_settings(args))
    study = Study(folder)
    with page_server(study, args.host, args.port):
        host = "127.0.0.1" if args.host == "0.0.0.0" else args.host
        print(f"{len(study.comparisons)} comparisons, {study.record['votes_per_comparison']} raters each", flush=True)
        print(f"the page is at http://{host}:{args.port}: Ctrl-C ends it, and the same command goes on", flush=True)
        published = time.monotonic()
        while not stop_signals:
            time.sleep(0.2)
            if repo_id and time.monotonic() - published > PUBLISH_SECONDS:
                publish_votes(repo_id, study)
                published = time.monotonic()
    if repo_id:
        publish_votes(repo_id, study)
    study.log.close()
    stop_if_asked(f"all votes are in {folder / VOTES}: the same command goes on")


def report(args: ScriptArguments) -> None:
    """Writes results.json, results.md and chart.png, and puts them into the card of a LoRA."""
    record = read_study(Path(args.study_dir))
    check_output_dir(Path(args.output_dir), {"results.json": '"votes_per_comparison"'})
    repo_id = create_repo(args.hub_model_id, "model", args.hub_private_repo) if args.push_to_hub else None
    log, _ = read_log(Path(args.study_dir, VOTES))
    most = max_failed_checks(args, record)
    results = tally(record, log, most, args.seed)
    if not results["raters"]["n_votes"]:
        raise SystemExit(
            f"{Path(args.study_dir, VOTES)}: no votes to count: {results['raters']['n_excluded']} raters were left out"
        )
    settings = {key: record[key] for key in ("questions", "allow_ties", "votes_per_comparison", "n_checks", "seed")}
    settings |= {"n_prompts": len(record["prompts"]), "max_failed_checks": most}
    output_dir, table = Path(args.output_dir), markdown_report(record, results, most)
    write_text(output_dir / "results.json", json.dumps({"settings": settings, **results}, indent=2) + "\n")
    write_text(output_dir / "results.md", table)
    draw_chart(results, output_dir / "chart.png")
    print(table)
    print(", ".join(str(output_dir / name) for name in ("results.json", "results.md", "chart.png")))
    if repo_id:
        publish_results(args, repo_id, results, table)


def export(args: ScriptArguments) -> None:
    """Writes the votes of one question as a preference dataset."""
    folder, output_dir = Path(args.study_dir), Path(args.output_dir)
    record = read_study(folder)
    question = args.question or next(iter(record["questions"]))
    if question not in record["questions"]:
        raise SystemExit(f"--question {question}: the study asks {', '.join(record['questions'])}")
    if args.push_to_hub:
        args.hub_dataset_id = create_repo(args.hub_dataset_id, "dataset", args.hub_private_repo)
        check_dataset_repo(args.hub_dataset_id, DATA_FILES)
    check_output_dir(output_dir, {UNFINISHED: "user_study.py", "README.md": CARD_BEGIN})
    check_card(output_dir / "README.md")
    votes, _ = kept_votes(final_votes(read_log(folder / VOTES)[0]), max_failed_checks(args, record))
    votes = [vote for vote in votes if vote["question"] == question]
    make = pair_rows if args.export_format == "pairs" else ranked_rows
    rows, left_out = make(record, folder, votes)
    if not rows:
        raise SystemExit(f"{folder / VOTES}: no {args.export_format} to export for --question {question}: {left_out}")
    write_dataset(args, rows, question, left_out)
    if args.push_to_hub:
        publish(args, DATA_FILES, ())


def write_space(args: ScriptArguments) -> None:
    """Writes the folder of a Space that serves the study. Its pictures have names without meaning; which model drew
    which stands in study.json, which goes into the private dataset of the votes."""
    folder, output_dir = Path(args.study_dir), Path(args.output_dir)
    record = read_study(folder)
    check_output_dir(output_dir, {"app.py": SPACE_APP.partition(" Votes")[0]})
    if args.push_to_hub:
        args.hub_space_id = create_repo(args.hub_space_id, "space", args.hub_private_repo, space_sdk="gradio")
        args.hub_dataset_id = open_vote_repository(args)
    script = Path(__file__)
    header = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.M | re.S)[1]
    packages = re.findall(r'"([\w-]+)"', header.partition("dependencies")[2])
    packages = [GRADIO if name == "gradio" else name for name in packages]
    texts = {
        "app.py": SPACE_APP.format(dataset=args.hub_dataset_id),
        "requirements.txt": "\n".join([f"--extra-index-url {CPU_WHEELS}", "torch", *packages, ""]),
        "README.md": SPACE_CARD.format(dataset=args.hub_dataset_id),
        script.name: script.read_text(),
    }
    for name, text in texts.items():
        write_text(output_dir / name, text)
    names = remove_other_pictures(record, output_dir)
    for name in sorted(names):
        write_bytes(output_dir / PICTURES / name, (folder / PICTURES / name).read_bytes())
    print(f"the Space is in {output_dir}")
    if args.push_to_hub:
        publish_space(args, [*texts, *(f"{PICTURES}/{name}" for name in sorted(names))])


# ----------------------------------------------------------------------------------------------------------------------
# The study's folder
# ----------------------------------------------------------------------------------------------------------------------


def parse_questions(items: list[str]) -> dict[str, str]:
    """Name → text of the questions of --questions. Exits with one line if one is wrong."""
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        text = text.strip() or QUESTIONS.get(name)
        if not re.fullmatch(r"\w{1,40}", name) or not text:
            known = ", ".join(QUESTIONS)
            raise SystemExit(f"--questions {item!r}: must be one of {known}, or name=text with a name of letters")
        if name in found:
            raise SystemExit(f"--questions: {name} is named twice")
        found[name] = text
    return found


def check_study_dir(folder: Path) -> None:
    """Exits with one line if the folder holds something else than a study."""
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    others = set(names) - {STUDY, VOTES, PICTURES, "space", "tally", "pairs", "ranked"}
    if others and not (folder / STUDY).exists():
        raise SystemExit(f"--study_dir {folder} holds other files ({min(others)}): choose another folder")


def check_output_dir(folder: Path, marks: dict[str, str]) -> None:
    """Exits with one line unless the folder is empty, or the command's own.

    Args:
        marks: file → a text that it holds in such a folder; one of them is enough.
    """
    there = {name: mark for name, mark in marks.items() if (folder / name).is_file()}
    own = any(mark.encode() in (folder / name).read_bytes() for name, mark in there.items())
    data = [file.name for file in (folder / "data").glob("*.parquet")]  # others would count as rows of the dataset
    if not own and not is_empty(folder) or any(not re.fullmatch(r"train-\d{5}-of-\d{5}\.parquet", n) for n in data):
        raise SystemExit(f"--output_dir {folder} holds other files: choose another folder")


def max_failed_checks(args: ScriptArguments, record: dict) -> int:
    """What --max_failed_checks says, or what the study was made with."""
    return record.get("max_failed_checks", 0) if args.max_failed_checks is None else args.max_failed_checks


def read_study(folder: Path) -> dict:
    """The record of a study. Exits with one line if there is none."""
    try:
        record = read_json(folder / STUDY)
    except Damaged as error:
        raise SystemExit(f"{error}: restore it, or begin a new study in another --study_dir") from None
    if not record:
        raise SystemExit(f"--study_dir {folder} holds no study: serve makes one, with --prompts and --evaluation_dir")
    return record


def make_study(args: ScriptArguments) -> None:
    """Samples prompts, writes the pictures as raters will see them, and then study.json. If the study exists, exits
    with one line unless it was made with these settings."""
    folder = Path(args.study_dir)
    if not args.prompts:
        raise SystemExit(f"{folder} holds no study: give --prompts, and --evaluation_dir or --images")
    keep = (args.category_column,) if args.category_column else ()
    whole_rows = any("{row[" in item for item in args.images)
    source = (args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    rows, places = read_prompts(*source, keep, whole_rows)
    categories = [str(row[args.category_column]) if keep else "" for row in rows]
    if args.per_category and not keep:
        raise SystemExit("--per_category needs --category_column, the column of the categories")
    settings = {name: getattr(args, name) for name in MAKING} | {"all_prompts": prompts_digest(rows)}
    if (folder / STUDY).exists():
        return check_settings(folder, settings)
    sources = find_images(args, rows, places, categories)
    if args.baseline and args.baseline not in sources:
        raise SystemExit(f"--baseline {args.baseline}: no such model; the models are {', '.join(sources)}")
    chosen = sample_prompts(categories, args.num_prompts, args.per_category, args.seed)
    pairs = model_pairs(list(sources), args.baseline)
    rng = np.random.default_rng([args.seed, 1])
    checks = []
    for number in range(args.attention_checks):
        kind = "same" if args.allow_ties and number % 2 else "noise"
        checks.append(
            {"prompt": int(rng.integers(len(chosen))), "model": list(sources)[number % len(sources)], "kind": kind}
        )
    record = {
        "models": list(sources),
        "pairs": pairs,
        "prompts": [{"index": i, "prompt": rows[i]["prompt"], "category": categories[i]} for i in chosen],
        "checks": checks,
        "n_checks": len(checks),
        "questions": parse_questions(args.questions),
        "allow_ties": args.allow_ties,
        "votes_per_comparison": args.votes_per_comparison,
        "comparisons_per_rater": args.comparisons_per_rater,
        "max_failed_checks": args.max_failed_checks or 0,
        "seed": args.seed,
        "consent": args.consent,
        "settings": settings,
        "secret": secrets.token_hex(32),
    }
    record = json.loads(json.dumps(record))  # as it will be read
    for number, prompt in enumerate(progress_bar(record["prompts"], desc="pictures", unit="prompt")):
        stop_if_asked("the study is not made yet: the same command makes it")
        write_pictures(record, folder, number, {name: find(prompt["index"]) for name, find in sources.items()}, args)
    remove_other_pictures(record, folder)
    write_json(folder / STUDY, record)


def check_settings(folder: Path, settings: dict) -> None:
    """Exits with one line if the study was made with other settings than these."""
    previous = read_study(folder)["settings"]
    for name, value in settings.items():
        if previous.get(name) != value:
            problem = f"{folder} holds a study made with {name} {previous.get(name)}, not {value}"
            raise SystemExit(f"{problem}: choose another --study_dir, or leave the flags out to go on with it")


def given_settings(args: ScriptArguments) -> dict:
    """The settings of a study among the flags that differ from their default."""
    defaults = ScriptArguments()
    return {name: getattr(args, name) for name in MAKING if getattr(args, name) != getattr(defaults, name)}


def prompts_digest(rows: list[dict]) -> str:
    """As evaluate.py records it with its images."""
    return short_hash("\n".join(row["prompt"] for row in rows))


def find_images(
    args: ScriptArguments, rows: list[dict], places: list[dict], categories: list[str]
) -> dict[str, Callable[[int], Path]]:
    """Model → function from a prompt's number to the file of its picture, the first one of several. Exits with one line
    if a model is not there or its images belong to other prompts."""
    found = {}
    if args.evaluation_dir:
        folder = Path(args.evaluation_dir, "images")
        names = sorted(path.parent.name for path in folder.glob("*/settings.json"))
        names.sort(key=lambda name: name == "base")  # win rates are those of the others over the base
        for name in args.models or names:
            if name not in names:
                there = ", ".join(names) or "none"
                raise SystemExit(f"--models {name}: {folder} holds no images of it; it holds {there}")
            if read_json(folder / name / "settings.json").get("prompts") != prompts_digest(rows):
                problem = f"{folder / name} was drawn from other prompts"
                raise SystemExit(f"{problem}: give the --prompts and --max_prompts of evaluate.py")
            found[name] = lambda i, own=folder / name: own / f"{i:05d}_0.png"
    fields = [
        {"index": place["index"], "number": 0, "prompt": row["prompt"], "row": row, "category": category}
        for row, place, category in zip(rows, places, categories)
    ]
    for item in args.images:
        name, _, template = item.partition("=")
        if not re.fullmatch(r"[\w.@-]{1,60}", name) or not template or name in found:
            raise SystemExit(f"--images {item}: must be name=TEMPLATE, with a name of its own")
        found[name] = lambda i, own=template, where=f"--images {item}": template_file(where, own, fields[i])
    if taken := {"noise", "tie"} & set(found):
        raise SystemExit(f"a model may not be called {min(taken)}: give it another name, with --images name=TEMPLATE")
    if len(found) < 2:
        raise SystemExit(f"{len(found)} models: name two or more, with --evaluation_dir or --images")
    return found


def template_file(where: str, template: str, fields_of: dict) -> Path:
    """The file of a prompt's picture; the fields are evaluate.py's."""
    try:
        return Path(template.format(**fields_of))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        names = "{index}, {number} (0), {prompt}, {row[COLUMN]} and {category}"
        raise SystemExit(f"{where}: wrong template: {one_line(error)}; its fields are {names}") from None


def picture_keys(record: dict) -> list[tuple[int, str]]:
    """(number of the prompt, model or "noise") of every picture."""
    keys = list(itertools.product(range(len(record["prompts"])), record["models"]))
    return keys + sorted({(check["prompt"], "noise") for check in record["checks"] if check["kind"] == "noise"})


def file_name(record: dict, key: Sequence) -> str:
    """The name of a picture's file, which says nothing about its model."""
    return keyed(record["secret"], "file", *key) + ".jpg"


def remove_other_pictures(record: dict, folder: Path) -> set[str]:
    """Removes pictures of ours that are not of this study, as a killed run leaves them; returns the study's names."""
    names = {file_name(record, key) for key in picture_keys(record)}
    for file in (folder / PICTURES).glob("*.jpg"):
        if re.fullmatch(r"[0-9a-f]{32}\.jpg", file.name) and file.name not in names:
            file.unlink()
    return names


def write_pictures(record: dict, folder: Path, number: int, files: dict[str, Path], args: ScriptArguments) -> None:
    """Writes the pictures of one prompt so that nothing but the pixels tells them apart: the same size in pixels, the
    same format without metadata, the same number of bytes."""
    pictures = {name: read_picture(name, file) for name, file in files.items()}
    size = np.array([picture.size for picture in pictures.values()]).min(axis=0)
    size = tuple(int(side) for side in np.maximum(size * min(1, args.picture_size / size.max()), 1).round())
    pictures = {
        name: ImageOps.pad(picture, size, PILImage.Resampling.LANCZOS, GREY) for name, picture in pictures.items()
    }
    if (number, "noise") in picture_keys(record):
        squares = np.random.default_rng([record["seed"], number]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pictures["noise"] = PILImage.fromarray(squares).resize(size, PILImage.Resampling.NEAREST)
    contents = {}
    for name, picture in pictures.items():
        buffer = BytesIO()
        PILImage.fromarray(np.asarray(picture)).save(buffer, "JPEG", quality=95, subsampling=0)
        contents[name] = buffer.getvalue()
    length = max(map(len, contents.values()))
    for name, content in contents.items():  # readers of JPEG ignore what follows its end
        write_bytes(folder / PICTURES / file_name(record, (number, name)), content.ljust(length, b"\0"))


def read_picture(name: str, file: Path) -> PILImage.Image:
    try:
        with PILImage.open(file) as picture:
            return to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # PIL raises many kinds
        raise SystemExit(f"picture of {name}: {file} cannot be read: {one_line(error)}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The log of votes
# ----------------------------------------------------------------------------------------------------------------------


def read_log(file: Path) -> tuple[list[dict], int]:
    """The whole lines of a log, and their length in bytes. A last line without its end, which a crash or a write in
    progress leaves, is not among them. Exits with one line if another line is damaged."""
    content, lines = whole_lines(file), []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            if not {"rater", "item"} <= lines[-1].keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise SystemExit(f"{file}: line {number} is damaged: mend or remove it") from None
    return lines, len(content)


def whole_lines(file: Path) -> bytes:
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


class VoteLog:
    """A file of JSON lines that only grows. A line is on the disk when `append` returns; lines of several threads never
    mix. A half-written last line, as a crash may leave it, is cut off at the start."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self.lines, self.size = read_log(file)
        self.published = b""  # the content that the Hub has
        file.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if rest := os.fstat(self.descriptor).st_size - self.size:
            os.ftruncate(self.descriptor, self.size)
            warn(f"{file}: its last line was half-written: {rest} bytes were cut off; that vote was not confirmed")
        os.fsync(self.descriptor)
        sync(file.parent)

    def append(self, line: dict) -> None:
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self.lock:
            try:
                if os.write(self.descriptor, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
                os.fsync(self.descriptor)
            except OSError:
                os.ftruncate(self.descriptor, self.size)
                raise
            self.size += len(content)

    def content(self) -> bytes:
        with self.lock:
            return os.pread(self.descriptor, self.size, 0) if self.descriptor >= 0 else self.file.read_bytes()

    def close(self) -> None:
        with self.lock:
            os.close(self.descriptor)
            self.descriptor = -1


class Study:
    """A study while it is served: who has seen what, and what they answered. All of it is made of the log, so a restart
    changes nothing. The methods that the page calls return what it then shows; threads may call them at once."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder, read_study(folder)
        self.id = keyed(self.record["secret"], "study")[:12]
        self.comparisons = {  # item → number of the prompt, pair of models
            f"{number}-{pair}": (number, tuple(models))
            for number in range(len(self.record["prompts"]))
            for pair, models in enumerate(self.record["pairs"])
        }
        self.shown: dict[str, list[dict]] = {}  # rater → what it was shown, in order
        self.limit = min(self.record["comparisons_per_rater"] or len(self.comparisons), len(self.comparisons))
        self.answers: dict[tuple, dict] = {}  # (rater, item, question) → the line of the last answer, and its turn
        self.turns: Counter[str] = Counter()  # rater → answers recorded
        self.excluded: set[str] = set()  # raters who failed too many test pairs: their votes will not count
        self.raters: dict[str, dict[str, float]] = {item: {} for item in self.comparisons}  # item → rater → when shown
        self.pictures: dict[str, Path] = {}  # name in the page → file
        self.lock = threading.Lock()
        missing = [key for key in picture_keys(self.record) if not self.picture_file(key).exists()]
        if missing:
            raise SystemExit(f"{self.picture_file(missing[0])} is missing: restore it, or begin a new study")
        self.log = VoteLog(folder / VOTES)
        for line in self.log.lines:
            self.take(line)

    def take(self, line: dict) -> None:
        """Takes a line of the log into account."""
        rater, item = line["rater"], line["item"]
        if "left" not in line:
            self.answers[rater, item, line["question"]] = line | {"turn": self.turns[rater]}
            self.turns[rater] += 1
            if item.startswith("check"):
                failed = self.failed_checks(rater) > self.record.get("max_failed_checks", 0)
                (self.excluded.add if failed else self.excluded.discard)(rater)
            return
        self.shown.setdefault(rater, []).append(line)
        if item in self.raters:
            self.raters[item][rater] = line["time"]
        for side in ("left", "right"):
            self.pictures[self.picture_name(line, side)] = self.picture_file((self.prompt_of(item), line[side]))

    def enter(self, rater: str) -> dict:
        """What a rater who comes, or comes back, sees: the first thing that is not answered yet."""
        return self.view(rater, max(len(self.shown.get(rater, [])) - 1, 0))

    def look(self, rater: str, position: int) -> dict:
        """What a rater was shown at this position."""
        return self.view(rater, max(position, 0), back=True)

    def join(self, lines: list[dict]) -> None:
        """Takes in what another log of this study has more: a server that was about to end when this one began went on
        for a moment. Of two answers to the same question the later one counts."""
        theirs = {}
        with self.lock:
            for line in lines:
                key = line["rater"], line["item"]
                mine = next((own for own in self.shown.get(key[0], []) if own["item"] == key[1]), None)
                if "left" in line:
                    theirs[key] = line
                    if mine:
                        continue
                elif mine is None or self.time_of(*key, line["question"]) >= line["time"]:
                    continue
                elif mine["left"] != theirs.get(key, mine)["left"]:  # shown there with its sides exchanged
                    line = line | {"answer": {"left": "right", "right": "left"}.get(line["answer"], line["answer"])}
                self.log.append(line)
                self.take(line)

    def time_of(self, rater: str, item: str, question: str) -> float:
        return self.answers.get((rater, item, question), {"time": 0.0})["time"]

    def answer(
        self, rater: str, position: int, question: str, answer: str, seconds: float, picture: str, turn: int
    ) -> dict:
        """Records an answer, unless it is the last one given: a second click or a second try changes nothing.

        An answer to something else than what stands at this position, or one that an earlier page gave and that comes
        late, is not recorded either: the page then goes on where the rater is.

        Args:
            picture, turn: the left picture and the rater's number of answers, as `view` gave them to the page.
        """
        allowed = ("left", "right", "tie") if self.record["allow_ties"] else ("left", "right")
        if question not in self.record["questions"] or answer not in allowed:
            raise ValueError(f"no such question or answer: {question}, {answer}")
        with self.lock:
            shown = self.shown.get(rater, [])
            at = shown[position] if 0 <= position < len(shown) else None
            is_right = at is not None and picture == self.picture_name(at, "left")
            last = self.answers.get((rater, at["item"], question), {"answer": None, "turn": -1}) if is_right else {}
            is_new = is_right and answer != last["answer"]
            is_late = is_new and int(turn) <= last["turn"]
            if is_new and not is_late:
                line = {"rater": rater, "item": at["item"], "question": question, "answer": answer}
                line |= {"seconds": round(min(max(float(seconds), 0.0), 3600.0), 1), "time": round(time.time(), 1)}
                self.log.append(line)
                self.take(line)
        if not is_right or is_late:
            return self.enter(rater)
        asked = list(self.record["questions"]).index(question) + 1
        if asked < len(self.record["questions"]):
            return self.view(rater, position, asked, back=True)
        return self.view(rater, position + 1)

    def view(self, rater: str, position: int, asked: int = 0, back: bool = False) -> dict:
        """What the page shows at a position: the question number `asked` or, unless the rater went back, the first one
        without an answer. After all that was shown comes the next comparison, or the end."""
        with self.lock:
            shown, loads = self.shown.setdefault(rater, []), self.loads()
            if position >= len(shown) or not back and position == len(shown) - 1:
                self.show_next(rater, loads)
                position = len(shown) - bool(shown and not self.is_done(rater, shown[-1]["item"]))
            done = sum(self.is_done(rater, line["item"]) for line in shown)
            state = {"position": position, "done": done, "total": self.total(rater, loads)}
            state |= {"turn": self.turns[rater], "finished": position >= len(shown)}
            if state["finished"]:
                return state
            line, questions = shown[position], self.record["questions"]
            found = {name: self.answers.get((rater, line["item"], name), {}) for name in questions}
            answers = {name: line.get("answer") for name, line in found.items()}
            if not back:
                asked = next((n for n, answer in enumerate(answers.values()) if not answer), 0)
            prompt = self.record["prompts"][self.prompt_of(line["item"])]["prompt"]
            pictures = [self.picture_name(line, side) for side in ("left", "right")]
            state |= {"prompt": prompt, "pictures": pictures, "questions": list(questions.items()), "answers": answers}
            hides_prompt = list(questions.values())[asked] == QUESTIONS["appeal"]
            return state | {"asked": asked, "ties": self.record["allow_ties"], "hides_prompt": hides_prompt}

    def show_next(self, rater: str, loads: dict[str, int]) -> None:
        """Gives a rater the next test pair or comparison, unless one is not answered yet, or none is left."""
        shown, secret = self.shown[rater], self.record["secret"]
        if shown and not self.is_done(rater, shown[-1]["item"]):
            return
        checks = sum(line["item"].startswith("check") for line in shown)
        mine, n_checks, item = len(shown) - checks, self.record["n_checks"], None
        if mine < self.limit:
            seen = {line["item"] for line in shown}
            item = next_comparison(loads, seen, self.record["votes_per_comparison"], secret, rater)
        # Where no comparison is left, the other test pairs come before the end.
        if check_is_due(mine, checks, self.limit, n_checks) or item is None and mine and checks < n_checks:
            item, check = f"check{checks}", self.record["checks"][checks]
            sides = [check["model"], check["model"] if check["kind"] == "same" else "noise"]
            turned = int(keyed(secret, "side", rater, item), 16) % 2
        elif item is not None:
            sides = list(self.comparisons[item][1])
            number = sum(self.comparisons.get(line["item"], (0, ()))[1] == tuple(sides) for line in shown)
            turned = not first_goes_left(secret, rater, sides, number)
        else:
            return
        left, right = reversed(sides) if turned else sides
        line = {"rater": rater, "item": item, "left": left, "right": right, "time": round(time.time(), 1)}
        self.log.append(line)
        self.take(line)

    def loads(self) -> dict[str, int]:
        """Comparison → raters who have answered it, or were shown it and may still answer; without excluded ones."""
        since = time.time() - 60 * HELD_MINUTES
        return {
            item: sum(
                rater not in self.excluded and (when > since or self.is_done(rater, item))
                for rater, when in raters.items()
            )
            for item, raters in self.raters.items()
        }

    def total(self, rater: str, loads: dict[str, int]) -> int:
        """How much there is to do for a rater, as far as can be seen now."""
        seen = {line["item"] for line in self.shown[rater]}
        mine = sum(item in self.comparisons for item in seen)
        wanted = self.record["votes_per_comparison"]
        left = sum(load < wanted and item not in seen for item, load in loads.items())
        comparisons = min(mine + left, max(self.limit, mine))
        return comparisons + self.record["n_checks"] * (comparisons > 0)

    def failed_checks(self, rater: str) -> int:
        """Test pairs with a wrong answer."""
        keys = [(line, (rater, line["item"], q)) for line in self.shown[rater] for q in self.record["questions"]]
        votes = [line | self.answers[key] for line, key in keys if key in self.answers]
        return failed_checks(votes).get(rater, 0)

    def is_done(self, rater: str, item: str) -> bool:
        return all((rater, item, question) in self.answers for question in self.record["questions"])

    def prompt_of(self, item: str) -> int:
        return self.comparisons[item][0] if item in self.comparisons else self.record["checks"][int(item[5:])]["prompt"]

    def picture_name(self, line: dict, side: str) -> str:
        """The name of a picture in a rater's page: another one for every rater, comparison and side."""
        return keyed(self.record["secret"], "page", line["rater"], line["item"], side, line[side])

    def picture_file(self, key: Sequence) -> Path:
        return self.folder / PICTURES / file_name(self.record, key)


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


def need_gradio() -> None:
    """Exits with one line if what only `serve` needs is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise SystemExit(f"serve needs Gradio: pip install '{GRADIO}' ({one_line(error)})") from None
    if tuple(map(int, gradio.__version__.split(".")[:2])) < (6, 31):
        raise SystemExit(f"serve needs a newer Gradio than {gradio.__version__}: pip install '{GRADIO}'")


def make_app(study: Study):
    """The page as a FastAPI application: Gradio's page with one component of our own, and the pictures."""
    import gradio as gr
    from fastapi import FastAPI, Response

    def welcome(request: dict) -> dict:
        return {"study": study.id, "consent": study.record["consent"]}

    def enter(request: dict) -> dict:
        return study.enter(rater_of(request))

    def look(request: dict) -> dict:
        return study.look(rater_of(request), int(request["position"]))

    def answer(request: dict) -> dict:
        given = [request[name] for name in ("question", "answer", "seconds", "picture", "turn")]
        return study.answer(rater_of(request), int(request["position"]), *given)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/picture/{name}")
    def picture(name: str) -> Response:
        file = study.pictures.get(name)
        if file is None:
            return Response(status_code=404)
        return Response(file.read_bytes(), media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    with gr.Blocks(title="Which picture is better?", analytics_enabled=False) as blocks:
        functions = [welcome, enter, look, answer]
        gr.HTML(html_template=PAGE, css_template=STYLE, js_on_load=SCRIPT, server_functions=functions, elem_id="study")
    options = {"footer_links": [], "ssr_mode": False, "show_error": False}
    return gr.mount_gradio_app(app, blocks, path="", max_file_size=1, **options)  # nobody uploads files here


def rater_of(request: dict) -> str:
    """The rater's id: a random number from the page, or a word from a link."""
    rater = str(request.get("rater", ""))
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", rater):
        raise ValueError("a rater's id has 1 to 64 letters, digits, - or _")
    return rater


@contextmanager
def page_server(study: Study, host: str, port: int) -> Iterator[None]:
    """Serves the page in a thread; exits with one line if that cannot begin."""
    import uvicorn

    # Open pages hold a connection: without a limit, the end would wait for them.
    options = {"log_level": "error", "access_log": False, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(make_app(study), host=host, port=port, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
        if not thread.is_alive():
            raise SystemExit(f"--port {port}: cannot listen at {host}:{port}: is another program there?")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)


PAGE = """
<section data-part="welcome" hidden>
  <h1>Which picture is better?</h1>
  <p data-part="consent"></p>
  <p class="hint">To go on later on another device, keep the link that you see after the start.</p>
  <button class="main" data-part="start">I agree: start</button>
</section>
<section data-part="task" hidden>
  <header>
    <button data-part="back" title="Backspace">&#8592; Back</button>
    <div class="bar"><div data-part="bar"></div></div>
    <span data-part="count"></span>
  </header>
  <p class="prompt" dir="auto" data-part="prompt"></p>
  <div class="pair">
    <img data-part="left" alt="left picture" draggable="false">
    <img data-part="right" alt="right picture" draggable="false">
  </div>
  <p class="question" data-part="question"></p>
  <div class="answers">
    <button data-answer="left">Left <kbd>1</kbd></button>
    <button data-answer="tie" hidden>No difference <kbd>t</kbd></button>
    <button data-answer="right">Right <kbd>2</kbd></button>
  </div>
  <p class="hint">Keys: &#8592; or 1 left, &#8594; or 2 right, <span data-part="tiekey">t no difference, </span>
    Backspace back, z zoom. Click a picture to zoom.</p>
</section>
<section data-part="end" hidden>
  <h1>Thank you!</h1>
  <p>You have answered <span data-part="answered"></span>. Nothing is left for you. You can close this page.</p>
  <button data-part="again">&#8592; Back</button>
</section>
<p class="notice" role="status" data-part="notice" hidden></p>
<div class="zoom" data-part="zoom" hidden><img alt="zoomed picture"><span></span></div>
"""

STYLE = """
{ max-width: 1500px; margin: 0 auto; font-size: 17px; }
[hidden] { display: none !important; }
header { display: flex; gap: 12px; align-items: center; }
.bar { flex: 1; height: 10px; border-radius: 5px; background: #8883; overflow: hidden; }
.bar div { height: 100%; background: #2a7de1; }
.prompt { font-size: 1.15em; margin: 10px 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 7.5em;
  overflow-y: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
.pair img { width: 100%; aspect-ratio: 1; max-height: 62vh; object-fit: contain; cursor: zoom-in; background: #8881;
  border-radius: 6px; margin: 0; }
.question { font-weight: 600; margin: 12px 0 8px; }
.answers { display: flex; gap: 10px; }
.answers button { flex: 1; padding: 14px 4px; font-size: 1em; }
button { margin: 0 !important; font-family: inherit; font-weight: 500; }
button { padding: 8px 14px; border: 1px solid #8888; border-radius: 8px; background: #8881; cursor: pointer; }
button:disabled { opacity: 0.45; cursor: default; }
button.chosen { outline: 3px solid #2a7de1; }
button.main { background: #2a7de1; color: white; font-size: 1.1em; }
kbd { border: 1px solid #8888; border-radius: 4px; padding: 0 5px; font-size: 0.8em; }
.hint { opacity: 0.65; font-size: 0.85em; margin-top: 10px; }
.notice { background: #f7d774; color: black; padding: 8px 12px; border-radius: 6px; }
.zoom { position: fixed; inset: 0; z-index: 1000; background: #000e; display: flex; align-items: center;
  justify-content: center; cursor: zoom-out; }
.zoom img { width: 96vw; height: 94vh; object-fit: contain; margin: 0; }
.zoom span { position: absolute; top: 8px; left: 14px; color: white; }
@media (max-width: 600px) { kbd, .hint { display: none; } .pair { gap: 4px; } }
"""

SCRIPT = r"""
const part = name => element.querySelector(`[data-part="${name}"]`);
const buttons = [...element.querySelectorAll("[data-answer]")];
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
let state = null, rater = null, busy = true, loaded = 0, since = 0, drawn = 0, zoomed = null;
const PAUSE = 300;  // ms: the second half of a double click must not answer the next question

function notice(text) { part("notice").textContent = text; part("notice").hidden = !text; }

// The server may be gone for a moment. To send an answer twice does no harm.
async function ask(name, request) {
  for (let tries = 1; ; tries += 1) {
    let answer;
    try { answer = await server[name]({rater, ...request}); } catch (error) { console.warn(error); }
    if (answer) { notice(""); return answer; }
    const there = await fetch("picture/none").then(() => true, () => false);  // any reply: the server is there
    const problem = there ? "The server reports an error. Please tell those who run the study."
      : "No connection to the server.";
    notice(`${problem} Your answers so far are safe. ${tries < 20 ? "Trying again…" : "Please reload the page."}`);
    await wait(1500);
  }
}

function show(name) { for (const id of ["welcome", "task", "end"]) part(id).hidden = id !== name; }

function load(image, name) {
  image.onload = () => { loaded += 1; since = performance.now(); enable(); };
  image.onerror = async () => {
    await wait(1500);
    if (image.dataset.name === name) image.src = `picture/${name}?${Date.now()}`;
  };
  image.dataset.name = name;
  image.src = `picture/${name}`;
}

function isReady() { return !busy && loaded >= 2 && performance.now() - drawn >= PAUSE; }
function enable() { for (const button of buttons) button.disabled = !isReady(); }

function draw(next) {
  const before = state && state.pictures ? state.pictures.join() : "";
  state = next;
  busy = false;
  unzoom();
  if (state.finished) {
    part("answered").textContent = state.done === 1 ? "1 comparison" : `${state.done} comparisons`;
    part("again").hidden = !state.done;
    return show("end");
  }
  const [name, text] = state.questions[state.asked];
  const many = state.questions.length > 1;
  part("prompt").textContent = state.prompt;
  part("prompt").style.visibility = state.hides_prompt ? "hidden" : "visible";
  part("question").textContent = many ? `${state.asked + 1} of ${state.questions.length}: ${text}` : text;
  part("count").textContent = `${state.position + 1} of ${Math.max(state.total, state.position + 1)}`;
  part("bar").style.width = `${(100 * state.done) / Math.max(state.total, 1)}%`;
  part("back").disabled = state.position === 0 && state.asked === 0;
  part("tiekey").hidden = !state.ties;
  for (const button of buttons) {
    button.hidden = button.dataset.answer === "tie" && !state.ties;
    button.classList.toggle("chosen", state.answers[name] === button.dataset.answer);
  }
  if (state.pictures.join() !== before) {
    loaded = 0;
    part("left").removeAttribute("src");
    part("right").removeAttribute("src");
    load(part("left"), state.pictures[0]);
    load(part("right"), state.pictures[1]);
  }
  since = drawn = performance.now();
  enable();
  setTimeout(enable, PAUSE + 5);
  show("task");
}

async function give(answer) {
  if (!isReady() || !state || state.finished || (answer === "tie" && !state.ties)) return;
  busy = true;
  enable();
  const seconds = (performance.now() - since) / 1000;
  const shown = {position: state.position, picture: state.pictures[0], turn: state.turn};
  draw(await ask("answer", {...shown, question: state.questions[state.asked][0], answer, seconds}));
}

async function back() {
  if (busy || !state) return;
  if (!state.finished && state.asked > 0) return draw({...state, asked: state.asked - 1});
  if (state.position === 0) return;
  busy = true;
  draw(await ask("look", {position: state.position - 1}));
}

function zoom(side) {
  zoomed = side;
  part("zoom").querySelector("img").src = part(side).src;
  part("zoom").querySelector("span").textContent = side;
  part("zoom").hidden = false;
}
function unzoom() { zoomed = null; part("zoom").hidden = true; }

async function begin(id) {
  rater = id;
  const link = new URL(window.location.href);
  link.searchParams.set("rater", id);
  history.replaceState(null, "", link);
  draw(await ask("enter", {}));
}

for (const button of buttons) {
  button.addEventListener("click", event => { if (event.detail < 2) give(button.dataset.answer); });
}
for (const side of ["left", "right"]) part(side).addEventListener("click", () => zoom(side));
part("zoom").addEventListener("click", unzoom);
part("back").addEventListener("click", back);
part("again").addEventListener("click", back);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !state) return;
  const sides = {ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right"};
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (zoomed && ["Escape", "z"].includes(key)) unzoom();
  else if (zoomed) { if (sides[key]) zoom(sides[key]); }
  else if (state.finished) { if (key === "Backspace") back(); else return; }
  else if (sides[key]) give(sides[key]);
  else if (key === "t") give("tie");
  else if (key === "Backspace") back();
  else if (key === "z") zoom("left");
  else return;
  event.preventDefault();
});

(async () => {
  const hello = await ask("welcome", {});
  const kept = `user-study-${hello.study}`;
  const linked = new URL(window.location.href).searchParams.get("rater");
  const stored = (() => { try { return localStorage.getItem(kept); } catch { return null; } })();
  const keep = id => { try { localStorage.setItem(kept, id); } catch {} };
  if (stored && (!linked || linked === stored)) return begin(stored);
  part("consent").textContent = hello.consent;
  show("welcome");
  part("start").addEventListener("click", () => {
    const fits = /^[A-Za-z0-9_-]{1,64}$/.test(linked || "");
    const random = [...crypto.getRandomValues(new Uint8Array(8))].map(n => n.toString(16).padStart(2, "0")).join("");
    const id = fits ? linked : random;
    keep(id);
    begin(id);
  });
})();
"""


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def markdown_report(record: dict, results: dict, max_failed_checks: int) -> str:
    """The tables of results.md."""
    raters, rows, verdicts, notes = results["raters"], [], [], []
    for name, other, question, figures in all_figures(results):
        if not figures["n_votes"]:
            verdicts.append(f"- **{question}**: no votes on {name} against {other}.")
            continue
        fewest, most = figures["votes_per_comparison"]
        each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        outcome = " / ".join(str(figures[key]) for key in ("wins", "undecided", "losses"))
        shown = [name, other, question, figures["n_comparisons"], each, outcome]
        for key in ("win_rate", "vote_share"):
            low, high = figures[f"{key}_ci95"]
            shown.append(f"{figures[key]:.1%} ({low:.1%} to {high:.1%})")
        kappa = figures["fleiss_kappa"]
        rows.append([*shown, "" if kappa is None else f"{kappa:.2f}"])
        verdicts.append(f"- **{question}**: {figures['verdict']}")
        if fewest % 2 == 0 or most % 2 == 0:
            notes.append("Some comparisons have an even number of votes, which may split evenly.")
        if fewest < record["votes_per_comparison"]:
            notes.append(f"Some comparisons have fewer than {record['votes_per_comparison']} votes.")
        if abs(figures["left_share"] - 0.5) > 0.1:
            notes.append(f"In `{question}`, {figures['left_share']:.0%} of the answers chose the left picture.")
    header = ["model", "against", "question", "comparisons", "votes each", "won / undecided / lost"]
    header += ["win rate by majority", "share of votes", "kappa"]
    who = f"{raters['n_raters'] - raters['n_excluded']} raters, {raters['n_votes']} votes."
    if record["n_checks"]:
        who += (
            f" {raters['n_excluded']} of {raters['n_raters']} raters failed more than {max_failed_checks} test pairs "
        )
        who += f"and are left out, with {raters['n_votes_excluded']} votes."
    text = f"""{who}

{markdown_table(header, rows)}

{chr(10).join(verdicts)}

A majority is more than half of the votes of a comparison. Comparisons without one are undecided and count half. In
brackets: 95 % intervals, over prompts and raters. Kappa: Fleiss' agreement beyond chance.
"""
    return text + "".join(f"\n{note}" for note in dict.fromkeys(notes)) + "\n" * bool(notes)


def all_figures(results: dict) -> Iterator[tuple[str, str, str, dict]]:
    """(model, other, question, figures) of every row."""
    for name, others in results["pairs"].items():
        for other, questions in others.items():
            for question, figures in questions.items():
                yield name, other, question, figures


def draw_chart(results: dict, file: Path) -> None:
    """A bar for every question and pair of models, as in the papers' figures, with the interval of the win rate."""
    bars = [row for row in all_figures(results) if row[3]["n_votes"]]
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(bars)), layout="constrained")
    axes, single = figure.subplots(), len({row[:2] for row in bars}) == 1
    for place, (*_, found) in enumerate(bars):
        start = 0.0
        for key, colour in (("wins", "#2a7de1"), ("undecided", "#cccccc"), ("losses", "#e18b2a")):
            width = found[key] / found["n_comparisons"]
            axes.barh(place, width, left=start, color=colour, height=0.6)
            start += width
        rate, (low, high) = found["win_rate"], found["win_rate_ci95"]
        spread = [[max(rate - low, 0)], [max(high - rate, 0)]]
        axes.errorbar(rate, place, xerr=spread, color="black", capsize=4, fmt="o", markersize=4)
        axes.text(1.01, place, f"{rate:.0%}", va="center")
    axes.set_yticks(range(len(bars)), [q if single else f"{name} / {other}: {q}" for name, other, q, _ in bars])
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    left, right = bars[0][:2] if single else ("first model", "second model")
    colours = f"blue: {left} wins   grey: undecided   orange: {right} wins"
    axes.set_title(f"{colours}\nblack: win rate, 95 % interval", fontsize=10)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def publish_results(args: ScriptArguments, repo_id: str, results: dict, table: str) -> None:
    """Puts the results into the card of a model; exits with one line if that fails."""
    values = [
        {
            "type": "win_rate",
            "name": f"{question}, people's win rate of {name} over {other}",
            "value": figures["win_rate"],
        }
        for name, other, question, figures in all_figures(results)
        if figures["n_votes"]
    ]
    task = {"type": "text-to-image", "name": "Text-to-Image Generation"}
    prompts = {"type": "prompts", "name": f"user study, {results['raters']['n_votes']} votes"}
    entry = {"name": repo_id.split("/")[-1], "results": [{"task": task, "dataset": prompts, "metrics": values}]}
    body = f"## User study\n\n{table}\n![What people preferred](user_study/chart.png)\n\n"
    body += "All figures are in [user_study/results.json](user_study/results.json).\n"
    # Ids of raters may be names, if links were given out with names: they stay on this machine.
    record = json.loads(Path(args.output_dir, "results.json").read_text())
    record["raters"] = {key: value for key, value in record["raters"].items() if key.startswith("n_")}
    files = {"user_study/results.json": json.dumps(record, indent=2).encode() + b"\n"}
    files["user_study/chart.png"] = Path(args.output_dir, "chart.png")
    card = make_card({"model-index": [entry]}, card_block(body))
    try:
        push_to_hub(repo_id, "model", files, "User study", card=card, merge=merge_study)
    except Exception as error:
        advice = f"everything is in {args.output_dir}: run the same command again"
        raise SystemExit(f"upload to {repo_id} failed: {one_line(error)}; {advice}") from None
    print(f"published: {HfApi().endpoint}/{repo_id}")


def merge_study(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """`merge_cards` that keeps other results in `model-index`, and replaces those of an earlier tally."""
    models = theirs.data.get("model-index")
    card = merge_cards(mine, theirs)
    if models:
        own, (model, *others) = mine.data["model-index"][0], models
        kept = [result for result in model.get("results") or [] if not is_study_result(result)]
        card.data["model-index"] = [{**own, **model, "results": kept + own["results"]}, *others]
    return card


def is_study_result(result: dict) -> bool:
    return str(result.get("dataset", {}).get("name", "")).startswith("user study,")


# Copied from build_synpic.markdown_table
def markdown_table(header: list[str], rows: list[list]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(table_cell, row)) + " |" for row in cells)


# ----------------------------------------------------------------------------------------------------------------------
# The votes as a preference dataset
# ----------------------------------------------------------------------------------------------------------------------


PAIR_FEATURES = Features(
    {
        "caption": Value("string"),
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "image_0_uid": Value("string"),
        "image_1_uid": Value("string"),
        "label_0": Value("float64"),
        "label_1": Value("float64"),
        "has_label": Value("bool"),
        "are_different": Value("bool"),
        "best_image_uid": Value("string"),
        "model_0": Value("string"),
        "model_1": Value("string"),
        "category": Value("string"),
        "num_votes": Value("int32"),
        "votes_0": Value("int32"),
        "votes_1": Value("int32"),
        "agreement": Value("float32"),
    }
)
RANKED_FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "prompt": Value("string"),
        "images": List(Image()),
        "generators": List(Value("string")),
        "seeds": List(Value("int64")),
        "scores": {"people": List(Value("float32"))},
        "preference_probability": List(Value("float32")),
        "rank": List(Value("int32")),
        "num_votes": Value("int32"),
        "agreement": Value("float32"),
    }
)


def count_votes(votes: list[dict]) -> dict[str, Counter]:
    """Item → chosen model or "tie" → votes."""
    counts = {}
    for vote in votes:
        counts.setdefault(vote["item"], Counter())[vote["chosen"]] += 1
    return counts


def picture_bytes(record: dict, folder: Path, number: int, name: str) -> bytes:
    """A picture as raters saw it, without what fills its file up."""
    return (folder / PICTURES / file_name(record, (number, name))).read_bytes().rstrip(b"\0")


def pair_rows(record: dict, folder: Path, votes: list[dict]) -> tuple[list[dict], str]:
    """A row for every comparison with votes, in Pick-a-Pic's columns; and what is left out, in words.

    label_0 is 1, 0, or 0.5 where no picture has more than half of the votes.
    """
    rows, counts = [], count_votes(votes)
    items = [(n, pair) for n in range(len(record["prompts"])) for pair in range(len(record["pairs"]))]
    for number, pair in items:
        found = counts.get(f"{number}-{pair}")
        if not found:
            continue
        names, prompt = record["pairs"][pair], record["prompts"][number]
        pictures = [picture_bytes(record, folder, number, name) for name in names]
        uids = [short_hash(picture) for picture in pictures]
        counted = [found[names[0]], found[names[1]], found["tie"]]
        label = float(majority(np.array([counted]))[0])
        rows.append(
            {
                "caption": prompt["prompt"],
                **{f"jpg_{n}": pictures[n] for n in (0, 1)},
                **{f"image_{n}_uid": uids[n] for n in (0, 1)},
                "label_0": label,
                "label_1": 1 - label,
                "has_label": True,
                "are_different": label != 0.5,
                "best_image_uid": "" if label == 0.5 else uids[0 if label else 1],
                **{f"model_{n}": names[n] for n in (0, 1)},
                "category": prompt["category"],
                "num_votes": sum(counted),
                **{f"votes_{n}": counted[n] for n in (0, 1)},
                "agreement": max(counted) / sum(counted),
            }
        )
    return rows, f"{len(items) - len(rows)} of {len(items)} comparisons have no votes"


def ranked_rows(record: dict, folder: Path, votes: list[dict]) -> tuple[list[dict], str]:
    """A row for every prompt whose pairs of models all have votes, in Syn-Pic's columns; and what is left out.

    The preference probability of a picture is the mean, over the others, of the share of votes that it gets against
    each; as in Syn-Pic, a tie counts for neither.
    """
    names, counts, rows = record["models"], count_votes(votes), []
    if len(record["pairs"]) < len(names) * (len(names) - 1) // 2:
        raise SystemExit("--export_format ranked needs votes on every two models: this study has a --baseline")
    for number, prompt in enumerate(record["prompts"]):
        found = [counts.get(f"{number}-{pair}") for pair in range(len(record["pairs"]))]
        if not all(found):
            continue
        shares = [
            [counted[name] / counted.total() for pair, counted in zip(record["pairs"], found) if name in pair]
            for name in names
        ]
        phi = np.mean(shares, axis=1)
        # Equal ones in an order that favours no model; rounded, since equal shares may differ in their last bit.
        tied = [(-round(value, 9), short_hash(f"{prompt['prompt']}|{name}")) for name, value in zip(names, phi)]
        order = sorted(range(len(names)), key=tied.__getitem__)
        pictures = [picture_bytes(record, folder, number, name) for name in names]
        rows.append(
            {
                "prompt_id": short_hash(prompt["prompt"]),
                "prompt": prompt["prompt"],
                "images": [{"bytes": picture, "path": None} for picture in pictures],
                "generators": names,
                "seeds": [0] * len(names),  # not known here
                "scores": {"people": phi.tolist()},
                "preference_probability": phi.tolist(),
                "rank": (np.argsort(order) + 1).tolist(),
                "num_votes": sum(counted.total() for counted in found),
                "agreement": float(np.mean([max(counted.values()) / counted.total() for counted in found])),
            }
        )
    left_out = len(record["prompts"]) - len(rows)
    return rows, f"{left_out} of {len(record['prompts'])} prompts lack votes on a pair of models"


def write_dataset(args: ScriptArguments, rows: list[dict], question: str, left_out: str) -> None:
    """Writes the rows as Parquet, and the card."""
    output_dir = Path(args.output_dir)
    features = PAIR_FEATURES if args.export_format == "pairs" else RANKED_FEATURES
    parts = [rows[start : start + 1000] for start in range(0, len(rows), 1000)]
    files = [data_file(output_dir / "data", number, parts) for number in range(len(parts))]
    write_text(output_dir / UNFINISHED, "The dataset in this folder is not complete: see user_study.py.\n")
    for file in set((output_dir / "data").glob("train-*-of-*.parquet")) - set(files):
        file.unlink()
    for file, part in zip(files, parts):
        table = pa.Table.from_pylist([features.encode_example(row) for row in part], schema=features.arrow_schema)
        write_table(
            table, file, {"rows": len(part)}, row_group_size=min(max(64_000_000 * len(table) // table.nbytes, 1), 100)
        )
    dataset, n_votes = args.hub_dataset_id or output_dir, sum(row["num_votes"] for row in rows)
    read_by = {
        "pairs": "The columns are Pick-a-Pic's: `score_pairs.py` and Diffusion-DPO trainers read them.",
        "ranked": "The columns are Syn-Pic's: `train_rankdpo_sdxl.py` and `train_rankdpo_sd3.py` read them.",
    }[args.export_format]
    text = read_study(Path(args.study_dir))["questions"][question]
    body = f"""# {output_dir.resolve().name}

{n_votes} votes of people on pictures of {len(rows)} {"pairs" if args.export_format == "pairs" else "prompts"}, from a
blinded study. The question was: "{text}" {left_out[0].upper() + left_out[1:]}; these are left out.

{read_by} `num_votes` is the number of votes, `agreement` the share of the option with most votes.

```python
from datasets import load_dataset

dataset = load_dataset("{dataset}", split="train")
```
"""
    front = {
        "pretty_name": output_dir.resolve().name,
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(len(rows))],
        "tags": ["preference", "human-feedback"],
        **config_metadata(output_dir, {"default": ("data", features)}),
    }
    write_text(output_dir / "README.md", make_card(front, card_block(body), output_dir / "README.md"))
    (output_dir / UNFINISHED).unlink()
    print(f"{len(rows)} rows, {n_votes} votes; {left_out}: {output_dir}")


# ----------------------------------------------------------------------------------------------------------------------
# The study on the Hub
# ----------------------------------------------------------------------------------------------------------------------


GRADIO = "gradio>=6.31,<7"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
SPACE_APP = '''"""Serves the study. Votes and the record of the study are in the private dataset {dataset}."""

import os
import sys

import user_study


if not os.environ.get("HF_TOKEN"):
    raise SystemExit("HF_TOKEN is missing: add a token that may write {dataset} to the secrets of this Space")
sys.argv[1:] = "serve --study_dir . --host 0.0.0.0 --port 7860 --push_to_hub --hub_dataset_id {dataset}".split()
user_study.run_script(user_study.main)
'''
SPACE_CARD = """---
title: User study
sdk: gradio
sdk_version: 6.31.0
python_version: "3.11"
app_file: app.py
pinned: false
---

A user study: which picture is better? Votes go into the private dataset `{dataset}`, once a minute. This Space needs a
secret `HF_TOKEN` in its settings: a token that may write to that dataset, and to nothing else.
"""


def open_vote_repository(args: ScriptArguments) -> str:
    """Creates the dataset of the votes unless it exists, and returns its id. Exits with one line if it is public: it
    says which model drew which picture."""
    repo_id = create_repo(args.hub_dataset_id, "dataset", private=True)
    if not retried(HfApi().repo_info, repo_id, repo_type="dataset", timeout=HUB_TIMEOUT).private:
        raise SystemExit(f"--hub_dataset_id {repo_id} is public, and raters could look into it: make it private")
    return repo_id


def fetch_study(repo_id: str, folder: Path) -> None:
    """Brings what the dataset of the votes has and this machine lacks: a Space forgets its files when it restarts."""
    there = dataset_files(repo_id, (STUDY, VOTES))
    if STUDY in there and not (folder / STUDY).exists():
        write_bytes(folder / STUDY, there[STUDY])
    check_same_study(repo_id, folder, there)
    here = (folder / VOTES).read_bytes() if (folder / VOTES).exists() else b""
    votes = there.get(VOTES, b"")
    if votes != here and votes.startswith(here):  # else publish_votes joins the two
        write_bytes(folder / VOTES, votes)


def dataset_files(repo_id: str, names: Sequence[str]) -> dict[str, bytes]:
    """Name → content of those files that the dataset holds. Nothing stays in the cache, which would fill the disk with
    every minute's votes."""
    head = retried(HfApi().repo_info, repo_id, repo_type="dataset", timeout=HUB_TIMEOUT)
    there = [name for name in names if name in {file.rfilename for file in head.siblings}]
    with tempfile.TemporaryDirectory() as cache:
        options = {"repo_type": "dataset", "revision": head.sha, "cache_dir": cache}
        return {name: Path(retried(hf_hub_download, repo_id, name, **options)).read_bytes() for name in there}


def check_same_study(repo_id: str, folder: Path, there: dict[str, bytes]) -> None:
    if STUDY in there and (folder / STUDY).read_bytes() != there[STUDY]:
        raise SystemExit(f"--hub_dataset_id {repo_id} holds another study: choose another name")


def publish_votes(repo_id: str, study: Study) -> None:
    """Sends the study and its votes in one commit, unless nothing is new; votes that another server has sent meanwhile
    are taken in first. A failure is said, and the next turn tries again: the votes are on the disk."""
    log = study.log
    if log.content() == log.published:
        return
    try:
        there = dataset_files(repo_id, (VOTES,)).get(VOTES, b"")
        if there != log.published and not log.content().startswith(there):
            study.join([json.loads(line) for line in there.splitlines()])
        content = log.content()
        push_to_hub(repo_id, "dataset", {VOTES: content, STUDY: log.file.parent / STUDY}, "Votes")
        log.published = content
    except Exception as error:
        warn(f"votes were not sent to {repo_id}: {one_line(error)}; they are in {log.file}")


def publish_space(args: ScriptArguments, names: list[str]) -> None:
    """Uploads the Space; and the record of the study and the votes so far into the private dataset."""
    output_dir, study = Path(args.output_dir), Path(args.study_dir)
    try:
        there = dataset_files(args.hub_dataset_id, (STUDY, VOTES))
        check_same_study(args.hub_dataset_id, study, there)
        here = whole_lines(study / VOTES)
        votes = there.get(VOTES, b"")
        records = {STUDY: study / STUDY} | ({VOTES: here} if here.startswith(votes) and here else {})
        if not here.startswith(votes) and not votes.startswith(here):
            problem = f"--hub_dataset_id {args.hub_dataset_id} has other votes than {study / VOTES}"
            raise SystemExit(f"{problem}: let serve --push_to_hub join them, or choose another name")
        push_to_hub(args.hub_dataset_id, "dataset", records, "Study")
        files = {name: output_dir / name for name in names}
        push_to_hub(args.hub_space_id, "space", files, "Study", replace=(f"{PICTURES}/*",))
    except Exception as error:
        advice = f"everything is in {output_dir}: run the same command again"
        raise SystemExit(f"upload to {args.hub_space_id} failed: {one_line(error)}; {advice}") from None
    print(f"published: {HfApi().endpoint}/spaces/{args.hub_space_id}; now add the secret HF_TOKEN in its settings")


# ----------------------------------------------------------------------------------------------------------------------
# Shared: prompts (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# Short names for --prompts: where the prompts are published, and what flags that are left out then mean.
PICKAPIC = {"source": "liuhuohuo2/pick-a-pic-v2", "prompt_column": "caption"}
PARTI_URL = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"
PROMPT_SETS = {
    "pickapic-train": {**PICKAPIC, "prompt_split": "train"},
    "pickapic-val": {**PICKAPIC, "prompt_split": "validation_unique"},
    "hpsv2": {"source": "zhwang/HPDv2", "prompt_column": "prompt", "category_column": "style"},
    "parti": {"source": PARTI_URL, "prompt_column": "Prompt", "category_column": "Category"},
}
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
FILES = (*TEXT_FILES, ".parquet")


def complete_prompt_flags(args: "ScriptArguments") -> None:
    """Fills in the flags about prompts that were left out."""
    for name, value in PROMPT_SETS.get(args.prompts, {"prompt_column": "prompt", "prompt_split": "train"}).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def read_prompts(
    source: str,
    column: str,
    split: str | None,
    max_prompts: int | None,
    keep: tuple[str, ...] = (),
    whole_rows: bool = False,
) -> tuple[list[dict], list[dict[str, int]]]:
    """Reads prompts in order and drops duplicates. Of a dataset it reads no more than it needs.

    Returns:
        one dict per prompt: "prompt", stripped, and the columns to `keep`; with `whole_rows` all columns that hold no
        images. One dict per prompt of where it first stood in the source, duplicates counted: "index", its row, from 0,
        and for each column to `keep`, how many rows before it have the same value there. Exits with one line that names
        the row if a prompt is empty, or the column that is missing.
    """
    shown, prompts, places, counts = public_text(source), {}, {}, Counter()
    rows = prompt_rows(source, split, tuple(dict.fromkeys((column, *keep))), whole_rows)
    try:
        # Reading all of Pick-a-Pic takes minutes.
        for index, row in enumerate(progress_bar(rows, desc="prompts", unit=" rows", delay=10)):
            prompt = row[column]
            if not isinstance(prompt, str) or not prompt.strip():
                raise SystemExit(f"--prompts {shown}: row {index + 1}: the prompt is empty or no text: remove the row")
            values = {name: (name, str(row[name])) for name in keep}
            place = {"index": index} | {name: counts[value] for name, value in values.items()}
            counts.update(values.values())
            prompts.setdefault(prompt.strip(), {**row, "prompt": prompt.strip()})
            places.setdefault(prompt.strip(), place)
            if max_prompts and len(prompts) == max_prompts:
                break
    except Exception as error:
        guess = "/" not in source and source not in PROMPT_SETS and not source.endswith(FILES)
        names = f"; the sets with a short name are {', '.join(PROMPT_SETS)}" if guess else ""
        raise SystemExit(f"--prompts {shown}: cannot be read: {public_text(one_line(error))}{names}") from None
    if not prompts:
        raise SystemExit(f"--prompts {shown}: holds no prompts")
    if repeated := index + 1 - len(prompts):
        warn(f"--prompts {shown}: {repeated} of {index + 1} rows repeat an earlier prompt and are left out")
    return list(prompts.values()), list(places.values())


def prompt_rows(source: str, split: str | None, columns: tuple[str, ...], whole_rows: bool) -> Iterator[dict]:
    """Yields the rows of a named set, file, URL or dataset with these `columns`, the first of which is the prompt."""
    known = PROMPT_SETS.get(source, {}).get("source", source)
    on_web = known.startswith(("http://", "https://"))
    suffix = Path(urlsplit(known).path if on_web else known).suffix
    if source == "hpsv2":
        rows = []
        for style in HPSV2_STYLES:
            file = retried(hf_hub_download, known, f"benchmark/{style}.json", repo_type="dataset")
            rows += [{**row, "style": style} for row in parse_rows(Path(file).read_bytes(), ".json", columns[0])]
    elif on_web:
        if suffix not in TEXT_FILES:
            raise ValueError(f"the name of a file on the web must end in {', '.join(TEXT_FILES)}")
        rows = parse_rows(fetch(known), suffix, columns[0])
    elif suffix in FILES and not os.path.exists(known):
        raise FileNotFoundError("no such file")
    elif suffix in TEXT_FILES and os.path.isfile(known):
        rows = parse_rows(Path(known).read_bytes(), suffix, columns[0])
    else:
        yield from stream_rows(known, split, columns, whole_rows)
        return
    names = dict.fromkeys(name for row in rows for name in row)
    if rows:
        check_columns(source, names, columns)
    yield from ({name: row.get(name) for name in (names if whole_rows else columns)} for row in rows)


def fetch(url: str) -> bytes:
    def get():
        response = get_session().get(url, timeout=60)
        response.raise_for_status()
        return response

    response = retried(get)
    if "html" in response.headers.get("Content-Type", ""):
        raise ValueError("this is a web page, not a file of prompts: give the link to the raw file")
    return response.content


def parse_rows(content: bytes, suffix: str, column: str) -> list[dict]:
    """The rows of a file. A line of a text file, or a string in a JSON list, becomes a row with that one `column`."""
    text = content.decode("utf-8-sig")
    if suffix == ".txt":
        return [{column: line} for line in text.removesuffix("\n").split("\n")] if text else []
    if suffix in (".csv", ".tsv"):
        # Quotation marks in a .tsv are text, as in PartiPrompts, where a prompt begins with one.
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
        rows = list(csv.DictReader(StringIO(text, newline=""), **dialect))
        if long := [number for number, row in enumerate(rows, 1) if None in row]:
            raise ValueError(f"row {long[0]} has more fields than the header: quote a prompt that has commas")
        return rows
    values, end, blank, decoder = [], 0, re.compile(r"\s*"), json.JSONDecoder()
    while (start := blank.match(text, end).end()) < len(text):  # a list, or a value per line
        value, end = decoder.raw_decode(text, start)
        values += value if isinstance(value, list) else [value]
    return [value if isinstance(value, dict) else {column: value} for value in values]


def stream_rows(source: str, split: str | None, columns: tuple[str, ...], whole_rows: bool) -> Iterator[dict]:
    """Yields rows of a .parquet file, or of a dataset on the Hub or in a folder, while it reads them. Nothing is
    downloaded as a whole. Of Parquet files, which most datasets with images are, only these `columns` are read."""
    check_dataset_folder("--prompts", source, columns=False)
    options = {"path": source}
    if source.endswith(".parquet") and os.path.isfile(source):
        options, split = {"path": "parquet", "data_files": source}, "train"
    builder = load_dataset_builder(**options)
    offline = datasets_config.HF_HUB_OFFLINE and not os.path.exists(source)  # then what an earlier run downloaded
    rows = load_dataset(**options, split=split) if offline else builder.as_streaming_dataset(split=split)
    names = rows.column_names or list(next(iter(rows), {}))
    check_columns(source, names, columns)
    if whole_rows:
        kinds = rows.features or dict.fromkeys(names, "")
        columns = [name for name in names if not re.search(r"\bImage\b|binary", repr(kinds[name]))]
    if hasattr(builder.config, "columns") and not offline:
        # By default the client reads 5 MiB ahead with each small piece of a column: a tenth of the images.
        options |= {"columns": list(columns), "storage_options": {"hf": {"block_size": 2**14}}}
        rows = load_dataset(**options, split=split, streaming=True)
    yield from rows.select_columns(list(columns))


def check_columns(source: str, columns: Iterable[str], wanted: tuple[str, ...]) -> None:
    for name in wanted:
        if name not in columns:
            raise SystemExit(f"--prompts {public_text(source)}: no column {name!r}; it has {', '.join(columns)}")


def public_text(text: str) -> str:
    """`text` without what may be secret in its URLs: user name, password, query."""
    return re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: Parquet shards (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def write_table(table: pa.Table, file: Path, facts: dict, row_group_size: int = 100) -> None:
    """Writes one table as `write_tables` does."""
    write_tables(iter([table]), len(table), file, facts, row_group_size)


def write_tables(
    tables: Iterator[pa.Table], n_rows: int, file: Path, facts: dict, row_group_size: int | None = None
) -> None:
    """Writes tables of one schema into a Parquet file with small row groups and a page index (the Hub's viewer needs
    both) and with checksums, then renames it. Memory holds one table, and those that did not fill a row group.

    Args:
        n_rows: of all tables together.
        facts: recorded in the file; `shard_facts` reads them.
        row_group_size: rows; by default at most 100, and at most 64 MB as the first table has them: the viewer reads a
            whole group to show a page.
    """
    with replacing(file) as temporary, open(temporary, "wb") as handle:
        left = next(tables)
        size = row_group_size or min(max(64_000_000 * len(left) // max(left.nbytes, 1), 1), 100)
        record = {b"synpic": sealed(facts, left.schema, n_rows)}
        schema = left.schema.with_metadata({**(left.schema.metadata or {}), **record})
        options = {"write_page_index": True, "write_page_checksum": True}
        with pq.ParquetWriter(handle, schema, **options) as writer:
            for table in tables:
                while len(left) >= size:
                    writer.write_table(left.slice(0, size))
                    left = left.slice(size)
                left = pa.concat_tables([left, table])
            writer.write_table(left, row_group_size=size)


def sealed(facts: dict, schema: pa.Schema, n_rows: int) -> bytes:
    """The record in a Parquet file: facts, and a checksum of what the pages' own checksums do not cover."""
    columns = [f"{field.name} {field.type}".replace("<item:", "<element:") for field in schema]
    checksum = json_checksum({"facts": facts, "columns": columns, "rows": n_rows})
    return json.dumps({"facts": facts, "checksum": checksum}).encode()


def shard_facts(file: Path) -> dict | None:
    """What was recorded with a shard; None if there is no such shard, or it is not readable."""
    if not file.exists():
        return None
    try:
        with reading(file):
            metadata = pq.read_metadata(file)
            record = metadata.metadata[b"synpic"]
            facts = json.loads(record)["facts"]
            if record == sealed(facts, metadata.schema.to_arrow_schema(), metadata.num_rows):
                return facts
            raise Damaged(file)
    except Damaged as error:
        warn(str(error))
        return None


def is_usable(file: Path) -> bool:
    """Whether the checksums of a file's pages are right; says so if they are not."""
    try:
        check_pages(file)
        return True
    except Damaged as error:
        warn(str(error))
        return False


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of a file that `write_table` wrote. Raises Damaged if a checksum does not match."""
    if shard_facts(file) is not None:
        with reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read(columns)
            if len(table) == parquet.metadata.num_rows:
                return table
    raise Damaged(file)


def is_complete(file: Path, **expected) -> bool:
    """True if a shard exists that was made from the same input."""
    facts = shard_facts(file)
    return facts is not None and all(facts.get(name) == value for name, value in expected.items())


# ----------------------------------------------------------------------------------------------------------------------
# Shared: dataset card and repository (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def data_file(folder: Path, number: int, files: Sequence) -> Path:
    """Where file `number` of several stands. A commit takes about 250 files: the callers keep to that."""
    return folder / f"train-{number:05d}-of-{len(files):05d}.parquet"


def config_metadata(output_dir: Path, configs: dict[str, tuple[str, Features]]) -> dict:
    """The card's `configs` and `dataset_info`: configuration → its folder and features. `load_dataset` without a name
    takes the configuration called default.

    Without `dataset_info`, `load_dataset` on a folder that was built again would serve the rows it cached before: its
    key is made of the card, not of the files.
    """
    entries, infos = [], []
    for config, (folder, features) in configs.items():
        data_files = [{"split": "train", "path": f"{folder}/train-*.parquet"}]
        entries.append({"config_name": config, "data_files": data_files})
        files = sorted((output_dir / folder).glob("*.parquet"))
        metadata = [pq.read_metadata(file) for file in files]
        size = sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))
        split = SplitInfo("train", num_bytes=size, num_examples=sum(m.num_rows for m in metadata))
        download_size = sum(file.stat().st_size for file in files)
        splits = SplitDict({"train": split})
        info = DatasetInfo(features=features, splits=splits, download_size=download_size, dataset_size=size)
        data = CardData()
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
        infos.append({"config_name": config, **data.to_dict()["dataset_info"]})
    return {"configs": entries, "dataset_info": infos}


def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


def merge_dataset_cards(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """`merge_cards`, and other configurations of the repository stay beside this run's."""
    others = {name: as_list(theirs.data.get(name)) for name in ("configs", "dataset_info") if name in mine.data}
    card = merge_cards(mine, theirs)
    for name, entries in others.items():
        card.data[name] = as_list(mine.data[name])
        own = [entry.get("config_name", "default") for entry in card.data[name]]
        card.data[name] += [entry for entry in entries if entry.get("config_name", "default") not in own]
    return card


def as_list(entries: list | dict | None) -> list:
    """A card may name a single configuration without a list."""
    return [entries] if isinstance(entries, dict) else list(entries or [])


def check_dataset_repo(repo_id: str, patterns: tuple[str, ...]) -> None:
    """Exits with one line if publishing would replace data that this script has not written."""
    try:
        head = retried(HfApi().repo_info, repo_id, repo_type="dataset", timeout=HUB_TIMEOUT)
        files, card = {file.rfilename for file in head.siblings}, ""
        if "README.md" in files:
            readme = retried(hf_hub_download, repo_id, "README.md", repo_type="dataset", revision=head.sha)
            card = Path(readme).read_text()
    except Exception as error:
        raise SystemExit(f"--push_to_hub: the dataset repository {repo_id} cannot be read: {one_line(error)}") from None
    foreign = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in patterns))
    if foreign and CARD_BEGIN not in card:
        problem = f"--hub_dataset_id {repo_id} holds other data ({foreign[0]}), which would be replaced"
        raise SystemExit(f"{problem}: choose another name")


class DatasetUpload:
    """Sends files in the background as they are finished, one after the other; with None as repository, none.

    They appear in the repository with the commit of `push_to_hub`, which then has nothing left to send. Leaving the
    context waits for the last file.
    """

    def __init__(self, repo_id: str | None):
        self.repo_id, self.api, self.last, self.stopped = repo_id, HfApi(), None, False

    def send(self, name: str, file: Path) -> None:
        if self.repo_id:
            self.last = self.api.run_as_future(self._send, name, file)

    def _send(self, name: str, file: Path) -> None:
        if self.stopped:
            return
        try:
            additions = [CommitOperationAdd(name, file)]
            retried(self.api.preupload_lfs_files, self.repo_id, additions, repo_type="dataset")
        except Exception:  # push_to_hub tries again, and reports what is wrong
            self.stopped = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stopped = self.stopped or kind is not None
        if self.last:  # the client sends in order
            self.last.result()


def publish(args: ScriptArguments, data: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Sends the card and the files that match these patterns. Exits with one line if that fails.

    Args:
        data: patterns of data files; other files on the Hub that match one are deleted.
        others: patterns of further files.
    """
    output_dir = Path(args.output_dir)
    files = sorted(file for pattern in (*data, *others) for file in output_dir.glob(pattern))
    files = {file.relative_to(output_dir).as_posix(): file for file in files}
    try:
        # The card of a dataset that was built without --push_to_hub names its folder.
        card = (output_dir / "README.md").read_text()
        card = re.sub(r'load_dataset\("[^"]*"', f'load_dataset("{args.hub_dataset_id}"', card)
        options = {"card": card, "merge": merge_dataset_cards, "replace": data}
        card = push_to_hub(args.hub_dataset_id, "dataset", files, "Dataset", **options)
    except Exception as error:
        raise SystemExit(
            f"upload to {args.hub_dataset_id} failed: {one_line(error)}; everything is in {output_dir}: run the same "
            "command again to upload what is missing"
        ) from None
    write_text(output_dir / "README.md", card)
    print(f"published: {HfApi().endpoint}/datasets/{args.hub_dataset_id}")


# ----------------------------------------------------------------------------------------------------------------------
# Shared: Hub (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# Errors that repeating the request cannot fix: a malformed name, no token, offline mode.
LASTING_ERRORS = (ValueError, TypeError, LocalTokenNotFoundError, OfflineModeIsEnabled)
HUB_PAUSES = (1, 2, 4, 8, 16)  # seconds before each further attempt
HUB_TIMEOUT = 300  # seconds without a byte; the client itself would wait for ever


def retried(request: Callable, *arguments, **options):
    """Calls a function of the Hub's client, and calls it again after a pause if the error may pass: 408, 409, 412, 429,
    5xx, a lost or silent connection. The client itself repeats neither commits nor the creation of a repository."""
    for pause in (*HUB_PAUSES, None):
        get_session().timeout = HUB_TIMEOUT
        try:
            return request(*arguments, **options)
        except Exception as error:  # of the client or of its transport, whose classes differ between versions
            response = getattr(error, "response", None)
            if response is None:  # a JSONDecodeError is a ValueError, but comes from a proxy's error page
                lasting = isinstance(error, LASTING_ERRORS) and not isinstance(error, json.JSONDecodeError)
            else:
                lasting = response.status_code < 500 and response.status_code not in (408, 409, 412, 429)
            if lasting or pause is None:
                raise
            time.sleep(pause if response is None else max(pause, requested_pause(response)))


def requested_pause(response) -> int:
    """Seconds that the Hub asks to wait, at most 330: it counts requests in windows of 300 seconds."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    seconds = str(limit.reset_in_seconds) if limit else response.headers.get("Retry-After", "")
    return min(int(seconds), 330) if seconds.isdigit() else 0


def file_of(source: str, file: str, **options) -> Path:
    """A file of a local folder, or of a repository on the Hub."""
    return Path(source, file) if os.path.isdir(source) else Path(hf_hub_download(source, file, **options))


def create_repo(name: str, repo_type: str, private: bool, **options) -> str:
    """Creates the repository unless it exists, and returns its id with the namespace. Exits with one line if the token
    cannot write to it. `options`: more of `HfApi.create_repo`'s."""
    try:
        options |= {"repo_type": repo_type, "private": private or None, "exist_ok": True}
        repo_id = retried(HfApi().create_repo, name, **options).repo_id
        try:  # `create_repo` also succeeds for an existing repository that the token can only read
            retried(HfApi().auth_check, repo_id, repo_type=repo_type, write=True)
        except Exception as error:
            response = getattr(error, "response", None)
            if response is None or response.status_code != 404:  # a self-hosted Hub may not know this question
                raise
        check_hub_card(repo_id, repo_type)
    except Exception as error:
        problem = f"--push_to_hub: the {repo_type} repository {name} cannot be written to: {one_line(error)}"
        raise SystemExit(f"{problem}; it takes a token with write access (hf auth login, or HF_TOKEN)") from None
    return repo_id


def check_card(file: Path) -> None:
    """Exits with one line if a card exists and cannot be read: at its end the run keeps what people wrote into it."""
    try:
        if file.exists():
            RepoCard(file.read_text(), ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise SystemExit(f"{file} is no card that can be kept: {one_line(error)}: mend or remove it") from None


def check_hub_card(repo_id: str, repo_type: str) -> None:
    """The same for the card of a repository."""
    head = retried(HfApi().repo_info, repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)
    if "README.md" in {file.rfilename for file in head.siblings}:
        check_card(Path(retried(hf_hub_download, repo_id, "README.md", repo_type=repo_type, revision=head.sha)))


def card_block(text: str) -> str:
    """The part of a card that a run writes, between its marks; a prompt may hold anything, even a mark."""
    return f"{CARD_BEGIN}\n{text.strip().replace('<!--', '<! --')}\n{CARD_END}\n"


def make_card(front: dict, body: str, file: Path | None = None) -> str:
    """The text of a card. If `file` exists, what people wrote into it stays."""
    card = RepoCard(f"---\n{CardData(**front).to_yaml()}\n---\n\n{body}")
    return str(merge_cards(card, RepoCard(file.read_text())) if file and file.exists() else card)


def merge_cards(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """Updates and returns `theirs`, a card that people may have edited. CARD_FACTS and the text between the marks come
    from `mine`, the card of this run; of its other metadata only what they lack is added."""
    licensed = "license" in theirs.data  # then name and link of this run's licence do not belong to it
    for name, value in mine.data.to_dict().items():
        if name in CARD_FACTS or name not in theirs.data and not (licensed and name.startswith("license_")):
            theirs.data[name] = value
    marked = f"(.*)({re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)})(.*)"
    block, old = re.fullmatch(marked, mine.text, re.S), re.fullmatch(marked, theirs.text, re.S)
    block = block[2] if block else mine.text.strip()
    if old:
        theirs.text = f"{old[1]}{block}{old[3]}"
    elif theirs.text.strip():
        theirs.text = f"{theirs.text.rstrip()}\n\n{block}\n"
    else:
        theirs.text = mine.text
    return theirs


def push_to_hub(
    repo_id: str, repo_type: str, files: dict, message: str, *, card: str = "", merge=merge_cards, replace: tuple = ()
) -> str:
    """Sends files in one commit; those that the Hub has already are not sent again. Returns the card as it is then.

    Args:
        files: name in the repository → local file (Path), or its content (bytes).
        card: the text of README.md, which `merge` combines with the card on the Hub.
        replace: patterns of names; other files on the Hub that match one are deleted.
    """

    def commit() -> str:
        # On top of the state that was read: if somebody edits the card meanwhile, the Hub answers 412: read it again.
        head = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)
        names, merged = {file.rfilename for file in head.siblings}, card
        if card and "README.md" in names:
            readme = hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=head.sha)
            merged = str(merge(RepoCard(card), RepoCard(Path(readme).read_text())))
        new = {**files, "README.md": merged.encode()} if card else files
        operations = [CommitOperationAdd(name, content) for name, content in new.items()]
        stale = [name for name in names - new.keys() if any(fnmatch(name, pattern) for pattern in replace)]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        HfApi().create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=head.sha)
        return merged

    return retried(commit)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: start and stop (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # errors of file systems without locks
LOCK_BEAT = 20  # seconds between two signs of life of a lock's owner
# Errors of the disk and of the system that say nothing about the script.
SYSTEM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
SYSTEM_ERRORS |= {errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ESTALE}
stop_signals: list[tuple[int, float]] = []  # that this process has received, and when


def run_script(main: Callable) -> None:
    """Parses the flags, locks the output folder and runs `main`. An error of the disk ends in one line."""
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_stop_signal)
    transformers_logging.disable_progress_bar()  # of loading weights; downloads and our own work show theirs
    for handler in logging.getLogger("datasets").handlers:  # its errors are raised as well
        handler.addFilter(lambda record: record.levelno != logging.ERROR)
    try:
        args = parse_arguments()
        check_folder_name(Path(args.output_dir))
        number, total = getattr(args, "task_index", 0), getattr(args, "num_tasks", 1)
        with locked(Path(args.output_dir), "--output_dir", task=f"-{number}-of-{total}" if total > 1 else ""):
            main(args)
    except Exception as error:
        if stop_signals:  # another process of this run has ended at its own place
            stop_if_asked(f"before this process was ready for it: {one_line(error)}")
        if problem := system_problem(error):
            raise SystemExit(problem) from None
        raise


class Console:
    """A text stream whose reader may go away, as `| tee log` does at Ctrl-C: what nobody reads is dropped."""

    def __init__(self, stream: IO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def check_folder_name(folder: Path) -> None:
    """Exits with one line if the name of the output folder cannot stand in patterns of files, cards and on the Hub."""
    name = folder.resolve().name
    if len(name.encode()) > 100 or not re.fullmatch(r"[^*?\[\]{}|<>\"'\\\x00-\x1f]+", name):
        shown = repr(name[:110])
        raise SystemExit(f"--output_dir: the name {shown} has over 100 bytes, or one of * ? [ ] {{ }} | < > \" ' \\")


def on_stop_signal(number: int, frame) -> None:
    """The first SIGTERM or Ctrl-C lets the script finish the step or batch in hand; a second one ends it at once."""
    # A launcher passes a signal on that the whole group has received already: this is not a second one.
    if stop_signals and time.monotonic() - stop_signals[0][1] > 2:
        os._exit(128 + number)
    stop_signals.append((number, time.monotonic()))
    if is_first_process() and len(stop_signals) == 1:
        name = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"\n{name}: stops after the work in hand; a second signal stops at once\n".encode())


def stop_if_asked(kept: str) -> None:
    """Ends the script if a signal has asked for that. `kept`: one line, what is kept and how to go on."""
    if stop_signals:
        if is_first_process():
            print(f"stopped: {kept}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stop_signals[0][0])


def system_problem(error: BaseException, where: str = "") -> str | None:
    """One line for an error of the disk or the system, or for one that it caused; None for others. `where`: the folder
    it is about, if the error does not say."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        number, text = getattr(error, "errno", None), one_line(error)
        if match := re.search(r"(?:os error|errno) (\d+)", text):  # of a library that is not written in Python
            number = int(match[1])
        if number in SYSTEM_ERRORS:
            break
        error = error.__cause__ or error.__context__
    else:
        return None
    path = getattr(error, "filename", None) or where
    if not path:
        return f"reading or writing failed: {os.strerror(number)}. Nothing is half-written: the same command goes on"
    path = Path(os.path.abspath(path))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free, inodes = shutil.disk_usage(existing).free, os.statvfs(existing)
    left = f"{free / 1e9:.3g} GB free" + (", no file can be added" if inodes.f_files and not inodes.f_favail else "")
    problem = f"{path} cannot be read or written: {os.strerror(number)} ({existing}: {left})"
    return f"{problem}. Nothing is half-written: the same command goes on"


def load_problem(what: str, error: Exception, where: str = "") -> SystemExit:
    """What to raise if a model or a dataset cannot be loaded: one line. `where`: the folder that loading writes to."""
    return SystemExit(system_problem(error, where) or f"{what}: cannot be loaded: {one_line(error)}")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Ends in one line if what stands in the block cannot load a model."""
    try:
        yield
    except Exception as error:
        raise load_problem(what, error) from None


@contextmanager
def locked(folder: Path, flag: str, wait: bool = False, task: str = "") -> Iterator[None]:
    """Keeps other runs out of a folder, on this machine or on others that share it. If one is there, exits with one
    line, or waits for its end. Only the first process of a run does this. Leaves no empty folder behind.

    A `task`, "-I-of-N", shares the folder with the other tasks of N, but not with itself or a whole run."""
    if not is_first_process():
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"{flag} {folder} is a file")
    # A task leaves the folder: another one may be about to write into it.
    created = [path for path in (folder, *folder.parents) if not task and not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file, ended = folder / f".lock{task}", threading.Event()
    handle = take_lock(file, flag, wait)
    threading.Thread(target=show_life, args=(file, ended), daemon=True).start()
    try:
        # Both take their own lock before they look for others: of two, at least one sees the other.
        siblings = task[task.find("-of-") :]
        for other in set(folder.glob(".lock*")) - {file}:
            if not task or not other.name.endswith(siblings):
                refuse_owner(other, flag, remove=not task)
        yield
    finally:
        ended.set()
        file.unlink(missing_ok=True)
        handle.close()
        for path in created:
            try:
                path.rmdir()
            except OSError:  # it is not empty
                break


def take_lock(file: Path, flag: str, wait: bool) -> IO:
    """Locks a file and writes this process into it. The system drops the lock of a process that dies."""
    waited = False
    while True:
        handle = open(file, "a+")
        handle.seek(0)
        owner = handle.read()
        free = is_free(file, handle, owner, fcntl.LOCK_EX)
        if free and is_file_of(handle, file):
            break
        handle.close()
        if not free and not wait:
            raise SystemExit(f"{flag} {file.parent} is in use by {owner}: wait for its end, or choose another folder")
        if not free and not waited:
            warn(f"{file.parent} is in use by {owner}: waiting for its end")
            waited = True
        stop_if_asked("nothing was begun")
        time.sleep(0 if free else 1)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {platform.node()}")
    handle.flush()
    return handle


def refuse_owner(file: Path, flag: str, remove: bool) -> None:
    """Exits with one line if the owner of another lock is alive. `remove`: takes away the lock of one that is dead."""
    with suppress(FileNotFoundError), open(file, "r+") as handle:
        owner = handle.read()
        if not is_free(file, handle, owner, fcntl.LOCK_SH):  # shared: several tasks may look at once
            raise SystemExit(f"{flag} {file.parent} is in use by {owner}: wait for its end, or choose another folder")
        if remove:
            file.unlink()


def is_free(file: Path, handle: IO, owner: str, kind: int) -> bool:
    """Locks an open file, exclusively or shared; whether its owner, the process that the file names, has ended."""
    try:
        fcntl.lockf(handle, kind | fcntl.LOCK_NB)
        return owner_is_gone(file, owner)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, *NO_LOCKS):
            raise
        if error.errno in NO_LOCKS:
            warn(f"{file.parent} is on a file system without locks: see that no other run writes there")
        return error.errno in NO_LOCKS


def is_file_of(handle: IO, file: Path) -> bool:
    """Whether an open file is still the one of this name: its last owner may have just removed it."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False


def owner_is_gone(file: Path, owner: str) -> bool:
    """Whether the process that a lock names has ended, although its lock is free: some network file systems keep locks
    on one machine only. A live owner changes the file's date."""
    if not owner or owner.endswith(f" on {platform.node()}"):
        return True
    warn(f"{file} names {owner}: watching it for {2 * LOCK_BEAT} s")
    try:
        date = file.stat().st_mtime_ns
        time.sleep(2 * LOCK_BEAT)
        return file.stat().st_mtime_ns == date
    except FileNotFoundError:
        return True


def show_life(file: Path, ended: threading.Event) -> None:
    """Changes a lock's date now and then, until the run has ended."""
    while not ended.wait(LOCK_BEAT):
        with suppress(OSError):
            os.utime(file)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: arguments and files (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# The metadata of a flag that gives its range.
RANGES = {"min": operator.ge, "above": operator.gt, "max": operator.le, "below": operator.lt}
YAML_NULL = ("", "~", "null", "Null", "NULL")
RANGE_WORDS = {"min": "at least", "above": "greater than", "max": "at most", "below": "less than"}
UNFINISHED = "UNFINISHED"  # stands in a folder of data files while they are written


class OneLineParser(TrlParser):
    """TrlParser that ends every usage error in one line. A flag with a `group`, and those after it, stand under that
    title in --help. Metadata that is ours, not argparse's, is left out."""

    group = None

    def add_argument(self, *names, **options):
        if title := options.pop("group", None):
            self.group = self.add_argument_group(title)
        options = {key: value for key, value in options.items() if key not in (*RANGES, "may_change")}
        return self.group.add_argument(*names, **options) if self.group else super().add_argument(*names, **options)

    def error(self, message: str):
        # argparse names both spellings of a flag: --lr_scheduler/--lr-scheduler.
        raise SystemExit(one_line(re.sub(r"^argument |(?<=\w)/--[\w-]+", "", message)))


def parse_arguments(words: list[str] | None = None) -> "ScriptArguments":
    """Parses the command line. `--config file.yaml` adds flags from a file, which the command line overrides."""
    words = list(sys.argv[1:] if words is None else words)
    if "command" in ScriptArguments.__dataclass_fields__ and words and not words[0].startswith("-"):
        words[0] = f"--command={words[0]}"  # of a script that does several things: `user_study.py serve`
    layout = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = OneLineParser(ScriptArguments, allow_abbrev=False, **layout)
    parser.add_argument("--config", type=config_words, metavar="FILE", help="YAML file of flags.")
    arguments = vars(parser.parse_args([*(parser.parse_known_args(words)[0].config or []), *words]))
    return ScriptArguments(**{name: value for name, value in arguments.items() if name != "config"})


def config_words(file: str) -> list[str]:
    """The flags of a YAML file as words of a command line, so that argparse checks their types and choices too."""
    try:
        # BaseLoader leaves every value as text: argparse reads 1e-5 as a number, and `no` stays `no`.
        settings = yaml.load(Path(file).read_text(), Loader=yaml.BaseLoader) or {}
        values = settings.values() if isinstance(settings, dict) else [settings, None]
        lists = [value if isinstance(value, list) else [value] for value in values]
        if not all(isinstance(word, str) for words in lists for word in words) or "config" in settings:
            raise ValueError("it must hold lines of `flag: value` or `flag: [value, value]`, and no `config`")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"{file} cannot be read: {one_line(error)}") from None
    given = {name: words for name, words in zip(settings, lists) if words and settings[name] not in YAML_NULL}
    # A single value stands behind "=": it may begin with "-".
    pairs = ([f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words] for name, words in given.items())
    return [word for pair in pairs for word in pair]


def check_ranges(args: "ScriptArguments") -> None:
    """Exits with one line if a value is outside the range that its flag's metadata gives."""
    for spec in fields(args):
        value = getattr(args, spec.name)
        if isinstance(value, float) and not np.isfinite(value):
            raise SystemExit(f"--{spec.name} {value}: must be a finite number")
        for limit in RANGES.keys() & spec.metadata.keys():
            if value is not None and not RANGES[limit](value, spec.metadata[limit]):
                raise SystemExit(f"--{spec.name} {value}: must be {RANGE_WORDS[limit]} {spec.metadata[limit]}")


def one_line(error: Exception | str) -> str:
    """An error's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


def table_cell(value) -> str:
    """Any text as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def progress_bar(*arguments, **options) -> tqdm:
    """A tqdm bar; where the output is not a terminal it writes at most one line every 30 seconds."""
    pause = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60}
    return tqdm(*arguments, **pause, **options)


class Damaged(Exception):
    """A file that does not hold what was written into it. `file`: its path."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is damaged, or of an earlier version of this script")
        self.file = file


@contextmanager
def replacing(file: Path, keep: bool = False) -> Iterator[Path]:
    """Gives the name of a temporary file, which takes the place of `file` when the block ends, after its content has
    reached the disk. If anything fails, `file` stays as it was, and nothing is left over. With `keep`, a `file` that
    another process has written meanwhile stays, too."""
    # Processes on two machines may have the same number.
    temporary = file.with_name(f".{file.name}.tmp{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with naming(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            if not (keep and is_linked(temporary, file)):
                os.replace(temporary, file)
            sync(file.parent)  # the name, too, is on the disk
    finally:
        temporary.unlink(missing_ok=True)


def is_linked(source: Path, target: Path) -> bool:
    """Gives a file a second name, unless something has that name. False: the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of the disk in this block name this file, unless they are about a file of another folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)).parent != file.parent:
            raise
        raise OSError(error.errno, error.strerror or one_line(error), str(file)) from None


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a whole file, or leaves it as it was."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def save_picture(picture: PILImage.Image, file: Path) -> None:
    """Writes a PNG. Each part of it has a checksum."""
    with replacing(file) as temporary:
        picture.save(temporary, "PNG")


def write_json(file: Path, record: dict) -> None:
    """Writes a JSON file with a checksum, which `read_json` verifies."""
    write_text(file, sealed_json(record))


def sealed_json(record: dict) -> str:
    return json.dumps({**record, "checksum": json_checksum(record)}, indent=2) + "\n"


def read_json(file: Path, sealed: bool = True) -> dict:
    """What `write_json` wrote, without its checksum; {} if there is no such file. Raises Damaged for other content.
    With `sealed` False it also takes a file without a checksum, of an earlier version."""
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_bytes())
        if not sealed and "checksum" not in record:
            return record
        if record.pop("checksum") == json_checksum(record):
            return record
    except (ValueError, LookupError, AttributeError, TypeError):
        pass
    raise Damaged(file)


def json_checksum(record: dict) -> str:
    return short_hash(json.dumps(record, sort_keys=True))


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing but locks: this run's, or those of tasks."""
    return not folder.is_dir() or all(path.name.startswith(".lock") for path in folder.iterdir())


def remove_temporary_files(folder: Path) -> None:
    """Removes what killed runs left in a folder that this run has locked."""
    for path in list(folder.rglob(".*.tmp*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have been in such a folder


warned: set[str] = set()


def warn(text: str) -> None:
    """A line on the console, once, and from the first process only."""
    if is_first_process() and text not in warned:
        warned.add(text)
        print(f"warning: {text}", file=sys.stderr)


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_dataset_folder(flag: str, folder: str, columns: bool = True) -> None:
    """Exits with one line if a local dataset is not whole: its build was interrupted, or a file is missing, unreadable
    or damaged. `columns`: reads the columns, too, and verifies their checksums; else only the list of files."""
    if not os.path.isdir(folder):
        return
    again = "run the command that wrote it again"
    if marks := sorted(Path(folder).rglob(UNFINISHED)):
        raise SystemExit(f"{flag} {folder}: {marks[0].parent} is unfinished: {again}")
    files = sorted(file for file in Path(folder).rglob("*.parquet") if "work" not in file.relative_to(folder).parts)
    series = {}
    for file in files:
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.parquet", file.name):
            series.setdefault((file.parent, match[1]), {}).setdefault(int(match[3]), set()).add(int(match[2]))
    for (parent, name), found in series.items():
        (total, numbers), *others = found.items()
        if others:
            kinds = " and ".join(f"{name}-*-of-{total:05d}.parquet" for total in sorted(found))
            raise SystemExit(f"{flag} {folder}: {parent} holds files of two datasets, {kinds}: remove those of one")
        if numbers != set(range(total)):
            have = f"{len(numbers)} of the {total} files {name}-*-of-{total:05d}.parquet"
            raise SystemExit(f"{flag} {folder}: {parent} holds {have}: {again}, or fetch the dataset again")
    for file in progress_bar(files if columns and is_first_process() else [], desc="check data", unit="file", delay=5):
        stop_if_asked("nothing was begun")
        try:
            check_pages(file)
        except Damaged:
            raise SystemExit(f"{flag} {folder}: {file} is damaged: {again}, or fetch the file again") from None


def check_pages(file: Path) -> None:
    """Reads a Parquet file and verifies the checksums of its pages, where it has them. Raises Damaged."""
    with reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        rows = sum(len(parquet.read_row_group(group)) for group in range(parquet.num_row_groups))
        if rows != parquet.metadata.num_rows:
            raise Damaged(file)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """What readers of Parquet raise in this block on a damaged file becomes Damaged."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        if getattr(error, "errno", None) or isinstance(error, MemoryError):  # not the content
            raise
        raise Damaged(file) from None


def folder_digest(folder: str) -> str:
    """A hash of the names, sizes and content of a folder's files, whatever their dates: of a model, or of a dataset
    without what is written again at every run (card, pictures, statistics) and without the work shards. Of a large
    file it reads blocks that are spread over it, the last one included."""
    others = ("work", "README.md", "grid.png", "figures", "statistics.json")
    names = sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    # Hidden files and folders are other programs' records: .git, .cache/huggingface.
    names = [name for name in names if name.parts[0] not in others and not any(p[0] == "." for p in name.parts)]
    blocks, block_size = (max(1, min(64, 4096 // len(names))), 2**16) if 0 < len(names) < 4096 else (1, 2**12)
    return short_hash("|".join(f"{name}:{sampled_digest(Path(folder, name), blocks, block_size)}" for name in names))


def sampled_digest(file: Path, blocks: int, block_size: int = 2**16) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with open(file, "rb") as handle:
        last = max(size - block_size, 0)
        whole = size <= blocks * block_size
        for start in range(0, max(size, 1), block_size) if whole else np.linspace(0, last, blocks + 1)[1:].astype(int):
            handle.seek(start)
            digest.update(handle.read(block_size))
    return digest.hexdigest()


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """A picture of any kind as 8-bit RGB: 16 bits keep their brightness, what is transparent becomes white. Raises
    ValueError for pixels whose range is not known."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I") and max(image.getextrema()) > 65535:
        raise ValueError("its pixels are not of 8 or 16 bits: convert the image")
    if image.mode.startswith("I"):
        return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        warn("transparent images get a white background")
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def file_digest(file: Path) -> str:
    """A hash of the whole content of a file."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def short_hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def local_cache(folder: str) -> str | None:
    """Where `load_dataset` caches a local folder; None for a dataset of the Hub. Its own key depends on the folder's
    card, not on its files: it would return the old rows of a dataset that was built again."""
    local = os.path.isdir(folder)
    return os.path.join(datasets_config.HF_DATASETS_CACHE, f"local-{folder_digest(folder)}") if local else None


if __name__ == "__main__":
    run_script(main)
