"""Recorded picks of experts, and the file that keeps them.

Dimension letters: T tokens of all requests, L layers with experts, K experts per token, E routed experts.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import BalanceError, shown, told
from vllm_bailing.json_files import Unreadable, replaced, require_file

# What has to be the same in a trace and in the model that it is used for.
_SHAPE = ("num_experts", "num_experts_per_tok", "n_group", "topk_group", "hidden_size", "moe_intermediate_size")


@dataclass(frozen=True, eq=False)
class Trace:
    """Which experts each token went to.

    Attributes:
        picks: [T, L, K] uint16, numbers of experts, requests one after another.
        lengths: Tokens of each request, T in all.
        layers: Numbers of the L layers.
        shape: Of the model, by keys of config.json.
        model: As its user named it.
    """

    picks: np.ndarray
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    shape: dict[str, int]
    model: str

    @property
    def experts(self) -> int:
        """E."""
        return self.shape["num_experts"]

    def requests(self) -> list[np.ndarray]:
        """The picks [tokens, L, K] of each request."""
        return np.split(self.picks, np.cumsum(self.lengths)[:-1])

    def load(self) -> np.ndarray:
        """How often each expert was picked: [L, E] int64."""
        return counted(self.picks, self.experts)

    def save(self, file: Path) -> None:
        """Write the trace as an npz file that needs no pickle.

        Raises:
            BalanceError: If it cannot be written.
        """
        about = {"lengths": self.lengths, "layers": self.layers, "shape": self.shape, "model": self.model}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced(file) as new, new.open("wb") as stream:  # numpy would add a suffix to a name
                np.savez_compressed(stream, picks=self.picks, about=np.array(json.dumps(about)))
        except OSError as error:
            raise BalanceError(f"{file} cannot be written ({error.strerror}); name another file") from None


def counted(picks: np.ndarray, experts: int) -> np.ndarray:
    """How often each expert was picked in [..., T, L, K]: [..., L, E] int64."""
    *rest, tokens, layers, top_k = picks.shape
    flat = np.swapaxes(picks, -3, -2).reshape(-1, tokens * top_k).astype(np.int64)
    rows = len(flat)
    flat += experts * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * experts).reshape(*rest, layers, experts)


def shape_of(config: BailingMoeV2Config) -> dict[str, int]:
    """What a trace has in common with its model.

    Raises:
        BalanceError: If the model has no experts to choose among.
    """
    if not config.moe_layer_ids:
        raise BalanceError(
            f"first_k_dense_replace={config.first_k_dense_replace} leaves none of {config.num_hidden_layers} layers "
            "with experts; name a model that has some"
        )
    return {key: int(getattr(config, key)) for key in _SHAPE}


def read_trace(file: Path, config: BailingMoeV2Config) -> Trace:
    """The trace in a file that `Trace.save` wrote.

    Raises:
        BalanceError: If it is none, or one of a model of another shape.
    """
    try:
        require_file(file)
        with np.load(file, allow_pickle=False) as parts:
            picks, about = parts["picks"], json.loads(str(parts["about"]))
        lengths, layers = (tuple(map(int, about[key])) for key in ("lengths", "layers"))
        trace = Trace(picks, lengths, layers, dict(about["shape"]), str(about["model"]))
    except Unreadable as error:
        raise BalanceError(f"--trace {file} {error}; name another") from None
    except OSError as error:
        raise BalanceError(f"--trace {file} cannot be read ({error.strerror or shown(error)}); name another") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, RecursionError) as error:
        why = "no npz file" if "pickle" in str(error) else shown(error)  # numpy's words advise to load one
        raise BalanceError(f"--trace {file} is no trace of this command ({why}); record one without --trace") from None
    _check(trace, file, config)
    return trace


def _check(trace: Trace, file: Path, config: BailingMoeV2Config) -> None:
    shape, layers = shape_of(config), tuple(config.moe_layer_ids)
    for name, came, wanted in (
        *((key, trace.shape.get(key), value) for key, value in shape.items()),
        ("layers with experts", len(trace.layers), len(layers)),
        ("its first layer with experts", trace.layers[:1], layers[:1]),
    ):
        if came != wanted:
            raise BalanceError(
                f"--trace {file} is of another model, {shown(trace.model)}: {name} is {told(came)} there and "
                f"{told(wanted)} in this one; record one of this model without --trace"
            )
    wanted = (sum(trace.lengths), len(layers), shape["num_experts_per_tok"])
    picks = trace.picks
    if picks.dtype.kind != "u" or picks.shape != wanted or not picks.size or picks.max() >= trace.experts:
        raise BalanceError(
            f"--trace {file} is damaged: picks of shape {picks.shape} and type {picks.dtype}, not {wanted} of "
            f"{trace.experts} experts; record it again"
        )
