# Everything runs in .venv, which is made once (the stamp files) and again only when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime
DEVELOP := .venv/.develop

.PHONY: demo test lint format types clean

demo: $(RUNTIME)
	$(BIN)/coppice demo --out runs/demo --fresh

test: $(DEVELOP)
	$(BIN)/python -m pytest

lint: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEVELOP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEVELOP)
	$(BIN)/mypy

$(RUNTIME): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[torch,vision,onnx,cli,demo]'
	touch $@

$(DEVELOP): $(RUNTIME)
	$(BIN)/python -m pip install --quiet -e '.[all,dev]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
