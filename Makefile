# Everything from a fresh clone with Python, git and make: each target makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

OLDEST := .venv-oldest

.PHONY: demo test test-thorough test-oldest lint types format docs bench sanitize clean

demo: $(INSTALLED)
	$(BIN)/python -m sonic_ep doctor
	$(BIN)/python -m sonic_ep demo
	$(BIN)/python examples/train_lm.py

# Two at a time: a test's ranks seldom keep more than one core busy. JOBS=0 is one after the other, in this process.
JOBS ?= 2
PYTEST = python -m pytest --numprocesses=$(JOBS) --dist=worksteal $(PYTEST_FLAGS)

# Every push: some minutes on two cores. With a GPU it runs everything there, too.
test: $(INSTALLED)
	$(BIN)/$(PYTEST)

# All of it, with the interpreted tests that take minutes each: hours on two cores.
test-thorough: $(INSTALLED)
	$(BIN)/$(PYTEST) --thorough

# As test, with the oldest supported PyTorch and Triton.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/$(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ as a site in site/. A broken link is an error.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,viz]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test,viz]'
	touch $@

# On GPUs: make bench RANKS=2 RESULTS=bench/results/mine.json. Without one, a smoke size under Triton's interpreter.
RANKS ?= 1
BENCH_SETTINGS := $(if $(shell command -v nvidia-smi),,TRITON_INTERPRET=1)
RESULTS ?= bench/results/latest.json

bench: $(INSTALLED)
	$(BENCH_SETTINGS) $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=$(RANKS) \
		-m pytest bench --results=$(RESULTS)

# Needs the CUDA toolkit and two GPUs, or one, which two ranks share. What NCCL asks the driver and is refused when it
# starts is no access to memory.
sanitize: $(INSTALLED)
	TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 \
	compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 --report-api-errors no \
		$(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=2 tests/helpers/every_kernel.py

clean:
	rm -rf site $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache build *.egg-info train_lm.png pretrain_fsdp report.html report_png bench/results/latest.json
