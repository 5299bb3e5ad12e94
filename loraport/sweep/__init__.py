"""Try several ranks, targets, alphas and learning rates, and say which to take."""
