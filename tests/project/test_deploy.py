"""The files below deploy/: valid by their schemas, and every command in them one that vLLM takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.engine import run
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
VALUES = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "0", "$(LWS_LEADER_ADDRESS)": "10.0.0.1"}


def documents(file):
    return [one for one in yaml.safe_load_all((DEPLOY / file).read_text()) if one]


def checked(*command):
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_the_linter():
    checked("hadolint", str(DEPLOY / "Dockerfile"))


def test_the_compose_file_fits_its_schema():
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))


def pods():
    """(name, pod specification) of every pod in the Kubernetes files."""
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in documents(file):
            if document["kind"] == "Deployment":
                yield f"{file.stem}", document["spec"]["template"]
            elif document["kind"] == "LeaderWorkerSet":
                for role in ("leader", "worker"):
                    yield f"{file.stem}-{role}", document["spec"]["leaderWorkerTemplate"][f"{role}Template"]
            elif document["kind"] == "RayService":
                cluster = document["spec"]["rayClusterConfig"]
                for number, group in enumerate([cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]):
                    yield f"{file.stem}-{number}", group["template"]


def test_the_kubernetes_files_fit_their_schemas(tmp_path):
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        known = [one for one in documents(file) if one["kind"] not in ("LeaderWorkerSet", "RayService")]
        if not known:
            continue
        (tmp_path / file.name).write_text(yaml.safe_dump_all(known))
        checked("kubernetes-validate", str(tmp_path / file.name))
    for name, template in pods():  # LeaderWorkerSet and RayService are no part of Kubernetes, their pods are
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template.get("metadata", {})}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**pod, "spec": template["spec"]}))
        checked("kubernetes-validate", str(tmp_path / f"{name}.yaml"))


def test_a_leader_and_its_worker_differ_in_what_they_must():
    (document, _) = documents("kubernetes/two-nodes.yaml")
    template = document["spec"]["leaderWorkerTemplate"]
    leader, worker = (template[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert [*leader["args"], "--headless"] == worker["args"]
    assert leader["image"] == worker["image"] and leader["env"] == worker["env"]
    settings = yaml.safe_load((DEPLOY / "serve" / Path(leader["args"][1]).name).read_text())
    assert settings["pipeline-parallel-size"] == template["size"]
    partition = leader["env"][0]["value"]
    assert partition in (DEPLOY / "serve" / Path(leader["args"][1]).name).read_text()


def _parsed(commands):
    from vllm.entrypoints.cli.main import main  # noqa: F401 (imports what the command imports)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = []
    for command in commands:
        parser = FlexibleArgumentParser()
        ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
        options = vars(parser.parse_args(["serve", *command]))
        found.append({key: options.get(key) for key in ("model", "tensor_parallel_size", "nnodes", "node_rank")})
    return found


def test_every_command_is_one_that_vllm_takes():
    containers = [container for _, template in pods() for container in template["spec"]["containers"]]
    commands = [container["args"] for container in containers if "args" in container]  # Ray's have none
    commands += [service["command"] for service in documents("compose.yaml")[0]["services"].values()]
    filled = []
    for command in commands:
        assert command[0] == "--config" and command[1].startswith("/etc/vllm-bailing/")
        rest = list(command[2:])
        for place, value in VALUES.items():
            rest = [word.replace(place, value) for word in rest]
        filled.append(["--config", str(DEPLOY / "serve" / Path(command[1]).name), *rest])
    # As the chart of the production stack calls vLLM.
    (model,) = documents("production-stack.yaml")[0]["servingEngineSpec"]["modelSpec"]
    sizes = {"--tensor-parallel-size": "tensorParallelSize", "--max-model-len": "maxModelLen"}
    sizes["--max-num-seqs"] = "maxNumSeqs"
    options = [word for flag, key in sizes.items() for word in (flag, str(model["vllmConfig"][key]))]
    filled.append([model["modelURL"], *options, *model["vllmConfig"]["extraArgs"]])
    found = run(_parsed, filled)
    assert [one["tensor_parallel_size"] for one in found] == [4, 8, 8, 4, 4]
    assert [one["nnodes"] for one in found] == [1, 2, 2, 1, 1]


# Keys of the chart that the values use, with their types. Source: vLLM's production stack, helm/values.schema.json,
# which allows unknown ones and does nothing with them.
MODEL = {
    **dict.fromkeys("name repository tag modelURL requestMemory shmSize pvcStorage".split(), str),
    **dict.fromkeys("replicaCount requestCPU requestGPU".split(), int),
    "pvcAccessMode": list,
    "hf_token": {"secretName": str, "secretKey": str},
    "initContainer": {"name": str, "image": str, "command": list},
    "vllmConfig": {
        **dict.fromkeys("tensorParallelSize maxModelLen maxNumSeqs".split(), int),
        "enablePrefixCaching": bool,
        "extraArgs": list,
    },
}
VALUES_OF_THE_CHART = {
    "servingEngineSpec": {
        "modelSpec": [MODEL],
        "startupProbe": dict.fromkeys("initialDelaySeconds periodSeconds failureThreshold".split(), int),
    },
    "routerSpec": {"routingLogic": str, "sessionKey": str},
}


def misfits(values, wanted, where=""):
    """Names of values that are unknown or of another type."""
    if isinstance(wanted, dict) and isinstance(values, dict):
        unknown = [f"{where}{key}" for key in values if key not in wanted]
        known = [key for key in values if key in wanted]
        return unknown + [name for key in known for name in misfits(values[key], wanted[key], f"{where}{key}.")]
    if isinstance(wanted, list) and isinstance(values, list):
        return [name for one in values for name in misfits(one, wanted[0], where)]
    return [] if isinstance(wanted, type) and type(values) is wanted else [where.rstrip(".")]


def test_values_of_the_production_stack_are_known_to_its_chart():
    """By our own list: there is no helm here."""
    (values,) = documents("production-stack.yaml")
    assert misfits(values, VALUES_OF_THE_CHART) == []
    values["servingEngineSpec"]["modelSpec"][0] |= {"initcontainer": {}, "requestGPU": "4"}
    assert misfits(values, VALUES_OF_THE_CHART) == [
        "servingEngineSpec.modelSpec.initcontainer",
        "servingEngineSpec.modelSpec.requestGPU",
    ]
    model = values["servingEngineSpec"]["modelSpec"][0]
    planned = yaml.safe_load((DEPLOY / "serve" / "flash-4xH100.yaml").read_text())
    settings = model["vllmConfig"]
    names = {"tensorParallelSize": "tensor-parallel-size", "maxModelLen": "max-model-len", "maxNumSeqs": "max-num-seqs"}
    assert {name: settings[key] for key, name in names.items()} == {name: planned[name] for name in names.values()}
    assert model["modelURL"] == planned["model"]
    assert model["initContainer"]["image"] == f"{model['repository']}:{model['tag']}"


# Keys that the file for KubeRay uses, with their types. Source: KubeRay, ray-operator/apis/ray/v1/*_types.go.
GROUP = {"rayStartParams": dict, "template": dict}
RAY_SERVICE = {
    "serveConfigV2": str,
    "rayClusterConfig": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "enableInTreeAutoscaling": bool,
        "headGroupSpec": GROUP,
        "workerGroupSpecs": [
            GROUP | {"groupName": str} | dict.fromkeys("replicas minReplicas maxReplicas".split(), int),
        ],
    },
}


def test_the_file_for_kuberay_has_the_keys_of_a_ray_service():
    """By our own list; its pods are checked with those of the other files."""
    (document,) = documents("kubernetes/kuberay.yaml")
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    assert misfits(document["spec"], RAY_SERVICE) == []
    worker = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    specs = [template["spec"] for name, template in pods() if name.startswith("kuberay")]
    containers = [one for spec in specs for one in (*spec["containers"], *spec.get("initContainers", []))]
    assert len(containers) == 3 and len({one["image"] for one in containers}) == 1
    worker["maxreplicas"] = 4
    assert misfits(document["spec"], RAY_SERVICE) == ["rayClusterConfig.workerGroupSpecs.maxreplicas"]


def test_ray_serves_what_was_planned():
    (served,) = documents("ray/serve.yaml")
    (document,) = documents("kubernetes/kuberay.yaml")
    assert yaml.safe_load(document["spec"]["serveConfigV2"]) == served
    (config,) = served["applications"][0]["args"]["llm_configs"]
    planned = yaml.safe_load((DEPLOY / "serve" / "flash-4xH100.yaml").read_text())
    assert config["model_loading_config"]["model_source"] == planned.pop("model")
    planned.pop("shutdown-timeout")  # of vLLM's server, which Ray's stands in for
    assert config["engine_kwargs"] == {name.replace("-", "_"): value for name, value in planned.items()}
    group = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == config["engine_kwargs"]["tensor_parallel_size"]
    scaling = config["deployment_config"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])


@pytest.mark.parametrize("file", sorted(file.name for file in (DEPLOY / "serve").glob("*.yaml")))
def test_the_image_holds_every_planned_configuration(file):
    assert "COPY deploy/serve /etc/vllm-bailing" in (DEPLOY / "Dockerfile").read_text()
    assert yaml.safe_load((DEPLOY / "serve" / file).read_text())["model"].startswith("inclusionAI/")
