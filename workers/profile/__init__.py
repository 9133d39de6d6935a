"""What is found out about a model once, from text, and kept for the stages that need it."""
