"""What runs inside vLLM's processes beside the model: registration, checks, patches, options, kernels."""
