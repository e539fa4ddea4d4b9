# SPDX-License-Identifier: Apache-2.0
"""shapes/reproduce.py: the papers' tables in miniature, through the same code as `make reproduce`."""

import itertools
import json

import numpy as np
import pytest
import reproduce
from conftest import run


def test_two_rows_end_to_end_then_nothing_is_run_twice(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "".join(f"<!-- reproduce.py: {name} -->\n<!-- end -->\n" for name in reproduce.TABLES))
    flags = ["--rows", "dpo", "rankdpo", "--seeds", 1, "--jobs", 1, "--prompts", 6, "--heldout", 6, "--docs", page]
    command = ["shapes/reproduce.py", *flags, "--output_dir", tmp_path / "work", "--training_flags=--max_train_steps 2"]
    first = run(*command)
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert set(results["rows"]) == {"base", "dpo", "rankdpo"} and len(results["rows"]["base"]["accuracy"]) == 6
    for row in ("dpo", "rankdpo"):
        kept = results["rows"][row]["0"]
        settings = json.loads(reproduce.SEARCH_FILE.read_text())[row]["settings"]
        assert f" {settings} " in kept["command"] and kept["command"].startswith("train_rankdpo_sdxl.py ")
        scores = tmp_path / "work" / "evaluation-heldout" / "scores" / "accuracy" / f"{row}@0.json"
        right = np.array(json.loads(scores.read_text())["scores"]).sum(axis=1)
        assert kept["accuracy"] == "".join(str(int(n)) for n in right)
    assert "RankDPO, ranks by the labels − DPO" in first.stdout
    assert "RankDPO, ranks by the labels − DPO" in page.read_text() and page.read_text().startswith("before\n")
    assert (tmp_path / "work" / "report" / "objectives.svg").read_text().startswith("<?xml")

    # The second time nothing is run: the figures come from what is there.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "done").iterdir()}
    assert run(*command).stdout == first.stdout
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "done").iterdir()} == before


def test_rows_tables_and_searches_name_what_exists():
    names = {*reproduce.ROWS, *reproduce.FAMILIES.values()}
    for table in reproduce.TABLES.values():
        for entry in table.entries:
            assert entry.row in names and (entry.against is None or entry.against in names)
    assert {row.method for row in reproduce.ROWS.values()} == set(reproduce.SEARCH) <= set(reproduce.ROWS)
    assert len({len(settings) for settings in reproduce.SEARCH.values()}) == 1  # an equal budget
    shown = {entry.row for table in reproduce.TABLES.values() for entry in table.entries}
    assert shown == names


def test_bootstrap_resamples_seeds_and_prompts():
    """Against the same in plain loops; a row that does not depend on the seed has no spread over seeds."""
    rng = np.random.default_rng(1)
    scores = rng.random((2, 3, 40))
    scores[1] = scores[1, 0]
    draws, expected = reproduce.bootstrap(scores, 20_000), []
    for _ in range(20_000):
        seeds, prompts = rng.integers(3, size=3), rng.integers(40, size=40)
        expected.append(scores[:, seeds][:, :, prompts].mean(axis=(1, 2)))
    for q in (2.5, 50, 97.5):
        np.testing.assert_allclose(np.percentile(draws, q, axis=0), np.percentile(expected, q, axis=0), atol=2e-3)
        difference = np.percentile(draws[:, 0] - draws[:, 1], q), np.percentile(np.subtract(*np.transpose(expected)), q)
        assert difference[0] == pytest.approx(difference[1], abs=3e-3)


@pytest.mark.parametrize(("paper", "low", "high"), itertools.product((None, -1.0, 2.0), (-0.2, 0.1), (-0.1, 0.3)))
def test_direction_says_what_the_interval_allows(paper, low, high):
    found = reproduce.direction(paper, low, high)
    if paper is None:
        assert found == "–"
    elif low <= 0 <= high:
        assert found == "no difference"
    else:
        assert found == ("same sign" if np.sign(paper) == np.sign(low) else "other sign")
