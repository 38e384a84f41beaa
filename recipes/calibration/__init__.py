"""Which setting to take for a checkpoint that is there; knows nothing of training."""
