"""`vllm serve` with several ranks on one machine, against the plain PyTorch model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.support.conversations import MAX_TOKENS, greedy, prompt_ids, spread
from tests.support.server import serving
from tests.support.versions import SHARED_EXPERTS


@SHARED_EXPERTS
def test_ranks_of_data_parallelism_give_the_plain_models_answers(tmp_path, plain):
    flags = ("--data-parallel-size", "2", "--enable-expert-parallel")
    rows = spread(12)
    wanted = greedy(plain, [prompt_ids(plain, row) for row in rows])
    with serving(tmp_path / "log", *flags, VLLM_CPU_OMP_THREADS_BIND="0|1") as server:

        def ask(prompt):
            answer = server.client.completions.create(
                model="demo",
                prompt=prompt,
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body={"return_token_ids": True},
            )
            return answer.choices[0].token_ids

        with ThreadPoolExecutor(len(rows)) as pool:
            answers = list(pool.map(ask, [prompt_ids(plain, row) for row in rows]))
        log = server.log.read_text()
    assert answers == wanted
    assert "EngineCore_DP0" in log and "EngineCore_DP1" in log
