# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets", "fastapi", "filelock", "gradio", "huggingface_hub", "matplotlib", "numpy", "pillow", "pyyaml",
#     "scipy", "tqdm", "uvicorn",
# ]
# ///
"""A blinded user study: people say which of two pictures is better, and their votes become figures and data.

    python user_study.py serve --study_dir outputs/study --evaluation_dir outputs/evaluation --prompts heldout.txt

This takes the images that evaluate.py drew (or any: --images), samples prompts, and shows a page at
http://127.0.0.1:7860: a prompt, two pictures, three questions. Raters do not see which model drew what. After a crash,
`serve --study_dir outputs/study` goes on. `space` makes the page a Space on the Hub. Then majorities, win rates with
intervals, agreement, a table and a chart; and the votes as preference pairs, or as rankings, to train on:

    python user_study.py tally --study_dir outputs/study
    python user_study.py export --study_dir outputs/study --output_dir outputs/people-pairs
"""

import argparse
import csv
import glob
import hashlib
import hmac
import itertools
import json
import operator
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args, get_origin
from urllib.parse import urlsplit

import numpy as np
import yaml
from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, CommitScheduler, HfApi, RepoCard, hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import get_session
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm


# The questions of the DPO-QSD paper, and RankDPO's one.
QUESTIONS = {
    "general": "Which image do you prefer given the prompt?",
    "appeal": "Which image is more visually appealing? Leave the prompt aside.",  # the page hides it
    "alignment": "Which image better fits the text description?",
    "overall": "Which image is better overall, in how well it fits the text and in how good it looks?",
}
CONSENT = """You compare pictures that computers drew. Your answers are stored under a random number, without your \
name or address, and may be published. You may stop at any time. Some pictures may be unpleasant."""
STUDY, VOTES, PICTURES = "study.json", "votes", "pictures"  # what a study's folder holds
# The flags that make a study: one that exists goes on with the same ones only.
MAKING = """evaluation_dir images prompts num_prompts per_category seed questions allow_ties category_column models
baseline votes_per_comparison comparisons_per_rater attention_checks max_failed_checks picture_size consent""".split()
HELD_MINUTES = 60  # a comparison that was shown and not answered goes to somebody else after this time
FEW_PROMPTS, FEW_RATERS = 25, 5  # an interval over fewer prompts or raters carries a warning
DATA_FILE = re.compile(r"data/train-\d{5}-of-\d{5}\.parquet")
CHECK_SPACING = 10  # a test pair comes after so many comparisons, or sooner where a rater sees few
CARD_FACTS = ("size_categories", "configs", "dataset_info")  # the metadata of the card that every run replaces
CARD_BEGIN = "<!-- user_study.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what user_study.py wrote. -->"
# Copied from build_synpic.COMPARE
COMPARE = {"at least": operator.ge, "greater than": operator.gt, "at most": operator.le, "less than": operator.lt}


# Copied from build_synpic.flag
def flag(default, help: str, group: str | None = None, *, min=None, above=None, max=None, below=None, **options):
    """A field of the command line, with its range. `group`: the title in --help of the flags from here on."""
    help += "" if default in (None, list) else f" Default: {' '.join(default()) if callable(default) else default}."
    metadata = {"help": help, "group": group, "limits": dict(zip(COMPARE, (min, above, max, below))), **options}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


@dataclass
class ScriptArguments:
    command: Literal["serve", "space", "tally", "export"] = flag("serve", "What to do: the first word.", "Study")
    study_dir: str = flag("outputs/study", "Folder of the study: prompts, pictures and votes.")
    output_dir: str | None = flag(None, "Folder that tally, export or space writes. Default: in --study_dir.")
    seed: int = flag(0, "Seeds the sample and the bootstrap.", min=0, max=2**32 - 1)
    evaluation_dir: str | None = flag(None, "Folder of evaluate.py, with the images that it drew.", "A new study")
    models: list[str] = flag(list, "Which models of --evaluation_dir. Default: all.")
    images: list[str] = flag(list, "name=TEMPLATE of other models' pictures, e.g. a=/data/a/{index:05d}.png.")
    baseline: str | None = flag(None, "Compare every model with this one only. Default: every two models.")
    prompts: str | None = flag(None, "File, URL, dataset or named set that the images were drawn from, in its order.")
    prompt_column: str | None = flag(None, "Column of the prompts. Default: prompt, or the named set's.")
    prompt_split: str | None = flag(None, "Split of a dataset. Default: train, or the named set's.")
    category_column: str | None = flag(None, "Column of categories. Default: the named set's.")
    max_prompts: int | None = flag(None, "The images are of the first N distinct prompts.", min=1)
    num_prompts: int | None = flag(None, "Prompts to sample. Default: 100, or all if there are fewer.", min=1)
    per_category: int | None = flag(None, "Prompts to sample from each category, instead of --num_prompts.", min=1)
    questions: list[str] = flag(lambda: list(QUESTIONS)[:3], f"{', '.join(QUESTIONS)}, or name=text: what is better?")
    allow_ties: bool = flag(False, "Raters may answer that they see no difference.")
    votes_per_comparison: int = flag(5, "Raters who see each comparison.", min=1)
    comparisons_per_rater: int | None = flag(None, "At most so many comparisons for one rater. Default: all.", min=1)
    attention_checks: int = flag(0, "Hidden test pairs per rater: a picture and noise; with ties, also itself.", min=0)
    max_failed_checks: int | None = flag(None, "Raters who fail more are left out. Default: 0, or the study's.", min=0)
    picture_size: int = flag(1024, "Longest side of the pictures that raters see, in pixels.", min=16, max=4096)
    consent: str = flag(CONSENT, "What raters read before they begin.")
    host: str = flag("127.0.0.1", "Address to listen on. 0.0.0.0: all of this machine's.", "Page")
    port: int = flag(7860, "Port to listen on.", min=1, max=65535)
    question: str | None = flag(None, "The question to export. Default: the study's first.", "Tally and export")
    export_format: Literal["pairs", "ranked"] = flag("pairs", "pairs: Pick-a-Pic's columns. ranked: Syn-Pic's.")
    push_to_hub: bool = flag(False, "Upload: votes (serve), Space, results (tally) or dataset (export).", "Hub")
    hub_dataset_id: str | None = flag(None, "Dataset of the votes (serve, space; private), or of the export.")
    hub_space_id: str | None = flag(None, "Repository of the Space.")
    hub_model_id: str | None = flag(None, "Repository of the LoRA whose card gets the results.")
    hub_private_repo: bool = flag(False, "Make a new repository private. The dataset of the votes always is.")

    def __post_init__(self):
        for spec in fields(self):
            value = getattr(self, spec.name)
            for words, limit in spec.metadata["limits"].items():
                if None not in (value, limit) and not COMPARE[words](value, limit):
                    raise SystemExit(f"--{spec.name} {value}: must be {words} {limit}")
        if self.command == "serve" and self.output_dir:
            raise SystemExit("--output_dir is for the other commands: serve writes to --study_dir")
        complete_prompt_flags(self)
        parse_questions(self.questions)
        folders = {"serve": "", "space": "space", "tally": "tally", "export": self.export_format}
        self.output_dir = self.output_dir or str(Path(self.study_dir, folders[self.command]))
        ids = {"serve": "hub_dataset_id", "space": "hub_space_id", "tally": "hub_model_id", "export": "hub_dataset_id"}
        needed = [ids[self.command]] * self.push_to_hub + ["hub_dataset_id"] * (self.command == "space")
        if missing := [name for name in needed if not getattr(self, name)]:
            raise SystemExit(f"--{missing[0]} is missing: name the repository, e.g. user/study")


# Who sees what -------------------------------------------------------------------------------------------------------
def sample_prompts(categories: list[str], num_prompts: int, per_category: int | None, seed: int) -> list[int]:
    """Numbers of the prompts of a study, ascending: drawn without replacement, from all or from each category."""
    rng = np.random.default_rng(seed)
    groups = {"": range(len(categories))}
    if per_category:
        groups = {name: [i for i, c in enumerate(categories) if c == name] for name in dict.fromkeys(categories)}
    wanted, flag_name = (per_category, "--per_category") if per_category else (num_prompts, "--num_prompts")
    for name, members in groups.items():
        if len(members) < wanted:
            raise SystemExit(f"{flag_name} {wanted}: {name or 'the source'} has {len(members)} prompts: choose fewer")
    return sorted(int(i) for members in groups.values() for i in rng.choice(members, wanted, replace=False))


def keyed(secret: str, *parts) -> str:
    """A number in hex that looks random without the study's secret, and is the same at every start."""
    return hmac.new(secret.encode(), "|".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()[:32]


def next_comparison(loads: dict[str, int], seen: set[str], wanted: int, secret: str, rater: str) -> str | None:
    """The comparison that a rater sees next: the one with the fewest raters, of those that still want some and that
    this rater has not seen; among equals in an order of the rater's own. `loads`: comparison → raters."""
    left = [item for item, load in loads.items() if load < wanted and item not in seen]
    return min(left, key=lambda item: (loads[item], keyed(secret, "order", rater, item)), default=None)


def first_goes_left(secret: str, rater: str, pair: tuple[str, str], number: int) -> bool:
    """Whether the first model of a pair stands on the left, the `number`-th time that a rater sees this pair of models:
    once in every two times, at random. So nobody sees a model on one side more often."""
    return (int(keyed(secret, "side", rater, *pair, number // 2), 16) + number) % 2 == 0


# What the votes say --------------------------------------------------------------------------------------------------
def is_check(vote: dict) -> bool:
    return vote["item"].startswith("check")


def final_votes(log: Iterable[dict]) -> list[dict]:
    """The votes that count: of every rater, comparison and question the last one. "chosen": a model, or "tie"."""
    votes = {(line["rater"], line["item"], line["question"]): line for line in log if "answer" in line}
    return [vote | {"chosen": vote.get(vote["answer"], "tie")} for vote in votes.values()]


def failed_checks(votes: list[dict]) -> Counter[str]:
    """Rater → test pairs with a wrong answer: the noise was chosen, or one of two equal pictures."""
    wrong = set()
    for vote in filter(is_check, votes):
        right = ["tie"] if vote["left"] == vote["right"] else {vote["left"], vote["right"]} - {"noise"}
        if vote.get(vote["answer"], "tie") not in right:
            wrong.add((vote["rater"], vote["item"]))
    return Counter(rater for rater, _ in wrong)


def kept_votes(votes: list[dict], max_failed_checks: int) -> tuple[list[dict], list[str]]:
    """The votes on comparisons without those of excluded raters, and these raters: who failed more test pairs."""
    excluded = sorted(rater for rater, number in failed_checks(votes).items() if number > max_failed_checks)
    return [vote for vote in votes if vote["rater"] not in excluded and not is_check(vote)], excluded


def majority(first: np.ndarray, second: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """The decision of each comparison, the option with more than half of its votes: 1 the first model, 0 the second,
    0.5 neither: an even split, or ties. Takes the votes for the first model, for the second, and all of them."""
    return 0.5 + 0.5 * (2 * first > votes) - 0.5 * (2 * second > votes)


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Fleiss' kappa: agreement beyond chance, 1 at most; None if votes do not differ, or no row has two. Rows may have
    different numbers of votes (then each weighs the same); a single vote says nothing."""
    counts = counts[counts.sum(axis=1) >= 2].astype(np.float64)
    if not len(counts):
        return None
    n = counts.sum(axis=1)
    agreement = ((counts * (counts - 1)).sum(axis=1) / (n * (n - 1))).mean()
    chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return float((agreement - chance) / (1 - chance)) if chance < 1 else None


def bootstrap(first: np.ndarray, second: np.ndarray, votes: np.ndarray, seed: int, resamples: int = 10_000):
    """95 % intervals of the share of comparisons that the first model wins by majority (undecided ones count half), and
    of its share of the votes (a tie counts half). Takes the votes for the first model, for the second, and all of them,
    each (n_prompts, n_raters). The cluster bootstrap over prompts and raters, drawn with replacement: a vote counts as
    often as its prompt was drawn, times as often as its rater was. Every resample decides by majority anew. Its raters
    are fewer than there were (some are drawn twice), so its majorities are closer to one half; the spread of the
    resamples is therefore laid around the figure itself."""
    rng, won, shares = np.random.default_rng(seed), [], []
    wins = first + 0.5 * (votes - first - second)
    for _ in range(0, resamples, 500):
        prompts, raters = (rng.multinomial(n, np.full(n, 1 / n), size=500).astype(np.float64) for n in votes.shape)
        all_votes = raters @ votes.T
        weights = prompts * (all_votes > 0)
        decisions = majority(raters @ first.T, raters @ second.T, all_votes)
        with np.errstate(invalid="ignore"):  # no vote was drawn: only with very few votes
            won.append((weights * decisions).sum(axis=1) / weights.sum(axis=1))
            shares.append(((prompts @ wins) * raters).sum(axis=1) / ((prompts @ votes) * raters).sum(axis=1))
    won, figure = np.concatenate(won), majority(*(kind.sum(axis=1) for kind in (first, second, votes))).mean()
    of_won = np.nanpercentile(won - np.nanmean(won) + figure, [2.5, 97.5]).clip(0, 1)
    return of_won.tolist(), np.nanpercentile(np.concatenate(shares), [2.5, 97.5]).tolist()


def agreement_with_others(votes: list[dict]) -> dict[str, float]:
    """Rater → share of the rater's votes that agree with the majority of the other raters, where they have one."""
    counts, agreed = {}, {}
    for vote in votes:
        counts.setdefault((vote["item"], vote["question"]), Counter())[vote["chosen"]] += 1
    for vote in votes:
        others = counts[vote["item"], vote["question"]] - Counter([vote["chosen"]])
        for top, number in others.most_common(1):
            if 2 * number > others.total():
                agreed.setdefault(vote["rater"], []).append(top == vote["chosen"])
    return {rater: float(np.mean(values)) for rater, values in agreed.items()}


def tally(record: dict, log: Iterable[dict], max_failed_checks: int, seed: int) -> dict:
    """All figures of a study: {"raters": counts and each rater's figures, "pairs": model → other → question → figures}.
    `record`: of study.json; `log`: the lines of its votes."""
    everything = final_votes(log)
    kept, excluded = kept_votes(everything, max_failed_checks)
    checks = {(vote["rater"], vote["item"]) for vote in everything if is_check(vote)}
    failed, seen = failed_checks(everything), Counter(rater for rater, _ in checks)
    agreement, counts = agreement_with_others(kept), Counter(vote["rater"] for vote in kept)
    each = {}
    for rater in sorted(counts):
        each[rater] = {"votes": counts[rater], "checks": seen[rater], "failed_checks": failed[rater]}
        each[rater]["agreement"] = agreement.get(rater)
    n_votes = sum(not is_check(vote) for vote in everything)
    raters = {"n_raters": len({vote["rater"] for vote in everything}), "n_excluded": len(excluded)}
    raters |= {"n_votes": len(kept), "n_votes_excluded": n_votes - len(kept), "excluded": excluded, "each": each}
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
    from scipy.stats import binomtest

    items, raters = (sorted({vote[key] for vote in votes}) for key in ("item", "rater"))
    # One comparison of two models per prompt: the rows are the prompts.
    answers = np.zeros((3, len(items), len(raters)))
    for vote in votes:
        answers[(name, other, "tie").index(vote["chosen"]), items.index(vote["item"]), raters.index(vote["rater"])] = 1
    (first, second, ties), counts = answers, answers.sum(axis=2)
    n_each = counts.sum(axis=0)
    decisions = majority(counts[0], counts[1], n_each)
    decided = decisions[decisions != 0.5]
    n_wins, sides = int(decided.sum()), [vote["answer"] for vote in votes if vote["answer"] != "tie"]
    of_wins, of_votes = bootstrap(first, second, answers.sum(axis=0), seed)
    figures = {
        "n_comparisons": len(items),
        "n_votes": len(votes),
        "n_raters": len(raters),
        "votes_per_comparison": [int(n_each.min()), int(n_each.max())],
        "wins": n_wins,
        "losses": len(decided) - n_wins,
        "undecided": len(items) - len(decided),
        "win_rate": float(decisions.mean()),
        "win_rate_ci95": of_wins,
        "win_rate_decided": float(decided.mean()) if len(decided) else None,
        "sign_test_p": float(binomtest(n_wins, len(decided)).pvalue) if len(decided) else None,
        "vote_share": float((first + 0.5 * ties).sum() / len(votes)),
        "vote_share_ci95": of_votes,
        "tie_share": float(ties.sum() / len(votes)),
        "fleiss_kappa": fleiss_kappa(counts.T),
        "left_share": sides.count("left") / len(sides) if sides else 0.5,
    }
    return figures | {"verdict": verdict(name, other, figures)}


def verdict(name: str, other: str, figures: dict) -> str:
    """What the interval of the win rate says, in plain words."""
    low, high = figures["win_rate_ci95"]
    shown = f"{figures['win_rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"
    count, raters = figures["n_comparisons"], figures["n_raters"]
    few = count < FEW_PROMPTS or raters < FEW_RATERS
    cause = "" if few else " Chance alone is an unlikely cause."
    if low > 0.5:
        text = f"People prefer {name} to {other}: {shown}.{cause}"
    elif high < 0.5:
        text = f"People prefer {other} to {name}: {name} wins {shown}.{cause}"
    else:
        text = f"No preference is shown: {name} wins {shown}, which contains 50 %."
    return text + f" Only {count} comparisons by {raters} raters: the interval says little." * few


# Commands ------------------------------------------------------------------------------------------------------------
def main(args: ScriptArguments) -> None:
    {"serve": serve, "space": write_space, "tally": report, "export": export}[args.command](args)


def serve(args: ScriptArguments) -> None:
    """Shows the page until a signal ends it. Makes the study first, unless it exists."""
    folder, signals, scheduler = Path(args.study_dir), [], None
    if args.push_to_hub:
        args.hub_dataset_id = open_repository(args.hub_dataset_id, "dataset", private=True, only_private=True)
        sync_study(args.hub_dataset_id, folder)
    others = {path.name for path in folder.glob("[!.]*")} - {VOTES, PICTURES}
    if others and not (folder / STUDY).exists():
        raise SystemExit(f"--study_dir {folder} holds other files ({min(others)}): choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SystemExit(f"--study_dir {folder} is served by another process: wait for its end") from None
    if args.prompts or not (folder / STUDY).exists():
        make_study(args)
    defaults = ScriptArguments()
    given = {name: getattr(args, name) for name in MAKING if getattr(args, name) != getattr(defaults, name)}
    check_settings(folder, given)
    study = Study(folder)
    for number in (signal.SIGTERM, signal.SIGINT):  # the server takes them while it runs, and passes them on at its end
        signal.signal(number, lambda number, frame: signals.append(number))
    server, listening = page_server(study, args.host, args.port)
    if args.push_to_hub:  # the study, and this server's log every minute in which it has grown
        where = {"repo_id": args.hub_dataset_id, "repo_type": "dataset", "folder_path": folder, "every": 1}
        scheduler = CommitScheduler(**where, allow_patterns=[STUDY, f"{VOTES}/{study.log.name}"])
    print(f"{len(study.comparisons)} comparisons, {study.record['votes_per_comparison']} raters each", flush=True)
    print(f"the page is at http://{args.host}:{args.port}: Ctrl-C ends it, and the same command goes on", flush=True)
    server.run(sockets=[listening])
    print(f"all votes are in {folder / VOTES}: the same command goes on", file=sys.stderr)
    if scheduler:
        scheduler.trigger().result()
    raise SystemExit(128 + signals[0] if signals else 1)


def report(args: ScriptArguments) -> None:
    """Writes results.json, results.md and chart.png, and puts them into the card of a LoRA."""
    folder, output_dir = Path(args.study_dir), Path(args.output_dir)
    record = read_study(folder)
    check_output_dir(output_dir, "results.json", '"votes_per_comparison"')
    if args.push_to_hub:
        args.hub_model_id = open_repository(args.hub_model_id, "model", args.hub_private_repo)
    most = record["max_failed_checks"] if args.max_failed_checks is None else args.max_failed_checks
    results = tally(record, read_votes(folder), most, args.seed)
    if not results["raters"]["n_votes"]:
        raise SystemExit(f"{folder / VOTES}: no votes to count ({results['raters']['n_excluded']} raters left out)")
    settings = {key: record[key] for key in ("questions", "allow_ties", "votes_per_comparison", "n_checks", "seed")}
    settings |= {"n_prompts": len(record["prompts"]), "max_failed_checks": most}
    table = markdown_report(record, results, most)
    write_text(output_dir / "results.json", json.dumps({"settings": settings, **results}, indent=2) + "\n")
    write_text(output_dir / "results.md", table)
    draw_chart(results, output_dir / "chart.png")
    print(table)
    files = ", ".join(str(output_dir / name) for name in ("results.json", "results.md", "chart.png"))
    print(f"{files}; the votes as a dataset to train on: user_study.py export --study_dir {folder}")
    if args.push_to_hub:
        publish_results(args, settings, results, table)


def export(args: ScriptArguments) -> None:
    """Writes the votes of one question as a preference dataset."""
    folder, output_dir = Path(args.study_dir), Path(args.output_dir)
    record = read_study(folder)
    question = args.question or next(iter(record["questions"]))
    if question not in record["questions"]:
        raise SystemExit(f"--question {question}: the study asks {', '.join(record['questions'])}")
    check_output_dir(output_dir, "README.md", CARD_BEGIN)
    card = RepoCard.load(output_dir / "README.md") if (output_dir / "README.md").exists() else None
    if args.push_to_hub:
        args.hub_dataset_id = open_repository(args.hub_dataset_id, "dataset", args.hub_private_repo)
        names = HfApi().list_repo_files(args.hub_dataset_id, repo_type="dataset")
        theirs = RepoCard.load(args.hub_dataset_id, repo_type="dataset") if "README.md" in names else None
        if any(map(DATA_FILE.fullmatch, names)) and not (theirs and CARD_BEGIN in theirs.text):
            raise SystemExit(f"--hub_dataset_id {args.hub_dataset_id} holds other data: choose another name")
        card = theirs or card
    most = record["max_failed_checks"] if args.max_failed_checks is None else args.max_failed_checks
    votes, _ = kept_votes(final_votes(read_votes(folder)), most)
    make = pair_rows if args.export_format == "pairs" else ranked_rows
    rows, left_out = make(record, folder, [vote for vote in votes if vote["question"] == question])
    if not rows:
        raise SystemExit(f"{folder / VOTES}: no {args.export_format} to export for --question {question}: {left_out}")
    write_dataset(args, rows, record["questions"][question], left_out, card)
    if args.push_to_hub:
        patterns = {"allow_patterns": ["data/*.parquet", "README.md"], "delete_patterns": "data/train-*.parquet"}
        HfApi().upload_folder(repo_id=args.hub_dataset_id, repo_type="dataset", folder_path=output_dir, **patterns)
        print(f"published: {HfApi().endpoint}/datasets/{args.hub_dataset_id}")


def write_space(args: ScriptArguments) -> None:
    """Writes the folder of a Space that serves the study. Its pictures have names without meaning; which model drew
    which stands in study.json, which goes into the private dataset of the votes."""
    folder, output_dir, script = Path(args.study_dir), Path(args.output_dir), Path(__file__)
    record = read_study(folder)
    check_output_dir(output_dir, "app.py", SPACE_APP.partition(" Votes")[0])
    if args.push_to_hub:
        args.hub_space_id = open_repository(args.hub_space_id, "space", args.hub_private_repo, space_sdk="gradio")
        args.hub_dataset_id = open_repository(args.hub_dataset_id, "dataset", private=True, only_private=True)
    write_text(output_dir / "app.py", SPACE_APP.format(dataset=args.hub_dataset_id))
    write_text(output_dir / "requirements.txt", "\n".join([*SPACE_PACKAGES, ""]))
    write_text(output_dir / "README.md", SPACE_CARD.format(dataset=args.hub_dataset_id))
    write_text(output_dir / script.name, script.read_text())
    (output_dir / PICTURES).mkdir(exist_ok=True)
    pictures = {picture_file(folder, record, *key) for key in picture_keys(record)}
    for file in pictures:
        shutil.copyfile(file, output_dir / PICTURES / file.name)
    print(f"the Space is in {output_dir}" + "; --push_to_hub publishes it" * (not args.push_to_hub))
    if args.push_to_hub:
        sync_study(args.hub_dataset_id, folder)
        names = ["app.py", "requirements.txt", "README.md", script.name, *(f"{PICTURES}/{f.name}" for f in pictures)]
        patterns = {"allow_patterns": names, "delete_patterns": f"{PICTURES}/*"}
        HfApi().upload_folder(repo_id=args.hub_space_id, repo_type="space", folder_path=output_dir, **patterns)
        print(f"published: {HfApi().endpoint}/spaces/{args.hub_space_id}; now add the secret HF_TOKEN in its settings")


# The study's folder --------------------------------------------------------------------------------------------------
def parse_questions(items: list[str]) -> dict[str, str]:
    """Name → text of the questions of --questions."""
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        text = text.strip() or QUESTIONS.get(name)
        if not re.fullmatch(r"\w{1,40}", name) or not text or name in found:
            raise SystemExit(f"--questions {item!r}: must be one of {', '.join(QUESTIONS)}, or name=text, each once")
        found[name] = text
    return found


def check_output_dir(folder: Path, name: str, mark: str) -> None:
    """Exits with one line unless the folder is empty, or holds a file of this name with the command's mark."""
    own = (folder / name).is_file() and mark in (folder / name).read_text()
    # Others' Parquet files would count as rows of the dataset, or be removed.
    foreign = [file for file in folder.glob("data/*.parquet") if not DATA_FILE.fullmatch(f"data/{file.name}")]
    if any(folder.glob("[!.]*")) and not own or foreign:
        raise SystemExit(f"--output_dir {folder} holds other files: choose another folder")


def read_study(folder: Path) -> dict:
    if not (folder / STUDY).exists():
        raise SystemExit(f"--study_dir {folder} holds no study: serve makes one, with --prompts and --evaluation_dir")
    return json.loads((folder / STUDY).read_text())


def make_study(args: ScriptArguments) -> None:
    """Samples prompts, writes the pictures as raters will see them, and then study.json. If the study exists, exits
    with one line unless it was made with these settings."""
    folder, by_category = Path(args.study_dir), args.category_column
    if not args.prompts:
        raise SystemExit(f"{folder} holds no study: give --prompts, and --evaluation_dir or --images")
    if args.per_category and not by_category:
        raise SystemExit("--per_category needs --category_column, the column of the categories")
    source = (args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    rows, places = read_prompts(*source, (by_category,) * bool(by_category), any("{row[" in t for t in args.images))
    args.num_prompts = args.num_prompts or min(100, len(rows))
    categories = [str(row[by_category]) if by_category else "" for row in rows]
    digest = short_hash("\n".join(row["prompt"] for row in rows))  # as evaluate.py records it with its images
    settings = {"all_prompts": digest} | {name: getattr(args, name) for name in MAKING}
    if (folder / STUDY).exists():
        return check_settings(folder, settings)
    sources = find_images(args, rows, places, digest)
    models = list(sources)
    if args.baseline and args.baseline not in models:
        raise SystemExit(f"--baseline {args.baseline}: no such model; the models are {', '.join(models)}")
    pairs = [pair for pair in itertools.combinations(models, 2) if not args.baseline]
    pairs += [(name, args.baseline) for name in models if args.baseline not in (None, name)]
    chosen = sample_prompts(categories, args.num_prompts, args.per_category, args.seed)
    rng, checks = np.random.default_rng([args.seed, 1]), []
    for number in range(args.attention_checks):
        check = {"prompt": int(rng.integers(len(chosen))), "model": models[number % len(models)]}
        checks.append(check | {"kind": "same" if args.allow_ties and number % 2 else "noise"})
    prompts = [{"index": i, "prompt": rows[i]["prompt"], "category": categories[i]} for i in chosen]
    record = {"models": models, "pairs": pairs, "prompts": prompts, "checks": checks, "n_checks": len(checks)}
    record |= {"questions": parse_questions(args.questions), "max_failed_checks": args.max_failed_checks or 0}
    same = ("allow_ties", "votes_per_comparison", "comparisons_per_rater", "seed", "consent")
    record |= {name: getattr(args, name) for name in same}
    record |= {"settings": settings, "secret": secrets.token_hex(32)}
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(tqdm(prompts, desc="pictures", unit="prompt")):
        files = {name: files[prompt["index"]] for name, files in sources.items()}
        write_pictures(record, folder, number, files, args.picture_size)
    write_text(folder / STUDY, json.dumps(record, indent=2) + "\n")


def check_settings(folder: Path, settings: dict) -> None:
    """Exits with one line if the study was made with other settings than these."""
    previous = read_study(folder)["settings"]
    for name, value in settings.items():
        if previous.get(name) != value:
            problem = f"{folder} holds a study made with {name} {previous.get(name)}, not {value}"
            raise SystemExit(f"{problem}: choose another --study_dir, or leave the flags out to go on with it")


def find_images(args: ScriptArguments, rows: list[dict], places: list[dict], digest: str) -> dict[str, list[Path]]:
    """Model → the file of every prompt's picture, the first one of several. Exits with one line if a model is not there
    or its images belong to other prompts. The fields of a template are as in evaluate.py."""
    fields_of, column = [], args.category_column
    for row, place in zip(rows, places):
        counted = {"index": place["index"], "category_index": place.get(column, place["index"]), "number": 0}
        counted |= {f"{name}+1": value + 1 for name, value in counted.items()}
        fields_of.append(counted | {"prompt": row["prompt"], "row": row, "category": str(row.get(column, ""))})
    found = {}
    if args.evaluation_dir:
        folder = Path(args.evaluation_dir, "images")
        names = sorted(path.parent.name for path in folder.glob("*/settings.json"))
        names.sort(key=lambda name: name == "base")  # win rates are those of the others over the base
        if not names:
            raise SystemExit(f"--evaluation_dir {args.evaluation_dir}: holds no images of evaluate.py")
        for name in args.models or names:
            if name not in names:
                raise SystemExit(f"--models {name}: {folder} holds images of {', '.join(names)}")
            if json.loads((folder / name / "settings.json").read_text()).get("prompts") != digest:
                raise SystemExit(f"{folder / name} was drawn from other prompts: give evaluate.py's --prompts")
            found[name] = [folder / name / f"{i:05d}_0.png" for i in range(len(rows))]
    for item in args.images:
        name, _, template = item.partition("=")
        if not re.fullmatch(r"[\w.@-]{1,60}", name) or not template or name in found:
            raise SystemExit(f"--images {item}: must be name=TEMPLATE, with a name of its own")
        from_one = re.sub(r"\{((category_)?index)\b(?!\+)", r"{\1+1", template)
        try:
            files = [Path(template.format(**values)) for values in fields_of]
            beyond = Path(from_one.format(**fields_of[-1]))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            names = "{index}, {category_index}, {number} (0), with +1 from 1, {prompt}, {row[COLUMN]} and {category}"
            raise SystemExit(f"--images {item}: wrong template: {one_line(error)}; its fields are {names}") from None
        if beyond.exists() and not files[0].exists():
            raise SystemExit(f"--images {item}: the pictures are counted from 1: write {from_one}")
        found[name] = files
    if taken := {"noise", "tie"} & set(found):
        raise SystemExit(f"a model may not be called {min(taken)}: give it another name, with --images name=TEMPLATE")
    if len(found) < 2:
        raise SystemExit(f"{len(found)} models: name two or more, with --evaluation_dir or --images")
    return found


def picture_keys(record: dict) -> list[tuple[int, str]]:
    """(number of the prompt, model or "noise") of every picture."""
    keys = list(itertools.product(range(len(record["prompts"])), record["models"]))
    return keys + sorted({(check["prompt"], "noise") for check in record["checks"] if check["kind"] == "noise"})


def picture_file(folder: Path, record: dict, number: int, name: str) -> Path:
    """A picture as raters see it, filled up with zeros. The file's name says nothing about its model."""
    return folder / PICTURES / (keyed(record["secret"], "file", number, name) + ".jpg")


def write_pictures(record: dict, folder: Path, number: int, files: dict[str, Path], longest_side: int) -> None:
    """Writes the pictures of one prompt so that nothing but the pixels tells them apart: the same size in pixels, the
    same format without metadata, the same number of bytes."""
    pictures = {name: read_picture(name, file) for name, file in files.items()}
    size = np.array([picture.size for picture in pictures.values()]).min(axis=0)
    size = tuple(int(side) for side in np.maximum(size * min(1, longest_side / size.max()), 1).round())
    pictures = {name: ImageOps.pad(picture, size, PILImage.LANCZOS, "grey") for name, picture in pictures.items()}
    if (number, "noise") in picture_keys(record):
        squares = np.random.default_rng([record["seed"], number]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pictures["noise"] = PILImage.fromarray(squares).resize(size, PILImage.NEAREST)
    buffers = {picture_file(folder, record, number, name): BytesIO() for name in pictures}
    for picture, buffer in zip(pictures.values(), buffers.values()):
        PILImage.fromarray(np.asarray(picture)).save(buffer, "JPEG", quality=95, subsampling=0)
    length = max(buffer.tell() for buffer in buffers.values())
    for file, buffer in buffers.items():  # readers of JPEG ignore what follows its end
        file.write_bytes(buffer.getvalue().ljust(length, b"\0"))


def read_picture(name: str, file: Path) -> PILImage.Image:
    """A picture as 8-bit RGB: 16 bits keep their brightness, what is transparent becomes white."""
    try:
        picture = ImageOps.exif_transpose(PILImage.open(file))
        if picture.mode[0] in "IF":
            if picture.mode == "F" or max(picture.getextrema()) > 65535:
                raise ValueError("its pixels are not of 8 or 16 bits: convert the image")
            picture = PILImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    except Exception as error:  # PIL raises many kinds
        raise SystemExit(f"picture of {name}: {file} cannot be read: {one_line(error)}") from None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# The votes, and the study while it is served -------------------------------------------------------------------------
def read_votes(folder: Path) -> list[dict]:
    """The lines of all logs, one server's after the other's: what was shown to a rater, and what was answered. A last
    line without its end, which a killed server leaves, was never confirmed, and is not among them."""
    logs = [file.read_bytes() for file in sorted((folder / VOTES).glob("*.jsonl"))]
    return [json.loads(line) for log in logs for line in log[: log.rfind(b"\n") + 1].splitlines()]


class Study:
    """A study while it is served: what every rater was shown and answered. All of it is made of the logs, so a restart
    changes nothing. `view` and `answer` return what the page then shows; threads may call them at once."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder, read_study(folder)
        self.secret, self.questions = self.record["secret"], self.record["questions"]
        items = itertools.product(range(len(self.record["prompts"])), enumerate(self.record["pairs"]))
        self.comparisons = {f"{number}-{n}": tuple(models) for number, (n, models) in items}  # item → two models
        self.limit = min(self.record["comparisons_per_rater"] or len(self.comparisons), len(self.comparisons))
        self.prompt_of = {item: int(item.split("-")[0]) for item in self.comparisons}  # item → number of its prompt
        self.prompt_of |= {f"check{n}": check["prompt"] for n, check in enumerate(self.record["checks"])}
        self.shown: dict[str, dict[str, dict]] = {}  # rater → item, in order → line of the log, with the last answers
        self.pictures: dict[str, Path] = {}  # name in the page → file
        self.lock = threading.RLock()
        # Every server has a log of its own, so two of them never write into one file.
        self.log = folder / VOTES / f"{time.time_ns()}-{secrets.token_hex(4)}.jsonl"
        files = [picture_file(folder, self.record, *key) for key in picture_keys(self.record)]
        if missing := [file for file in files if not file.exists()]:
            raise SystemExit(f"{missing[0]} is missing: restore it, or begin a new study")
        for line in read_votes(folder):
            self.take(line)

    def take(self, line: dict) -> None:
        """Takes a line of a log into account."""
        shown = self.shown.setdefault(line["rater"], {}).setdefault(line["item"], line | {"answers": {}})
        for side in ("left", "right"):
            file = picture_file(self.folder, self.record, self.prompt_of[line["item"]], line[side])
            self.pictures[self.picture_name(line, side)] = file
        if "answer" in line:
            shown["answers"][line["question"]] = line["answer"]

    def write(self, line: dict) -> None:
        """Appends a line to this server's log, whole or not at all: it is on the disk when this returns."""
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self.log.parent.mkdir(exist_ok=True)
        with open(self.log, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(f"{self.log}: the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self.take(line)

    def answer(self, rater: str, position: int, question: str, answer: str, seconds: float, picture: str) -> dict:
        """Records an answer, unless it is the last one given or something else stands at this position than in the page
        (`picture`: its left one): then nothing changes, and the page goes on where the rater is."""
        asked, _ = list(self.questions).index(question) + 1, ("left", "right", "tie").index(answer)  # or a ValueError
        with self.lock:
            shown = list(self.shown.get(rater, {}).values())
            if not 0 <= position < len(shown) or picture != self.picture_name(shown[position], "left"):
                return self.view(rater)
            vote = {name: shown[position][name] for name in ("rater", "item", "left", "right")}
            vote |= {"question": question, "answer": answer}
            vote |= {"seconds": round(min(max(float(seconds), 0.0), 3600.0), 1), "time": round(time.time(), 1)}
            if shown[position]["answers"].get(question) != answer:
                self.write(vote)
            return self.view(rater, position, asked) if asked < len(self.questions) else self.view(rater, position + 1)

    def view(self, rater: str, position: int | None = None, asked: int | None = None) -> dict:
        """What the page shows at a position, by default where the rater is: the question number `asked`, or the first
        one without an answer. After all that was shown comes the next comparison, or the end."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", rater):  # a random number from the page, or a word from a link
            raise ValueError("a rater's id has 1 to 64 letters, digits, - or _")
        with self.lock:
            shown, loads = self.shown.setdefault(rater, {}), self.loads()
            # `asked` is given for what was shown before; else the page goes on, as far as the last one is answered.
            if position is None or position >= len(shown) or asked is None and position == len(shown) - 1:
                position = len(shown) - 1 if self.show_next(rater, loads) else len(shown)
            lines = list(shown.values())
            state = {"position": position, "done": sum(map(self.is_done, lines)), "total": self.total(rater, loads)}
            if position == len(lines):
                return state | {"finished": True}
            line = lines[position]
            answers = {name: line["answers"].get(name) for name in self.questions}
            if asked is None:
                asked = next((n for n, answer in enumerate(answers.values()) if not answer), 0)
            state |= {"finished": False, "asked": asked, "ties": self.record["allow_ties"], "answers": answers}
            state |= {"questions": list(self.questions.items())}
            state |= {"hides_prompt": list(self.questions.values())[asked] == QUESTIONS["appeal"]}
            state |= {"pictures": [self.picture_name(line, side) for side in ("left", "right")]}
            return state | {"prompt": self.record["prompts"][self.prompt_of[line["item"]]]["prompt"]}

    def show_next(self, rater: str, loads: dict[str, int]) -> bool:
        """Gives a rater the next test pair or comparison, unless one is not answered yet. False if none is left."""
        seen, n_checks, item = self.shown[rater], self.record["n_checks"], None
        if seen and not self.is_done(list(seen.values())[-1]):
            return True
        checks = sum(map(is_check, seen.values()))
        mine = len(seen) - checks
        if mine < self.limit:
            item = next_comparison(loads, seen, self.record["votes_per_comparison"], self.secret, rater)
        # Test pairs are spread evenly over what a rater may see, but no wider than CHECK_SPACING, since most end before
        # the limit. Where no comparison is left, those that have not come yet come before the end.
        spread = min(self.limit, CHECK_SPACING * (n_checks + 1))
        due = mine >= (checks + 1) * spread // (n_checks + 1) or item is None and mine
        if checks < n_checks and due:
            item, check = f"check{checks}", self.record["checks"][checks]
            sides = [check["model"], check["model"] if check["kind"] == "same" else "noise"]
            turned = int(keyed(self.secret, "side", rater, item), 16) % 2
        elif item is not None:
            sides = self.comparisons[item]
            number = sum(self.comparisons.get(other) == sides for other in seen)
            turned = not first_goes_left(self.secret, rater, sides, number)
        else:
            return False
        left, right = reversed(sides) if turned else sides
        self.write({"rater": rater, "item": item, "left": left, "right": right, "time": round(time.time(), 1)})
        return True

    def loads(self) -> dict[str, int]:
        """Comparison → raters who have answered it, or were shown it and may still answer; without excluded ones."""
        since, loads = time.time() - 60 * HELD_MINUTES, dict.fromkeys(self.comparisons, 0)
        lines = [line for shown in self.shown.values() for line in shown.values()]
        checks = [line | {"answer": answer} for line in filter(is_check, lines) for answer in line["answers"].values()]
        failed = failed_checks(checks)
        for line in lines:
            if failed[line["rater"]] <= self.record["max_failed_checks"] and line["item"] in loads:
                loads[line["item"]] += line["time"] > since or self.is_done(line)
        return loads

    def total(self, rater: str, loads: dict[str, int]) -> int:
        """How much there is to do for a rater, as far as can be seen now."""
        seen, wanted = self.shown[rater], self.record["votes_per_comparison"]
        mine = len(seen.keys() & self.comparisons.keys())
        left = sum(load < wanted and item not in seen for item, load in loads.items())
        comparisons = min(mine + left, max(self.limit, mine))
        return comparisons + self.record["n_checks"] * (comparisons > 0)

    def is_done(self, line: dict) -> bool:
        return len(line["answers"]) == len(self.questions)

    def picture_name(self, line: dict, side: str) -> str:
        """The name of a picture in a rater's page: another one for every rater, comparison and side."""
        return keyed(self.secret, "page", line["rater"], line["item"], side, line[side])


# The page ------------------------------------------------------------------------------------------------------------
def page_server(study: Study, host: str, port: int):
    """The server of the page, not yet running, and its socket. The page is Gradio's with one component of our own."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, Response

    def look(request: dict) -> dict:
        return study.view(request["rater"], request.get("position"), request.get("asked"))

    def answer(request: dict) -> dict:
        return study.answer(*(request[key] for key in "rater position question answer seconds picture".split()))

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/picture/{name}")
    def picture(name: str) -> Response:
        if name not in study.pictures:
            return Response(status_code=404)
        headers = {"Cache-Control": "private, max-age=86400"}
        return Response(study.pictures[name].read_bytes(), media_type="image/jpeg", headers=headers)

    with gr.Blocks(title="Which picture is better?", analytics_enabled=False) as blocks:
        value = {"study": keyed(study.secret, "study")[:12], "consent": study.record["consent"]}
        parts = {"html_template": PAGE, "css_template": STYLE, "js_on_load": SCRIPT, "server_functions": [look, answer]}
        gr.HTML(value, **parts, elem_id="study")
    options = {"footer_links": [], "ssr_mode": False, "show_error": False}
    app = gr.mount_gradio_app(app, blocks, path="", max_file_size=1, **options)  # nobody uploads files here
    # Open pages hold a connection: without a limit, the end would wait for them.
    options = {"log_level": "error", "access_log": False, "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, host=host, port=port, **options)
    listening = config.bind_socket()  # if the port is taken, uvicorn says so and ends
    listening.listen()  # who comes before the server runs waits for it
    return uvicorn.Server(config), listening


PAGE = """
<section data-part="welcome" hidden>
  <h1>Which picture is better?</h1><p data-part="consent"></p>
  <p class="hint">To go on later on another device, keep the link that you see after the start.</p>
  <button class="main" data-part="start">I agree: start</button>
</section>
<section data-part="task" hidden>
  <header>
    <button data-part="back" title="Backspace">&#8592; Back</button>
    <div class="bar"><div data-part="bar"></div></div><span data-part="count"></span>
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
<p class="notice" data-part="notice" hidden>The server does not answer. Your answers are safe. Trying again&#8230;</p>
<div class="zoom" data-part="zoom" hidden><img alt="zoomed picture"><span></span></div>
"""

STYLE = """
{ max-width: 1500px; margin: 0 auto; font-size: 17px; overflow-wrap: anywhere; }
[hidden] { display: none !important; }
header, .answers { display: flex; gap: 12px; align-items: center; }
.bar { flex: 1; height: 10px; border-radius: 5px; background: #8883; overflow: hidden; }
.bar div { height: 100%; background: #2a7de1; }
.prompt { font-size: 1.15em; margin: 10px 0; max-height: 7.5em; overflow: auto; white-space: pre-wrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
.pair img { width: 100%; aspect-ratio: 1; max-height: 62vh; object-fit: contain; cursor: zoom-in; margin: 0; }
.question { font-weight: 600; margin: 12px 0 8px; }
button { margin: 0 !important; padding: 8px 14px; border: 1px solid #8888; border-radius: 8px; background: #8881; }
.answers button { flex: 1; align-self: stretch; padding: 14px 4px; }
button:disabled { opacity: 0.45; }
button.chosen { outline: 3px solid #2a7de1; }
button.main { background: #2a7de1; color: white; font-size: 1.1em; }
kbd { border: 1px solid #8888; border-radius: 4px; padding: 0 5px; font-size: 0.8em; }
.hint { opacity: 0.65; font-size: 0.85em; margin-top: 10px; }
.notice { background: #f7d774; color: black; margin: 8px 0; padding: 8px 12px; border-radius: 6px; }
.zoom { position: fixed; inset: 0; z-index: 1000; background: #000e; cursor: zoom-out; }
.zoom img { width: 100vw; height: 100vh; padding: 2vmin; object-fit: contain; margin: 0; }
.zoom span { position: absolute; top: 8px; left: 14px; color: white; }
@media (max-width: 600px) { kbd, .hint { display: none; } .pair { gap: 4px; margin: 0 -36px; } }
"""

SCRIPT = r"""
const part = name => element.querySelector(`[data-part="${name}"]`);
const buttons = [...element.querySelectorAll("[data-answer]")];
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
const PAUSE = 300;  // ms: the second half of a double click must not answer the next question
let state = null, rater = null, busy = true, loaded = 0, since = 0, drawn = 0, zoomed = null;

async function ask(name, request = {}) {  // the server may be gone for a moment; to send an answer twice does no harm
  for (;;) {
    const answer = await server[name]({rater, ...request}).catch(error => console.warn(error));
    part("notice").hidden = Boolean(answer);
    if (answer) return answer;
    await wait(1500);
  }
}

function show(name) { for (const id of ["welcome", "task", "end"]) part(id).hidden = id !== name; }
function isReady() { return !busy && loaded >= 2 && performance.now() - drawn >= PAUSE; }
function enable() { for (const button of buttons) button.disabled = !isReady(); }

function load(image, name) {
  image.removeAttribute("src");
  image.dataset.name = name;
  image.onload = () => { loaded += 1; since = performance.now(); enable(); };
  image.onerror = async () => { await wait(1500); if (image.dataset.name === name) load(image, name); };
  image.src = `picture/${name}`;
}

function draw(next) {
  const isNew = !state || String(state.pictures) !== String(next.pictures);
  [state, busy] = [next, false];
  zoom(null);
  part("answered").textContent = state.done === 1 ? "1 comparison" : `${state.done} comparisons`;
  part("again").hidden = !state.done;
  if (state.finished) return show("end");
  const [name, text] = state.questions[state.asked];
  const number = state.questions.length > 1 ? `${state.asked + 1} of ${state.questions.length}: ` : "";
  part("question").textContent = number + text;
  part("prompt").textContent = state.prompt;
  part("prompt").style.visibility = state.hides_prompt ? "hidden" : "visible";
  part("count").textContent = `${state.position + 1} of ${Math.max(state.total, state.position + 1)}`;
  part("bar").style.width = `${(100 * state.done) / Math.max(state.total, 1)}%`;
  part("back").disabled = state.position === 0 && state.asked === 0;
  part("tiekey").hidden = !state.ties;
  for (const button of buttons) {
    button.hidden = button.dataset.answer === "tie" && !state.ties;
    button.classList.toggle("chosen", state.answers[name] === button.dataset.answer);
  }
  if (isNew) {
    loaded = 0;
    ["left", "right"].forEach((side, number) => load(part(side), state.pictures[number]));
  }
  since = drawn = performance.now();
  enable();
  setTimeout(enable, PAUSE + 5);
  show("task");
}

async function give(answer) {
  if (!isReady() || state.finished || (answer === "tie" && !state.ties)) return;
  busy = true;
  enable();
  const shown = {position: state.position, picture: state.pictures[0], seconds: (performance.now() - since) / 1000};
  draw(await ask("answer", {...shown, question: state.questions[state.asked][0], answer}));
}

async function back() {
  if (busy || (state.position === 0 && !state.asked)) return;
  busy = true;
  const before = state.asked ? [state.position, state.asked - 1] : [state.position - 1, 0];
  draw(await ask("look", {position: before[0], asked: before[1]}));
}

function zoom(side) {
  zoomed = side;
  part("zoom").hidden = !side;
  part("zoom").querySelector("span").textContent = side;
  if (side) part("zoom").querySelector("img").src = part(side).src;
}

for (const button of buttons) {
  button.addEventListener("click", event => { if (event.detail < 2) give(button.dataset.answer); });
}
for (const side of ["left", "right"]) part(side).addEventListener("click", () => zoom(side));
for (const name of ["back", "again"]) part(name).addEventListener("click", back);
part("zoom").addEventListener("click", () => zoom(null));
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !state) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const side = {ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right"}[key];
  if (zoomed && (side || ["Escape", "z"].includes(key))) zoom(side || null);
  else if (zoomed || (state.finished && key !== "Backspace")) return;
  else if (key === "Backspace") back();
  else if (key === "z") zoom("left");
  else if (side || key === "t") give(side || "tie");
  else return;
  event.preventDefault();
});

{
  const {study, consent} = props.value;
  const link = new URL(window.location.href), kept = `user-study-${study}`;
  const begin = async id => {
    rater = id;
    link.searchParams.set("rater", id);
    history.replaceState(null, "", link);
    draw(await ask("look"));
  };
  const linked = link.searchParams.get("rater");
  const stored = (() => { try { return localStorage.getItem(kept); } catch { return null; } })();
  if (stored && (!linked || linked === stored)) return begin(stored);
  part("consent").textContent = consent;
  show("welcome");
  part("start").addEventListener("click", () => {
    const id = /^[\w-]{1,64}$/.test(linked || "") ? linked : crypto.getRandomValues(new Uint32Array(2)).join("-");
    try { localStorage.setItem(kept, id); } catch {}
    begin(id);
  });
}
"""


# Report --------------------------------------------------------------------------------------------------------------
def markdown_report(record: dict, results: dict, max_failed_checks: int) -> str:
    """The text of results.md."""
    raters, rows, verdicts, notes = results["raters"], [], [], []
    for name, other, question, figures in all_figures(results):
        if not figures["n_votes"]:
            verdicts.append(f"- **{question}**: no votes on {name} against {other}.")
            continue
        (fewest, most), kappa = figures["votes_per_comparison"], figures["fleiss_kappa"]
        outcome = " / ".join(str(figures[key]) for key in ("wins", "undecided", "losses"))
        each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        rows.append([name, other, question, figures["n_comparisons"], each, outcome])
        for key in ("win_rate", "vote_share"):
            rows[-1].append("{:.1%} ({:.1%} to {:.1%})".format(figures[key], *figures[f"{key}_ci95"]))
        rows[-1].append("" if kappa is None else f"{kappa:.2f}")
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
        failed = f"raters failed more than {max_failed_checks} test pairs and are left out, with"
        who += f" {raters['n_excluded']} of {raters['n_raters']} {failed} {raters['n_votes_excluded']} votes."
    return f"""{who}

{markdown_table(header, rows)}

{chr(10).join(verdicts)}

A majority is more than half of the votes of a comparison. Comparisons without one are undecided and count half. In
brackets: 95 % intervals, over prompts and raters. Kappa: Fleiss' agreement beyond chance.
""" + "".join(f"\n{note}" for note in dict.fromkeys([*notes, ""] if notes else []))


def all_figures(results: dict) -> Iterator[tuple[str, str, str, dict]]:
    """(model, other, question, figures) of every row."""
    for name, others in results["pairs"].items():
        for other, questions in others.items():
            yield from ((name, other, question, figures) for question, figures in questions.items())


def draw_chart(results: dict, file: Path) -> None:
    """A bar for every question and pair of models, as in the papers' figures, with the interval of the win rate."""
    from matplotlib.figure import Figure

    bars = [row for row in all_figures(results) if row[3]["n_votes"]]
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(bars)), layout="constrained")
    axes, single = figure.subplots(), len({row[:2] for row in bars}) == 1
    for place, (*_, found) in enumerate(bars):
        widths = np.array([found[key] for key in ("wins", "undecided", "losses")]) / found["n_comparisons"]
        axes.barh([place] * 3, widths, 0.6, widths.cumsum() - widths, color=["#2a7de1", "#cccccc", "#e18b2a"])
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


# The votes as a preference dataset -----------------------------------------------------------------------------------
def pair_rows(record: dict, folder: Path, votes: list[dict]) -> tuple[list[dict], str]:
    """A row for every comparison with votes, in Pick-a-Pic's columns; and what is left out, in words. label_0 is 1, 0,
    or 0.5 where no picture has more than half of the votes."""
    rows, counts = [], Counter((vote["item"], vote["chosen"]) for vote in votes)
    items = list(itertools.product(enumerate(record["prompts"]), enumerate(record["pairs"])))
    for (number, prompt), (pair, names) in items:
        counted = [counts[f"{number}-{pair}", name] for name in (*names, "tie")]
        if not any(counted):
            continue
        pictures = [picture_file(folder, record, number, name).read_bytes().rstrip(b"\0") for name in names]
        uids = [short_hash(picture) for picture in pictures]
        label = float(majority(counted[0], counted[1], sum(counted)))
        row = {"caption": prompt["prompt"], "jpg_0": pictures[0], "jpg_1": pictures[1]}
        row |= {"image_0_uid": uids[0], "image_1_uid": uids[1], "label_0": label, "label_1": 1 - label}
        best = "" if label == 0.5 else uids[0 if label else 1]
        row |= {"has_label": True, "are_different": label != 0.5, "best_image_uid": best}
        row |= {"model_0": names[0], "model_1": names[1], "category": prompt["category"]}
        row |= {"num_votes": sum(counted), "votes_0": counted[0], "votes_1": counted[1]}
        rows.append(row | {"agreement": max(counted) / sum(counted)})
    return rows, f"{len(items) - len(rows)} of {len(items)} comparisons have no votes"


def ranked_rows(record: dict, folder: Path, votes: list[dict]) -> tuple[list[dict], str]:
    """A row for every prompt whose pairs of models all have votes, in Syn-Pic's columns; and what is left out.
    The preference probability of a picture is the mean, over the others, of its share of the votes against each; as in
    Syn-Pic, a tie counts for neither."""
    names, pairs, rows = record["models"], list(enumerate(record["pairs"])), []
    if len(pairs) < len(names) * (len(names) - 1) // 2:
        raise SystemExit("--export_format ranked needs votes on every two models: this study has a --baseline")
    counts = Counter((vote["item"], vote["chosen"]) for vote in votes)
    for number, prompt in enumerate(record["prompts"]):
        found = [{name: counts[f"{number}-{p}", name] for name in (*pair, "tie")} for p, pair in pairs]
        totals = [sum(counted.values()) for counted in found]
        if not all(totals):
            continue
        shares = [[c[name] / total for c, total in zip(found, totals) if name in c] for name in names]
        phi = np.mean(shares, axis=1)
        # Equal ones in an order that favours no model; rounded, since equal shares may differ in their last bit.
        tied = [(-round(value, 9), short_hash(f"{prompt['prompt']}|{name}")) for name, value in zip(names, phi)]
        order = sorted(range(len(names)), key=tied.__getitem__)
        pictures = [picture_file(folder, record, number, name).read_bytes().rstrip(b"\0") for name in names]
        row = {"prompt_id": short_hash(prompt["prompt"]), "prompt": prompt["prompt"]}
        row |= {"images": [{"bytes": picture, "path": None} for picture in pictures]}
        row |= {"generators": names, "seeds": [0] * len(names)}  # the seeds are not known here
        row |= {"scores": {"people": phi.tolist()}, "preference_probability": phi.tolist()}
        row |= {"rank": (np.argsort(order) + 1).tolist(), "num_votes": sum(totals)}
        agreement = np.mean([max(counted.values()) / total for counted, total in zip(found, totals)])
        rows.append(row | {"agreement": float(agreement)})
    left_out = len(record["prompts"]) - len(rows)
    return rows, f"{left_out} of {len(record['prompts'])} prompts lack votes on a pair of models"


def write_dataset(args: ScriptArguments, rows: list, question: str, left_out: str, card: RepoCard | None) -> None:
    """Writes the rows as Parquet, and the card; what people wrote on `card` stays."""
    from datasets import Dataset, Features, Image, List, Value

    text, number, share = Value("string"), Value("int32"), Value("float32")
    kinds = {"jpg": Value("binary"), "label": Value("float64"), "images": List(Image()), "seeds": List(Value("int64"))}
    kinds |= {"has_label": Value("bool"), "are_different": Value("bool"), "generators": List(text), "votes": number}
    kinds |= {"scores": {"people": List(share)}, "preference_probability": List(share), "rank": List(number)}
    kinds |= {"num_votes": number, "agreement": share}
    # A column of each of the two pictures has the type of its name without the number.
    features = Features({name: kinds.get(re.sub(r"_[01]$", "", name), text) for name in rows[0]})
    output_dir = Path(args.output_dir)
    data, building = output_dir / "data", output_dir / ".data.tmp"
    title = output_dir.resolve().name
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    parts, n_bytes = [rows[start : start + 250] for start in range(0, len(rows), 250)], 0
    for number, part in enumerate(parts):
        table, name = Dataset.from_list(part, features=features), f"train-{number:05d}-of-{len(parts):05d}.parquet"
        n_bytes += table.to_parquet(building / name, batch_size=32)  # the Hub's viewer reads as much at once
    kind, n_votes = "pairs" if args.export_format == "pairs" else "prompts", sum(row["num_votes"] for row in rows)
    read_by = "The columns are Syn-Pic's: `train_rankdpo_sdxl.py` and `train_rankdpo_sd3.py` read them."
    if args.export_format == "pairs":
        read_by = "The columns are Pick-a-Pic's: `score_pairs.py` and Diffusion-DPO trainers read them."
    body = f"""# {title}

{n_votes} votes of people on pictures of {len(rows)} {kind}, from a blinded study. The question was: "{question}"
{left_out[0].upper() + left_out[1:]}; these are left out.

{read_by} `num_votes` is the number of votes, `agreement` the share of the option with most votes.

```python
from datasets import load_dataset

dataset = load_dataset("{args.hub_dataset_id or output_dir}", split="train")
```
"""
    front = {"pretty_name": title, "task_categories": ["text-to-image"], "size_categories": [size_category(len(rows))]}
    front |= {"tags": ["preference", "human-feedback"]}
    data_files = [{"split": "train", "path": "data/train-*.parquet"}]
    front |= {"configs": [{"config_name": "default", "data_files": data_files}]}
    # Without its size, `load_dataset` on a folder that was written again would serve the rows that it cached before.
    info = {"splits": [{"name": "train", "num_bytes": n_bytes, "num_examples": len(rows)}], "dataset_size": n_bytes}
    info |= {"download_size": sum(file.stat().st_size for file in building.iterdir())}
    front |= {"dataset_info": [{"config_name": "default", "features": features._to_yaml_list(), **info}]}
    write_text(output_dir / "README.md", str(fill_card(card, front, body)))  # first: a killed run goes on in its folder
    shutil.rmtree(data, ignore_errors=True)
    building.rename(data)
    print(f"{len(rows)} rows, {n_votes} votes; {left_out}: {output_dir}")


# Copied from build_synpic.size_category
def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


# Copied from build_synpic.markdown_table
def markdown_table(header: list[str], rows: list[list]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(header), *cells[1:]))


# The Hub -------------------------------------------------------------------------------------------------------------
SPACE_PACKAGES = "gradio>=6.31,<7 filelock huggingface_hub numpy pillow pyyaml tqdm".split()  # what `serve` imports
SPACE_APP = '''"""Serves the study. Votes and the record of the study are in the private dataset {dataset}."""

import user_study


flags = {{"study_dir": ".", "host": "0.0.0.0", "port": 7860, "push_to_hub": True, "hub_dataset_id": "{dataset}"}}
user_study.serve(user_study.ScriptArguments(**flags))
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


def open_repository(name: str, kind: str, private: bool, only_private: bool = False, **options) -> str:
    """Creates the repository unless it exists, and returns its id with the namespace. Exits with one line if the token
    cannot write to it, or if others could read what is `only_private`: it says which model drew which picture."""
    try:
        repo_id = HfApi().create_repo(name, repo_type=kind, private=private or None, exist_ok=True, **options).repo_id
        HfApi().auth_check(repo_id, repo_type=kind, write=True)
    except Exception as error:
        problem = f"--push_to_hub: the {kind} repository {name} cannot be written to: {one_line(error)}"
        raise SystemExit(f"{problem} (hf auth login, or HF_TOKEN with write access)") from None
    if only_private and not HfApi().repo_info(repo_id, repo_type=kind).private:
        raise SystemExit(f"--hub_dataset_id {repo_id} is public, and raters could look into it: make it private")
    return repo_id


def fill_card(card: RepoCard | None, front: dict, body: str) -> RepoCard:
    """The card with our text in it. What people wrote stays: text outside our marks, and metadata but CARD_FACTS."""
    card = card or RepoCard("---\n{}\n---\n")
    for name, value in front.items():
        if name in CARD_FACTS or name not in card.data:
            card.data[name] = value
    old = re.fullmatch(f"(.*){re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)}(.*)", card.text, re.S)
    before, after = old.groups() if old else (f"{card.text.rstrip()}\n\n", "\n")
    body = body.strip().replace("<!--", "<! --")  # a prompt may hold anything, even a mark
    card.text = f"{before.lstrip()}{CARD_BEGIN}\n{body}\n{CARD_END}{after}"
    return card


def publish_results(args: ScriptArguments, settings: dict, results: dict, table: str) -> None:
    """Puts the results into the card of a model. Other results there stay; those of an earlier tally are replaced."""
    body = f"## User study\n\n{table}\n![What people preferred](user_study/chart.png)\n\n"
    body += "All figures are in [user_study/results.json](user_study/results.json).\n"
    has_card = HfApi().file_exists(args.hub_model_id, "README.md")
    card = fill_card(RepoCard.load(args.hub_model_id) if has_card else None, {}, body)
    first, *others = card.data.get("model-index") or [{"name": args.hub_model_id.split("/")[-1], "results": []}]
    is_ours = re.compile("user study,").match
    kept = [found for found in first.get("results") or [] if not is_ours(str(found.get("dataset", {}).get("name", "")))]
    mine = {"task": {"type": "text-to-image", "name": "Text-to-Image Generation"}, "metrics": []}
    mine["dataset"] = {"type": "prompts", "name": f"user study, {results['raters']['n_votes']} votes"}
    for name, other, question, figures in all_figures(results):
        if figures["n_votes"]:
            label = f"{question}, people's win rate of {name} over {other}"
            mine["metrics"].append({"type": "win_rate", "name": label, "value": figures["win_rate"]})
    card.data["model-index"] = [first | {"results": [*kept, mine]}, *others]
    # Ids of raters may be names, if links were given out with names: they stay on this machine.
    counts = {key: value for key, value in results["raters"].items() if key.startswith("n_")}
    record = json.dumps({"settings": settings, "raters": counts, "pairs": results["pairs"]}, indent=2)
    files = {"README.md": str(card).encode(), "user_study/results.json": record.encode() + b"\n"}
    files["user_study/chart.png"] = Path(args.output_dir, "chart.png").read_bytes()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    HfApi().create_commit(args.hub_model_id, operations, commit_message="User study")
    print(f"published: {HfApi().endpoint}/{args.hub_model_id}")


def sync_study(repo_id: str, folder: Path) -> None:
    """Brings what the dataset of the votes has and this machine lacks (a Space forgets its files when it restarts), and
    sends what the dataset lacks. Logs only grow: of two of one name the longer one counts."""
    there = HfApi().list_repo_files(repo_id, repo_type="dataset")
    here = [path.relative_to(folder).as_posix() for path in folder.rglob("*.json*")]
    for name in sorted({*there, *here}):
        if re.fullmatch(rf"{STUDY}|{VOTES}/[^/]+\.jsonl", name):
            mine = (folder / name).read_bytes() if name in here else b""
            theirs = Path(hf_hub_download(repo_id, name, repo_type="dataset")).read_bytes() if name in there else b""
            if name == STUDY and mine and theirs and mine != theirs:
                raise SystemExit(f"--hub_dataset_id {repo_id} holds another study: choose another name")
            if len(theirs) > len(mine):
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(theirs)
            elif len(mine) > len(theirs):
                HfApi().upload_file(path_or_fileobj=mine, path_in_repo=name, repo_id=repo_id, repo_type="dataset")


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
TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv")


def complete_prompt_flags(args: "ScriptArguments") -> None:
    """Fills in the flags about prompts that were left out."""
    for name, value in PROMPT_SETS.get(args.prompts, {"prompt_column": "prompt", "prompt_split": "train"}).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def read_prompts(
    source: str, column: str, split: str | None, max_prompts: int | None, keep: tuple = (), whole_rows: bool = False
) -> tuple[list[dict], list[dict[str, int]]]:
    """Reads prompts in order and drops duplicates. Of a dataset it reads no more than it needs. Returns one dict per
    prompt: "prompt", stripped, and the columns to `keep`; with `whole_rows` all columns that hold no images. And one
    dict per prompt of where it first stood in the source, duplicates counted: "index", its row, from 0, and for each
    column to `keep`, how many rows before it have the same value there."""
    shown, columns = public_text(source), list(dict.fromkeys((column, *keep)))
    prompts, places, counts = {}, {}, Counter()
    try:
        rows = tqdm(prompt_rows(source, split, columns, whole_rows), desc="prompts", unit=" rows", delay=10)
        for index, row in enumerate(rows):
            if missing := [name for name in columns if name not in row]:
                raise ValueError(f"no column {missing[0]!r}; it has {', '.join(map(str, row))}")
            if not isinstance(row[column], str) or not (prompt := row[column].strip()):
                raise ValueError(f"row {index + 1}: the prompt is empty or no text: remove the row")
            values = {name: (name, str(row[name])) for name in keep}
            places.setdefault(prompt, {"index": index} | {name: counts[value] for name, value in values.items()})
            prompts.setdefault(prompt, {**row, "prompt": prompt})
            counts.update(values.values())
            if max_prompts and len(prompts) == max_prompts:
                break
    except Exception as error:
        known = "" if "/" in source else f"; the sets with a short name are {', '.join(PROMPT_SETS)}"
        raise SystemExit(f"--prompts {shown}: cannot be read: {public_text(one_line(error))}{known}") from None
    if not prompts:
        raise SystemExit(f"--prompts {shown}: holds no prompts")
    if repeated := index + 1 - len(prompts):
        warn(f"--prompts {shown}: {repeated} of {index + 1} rows repeat an earlier prompt and are left out")
    return list(prompts.values()), list(places.values())


def prompt_rows(source: str, split: str | None, columns: list[str], whole_rows: bool) -> Iterable[dict]:
    """The rows of a named set, file, URL or dataset. The first of these `columns` is the prompt."""
    known = PROMPT_SETS.get(source, {}).get("source", source)
    suffix = Path(urlsplit(known).path if "://" in known else known).suffix.lower()
    if source == "hpsv2":
        styles = ("anime", "concept-art", "paintings", "photo")
        files = {s: hf_hub_download(known, f"benchmark/{s}.json", repo_type="dataset") for s in styles}
        return [row | {"style": style} for style in files for row in file_rows(files[style], ".json", columns[0])]
    if "://" in known and suffix not in TEXT_FILES:
        raise ValueError(f"the name of a file on the web must end in {', '.join(TEXT_FILES)}")
    if suffix in TEXT_FILES and not os.path.isdir(known):
        return file_rows(known, suffix, columns[0])
    return stream_rows(known, split, columns, whole_rows)


def file_rows(file: str, suffix: str, column: str) -> list[dict]:
    """The rows of a file or URL. A line of a text file, or a string in a JSON list, becomes a row with one `column`."""
    text = read_text(file)
    if suffix == ".txt":
        return [{column: line} for line in text.rstrip("\n").split("\n")] if text else []
    if suffix in (".csv", ".tsv"):
        # Quotation marks in a .tsv are text, as in PartiPrompts, where a prompt begins with one.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if suffix == ".csv":  # the first of these that separates the names of the columns
            header = text.partition("\n")[0]
            found = (mark for mark in ",;\t|" if column in next(csv.reader([header], delimiter=mark), []))
            options = {"delimiter": next(found, ","), "strict": True}
        rows = list(csv.DictReader(StringIO(text, newline=""), **options))
        if long := [number for number, row in enumerate(rows, 1) if None in row]:
            raise ValueError(f"row {long[0]} has more fields than the header: quote a prompt that has commas")
        return rows
    values, end, blank, decoder = [], 0, re.compile(r"\s*"), json.JSONDecoder()
    while (start := blank.match(text, end).end()) < len(text):  # a list, or a value per line
        value, end = decoder.raw_decode(text, start)
        values += value if isinstance(value, list) else [value]
    return [value if isinstance(value, dict) else {column: value} for value in values]


def read_text(file: str) -> str:
    """The text of a file or URL: UTF-8, with or without a byte order mark, or UTF-16 with one; with any line ends."""
    if file.startswith(("http://", "https://")):
        response = get_session().get(file, timeout=60)
        response.raise_for_status()
        if "html" in response.headers.get("Content-Type", ""):
            raise ValueError("this is a web page, not a file of prompts: give the link to the raw file")
        content = response.content
    else:
        content = Path(file).read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return StringIO(content.decode(encoding), newline=None).read()


def stream_rows(source: str, split: str | None, columns: list[str], whole_rows: bool) -> Iterator[dict]:
    """The rows of a .parquet file, or of a dataset on the Hub or in a folder, while it reads them: nothing is
    downloaded as a whole. Of Parquet files, which most datasets with images are, only these `columns` are read."""
    from datasets import load_dataset, load_dataset_builder  # here: a user study's Space has no `datasets`

    with plain_path(source) as path:
        options = {"path": path}
        if path.endswith(".parquet") and os.path.isfile(path):
            options, split = {"path": "parquet", "data_files": path}, "train"
        offline = HF_HUB_OFFLINE and not os.path.exists(path)  # then it is what an earlier run downloaded
        builder = None if offline else load_dataset_builder(**options)
        rows = load_dataset(**options, split=split) if offline else builder.as_streaming_dataset(split=split)
        names = rows.column_names or list(next(iter(rows), {}))
        if missing := sorted({*columns} - {*names}):
            raise ValueError(f"no column {missing[0]!r}; it has {', '.join(names)}")
        if whole_rows:
            kinds = rows.features or dict.fromkeys(names, "")
            columns = [name for name in names if not re.search(r"\bImage\b|binary", repr(kinds[name]))]
        if not offline and hasattr(builder.config, "columns"):
            # By default the client reads 5 MiB ahead with each small piece of a column: a tenth of the images.
            options |= {"columns": columns, "storage_options": {"hf": {"block_size": 2**14}}}
            rows = load_dataset(**options, split=split, streaming=True)
        yield from rows.select_columns(columns)


def public_text(text: str) -> str:
    """`text` without what may be secret in its URLs: user name, password, query."""
    return re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments and files
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(words: list[str] | None = None) -> ScriptArguments:
    """Parses the command line. `--config file.yaml` adds flags from a file, which the command line overrides."""
    words, layout = list(sys.argv[1:] if words is None else words), argparse.RawDescriptionHelpFormatter
    if words and not words[0].startswith("-"):
        words[0] = f"--command={words[0]}"
    group = parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=layout)
    # Every usage error in one line. argparse names both spellings of a flag: --study_dir/--study-dir.
    parser.error = lambda text: sys.exit(one_line(re.sub(r"^argument |(?<=\w)/--[\w-]+", "", text)))
    for spec in fields(ScriptArguments):
        group = parser.add_argument_group(spec.metadata["group"]) if spec.metadata["group"] else group
        kind, *_ = get_args(spec.type) or [spec.type]  # of str | None, it is str
        options = {"type": int, "metavar": "N"} if kind is int else {"metavar": "TEXT"}
        if get_origin(spec.type) is Literal:
            options = {"choices": get_args(spec.type)}
        elif kind is bool:  # as in a YAML file: true, no
            options = {"nargs": "?", "const": True, "type": yaml.safe_load, "choices": (True, False)}
        elif get_origin(spec.type) is list:
            options |= {"nargs": "+"}
        names = dict.fromkeys([f"--{spec.name}", f"--{spec.name.replace('_', '-')}"])
        group.add_argument(*names, **options, default=argparse.SUPPRESS, help=spec.metadata["help"])
    parser.add_argument("--config", type=config_words, default=[], metavar="FILE", help="YAML file of flags.")
    words = [*parser.parse_known_args(words)[0].config, *words]
    # The shell leaves ~/x in --flag=~/x and in name=~/x, and YAML has none.
    given = vars(parser.parse_args([re.sub(r"(^|=)~/", rf"\1{Path.home()}/", word) for word in words]))
    del given["config"]
    return ScriptArguments(**given)


# Copied from build_synpic.config_words
def config_words(file: str) -> list[str]:
    """The flags of a YAML file as words of a command line, so that argparse checks their types and choices too."""
    given = []
    # BaseLoader leaves every value as text, so `no` stays `no`. A single one stands behind "=": it may begin with "-".
    for name, value in dict(yaml.load(Path(file).expanduser().read_text(), Loader=yaml.BaseLoader) or {}).items():
        words = value if isinstance(value, list) else [value]
        if words and value not in ("", "~", "null", "Null", "NULL"):
            given += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    return given


# Copied from build_synpic.plain_path
@contextmanager
def plain_path(path: str) -> Iterator[str]:
    """The path of a dataset for `datasets`, which takes * ? [ in one for a pattern, and would read another folder: such
    a folder or file is linked under a plain name while the block lasts."""
    if not os.path.exists(path) or not glob.has_magic(os.path.abspath(path)):
        yield path
        return
    with TemporaryDirectory() as links:
        if os.path.isdir(path):
            yield shutil.copytree(os.path.abspath(path), f"{links}/data", copy_function=os.symlink)
        else:
            os.symlink(os.path.abspath(path), f"{links}/data{Path(path).suffix}")
            yield f"{links}/data{Path(path).suffix}"


# Copied from build_synpic.warn
def warn(text: str) -> None:
    """Says something on stderr, once for all processes of a run."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"warning: {text}", file=sys.stderr)


# Copied from build_synpic.one_line
def one_line(error: BaseException | str) -> str:
    """An error's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


# Copied from build_synpic.short_hash
def short_hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


# Copied from build_synpic.replacing
@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, which becomes `file` when the block has ended without an error: there is no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.urandom(4).hex()}.tmp")
    yield temporary
    os.replace(temporary, file)


def write_text(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # answers are on the disk: there is nothing to save
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    main(parse_arguments())
