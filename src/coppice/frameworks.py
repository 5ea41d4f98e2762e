"""Which framework a model is of, or a command line's names for it. None is imported for it."""

from __future__ import annotations

import sys
from typing import Any

HDF5 = (".h5", ".hdf5")


def is_keras(model: Any) -> bool:
    """Whether ``model`` is a Keras model; with the PyTorch backend it is a module of PyTorch as well."""
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(model, keras.Model)


def names_keras(model: str, weights: str = "") -> bool:
    """Whether ``--model`` and ``--weights`` name a model of Keras's: by the kinds of the files."""
    return model.endswith((".keras", ".json", *HDF5)) or weights.endswith(HDF5)
