# SPDX-License-Identifier: Apache-2.0
"""Properties that must hold for every input: ranking, pair quality, order, sampling, the cache's folder, arguments."""

import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import conftest  # noqa: F401 (sets the environment and the paths)
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import build_synpic
import score_pairs
import train_dpo_qsd
import train_rankdpo_sd3
import train_rankdpo_sdxl


# The same examples in every run: a test that fails now and then helps nobody.
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(quick, max_examples=15)
finite = st.floats(-1e6, 1e6, allow_subnormal=False)
shapes = st.tuples(st.integers(1, 5), st.integers(2, 6))
rounded = st.floats(-3, 3).map(lambda value: round(value, 1))  # ties happen
scores = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=rounded))


# Ranking


@quick
@given(scores)
def test_probabilities_are_shares_of_the_comparisons_and_ranks_follow_them(matrix):
    phi, rank = build_synpic.preference_probability(matrix), build_synpic.preference_rank(matrix)
    n, k = matrix.shape
    wins = [sum(a[i] > a[j] for a in matrix for j in range(k)) / (n * (k - 1)) for i in range(k)]
    assert phi.tolist() == pytest.approx(wins) and phi.min() >= 0 and phi.max() <= 1
    no_ties = all(len(set(row)) == k for row in matrix.tolist())
    assert phi.sum() <= k / 2 + 1e-9 and (not no_ties or math.isclose(phi.sum(), k / 2))
    assert sorted(rank.tolist()) == list(range(1, k + 1))
    assert (np.diff(phi[np.argsort(rank)]) <= 1e-12).all()


@quick
@given(scores, st.integers(-8, 8), st.randoms(use_true_random=False))
def test_ranking_does_not_depend_on_scale_or_on_the_order_of_rewards_or_images(matrix, scale, random):
    n, k = matrix.shape
    images, names = random.sample(range(k), k), random.sample(range(n), n)
    phi, rank = build_synpic.preference_probability(matrix), build_synpic.preference_rank(matrix)
    assert np.array_equal(build_synpic.preference_probability(matrix[names]), phi)
    assert np.array_equal(build_synpic.preference_probability(matrix[:, images]), phi[images])
    assert np.array_equal(build_synpic.preference_rank(matrix[names]), rank)
    # By powers of two, so that the change of scale rounds nothing.
    assert np.array_equal(build_synpic.preference_rank(matrix * 2.0**scale), rank)


@quick
@given(scores)
def test_weights_of_the_objective(matrix):
    """Symmetric, none negative, zero between equal preferences; all zero only if no two preferences differ."""
    phi = torch.tensor(build_synpic.preference_probability(matrix), dtype=torch.float32)[None]
    rank = torch.tensor(build_synpic.preference_rank(matrix))[None]
    weights = train_rankdpo_sdxl.dcg_weights(phi, rank)[0]
    assert torch.equal(weights, weights.T) and (weights >= 0).all()
    equal = phi[0][:, None] == phi[0][None]
    assert (weights[equal] == 0).all() and (weights[~equal] > 0).all()


# Pair quality and the sorted dataset


unit = st.floats(0, 1)


@quick
@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=20))
def test_pair_quality_is_a_probability_that_grows_with_the_winner(pairs):
    won, lost = np.array(pairs).T
    quality = score_pairs.pair_quality(won, lost)
    assert (quality >= 0).all() and (quality <= 1).all()
    assert (score_pairs.pair_quality(np.minimum(won + 0.1, 1), lost) >= quality).all()
    assert (score_pairs.pair_quality(won, np.minimum(lost + 0.1, 1)) <= quality).all()


@quick
@given(arrays(np.float64, st.integers(2, 20), elements=finite))
def test_preference_scores_are_in_the_unit_interval_and_keep_the_order(rewards):
    for name in ("mine.py:f", "hpsv2", "imagereward", "aesthetic"):
        psi = score_pairs.preference_score(name, "auto", rewards, rewards.mean(), rewards.std() or 1)
        assert (psi >= 0).all() and (psi <= 1).all()
        assert (np.diff(psi[np.argsort(rewards, kind="stable")]) >= 0).all()


@few
@given(
    st.lists(st.tuples(rounded.map(abs), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_pairs_are_trained_on_from_the_best_down(rows, fraction):
    """Best first, equal ones in the dataset's order; ties and pairs without a label are left out."""
    quality, labels, known = (list(column) for column in zip(*rows))
    data = pa.table({"caption": ["x"] * len(rows), "quality": quality, "label_0": labels, "has_label": known})
    args = train_dpo_qsd.ScriptArguments(dataset_name="x", top_fraction=fraction)
    useful = [i for i in range(len(rows)) if known[i] and labels[i] != 0.5]
    kept = round(fraction * len(useful))
    if not kept:
        with pytest.raises(SystemExit):
            train_dpo_qsd.select_pairs(args, data)
        return
    selected = train_dpo_qsd.select_pairs(args, data)
    found = selected["id"].to_pylist()
    assert found == sorted(useful, key=lambda i: -quality[i])[:kept]  # sorted() is stable
    assert selected["winner"].tolist() == [0 if labels[i] == 1 else 1 for i in found]


# Order of the training


@pytest.mark.parametrize("script", [train_rankdpo_sdxl, train_rankdpo_sd3, train_dpo_qsd])
@few
@given(
    length=st.integers(1, 13),
    batch=st.sampled_from([(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2), (1, 1, 4)]),
    start=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_every_step_sees_the_same_rows_on_any_number_of_processes(script, length, batch, start, seed):
    """Four rows a step, one process straight through, against any split that begins at step `start`."""

    def steps(processes: int, size: int, accumulation: int, first: int, number: int) -> list:
        args = script.ScriptArguments(
            dataset_name="x", train_batch_size=size, gradient_accumulation_steps=accumulation, seed=seed
        )
        samplers = [script.micro_batches(args, length, process, processes, first) for process in range(processes)]
        return [
            sorted(item for sampler in samplers for _ in range(accumulation) for item in next(sampler))
            for _ in range(number)
        ]

    whole = steps(1, 4, 1, 0, start + 6)
    assert steps(*batch, start, 6) == whole[start:]
    items = [item for step in whole for item in step]
    for epoch in range(len(items) // length):
        assert sorted(row for e, row, _ in items if e == epoch) == list(range(length))  # each row once in an epoch


# Cache key


CACHED = {"resolution": 64, "mixed_precision": "bf16", "variant": "fp16"}
OTHERS = {"learning_rate": 1.0, "seed": 5, "train_batch_size": 2, "loss_type": "dpo", "max_train_steps": 3}
OTHERS |= {"output_dir": "elsewhere", "cache_text_embeddings": False}


@few
@given(st.sets(st.sampled_from(sorted(CACHED))), st.sets(st.sampled_from(sorted(OTHERS))))
def test_the_cache_s_folder_follows_what_is_cached_and_nothing_else(tiny_sdxl, ranked_dataset, cached, others):
    """And never the dataset: its rows are known by their content."""
    labels = {"id": pa.array(["a"]), "images": np.array([[0, 1]]), "settings": {}}

    def key(**changes) -> str:
        settings = {"pretrained_model_name_or_path": str(tiny_sdxl), "output_dir": "no such folder", "resolution": 32}
        args = train_rankdpo_sdxl.ScriptArguments(**{**settings, "dataset_name": str(ranked_dataset), **changes})
        return train_rankdpo_sdxl.plan_run(args, SimpleNamespace(num_processes=1), labels).cache.name

    changes = {name: CACHED[name] for name in cached}
    only_cached = key(**changes)
    assert key(**changes, **{name: OTHERS[name] for name in others}) == only_cached
    assert (only_cached == key()) == (not cached)


# Arguments


def values_of(spec) -> st.SearchStrategy | None:
    """Values that a flag takes, by its type and range; None: this test leaves the flag out."""
    kind = next((part for part in get_args(spec.type) if part is not type(None)), spec.type)
    kind = spec.type if get_origin(spec.type) is Literal else kind
    low, above, high, below = spec.metadata["limits"].values()
    low, high = (above if low is None else low), (below if high is None else high)
    if spec.name in ("resolution", "mixed_precision", "safeguard", "sft_weight", "report_to", "logging_dir"):
        return None
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(1 if low is None else int(low), 10**6 if high is None else int(high))
    if kind is float:
        low, high = 0.0 if low is None else float(low), 1e6 if high is None else float(high)
        return st.floats(low, high, exclude_min=above is not None, exclude_max=below is not None)
    if kind is str:
        return st.text("abcXYZ019 .:#-=~/é", min_size=1, max_size=12).map(lambda text: f"x{text}".strip())
    return None


FLAGS = {spec.name: values_of(spec) for spec in fields(train_rankdpo_sdxl.ScriptArguments)}
FLAGS = {name: values for name, values in FLAGS.items() if values is not None}


@few
@given(st.dictionaries(st.sampled_from(sorted(FLAGS)), st.just(None), max_size=6), st.data())
def test_arguments_come_back_from_the_command_line_and_from_a_file(tmp_path, names, data):
    """What is given as words, or as YAML, is what the script gets."""
    chosen = {"dataset_name": "x"} | {name: data.draw(FLAGS[name], label=name) for name in names}
    wanted = train_rankdpo_sdxl.ScriptArguments(**chosen)
    words = [f"--{name}={value}" for name, value in chosen.items()]
    assert train_rankdpo_sdxl.parse_arguments(words) == wanted
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({name: str(value) for name, value in chosen.items()}, allow_unicode=True))
    assert train_rankdpo_sdxl.parse_arguments(["--config", str(file)]) == wanted
