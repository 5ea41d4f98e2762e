"""Which framework a model is of. None is imported for it."""

from __future__ import annotations

import sys
from typing import Any


def is_keras(model: Any) -> bool:
    """Whether ``model`` is a Keras model; with the PyTorch backend it is a module of PyTorch as well."""
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(model, keras.Model)
