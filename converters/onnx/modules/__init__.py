"""Which modules of the base a graph's operators compute, and where their weights lie."""
