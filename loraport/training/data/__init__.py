"""From JSONL rows to what a model is given."""
