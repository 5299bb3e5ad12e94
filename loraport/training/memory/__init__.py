"""How much memory a run takes, told before it."""
