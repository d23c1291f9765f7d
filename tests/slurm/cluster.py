"""A real four-node Slurm cluster on one host, for the tests.

Debian's Slurm is built with multiple-slurmd support, so slurmctld and four slurmd run side by side on 127.0.0.1.
Everything lives below one temporary directory and listens on ports that were free a moment before; the one global trace
is the line `127.0.0.1 n1 n2 n3 n4` in /etc/hosts, because the batch script hands node names to the trainer as
MASTER_ADDR.

Needs root (the daemons run as SlurmUser=root without systemd) and
`apt-get install --no-install-recommends slurm-wlm slurm-wlm-basic-plugins`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# Not NODE_FAIL: a job with --requeue passes through it on its way back into the queue.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"}

SLURM_CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# A requeued job waits for its credential to expire; the default makes that 121 s.
AuthInfo=cred_expire=5
SlurmctldPort={controller_port}
SlurmctldPidFile={root}/pid/slurmctld.pid
SlurmdPidFile={root}/pid/slurmd.%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=5
MinJobAge=3600
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
{nodes}
PartitionName=train Nodes=n[1-4] Default=YES MaxTime=1:00:00 DefaultTime=5 State=UP
"""


def missing_requirement() -> str | None:
    """Why no cluster can be started here, or None when one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_search_path()) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} not found)"
    if os.geteuid() != 0:
        return "the Slurm daemons need root"
    return None


@contextlib.contextmanager
def started(root: Path) -> Iterator[SlurmCluster]:
    """A running cluster below `root`. Without Slurm the test is skipped, but where CI=true it fails."""
    reason = missing_requirement()
    if reason is not None:
        # A developer's laptop may lack Slurm; the machine that guards the project may not.
        if os.environ.get("CI") == "true":
            pytest.fail(f"no Slurm cluster can be started: {reason}")
        pytest.skip(f"no Slurm cluster can be started: {reason}")
    cluster = SlurmCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class SlurmCluster:
    """`start` and `stop` the daemons; `environment` is what Slurm's commands and `hsa submit` need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = dict(os.environ)
        # Left-overs of an enclosing job would be taken for settings by sbatch and srun.
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_")):
                del self.environment[name]
        self.environment["SLURM_CONF"] = str(root / "slurm.conf")
        self.environment["PATH"] = _search_path()

    def start(self) -> None:
        for folder in ("pid", "state", "log", "dev", *(f"spool/{node}" for node in NODES)):
            (self.root / folder).mkdir(parents=True)
        _add_host_names()
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        # Eight stand-in GPUs per node: Slurm sets CUDA_VISIBLE_DEVICES only for character devices.
        for index in range(8):
            subprocess.run(["mknod", str(self.root / f"dev/nvidia{index}"), "c", "1", "3"], check=True)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=4000 "
            "Gres=gpu:h800:8 State=UNKNOWN"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        (self.root / "slurm.conf").write_text(
            SLURM_CONF.format(host=host, root=self.root, controller_port=controller_port, nodes=nodes)
        )
        (self.root / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-4] Name=gpu Type=h800 File={self.root}/dev/nvidia[0-7]\n"
        )
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for(
            lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "4", 30, "4 idle nodes"
        )

    def stop(self) -> None:
        """Cancel every job and end the daemons (by their pid files) with whatever they still run."""
        self.run("scancel", "--state=RUNNING", "--state=PENDING", "--user=root", check=False)
        deadline = time.monotonic() + 15
        while self.run("squeue", "-h", "-t", "R,CG", check=False).stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        # Nobody will read the state that they would save.
        for pid_file in sorted((self.root / "pid").glob("*.pid")):
            _end(pid_file, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def lose_node(self, node: str) -> None:
        """As a power cut: slurmd and the steps on the node die at once, then the controller is told that it is down."""
        _end(self.root / f"pid/slurmd.{node}.pid", signal.SIGKILL)
        for pid in _processes_on(node, self.root / "slurm.conf"):
            _kill(pid, signal.SIGKILL)
        # An answer of the dead slurmd that is still on its way to the controller would put the node back to service.
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            if "State=DOWN" not in self.run("scontrol", "show", "node", node).stdout:
                self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
            time.sleep(0.2)

    def restore_node(self, node: str) -> None:
        self.start_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands against this cluster."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
        return done

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", str(job_id)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_until_ended(self, job_id: int, seconds: float) -> str:
        """The final state of a job, once it has one."""
        self.wait_for(lambda: self.job(job_id)["JobState"] in ENDED, seconds, f"job {job_id} to end")
        return self.job(job_id)["JobState"]

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll `condition`; TimeoutError with the queue and the controller's log when it stays false."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                queue = self.run("squeue", "--all", check=False).stdout
                raise TimeoutError(f"waited {seconds} s for {what}\n{queue}\n{self._log_tail()}")
            time.sleep(0.2)

    def _log_tail(self) -> str:
        log = self.root / "log/slurmctld.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""


def _search_path() -> str:
    # slurmctld and slurmd live in /usr/sbin, which not every login shell searches.
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()


def _add_host_names() -> None:
    hosts = Path("/etc/hosts")
    known = {name for line in hosts.read_text().splitlines() for name in line.split("#")[0].split()[1:]}
    if not known.issuperset(NODES):
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(NODES)}\n")


def _processes_on(node: str, conf: Path) -> list[int]:
    """The step daemons of `node` (they first: one that outlives its task reports an ordinary end) and all tasks.

    Another cluster on this host may have a node of that name, hence the configuration file.
    """
    marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={conf}".encode()}
    tasks, daemons = [], []
    for process in Path("/proc").iterdir():
        try:
            if not marks.issubset((process / "environ").read_bytes().split(b"\0")):
                continue
            tasks.append(int(process.name))
            parent = Path(f"/proc/{(process / 'stat').read_text().rpartition(')')[2].split()[1]}")
            if (parent / "cmdline").read_bytes().startswith(b"slurmstepd:"):
                daemons.append(int(parent.name))
        except OSError:
            continue  # no process, or one that has just ended
    return daemons + tasks


def _end(pid_file: Path, number: signal.Signals) -> None:
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    _kill(pid, number)
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid_file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
