"""Find what started this process and which of how many it is, from flags or from the launcher's
environment variables.

    found = find(os.environ, coordinator_address=None, num_processes=None, process_id=None)     # None: alone

Slurm (`srun`), Open MPI, Kubernetes (an Indexed Job, alone or in a JobSet) and Cloud TPU machines
are supported, and three flags for all others. No other machine is contacted here, and JAX is not
started.
"""

import importlib.util
import pathlib
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from fp8jax.config import ConfigError

_PORT = 8476


class Launch(NamedTuple):
    """One process among others.

    Attributes:
        by: name of the launcher.
        address: HOST:PORT of process 0; with None, JAX finds it by `method`, and number and count
            as well.
        devices: numbers of the local devices that are this process's; None for all.
        method: method of `jax.distributed.initialize`, if JAX is to find the rest.
    """

    by: str
    address: str | None
    count: int
    process: int
    devices: list[int] | None = None
    method: str = "deactivate"


def find(
    environment: Mapping[str, str],
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """Return the launch that this process belongs to; None if it is alone.

    Raises:
        ConfigError: the flags or the launcher's variables are incomplete.
    """
    given = coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is not None or process_id is not None:
        return _by_flags(given, num_processes, process_id)
    for known in (_slurm, _open_mpi, _kubernetes, _tpu):
        found = known(environment, given)
        if found is not None:
            return found if found.count != 1 else None
    if coordinator_address:
        raise ConfigError(
            f"--coordinator_address={coordinator_address}: needs --num_processes and "
            f"--process_id: no launcher was found"
        )
    return None


def _by_flags(address: str | None, count: int | None, process: int | None) -> Launch | None:
    if not address or count is None or process is None:
        raise ConfigError(
            "--num_processes, --process_id: need each other and --coordinator_address=HOST:PORT "
            "of process 0"
        )
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65535):
        raise ConfigError(
            f"--coordinator_address={address}: not HOST:PORT, for example 10.0.0.1:{_PORT}"
        )
    if not 0 <= process < count:
        raise ConfigError(f"--process_id={process}: not one of {count} processes, 0 to {count - 1}")
    return Launch("flags", address, count, process) if count > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"environment variable {name}: {text!r} is not a number; say --coordinator_address, "
            f"--num_processes and --process_id"
        )
    return int(text)


def _slurm(environment: Mapping[str, str], given: str | None) -> Launch | None:
    """Return the launch of a step started by `srun`; a batch script or a shell by itself has no
    step's node list.
    """
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes or "SLURM_PROCID" not in environment:
        return None
    # The job's number makes the port, so that two jobs on a node do not meet.
    address = (
        given or f"{_first_node(nodes)}:{60000 + _number(environment, 'SLURM_JOB_ID') % 2500 * 2}"
    )
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local = environment.get("SLURM_LOCALID", "")
    devices = (
        [int(local)]
        if tasks and int(tasks.group()) > 1 and local.isdecimal() and not _bound(environment)
        else None
    )
    return Launch(
        "Slurm",
        address,
        _number(environment, "SLURM_NTASKS"),
        _number(environment, "SLURM_PROCID"),
        devices,
    )


def _first_node(nodes: str) -> str:
    """Return the first node of a list as Slurm writes it: 'gpu1,gpu7', 'gpu[07-09,12],x1',
    'rack1-gpu[3]-ib'.
    """
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _bound(environment: Mapping[str, str]) -> bool:
    """Return whether the launcher shows each process one GPU already."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and "," not in visible


def _open_mpi(environment: Mapping[str, str], given: str | None) -> Launch | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    count, process = (
        _number(environment, "OMPI_COMM_WORLD_SIZE"),
        _number(environment, "OMPI_COMM_WORLD_RANK"),
    )
    several = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > 1 and not _bound(
        environment
    )
    devices = [_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")] if several else None
    # Open MPI 4 exports where mpirun runs, on the node of process 0; its successor does not.
    address = given or _mpirun_address(environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if count > 1 and address is None:
        raise ConfigError(
            "Open MPI does not say where process 0 is: add --coordinator_address=HOST:PORT, "
            "HOST the first of mpirun's hosts"
        )
    return Launch("Open MPI", address, count, process, devices)


def _mpirun_address(uri: str) -> str | None:
    """Return the address in '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'; the job's number makes
    the port.
    """
    found = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if not found:
        return None
    job, host, host6 = found.groups()
    return f"{host or f'[{host6}]'}:{60000 + (int(job) >> 12) % 2500 * 2}"


def _kubernetes(environment: Mapping[str, str], given: str | None) -> Launch | None:
    """Return the launch of a pod of an Indexed Job; it has its index, and JAX_PROCESS_COUNT must
    give the count.
    """
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if "JAX_PROCESS_COUNT" not in environment:
        if not importlib.util.find_spec("kubernetes"):
            raise ConfigError(
                "environment variable JAX_PROCESS_COUNT: missing; in the pods of an Indexed Job "
                "set it to spec.completions "
                "(1: each pod runs for itself), as launch/kubernetes_jobset.yaml does"
            )
        return Launch(
            "Kubernetes", None, 0, _number(environment, "JOB_COMPLETION_INDEX"), method="k8s"
        )
    process = _number(environment, "JOB_COMPLETION_INDEX")
    return Launch(
        "Kubernetes",
        given or _first_pod(socket.getfqdn()),
        _number(environment, "JAX_PROCESS_COUNT"),
        process,
    )


def _first_pod(name: str) -> str:
    """Return pod 0's address from a pod's name: 'run-workers-0-3.run.ns.svc.cluster.local' →
    'run-workers-0-0.run.ns...'.
    """
    pod, dot, domain = name.partition(".")
    if not dot or not re.search(r"-\d+$", pod):
        raise ConfigError(
            f"Kubernetes: pod {name} has no name in a headless service; set spec.subdomain, or "
            f"JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    return re.sub(r"-\d+$", "-0", pod) + f".{domain}:{_PORT}"


def _tpu(environment: Mapping[str, str], given: str | None) -> Launch | None:
    """Return the launch of a Cloud TPU machine: GKE's environment names the others, or JAX asks
    Google's server.
    """
    there = any(pathlib.Path("/dev", name).exists() for name in ("accel0", "vfio/0"))
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if (
        environment.get("JAX_PLATFORMS", "tpu") != "tpu"
        or not importlib.util.find_spec("libtpu")
        or not (there or workers)
    ):
        return None
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if workers and slices * len(workers.split(",")) == 1:
        return None
    if not workers and environment.get("TPU_SKIP_MDS_QUERY"):
        return None
    return Launch("TPU pod", None, 0, 0, method="gketpu" if workers else "gcetpu")
