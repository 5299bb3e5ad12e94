"""What is minimised, and how little of it is computed."""
