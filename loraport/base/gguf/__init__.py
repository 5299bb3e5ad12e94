"""A base in a GGUF file."""
