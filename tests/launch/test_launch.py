"""What launch/ holds, without a cluster: scripts parse and do what they say with stand-ins, the manifest fits JobSet's schema."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset.schema.json").read_text())
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))


def manifest():
    return yaml.safe_load((LAUNCH / "kubernetes_jobset.yaml").read_text())


def pod(document):
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]


def flags_of(text):
    return set(re.findall(r"--(xla_\w+)=", text))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name):
    assert os.access(LAUNCH / name, os.X_OK)
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_manifest_fits_the_schema():
    jsonschema.validate(manifest(), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["spec"].update(replicatedJob=[]),
        lambda d: pod(d).update(completion=8),
        lambda d: pod(d).update(parallelism="eight"),
        lambda d: pod(d)["template"]["spec"]["containers"][0].pop("name"),
        lambda d: d.update(kind="Job"),
    ],
    ids=[
        "unknown field",
        "unknown field of the job",
        "a number as text",
        "a container without name",
        "another kind",
    ],
)
def test_the_schema_refuses_mistakes(change):
    document = manifest()
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_manifest_agrees_with_itself():
    job = pod(manifest())
    [container] = job["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(given["JAX_PROCESS_COUNT"])
    assert f"--config.mesh.data={job['completions']}" in container["args"]
    host, port = given["JAX_COORDINATOR_ADDRESS"].split(":")
    name, workers = manifest()["metadata"]["name"], manifest()["spec"]["replicatedJobs"][0]["name"]
    assert host == f"{name}-{workers}-0-0.{name}"
    assert {entry["containerPort"] for entry in container["ports"]} == {int(port), int(port) + 1}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in job["template"]["spec"]["volumes"]
    }


def test_the_compiler_knows_the_gpu_flags():
    """XLA ends a process that is given a flag which it does not know."""
    flags = flags_of((LAUNCH / "slurm.sh").read_text())
    assert (
        flags == flags_of((LAUNCH / "kubernetes_jobset.yaml").read_text())
        and "xla_gpu_enable_latency_hiding_scheduler" in flags
    )
    values = dict(re.findall(r"--(xla_\w+)=(\w+)", (LAUNCH / "slurm.sh").read_text()))
    environment = os.environ | {
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in values.items()),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (2, False), (3, False), (4, True), (1, True), (137, True)]
)
def test_slurm_runs_and_requeues(tmp_path, code, requeued):
    """With stand-ins for srun and scontrol: what is started, and which exit codes put the job back."""
    (tmp_path / "bin").mkdir()
    stand_ins = {
        "srun": f'echo "srun $*" >> {tmp_path}/log; env | grep ^XLA >> {tmp_path}/log; exit {code}\n',
        "scontrol": f'echo "scontrol $*" >> {tmp_path}/log\n',
        "activate": "",
    }
    for name, body in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "4",
        "FP8JAX_VENV": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "--config=configs/fp8_base.py:8b", "--workdir=/shared/x y"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    log = (tmp_path / "log").read_text()
    assert done.returncode == code, done.stderr
    assert (
        "python train.py --config.mesh.data=4 --config.mesh.fsdp=8 --config=configs/fp8_base.py:8b --workdir=/shared/x y"
        in log
    )
    assert (
        "XLA_PYTHON_CLIENT_ALLOCATOR=default" in log and ("scontrol requeue 7" in log) == requeued
    )


def test_the_tpu_recipe_prints_its_commands():
    environment = os.environ | {"DRY_RUN": "1", "TPU": "mine", "TYPE": "v5p-64", "BUCKET": "/mnt/b"}
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "--config=configs/fp8_base.py:8b"],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.replace("\\", "").splitlines()
    assert (
        done.returncode == 0
        and len(lines) == 3
        and all(line.startswith("gcloud compute tpus tpu-vm") for line in lines)
    )
    assert "create mine" in lines[0] and "--accelerator-type=v5p-64" in lines[0]
    assert (
        "train.py --config.mesh.fsdp=-1 --workdir='/mnt/b/run' --config=configs/fp8_base.py:8b"
        in lines[2]
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name):
    subprocess.run(["shellcheck", LAUNCH / name], check=True)
