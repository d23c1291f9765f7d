# Two commands for a newcomer: `make demo` and `make test`. Both make the environment in .venv first, once.
# Another interpreter has an environment of its own: `make test PYTHON=python3.12` tests in .venv-python3.12.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
DATA := data/demo
RUN := runs/demo

.PHONY: demo test lint env clean

demo: env $(DATA)/shards/manifest.json
	$(BIN)/hsa train demo --run-dir $(RUN)
	$(BIN)/hsa eval niah $(RUN) --lengths 1x --distance 8w --samples 100 --name niah-8-windows
	$(BIN)/hsa eval niah $(RUN) --lengths 1x,4x,16x,64x --samples 8
	$(BIN)/hsa eval ppl $(RUN)
	$(BIN)/hsa status $(RUN)
	@echo "pictures: $(RUN)/eval/*.png    curves: $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"

$(DATA)/text/manifest.json: | env
	$(BIN)/python -m data_pipeline.fetch_texts --out $(DATA)/text --cache data/cache

$(DATA)/shards/manifest.json: $(DATA)/text/manifest.json
	$(BIN)/hsa data tokenize $(DATA)/text --out $(DATA)/shards --tokenizer bpe:1024 --bpe-mb 8 --shard-mb 8

# Quick tests first; then those that start processes; two files at a time, but those on a real cluster alone because they
# live by the clock.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not distributed and not slurm"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "(slow or distributed) and not slurm"
	$(BIN)/python -m pytest -m slurm

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp depends on what decides the environment's contents, so a second call installs nothing.
env: $(VENV)/complete

$(VENV)/complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version`: try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
