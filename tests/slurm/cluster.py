"""A real Slurm of two nodes with stand-in GPUs on this machine, made in a temporary folder and gone afterwards."""

import getpass
import os
import shutil
import socket
import stat
import subprocess
import time
from contextlib import contextmanager

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
GPUS, CPUS = 2, 64  # of each node; the CPUs are on paper only

SLURM_CONF = """
ClusterName=stand-in
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=1,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
KillWait=30
MessageTimeout=60
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no cluster here; None if there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} missing; Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "the stand-in Slurm starts its daemons as root"


def ports(count):
    """Free ports in a row."""
    for first in range(17000, 19000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


@contextmanager
def cluster(folder):
    """Start the daemons; yields the environment in which Slurm's commands reach them."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    host, first = socket.gethostname().split(".")[0], ports(3)
    names = {"host": host, "folder": folder, "user": getpass.getuser(), "cpus": CPUS, "gpus": GPUS}
    text = SLURM_CONF.format(port=first, first=first + 1, last=first + 2, **names)
    (folder / "slurm.conf").write_text(text)
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    daemons = []
    try:
        daemons.append(munge(folder, environment))
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            log = (folder / f"{'-'.join(command)}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_for_nodes(environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, check=False)
        wait_until(lambda: not queue(environment), 60, "jobs did not end")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def munge(folder, environment):
    """Start the authentication daemon with a key of its own."""
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    files = {name: folder / f"munge.{name}" for name in ("key", "socket", "log", "pid", "seed")}
    options = [f"--key-file={files['key']}", f"--socket={files['socket']}", f"--log-file={files['log']}"]
    options += [f"--pid-file={files['pid']}", f"--seed-file={files['seed']}"]
    # --force: the folder's parents may be writable by others, as a temporary folder's are
    log = (folder / "munged.out").open("w")
    daemon = subprocess.Popen(["munged", "--foreground", "--force", *options], env=environment, stdout=log, stderr=log)
    wait_until(files["socket"].exists, 20, "munged did not start")
    return daemon


def queue(environment, job=None):
    """The states of the jobs that have not ended, or of one of them."""
    only = ["-j", str(job)] if job else []
    done = subprocess.run(["squeue", "-h", "-o", "%T", *only], env=environment, capture_output=True, text=True)
    return done.stdout.split()


def wait_for_nodes(environment):
    def idle():
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
        return done.stdout.split() == ["idle", "idle"]

    wait_until(idle, 60, "the nodes did not come up")


def wait_until(condition, seconds, message):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.3)
