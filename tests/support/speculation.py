"""Speculative decoding: what a draft computes, and answers of the demo checkpoint with and without one."""

from tests.support.conversations import HELD_OUT, evenly
from tests.support.engine import ask, make_llm


def mtp(tokens, **options):
    return {"method": "mtp", "num_speculative_tokens": tokens, **options} if tokens else None


def _record_draft(worker):
    """Keep what the draft model computes in its first pass over a prompt."""
    draft = worker.model_runner.drafter.model
    forward = draft.forward

    def recording(*args, **kwargs):
        output = forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output  # EAGLE-3 also returns what feeds its next step
        if not hasattr(draft, "recorded") and len(hidden) >= draft.recorded_tokens:
            draft.recorded = draft.compute_logits(hidden[: draft.recorded_tokens]).float().cpu()
        return output

    draft.forward = recording


def _expect_tokens(worker, tokens):
    worker.model_runner.drafter.model.recorded_tokens = tokens


def _recorded(worker):
    return worker.model_runner.drafter.model.recorded


def draft_logits(model, prompt, speculative_config=None, prepare=None, **options):
    """Logits [T - 1, vocab] of the draft at every position whose next token is in the prompt.

    Args:
        prepare: Called with the worker before anything is asked.
    """
    llm = make_llm(model, speculative_config=speculative_config or mtp(1), **options)
    if prepare is not None:
        llm.collective_rpc(prepare)
    llm.collective_rpc(_expect_tokens, args=(len(prompt) - 1,))
    llm.collective_rpc(_record_draft)
    ask(llm, [prompt], max_tokens=2, logprobs=False)
    return llm.collective_rpc(_recorded)[0]


def demo_requests(count):
    """Conversations about everything that the demo model knows: messages, tools, whether it thinks."""
    rows = evenly(evenly(HELD_OUT, 200), count)
    return [(row["messages"], row.get("tools"), row.get("thinking", False)) for row in rows]


def prompts_of(llm, requests):
    tokenizer = llm.get_tokenizer()
    return [
        tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        for messages, tools, thinking in requests
    ]


def counters(llm):
    """vLLM's counters by short name, such as `accepted_tokens` and `preemptions`."""
    return {
        metric.name.removeprefix("vllm:").removeprefix("spec_decode_").removeprefix("num_"): metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "value")
    }


def answers(model, count, tokens, max_tokens=48, **options):
    """(token ids of the answers, speculative counters) of `count` demo conversations in one batch."""
    from vllm import SamplingParams

    options = {"max_model_len": 1024, "disable_log_stats": False, **options}
    llm = make_llm(model, speculative_config=tokens if isinstance(tokens, dict) else mtp(tokens), **options)
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(llm, demo_requests(count))]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    # Prompts that are cached by now, of which the draft has to find its own keys and values too.
    again = llm.generate(prompts[:4], params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in again] == ids[:4]
    return ids, counters(llm)
