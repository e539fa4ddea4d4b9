# make demo · demo-sd3 · demo-zimage · demo-qsd · reproduce · test · test-faults · coverage · quality · fix-copies · bench ·
# bench-gpu · models: each makes and reuses .venv by itself; bench-gpu takes it if it is there.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-sd3 demo-zimage demo-qsd reproduce test test-faults coverage quality fix-copies models bench bench-gpu

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# The main job, offline: Syn-Pic from the shapes generators, RankDPO on the SDXL-architecture base, held-out evaluation.
demo: .venv/ready
	$(BIN)/python shapes/world.py --split train --num_prompts 400 --output $(DEMO)/train.jsonl
	$(BIN)/python shapes/world.py --split heldout --num_prompts 200 --seed 1 --output $(DEMO)/heldout.jsonl
	$(BIN)/python build_synpic.py --config shapes/synpic.yaml --prompts $(DEMO)/train.jsonl --output_dir $(DEMO)/synpic
	$(BIN)/python train_rankdpo_sdxl.py --config shapes/rankdpo.yaml --dataset_name $(DEMO)/synpic \
		--cache_dir $(DEMO)/cache --output_dir $(DEMO)/lora --resume_from_checkpoint latest
	$(BIN)/python evaluate.py --config shapes/evaluate.yaml --prompts $(DEMO)/heldout.jsonl \
		--loras rankdpo=$(DEMO)/lora --output_dir $(DEMO)/evaluation
	$(BIN)/python shapes/report.py $(DEMO)

# The same for the SD3 architecture.
demo-sd3: DEMO := outputs/demo-sd3
demo-sd3: .venv/ready
	$(BIN)/python shapes/world.py --split train --num_prompts 800 --output $(DEMO)/train.jsonl
	$(BIN)/python shapes/world.py --split heldout --num_prompts 400 --seed 1 --output $(DEMO)/heldout.jsonl
	$(BIN)/python build_synpic.py --config shapes/synpic_sd3.yaml --prompts $(DEMO)/train.jsonl --output_dir $(DEMO)/synpic
	$(BIN)/python train_rankdpo_sd3.py --config shapes/rankdpo_sd3.yaml --dataset_name $(DEMO)/synpic \
		--cache_dir $(DEMO)/cache --output_dir $(DEMO)/lora --resume_from_checkpoint latest
	$(BIN)/python evaluate.py --config shapes/evaluate_sd3.yaml --prompts $(DEMO)/heldout.jsonl \
		--loras rankdpo=$(DEMO)/lora --output_dir $(DEMO)/evaluation
	$(BIN)/python shapes/report.py $(DEMO)

# The same for Z-Image, and once more with the safeguard: does it keep the winners' error down?
demo-zimage: DEMO := outputs/demo-zimage
demo-zimage: .venv/ready
	$(BIN)/python shapes/world.py --split train --num_prompts 800 --output $(DEMO)/train.jsonl
	$(BIN)/python shapes/world.py --split heldout --num_prompts 400 --seed 1 --output $(DEMO)/heldout.jsonl
	$(BIN)/python build_synpic.py --config shapes/synpic_zimage.yaml --prompts $(DEMO)/train.jsonl --output_dir $(DEMO)/synpic
	$(BIN)/python train_rankdpo_zimage.py --config shapes/rankdpo_zimage.yaml --dataset_name $(DEMO)/synpic \
		--cache_dir $(DEMO)/cache --output_dir $(DEMO)/lora --resume_from_checkpoint latest
	$(BIN)/python train_rankdpo_zimage.py --config shapes/rankdpo_zimage.yaml --dataset_name $(DEMO)/synpic --safeguard 0.6 \
		--cache_dir $(DEMO)/cache --output_dir $(DEMO)/lora-safeguard --resume_from_checkpoint latest
	$(BIN)/python evaluate.py --config shapes/evaluate_zimage.yaml --prompts $(DEMO)/heldout.jsonl \
		--loras rankdpo=$(DEMO)/lora safeguard=$(DEMO)/lora-safeguard --output_dir $(DEMO)/evaluation
	$(BIN)/python shapes/report.py $(DEMO)

# DPO on noisy pairs (30 % of the labels wrong): the best by quality, in order, against all of them at random, for as many
# steps and for a full epoch. `make demo-qsd SEEDS="0 1 2"` makes the table of docs/shapes.md.
QSD_STEPS := 40
demo-qsd: SEEDS ?= 0
demo-qsd: DEMO := outputs/demo-qsd
demo-qsd: .venv/ready
	$(BIN)/python shapes/world.py --split train --num_prompts 1000 --seed 2 --output $(DEMO)/train.jsonl
	$(BIN)/python shapes/world.py --split heldout --num_prompts 200 --seed 1 --output $(DEMO)/heldout.jsonl
	$(BIN)/python build_synpic.py --config shapes/synpic.yaml --rewards shapes/world.py:clean_reward \
		--prompts $(DEMO)/train.jsonl --output_dir $(DEMO)/synpic
	for seed in $(SEEDS); do \
		$(BIN)/python shapes/pairs.py --synpic $(DEMO)/synpic --flip 0.3 --seed $$seed --output_dir $(DEMO)/pairs-$$seed && \
		$(BIN)/python score_pairs.py --dataset_name $(DEMO)/pairs-$$seed --reward shapes/world.py:preference \
			--normalization none --include_images --output_dir $(DEMO)/qsd-$$seed && \
		for run in "qsd sorted $(QSD_STEPS)" "steps random $(QSD_STEPS)" "epoch random"; do \
			set -- $$run; \
			$(BIN)/python train_dpo_qsd.py --config shapes/qsd.yaml --dataset_name $(DEMO)/qsd-$$seed --seed $$seed \
				--order $$2 --top_fraction 1 $${3:+--max_train_steps $$3} --cache_dir $(DEMO)/cache \
				--output_dir $(DEMO)/loras/$$1-$$seed --resume_from_checkpoint latest || exit 1; \
		done || exit 1; \
	done
	$(BIN)/python evaluate.py --config shapes/evaluate.yaml --prompts $(DEMO)/heldout.jsonl --output_dir $(DEMO)/evaluation \
		--loras $(foreach s,$(SEEDS),$(foreach m,qsd steps epoch,$(m)-$(s)=$(DEMO)/loras/$(m)-$(s)))
	$(BIN)/python shapes/report_qsd.py $(DEMO)

# Rows of the papers' ablation tables, or whole tables, trained with seeds 0 to SEEDS - 1 and judged exactly.
ROWS ?= objectives
reproduce: SEEDS ?= 3
reproduce: .venv/ready
	$(BIN)/python shapes/reproduce.py --rows $(ROWS) --seeds $(SEEDS) $(if $(JOBS),--jobs $(JOBS))

# Gradio, for the page of user_study.py; and the official scorers, as oracles of the tests, without their own, obsolete
# dependencies. They come last: pip would complain about them.
.venv/ready-test: .venv/ready requirements-test.txt requirements-official.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-official.txt
	touch $@

test: .venv/ready-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Lines of the scripts that the tests run, in processes of their own included.
coverage: .venv/ready-test
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing

# Faults injected into tiny runs; the last line counts what was lost or silently wrong.
test-faults: .venv/ready
	$(BIN)/python tests/faults.py --seed 0 --jobs 2

quality: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/test_copies.py

fix-copies: .venv/ready
	$(BIN)/python tests/test_copies.py --fix
	$(BIN)/ruff format --quiet .

# Side by side with the official scorer, full size (18 minutes on 2 cores).
bench: .venv/ready-test
	$(BIN)/python benchmarks/score_speed.py

# Training, scoring and drawing at full size on a GPU, at most 9 minutes, without network. Installs nothing; takes .venv if it is
# there. PEER=path/to/train_diffusion_dpo_sdxl.py compares with diffusers' script first.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" \
		|| { echo "bench-gpu: no CUDA device here: nothing was measured"; exit 0; }; \
	set -x; failed=0; \
	$(if $(PEER),timeout 230 $(GPU_PYTHON) benchmarks/train_speed.py --peer $(PEER) --steps 8 --rounds 1 \
		--json outputs/bench-gpu/compare.json || failed=1;) \
	timeout $(if $(PEER),100,310) $(GPU_PYTHON) benchmarks/train_speed.py --sweep --steps 8 \
		--minutes $(if $(PEER),0.5,3.2) --json outputs/bench-gpu/sweep.json || failed=1; \
	timeout 95 $(GPU_PYTHON) benchmarks/score_speed.py --blocks 1 --prompts 16 \
		--json outputs/bench-gpu/scores.json || failed=1; \
	timeout 110 $(GPU_PYTHON) benchmarks/generate_speed.py --steps 10 --images 8 --rounds 2 \
		--json outputs/bench-gpu/images.json || failed=1; \
	exit $$failed

# The generators that the demos use, trained from scratch.
models: .venv/ready
	$(BIN)/python shapes/train_generators.py --output_dir shapes/models
	$(BIN)/python shapes/train_sd3_generator.py --output_dir shapes/models
	$(BIN)/python shapes/train_zimage_generator.py --steps 3600 --output_dir shapes/models
	$(BIN)/python shapes/train_zimage_generator.py --steps 5000 --seed 1 --start_from shapes/models/zimage --output_dir shapes/models
