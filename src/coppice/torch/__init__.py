"""The PyTorch front-end: capture a model's ops, apply a plan to a copy of the model, verify the result."""
