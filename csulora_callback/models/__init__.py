"""Checkpoints, live models, adapters and texts, on disk and in memory; knows nothing of safety or trainers."""
