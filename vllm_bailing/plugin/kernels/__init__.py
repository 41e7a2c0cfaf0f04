"""Kernels that the model's layers take where vLLM would take slower ones, each after it proved right at the start."""
