"""Data sets, networks, difficulty, losses, the teacher pass, streaming and training."""
