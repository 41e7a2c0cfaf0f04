"""`vllm-bailing report`: one page of HTML with what was measured of a deployment."""
