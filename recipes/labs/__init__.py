"""The subjects of experiments, built offline: the toy lab and SmolLM2; knows nothing of the callback."""
