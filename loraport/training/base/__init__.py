"""The frozen base as training keeps it."""
