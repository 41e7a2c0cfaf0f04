"""What a deployment needs and can do at most, from the configuration and a table of GPUs alone."""
