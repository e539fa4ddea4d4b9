"""Of `run.py --fork`: imports the libraries once, then runs scripts in forks of this process, one after the other.

Reads a line of JSON per run from stdin: {"code", "command", "environment", "log", "timeout"}; writes its exit code to stdout."""

import json
import os
import signal
import sys
import threading


def child(request: dict) -> None:
    """Runs the script as `python script.py ...` would, and ends with Python's exit code."""
    import atexit
    import runpy
    from pathlib import Path

    import datasets.config

    signal.alarm(request["timeout"])
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
    os.environ.update(request["environment"])
    datasets.config.HF_DATASETS_CACHE = Path(request["environment"]["HF_HOME"], "datasets")  # read at import
    os.chdir(request["code"])
    sys.argv, sys.path[0] = request["command"], request["code"]
    code = 0
    try:
        runpy.run_path(request["command"][0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


def import_libraries() -> None:
    import importlib

    for name in "accelerate bitsandbytes datasets diffusers peft pyarrow.parquet torch torchvision trl".split():
        importlib.import_module(name)
    import diffusers
    import transformers
    from diffusers import optimization, training_utils  # noqa: F401

    for name in ("AutoencoderKL", "DDPMScheduler", "SD3Transformer2DModel", "UNet2DConditionModel"):
        getattr(diffusers, name)
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        getattr(diffusers, name)
    for name in ("AutoTokenizer", "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
        getattr(transformers, name)


def main() -> None:
    import_libraries()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
