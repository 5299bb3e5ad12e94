"""Low-rank layers in a model."""
