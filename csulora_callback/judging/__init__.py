"""Whether responses refuse and whether they are language, with intervals; knows nothing of LoRA or trainers."""
