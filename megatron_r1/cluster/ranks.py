"""Is this process a rank of a world that somebody else started (torchrun, srun, our own launcher)?

Asked once by `megatron-r1 run`, before anything heavy is imported.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from megatron_r1.config.errors import UserError

# Below Linux's ephemeral ports (32768 and up), so that no outgoing connection holds it.
FIRST_PORT, PORTS = 20000, 10000


def rank_variables(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The torch.distributed variables of this rank, or None if this process is to start the ranks
    itself.

    A rank is what has RANK and WORLD_SIZE (torchrun, our launcher), or is a task of an srun step of
    several tasks. A Slurm *batch script* has SLURM_PROCID=0 as well, but no step: it starts ranks.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, those already set unchanged.

    Raises:
        UserError: under srun, no MASTER_ADDR is set and `scontrol` cannot name the first host.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return {name: environ[name] for name in names if name in environ}
    in_step = "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if "SLURM_PROCID" not in environ or not in_step or tasks < 2:
        return None
    port = FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % PORTS
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def _first_host(environ: Mapping[str, str]) -> str:
    """The step's first host; every rank must get the same answer, so there is no fallback to a
    local name.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    cure = "export MASTER_ADDR=<first host> in the batch script before srun"
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot find this Slurm step's first host: {error}; {cure}") from error
    hosts = shown.stdout.split()
    if not hosts:
        raise UserError(f"scontrol names no host for the node list {nodes!r}; {cure}")
    return hosts[0]
