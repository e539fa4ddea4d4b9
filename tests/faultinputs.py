# SPDX-License-Identifier: Apache-2.0
"""Faults of tests/faults.py that come from the user: malformed inputs, and folders whose inputs were exchanged.

Each malformed input must end in one line on stderr that names the flag, the file or the row, before anything is
written; or, where there is a right reading of it, give the right result.
"""

import json
import shutil
import signal
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import conftest
import faultlab
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from faultcase import Case, fault, for_jobs, register
from faultlab import PROMPTS, TRAINERS, Golden, Moment, digest, write_generators
from PIL import Image as PILImage
from safetensors.numpy import load_file, save_file


def contents(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != ".lock"] if folder.exists() else []
    return {str(file.relative_to(folder)): digest(file.read_bytes()) for file in files}


def malformed(name: str, job: str, *words: str, or_right: Callable | None = None, before_work: bool = True) -> Callable:
    """Registers an input that must be refused with these words. The function prepares it and returns flags to set.

    Args:
        or_right: judges the run instead, if it exits with 0.
        before_work: nothing in the output folder may have changed.
    """

    def decorate(prepare: Callable[[Case], dict]) -> Callable:
        def inject(case: Case) -> None:
            flags = prepare(case)
            case.faults += 1
            out = Path(flags.get("output_dir", case.folder / "out"))
            before = contents(out)
            outcome = case.run(case.command(job, **flags))
            if outcome.code == 0 and or_right:
                or_right(case, outcome)
                return
            case.one_line(outcome, *words)
            if outcome.code and before_work and contents(out) != before:
                changed = sorted(contents(out).items() ^ before.items())[0][0]
                case.problem("LOST", f"refused only after work: {changed} is new or changed", outcome)

        register(f"input/{job}/{name.replace(' ', '-')}", inject, 1)
        return prepare

    return decorate


def value(name: str, jobs: tuple[str, ...], flag: str, text, *words: str) -> None:
    """A flag with a value that makes no sense."""
    for job in jobs:
        malformed(name, job, *(words or (f"--{flag}",)))(lambda case: {flag: text})


value("seed -1", ("build", *TRAINERS, "evaluate"), "seed", -1)
value("seed 1e30", TRAINERS, "seed", 10**30)
value("resolution 100000", ("sdxl", "sd3", "qsd", "evaluate"), "resolution", 100000)
value("resolution 33", ("sdxl", "sd3", "qsd", "evaluate"), "resolution", 33)
value("report_to foo", TRAINERS, "report_to", "foo")
value("adam_epsilon -1", TRAINERS, "adam_epsilon", -1)
value("adam_weight_decay nan", TRAINERS, "adam_weight_decay", "nan")
value("learning_rate nan", TRAINERS, "learning_rate", "nan")
value("learning_rate inf", ("sdxl",), "learning_rate", "inf")
value("max_grad_norm nan", ("sdxl",), "max_grad_norm", "nan")
value("beta_dpo inf", ("sdxl",), "beta_dpo", "inf")
value("validation_guidance_scale nan", ("sdxl",), "validation_guidance_scale", "nan")
value("guidance_scale nan", ("evaluate",), "guidance_scale", "nan")
value("top_fraction nan", ("pairs", "qsd"), "top_fraction", "nan")
value("num_train_epochs nan", ("sdxl",), "num_train_epochs", "nan")
value("gpu_hourly_cost nan", ("build",), "gpu_hourly_cost", "nan")
value("no such checkpoint", ("sdxl",), "resume_from_checkpoint", "checkpoint-77", "checkpoint-77")


# Prompts


def write_prompts(case: Case, name: str, content: str | bytes) -> dict:
    file = case.folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"prompts": file}


for job in ("build", "evaluate"):
    good = '{"prompt": "a red circle"}\n'

    def prompts_of(name: str, content: str | bytes) -> Callable:
        return lambda case: write_prompts(case, name, content)

    malformed("broken jsonl", job, "rows.jsonl", "2")(prompts_of("rows.jsonl", good + '{"prompt": "a'))
    malformed("jsonl of lists", job, "rows.jsonl")(prompts_of("rows.jsonl", "[1, 2]\n"))
    malformed("broken json", job, "rows.json")(prompts_of("rows.json", '[{"prompt": "a cat"'))
    malformed("empty prompt", job, "gap.txt", "row 2|line 2")(prompts_of("gap.txt", "a cross\n\na square\n"))
    malformed("blank prompt", job, "rows.jsonl", "row 2|line 2")(prompts_of("rows.jsonl", good + '{"prompt": " "}'))
    malformed("prompt a number", job, "rows.jsonl", "row 2|line 2")(prompts_of("rows.jsonl", good + '{"prompt": 5}'))
    malformed("prompt a list", job, "rows.jsonl", "row")(prompts_of("rows.jsonl", '{"prompt": ["a cross"]}\n'))
    malformed("no prompts", job, "none.txt")(prompts_of("none.txt", ""))
    malformed("latin-1 prompts", job, "latin.txt")(prompts_of("latin.txt", "a caf\xe9\n".encode("latin-1")))
    malformed("broken parquet", job, "rows.parquet")(prompts_of("rows.parquet", b"PAR1 no, this is not one PAR1"))


# Generators


def generators_with(change: Callable) -> Callable:
    return lambda case: {"generators": write_generators(case.folder / "g.yaml", case.lab.world, change)}


def call_with(**settings) -> Callable:
    return generators_with(lambda entries: entries[0]["call"].update(settings))


malformed("generator ..", "build", "'..'|..")(generators_with(lambda entries: entries[0].update(name="..")))
malformed("generator .", "build", "'.'")(generators_with(lambda entries: entries[0].update(name=".")))
malformed("generator of 250 letters", "build", "name", or_right=lambda case, outcome: None)(
    generators_with(lambda e: e[0].update(name="x" * 250))
)
malformed("misspelt setting", "build", "num_inference_step", "num_inference_steps")(call_with(num_inference_step=2))
malformed("output_type latent", "build", "output_type")(call_with(output_type="latent"))
malformed("return_dict", "build", "return_dict")(call_with(return_dict=False))
malformed("num_images_per_prompt", "build", "num_images_per_prompt")(call_with(num_images_per_prompt=2))
malformed("width 33", "build", "33")(call_with(width=33))
malformed("height as text", "build", "height")(call_with(height="tall"))
malformed("steps 0", "build", "num_inference_steps")(call_with(num_inference_steps=0))
malformed("prompt as a setting", "build", "prompt")(call_with(prompt="a cat"))


@malformed("not text-to-image", "build", "one", "Inpaint|text-to-image")
def inpainting(case: Case) -> dict:
    model = case.folder / "inpainting"
    shutil.copytree(case.lab.world / "models" / "sdxl", model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLInpaintPipeline"}))
    return generators_with(lambda entries: entries[0].update(model=str(model)))(case)


@malformed("weights cut off", "build", "cut", before_work=False)
def weights_cut_off(case: Case) -> dict:
    return generators_with(lambda entries: entries[0].update(model=str(cut_model(case))))(case)


def cut_model(case: Case) -> Path:
    model = case.folder / "cut"
    shutil.copytree(case.lab.world / "models" / "sdxl", model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return model


# Rewards


BAD_REWARDS = {
    "exits at import": "import sys\nsys.exit()\n",
    "exits at import with 0": "raise SystemExit(0)\n",
    "exits when called": "def bad(images, prompts):\n    raise SystemExit\n",
    "returns a dict": "def bad(images, prompts):\n    return {i: 1.0 for i in range(len(images))}\n",
    "returns NaN": "def bad(images, prompts):\n    return [float('nan')] * len(images)\n",
    "returns too few": "def bad(images, prompts):\n    return [1.0] * (len(images) - 1)\n",
    "returns text": "def bad(images, prompts):\n    return ['good'] * len(images)\n",
    "returns None": "def bad(images, prompts):\n    pass\n",
    "takes nothing": "def bad():\n    return []\n",
    "does not parse": "def bad(images, prompts:\n",
}
for name, text in BAD_REWARDS.items():
    for job, flag in (("build", "rewards"), ("pairs", "reward"), ("evaluate", "metrics")):
        if (job, name) == ("evaluate", "returns NaN"):
            continue  # there it means: does not apply

        def reward_file(case: Case, text: str = text, flag: str = flag) -> dict:
            (case.folder / "mine.py").write_text(text)
            return {flag: f"{case.folder}/mine.py:bad"}

        # score_pairs.py and evaluate.py have pictures only later.
        malformed(f"reward {name}", job, "mine.py", before_work=job == "build")(reward_file)


BREAKS = """
from pathlib import Path

calls = []


def whole(function):
    def reward(images, prompts):
        calls.append(len(images))
        if len(calls) > 4 and Path(__file__).with_name("broken").exists():
            raise RuntimeError("the GPU fell off the bus")
        return function(images, prompts)

    return reward


red, contrast, left = whole(red), whole(contrast), whole(left)
"""


@for_jobs("reward-breaks-midway", build=1, pairs=1, evaluate=1)
def reward_breaks_midway(case: Case, job: str) -> None:
    """A reward raises an error after some batches: one line that names it; mended, the run goes on."""
    (case.folder / "rewards.py").write_text(faultlab.REWARDS + BREAKS)
    (case.folder / "broken").touch()
    names = {"build": ("red", "contrast", "left"), "pairs": ("red",), "evaluate": ("red", "contrast")}[job]
    flag = {"build": "rewards", "pairs": "reward", "evaluate": "metrics"}[job]
    words = case.command(job, **{flag: faultlab.rewards(case.folder, *names), "reward_batch_size": 1})
    outcome = case.run(words)
    case.faults += 1
    case.one_line(outcome, "rewards.py", "fell off the bus")
    (case.folder / "broken").unlink()
    case.mend(job, words)


# Rows of ranked datasets


RANKED = {
    "prompt_id": Value("string"),
    "prompt": Value("string"),
    "images": List(Image()),
    "generators": List(Value("string")),
    "seeds": List(Value("int64")),
    "scores": {name: List(Value("float32")) for name in ("first", "second")},
    "preference_probability": List(Value("float32")),
    "rank": List(Value("int32")),
}


def write_rows(case: Case, rows: list[dict], **kinds) -> dict:
    folder = case.folder / "rows"
    (folder / "data").mkdir(parents=True)
    table = Dataset.from_list(rows, features=Features({**RANKED, **kinds}))
    table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return {"dataset_name": folder}


def ranked(case: Case, change: Callable = lambda row: None, every: Callable = lambda row: None, **kinds) -> dict:
    rows = conftest.ranked_rows(n=4, k=3)
    change(rows[2])
    for row in rows:
        every(row)
    return write_rows(case, rows, **kinds)


COLUMNS = {
    "phi a number": ("preference_probability", lambda old: 0.5, Value("float32")),
    "phi text": ("preference_probability", lambda old: "high", Value("string")),
    "phi texts": ("preference_probability", lambda old: ["a", "b", "c"], List(Value("string"))),
    "rank a number": ("rank", lambda old: 1, Value("int64")),
    "rank text": ("rank", lambda old: "first", Value("string")),
    "prompt a list": ("prompt", lambda old: [old], List(Value("string"))),
    "prompt a number": ("prompt", lambda old: 5, Value("int64")),
}
for name, (column, new, kind) in COLUMNS.items():
    for job in ("sdxl", "sd3"):

        def wrong_column(case: Case, column: str = column, new: Callable = new, kind=kind) -> dict:
            return ranked(case, every=lambda row: row.update({column: new(row[column])}), **{column: kind})

        malformed(name, job, f"{column}|row 0")(wrong_column)

ROWS = {
    "phi all equal": lambda row: row.update(preference_probability=[0.5] * 3, rank=[1, 2, 3]),
}
for job in ("sdxl", "sd3"):
    malformed("phi all equal", job, "equal|order|weight")(lambda case: ranked(case, every=ROWS["phi all equal"]))
    malformed("phi NaN", job, "row 2")(
        lambda case: ranked(case, lambda row: row.update(preference_probability=[0.5, float("nan"), 0]))
    )
    malformed("rank twice", job, "row 2", "rank")(lambda case: ranked(case, lambda row: row.update(rank=[1, 1, 2])))
    malformed("empty prompt", job, "row 2", "prompt")(lambda case: ranked(case, lambda row: row.update(prompt=" ")))
    malformed("image cut off", job, "row 2", "image 1", before_work=False)(  # found when it is encoded
        lambda case: ranked(case, lambda row: row["images"][1].update(bytes=row["images"][1]["bytes"][:200]))
    )
    malformed("image missing", job, "row 2", before_work=False)(
        lambda case: ranked(case, lambda row: row["images"].__setitem__(1, None))
    )


@malformed("csv dataset", "sdxl", ".csv")
@malformed("csv dataset", "pairs", ".csv")
@malformed("csv dataset", "qsd", ".csv")
def csv_dataset(case: Case) -> dict:
    (case.folder / "rows.csv").write_text("prompt,caption,label_0\na cat,a cat,1\n")
    return {"dataset_name": case.folder / "rows.csv"}


@malformed("broken jsonl dataset", "pairs", "rows.jsonl")
def jsonl_dataset(case: Case) -> dict:
    (case.folder / "rows.jsonl").write_text('{"caption": "a cat", "label_0": 1}\n{"caption": \n')
    return {"dataset_name": case.folder / "rows.jsonl"}


@malformed("empty folder", "sdxl", "nothing")
@malformed("empty folder", "pairs", "nothing")
def empty_folder(case: Case) -> dict:
    (case.folder / "nothing").mkdir()
    return {"dataset_name": case.folder / "nothing"}


# Pictures of unusual kinds


def encoded(image: PILImage.Image, kind: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def gray(picture: dict) -> np.ndarray:
    return np.asarray(PILImage.open(BytesIO(picture["bytes"])).convert("L"))


def sixteen_bit(pixels: np.ndarray) -> bytes:
    return encoded(PILImage.fromarray(pixels.astype(np.uint16) * 257), "PNG")


def float_tiff(pixels: np.ndarray) -> bytes:
    return encoded(PILImage.fromarray(pixels.astype(np.float32) / 255), "TIFF")


def recoded(case: Case, encode: Callable, name: str) -> dict:
    def change(row: dict) -> None:
        row["images"] = [{"bytes": encode(gray(picture)), "path": None} for picture in row["images"]]

    found = ranked(case, every=change)
    return {"dataset_name": found["dataset_name"].rename(case.folder / name)}


def same_as_eight_bits(case: Case, outcome) -> None:
    """The run on 16-bit or float pictures gave a LoRA: it must be that of the same pictures in 8 bits."""
    plain = recoded(case, lambda pixels: encoded(PILImage.fromarray(pixels), "PNG"), "plain")
    folder = case.folder / "plain-run"
    folder.mkdir()
    case.run(case.command("sdxl", folder, **plain))
    name = "out/pytorch_lora_weights.safetensors"
    if faultlab.attempt(faultlab.tensors_of, case.folder / name) != faultlab.tensors_of(folder / name):
        case.problem("SILENT", "trained on pictures that were read as something else", outcome)


malformed("16-bit pictures", "sdxl", "row 0", "16", or_right=same_as_eight_bits)(
    lambda case: recoded(case, sixteen_bit, "deep")
)
malformed("float pictures", "sdxl", "row 0", or_right=same_as_eight_bits, before_work=False)(
    lambda case: recoded(case, float_tiff, "float")
)


# Pairs


def pairs(case: Case, every: Callable, **kinds) -> dict:
    rows = conftest.pair_rows(n=8)
    for row in rows:
        every(row)
    return {"dataset_name": conftest.write_pairs(case.folder / "pairs", rows, **kinds)}


for job in ("pairs", "qsd"):
    malformed("has_label text", job, "has_label")(
        lambda case: pairs(
            case, lambda row: row.update(has_label=str(row["has_label"]).lower()), has_label=Value("string")
        )
    )
    malformed("label text", job, "label_0")(
        lambda case: pairs(case, lambda row: row.update(label_0="left"), label_0=Value("string"))
    )
    # score_pairs.py reads the rows as its first work.
    malformed("label 7", job, "label_0", "row", before_work=job != "pairs")(
        lambda case: pairs(case, lambda row: row.update(label_0=7.0))
    )
    malformed("caption a list", job, "caption")(
        lambda case: pairs(case, lambda row: row.update(caption=[row["caption"]]), caption=List(Value("string")))
    )
    # score_pairs.py reads the rows in its first stage.
    malformed("empty caption", job, "row", before_work=job != "pairs")(
        lambda case: pairs(case, lambda row: row.update(caption=""))
    )
malformed("quality NaN", "qsd", "quality")(lambda case: pairs(case, lambda row: row.update(quality=float("nan"))))
malformed("quality text", "qsd", "quality")(
    lambda case: pairs(case, lambda row: row.update(quality="good"), quality=Value("string"))
)


# LoRAs and models


def lora_with(case: Case, change: Callable) -> dict:
    folder = case.folder / "lora"
    shutil.copytree(case.lab.world / "golden" / "sdxl" / "out", folder, ignore=shutil.ignore_patterns("run.json"))
    file = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    name = sorted(name for name in tensors if "lora_B" in name or "lora.up" in name)[0]
    save_file(change(dict(tensors), name), file)
    return {"loras": f"bad={folder}"}


malformed("LoRA with NaN", "evaluate", "lora", "bad|nan|finite")(
    lambda case: lora_with(case, lambda found, name: {**found, name: np.full_like(found[name], np.nan)})
)
malformed("LoRA with infinity", "evaluate", "lora", "bad|inf|finite")(
    lambda case: lora_with(case, lambda found, name: {**found, name: np.full_like(found[name], np.inf)})
)
malformed("LoRA of another shape", "evaluate", "bad", "shape|fit|size")(
    lambda case: lora_with(case, lambda found, name: {**found, name: np.zeros((77, found[name].shape[1]), "float32")})
)
malformed("LoRA with foreign keys", "evaluate", "bad")(
    lambda case: lora_with(case, lambda found, name: {f"x.{key}": tensor for key, tensor in found.items()})
)
malformed("LoRA without half its keys", "evaluate", "bad")(
    lambda case: lora_with(case, lambda found, name: {key: t for key, t in found.items() if key != name})
)


@malformed("missing --loras path", "evaluate", "--loras", "no/such/folder|/nowhere", "no such|no folder|not exist")
def missing_lora(case: Case) -> dict:
    return {"loras": f"a={case.folder}/nowhere"}


@malformed("LoRA's name of 250 letters", "evaluate", "--loras", "name")
def long_lora(case: Case) -> dict:
    return {"loras": f"{'x' * 250}={case.lab.world / 'golden' / 'sdxl' / 'out'}"}


@malformed("output_dir is a dataset", "evaluate", "output_dir")
@malformed("output_dir is a dataset", "sdxl", "output_dir")
@malformed("output_dir is a dataset", "pairs", "output_dir")
def output_is_dataset(case: Case) -> dict:
    shutil.copytree(case.lab.world / "golden" / "build" / "out", case.folder / "dataset")
    return {"output_dir": case.folder / "dataset"}


@malformed("output_dir is a training run", "evaluate", "output_dir")
@malformed("output_dir is a training run", "build", "output_dir")
def output_is_run(case: Case) -> dict:
    shutil.copytree(case.lab.world / "golden" / "sdxl" / "out", case.folder / "run")
    return {"output_dir": case.folder / "run"}


@malformed("weights cut off", "evaluate", "model", before_work=False)
def base_cut_off(case: Case) -> dict:
    return {"pretrained_model_name_or_path": cut_model(case)}


@malformed("model of NaN", "sdxl", "finite|nan", before_work=False)
@malformed("model of NaN", "qsd", "finite|nan", before_work=False)
def model_of_nan(case: Case) -> dict:
    """No step has a finite loss: the run must not end with a LoRA."""
    model = case.folder / "model"
    shutil.copytree(case.lab.world / "models" / ("sdxl" if "sdxl" in case.name else "sd"), model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()}, file, {"format": "pt"})
    return {"pretrained_model_name_or_path": model}


@malformed("publish nothing", "build", "publish|missing|stage")
def publish_nothing(case: Case) -> dict:
    return {"stages": "publish"}


# Cards and names that Markdown, globs and file systems read in their own way


def broken_card(case: Case, job: str, content: bytes) -> None:
    """A person's card that cannot be read: refused at the start, or the run ends with a card that can be read."""
    case.take(job, "middle")
    (case.folder / "out" / "README.md").write_bytes(content)
    case.faults += 1
    outcome = case.run(case.command(job))
    if outcome.code:
        case.one_line(outcome, "README.md|--output_dir")
        (case.folder / "out" / "README.md").unlink()
        outcome = case.run(case.command(job))
    case.check(job, outcome)


@for_jobs("card-front-matter", build=1, sdxl=1, pairs=1, sd3=1, qsd=1)
def front_matter(case: Case, job: str) -> None:
    broken_card(case, job, b"---\nlicense: [mit\ntags: {\n---\n# Mine\n")


@for_jobs("card-latin-1", build=1, sdxl=1, pairs=1, sd3=1, qsd=1)
def latin_card(case: Case, job: str) -> None:
    broken_card(case, job, "---\nlicense: mit\n---\n# Caf\xe9\n".encode("latin-1"))


NAMES = ("run[1]", "a|b*[c]?", "with space", "ünï", "-dash", "{curly}", "y" * 250)


@for_jobs("folder-name", build=7, sdxl=6, pairs=7, evaluate=7, sd3=2, qsd=3)
def folder_name(case: Case, job: str) -> None:
    """An output folder with a name that globs, Markdown or YAML read in their own way."""
    name = NAMES[case.seed % (len(NAMES) - (job in TRAINERS))]  # a trainer has no rule for names that are too long
    out = case.folder / name
    case.faults += 1
    outcome = case.run(case.command(job, output_dir=out))
    if outcome.code:
        case.one_line(outcome, "--output_dir|output_dir|" + name)
        if contents(out):
            case.problem("LOST", "refused only after work", outcome)
        return
    out.rename(case.folder / "out")
    for file in (case.folder / "out").glob("comfyui/*.safetensors"):
        file.rename(file.with_name("out.safetensors"))
    case.check(job, outcome)


STRANGE = (
    "a red | circle",
    "a red\rcircle",
    "a <!-- End of what build_synpic.py wrote. --> cross",
    "---",
    "a `b` $c$ *d*",
)


@for_jobs("strange-prompts", build=1, evaluate=1)
def strange_prompts(case: Case, job: str) -> None:
    """Prompts with Markdown's and the card's own marks: a second run finds all done, and one card, not two."""
    case.faults += 1
    flags = write_prompts(case, "strange.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in STRANGE))
    words = case.command(job, **flags)
    first = case.run(words)
    again = case.run(words)
    for outcome in (first, again):
        if outcome.code:
            case.problem("LOST", "refused prompts that are text", outcome)
    if job == "build":
        rows = [row for f in sorted(case.folder.glob("out/data/*.parquet")) for row in pq.read_table(f).to_pylist()]
        if [row["prompt"] for row in rows] != list(STRANGE):
            case.problem("SILENT", f"the prompts are {[row['prompt'] for row in rows]}")
        text = (case.folder / "out" / "README.md").read_text()
        marks = [text.count(mark) for mark in ("build_synpic.py writes from here", "End of what build_synpic.py wrote")]
        if marks != [1, 1]:
            case.problem("LOST", f"the card's two marks stand {marks} times")


@fault("strange-categories")
def strange_categories(case: Case) -> None:
    """A category with | and a line break must not break the table."""
    case.faults += 1
    rows = [{"prompt": text, "kind": kind} for text, kind in zip(PROMPTS, ("a|b", "c\nd", "a|b", "c\nd"))]
    flags = write_prompts(case, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    outcome = case.run(case.command("evaluate", **flags, category_column="kind"))
    if outcome.code:
        case.one_line(outcome, "kind")
        return
    lines = (case.folder / "out" / "results.md").read_text().splitlines()
    widths, table = {}, 0  # pipes of each table's lines
    for line in lines:
        if line.startswith("|"):
            widths.setdefault(table, set()).add(line.replace("\\|", "").count("|"))
        else:
            table += 1
    if any(len(found) > 1 for found in widths.values()) or any(line.startswith("d") for line in lines):
        case.problem("SILENT", "the tables of results.md are broken", outcome)


# Exchanged inputs


@for_jobs("extended", sdxl=8, sd3=3, qsd=3)
def extended(case: Case, job: str) -> None:
    """A finished run goes on to 6 steps and is killed on the way, also after its last checkpoint."""
    words = case.command(job, max_train_steps=6)
    undisturbed = f"{job}/extended"
    if undisturbed not in case.golden:
        folder = case.folder / "undisturbed"
        folder.mkdir()
        faultlab.copy_state(case.lab.world / "golden" / job, folder)
        run = case.start(case.command(job, folder, max_train_steps=6))
        outcome = case.end(run)
        case.golden[undisturbed] = Golden(faultlab.results(job, folder), outcome.seconds, 40)
        case.check(job, outcome, folder, undisturbed)
    case.take(job)
    moment = Moment(case.rng.randint(1, 20), signal.SIGKILL)
    if case.seed % 2:
        moment = Moment(case.rng.randint(1, 8), signal.SIGKILL, name="/out/", after="checkpoint-6")
    case.tell(f"killed at {moment}")
    outcome = case.run(words, moment=moment)
    if not outcome.injected:
        return
    case.faults += 1
    case.mend(job, words, undisturbed)


@for_jobs("replaced-model", sdxl=2, sd3=1, qsd=1)
def replaced_model(case: Case, job: str) -> None:
    """Other weights in the base model's folder: the run does not go on with them."""
    words = case.command(job)
    model = case.folder / "model"
    shutil.copytree(words[words.index("--pretrained_model_name_or_path") + 1], model)
    words = case.command(job, pretrained_model_name_or_path=model)
    case.run(words, moment=Moment(int(case.golden[job].changes * 0.7), signal.SIGKILL))
    part = "transformer" if job == "sd3" else "unet"
    file = model / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + np.float32(0.01) for name, tensor in tensors.items()}, file, {"format": "pt"})
    case.faults += 1
    case.one_line(case.run(words), "model")


@fault("replaced-model/build", 1)
def replaced_generator(case: Case) -> None:
    model = case.folder / "model"
    shutil.copytree(case.lab.world / "models" / "sdxl", model)
    flags = generators_with(lambda entries: entries[0].update(model=str(model)))(case)
    case.run(case.command("build", **flags), moment=Moment(30, signal.SIGKILL))
    shutil.rmtree(model)
    shutil.copytree(case.lab.world / "models" / "other", model)
    case.faults += 1
    case.one_line(case.run(case.command("build", **flags)), "one")


@fault("replaced-lora/evaluate", 1)
def replaced_lora(case: Case) -> None:
    """Another LoRA under the same path: drawn again or refused, never the old pictures as the new one's."""
    lora = case.folder / "lora" / "out"
    shutil.copytree(case.lab.world / "golden" / "sdxl" / "out", lora)
    words = case.command("evaluate", loras=f"mine={lora}")
    case.run(words)
    file = lora / "pytorch_lora_weights.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    case.faults += 1
    outcome = case.run(words)
    if outcome.code:
        case.one_line(outcome, "mine|lora")


@for_jobs("replaced-images", sdxl=2, sd3=1)
def replaced_images(case: Case, job: str) -> None:
    """Other pictures under the same labels."""
    data = case.folder / "data"
    shutil.copytree(case.lab.world / "golden" / "build" / "out", data, ignore=shutil.ignore_patterns("work"))
    words = case.command(job, dataset_name=data)
    case.run(words, moment=Moment(int(case.golden[job].changes * 0.7), signal.SIGKILL))
    file = sorted(data.glob("data/*.parquet"))[0]
    table = pq.read_table(file, use_threads=False)
    rows = table.to_pylist()
    for row in rows:
        row["images"] = row["images"][::-1]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    case.faults += 1
    case.one_line(case.run(words), "data|images")
