"""Embedding, classification and reward models made from this architecture, and what they answer."""

import json
import shutil

import torch

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors, small_config, write_tensors
from vllm_bailing import DEMO
from vllm_bailing.reference import BailingMoeV2ForCausalLM

PROMPTS = [PROMPT, PROMPT[:7]]


def without_head(folder, prefix="model.", labels=0, vocab_size=256, **keys):
    """A checkpoint as training an embedding or a reward model leaves it."""
    make_checkpoint(folder, tie_word_embeddings=False, vocab_size=vocab_size)
    tensors = {
        f"{prefix}{name.removeprefix('model.')}": tensor
        for name, tensor in read_tensors(folder).items()
        if name != "lm_head.weight"
    }
    if labels:
        torch.manual_seed(3)
        tensors["score.weight"] = torch.randn(labels, 64).bfloat16() * 0.2
        keys["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels)}
    write_tensors(folder, tensors)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return with_tokenizer(folder)


def with_tokenizer(folder):
    """vLLM makes no offline pooling engine without one."""
    for file in DEMO.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


@torch.no_grad()
def last_hidden(folder, prompts=PROMPTS):
    """(hidden states [prompts, H] of the last tokens after the final norm, head or None), by the plain reference."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        name if name.startswith(("model.", "score.")) else f"model.{name}": tensor.float()
        for name, tensor in read_tensors(folder).items()
    }
    sizes = {key: config[key] for key in ("num_hidden_layers", "vocab_size")}
    model = BailingMoeV2ForCausalLM(small_config(**sizes)).float()
    score = tensors.pop("score.weight", None)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    rows = [model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1] for prompt in prompts]
    return torch.stack(rows), score
