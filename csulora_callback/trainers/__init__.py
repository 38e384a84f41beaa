"""Each trainer's events translated into calls of the corrector; knows nothing of the mathematics."""
