# SPDX-License-Identifier: Apache-2.0
"""What a user of user_study.py gets: blinded comparisons, a log that loses nothing, figures by hand, datasets."""

import json
import os
import random
import re
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import world
import yaml
from conftest import call, refused, write_dataset, write_pairs
from datasets import List, load_dataset
from filelock import FileLock
from PIL import Image, PngImagePlugin

import user_study


HARD = '<script>alert("1")</script> "quotes" & \'more\' \u05e9\u05dc\u05d5\u05dd'
MODELS = ("tuned", "other", "base")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Thousands of votes, and nobody pulls the plug here. The page's tests sync as users do."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def main(*words) -> None:
    call("user_study", *words)


def make_prompts(tmp_path, n: int = 12) -> Path:
    prompts = [row["prompt"] for row in world.sample_prompts("heldout", n, 0)]
    prompts[3] = HARD
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "style": ("photo", "anime")[i % 2]} for i, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_images(tmp_path, models=MODELS, n: int = 12) -> list[str]:
    """Pictures in the sizes, formats and with the metadata of their models; flags that name them."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(models):
        (tmp_path / name).mkdir()
        for i in range(n):
            metadata = PngImagePlugin.PngInfo()
            metadata.add_text("parameters", f"model: {name}")
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((32 + 16 * number,) * 2)
            picture.save(tmp_path / name / f"{i}.png", pnginfo=metadata)
    return [f"{name}={tmp_path / name}/{{index}}.png" for name in models]


def study_of(*flags) -> user_study.Study:
    """What `serve` with these flags makes and shows."""
    args = user_study.parse_arguments([str(flag) for flag in ("serve", *flags)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user_study.secrets, "token_hex", lambda length: "0" * 64)  # the same orders in every run
        user_study.make_study(args)
    return user_study.Study(Path(args.study_dir))


def make_study(tmp_path, *more, models=MODELS) -> user_study.Study:
    flags = ["--study_dir", tmp_path / "study", "--prompts", make_prompts(tmp_path)]
    return study_of(*flags, "--images", *make_images(tmp_path, models), *more)


def shown(study, rater: str) -> list[dict]:
    """What a rater was shown, in order."""
    return list(study.shown[rater].values())


def vote(study, rater: str, choose, limit: int = 10_000) -> int:
    """A rater who answers `choose(line of the log, question)` until nothing is left; returns the number of answers."""
    state, count = study.view(rater), 0
    while not state["finished"] and count < limit:
        question = state["questions"][state["asked"]][0]
        assert state["hides_prompt"] == (question == "appeal")
        state = reply(study, rater, state, choose(shown(study, rater)[state["position"]], question))
        count += 1
    return count


def reply(study, rater: str, state: dict, answer: str) -> dict:
    """The answer to the question that the page shows in this state."""
    question, picture = state["questions"][state["asked"]][0], state["pictures"][0]
    return study.answer(rater, state["position"], question, answer, 1.0, picture)


def lines_of(study) -> list[dict]:
    return user_study.read_votes(study.folder)


def left(line: dict, question: str) -> str:
    return "left"


def test_the_papers_samples():
    """QSD: 25 prompts of each of four styles. RankDPO: a number of prompts. The seed decides."""
    styles = [("photo", "anime", "paintings", "concept-art")[i % 4] for i in range(400)]
    chosen = user_study.sample_prompts(styles, 100, 25, seed=1)
    assert len(set(chosen)) == 100 and all(sum(styles[i] == style for i in chosen) == 25 for style in set(styles))
    assert chosen == user_study.sample_prompts(styles, 100, 25, seed=1) == sorted(chosen)
    assert chosen != user_study.sample_prompts(styles, 100, 25, seed=2)
    assert len(set(user_study.sample_prompts(styles, 300, None, seed=0))) == 300
    with pytest.raises(SystemExit, match="--per_category 101: photo has 100 prompts"):
        user_study.sample_prompts(styles, 1, 101, seed=0)


@pytest.mark.parametrize("first, template", [(0, "{index}"), (1, "{index+1}"), (0, "{category}-{category_index}")])
def test_pictures_are_numbered_by_the_rows_of_the_source(tmp_path, first, template):
    """As in evaluate.py: a prompt that occurs twice does not shift the pictures of those after it, neither over all
    rows nor within a category. Files that count from 1 are seen."""
    rows = [("cat", "pet"), ("dog", "pet"), ("cat", "pet"), ("bird", "wild"), ("fish", "pet")]
    (tmp_path / "p.csv").write_text("prompt,category\n" + "".join(f"{prompt},{kind}\n" for prompt, kind in rows))
    places = Counter()
    for i, (_, kind) in enumerate(rows):
        name = f"{kind}-{places[kind]}" if "category" in template else first + i
        Image.new("RGB", (16, 16), (60 * i,) * 3).save(tmp_path / f"{name}.png")
        places[kind] += 1
    flags = ["--study_dir", tmp_path / "study", "--prompts", tmp_path / "p.csv", "--num_prompts", 4]
    flags += ["--category_column", "category", "--images"]
    if first:
        message = refused("user_study", "serve", *flags, *(f"{name}={tmp_path}/{{index}}.png" for name in "ab"))
        assert message.endswith(f"counted from 1: write {tmp_path}/{{index+1}}.png")
    study = study_of(*flags, *(f"{name}={tmp_path}/{template}.png" for name in "ab"))
    files = [user_study.picture_file(study.folder, study.record, number, "b") for number in range(4)]
    greys = [np.asarray(Image.open(file)).mean().round() for file in files]
    assert [row["prompt"] for row in study.record["prompts"]] == ["cat", "dog", "bird", "fish"]
    assert greys == [0, 60, 180, 240]


def test_every_comparison_gets_its_votes_and_sides_are_balanced(tmp_path):
    study = make_study(tmp_path, "--questions", "overall", "--comparisons_per_rater", 18)
    rng = random.Random(0)
    counts = [vote(study, f"r{i}", lambda line, question: rng.choice(["left", "right"])) for i in range(12)]
    assert counts == [18] * 10 + [0, 0]  # 12 prompts x 3 pairs of models x 5 votes
    lines = [line for line in lines_of(study) if "answer" not in line]
    for rater in {line["rater"] for line in lines}:
        mine = [line for line in lines if line["rater"] == rater]
        assert len({line["item"] for line in mine}) == 18
        for first, second in (("tuned", "other"), ("tuned", "base"), ("other", "base")):
            sides = [line["left"] for line in mine if {line["left"], line["right"]} == {first, second}]
            assert abs(sides.count(first) - sides.count(second)) <= 1
    assert set(study.loads().values()) == {5}
    orders = {tuple(line["item"] for line in lines if line["rater"] == f"r{i}") for i in range(10)}
    assert len(orders) == 10


def test_what_a_rater_left_open_goes_to_somebody_else_later(tmp_path, monkeypatch):
    study = make_study(tmp_path, "--questions", "overall", "--votes_per_comparison", 1, models=("tuned", "base"))
    study.view("idle")
    assert vote(study, "busy", left) == 11
    now = user_study.time.time()
    monkeypatch.setattr(user_study.time, "time", lambda: now + 61 * 60)
    assert vote(study, "busy", left) == 1


def test_a_restart_changes_nothing(tmp_path):
    """Also if the server was killed within a line."""
    study = make_study(tmp_path, "--attention_checks", 2, "--allow_ties")
    for i in range(4):
        vote(study, f"r{i}", left, limit=10 + i)
    before = [study.view(f"r{i}") for i in range(4)]
    assert before[1]["asked"] == 2 and before[0]["asked"] == 1  # within a comparison, too
    with open(study.log, "ab") as file:
        file.write('{"rater": "r0", "item": "\u05e9'.encode()[:-1])
    again = user_study.Study(tmp_path / "study")
    assert [again.view(f"r{i}") for i in range(4)] == before
    assert again.pictures == study.pictures and again.loads() == study.loads()


def test_what_counts_as_an_answer(tmp_path):
    """After "back" the last answer counts; a second click, or one on what no longer stands there, changes nothing."""
    study = make_study(tmp_path, "--questions", "overall", models=("tuned", "base"))
    first = study.view("r")
    state = reply(study, "r", first, "left")
    assert reply(study, "r", first, "left") == state and state["position"] == 1
    back = study.view("r", 0, asked=0)
    assert back["answers"] == {"overall": "left"}
    assert reply(study, "r", back, "right") == state
    assert reply(study, "r", {**state, "pictures": first["pictures"]}, "left") == state
    assert reply(study, "r", {**state, "position": 7}, "left") == state
    assert [line["answer"] for line in lines_of(study) if "answer" in line] == ["left", "right"]
    (final,) = user_study.final_votes(lines_of(study))
    assert final["answer"] == "right" and final["chosen"] == final["right"]
    for rater, answer in (("r", "item"), ("../x", "left")):
        with pytest.raises(ValueError):
            reply(study, rater, state, answer)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    study = make_study(tmp_path, models=("tuned", "base"))
    state, sync = study.view("r"), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        reply(study, "r", state, "left")
    monkeypatch.setattr(os, "fsync", sync)
    assert reply(study, "r", state, "right")["answers"]["general"] == "right"
    assert [line.get("answer") for line in lines_of(study)] == [None, "right"]


def test_pictures_do_not_give_the_model_away(tmp_path):
    """The models drew in three sizes, with metadata. Raters see one size, format and length; names say nothing."""
    study = make_study(tmp_path, "--attention_checks", 2)
    for number in range(12):
        files = [user_study.picture_file(study.folder, study.record, number, model) for model in MODELS]
        pictures, contents = [Image.open(file) for file in files], [file.read_bytes() for file in files]
        assert len({picture.size for picture in pictures}) == len({len(content) for content in contents}) == 1
        for file, content, picture in zip(files, contents, pictures):
            assert picture.format == "JPEG" and not picture.getexif() and re.fullmatch(r"[0-9a-f]{32}\.jpg", file.name)
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert not re.search(b"tuned|other|base|model|parameters", content)
    states = []
    for rater in ("a", "b"):
        state = study.view(rater)
        while not state["finished"]:
            states.append(state)
            state = reply(study, rater, state, "left")
    shown = [name for state in states if state["asked"] == 0 for name in state["pictures"]]
    assert len(set(shown)) == len(shown) == 2 * 2 * (36 + 2)  # no name twice, neither for a rater nor for two
    assert not re.search(r"tuned|other|base|noise|check|item", json.dumps(states).replace(json.dumps(HARD), ""))


def test_test_pairs(tmp_path):
    """Noise must lose, the same picture twice is a tie; who fails is left out, and others get the comparisons."""
    flags = ["--attention_checks", 4, "--allow_ties", "--questions", "overall", "--votes_per_comparison", 1]
    study = make_study(tmp_path, *flags, models=("tuned", "base"))

    def careful(line, question):
        if not line["item"].startswith("check"):
            return "left" if line["left"] == "tuned" else "right"
        return "tie" if line["left"] == line["right"] else "right" if line["left"] == "noise" else "left"

    vote(study, "fast", left)
    assert set(study.loads().values()) == {0} and vote(study, "careful", careful) == 16
    assert study.view("late")["finished"]
    lines = shown(study, "careful")
    places = [i for i, line in enumerate(lines) if line["item"].startswith("check")]
    assert np.diff(places).min() >= 2
    assert [lines[i]["left"] == lines[i]["right"] for i in places] == [False, True, False, True]
    main("tally", "--study_dir", tmp_path / "study")
    results = json.loads((tmp_path / "study" / "tally" / "results.json").read_text())
    assert results["settings"]["max_failed_checks"] == 0 and results["raters"]["excluded"] == ["fast"]
    assert results["raters"]["n_votes_excluded"] == 12 and set(results["raters"]["each"]) == {"careful"}
    assert results["pairs"]["tuned"]["base"]["overall"]["wins"] == 12
    lenient = user_study.tally(study.record, lines_of(study), 4, 0)["raters"]
    assert lenient["n_excluded"] == 0 and lenient["each"]["fast"]["failed_checks"] >= 2


def test_test_pairs_come_to_every_rater(tmp_path):
    """Also to who ends early, and to who finds few comparisons left."""
    study = make_study(tmp_path, "--attention_checks", 4, "--questions", "overall", "--votes_per_comparison", 1)

    def honest(line, question):
        return "right" if line["left"] == "noise" else "left"

    def checks(rater):
        return [line["item"].startswith("check") for line in shown(study, rater)]

    assert vote(study, "first", honest, limit=30) == 30 and checks("first").index(True) == 7
    assert study.view("second")["total"] == len(study.comparisons) - 27 + 4 + sum(checks("first")[:30]) - 4
    vote(study, "second", honest)
    assert sum(checks("second")) == 4 and study.view("third")["finished"] and not checks("third")


def test_fleiss_kappa_of_the_textbook():
    """Fleiss' example of 14 raters, 10 subjects and 5 categories: kappa 0.210."""
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0]]
    table += [[3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert user_study.fleiss_kappa(np.array(table)) == pytest.approx(0.20993, abs=1e-5)
    assert user_study.fleiss_kappa(np.array([[5, 0], [5, 0]])) is None  # no chance to disagree
    assert user_study.fleiss_kappa(np.array([[2, 0], [0, 2], [1, 0]])) == 1.0  # a single vote says nothing


def test_tally_by_hand():
    """Three raters on four prompts: won, lost, undecided by ties, and one with two votes that split."""
    record = {"pairs": [["a", "b"]], "questions": {"q": "?"}}
    votes = {"0-0": "aab", "1-0": "bbb", "2-0": "abt", "3-0": "ab"}
    lines = []
    for item, answers in votes.items():
        for rater, answer in enumerate(answers):
            sides = {"left": "a", "right": "b"} if rater % 2 else {"left": "b", "right": "a"}
            name = {"a": "left" if rater % 2 else "right", "b": "right" if rater % 2 else "left", "t": "tie"}[answer]
            lines.append({"rater": f"r{rater}", "item": item, **sides, "question": "q", "answer": name})
    figures = user_study.tally(record, lines, 0, 0)["pairs"]["a"]["b"]["q"]
    assert [figures[key] for key in ("wins", "losses", "undecided", "n_votes")] == [1, 1, 2, 11]
    assert figures["win_rate"] == 0.5 and figures["win_rate_decided"] == 0.5 and figures["sign_test_p"] == 1.0
    assert figures["vote_share"] == pytest.approx((4 + 0.5) / 11) and figures["tie_share"] == pytest.approx(1 / 11)
    assert figures["votes_per_comparison"] == [2, 3]
    # Agreement of pairs of votes: 1/3, 1, 0, 0. Shares of the options: 4, 6 and 1 of 11.
    chance = (16 + 36 + 1) / 121
    assert figures["fleiss_kappa"] == pytest.approx((1 / 3 - chance) / (1 - chance))
    # Where the two others agree: of r0 on prompt 1, and where one other voted, on 3.
    each = user_study.tally(record, lines, 0, 0)["raters"]["each"]
    assert each["r2"] == {"votes": 3, "checks": 0, "failed_checks": 0, "agreement": 0.5}
    assert "No preference is shown" in figures["verdict"] and "Only 4 comparisons by 3 raters" in figures["verdict"]


def test_intervals_cover_what_they_should():
    """60 simulated studies, in which prompts and raters differ. The truth lies in at least nine of ten intervals; an
    interval over prompts alone would miss it much more often: see docs/user_study.md."""
    rng, covered, n_prompts, n_raters = np.random.default_rng(0), {"share": 0, "majority": 0}, 60, 10
    chance = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    effects = 0.4 + rng.normal(size=(100_000, 1)) + 0.5 * rng.normal(size=(100_000, 5))
    drawn = rng.random(effects.shape) < chance(effects)
    truth = {"share": drawn.mean(), "majority": (drawn.sum(axis=1) > 2.5).mean()}
    for seed in range(60):
        prompts, raters = rng.normal(size=(n_prompts, 1)), 0.5 * rng.normal(size=n_raters)
        votes = rng.permuted(np.tile([1.0, 0.0], (n_prompts, n_raters // 2)), axis=1)
        first = votes * (rng.random(votes.shape) < chance(0.4 + prompts + raters))
        found = dict(zip(("majority", "share"), user_study.bootstrap(first, votes - first, votes, seed, 500)))
        for name, (low, high) in found.items():
            covered[name] += low <= truth[name] <= high
    assert min(covered.values()) >= 54, covered


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study of three models with five votes on each comparison; raters prefer tuned to other to base, mostly."""
    folder = tmp_path_factory.mktemp("finished")
    study, rng = make_study(folder, "--questions", "overall", "appeal", "--category_column", "style"), random.Random(1)
    order = {name: rank for rank, name in enumerate(MODELS)}

    def choose(line, question):
        better = "left" if order[line["left"]] < order[line["right"]] else "right"
        return better if rng.random() < 0.95 else {"left": "right", "right": "left"}[better]

    for i in range(5):
        vote(study, f"r{i}", choose)
    return folder / "study"


def test_tally_writes_tables_a_chart_and_results(finished, tmp_path, capsys):
    flags = ["tally", "--study_dir", finished, "--output_dir", tmp_path / "tally"]
    main(*flags)
    results = json.loads((tmp_path / "tally" / "results.json").read_text())
    figures = results["pairs"]["tuned"]["base"]["overall"]
    low, high = figures["win_rate_ci95"]
    assert figures["n_comparisons"] == 12 and 0.5 < low <= figures["win_rate"] <= high <= 1
    assert results["settings"]["questions"].keys() == {"overall", "appeal"} and "secret" not in str(results)
    text = (tmp_path / "tally" / "results.md").read_text()
    assert "People prefer tuned to base" in text and text in capsys.readouterr().out
    assert Image.open(tmp_path / "tally" / "chart.png").size[0] > 500
    # Again into the same folder, but never over the results of evaluate.py.
    main(*flags)
    (tmp_path / "tally" / "results.json").write_text("{}")
    assert "holds other files: choose another folder" in refused("user_study", *flags)
    # What the Hub has of a study is enough.
    shutil.copy(finished / "study.json", tmp_path)
    shutil.copytree(finished / "votes", tmp_path / "votes")
    main("tally", "--study_dir", tmp_path, "--output_dir", tmp_path / "tally2")
    assert json.loads((tmp_path / "tally2" / "results.json").read_text()) == results


def test_pairs_have_the_columns_of_pick_a_pic(finished, tmp_path):
    main("export", "--study_dir", finished, "--output_dir", tmp_path / "pairs")
    rows = load_dataset(str(tmp_path / "pairs"), split="train")
    votes = user_study.final_votes(user_study.read_votes(finished))
    counts = Counter((vote["item"], vote["chosen"]) for vote in votes if vote["question"] == "overall")
    assert len(rows) == 36 and set(rows["num_votes"]) == {5} and HARD in rows["caption"]
    for row, item in zip(rows, (f"{number}-{pair}" for number in range(12) for pair in range(3))):
        found = [counts[item, row["model_0"]], counts[item, row["model_1"]]]
        assert [row["votes_0"], row["votes_1"]] == found and row["label_0"] == float(row["votes_0"] > 2)
        assert row["label_0"] + row["label_1"] == 1 and row["agreement"] == pytest.approx(max(found) / 5)
        assert Image.open(BytesIO(row["jpg_0"])).size == (32, 32) and not row["jpg_0"].endswith(b"\0")
    card = (tmp_path / "pairs" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["configs"][0]["data_files"][0]["path"] == "data/train-*.parquet" and "better overall" in card
    same = write_pairs(tmp_path / "same", rows.to_list(), drop=("quality",))  # as in the tests of score_pairs.py
    wanted = load_dataset(str(same), split="train").features
    assert {name: rows.features[name] for name in wanted} == wanted


def test_rankings_have_the_columns_of_synpic(finished, tmp_path):
    flags = ["--study_dir", finished, "--export_format", "ranked", "--question", "appeal"]
    main("export", *flags, "--output_dir", tmp_path / "ranked")
    rows = load_dataset(str(tmp_path / "ranked"), split="train")
    raw = rows.cast_column("images", List(datasets.Image(decode=False))).to_list()
    wanted = load_dataset(str(write_dataset(tmp_path / "same", raw)), split="train").features
    assert {name: rows.features[name] for name in wanted} == wanted  # as in the tests of the trainers
    assert len(rows) == 12 and set(rows["num_votes"]) == {15}
    for row in rows:
        phi = np.array(row["preference_probability"])
        assert row["generators"] == list(MODELS) and sorted(row["rank"]) == [1, 2, 3]
        assert phi.sum() == pytest.approx(1.5) and phi[row["rank"].index(1)] == phi.max()


def test_equal_models_are_ranked_without_favour(finished, tmp_path):
    study = make_study(tmp_path, "--allow_ties", models=("tuned", "base"))
    vote(study, "undecided", lambda line, question: "tie")
    main("tally", "--study_dir", tmp_path / "study")  # the chart of such a study is no error
    record = user_study.read_study(finished)
    votes = [{"item": f"{number}-{pair}", "chosen": "tie"} for number in range(12) for pair in range(3)]
    rows, _ = user_study.ranked_rows(record, finished, votes)
    assert {row["rank"].index(1) for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("command, name", [("export", "data/mine.parquet"), ("space", "pictures/mine.jpg")])
def test_files_of_others_stay(command, name, finished, tmp_path):
    flags = [command, "--study_dir", finished, "--output_dir", tmp_path / "out", "--hub_dataset_id", "user/votes"]
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert "holds other files: choose another folder" in refused("user_study", *flags) and mine.exists()
    shutil.rmtree(tmp_path / "out")
    main(*flags)
    (tmp_path / "out" / "data").mkdir(exist_ok=True)
    (tmp_path / "out" / "data" / "train-00001-of-00002.parquet").touch()
    main(*flags)  # again into the same folder: what stood there goes
    assert command == "space" or len(list((tmp_path / "out" / "data").iterdir())) == 1
    mine.touch()
    assert command == "space" or "holds other files" in refused("user_study", *flags)
    assert mine.exists()


def test_images_of_evaluate(tmp_path):
    """The first image of each prompt, in the layout of evaluate.py, whose settings name the prompts."""
    prompts, images = make_prompts(tmp_path), tmp_path / "evaluation" / "images"
    digest = user_study.short_hash("\n".join(json.loads(line)["prompt"] for line in prompts.open()))
    for name, green in (("base", 200), ("tuned", 100)):
        (images / name).mkdir(parents=True)
        (images / name / "settings.json").write_text(json.dumps({"prompts": digest}))
        for i in range(12):
            Image.new("RGB", (32, 32), (i, green, 0)).save(images / name / f"{i:05d}_0.png")
    flags = ["--evaluation_dir", tmp_path / "evaluation", "--prompts", prompts, "--study_dir"]
    more = ["--category_column", "style", "--per_category", 3]
    study = study_of(*flags, tmp_path / "study", *more)
    assert study.record["pairs"] == [["tuned", "base"]] and len(study.record["prompts"]) == 6
    picture = Image.open(user_study.picture_file(study.folder, study.record, 2, "tuned"))
    red, green, _ = np.asarray(picture).mean(axis=(0, 1))
    assert abs(red - study.record["prompts"][2]["index"]) < 4 and abs(green - 100) < 4
    flags.insert(0, "serve")
    assert "made with all_prompts" in refused("user_study", *flags, tmp_path / "study", *more, "--max_prompts", 5)
    assert "was drawn from other prompts" in refused("user_study", *flags, tmp_path / "new", "--max_prompts", 5)


# The command, what is refused. NEW and the like are paths.
REFUSALS = {
    "tally --study_dir NEW": "holds no study",
    "serve --study_dir NEW --prompts PROMPTS --evaluation_dir NEW": "new: holds no images of evaluate.py",
    "serve --study_dir NEW --num_prompts 2 --prompts PROMPTS --images ONE b={here}": "wrong template",
    "serve --study_dir NEW --num_prompts 2 --prompts PROMPTS --images ONE b=none{index}": "cannot be read",
    "serve --study_dir NEW --num_prompts 2 --prompts PROMPTS --images ONE tie=x": "may not be called tie",
    "serve --study_dir NEW --per_category 2 --prompts PROMPTS --images ONE TWO": "needs --cat",
    "serve --study_dir DONE --votes_per_comparison 3": "made with votes_per_comparison 5, not 3",
    "serve --study_dir FILES --prompts PROMPTS": "holds other files",
    "serve --questions overall overall=x": "each once",
    "serve --output_dir NEW": "is for the other commands",
    "space --study_dir DONE": "--hub_dataset_id is missing",
    "tally --study_dir DONE --push_to_hub": "--hub_model_id is missing",
    "tally --study_dir EMPTY": "no votes to count",
    "export --study_dir EMPTY": "no pairs to export",
}


def test_refusals(finished, tmp_path):
    one, two = make_images(tmp_path, ("one", "two"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.tex").touch()
    places = {"PROMPTS": make_prompts(tmp_path), "ONE": one, "TWO": two, "DONE": finished, "NEW": tmp_path / "new"}
    places |= {"FILES": tmp_path / "files", "EMPTY": make_study(tmp_path).folder}
    for command, message in REFUSALS.items():
        assert message in refused("user_study", *(places.get(word, word) for word in command.split())), command
    with FileLock(finished / ".lock"):
        assert "is served by another process" in refused("user_study", "serve", "--study_dir", finished)


def test_flags_of_a_file(tmp_path):
    (tmp_path / "f.yaml").write_text("command: tally\nallow_ties: yes\nquestions: [overall, 'mine=Which?']\nseed: 3\n")
    args = user_study.parse_arguments(["--config", str(tmp_path / "f.yaml"), "--seed", "4", "--study-dir=~/x"])
    assert (args.command, args.allow_ties, args.seed, args.questions[1]) == ("tally", True, 4, "mine=Which?")
    assert args.output_dir == os.path.expanduser("~/x/tally") and args.votes_per_comparison == 5


def test_results_and_data_on_the_hub(finished, tmp_path, online):
    """Also what people wrote into a card, and other results, stay; an earlier tally's are replaced."""
    other = {"task": {"type": "text-to-image"}, "dataset": {"type": "prompts", "name": "heldout"}}
    other["metrics"] = [{"type": "win_rate", "value": 0.5}]
    front = yaml.safe_dump({"license": "mit", "model-index": [{"name": "mine", "results": [other]}]})
    online.commit("models", "user/lora", {"README.md": f"---\n{front}---\n\n# My LoRA\n".encode()})
    flags = ["--study_dir", finished, "--push_to_hub", "--output_dir"]
    for _ in range(2):
        main("tally", *flags, tmp_path / "tally", "--hub_model_id", "user/lora")
        main("export", *flags, tmp_path / "pairs", "--hub_dataset_id", "user/people")
    files = online.files("models", "user/lora")
    card = files["README.md"].decode()
    assert "# My LoRA" in card and card.count("## User study") == 1 and "license: mit" in card
    (model,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    heldout, result = model["results"]
    assert heldout["dataset"]["name"] == "heldout" and model["name"] == "mine"
    assert "overall, people's win rate of tuned over base" in [metric["name"] for metric in result["metrics"]]
    assert {"user_study/results.json", "user_study/chart.png"} <= files.keys()
    assert not any(re.search(rb"\br[0-4]\b", files[name]) for name in ("user_study/results.json", "README.md"))
    files = online.files("datasets", "user/people")
    assert "data/train-00000-of-00001.parquet" in files and b'load_dataset("user/people"' in files["README.md"]
