"""Data of the trainings from scratch: sequences of tokens with classes, and texts of bytes, see `base`."""
