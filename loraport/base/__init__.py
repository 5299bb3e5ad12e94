"""The base model that adapters belong to: found, described, loaded, and read weight by weight."""
