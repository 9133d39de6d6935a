"""What a pipeline is made of: one stage a file."""
