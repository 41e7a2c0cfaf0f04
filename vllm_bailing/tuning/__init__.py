"""Tables of tile sizes for vLLM's fused experts, from timings on the GPU at hand."""
