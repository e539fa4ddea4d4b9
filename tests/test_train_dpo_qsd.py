# SPDX-License-Identifier: Apache-2.0
"""What a user of train_dpo_qsd.py sees: which pairs are trained on, in which order, with which loss."""

import json
import math
import shutil
from hashlib import blake2b

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    call,
    check_card,
    check_gallery,
    count_items,
    lora_difference,
    pair_rows,
    refused,
    run,
    same_lora,
    torchrun,
    write_pairs,
)
from datasets import Image as ImageFeature
from datasets import Value
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from pyarrow.csv import write_csv

import train_dpo_qsd as script
from train_dpo_qsd import pair_loss


@pytest.fixture(scope="session")
def flags(trainer_flags):
    return trainer_flags("train_dpo_qsd")


def best_first() -> list[int]:
    """The pairs of `pair_rows` that have a winner, by quality."""
    rows = pair_rows()
    return sorted((i for i in range(24) if i not in (5, 6)), key=lambda i: -rows[i]["quality"])


def by_hand(loss_type, mw, ml, rw, rl, beta, lam):
    """One pair in Python floats."""
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    if loss_type == "orpo":
        odds = [math.exp(-e) / (1 - math.exp(-e)) for e in (mw, ml)]
        return mw - lam * math.log(sigma(math.log(odds[0] / odds[1])))
    if loss_type == "orpo_diff":
        return mw - lam * math.log(sigma(ml - mw))
    margin = beta / 2 * ((ml - rl) - (mw - rw))
    if loss_type == "hinge":
        return max(0.0, 1 - margin)
    if loss_type == "ipo":
        h = margin / beta
        return beta**2 * (h - 1 / (2 * beta)) ** 2
    return -math.log(sigma(margin))


@pytest.mark.parametrize("loss_type", script.LOSS_TYPES)
def test_losses_equal_the_formulas(loss_type):
    rng, rel = np.random.default_rng(0), 1e-12
    values = [torch.tensor(errors) for errors in rng.uniform(0.02, 0.4, (4, 64))]
    loss, metrics = pair_loss(*values, 30.0, loss_type, orpo_lambda=0.3)
    wanted = np.mean([by_hand(loss_type, *row, 30.0, 0.3) for row in zip(*(e.tolist() for e in values))])
    assert loss.item() == pytest.approx(wanted, rel=rel)
    better = values[1] > values[0] if loss_type.startswith("orpo") else values[1] - values[3] > values[0] - values[2]
    assert metrics["implicit_accuracy"].item() == pytest.approx(better.double().mean().item())
    assert metrics["loss"].item() == loss.item() and not metrics["margin"].requires_grad
    if not loss_type.startswith("orpo"):
        assert metrics["chosen_error"].item() == pytest.approx((values[0] - values[2]).mean().item(), rel=rel)
        assert metrics["rejected_error"].item() == pytest.approx((values[1] - values[3]).mean().item(), rel=rel)
        anchored, _ = pair_loss(*values, 30.0, loss_type, sft_weight=2.0)
        assert anchored.item() == pytest.approx(wanted + 2 * values[0].mean().item(), rel=rel)


@pytest.mark.parametrize("loss_type", script.LOSS_TYPES)
def test_gradients_lower_the_winners_error_and_raise_the_losers(loss_type):
    """Also ORPO's, whose sign is wrong in a well-known script; and against finite differences."""
    winner, loser = (torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True) for _ in range(2))
    ref = torch.tensor([0.1, 0.3], dtype=torch.float64)
    reference = (None, None) if loss_type.startswith("orpo") else (ref, ref)
    pair_loss(winner, loser, *reference, 5.0, loss_type)[0].backward()
    assert (winner.grad > 0).all() and (loser.grad < 0).all()
    function = lambda e_w, e_l: pair_loss(e_w, e_l, *reference, 5.0, loss_type)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (winner, loser))
    if not loss_type.startswith("orpo"):
        quarter = pair_loss(winner, loser, *reference, 5.0, loss_type, loser_scale=torch.full((2,), 0.25))[0]
        weak = torch.autograd.grad(quarter, (winner, loser))
        assert torch.equal(weak[0], winner.grad) and torch.allclose(weak[1], 0.25 * loser.grad)


@pytest.mark.parametrize("family", ["sd", "sdxl", "img2img"])
def test_lora_changes_the_images_exactly_as_the_trained_model_does(family, tiny_sd, tiny_sdxl, flags, tmp_path):
    model, folder = tiny_sd if family == "sd" else tiny_sdxl, tmp_path / "run"
    if family == "img2img":  # some SDXL models are published under the name of this pipeline
        model = shutil.copytree(tiny_sdxl, tmp_path / "model")
        index = json.loads((model / "model_index.json").read_text())
        index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
        (model / "model_index.json").write_text(json.dumps(index))
    pipeline_class = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    more = "--max_train_steps 6 --train_batch_size 2 --checkpointing_steps 2".split()
    more += ["--pretrained_model_name_or_path", model, "--cache_dir", tmp_path / "cache"]
    call("train_dpo_qsd", *flags, *more, "--output_dir", folder)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (2, 4, 6)]
    prompts = [pair_rows()[i]["caption"] for i in best_first()[:4]]
    files = [folder / "pytorch_lora_weights.safetensors", folder / "comfyui" / "run.safetensors"]
    pipeline = pipeline_class.from_pretrained(model, dtype=torch.float32)
    check_gallery(pipeline, folder, prompts, files, guidance_scale=7.5)
    card = check_card(folder)
    assert "dpo-qsd" in card and "the best first" in card
    assert "on 12 of 22 labelled pairs of" in card


def test_pairs_are_seen_best_first_by_any_number_of_processes_and_after_a_resume(flags, tmp_path, monkeypatch):
    """A second epoch begins again with the best. tests/faults.py kills such runs."""
    shown, read_row = {}, script.read_row

    def spied(args, run, labels, noise_scheduler, key):
        epoch, row, place = key
        shown[place] = epoch, labels["id"][row].as_py()
        return read_row(args, run, labels, noise_scheduler, key)

    monkeypatch.setattr(script, "read_row", spied)
    wanted = [(epoch, pair) for epoch in range(2) for pair in best_first()]  # 5 steps of 6 pairs, 22 an epoch
    wanted = dict(enumerate(wanted[:30]))
    common = [*flags, "--train_batch_size", 3, "--output_dir"]
    for name, steps, first in (("one", 5, 0), ("resumed", 2, 0), ("resumed", 5, 12)):
        shown.clear()
        more = ["--gradient_accumulation_steps", 2, "--max_train_steps", steps, "--resume_from_checkpoint", "latest"]
        call("train_dpo_qsd", *common, tmp_path / name, *more)
        found = {place: pair for place, pair in shown.items() if place < 6 * steps}  # not the batch that is read ahead
        assert found == {place: wanted[place] for place in range(first, 6 * steps)}
    assert same_lora(tmp_path / "one", tmp_path / "resumed")
    run(*torchrun(2, "train_dpo_qsd.py"), *common, tmp_path / "two", "--max_train_steps", 5)
    assert lora_difference(tmp_path / "one", tmp_path / "two") < 1e-5


def selection(pair_dataset, **kwargs):
    args = script.ScriptArguments(dataset_name=str(pair_dataset), **kwargs)
    table, _ = script.load_pairs(args)
    labels = script.select_pairs(args, table)
    return args, labels["id"].to_pylist(), labels["winner"].tolist()


def test_random_order_takes_every_pair_once_an_epoch_and_needs_no_quality(tmp_path, capsys):
    data = write_pairs(tmp_path / "pairs", pair_rows(), drop=("quality",))
    args, rows, winners = selection(data, order="random", top_fraction=1.0, train_batch_size=11, seed=3)
    assert sorted(rows) == sorted(best_first()) and rows != sorted(rows)
    assert "24 pairs: 1 ties, 1 without a label; 22 are selected" in capsys.readouterr().out
    labels = pair_rows()
    assert [1 - w for w in winners] == [int(labels[row]["label_0"]) for row in rows]
    steps = script.micro_batches(args, 22, 0, 1, start_step=0)
    assert len({str([row for _, row, _ in next(steps) + next(steps)]) for _ in range(3)}) == 3  # epochs
    assert selection(data, order="random", top_fraction=1.0, seed=3)[1] == rows
    assert selection(data, order="random", top_fraction=1.0, seed=4)[1] != rows


def test_top_fraction_and_min_quality_select_the_best(pair_dataset, tmp_path):
    quality, best = [row["quality"] for row in pair_rows()], best_first()
    assert selection(pair_dataset, top_fraction=0.25)[1] == best[:6]  # of 22
    assert sorted(selection(pair_dataset, top_fraction=0.25, order="random")[1]) == sorted(best[:6])
    same = write_pairs(tmp_path / "same", [{**row, "quality": 1.0} for row in pair_rows()])
    assert selection(same, top_fraction=0.5)[1] == sorted(best)[:11]  # equal ones in the dataset's order
    found = selection(pair_dataset, top_fraction=1.0, min_quality=0.5)[1]
    assert found == [i for i in best if quality[i] >= 0.5]


def test_only_what_is_trained_on_is_read_and_encoded_and_no_pair_twice(flags, tmp_path, monkeypatch):
    """Row groups of other pairs are not read. Orders, seeds, shares, labels, files and other scores share the cache."""
    rows, counts = pair_rows(), count_items(monkeypatch, script, "read_images", "rows_to_encode")
    data = write_pairs(tmp_path / "data", rows)
    (file,) = data.rglob("*.parquet")
    pq.write_table(pq.read_table(file), file, row_group_size=1)
    common = [*flags, "--dataset_name", data, "--cache_dir", tmp_path / "cache", "--train_batch_size", 2]

    def train(name, *more) -> tuple[int, int]:
        """Pairs that are encoded, and pairs whose images are read."""
        counts.clear()
        call("train_dpo_qsd", *common, *more, "--output_dir", tmp_path / name)
        return counts["rows_to_encode"], counts["read_images"]

    assert train("a", "--top_fraction", 0.36) == (8, 8)  # of 22, an epoch
    assert train("b", "--max_train_steps", 6) == (4, 4)  # 12 of 22
    assert train("c", "--order", "random", "--seed", 5, "--top_fraction", 0.5) == (0, 0)
    others = [{**row, "label_0": 1 - row["label_0"], "quality": 1 - row["quality"]} for row in reversed(rows)]
    others = write_pairs(tmp_path / "others", others)  # one row group, in the other order, other winners
    assert train("d", "--dataset_name", others, "--max_train_steps", 20) == (10, 24)
    assert train("e", "--scores_dataset_name", others) == (0, 10)  # indices of row groups of which nothing was known
    assert train("f") == (0, 0)
    assert not same_lora(tmp_path / "e", tmp_path / "f")


def test_a_run_does_not_go_on_with_other_images_or_a_larger_share(flags, tmp_path):
    rows, data = pair_rows(), tmp_path / "data"
    longer = [*flags, "--dataset_name", write_pairs(data, rows), "--cache_dir", tmp_path / "cache"]
    longer += ["--output_dir", tmp_path / "longer", "--resume_from_checkpoint", "latest", "--max_train_steps"]
    call("train_dpo_qsd", *longer, 5)
    rows[best_first()[0]]["jpg_0"] = rows[6]["jpg_0"]
    shutil.rmtree(data)
    write_pairs(data, rows)
    assert "a run with images" in refused("train_dpo_qsd", *longer, 8)
    assert "top_fraction 1.0, not 0.5" in refused("train_dpo_qsd", *longer, 8, "--top_fraction", 0.5)


@pytest.mark.parametrize("ids", ["columns", "content of files"])
def test_scores_without_images_are_joined_by_the_images_ids(flags, pair_dataset, tmp_path, ids):
    """Images in another dataset, in another order, some of them on the other side: the same LoRA."""
    rows = pair_rows()
    scores = [dict(row) for row in rows]
    if ids != "columns":
        for row in scores:
            row.update({f"image_{i}_uid": blake2b(row[f"jpg_{i}"], digest_size=16).hexdigest() for i in (0, 1)})
    images = [dict(row) for row in rows[::-1]]
    for row in images[::3]:
        for name in ("jpg_{}", "image_{}_uid"):
            row[name.format(0)], row[name.format(1)] = row[name.format(1)], row[name.format(0)]
    images.insert(0, {**pair_rows(seed=1)[0], "image_0_uid": "x", "image_1_uid": "y"})
    absent = () if ids == "columns" else ("image_0_uid", "image_1_uid")
    kinds = {"jpg_0": ImageFeature()}  # the other column holds bytes
    for i, row in enumerate(images):
        file, content = tmp_path / f"{i}.png", row["jpg_0"]
        file.write_bytes(content)
        columns = ids == "columns"
        row["jpg_0"] = {"bytes": content, "path": None} if columns else {"bytes": None, "path": str(file)}
    holder = write_pairs(tmp_path / "images", images, drop=("quality", "label_0", "caption", *absent), **kinds)
    table = write_pairs(tmp_path / "scores", scores, drop=("jpg_0", "jpg_1"))
    if ids != "columns":  # in a CSV file
        (file,) = table.rglob("*.parquet")
        write_csv(pq.read_table(file), file.with_suffix(".csv"))
        file.unlink()

    more = ["--max_train_steps", 4, "--train_batch_size", 5, "--cache_dir", tmp_path / "cache"]
    call("train_dpo_qsd", *flags, *more, "--output_dir", tmp_path / "inline")
    joined = ["--dataset_name", holder, "--scores_dataset_name", table, "--output_dir", tmp_path / "joined"]
    call("train_dpo_qsd", *flags, *more, *joined)
    assert same_lora(tmp_path / "inline", tmp_path / "joined")


def test_output_of_score_pairs_is_trained_on_as_it_is(flags, tmp_path):
    """The way of the README: score, then train, from the dataset with images and from the scores alone."""
    rewards, qsd = tmp_path / "rewards.py", tmp_path / "qsd"
    rewards.write_text("import numpy as np\nbright = lambda images, prompts: [np.mean(image) for image in images]\n")
    source = write_pairs(tmp_path / "pairs", pair_rows(12), drop=("quality",))
    score = ["--dataset_name", source, "--reward", f"{rewards}:bright", "--include_images", "--num_examples", 0]
    call("score_pairs", *score, "--output_dir", qsd)
    model = [*flags, "--max_train_steps", 3, "--train_batch_size", 2]
    call("train_dpo_qsd", *model, "--dataset_name", qsd, "--output_dir", tmp_path / "with-images")
    scores = ["--scores_dataset_name", qsd, "--scores_dataset_config_name", "scores", "--dataset_name", source]
    call("train_dpo_qsd", *model, *scores, "--output_dir", tmp_path / "joined")
    assert same_lora(tmp_path / "with-images", tmp_path / "joined")


def test_defaults_belong_to_the_family(tiny_sd, tiny_sdxl):
    for model, beta, lr in [(tiny_sd, 2000.0, 1e-4), (tiny_sdxl, 5000.0, 1e-5)]:
        args = script.ScriptArguments(dataset_name="x", pretrained_model_name_or_path=str(model))
        script.check_model(args)
        script.set_defaults(args)
        assert (args.beta_dpo, args.learning_rate, args.resolution) == (beta, lr, 32)
        args = script.ScriptArguments(dataset_name="x", pretrained_model_name_or_path=str(model), beta_dpo=7.0)
        script.set_defaults(args)
        assert args.beta_dpo == 7.0


def test_ids_that_do_not_join_are_counted_and_shown(flags, tmp_path):
    rows = pair_rows()
    scores = [dict(row) for row in rows]
    scores[3]["image_0_uid"], scores[9]["image_1_uid"] = "lost-1", "lost-2"
    table = write_pairs(tmp_path / "scores", scores, drop=("jpg_0", "jpg_1"))
    message = refused("train_dpo_qsd", *flags, "--scores_dataset_name", table, "--output_dir", tmp_path / "out")
    assert "2 of the 22 pairs" in message and "lost-1" in message
    table = write_pairs(tmp_path / "more", scores, drop=("jpg_0", "jpg_1", "image_0_uid"))
    message = refused("train_dpo_qsd", *flags, "--scores_dataset_name", table, "--output_dir", tmp_path / "out")
    assert f"{table}: column 'image_0_uid' is absent" in message


def test_labels_of_strings_and_whole_numbers(flags, tmp_path):
    rows = [{**row, "label_0": str(row["label_0"])} for row in pair_rows()]
    data = write_pairs(tmp_path / "strings", rows, label_0=Value("string"))
    message = refused("train_dpo_qsd", *flags, "--dataset_name", data, "--output_dir", tmp_path / "out")
    assert "'label_0' is string" in message
    rows = [{**row, "label_0": int(row["label_0"])} for row in pair_rows()]
    found = selection(write_pairs(tmp_path / "whole", rows, label_0=Value("int64")), top_fraction=1.0)
    assert len(found[1]) == 23  # the tie of row 5 was rounded to a loss
