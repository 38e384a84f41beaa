"""Which of transformers' model families are corrected, found out by training each from a tiny config."""
