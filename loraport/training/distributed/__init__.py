"""Several processes that train one adapter."""
