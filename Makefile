# One command each for what is done often. Each of them sets up .venv first if it is not there.

VENV := .venv
BIN := $(VENV)/bin
# Written at the end of a complete installation, so that an interrupted one is done again.
INSTALLED := $(VENV)/.installed
# PYTHON=/path/to/python chooses the Python of .venv; otherwise the first of these that is recent enough.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3)
# More for pytest, such as ARGS="tests/test_agc.py -k bank".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-lora demo-unconditional demo-audit test bench bench-speed lint format clean

help: ## List these commands.
	@echo "make COMMAND [PYTHON=python3.11] [ARGS='more for pytest'], where COMMAND is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

# accelerate gives a process one thread unless told otherwise; the demo is one process and may have them all.
# --quiet: an error of the demo ends with the demo's own line, not with accelerate's traceback as well.
LAUNCH = $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process "$${OMP_NUM_THREADS:-$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}" \
	train_iet_agc.py --resume_from_checkpoint latest

demo: $(INSTALLED) ## Fine-tune a small pipeline on the emoji in demo/; goes on where an interrupted run stopped.
	$(LAUNCH) --config configs/demo.yaml

demo-lora: $(INSTALLED) ## The same with LoRA adapters of rank 4.
	$(LAUNCH) --config configs/demo_lora.yaml

# Pictures from the captions of the 300 emoji, against 60 emoji that no model here has seen.
AUDIT = $(BIN)/iet-finetune audit --holdout_data_dir demo/data/heldout --num_images 320 --num_inference_steps 25 \
	--sampling_guidance_scale 3
demo-audit: demo ## How much do the demo's pipeline, plain fine-tuning and IET-AGC repeat their images? Takes 20 minutes.
	$(LAUNCH) --config configs/demo_plain.yaml
	$(AUDIT) --model demo/pipeline --train_data_dir demo/data/finetune --output_dir outputs/demo-base/audit
	$(AUDIT) --model outputs/demo-plain
	$(AUDIT) --model outputs/demo
	$(BIN)/iet-finetune audit --compare outputs/demo-base outputs/demo-plain outputs/demo --output_dir outputs/demo-compared

# As many ranks as cores, four at most, each with one thread and a shard of its own: on a CPU that is faster than threads.
# Without the interface's name gloo looks for a network, which not every machine has.
RANKS = cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); \
	export GLOO_SOCKET_IFNAME="$${GLOO_SOCKET_IFNAME:-$$(if [ -d /sys/class/net/lo ]; then echo lo; fi)}"; \
	ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone \
	--nproc_per_node $$((cores < 4 ? cores : 4)) train_iet_agc.py --resume_from_checkpoint latest

# The images of Debian's package dataset-fashion-mnist if it is installed; else the 2,000 of them that are kept here.
FASHION_MNIST := /usr/share/datasets/fashion-mnist
demo-unconditional: $(INSTALLED) ## Train a small network from scratch to draw garments, without prompts.
	@if [ -d $(FASHION_MNIST) ]; then \
		$(BIN)/python demo/unconditional/make_data.py --count 20000 --output outputs/fashion-mnist; \
	fi
	$(RANKS) --config configs/demo_unconditional.yaml \
		$$(if [ -d $(FASHION_MNIST) ]; then echo --dataset_name outputs/fashion-mnist; fi)

# Two files at a time with one thread each: more threads than cores make torch many times slower.
test: $(INSTALLED) ## Run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The others also where one found a miss. TMPDIR=/path chooses the disk for what they write.
bench: $(INSTALLED) ## Measure memory and speed; takes 20 minutes or more, 16 GB of memory and 45 GB of disk.
	@missed=0; for each in memory scaling lora_merge lora_step nearest cache; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$each.py || missed=1; \
	done; exit $$missed

bench-speed: $(INSTALLED) ## Measure the trainer's speed against a plain loop, and its start; takes about 10 minutes.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

lint: $(INSTALLED) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Put the code into shape.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and the tools' caches; what runs wrote stays.
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
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test,dev]' -c constraints.txt
	@touch $@
