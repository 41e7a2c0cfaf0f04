"""vLLM's endpoints for embeddings, classes and scores, on models made from this architecture."""

import httpx
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from tests.support.engine import TOLERANCE
from tests.support.pooling import PROMPTS, last_hidden, without_head
from tests.support.server import posted, serving


def test_embeddings_and_their_similarity(tmp_path):
    folder = without_head(tmp_path / "model", vocab_size=1024, architectures=["BailingMoeV2Model"])
    texts = ["What is the capital of France?", "Who are you?"]
    prompts = [*PROMPTS, *AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]]
    wanted = F.normalize(last_hidden(folder, prompts)[0], dim=-1)
    with serving(tmp_path / "log", "--runner", "pooling", "--convert", "embed", model=folder) as server:
        data = server.client.embeddings.create(model="demo", input=PROMPTS, encoding_format="float").data
        scores = posted(server, "/score", text_1=texts[0], text_2=texts[1])["data"]
        chat = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "demo", "messages": []}, timeout=60)
    embeddings = torch.tensor([one.embedding for one in data])
    assert (embeddings - wanted[: len(PROMPTS)]).abs().max() <= TOLERANCE
    assert abs(scores[0]["score"] - float(wanted[-2] @ wanted[-1])) <= TOLERANCE
    assert chat.status_code == 404


def test_classes(tmp_path):
    folder = without_head(tmp_path / "model", labels=3)
    with serving(tmp_path / "log", "--runner", "pooling", "--convert", "classify", model=folder) as server:
        data = posted(server, "/classify", input=PROMPTS)["data"]
    hidden_states, score = last_hidden(folder)
    wanted = (hidden_states @ score.T).softmax(-1)
    assert (torch.tensor([one["probs"] for one in data]) - wanted).abs().max() <= TOLERANCE
    assert [one["label"] for one in data] == [f"LABEL_{int(row.argmax())}" for row in wanted]
