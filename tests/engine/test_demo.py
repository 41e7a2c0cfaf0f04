"""The demo checkpoint through `LLM(...)`, against the plain PyTorch model."""

from __future__ import annotations

from tests.support.conversations import MAX_TOKENS, greedy, prompt_ids, spread
from tests.support.engine import make_llm, run_in_turn
from vllm_bailing import DEMO


def _answers(prompts):
    from vllm import SamplingParams

    llm = make_llm(DEMO, max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_batch_of_64_prompts_gets_the_plain_models_answers(plain):
    prompts = [prompt_ids(plain, row) for row in spread(64)]
    assert run_in_turn(_answers, prompts) == greedy(plain, prompts)
