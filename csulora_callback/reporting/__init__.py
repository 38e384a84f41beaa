"""What a person reads of a run; knows nothing of trainers."""
