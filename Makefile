# Everything runs in .venv, which is made once (the stamp files) and again only when pyproject.toml changes; Keras on TensorFlow and JAX in
# .venv-keras, which has no PyTorch.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime
DEVELOP := .venv/.develop
KERAS := .venv-keras/.develop

.PHONY: demo docs-examples test test-torch test-keras test-keras-torch lint format types clean

demo: $(RUNTIME)
	$(BIN)/coppice demo --out runs/demo --fresh

docs-examples: $(KERAS) # the worked example of docs/keras.md
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 .venv-keras/bin/python bench/keras_starter.py

test: test-torch test-keras test-keras-torch # side by side with make -j2

test-torch: $(DEVELOP)
	$(BIN)/python -m pytest

test-keras: $(KERAS)
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 .venv-keras/bin/python -m pytest tests/keras3
	KERAS_BACKEND=jax .venv-keras/bin/python -m pytest tests/keras3/test_networks.py -k "cut_at_random or subclassed or pytorch"
	KERAS_BACKEND=jax .venv-keras/bin/python -m pytest tests/keras3/test_training.py tests/keras3/test_repair.py tests/keras3/test_masks.py tests/keras3/test_schedules.py -k "goes_on or shrunk or nearer or stay_zero or growing or average or momentum"

test-keras-torch: $(DEVELOP)
	KERAS_BACKEND=torch $(BIN)/python -m pytest tests/keras3

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

$(KERAS): pyproject.toml
	test -x .venv-keras/bin/python || $(PYTHON) -m venv .venv-keras
	.venv-keras/bin/python -m pip install --quiet -e '.[keras-dev]'
	touch $@

clean:
	rm -rf .venv .venv-keras build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
