"""The Keras 3 front-end, on whatever backend Keras runs: TensorFlow, JAX or PyTorch (``KERAS_BACKEND``)."""
