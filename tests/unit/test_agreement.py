"""Ranks that are not alike, by what they would say of themselves."""

from vllm_bailing.plugin.agreement import disagreement

ALIKE = {"vllm-bailing": "0.1.0", "vllm": "0.32.0", "--dtype": "torch.bfloat16", "config.json hidden_size": 4096}


def test_ranks_that_are_alike_agree():
    assert disagreement([(f"node-{number}", dict(ALIKE)) for number in range(4)]) == ""


def test_what_differs_is_named_with_rank_node_and_values():
    other = {**ALIKE, "vllm": "0.33.0"}
    assert disagreement([("a", ALIKE), ("a", ALIKE), ("b", other), ("b", other)]) == (
        "rank 0 on a and rank 2 on b differ in vllm '0.32.0' and '0.33.0'; install the same packages, and give every "
        "node the same files, flags and environment"
    )


def test_a_key_that_one_node_lacks_differs():
    assert "config.json rope_scaling None and {'factor': 4.0}" in disagreement(
        [("a", ALIKE), ("b", {**ALIKE, "config.json rope_scaling": {"factor": 4.0}})]
    )
    assert "vllm '0.32.0' and None" in disagreement([("a", ALIKE), ("b", {**ALIKE, "vllm": None})])


def test_another_model_is_one_line_all_the_same():
    message = disagreement([("a", {f"config.json {key}": key for key in range(90)}), ("b", {})])
    assert "; 87 more; install" in message and len(message) < 400 and "\n" not in message
