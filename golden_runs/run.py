"""Golden runs: `python run.py CODE OUT [names or globs ...] [--jobs 2]` runs configurations with the scripts of the
checkout CODE, into OUT/<name>/: golden.json (what compare.py reads), out/ (output_dir), run-*.log. A configuration with
a golden.json of a run that did not fail is left out, unless --again.

CONFIGS is the one place of all flags. Edit the last lines of `words` if a script's flags were renamed.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


HERE = Path(__file__).resolve().parent
WORLD = HERE / "world"
PYTHON = sys.executable
TIMEOUT = 3600  # seconds; the machine may be busy
TIMES = ("step_time", "data_time", "images_per_second")  # fields of the log that differ from run to run

SDXL, SD3, QSD = "train_rankdpo_sdxl.py", "train_rankdpo_sd3.py", "train_dpo_qsd.py"
# 12 ranked prompts in batches of 3: the fifth step is in the second epoch.
SMALL = "--rank 4 --learning_rate 1e-2 --beta_dpo 100 --train_batch_size 3 --max_train_steps 5"
ALWAYS = "--resolution 32 --validation_num_inference_steps 1 --report_to none"
RANKED = "--dataset_name {world}/ranked"
XL = f"--pretrained_model_name_or_path {{world}}/models/sdxl {RANKED} {ALWAYS}"
THREE = f"--pretrained_model_name_or_path {{world}}/models/{{model}} {RANKED} {ALWAYS} --max_sequence_length 20"
SD_PAIRS = f"--pretrained_model_name_or_path {{world}}/models/{{model}} {ALWAYS} --dataset_name {{world}}/{{data}}"

PLAIN = {
    # name: (script, flags, model, dataset); {world} in the flags is the world's folder.
    # ---- train_rankdpo_sdxl.py
    "sdxl-defaults": (SDXL, "--max_train_steps 5", "sdxl", "ranked"),
    "sdxl-rankdpo-accumulation": (
        *(SDXL, f"{SMALL} --gradient_accumulation_steps 2 --lr_scheduler cosine --lr_warmup_steps 2 --seed 3"),
        *("sdxl", "ranked"),
    ),
    "sdxl-bf16-checkpointing": (SDXL, f"{SMALL} --mixed_precision bf16 --gradient_checkpointing", "sdxl", "ranked"),
    "sdxl-dpo_gain-generators": (
        *(SDXL, f"{SMALL} --loss_type dpo_gain --generators g0 g2 g3 --validation_steps 2", "sdxl", "ranked"),
    ),
    "sdxl-dpo-random-workers": (
        *(SDXL, f"{SMALL} --loss_type dpo --rank_by random --max_train_samples 7 --dataloader_num_workers 1"),
        *("sdxl", "ranked"),
    ),
    "sdxl-plackett_luce-uncached": (
        *(SDXL, f"{SMALL} --loss_type plackett_luce --sft_weight 0.5 --cache_text_embeddings false", "sdxl", "ranked"),
    ),
    "sdxl-sft-time_ids-vae": (
        SDXL,
        f"{SMALL} --loss_type sft --time_ids image --lr_scheduler linear "
        "--pretrained_vae_model_name_or_path {world}/models/vae",
        *("sdxl", "ranked"),
    ),
    "sdxl-weighted_sft-8bit": (SDXL, f"{SMALL} --loss_type weighted_sft --use_8bit_adam", "sdxl", "ranked"),
    "sdxl-safeguard-sft_weight-noise_image": (
        *(SDXL, f"{SMALL} --safeguard 0.6 --sft_weight 0.1 --noise image --time_ids image", "sdxl", "ranked"),
    ),
    "sdxl-predicted-precompute": (
        *(SDXL, f"{SMALL} --rank_source predicted --precompute_ref --rank_by left", "sdxl", "ranked"),
    ),
    "sdxl-empty_prompts": (SDXL, f"{SMALL} --proportion_empty_prompts 0.5", "sdxl", "ranked"),
    "sdxl-compile": (SDXL, f"{SMALL} --max_train_steps 3 --compile", "sdxl", "ranked"),
    "sdxl-two_processes": (SDXL, f"{SMALL} --train_batch_size 2", "sdxl", "ranked"),
    "sdxl-resumed": (SDXL, SMALL, "sdxl", "ranked"),
    # ---- train_rankdpo_sd3.py
    "sd3-defaults": (SD3, "--max_train_steps 5", "sd3", "ranked"),
    "sd3-rankdpo-logit_normal-accumulation": (
        SD3,
        f"{SMALL} --weighting_scheme logit_normal --logit_mean -0.3 --logit_std 0.8 --gradient_accumulation_steps 2 "
        "--lr_scheduler cosine --lr_warmup_steps 2",
        *("sd3", "ranked"),
    ),
    "sd3-bf16-checkpointing-mode": (
        *(SD3, f"{SMALL} --mixed_precision bf16 --gradient_checkpointing --weighting_scheme mode", "sd3", "ranked"),
    ),
    "sd3-no_t5_model-dpo-random": (SD3, f"{SMALL} --loss_type dpo --rank_by random", "sd3-no-t5", "ranked"),
    "sd3-no_t5_flag-cosmap-predicted-8bit": (
        SD3,
        f"{SMALL} --use_text_encoder_3 false --weighting_scheme cosmap --rank_source predicted --use_8bit_adam",
        *("sd3", "ranked"),
    ),
    "sd3-sft-uncached": (SD3, f"{SMALL} --loss_type sft --cache_text_embeddings false", "sd3", "ranked"),
    "sd3-weighted_sft-mode_scale": (
        *(SD3, f"{SMALL} --loss_type weighted_sft --rank_by red --weighting_scheme mode --mode_scale 0.8"),
        *("sd3", "ranked"),
    ),
    "sd3-plackett_luce-sd35": (SD3, f"{SMALL} --loss_type plackett_luce", "sd35", "ranked"),
    "sd3-safeguard-sft_weight-noise_image": (
        *(SD3, f"{SMALL} --safeguard 0.6 --sft_weight 0.1 --noise image --validation_steps 2", "sd3", "ranked"),
    ),
    "sd3-dpo_gain-generators-precompute": (
        *(SD3, f"{SMALL} --loss_type dpo_gain --generators g1 g2 --rank_by left --precompute_ref", "sd3", "ranked"),
    ),
    "sd3-empty_prompts-uncached": (
        *(SD3, f"{SMALL} --proportion_empty_prompts 0.5 --cache_text_embeddings false", "sd3", "ranked"),
    ),
    "sd3-two_processes": (SD3, f"{SMALL} --train_batch_size 2", "sd3", "ranked"),
    "sd3-resumed": (SD3, SMALL, "sd3", "ranked"),
    # ---- train_dpo_qsd.py: 19 labelled pairs
    "qsd-sd-defaults": (QSD, "--top_fraction 1 --max_train_steps 5", "sd", "pairs"),
    "qsd-sdxl-defaults": (QSD, "--top_fraction 1 --max_train_steps 5", "sdxl", "qsd"),
    "qsd-sd-sigmoid-accumulation": (
        QSD,
        f"{SMALL} --top_fraction 0.5 --gradient_accumulation_steps 2 --lr_scheduler cosine --lr_warmup_steps 2",
        *("sd", "pairs"),
    ),
    "qsd-sd-hinge-bf16-checkpointing": (
        *(QSD, f"{SMALL} --top_fraction 1 --loss_type hinge --mixed_precision bf16 --gradient_checkpointing"),
        *("sd", "qsd"),
    ),
    "qsd-sd-ipo-random-8bit": (
        QSD,
        f"{SMALL} --loss_type ipo --order random --top_fraction 0.4 --use_8bit_adam --validation_steps 2",
        *("sd", "pairs"),
    ),
    "qsd-sd-orpo-min_quality": (
        QSD,
        f"{SMALL} --top_fraction 1 --loss_type orpo --orpo_lambda 0.5 --min_quality 0.2 --cache_text_embeddings false",
        *("sd", "pairs"),
    ),
    "qsd-sd-safeguard-sft_weight-noise_image": (
        *(QSD, f"{SMALL} --top_fraction 1 --safeguard 0.9 --sft_weight 0.1 --noise image", "sd", "pairs"),
    ),
    "qsd-sd_v-random-no_quality": (
        QSD,
        f"{SMALL} --top_fraction 1 --order random --train_batch_size 5 --dataloader_num_workers 1",
        *("sd-v", "raw"),
    ),
    "qsd-sdxl-scores": (QSD, f"{SMALL} --top_fraction 1 --scores_dataset_name {{world}}/scores", "sdxl", "images"),
    "qsd-sd-scores-content_ids": (
        QSD,
        f"{SMALL} --top_fraction 1 --scores_dataset_name {{world}}/qsd --scores_dataset_config_name scores",
        *("sd", "raw"),
    ),
    "qsd-sdxl-time_ids-precompute": (
        QSD,
        f"{SMALL} --top_fraction 1 --time_ids image --precompute_ref --order random --train_batch_size 5 --seed 7",
        *("sdxl", "pairs"),
    ),
    "qsd-sd-empty_prompts": (QSD, f"{SMALL} --top_fraction 1 --proportion_empty_prompts 0.5", "sd", "pairs"),
    "qsd-sd-two_processes": (QSD, f"{SMALL} --top_fraction 1 --train_batch_size 2", "sd", "pairs"),
    "qsd-sd-resumed": (QSD, f"{SMALL} --top_fraction 1 --order random", "sd", "pairs"),
}
COMMON = {SDXL: XL, SD3: THREE, QSD: SD_PAIRS}
CONFIGS = {
    # name -> script, flags
    name: (script, [word.format(world=WORLD, model=model, data=data) for word in f"{COMMON[script]} {more}".split()])
    for name, (script, more, model, data) in PLAIN.items()
}
CHANGES_ON_PURPOSE = [name for name in CONFIGS if "empty_prompts" in name]  # the flag's meaning changes
TWO_PROCESSES = [name for name in CONFIGS if "two_processes" in name]
SLOW = ["sdxl-compile"]  # only when it is named: 1 to 3 minutes of compilation
# Runs of one after the other, in the same folders: the last of equal flags counts.
STAGES = {
    name: ["--max_train_steps 2 --lr_scheduler constant", "--lr_scheduler constant --resume_from_checkpoint latest"]
    for name in CONFIGS
    if name.endswith("resumed")
}


def words(name: str, folder: Path) -> list[list[str]]:
    """The commands of a configuration, without the Python."""
    script, flags = CONFIGS[name]
    launch = [script]
    if name in TWO_PROCESSES:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    own = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    return [[*launch, *flags, *own, *shlex.split(more)] for more in STAGES.get(name, [""])]


def environment(folder: Path) -> dict:
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "USER", "TMPDIR", "SSL_CERT_FILE")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


warm = threading.local()  # of each job's thread: its process with the libraries imported


def execute(code: Path, command: list[str], env: dict, log: Path, fork: bool) -> int:
    """Runs a command, or, with `fork`, its script in a fork of a process that has imported the libraries. Returns its
    exit code; negative: ended by this signal, 14 after TIMEOUT."""
    if not fork or command[0] == "-m" or "--compile" in command:
        with open(log, "a") as file:
            options = {"cwd": code, "env": env, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([PYTHON, *command], **options)
            try:
                return process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun then ends its processes
                try:
                    process.wait(120)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return -signal.SIGALRM
    if not hasattr(warm, "process"):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        warm.process = subprocess.Popen([PYTHON, HERE / "warm.py"], env=env, cwd=HERE, **options)
    request = {"code": str(code), "command": command, "environment": env, "log": str(log), "timeout": TIMEOUT}
    warm.process.stdin.write(json.dumps(request) + "\n")
    warm.process.stdin.flush()
    return int(warm.process.stdout.readline())


def run(code: Path, out: Path, name: str, fork: bool) -> dict:
    """Runs a configuration, and writes its golden.json."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    codes, started = [], time.time()
    for i, command in enumerate(words(name, folder)):
        log = folder / f"run-{i}.log"
        log.write_text(f"$ {shlex.join(command)}\n")
        codes.append(execute(code, command, environment(folder), log, fork))
        if codes[-1] != 0:
            break
    record = {"name": name, "script": CONFIGS[name][0], "flags": CONFIGS[name][1], "stages": STAGES.get(name, [])}
    record |= {"forked": fork, "exit_codes": codes, "seconds": round(time.time() - started, 1), "code": commit(code), **machine()}
    record |= results(folder / "out")
    for cache in ("cache", "hf", "inductor"):
        shutil.rmtree(folder / cache, ignore_errors=True)
    (folder / "golden.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def is_done(file: Path) -> bool:
    return file.exists() and not any(json.loads(file.read_text())["exit_codes"])


def results(folder: Path) -> dict:
    """What a run left in its output_dir: tensors of the LoRA and of other LoRA files, figures of the log, pictures."""
    from PIL import Image

    files = sorted(file for file in folder.rglob("*.safetensors") if "checkpoint-" not in str(file.relative_to(folder)))
    found = {"lora": {}, "comfyui": {}, "log": [], "images": {}}
    for file in files:
        found["lora" if file.name == "pytorch_lora_weights.safetensors" else "comfyui"] |= tensors(file)
    log = folder / "training_log.jsonl"
    for line in log.read_text().splitlines() if log.exists() else ():
        found["log"].append({key: value for key, value in json.loads(line).items() if key not in TIMES})
    for file in sorted(folder.glob("images/*.png")):
        with Image.open(file) as image:
            found["images"][file.name] = hashlib.sha256(image.tobytes()).hexdigest()[:16]
    return found


def tensors(file: Path) -> dict:
    """Name: shape, type and hash of the bytes of each tensor, read without torch."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data, found = json.loads(content[8 : 8 + size]), content[8 + size :], {}
    for name, entry in sorted(header.items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(data[begin:end]).hexdigest()
            found[name] = {"shape": entry["shape"], "dtype": entry["dtype"], "sha256": digest}
    return found


def commit(code: Path) -> str:
    git = ["git", "-C", str(code)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return found + (" with changes" if changed else "")


def machine() -> dict:
    """Bits are the same only on the same kind of processor and with the same libraries."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "numpy")
    return {"cpu": cpu, "versions": {name: version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("code", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=[], help="names or globs; default: all but SLOW")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fork", action="store_true", help="import the libraries once per job: a few seconds per run")
    parser.add_argument("--again", action="store_true", help="run also what has a golden.json")
    args = parser.parse_intermixed_args()
    if unknown := [name for name in args.names if not fnmatch.filter(CONFIGS, name)]:
        raise SystemExit(f"no such configuration: {unknown}; there are {', '.join(CONFIGS)}")
    code, out = args.code.resolve(), args.out.resolve()
    names = [name for name in CONFIGS if (name not in SLOW if not args.names else any(fnmatch.fnmatch(name, n) for n in args.names))]
    names = [name for name in names if args.again or not is_done(out / name / "golden.json")]
    os.nice(5)
    started, failed = time.time(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, record in zip(names, pool.map(lambda name: run(code, out, name, args.fork), names)):
            state = f"{len(record['log'])} steps, {len(record['lora'])} tensors"
            print(f"{name:42} exit {record['exit_codes']} {record['seconds']:6.1f} s  {state}", flush=True)
            if any(record["exit_codes"]):
                failed.append(name)
                last = sorted((out / name).glob("run-*.log"))[-1].read_text().splitlines()[-6:]
                print("".join(f"    {line}\n" for line in last), end="")
    print(f"{len(names)} configurations in {time.time() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
