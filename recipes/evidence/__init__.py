"""Every correction beside its controls: frontiers, side effects, and their reports; knows nothing of the callback."""
