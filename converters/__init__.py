"""One room per destination of an adapter."""
