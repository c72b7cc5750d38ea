"""Who started this process, from what launchers leave in the environment."""

import pytest

from fp8jax.config import ConfigError
from fp8jax.parallel import launchers
from fp8jax.parallel.launchers import Launch, find

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
POD = {"JOB_COMPLETION_INDEX": "3", "JAX_PROCESS_COUNT": "8"}
CPU = {"JAX_PLATFORMS": "cpu"}


def test_alone():
    assert find({}) is None and find(CPU) is None
    # A batch script without srun, and a step of one task.
    assert (
        find({key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}) is None
    )
    assert find(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find(POD | {"JAX_PROCESS_COUNT": "1", "JAX_COORDINATOR_ADDRESS": "x:1"}) is None
    assert find({}, coordinator_address="a:1", num_processes=1, process_id=0) is None


def test_slurm():
    found = find(SLURM)
    assert found == Launch("Slurm", "gpu07:61912", 32, 11, [3])
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "0"}).devices is None  # srun has chosen
    assert (
        find(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x32)", "SLURM_LOCALID": "0"}).devices is None
    )  # a process a node takes all
    assert find(SLURM, coordinator_address="me:9000").address == "me:9000"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("a[3-5],b", "a3"),
        ("a[003,7]", "a003"),
        ("r1-a[2]-ib", "r1-a2-ib"),
    ],
)
def test_node_lists(nodes, first):
    assert find(SLURM | {"SLURM_STEP_NODELIST": nodes}).address.startswith(f"{first}:")


def test_open_mpi():
    assert find(MPI, coordinator_address="head:8476") == Launch("Open MPI", "head:8476", 4, 2, [0])
    assert find(
        MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    ).address.startswith("10.96.0.1:6")
    with pytest.raises(ConfigError, match="--coordinator_address"):
        find(MPI)


def test_kubernetes(monkeypatch):
    monkeypatch.setattr(
        launchers.socket, "getfqdn", lambda: "fp8jax-workers-0-3.fp8jax.default.svc.cluster.local"
    )
    assert find(POD) == Launch(
        "Kubernetes", "fp8jax-workers-0-0.fp8jax.default.svc.cluster.local:8476", 8, 3
    )
    assert find(POD | {"JAX_COORDINATOR_ADDRESS": "pod-0.run:9"}).address == "pod-0.run:9"
    monkeypatch.setattr(launchers.socket, "getfqdn", lambda: "loose")
    with pytest.raises(ConfigError, match="headless service"):
        find(POD)
    with pytest.raises(ConfigError, match="JAX_PROCESS_COUNT"):
        find({"JOB_COMPLETION_INDEX": "3"})


def test_tpu_pods(monkeypatch):
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: object())
    workers = {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}
    assert find(workers) == Launch("TPU pod", None, 0, 0, method="gketpu")
    assert find(workers | CPU) is None and find({"TPU_WORKER_HOSTNAMES": "a"}) is None
    assert find({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}).method == "gketpu"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "--num_processes, --process_id: need each other"),
        ({"coordinator_address": "a:1", "process_id": 0}, "need each other"),
        (
            {"coordinator_address": "a", "num_processes": 2, "process_id": 0},
            "--coordinator_address=a: not HOST:PORT",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: not one of 2 processes, 0 to 1",
        ),
        ({"coordinator_address": "a:1"}, "no launcher was found"),
    ],
)
def test_half_of_the_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        find(CPU, **flags)


def test_a_launcher_that_says_nonsense():
    with pytest.raises(ConfigError, match="SLURM_NTASKS: 'many' is not a number"):
        find(SLURM | {"SLURM_NTASKS": "many"})
