"""`vllm-bailing train-mtp`: an MTP layer for a target that has none of its own, distilled from its own answers."""
