"""What makes a GPU's step shorter."""
