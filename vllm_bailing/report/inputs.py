"""Files that a report is made of: what the other commands print with `--json`, told apart by their keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_bailing.errors import ReportError, shown
from vllm_bailing.json_files import Unreadable, read_json

Count = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Shape(BaseModel):
    """The part of a result that a page shows; keys that a newer command adds stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class GpuShape(_Shape):
    name: str


class BoundShape(_Shape):
    batch: Count
    tokens_per_s: float
    limit: str


class PlanShape(_Shape):
    """Of `plan --json`; bytes are those of one GPU."""

    model: str
    gpu: GpuShape
    gpus: Count
    replicas: Count = 1
    layout: str
    dtype: str
    kv_dtype: str
    context: Count
    concurrency: Count
    draft_tokens: Count
    memory_utilization: float
    weights: dict[str, Count]
    other: dict[str, Count]
    kv_room_bytes: Count
    kv_tokens: Count
    verdict: str
    reason: str
    largest_concurrency: Count
    single: BoundShape
    batch: BoundShape
    notes: list[str]
    serve: str


class ComparisonShape(_Shape):
    tokens: Count
    mean: float
    max: float
    divergence: float
    agreement: float


class LimitsShape(_Shape):
    mean: float
    divergence: float


class ShiftShape(_Shape):
    part: str
    size: float
    error: float
    significance: float
    share: float | None = None


class CoverageShape(_Shape):
    vocabulary: float
    experts: list[float] = []


class VerifyShape(_Shape):
    """Of `verify --json`; deviations in nats. A measure is what came and the most that is right."""

    checkpoint: str
    deployment: str
    dtype: str
    tolerance: LimitsShape | None = None
    prompts: list[ComparisonShape]
    words: ComparisonShape | None = None
    overall: ComparisonShape
    measures: dict[str, tuple[float, float]] = {}
    shifts: list[ShiftShape] = []
    coverage: CoverageShape | None = None
    computes: bool
    reason: str
    looks_like: str = ""
    not_checked: str = ""


class CheckShape(_Shape):
    """A line of `doctor --json`."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


class RangeShape(_Shape):
    median: float
    low: float
    high: float


class MtpRow(_Shape):
    batch_size: Count
    arm: str
    tokens_per_second: RangeShape
    ratio: RangeShape
    acceptance: list[float]
    acceptance_length: float


class MtpShape(_Shape):
    """Of `bench mtp`."""

    model: str = ""
    rows: list[MtpRow]
    versions: dict[str, Any] = {}
    advice: dict[str, str] = {}


class CompareRow(_Shape):
    figure: str
    unit: str
    arm: str
    median: float
    low: float
    high: float
    ratio: float
    interval: tuple[float, float]
    noise: float
    verdict: str


class CompareShape(_Shape):
    """Of `bench compare`."""

    model: str
    engine: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    rows: list[CompareRow]
    versions: dict[str, Any] = {}
    notes: list[str] = []
    command: str = ""
    date: str = ""


class AcceptanceShape(_Shape):
    """A kind of text of `bench mtp --url --json`."""

    drafts: Count
    acceptance: list[float]
    interval: list[tuple[float, float]]


class LoadRow(_Shape):
    layer: Count
    busiest: Count
    most: float
    least: float
    never: Count


class CopiesShape(_Shape):
    redundant: Count
    imbalance: float
    bytes: Count


class RanksRow(_Shape):
    ep: Count
    linear: float
    round_robin: float
    eplb: Annotated[list[CopiesShape], Field(min_length=1)]
    worth: CopiesShape
    even: float
    waiting: float
    waiting_with_eplb: float


class BalanceShape(_Shape):
    """Of `balance --json`; loads are times an even share."""

    model: str
    requests: Count
    tokens: Count
    experts: Count
    experts_per_token: Count
    step_tokens: Count
    load: Annotated[list[LoadRow], Field(min_length=1)]
    ranks: list[RanksRow]


@dataclass(frozen=True)
class Kind:
    """A kind of result: the command that makes it, the keys by which it is told, and what it has to hold."""

    made_by: str
    keys: frozenset[str]
    shape: TypeAdapter[Any]


KINDS = {
    "plan": Kind("plan --json", frozenset({"kv_room_bytes", "verdict", "gpu"}), TypeAdapter(PlanShape)),
    "verify": Kind("verify --json", frozenset({"computes", "overall", "prompts"}), TypeAdapter(VerifyShape)),
    "doctor": Kind("doctor --json", frozenset({"name", "ok", "detail"}), TypeAdapter(list[CheckShape])),
    "compare": Kind("bench compare", frozenset({"arms", "rows"}), TypeAdapter(CompareShape)),
    "mtp": Kind("bench mtp", frozenset({"batch_size", "arm"}), TypeAdapter(MtpShape)),
    "acceptance": Kind(
        "bench mtp --url --json", frozenset({"drafts", "acceptance"}), TypeAdapter(dict[str, AcceptanceShape])
    ),
    "balance": Kind("balance --json", frozenset({"load", "ranks"}), TypeAdapter(BalanceShape)),
    "info": Kind("info --json", frozenset({"vllm-bailing", "active"}), TypeAdapter(dict[str, Any])),
}


@dataclass(frozen=True)
class Result:
    """A file: which of `KINDS` it is, what it holds, checked, and the same as it was read."""

    file: str
    kind: str
    value: Any
    read: Any = field(repr=False)


def read_result(file: Path) -> Result:
    """What a file holds.

    Raises:
        ReportError: If that is no result of one of `KINDS`.
    """
    name = shown(str(file))
    try:
        read = read_json(file)
    except ValueError as error:
        reason = error.reason if isinstance(error, Unreadable) else ""
        said = f"{name}: {reason}; name a file with a result" if reason else f"{name} {error}; {_WANTED}"
        raise ReportError(said) from None
    kind = next((kind for kind, known in KINDS.items() if known.keys <= _keys(read, kind)), None)
    if kind is None:
        raise ReportError(f"{name} is JSON of something else; {_WANTED}")
    try:
        return Result(file.name, kind, KINDS[kind].shape.validate_python(read), read)
    except ValidationError as error:
        first = error.errors()[0]
        where = shown(".".join(map(str, first["loc"])), 80)
        made_by = f"`vllm-bailing {KINDS[kind].made_by}`"
        reason = f"{where}: {shown(first['msg'], 80)}" if where else shown(first["msg"], 80)
        raise ReportError(f"{name} looks like a result of {made_by}, but {reason}; make it again") from None


def _keys(read: Any, kind: str) -> set[str]:
    """The keys of a result that tell its kind: of a list, or of what stands for one, those of its first entry."""
    if kind == "acceptance" and isinstance(read, dict):
        read = list(read.values())
    if kind == "mtp" and isinstance(read, dict):
        read = read.get("rows")
    if kind in ("doctor", "mtp", "acceptance"):
        read = read[0] if isinstance(read, list) and read else None
    return set(read) if isinstance(read, dict) else set()


def _wanted(made_by: Iterable[str]) -> str:
    *others, last = made_by
    return f"give the result of {', '.join(others)} or {last}"


_WANTED = _wanted(kind.made_by for kind in KINDS.values())
