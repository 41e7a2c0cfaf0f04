"""`vllm-bailing balance`: placements judged by hand, the file of a trace, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from pytest import approx

from tests.support.commands import TERMINAL, invoke
from tests.support.paths import ROOT
from tests.support.versions import since
from vllm_bailing import DEMO
from vllm_bailing.balance import recording
from vllm_bailing.balance.simulate import imbalance, rebalanced, simulate, waiting
from vllm_bailing.balance.trace import Trace, counted, read_trace, shape_of
from vllm_bailing.balance.worker_extension import PicksExtension
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.errors import BalanceError

FLASH = ROOT / "tests" / "data" / "configs" / "Ling-flash-2.0.json"
SIZES = {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_hidden_layers": 2}
CONFIG = BailingMoeV2Config(
    **SIZES, first_k_dense_replace=1, hidden_size=64, moe_intermediate_size=32, head_dim=16, num_attention_heads=4
)


def trace(requests, config=CONFIG, model="m"):
    """A trace of one layer from the picks of each request's tokens."""
    picks = np.array([token for request in requests for token in request], np.uint16)[:, None]
    return Trace(picks, tuple(map(len, requests)), tuple(config.moe_layer_ids), shape_of(config), model)


# Half of all tokens go to experts 0 and 1, the others one pair each: of 16 picks 4, 4, 2, 2, 2, 2, 0, 0.
REQUEST = [(0, 1)] * 4 + [(2, 3)] * 2 + [(4, 5)] * 2
TRACE = trace([REQUEST, REQUEST])


def test_picks_are_counted_by_layer():
    picks = np.array([[[0, 1], [7, 6]], [[1, 0], [7, 5]]], np.uint16)  # two tokens, two layers
    assert counted(picks, 8).tolist() == [[2, 2, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 2]]
    assert counted(np.stack([picks, picks]), 8).shape == (2, 2, 8)
    assert TRACE.load().tolist() == [[8, 8, 4, 4, 4, 4, 0, 0]]


def test_the_busiest_rank_by_hand():
    counts = np.array([[[4, 4, 2, 2, 2, 2, 0, 0]]])
    in_order = np.arange(8)[None]
    assert imbalance(counts, in_order, 2) == approx(12 / 8)  # experts 0 to 3, of 16 picks
    assert imbalance(counts, in_order, 4) == approx(8 / 4)  # 0 and 1
    # Two ranks of five slots, 0 and 1 on each: 4 / 2 of both, and then 2 + 2 or 2 + 2 or nothing.
    placed = np.array([[0, 1, 2, 3, 6, 0, 1, 4, 5, 7]])
    assert imbalance(counts, placed, 2) == approx(1)
    placed = np.array([[0, 1, 2, 3, 4, 0, 1, 5, 6, 7]])
    assert imbalance(counts, placed, 2) == approx((2 + 2 + 2 + 2 + 2) / 8)
    # The mean over steps and layers: 1.5, and 1 where all experts are picked alike.
    assert imbalance(np.array([[[4, 4, 2, 2, 2, 2, 0, 0]], [[2] * 8]]), in_order, 2) == approx(1.25)
    assert waiting(1.5) == approx(1 / 3)


def test_a_simulation_by_hand():
    """Every step has all tokens of the second request; EPLB learns from the first, which is alike."""
    two, four, eight = simulate(TRACE, CONFIG, [2, 4, 8], 100)
    assert (two.linear, four.linear, eight.linear) == approx((12 / 8, 8 / 4, 4 / 2))
    # Round robin: 0, 2, 4, 6 and 1, 3, 5, 7; then 0 and 4, 1 and 5, 2 and 6, 3 and 7.
    assert (two.round_robin, four.round_robin, eight.round_robin) == approx((1, 6 / 4, 2))
    # Moved only: 4 + 2 + 2 and 0 on each of two; 4 alone on two of four ranks. With eight, each has one expert.
    assert [one.eplb[0].imbalance for one in (two, four, eight)] == approx([1, 1, 2])
    assert [one.worth.redundant for one in (two, four)] == [0, 0]
    # Three of 0 and of 1, 4 / 3 picks each, and two of 2 to 5: the busiest rank has one of both kinds, 4 / 3 + 1 of 2.
    assert eight.eplb[1].redundant == 8 and eight.eplb[1].imbalance == approx(7 / 6)
    assert eight.worth == eight.eplb[1]
    # One expert on each of eight ranks: three matrices of 32 x 64 in bf16, in one layer.
    assert (two.worth.bytes, eight.worth.bytes) == (0, 3 * 32 * 64 * 2)
    assert [one.redundant for one in two.eplb] == [0, 2, 4, 8]
    assert (two.nodes, eight.nodes, simulate(TRACE, CONFIG, [8], 100, gpus=4)[0].nodes) == (1, 1, 2)


def test_eplb_is_judged_on_requests_that_it_did_not_see():
    (found,) = simulate(trace([REQUEST, [(2, 4)] * 8]), CONFIG, [4], 100)
    placed = rebalanced(trace([REQUEST]).load(), CONFIG, 0, 1, 4).reshape(4, 2)
    busiest = max(8 * ((2 in rank) + (4 in rank)) for rank in placed.tolist())
    assert found.eplb[0].imbalance == approx(busiest / 4) and busiest >= 8


def test_an_even_router_is_uneven_by_chance():
    (few,), (many,) = (simulate(trace([REQUEST * 99] * 2), CONFIG, [4], tokens) for tokens in (8, 512))
    assert 1 < many.even < 1.1 < few.even
    # Of one token, two different experts of eight on four ranks of two: one rank has both with 1/7, else two have one.
    (one,) = simulate(TRACE, CONFIG, [4], 1)
    assert one.even == approx(2 * (6 / 7) + 4 / 7, abs=0.15)


def test_placements_are_those_of_vllm():
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    for strategy, order in (("linear", np.arange(8)), ("round_robin", np.arange(8).reshape(-1, 4).T.ravel())):
        for rank, held in enumerate(order.reshape(4, -1)):
            _, places, _ = determine_expert_map(4, rank, 8, strategy)
            assert sorted(held) == [expert for expert, place in enumerate(places.tolist()) if place >= 0]


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_trace_survives_its_file(tmp_path):
    TRACE.save(tmp_path / "new" / "trace.npz")
    found = read_trace(tmp_path / "new" / "trace.npz", CONFIG)
    assert np.array_equal(found.picks, TRACE.picks) and found.picks.dtype == np.uint16
    assert (found.lengths, found.layers, found.shape, found.model) == ((8, 8), (1,), TRACE.shape, "m")


def damaged(file, **changes):
    about = {"lengths": [8, 8], "layers": [1], "shape": TRACE.shape, "model": "m"}
    parts = {"picks": TRACE.picks, "about": np.array(json.dumps({**about, **changes.pop("about", {})})), **changes}
    np.savez(file, **{name: part for name, part in parts.items() if part is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"picks": None}, "is no trace of this command"),
        ({"about": {"lengths": "x"}}, "is no trace of this command"),
        ({"about": {"shape": 3}}, "is no trace of this command"),
        ({"picks": np.array([{}], object)}, "is no trace of this command"),
        ({"picks": TRACE.picks[1:]}, "is damaged: picks of shape (15, 1, 2)"),
        ({"picks": TRACE.picks + np.uint16(8)}, "is damaged"),
        ({"picks": TRACE.picks.astype(float)}, "is damaged"),
        ({"about": {"layers": [1, 2]}}, "layers with experts is 2 there and 1 in this one"),
        ({"about": {"shape": {**TRACE.shape, "num_experts": 9}}}, "num_experts is 9 there and 8 in this one"),
    ],
)
def test_a_file_that_is_no_trace_of_the_model_is_refused(changes, words, tmp_path):
    damaged(tmp_path / "t.npz", **changes)
    with pytest.raises(BalanceError, match="--trace") as refused:
        read_trace(tmp_path / "t.npz", CONFIG)
    assert words in str(refused.value) and "\n" not in str(refused.value)


# ---- a server ------------------------------------------------------------------------------------------------------


class Server(httpx.BaseTransport):
    """Answers as vLLM's server does, by vLLM's own classes."""

    def __init__(self, picks):
        self.picks = picks

    def handle_request(self, request):
        from vllm.entrypoints.openai.chat_completion import protocol
        from vllm.utils.serial_utils import numpy2base64

        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        fields = protocol.ChatCompletionResponseChoice.model_fields
        assert "routed_experts" in fields
        message = {"role": "assistant", "content": "x"}
        text = self.picks if self.picks is None or isinstance(self.picks, str) else numpy2base64(self.picks)
        choice = {"index": 0, "message": message, "finish_reason": "stop", "routed_experts": text}
        return httpx.Response(200, json={"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]})


def asked(picks, monkeypatch, prompts=2):
    from vllm_bailing.tools import chat
    from vllm_bailing.tools import prompts as files

    client = httpx.Client(transport=Server(picks))
    connect = chat.connect
    monkeypatch.setattr(chat, "connect", lambda url, **options: connect(url, http_client=client, **options))
    lines = [files.Prompt([{"role": "user", "content": "hi"}])] * prompts
    return recording.from_server("http://localhost:1", None, "m", CONFIG, lines, 4)


RETURNS_PICKS = since("0.32", "picks of experts in chat completions")


@RETURNS_PICKS
def test_what_a_server_returns_is_read(monkeypatch):
    picks = np.arange(2 * 2 * 2, dtype=np.uint8).reshape(2, 2, 2) % 8  # two tokens, layer 0 has no experts
    found = asked(picks, monkeypatch)
    assert found.picks.tolist() == [*picks[:, 1:].tolist()] * 2
    assert (found.lengths, found.layers) == ((2, 2), (1,))


@RETURNS_PICKS
@pytest.mark.parametrize(
    ("picks", "words"),
    [
        (None, "returns no routed experts; start it with --enable-return-routed-experts"),
        ("AAAA", "returns routed experts that are no .npy file"),
        (np.zeros((2, 3, 2), np.uint8), "serves another model: its routed experts have the shape (2, 3, 2)"),
        (np.full((2, 2, 2), 8, np.uint8), "serves another model"),
    ],
)
def test_what_a_server_returns_is_checked(picks, words, monkeypatch):
    with pytest.raises(BalanceError) as refused:
        asked(picks, monkeypatch)
    assert words in str(refused.value) and "\n" not in str(refused.value)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """A file with a trace of the demo's shape."""
    config = read_config(DEMO)
    draw = np.random.default_rng(3)
    # Low numbers are picked most.
    picks = np.argsort(draw.random((64, 3, 16)) * np.arange(1, 17), axis=2)[..., :4].astype(np.uint16)
    Trace(picks, (16,) * 4, tuple(config.moe_layer_ids), shape_of(config), "demo").save(tmp_path / "demo.npz")
    return tmp_path / "demo.npz"


def test_a_trace_is_used_again(recorded, tmp_path):
    done = invoke("balance", DEMO, "--trace", recorded, "--ep", "2,4", "--out", tmp_path / "again", **TERMINAL)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert (
        "demo: 64 tokens of 4 requests, 4 of 16 experts for each" in words and "a router without preferences" in words
    )
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in done.stdout
    report = json.loads((tmp_path / "again.json").read_text())
    assert [row["ep"] for row in report["ranks"]] == [2, 4] and len(report["load"]) == 3
    assert all(row["linear"] > row["eplb"][0]["imbalance"] for row in report["ranks"])
    assert sum(report["load"][0]["picks"]) == 64 * 4
    assert (tmp_path / "again.png").stat().st_size > 10_000
    assert not (tmp_path / "again.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "demo.npz", "--ep", "3"], "--ep 3 does not divide num_experts=16; use some of 2, 4, 8, 16"),
        (["--trace", "demo.npz", "--ep", "1"], "is not a list of numbers from 2, such as 2,3"),
        (["--trace", "demo.npz", "--ep", "x"], "is not a list of numbers from 2"),
        (["--trace", "none.npz"], "--trace none.npz cannot be read (No such file or directory); name another"),
        (["--trace", "empty"], "--trace empty is no trace of this command"),
        (["--prompts", "blank"], "blank is empty; write one user message a line"),
        (["--url", "localhost:9"], "no server at http://localhost:9; start one by"),
        (["--trace", "demo.npz", "--out", "empty/x"], "empty"),
        ([FLASH, "--trace", "demo.npz"], "--trace demo.npz is of another model, demo: num_experts is 16 there and 256"),
        (["dense", "--trace", "demo.npz"], "first_k_dense_replace=4 leaves none of 4 layers with experts"),
        (["nowhere", "--trace", "demo.npz"], "nowhere"),
        (["--trace", "demo.npz", "--url", "localhost:9"], "--url has no effect with --trace; leave one of the two out"),
        (["--trace", "demo.npz", "--prompts", "blank"], "--prompts has no effect with --trace"),
        (["--url", "localhost:9", "--engine", '{"seed": 1}'], "--engine has no effect with --url"),
    ],
)
def test_bad_input_is_one_line(arguments, words, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "dense").mkdir()
    demo = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**demo, "first_k_dense_replace": 4}))
    model = [] if str(arguments[0]) in ("dense", "nowhere", str(FLASH)) else [DEMO]
    done = invoke("balance", *model, *arguments)
    assert done.exit_code == 2 and words in " ".join(done.stderr.split()), (done.output, done.exception)
    assert done.stdout == "" and not list(tmp_path.glob("*.png"))


def test_one_request_is_too_little(tmp_path):
    trace([REQUEST]).save(tmp_path / "one.npz")
    with pytest.raises(BalanceError, match="give several prompts"):
        simulate(read_trace(tmp_path / "one.npz", CONFIG), CONFIG, [2], 8)


def test_routers_are_watched_where_they_are_asked():
    class Router:
        def set_capture_fn(self, note):
            self.note = note

    class Layer(torch.nn.Module):
        def __init__(self, router, monolithic=False):
            super().__init__()
            self.router, self._quant_method = router, SimpleNamespace(is_monolithic=monolithic)

    root = torch.nn.Module()
    root.model = torch.nn.Module()
    watched = Router()
    root.model.layers = torch.nn.ModuleList([Layer(watched), Layer(object()), Layer(Router(), monolithic=True)])
    worker = PicksExtension()
    worker.get_model = lambda: root
    assert worker.bailing_watch_routers() == [0]
    picks = torch.tensor([[3, 1]], dtype=torch.int32)
    watched.note(picks)
    picks.zero_()  # vLLM uses its tensors again
    assert worker.bailing_take_picks() == {"0": np.array([3, 1], np.uint16).tobytes()}
    assert worker.bailing_take_picks() == {"0": b""}


def test_a_layer_whose_picks_cannot_be_seen_is_named():
    config = read_config(DEMO)  # layers 1 to 3 have experts
    recording.require_watched(config, [[1], [2, 3]])  # stages
    with pytest.raises(BalanceError, match="the picks of layer 2 cannot be seen: its kernel picks by itself"):
        recording.require_watched(config, [[1], [3]])
