# One command for each thing done often. Each creates .venv first if needed.

VENV := .venv
BIN := $(VENV)/bin
# Written when an installation is complete, so that an interrupted one is repeated.
INSTALLED := $(VENV)/.installed
# PYTHON=/path/to/python chooses the Python of .venv; otherwise the first of these that fits.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3)
# Further arguments of pytest and others, such as ARGS="tests/method/test_agc.py -k bank", or of benchmarks/paper.py.
ARGS ?=

# Images of containers often set it; each start of Python would then compile torch and diffusers anew, for 20 seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-lora demo-unconditional demo-audit test bench bench-memorization bench-speed gpu-check paper lint \
	format clean

help: ## List these commands.
	@echo "make COMMAND [PYTHON=python3.11] [ARGS='more for pytest, gpu-check, paper ...'], where COMMAND is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

# By default accelerate gives a process one thread; the demo is a single process and may use all of them.
# --quiet: errors end with the demo's own line, without accelerate's traceback.
LAUNCH = $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process "$${OMP_NUM_THREADS:-$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}" \
	train_iet_agc.py --resume_from_checkpoint latest

demo: $(INSTALLED) ## Fine-tune a small pipeline on the emoji in demo/ by our recipe; resumes an interrupted run.
	$(LAUNCH) --config configs/demo.yaml

demo-lora: $(INSTALLED) ## Fine-tune it by the paper's method, with LoRA adapters of rank 4.
	$(LAUNCH) --config configs/demo_lora.yaml

# Images from the captions of the 300 emoji, against 60 emoji that no model here has seen.
AUDIT = $(BIN)/iet-finetune audit --holdout_data_dir demo/data/heldout --num_images 320 --num_inference_steps 25 \
	--sampling_guidance_scale 3 --features effnet_lite0
demo-audit: demo ## Compare copies after plain fine-tuning, IET-AGC and our recipe; takes 40 minutes.
	$(LAUNCH) --config configs/demo_plain.yaml
	$(LAUNCH) --config configs/demo_iet_agc.yaml
	$(AUDIT) --model demo/pipeline --train_data_dir demo/data/finetune --output_dir outputs/demo-base/audit
	$(AUDIT) --model outputs/demo-plain
	$(AUDIT) --model outputs/demo-iet-agc
	$(AUDIT) --model outputs/demo
	$(BIN)/iet-finetune audit --compare outputs/demo-base outputs/demo-plain outputs/demo-iet-agc outputs/demo \
		--output_dir outputs/demo-compared

# One rank per core, four at most, each with one thread and its own shard: on a CPU faster than threads.
# Without an interface name gloo looks for a network, which not every machine has.
RANKS = cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); \
	export GLOO_SOCKET_IFNAME="$${GLOO_SOCKET_IFNAME:-$$(if [ -d /sys/class/net/lo ]; then echo lo; fi)}"; \
	ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone \
	--nproc_per_node $$((cores < 4 ? cores : 4)) train_iet_agc.py --resume_from_checkpoint latest

# The images of Debian's package dataset-fashion-mnist if installed; else the 2,000 of them in this repository.
FASHION_MNIST := /usr/share/datasets/fashion-mnist
demo-unconditional: $(INSTALLED) ## Train a small network from scratch to generate garments, without prompts.
	@if [ -d $(FASHION_MNIST) ]; then \
		$(BIN)/python demo/unconditional/make_data.py --count 20000 --output outputs/fashion-mnist; \
	fi
	$(RANKS) --config configs/demo_unconditional.yaml \
		$$(if [ -d $(FASHION_MNIST) ]; then echo --dataset_name outputs/fashion-mnist; fi)

# Two files at a time, one thread each: more threads than cores make torch many times slower.
test: $(INSTALLED) ## Run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Runs all of them even if one misses its target. TMPDIR=/path chooses the disk they write to.
bench: $(INSTALLED) ## Measure memory and speed; takes 20 minutes or more, 16 GB of memory and 45 GB of disk.
	@missed=0; for each in memory scaling lora_merge lora_step nearest cache; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$each.py || missed=1; \
	done; exit $$missed

bench-speed: $(INSTALLED) ## Measure the trainer's speed against a plain loop, and its start; takes about 10 minutes.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

bench-memorization: $(INSTALLED) ## Rerun the paper's experiments in small; takes hours, goes on where it was.
	$(BIN)/python -m benchmarks.memorization $(ARGS)

gpu-check: $(INSTALLED) ## Check whether the GPU is used as it should be, and what fits on it; takes minutes.
	@$(BIN)/iet-finetune doctor --gpu $(ARGS)

# The plan can be counted anywhere; ARGS=--smoke tries all of it in a minute on a CPU.
paper: $(INSTALLED) ## Plan to rerun the paper's experiment, of SET=cifar10 for one; RUN=1 runs it, on a GPU.
	@$(BIN)/python benchmarks/paper.py $(SET) $(if $(RUN),--run) $(ARGS)

lint: $(INSTALLED) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and the tools' caches; keeps the output of runs.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.py constraints.txt
	@for python in $(CANDIDATES); do \
		"$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
			2>/dev/null && break; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 with the module venv among: $(CANDIDATES)." >&2; \
		echo "Install one (on Debian with its package python3-venv) or name it: make PYTHON=/path/to/python ..." >&2; \
		exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$python; this is done once and takes a minute or more." && \
	"$$python" -m venv --clear $(VENV)
	@# --no-compile: Python compiles what it imports, which is a third of what pip would compile.
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -e '.[test,dev]' -c constraints.txt
	@touch $@
