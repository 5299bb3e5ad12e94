"""Slots: their nodes, their inputs, and the tensors that fill them."""
