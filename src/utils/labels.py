"""The target of an image without a label."""

NO_LABEL = -1
