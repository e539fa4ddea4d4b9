# SPDX-License-Identifier: Apache-2.0
"""What makes training fast and must not change its result: no waiting inside a step, in all three trainers."""

import importlib
import os
import shutil
import threading

import bitsandbytes
import pytest
import torch
from conftest import TRAINERS, call, learned, logged, lora_difference, run, same_lora, torchrun
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from peft.tuners.lora import LoraLayer
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values that Python or torch reads off a tensor."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in self.OPERATIONS or any(part is not None and part.dtype == torch.bool for part in indices):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", TRAINERS)
def test_a_forward_does_not_wait_for_the_gpu(trainer_flags, script, tmp_path, monkeypatch):
    """The loop waits once a step, for all figures."""
    module, waits = importlib.import_module(script), Waits()
    original = module.training_step

    def watched(*arguments):
        with waits:
            return original(*arguments)

    monkeypatch.setattr(module, "training_step", watched)
    more = ["--safeguard", 0.5, "--sft_weight", 0.1, "--max_train_steps", 2, "--output_dir", tmp_path / "lora"]
    call(script, *trainer_flags(script), *more)
    assert waits.found == []
    with waits:
        torch.ones(1).item()
    assert waits.found == ["_local_scalar_dense"]  # it sees what waits


def test_batches_are_read_ahead():
    """The next batch is read while the caller works with one; an error of the reader reaches the caller."""
    script, second = importlib.import_module("train_rankdpo_sdxl"), threading.Event()

    def batches():
        yield "first"
        second.set()
        yield "second"
        raise OSError("the disk")

    ahead = script.read_ahead(batches())
    assert next(ahead) == "first" and second.wait(10)
    assert next(ahead) == "second"
    with pytest.raises(OSError, match="the disk"):
        next(ahead)


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


def compiled_run(trainer_flags, script, folder, monkeypatch, *more) -> tuple[list[dict], list[int]]:
    """The log of a run, and how many graphs there were before each of its forwards."""
    module, graphs = importlib.import_module(script), []
    step = module.training_step

    def counted(*arguments):
        graphs.append(counters["stats"]["unique_graphs"])
        return step(*arguments)

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(module, "training_step", counted)
        call(script, *trainer_flags(script), *more, "--output_dir", folder)
    return logged(folder), graphs


@needs_compiler
@pytest.mark.parametrize("script", ["train_rankdpo_sdxl", "train_rankdpo_sd3"])
def test_compiled_training_is_the_same_training(trainer_flags, script, tmp_path, monkeypatch):
    """Scores of 0 at the start, no graph after step 2, the eager run's losses; for SDXL also the bits of a resume."""
    more = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--validation_steps", 1]
    more += ["--adam_epsilon", 1e-4]  # below it Adam turns rounding into whole steps
    eager, _ = compiled_run(trainer_flags, script, tmp_path / "eager", monkeypatch, *more)
    compiled, graphs = compiled_run(trainer_flags, script, tmp_path / "straight", monkeypatch, *more, "--compile")
    assert compiled[0]["chosen_error"] == compiled[0]["rejected_error"] == 0.0 and compiled[-1]["chosen_error"] != 0.0
    assert graphs[1] > graphs[0] and len(set(graphs[2:])) == 1, graphs
    for a, b in zip(eager, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    if script == "train_rankdpo_sdxl":
        later = shutil.ignore_patterns("checkpoint-4", "*.png")
        shutil.copytree(tmp_path / "straight", tmp_path / "resumed", ignore=later)
        more += ["--compile", "--resume_from_checkpoint", "latest"]
        assert len(compiled_run(trainer_flags, script, tmp_path / "resumed", monkeypatch, *more)[1]) == 2
        assert same_lora(tmp_path / "straight", tmp_path / "resumed")


def test_precomputed_reference_errors_give_the_same_bits(trainer_flags, tmp_path, monkeypatch):
    """Straight, against a run whose errors are computed first, interrupted, and found again by runs with another beta,
    another length and another objective; every forward of the base happens once, in more than one epoch. Those of
    two processes serve one."""
    script = "train_rankdpo_sdxl"
    module, references = importlib.import_module(script), []
    predict, write_tensors = module.predict, module.write_tensors

    def spied(model, noise_scheduler, batch, args):
        if next(layer for layer in model.modules() if isinstance(layer, LoraLayer)).disable_adapters:
            references.append(len(batch["latents"]))
        return predict(model, noise_scheduler, batch, args)

    def interrupted(file, tensors):
        if "reference-" in str(file) and file.stem == "4":
            raise KeyboardInterrupt
        write_tensors(file, tensors)

    def train(name: str, *more) -> list[int]:
        """The batches of which the base made a forward."""
        references.clear()
        here = ["--train_batch_size", 4, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / name]
        call(script, *flags, *here, *more)
        return list(references)

    flags = [*trainer_flags(script), *"--noise image --proportion_empty_prompts 0.3 --max_train_steps 7".split()]
    monkeypatch.setattr(module, "predict", spied)
    assert train("straight") == [4] * 7 and not list((tmp_path / "cache").glob("reference-*"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_tensors", interrupted)
        train("first", "--precompute_ref")
    (folder,) = (tmp_path / "cache").glob("reference-*")
    assert len(list(folder.glob("*.safetensors"))) == 4 and references == [4] * 5
    assert train("first", "--precompute_ref", "--resume_from_checkpoint", "latest") == [4] * 3
    assert same_lora(tmp_path / "straight", tmp_path / "first")
    other = ["--precompute_ref", "--beta_dpo", 50, "--rank", 2]
    assert train("second", *other) == [] and train("third", *other, "--max_train_steps", 8) == [4]
    assert train("other", "--precompute_ref", "--seed", 1) == [4] * 7

    references.clear()
    pair = [*flags, "--train_batch_size", 2, "--precompute_ref", "--cache_dir", tmp_path / "cache-two", "--output_dir"]
    run(*torchrun(2, f"{script}.py"), *pair, tmp_path / "two")
    call(script, *pair, tmp_path / "one", "--gradient_accumulation_steps", 2)
    assert not references and lora_difference(tmp_path / "one", tmp_path / "two") < 1e-4


QUANTISED = [("train_rankdpo_sdxl", "int8"), ("train_rankdpo_sd3", "nf4"), ("train_rankdpo_zimage", "nf4")]


@pytest.mark.parametrize("script, precision", QUANTISED)
def test_quantised_base(trainer_flags, script, precision, tmp_path, monkeypatch):
    """bitsandbytes quantises on a CPU, too, where diffusers refuses to: the base has other layers, the scores are
    exactly 0 at the start, the LoRA is float32 and learns, and a resumed run ends with the same bits."""
    module, kinds = importlib.import_module(script), set()
    step = module.training_step

    def spied(model, *arguments):
        kinds.update(type(layer.base_layer).__name__ for layer in model.modules() if isinstance(layer, LoraLayer))
        return step(model, *arguments)

    command = [*trainer_flags(script), "--base_precision", precision, "--checkpointing_steps", 2, "--max_train_steps"]
    monkeypatch.setattr(module, "training_step", spied)
    # Its kernel for drawing on such a processor takes multiples of 32 features only.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map)
    call(script, *command, 4, "--output_dir", tmp_path / "straight")
    assert kinds == {{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[precision]}
    logs = logged(tmp_path / "straight")
    assert logs[0]["chosen_error"] == logs[0]["rejected_error"] == 0.0 and logs[-1]["chosen_error"] != 0.0
    call(script, *command, 2, "--output_dir", tmp_path / "resumed")
    call(script, *command, 4, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert same_lora(tmp_path / "straight", tmp_path / "resumed")
    assert all(tensor.dtype == torch.float32 for tensor in learned(tmp_path / "straight").values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("script", TRAINERS)
def test_trains_in_bf16_on_a_gpu(trainer_flags, script, tmp_path):
    more = "--mixed_precision bf16 --use_8bit_adam --max_train_steps 3 --dataloader_num_workers 2".split()
    call(script, *trainer_flags(script), *more, "--output_dir", tmp_path / "lora")
    learned(tmp_path / "lora")
