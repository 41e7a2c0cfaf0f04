"""Kinds of input beside the files of models: settings, vocabularies, prompts, conversations, answers, tokenizers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.answers import read_calls, read_thoughts
from tests.support.fuzz.examine import Kind
from tests.support.fuzz.mutate import HOSTILE, damaged, hazard, mutated, readable, text_of
from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.errors import SettingsError

VOCABULARY = 1024  # of the demo
IDS = [5, 9, 17, 300, 1023]
SWITCHES = ("bailing_fp32_router", "bailing_fused_qk_norm_rope", "bailing_cpu_kernels")


def _write(file: Path, text: bytes, rng: random.Random, hazards: float = 0.03) -> None:
    file.write_bytes(text)
    if rng.random() < hazards:
        hazard(file, rng)


def _engine(additional: Any) -> Any:
    return SimpleNamespace(
        additional_config=additional, model_config=SimpleNamespace(hf_config=SimpleNamespace(vocab_size=VOCABULARY))
    )


# ---- draft vocabularies, --additional-config ------------------------------------------------------------------------


def _make_vocabulary(folder: Path, rng: random.Random) -> None:
    ids: Any = mutated(list(IDS), rng, values=[0, 1, 1023, 1024, 5, -1]) if rng.random() < 0.9 else rng.choice(HOSTILE)
    _write(folder / "ids.json", text_of(ids, rng), rng, 0.1)


def _read_vocabulary(folder: Path) -> Any:
    from vllm_bailing.plugin.options import draft_vocabulary

    return draft_vocabulary(_engine({"bailing_draft_vocab": str(folder / "ids.json")}))


def _judge_vocabulary(folder: Path, found: Any) -> str:
    meant = sorted(set(json.loads((folder / "ids.json").read_text())))
    right = found == meant and all(type(one) is int and 0 <= one < VOCABULARY for one in found)
    return "" if right else f"{found}, not {meant}"


def _make_settings(folder: Path, rng: random.Random) -> None:
    given: dict[str, Any] = {key: rng.choice((True, False, None)) for key in SWITCHES if rng.random() < 0.5}
    if rng.random() < 0.5:
        given["bailing_draft_vocab"] = rng.choice((IDS, str(folder / "ids.json")))
    (folder / "ids.json").write_text(json.dumps(IDS))
    given["other"] = {"a": 1}
    given = mutated(
        given, rng, keys=[*SWITCHES, "bailing_draft_vocab", "bailing_fp32_routr"], values=(True, False, IDS)
    )
    (folder / "given.json").write_bytes(readable(text_of(given, rng, damage=0)))


def _read_settings(folder: Path) -> Any:
    from vllm_bailing.plugin.options import check_switches, draft_vocabulary

    given = json.loads((folder / "given.json").read_text())  # vLLM has read it already
    named = given.get("bailing_draft_vocab") if isinstance(given, dict) else None
    if isinstance(named, str) and not named.startswith(str(folder)):
        given["bailing_draft_vocab"] = str(folder / named.strip("/."))  # a file that the user names may be opened
    engine = _engine(given)
    check_switches(engine)
    return draft_vocabulary(engine)


def _judge_settings(folder: Path, found: Any) -> str:
    given = json.loads((folder / "given.json").read_text())
    given = given if isinstance(given, dict) else {}
    bad = {key: given[key] for key in SWITCHES if not (given.get(key) is None or isinstance(given[key], bool))}
    unknown = [key for key in given if "bailing" in key and key not in (*SWITCHES, "bailing_draft_vocab")]
    return f"{bad} {unknown} passed" if bad or unknown else ""


# ---- options of commands --------------------------------------------------------------------------------------------


def _make_option(folder: Path, rng: random.Random) -> None:
    value = mutated({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "dequantize": True}, rng)
    _write(folder / "option", text_of(value, rng, damage=0.4), rng, 0)


def _read_option(folder: Path) -> Any:
    from vllm_bailing.cli.options import json_object

    return json_object("--hf-overrides", (folder / "option").read_bytes().decode("utf-8", "replace"))


def _judge_option(folder: Path, found: Any) -> str:
    meant = json.loads((folder / "option").read_bytes().decode("utf-8", "replace"))
    return "" if repr(found) == repr(meant) else "another value"


# ---- prompts, conversations, functions, notes of a search ----------------------------------------------------------

ROWS = [
    {"prompt": "What is 2 + 2?", "kind": "math"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\u2028there"}]},
    {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
]
KEYS = "prompt messages role content tools tool_calls chat_template_kwargs kind name tokenize".split()


def _make_prompts(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        lines = rng.sample(["Hello", "", "  ", "Was ist los?", "a\u2028b", "\x1b[2J", "x" * 2000, "{}"], 4)
        _write(folder / "prompts.txt", damaged("\n".join(lines).encode(), rng, 0.3), rng, 0.1)
        return
    rows = [text_of(mutated(row, rng, keys=KEYS), rng, 0.05) for row in rng.sample(ROWS, 2)]
    _write(folder / "prompts.jsonl", b"\n".join(rows), rng, 0.05)


def _prompt_file(folder: Path) -> Path:
    return next(file for file in sorted(folder.iterdir()))


def _read_prompts(folder: Path) -> Any:
    from vllm_bailing.tools.prompts import read_prompts

    prompts = read_prompts(_prompt_file(folder))
    return prompts, [prompt.token_ids(_tokenizer()) for prompt in prompts]


_cache: dict[str, Any] = {}


def _tokenizer() -> Any:
    if "tokenizer" not in _cache:
        from transformers import AutoTokenizer

        _cache["tokenizer"] = AutoTokenizer.from_pretrained(str(DEMO))
    return _cache["tokenizer"]


def _judge_prompts(folder: Path, found: Any) -> str:
    prompts, ids = found
    file = _prompt_file(folder)
    lines = [line for line in file.read_bytes().decode().replace("\r\n", "\n").split("\n") if line.strip()]
    if file.suffix == ".txt":
        said = [prompt.messages[0]["content"] for prompt in prompts]
        return "" if said == lines else f"{said}, not {lines}"
    meant = [json.loads(line) for line in lines]
    said = [row.get("messages") or [{"role": "user", "content": row.get("prompt")}] for row in meant]
    right = [repr(prompt.messages) for prompt in prompts] == [repr(one) for one in said]
    right = right and all(isinstance(token, int) for row in ids for token in row)
    return "" if right else f"{prompts}, not {meant}"


def _make_conversation(folder: Path, rng: random.Random) -> None:
    kept = {
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    }
    _write(folder / "kept.json", text_of(mutated(kept, rng, keys=[*KEYS, "system"]), rng), rng, 0.1)


def _read_conversation(folder: Path) -> Any:
    from vllm_bailing.tools.chat import Chat

    conversation = Chat(None, "demo")  # type: ignore[arg-type]
    conversation.load(folder / "kept.json")
    return conversation.system, conversation.messages


def _judge_conversation(folder: Path, found: Any) -> str:
    meant = json.loads((folder / "kept.json").read_text())
    is_right = repr(found) == repr((meant["system"], meant["messages"])) and isinstance(found[0], (str, type(None)))
    return "" if is_right else f"{found}"[:300]


def _make_functions(folder: Path, rng: random.Random) -> None:
    _write(folder / "tools.json", text_of(mutated(ROWS[2]["tools"], rng), rng), rng, 0.1)


def _read_functions(folder: Path) -> Any:
    import contextlib
    import io

    import typer

    from vllm_bailing.cli import chat

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return chat._functions(folder / "tools.json")
    except typer.Exit:
        line, *more = said.getvalue().splitlines()
        if more or not line.isprintable() or len(line) > 1500:
            raise SystemError(f"chat says {said.getvalue()[:200]!r}") from None
        raise


def _judge_functions(folder: Path, found: Any) -> str:
    return "" if repr(found) == repr(json.loads((folder / "tools.json").read_text())) else "other functions"


ROW = {"tokens": 8, "config": {"BLOCK_SIZE_M": 16}, "ms": 0.5}
TILE = [16, 32, 64, 1, 4, 3]


def _make_notes(folder: Path, rng: random.Random) -> None:
    lines: list[Any] = [{"key": {"a": 1}}, *({"tokens": size, "config": list(TILE), "ms": 0.5} for size in (1, 8, 64))]
    lines = [mutated(line, rng) if rng.random() < 0.4 else line for line in lines]
    text = b"\n".join(text_of(line, rng, 0.03) for line in lines)
    _write(folder / "table.partial.jsonl", damaged(text, rng), rng, 0.03)


def _read_notes(folder: Path) -> Any:
    from vllm_bailing.tuning.search import Notes

    return Notes.resume(folder / "table.partial.jsonl", {"a": 1})


def _judge_notes(folder: Path, found: Any) -> str:
    """It can be gone on with: all times that are known are numbers above 0, or None."""
    good = all(ms is None or (type(ms) in (int, float) and 0 < ms < float("inf")) for ms in found._times.values())
    return "" if good else f"{found._times}"


# ---- answers of a model ---------------------------------------------------------------------------------------------

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<", "</tool_", "<tool_call>\n", "\n</tool_call>"),
    *('{"name": "f1", "arguments": {"k": "2"}}', '{"name": "f3", "arguments": ', '{"4": "', '"}', "}", '"', "[", "]"),
    *("5", " ", "\n", "\\", "ü", "\u2028", "\x1b", "\x00", "\ud800", "null", "NaN", "1e999", '"\\ud800"', ","),
    *("[" * 900, "9" * 4400, '{"a":' * 900, '"name"', '"arguments"', '"parameters"', ":", " " * 3000, "x" * 3000),
]


def _make_answer(folder: Path, rng: random.Random) -> None:
    text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.choice((3, 8, 20, 60))))
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.choice((0, 1, 5, 40))))
    parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    (folder / "answer.json").write_text(json.dumps(parts))


def _read_answer(folder: Path) -> Any:
    parts = json.loads((folder / "answer.json").read_text())
    return read_calls(*parts), read_thoughts(False, *parts), read_thoughts(True, *parts)


def _judge_answer(folder: Path, found: Any) -> str:
    parts = json.loads((folder / "answer.json").read_text())
    text = "".join(parts)
    if found != (read_calls(text), read_thoughts(False, text), read_thoughts(True, text)):
        return "not the same as the whole text"
    for name, arguments in found[0][1]:
        if not name.strip() or not isinstance(json.loads(arguments), dict):
            return f"{name} {arguments} is no call"
    return ""


# ---- tokenizers, generation_config.json -----------------------------------------------------------------------------

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATES = [
    *(
        "{{ 1/0 }}",
        "{% for %}",
        "{{ messages[99].content }}",
        "{{ raise_exception('no\\n\\x1b[2J') }}",
        "",
        "{{ x.y.z }}",
    ),
    *("{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages }}" * 50),
    *("{% for a in range(10000000) %}{% for b in range(10000000) %}{% endfor %}{% endfor %}", "{% set x = cycler %}"),
]


def _make_tokenizer(folder: Path, rng: random.Random) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder / name)
    (folder / "config.json").write_text((DEMO / "config.json").read_text())
    (folder / "text").write_text("The capital of France is Paris.\n")
    name = rng.choice(TOKENIZER_FILES)
    file = folder / name
    if name.endswith("jinja"):
        lines = file.read_text().splitlines()
        if rng.random() < 0.4:
            lines = [rng.choice(TEMPLATES)]
        else:
            lines.insert(rng.randrange(len(lines)), rng.choice(TEMPLATES))
        text = damaged("\n".join(lines).encode(), rng, 0.3)
    else:
        text = text_of(mutated(json.loads(file.read_text()), rng), rng)
    _write(file, text, rng, 0.05)


def _read_tokenizer(folder: Path) -> Any:
    from vllm_bailing.tools import doctor
    from vllm_bailing.tools.draft_vocab import choose_tokens

    checks = list(doctor._template(folder, read_config(folder)))
    _require_clear(checks)
    return checks, choose_tokens(str(folder), [folder / "text"], 30)


def _require_clear(checks: Any) -> None:
    for check in checks:
        for text in (check.detail, check.fix):
            if not text.isprintable() or len(text) > 1500:
                raise SystemError(f"a check says {text[:200]!r}")


def _judge_tokenizer(folder: Path, found: Any) -> str:
    from tokenizers import Tokenizer

    checks, chosen = found
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("The capital of France is Paris.\n").ids
    is_there = set(ids) <= set(chosen.token_ids) or len(chosen.token_ids) == 30
    return "" if is_there and checks[0].ok is not False else f"{ids} are not all in {chosen.token_ids}, {checks[0]}"


def _make_generation(folder: Path, rng: random.Random) -> None:
    values = {"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.7, "top_p": 0.8, "do_sample": True}
    keys = "bos_token_id eos_token_id max_new_tokens suppress_tokens top_k transformers_version".split()
    _write(folder / "generation_config.json", text_of(mutated(values, rng, keys, (1023, 1024, [5], 5)), rng), rng, 0.1)
    (folder / "config.json").write_text((DEMO / "config.json").read_text())


def _read_generation(folder: Path) -> Any:
    from vllm_bailing.tools import doctor

    checks = list(doctor._generation_config(folder, VOCABULARY))
    _require_clear(checks)
    if "vllm_config" in _cache:  # by scripts/dev/fuzz.py, which has vLLM
        from vllm_bailing.plugin.checks import check_stop_tokens

        model_config = _cache["vllm_config"]
        model_config.model = model_config.hf_config_path = str(folder)
        try:
            check_stop_tokens(model_config)
        except SettingsError as error:
            return [*checks, SimpleNamespace(ok=False, detail=str(error))]
    return checks


def _judge_generation(folder: Path, checks: Any) -> str:
    file = folder / "generation_config.json"
    try:
        values = json.loads(file.read_bytes() if file.is_file() else b"")
        eos = values.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        is_right = all(type(one) is int and 0 <= one < VOCABULARY for one in ids)
    except (ValueError, AttributeError, OSError, RecursionError):
        is_right = False
    problems = [check for check in checks if check.ok is False]
    if is_right or problems:
        return ""
    return f"nothing is said of {file.read_bytes()[:80]!r}" if file.exists() else ""


KINDS = {
    "draft vocabularies": Kind(_make_vocabulary, _read_vocabulary, _judge_vocabulary),
    "--additional-config": Kind(_make_settings, _read_settings, _judge_settings),
    "options in JSON": Kind(_make_option, _read_option, _judge_option),
    "prompts": Kind(_make_prompts, _read_prompts, _judge_prompts, (str(DEMO),)),
    "conversations": Kind(_make_conversation, _read_conversation, _judge_conversation),
    "functions of chat": Kind(_make_functions, _read_functions, _judge_functions),
    "notes of tune": Kind(_make_notes, _read_notes, _judge_notes),
    "answers, for the parsers": Kind(_make_answer, _read_answer, _judge_answer),
    "tokenizer files": Kind(_make_tokenizer, _read_tokenizer, _judge_tokenizer),
    "generation_config.json": Kind(_make_generation, _read_generation, _judge_generation),
}
