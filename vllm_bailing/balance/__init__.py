"""`vllm-bailing balance`: which experts a model picks, and how even that keeps expert-parallel ranks.

Picks are recorded (`recording.py`), kept (`trace.py`), and played against placements of the experts (`simulate.py`),
among them those that vLLM's own load balancing would choose.
"""
