"""What `register` changes in a vLLM process, what it leaves alone, and that it can never stop one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoConfig

import vllm_bailing
from tests.support.configs import CONFIGS, write_config
from tests.support.engine import run
from tests.support.registration import load_plugins
from tests.support.zoo import OTHERS, raw_config
from vllm_bailing.plugin.register import Takeover, WhenImported, _register_or_warn

ARCHITECTURE = "BailingMoeV2ForCausalLM"
OURS = "vllm_bailing.model:BailingMoeV2ForCausalLM"
DRAFT, OUR_DRAFT = "BailingMoeV2MTPModel", "vllm_bailing.mtp:BailingMoeV2MTPModel"
INTREE = "vllm.model_executor.models.bailing_moe:BailingMoeV2ForCausalLM"


# config.json files that must reach their own loaders as they are.
FOREIGN = {
    "V1": {"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe", "auto_map": {"AutoConfig": "a.B"}},
    "linear": {
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "model_type": "bailing_moe_linear",
        "auto_map": {"AutoConfig": "a.B"},
        "rotary_dim": 64,
    },
    "V2.5": {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "model_type": "bailing_hybrid",
        "partial_rotary_factor": 0.5,
    },
    "V3": {"architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_hybrid_v3", "num_experts": 512},
}


def registered_models() -> dict[str, str]:
    from vllm import ModelRegistry

    entries = {name: vars(model) for name, model in ModelRegistry.models.items()}
    return {name: f"{entry['module_name']}:{entry['class_name']}" for name, entry in entries.items()}


def pretend_version(version: str) -> None:
    import vllm.version

    setattr(vllm.version, "__version__", version)  # noqa: B010 (type checkers do not see the name there)


def observe(plugins: str | None, folder: str) -> dict:
    """Everything about this process that the plugin could have changed."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    lines = load_plugins(plugins)
    try:
        ours = type(AutoConfig.from_pretrained(Path(folder) / "ours", trust_remote_code=False)).__module__
    except Exception as error:
        ours = type(error).__name__
    return {
        "log": lines,
        "models": registered_models(),
        "config of the family": ours,
        "model types": sorted(CONFIG_MAPPING.keys()),
        "foreign": {name: PretrainedConfig.get_config_dict(Path(folder) / name)[0] for name in FOREIGN},
    }


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write_config(folder / "ours", json.loads((CONFIGS / "Ling-mini-2.0.json").read_text()))
    for name, contents in FOREIGN.items():
        write_config(folder / name, contents)

    @functools.cache
    def observed(plugins: str | None = None, intree: str = "") -> dict:
        return run(observe, plugins, str(folder), env={"VLLM_BAILING_USE_INTREE": intree})

    return observed


@pytest.mark.parametrize("plugins", [None, "bailing", "other,bailing"])
def test_the_family_is_served_by_this_package(plugins, observed):
    seen = observed(plugins)
    assert seen["models"][ARCHITECTURE] == OURS
    assert seen["config of the family"] == "vllm_bailing.config"


@pytest.mark.parametrize("plugins", ["", "other"])
def test_a_plugin_list_without_this_one_leaves_vllm_as_it_is(plugins, observed):
    seen = observed(plugins)
    assert seen["models"][ARCHITECTURE] == INTREE
    assert seen["config of the family"] == "ValueError"  # "requires you to execute the configuration file"
    assert seen["log"] == []


def test_one_info_line_names_what_is_replaced_and_vllms_version(observed):
    import vllm

    ((level, message),) = observed()["log"]
    assert level == "INFO"
    assert ARCHITECTURE in message
    assert f"vLLM {vllm.__version__}" in message
    assert "VLLM_BAILING_USE_INTREE" in message


def test_on_request_vllms_class_stays_and_the_config_is_still_ours(observed):
    seen = observed(None, "1")
    assert seen["models"][ARCHITECTURE] == INTREE
    assert seen["config of the family"] == "vllm_bailing.config"
    ((level, message),) = seen["log"]
    assert (level, "VLLM_BAILING_USE_INTREE is set" in message) == ("INFO", True)


def test_every_other_architecture_resolves_as_without_the_plugin(observed):
    with_it, without = observed()["models"], observed("")["models"]
    assert len(without) > 100
    changed = {name: with_it.get(name) for name in {*with_it, *without} if with_it.get(name) != without.get(name)}
    assert changed == {ARCHITECTURE: OURS, DRAFT: OUR_DRAFT}
    assert DRAFT not in without


def test_one_model_type_is_added_and_no_other_changes(observed):
    with_it, without = observed()["model types"], observed("")["model types"]
    assert len(without) > 100
    assert with_it == sorted([*without, "bailing_moe_v2"])


def test_config_files_of_other_models_are_read_as_they_are(observed):
    assert observed()["foreign"] == FOREIGN == observed("")["foreign"]


# ---- again, and where something is broken ---------------------------------------------------------------------------


def register_again_and_in_a_fork() -> tuple[list, dict, dict]:
    import transformers

    lines = load_plugins(None)
    first, wrapped = registered_models(), transformers.PretrainedConfig.get_config_dict.__func__
    from vllm_bailing import register

    register()
    register()
    assert transformers.PretrainedConfig.get_config_dict.__func__ is wrapped
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(register).result()
        forked = pool.submit(registered_models).result()
    assert first == registered_models()
    return lines, first, forked


def test_registering_again_or_in_a_fork_changes_nothing():
    lines, here, forked = run(register_again_and_in_a_fork)
    assert len(lines) == 1
    assert here == forked
    assert here[ARCHITECTURE] == OURS


def register_with_a_fault(fault: str) -> tuple[list, str]:
    import transformers
    from vllm import ModelRegistry

    def broken(*_args, **_kwargs):
        raise RuntimeError("as broken as can be")

    if fault == "no vllm":
        sys.modules["vllm.logger"] = None  # type: ignore[assignment]
    if fault == "no transformers":
        sys.modules["vllm_bailing.config"] = None  # type: ignore[assignment]
    if fault == "transformers fails":
        transformers.AutoConfig.register = broken
    if fault == "registry fails":
        type(ModelRegistry).register_model = broken
    if fault == "probe fails":
        from vllm_bailing.plugin import supported_versions

        pretend_version("99.0")
        supported_versions.missing_from_vllm = broken
    if fault == "missing symbol":
        from vllm_bailing.plugin import supported_versions

        pretend_version("99.0")
        supported_versions.REQUIRED = (*supported_versions.REQUIRED, ("model_executor/layers", "NoSuchLayer", ""))
    if fault == "too old":
        pretend_version("0.26.1")
    return load_plugins(None), registered_models()[ARCHITECTURE]


@pytest.mark.parametrize(
    ("fault", "fragments"),
    [
        ("no vllm", ["vllm.logger"]),
        ("no transformers", ["vllm_bailing.config"]),
        ("transformers fails", ["as broken as can be"]),
        ("registry fails", ["as broken as can be"]),
        ("probe fails", ["as broken as can be"]),
        ("missing symbol", ["99.0", "NoSuchLayer", "0.27 to 0.33"]),
        ("too old", ["0.26.1", "0.27"]),
    ],
)
def test_where_something_is_broken_one_warning_says_so_and_vllms_class_stays(fault, fragments):
    lines, target = run(register_with_a_fault, fault)
    assert target == INTREE
    ((level, message),) = lines
    assert level == "WARNING"
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def register_with_a_newer_vllm() -> tuple[list, str]:
    pretend_version("99.0")
    return load_plugins(None), registered_models()[ARCHITECTURE]


def test_a_newer_vllm_with_all_that_is_needed_is_served_with_one_warning():
    lines, target = run(register_with_a_newer_vllm)
    assert target == OURS
    assert [level for level, _ in lines] == ["INFO", "WARNING"]
    assert "0.27 to 0.33" in lines[1][1]


MANAGER = """
class Manager:
    known = {}
    @classmethod
    def register_lazy_module(cls, name, *where):
        cls.known[name] = where
"""


def test_a_parser_is_registered_whenever_its_manager_is_imported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)

    def register_with(module):
        module.Manager.register_lazy_module("bailing", "vllm_bailing.parsers", "Parser")

    register = functools.partial(_register_or_warn, register_with)

    texts = {"whole": MANAGER, "broken": "raise ValueError('broken')", "changed": "Manager = None"}
    for name, text in texts.items():
        (tmp_path / f"manager_{name}.py").write_text(text)
        for _ in range(2):  # as after two registrations
            sys.meta_path.insert(0, WhenImported(f"manager_{name}", register))
    for load in (importlib.import_module, lambda name: importlib.reload(sys.modules[name])):
        assert load("manager_whole").Manager.known == {"bailing": ("vllm_bailing.parsers", "Parser")}
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module("manager_broken")
    (tmp_path / "manager_broken.py").write_text(f"{MANAGER}# mended")
    assert list(importlib.import_module("manager_broken").Manager.known) == ["bailing"]
    assert importlib.import_module("manager_changed").Manager is None  # the importer of it must not fail
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert "'NoneType' object has no attribute 'register_lazy_module'" in caplog.records[0].getMessage()


@pytest.mark.parametrize("error", [RuntimeError("as broken as can be"), SystemExit(3), None], ids=repr)
def test_what_a_later_part_cannot_take_over_takes_the_earlier_ones_back(error, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("here", "first", "second", "third"):
        (tmp_path / f"part_{name}.py").write_text("")
        monkeypatch.delitem(sys.modules, f"part_{name}", raising=False)
    taken = []

    def part(module):
        if module.__name__ == "part_second" and error is not None:
            raise error
        taken.append(module.__name__)
        return lambda: taken.remove(module.__name__)

    importlib.import_module("part_here")
    takeover = Takeover()
    for name in ("here", "first", "second", "third"):
        takeover.take(f"part_{name}", part)
    assert taken == ["part_here"]
    importlib.import_module("part_first")
    assert taken == ["part_here", "part_first"]
    for name in ("second", "third"):
        assert importlib.import_module(f"part_{name}").__name__ == f"part_{name}"
    if error is None:
        assert taken == ["part_here", "part_first", "part_second", "part_third"] and not caplog.records
    else:
        assert taken == []
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "could not register with part_second" in record.getMessage()


def test_with_a_part_of_the_package_missing_vllm_is_as_without_it(tmp_path):
    """An installation that was cut off; the file is looked for when the other parts have been taken over."""
    shutil.copytree(Path(vllm_bailing.__file__).parent, tmp_path / "vllm_bailing")
    # Without the file, an editable installation's own finder would look for it in the checkout.
    (tmp_path / "vllm_bailing" / "plugin" / "patches.py").write_text("raise ModuleNotFoundError('as if it were gone')")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import vllm.plugins, vllm_bailing
assert vllm_bailing.__file__.startswith({str(tmp_path)!r})
vllm_bailing.register()
from transformers import CONFIG_MAPPING, PretrainedConfig
from vllm import ModelRegistry
from vllm.config.speculative import SpeculativeConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
print(json.dumps([
    ModelRegistry.models["BailingMoeV2ForCausalLM"].module_name, "BailingMoeV2MTPModel" in ModelRegistry.models,
    "bailing_moe_v2" in CONFIG_MAPPING, PretrainedConfig.get_config_dict.__func__.__module__,
    SpeculativeConfig.hf_config_override.__module__, "BailingMoeV2ForCausalLM" in MODELS_CONFIG_MAP]))
"""
    done = fresh("import json\n" + code)
    intree, ours = "vllm.model_executor.models.bailing_moe", "transformers.configuration_utils"
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [
        intree,
        False,
        False,
        ours,
        "vllm.config.speculative",
        False,
    ]
    assert (done.stdout + done.stderr).count("vLLM continues with its own classes") == 1


# ---- in fresh interpreters ------------------------------------------------------------------------------------------


def fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import vllm_bailing; print(sorted(set(sys.modules) - before))"
    assert fresh(code).stdout.strip() == "['vllm_bailing']"


def test_registering_without_vllm_warns_and_goes_on():
    done = fresh(
        "import sys; sys.modules['vllm'] = None; import vllm_bailing; vllm_bailing.register(); print('goes on')"
    )
    assert done.stdout.strip() == "goes on"
    assert "could not register" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [SystemExit(3), ImportError("gone"), SyntaxError("cut off")], ids=repr)
def test_a_broken_installation_is_a_warning(error, monkeypatch):
    def broken():
        raise error

    said = []
    monkeypatch.setattr(importlib.import_module("vllm_bailing.plugin.register"), "register", broken)
    monkeypatch.setattr(logging.getLogger("vllm.plugins.bailing"), "warning", lambda *words: said.append(words))
    vllm_bailing.register()
    assert len(said) == 1 and "could not register" in said[0][0]


def test_registering_waits_for_the_modules_that_it_concerns():
    """So it costs next to nothing in a process that does without them."""
    code = """
import json, sys
import vllm.plugins
before = set(sys.modules)
import vllm_bailing; vllm_bailing.register()
new = sorted(set(sys.modules) - before)
assert "transformers" not in sys.modules and "vllm.config" not in sys.modules, "the test shows nothing"
from transformers import CONFIG_MAPPING, PretrainedConfig
from vllm import ModelRegistry
from vllm.config.speculative import SpeculativeConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
print(json.dumps([new, ModelRegistry.models["BailingMoeV2ForCausalLM"].module_name,
    ModelRegistry.models["BailingMoeV2MTPModel"].module_name,
    CONFIG_MAPPING["bailing_moe_v2"].__module__, PretrainedConfig.get_config_dict.__func__._adopts_bailing_moe_v2,
    SpeculativeConfig.hf_config_override.__module__, SpeculativeConfig.__post_init__.__module__,
    MODELS_CONFIG_MAP["BailingMoeV2ForCausalLM"].__module__]))
"""
    new, *taken = json.loads(fresh(code).stdout.strip().splitlines()[-1])
    assert [name for name in new if not name.startswith("vllm_bailing")] == []
    patches = "vllm_bailing.plugin.patches"
    assert taken == ["vllm_bailing.model", "vllm_bailing.mtp", "vllm_bailing.config", True, *3 * [patches]]


def test_registering_imports_no_model_code_and_leaves_parsers_and_the_model_for_later():
    code = """
import json, sys
import vllm.engine.arg_utils  # from where vLLM loads plugins first
before = set(sys.modules)
import threading, vllm_bailing
threads = [threading.Thread(target=vllm_bailing.register) for _ in range(8)]  # one line of the log from all
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
new = sorted(set(sys.modules) - before)
imported = "vllm.tool_parsers" in sys.modules
from vllm.parser.parser_manager import ParserManager
parser = ParserManager.get_parser("bailing", "bailing", enable_auto_tools=True)
parsers = [parser.tool_parser_cls.__name__, parser.reasoning_parser_cls.__name__]
from vllm import ModelRegistry
model_class = ModelRegistry.models["BailingMoeV2ForCausalLM"].load_model_cls()  # as a spawned worker does
print(json.dumps([new, imported, parsers, model_class.__module__]))
"""
    done = fresh(code)
    new, imported, parsers, module = json.loads(done.stdout.strip().splitlines()[-1])
    assert not imported and parsers == ["BailingToolParser", "BailingReasoningParser"]
    assert module == "vllm_bailing.model"
    own = {name for name in new if name.startswith("vllm_bailing")}
    parts = ("", ".excepthook", ".patches", ".register", ".supported_versions")
    plugin = {f"vllm_bailing.plugin{name}" for name in parts}
    files = {f"vllm_bailing.{name}" for name in ("config", "errors", "folders", "json_files", "rope", "validation")}
    assert own == {"vllm_bailing"} | files | plugin
    registry = {"registry", "interfaces", "interfaces_base"}  # which `from vllm import ModelRegistry` needs
    settings = {"config"}  # checks of settings by architecture
    models = {name.rsplit(".", 1)[-1] for name in new if name.startswith("vllm.model_executor.models.")}
    assert models <= registry | settings
    assert not any(name.startswith(("vllm.model_executor.layers", "torch.")) for name in new)
    assert len(new) < 30  # measured: 15
    # vLLM loads plugins before it sets up logging; the line is visible all the same, and once.
    assert (done.stdout + done.stderr).count(f"{ARCHITECTURE} (set VLLM_BAILING_USE_INTREE=1") == 1


def inspect_and_resolve(model: str) -> tuple[dict, str, str, dict]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import interfaces

    config = EngineArgs(model=model, skip_tokenizer_init=True, dtype="float32").create_model_config()
    info = dataclasses.asdict(config.registry.inspect_model_cls([ARCHITECTURE], config)[0])
    model_class, architecture = config.registry.resolve_model_cls([ARCHITECTURE], config)
    names = "lora pp eagle eagle3".split()
    supports = {name: bool(getattr(interfaces, f"supports_{name}")(model_class)) for name in names}
    supports["quant"] = issubclass(model_class, interfaces.SupportsQuant)
    supports["mixture_of_experts"] = interfaces.MixtureOfExperts in model_class.__mro__
    return info, architecture, model_class.__module__, supports


def test_vllm_inspects_the_class_in_its_own_subprocess_and_finds_what_it_supports(tmp_path):
    model = write_config(tmp_path / "model", json.loads((CONFIGS / "Ling-mini-2.0.json").read_text()))
    # An empty cache: vLLM keeps what an inspection found.
    info, architecture, module, supports = run(inspect_and_resolve, str(model), env={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert [path.name for path in (tmp_path / "modelinfos").iterdir()] == [
        f"{OURS.replace('.', '-').replace(':', '-')}.json"
    ]
    assert (architecture, info["architecture"], module) == (ARCHITECTURE, ARCHITECTURE, "vllm_bailing.model")
    expected = {
        "is_text_generation_model": True,
        "is_pooling_model": False,
        "supports_pp": True,
        "attn_type": "decoder",
    }
    assert {key: info[key] for key in expected} == expected
    for absent in (
        "supports_multimodal",
        "has_inner_state",
        "is_attention_free",
        "is_hybrid",
        "supports_transcription",
    ):
        assert info[absent] is False
    assert all(supports.values()), supports


def _resolve(raw):
    import vllm_bailing

    vllm_bailing.register()
    from vllm import ModelRegistry

    return (
        ModelRegistry.models[raw["architectures"][0]].module_name
        if raw["architectures"][0] in ModelRegistry.models
        else None
    )


@pytest.mark.parametrize("name", OTHERS)
def test_classes_of_other_architectures_are_vllms_own(name):
    assert not str(run(_resolve, OTHERS[name])).startswith("vllm_bailing")


def test_class_of_the_family_is_this_packages():
    assert run(_resolve, raw_config("Ling-1T")) == "vllm_bailing.model"
