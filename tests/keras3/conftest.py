"""The tests of the Keras front-end run where a backend is named: `KERAS_BACKEND=tensorflow pytest tests/keras3` (see the Makefile)."""

import os

BACKEND = os.environ.get("KERAS_BACKEND", "")
collect_ignore_glob = [] if BACKEND else ["*"]

if BACKEND:
    import keras
    import pytest

    @pytest.fixture(autouse=True)
    def _same_weights_each_time() -> None:
        keras.utils.set_random_seed(0)
