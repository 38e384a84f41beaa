"""The mathematics of the correction as pure functions on tensors; knows nothing of models, files or trainers."""
