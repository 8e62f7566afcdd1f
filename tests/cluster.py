"""A Slurm cluster of two nodes on this machine, under a folder of its own, for as long as a test needs it.

munged, slurmctld and two slurmd with their own key, ports and files; nothing of the machine's own Slurm is read or touched.
Partition `main`, and `urgent`, whose jobs preempt those of `main`: SIGTERM, and after GraceTime the end.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
NODES = ("rcm1", "rcm2")
CONF = """
ClusterName=rcm
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:8 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


def why_not():
    """Why no cluster can be started here, or nothing."""
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as their users"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else ""


def free_ports(count):
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(condition, seconds, what):
    """What `condition` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.05)
    return value


class Cluster:
    """Commands of Slurm, told of this cluster."""

    def __init__(self, root):
        self.root, self.env = root, os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def ask(self, *command, check=True, **options):
        """Output of a command."""
        done = subprocess.run([*map(str, command)], env=self.env, capture_output=True, text=True, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def facts(self, job):
        """What `scontrol show job` says, by its keys."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)

    def has_ended(self, job):
        return self.facts(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "PREEMPTED", "CONFIGURING")


@contextmanager
def cluster():
    """A cluster whose nodes are idle; everything it started has ended afterwards."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        root.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (root / name).mkdir()
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        for name in [f"gpu{i}" for i in range(8)]:
            (root / name).touch()  # files stand for devices: jobs ask for GPUs and get numbers
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-7]\n")
        conf = CONF.format(host=socket.gethostname().partition(".")[0], ports=free_ports(3), nodes=NODES, root=root)
        (root / "slurm.conf").write_text(conf)
        slurm = Cluster(root)

        def start(*command):
            with (root / f"{command[0]}-{command[-1].rpartition('/')[2]}.log").open("w") as log:
                daemon = subprocess.Popen([*command], env=slurm.env, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)

        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={root}/munge.{name}" for option, name in files.items()]
        start("munged", "--foreground", "--force", *options, f"--socket={root}/munge.socket")
        until((root / "munge.socket").exists, 20, "munged")
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)

        def logs():
            return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in root.glob("*.log"))

        until(lambda: slurm.ask("sinfo", "-h", "-p", "main", "-o", "%T %D", check=False) == "idle 2", 60, logs)
        try:
            yield slurm
        finally:
            slurm.ask("scancel", "--user=root", check=False)
            until(lambda: not slurm.ask("squeue", "-h", check=False), 60, "the jobs are ending")
