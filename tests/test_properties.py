# SPDX-License-Identifier: Apache-2.0
"""Properties that must hold for every input: the ranking, the order of the training, the cache's folder."""

import math
from types import SimpleNamespace

import conftest  # noqa: F401 (sets the environment and the paths)
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import build_synpic
import train_dpo_qsd
import train_rankdpo_sd3
import train_rankdpo_sdxl


# The same examples in every run: a test that fails now and then helps nobody.
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(quick, max_examples=15)
shapes = st.tuples(st.integers(1, 5), st.integers(2, 6))
rounded = st.floats(-3, 3).map(lambda value: round(value, 1))  # ties happen
scores = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=rounded))


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
