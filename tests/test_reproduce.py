# SPDX-License-Identifier: Apache-2.0
"""shapes/reproduce.py: the papers' tables in miniature, through the same code as `make reproduce`."""

import argparse
import json
import re

import numpy as np
import pytest
import reproduce
import world


def test_rows_end_to_end_then_nothing_is_run_twice(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- reproduce.py: objectives -->\n<!-- end -->\n")
    flags = ["--rows", "dpo", "dpo_gain", "--seeds", 1, "--jobs", 1, "--prompts", 6, "--heldout", 6, "--docs", page]
    flags += ["--output_dir", tmp_path / "work", "--training_flags=--max_train_steps 2"]
    monkeypatch.chdir(reproduce.ROOT)
    monkeypatch.setattr("sys.argv", ["reproduce.py", *map(str, flags)])
    reproduce.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert set(results["rows"]) == {"base", "dpo", "dpo_gain"} and len(results["rows"]["base"]["accuracy"]) == 6
    kept = results["rows"]["dpo"]["0"]
    settings = json.loads(reproduce.SEARCH_FILE.read_text())["dpo"]["settings"]
    assert f" {settings} " in kept["command"] and kept["command"].startswith("train_rankdpo_sdxl.py ")
    scores = tmp_path / "work" / "evaluation-heldout" / "scores" / "accuracy" / "dpo@0.json"
    right = np.array(json.loads(scores.read_text())["scores"]).sum(axis=1)
    assert kept["accuracy"] == "".join(str(int(n)) for n in right)
    assert "| DPO + gain − DPO |" in printed and "| DPO + gain − DPO |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert (tmp_path / "work" / "report" / "objectives.svg").read_text().startswith("<?xml")

    # The second time nothing is run: the figures come from what is there.
    monkeypatch.setattr(reproduce.subprocess, "call", None)
    reproduce.main()
    assert capsys.readouterr().out == printed


class FakeRunner(reproduce.Runner):
    """Runs nothing: len(name) % 5 of 4 images are right; a reward gives a LoRA its name's length / 10, the base 0."""

    def train(self, name, command, seed):
        self.trained = [*getattr(self, "trained", ()), command]
        return {"command": command, "key": name, "seconds": 60} | reproduce.machine()

    def evaluate(self, label, trained, prompts, images, family="", metrics=(reproduce.ACCURACY,)):
        names, right = ("base", *trained), np.arange(4)
        if metrics == (reproduce.ACCURACY,):
            return [{name: np.full((10, 4), right < len(name) % 5) * 1.0 for name in names}]
        letters = [len(metric.partition(":")[2].removesuffix("_reward")) / 10 for metric in metrics]
        return [{name: np.full((10, 4), value * (name != "base")) for name in names} for value in letters]


def options(folder, **changed):
    sizes = {"prompts": 6, "pair_prompts": 6, "heldout": 10, "jobs": 1, "training_flags": ""}
    return argparse.Namespace(output_dir=folder, **(sizes | changed))


def test_differences_are_over_the_seeds_that_both_rows_have():
    rng = np.random.default_rng(0)
    of_rows = {"weighted_sft": "34", "dpo": "012", "dpo_gain": "01", "rankdpo": "05"}
    figures = {row: {seed: rng.integers(5, size=40) for seed in seeds} for row, seeds in of_rows.items()}
    rows = {"base": {"accuracy": "2" * 40}}
    for row, seeds in figures.items():
        texts = {seed: "".join(map(str, right)) for seed, right in seeds.items()}
        rows[row] = {seed: {"seconds": 60, "accuracy": text} | reproduce.machine() for seed, text in texts.items()}
    results = {"prompts": 40, "images": 4, "rows": rows}
    shown, differences = reproduce.compare(reproduce.TABLES["objectives"], results)
    means = {row: np.mean(list(seeds.values())) / 4 for row, seeds in figures.items()} | {"base": 0.5}
    assert {row["row"]: row["mean"] for row in shown} == pytest.approx(means)
    for row in shown[1:]:
        assert row["base"]["mean"] == pytest.approx(means[row["row"]] - 0.5)
    shared = {("dpo_gain", "dpo"): "01", ("rankdpo", "dpo"): "0", ("rankdpo", "dpo_gain"): "0"}
    assert {(item["row"], item["other"]) for item in differences} == shared.keys()
    for item in differences:
        row, other = (figures[item[key]] for key in ("row", "other"))
        seeds = shared[item["row"], item["other"]]
        assert item["mean"] == pytest.approx(np.mean([row[seed] - other[seed] for seed in seeds]) / 4)
        assert item["ci95"][0] < item["mean"] < item["ci95"][1] and item["seeds"] == len(seeds)
    text = reproduce.markdown(reproduce.TABLES["objectives"], results, shown, differences)
    assert "of one seed, over prompts alone" in text


def test_only_the_planned_seeds_carry_a_claim(tmp_path):
    """Of planned rows over the planned seeds alone; others have no direction. No interval leaves [0, 1]."""
    accuracy = {"dpo": "00000004", "dpo_gain": "22222224", "rankdpo": "44444444", "predicted": "00000004"}
    rows = {"base": {"accuracy": "00000000"}}
    for row, planned in {"dpo": True, "dpo_gain": True, "rankdpo": False, "predicted": False}.items():
        seeds = [0, 1, 2, *(reproduce.PLANNED_SEEDS if planned else [])]
        records = {str(seed): {"seconds": 1, "accuracy": accuracy[row]} | reproduce.machine() for seed in seeds}
        rows[row] = records | {"0": records["0"] | {"accuracy": "44444444"}}  # a look that no plan knows
    table = reproduce.TABLES["objectives"]
    shown, differences = reproduce.compare(table, {"prompts": 8, "images": 4, "rows": rows})
    bases = {row["row"]: row["base"] for row in shown if "base" in row}
    assert (bases["dpo"]["seeds"], bases["dpo"]["mean"], bases["dpo"]["direction"]) == (8, 0.125, "not clear")
    assert (bases["dpo_gain"]["seeds"], bases["dpo_gain"]["direction"]) == (8, "same sign")
    assert (bases["rankdpo"]["seeds"], bases["rankdpo"]["direction"]) == (3, "–")
    found = {(item["row"], item["other"]): (item["seeds"], item["direction"]) for item in differences}
    assert found[("dpo_gain", "dpo")] == (8, "same sign") and found[("rankdpo", "dpo")] == (3, "–")
    for row in shown:
        assert 0 <= row["ci95"][0] <= row["mean"] <= row["ci95"][1] <= 1


def test_reward_hacking_is_told_of_the_rows_that_the_rewards_have_judged(tmp_path, capsys):
    rows = ["dpo", "reward_count", "predicted"]
    reproduce.reproduce(FakeRunner(options(tmp_path)), rows, range(2), {"dpo", "reward_count"})
    reproduce.report(tmp_path, tmp_path / "report", [])
    printed = capsys.readouterr().out
    lifts = "**+0.500** | **+0.500** | **+0.500** | **+0.600** | **+0.500** |"  # colour, shape, count, layout, clean
    assert f"| DPO | **-1.000** | {lifts}" in printed and f"| DPO, the count reward alone | +0.000 | {lifts}" in printed
    assert "predicted ranks | **" not in printed
    assert (tmp_path / "report" / "hacking.svg").exists()
    # A run without the rewards keeps them.
    reproduce.reproduce(FakeRunner(options(tmp_path)), ["dpo"], range(2))
    reproduce.report(tmp_path, tmp_path / "report", [])
    assert lifts in capsys.readouterr().out


def test_the_search_tries_what_is_missing_and_takes_the_best_over_the_seeds(tmp_path, monkeypatch):
    first, second, *others = reproduce.SEARCH["dpo"]
    tried = {second: [3.0], first: [2.0, 2.0], "--learning_rate 7": [9.0]}  # the last is of another grid
    (tmp_path / "search.json").write_text(json.dumps({"dpo": {"tried": tried}, "sft": {"settings": "--x"}}))
    monkeypatch.setattr(reproduce, "SEARCH_FILE", tmp_path / "search.json")
    runner = FakeRunner(options(tmp_path))
    reproduce.search(runner, ["dpo"])
    # The others with the first seed, which gives at most 1.0; then the best two with the seeds that they lack.
    for settings, command in zip([*others, second, second, first], runner.trained, strict=True):
        assert f" {settings} " in command
    found = json.loads((tmp_path / "search.json").read_text())
    assert list(found["dpo"]["tried"]) == [first, second, *others] and found["sft"] == {"settings": "--x"}
    counts = {settings: len(figures) for settings, figures in found["dpo"]["tried"].items()}
    assert counts == {first: 3, second: 3} | dict.fromkeys(others, 1)
    means = {s: np.mean(found["dpo"]["tried"][s]) for s in (first, second)}
    assert found["dpo"]["settings"] == max(means, key=means.get)


@pytest.mark.parametrize("spread, seeds, low, high", [(0.05, 5, 0.90, 0.98), (1.0, 3, 0.93, 0.99)])
def test_intervals_hold_the_truth_as_often_as_they_say(spread, seeds, low, high):
    """Where training seeds and prompts differ; and where seeds alone do, as many as the tables have."""
    rng, held = np.random.default_rng(1), []
    for _ in range(300):
        prompts = 0.3 * rng.standard_normal((1, 1, 100)) if spread < 1 else np.zeros((1, 1, 1))
        scores = 0.5 + spread * rng.standard_normal((1, seeds, 1)) + prompts
        ends = np.percentile(reproduce.bootstrap(scores, 1000), [2.5, 97.5])
        held.append(ends[0] <= 0.5 <= ends[1])
    assert low <= np.mean(held) <= high


def test_a_record_of_other_data_is_not_taken(tmp_path):
    runner = reproduce.Runner(options(tmp_path))
    runner.make("train.jsonl", 0)
    before = (tmp_path / "train.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"train.jsonl.json: of another command, settings or data"):
        reproduce.Runner(options(tmp_path, prompts=7)).make("train.jsonl", 0)
    assert (tmp_path / "train.jsonl").read_text() == before and len(before.splitlines()) == 6
    words = ["-c", "pass"]
    assert runner.run("x", words, [{"key": "a"}]) == runner.run("x", words, [{"key": "a"}])
    with pytest.raises(SystemExit, match="settings or data"):
        runner.run("x", words, [{"key": "b"}])
    assert runner.run("x", words, [{"key": "b"}], again=True)["command"] == "-c pass"
    with pytest.raises(SystemExit, match="exit code 3: gone"):
        runner.run("y", ["-c", "print('gone'); raise SystemExit(3)"], [])


def test_the_search_trains_on_no_prompt_that_it_judges_by():
    def texts(n, seed, exclude=frozenset()):
        return {row["prompt"] for row in world.sample_prompts("train", n, seed, exclude)}

    train, tune = texts(400, 0), texts(600, 0)
    tune -= train
    pairs = texts(1000, 2, frozenset(tune))
    assert len(tune) == 200 and len(pairs) == 1000 and not tune & pairs and tune & texts(1000, 2)
    templates = [reproduce.DATA[name] for name in ("pairs.jsonl", "train-sd3.jsonl")]
    assert all("--exclude {work}/tune.jsonl" in template for template in templates)


def test_the_page_shows_what_results_json_holds(tmp_path):
    """docs/reproduction.md has the tables of docs/reproduction/results.json, and no others."""
    kept = reproduce.ROOT / "docs" / "reproduction"
    page = kept.with_suffix(".md").read_text()
    (tmp_path / "reproduction.md").write_text(page)
    reproduce.report(kept, tmp_path / "reproduction", [tmp_path / "reproduction.md"])
    assert (tmp_path / "reproduction.md").read_text() == page
    assert sorted(re.findall("<!-- reproduce.py: (.*) -->", page)) == sorted(reproduce.TABLES)
    assert {file.name for file in (tmp_path / "reproduction").iterdir()} == {file.name for file in kept.iterdir()}


def test_every_row_was_run_with_the_settings_that_the_search_chose():
    search = json.loads(reproduce.SEARCH_FILE.read_text())
    for method, found in search.items():
        assert found["tried"].keys() == set(reproduce.SEARCH[method])
        assert found["settings"] in reproduce.finalists(found["tried"])
    rows = json.loads((reproduce.ROOT / "docs" / "reproduction" / "results.json").read_text())["rows"]
    for row, seeds in rows.items():
        for record in seeds.values() if row in reproduce.ROWS else ():
            assert f" {search[reproduce.ROWS[row].method]['settings']} " in record["command"], row
    assert rows.keys() == {*reproduce.ROWS, *reproduce.FAMILIES.values()} and search.keys() == reproduce.SEARCH.keys()
    for row in reproduce.ROWS:  # three seeds each, and the plan's
        planned = map(str, reproduce.PLANNED_SEEDS) if row in reproduce.PLANNED_ROWS else ()
        assert rows[row].keys() == {"0", "1", "2", *planned}, row
