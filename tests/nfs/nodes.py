# SPDX-License-Identifier: Apache-2.0
"""Computers for tests: User-mode Linux, a server of NFS and two clients of it.

Each is a process of ours with a kernel of its own, in a PID namespace of its own, so that nothing
of it is left when it, or we, are killed.  They are wired by socket pairs, so nothing of the host's
network is used; the host's files are theirs too (hostfs), so they run what is built here.  Lines to
be carried out go over a serial line, and the test agents (tests/support/agent.c) that run within
talk over others.
"""

import base64
import ctypes
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import time
import typing

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = pathlib.Path(os.environ.get("UCM_BUILD", ROOT / "build")).resolve()
LINES = 5  # serial lines a node has: one for commands, the others for agents
LATE_S = 240  # who has not answered by then hangs: longer than an RPC that is lost and sent again (60 s)


class Server(typing.NamedTuple):
    """A kind of server: what it is started with, and what is known of it."""

    start: tuple
    stop: str  # it answers nothing from now on
    go_on: str
    leases: str = ""  # tells what it has lent to its clients, if it ever does


# The export is / to v4 and /mnt/exp/share to v3, leases and grace end after 10 s.
DISK = (
    "mkdir -p /mnt/exp && mount /dev/ubda /mnt/exp",
    "mkdir -p /mnt/exp/share /mnt/exp/.state/{{nfsdcld,v4recovery,sm,sm.bak,ganesha}}",
    "chmod 777 /mnt/exp/share && mount --bind /mnt/exp/.state /var/lib/nfs",
    "touch /var/lib/nfs/{{etab,rmtab,state}}",
)
GANESHA = """
NFS_CORE_PARAM {{ Protocols = 3, 4; Enable_UDP = false; }}
NFSv4 {{ Lease_Lifetime = 10; Grace_Period = 10; RecoveryBackend = fs; }}
EXPORT {{ Export_Id = 1; Path = /mnt/exp/share; Pseudo = /; Protocols = 3, 4; Access_Type = RW;
          Squash = No_Root_Squash; SecType = sys; FSAL {{ Name = VFS; }} }}
"""
SERVERS = {
    "kernel": Server(start=(
        "modprobe -d {work}/root lockd nlm_grace_period=10",
        "modprobe -d {work}/root nfsd",
        "mount -t nfsd nfsd /proc/fs/nfsd && mount -t rpc_pipefs rpc /run/rpc_pipefs",
        "echo 10 >/proc/fs/nfsd/nfsv4leasetime && echo 10 >/proc/fs/nfsd/nfsv4gracetime",
        "rpcbind && nfsdcld -p /run/rpc_pipefs && rpc.statd && rpc.mountd",
        "exportfs -o rw,no_root_squash,fsid=0,insecure,no_subtree_check '*:/mnt/exp/share'",
        "rpc.nfsd 4",
    ), stop="rpc.nfsd 0", go_on="rpc.nfsd 4", leases="cat /proc/fs/nfsd/clients/*/states"),
    "ganesha": Server(start=(
        "rpcbind && rpc.statd",
        f"echo '{GANESHA}' >/run/ganesha.conf".replace("\n", " "),
        "ganesha.nfsd -f /run/ganesha.conf -p /run/ganesha.pid -L /run/ganesha.log",
        "timeout 80 sh -c 'until grep -q \"NOT IN GRACE\" /run/ganesha.log; do sleep 0.1; done'"
        " || {{ cat /run/ganesha.log; false; }}",
    ), stop="kill -STOP $(cat /run/ganesha.pid)", go_on="kill -CONT $(cat /run/ganesha.pid)"),
}
SERVER = SERVERS[os.environ.get("UCM_NFS_SERVER", "kernel")]


def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Gone(Exception):
    """The node, or the program, has ended."""


class Line:
    """One serial line of a node, from the host's side."""

    def __init__(self):
        self.inside_in, self.out = os.pipe()
        self.into, self.inside_out = os.pipe()
        self.have = b""

    def close(self):
        for fd in (self.inside_in, self.out, self.into, self.inside_out):
            os.close(fd)

    def drain(self):
        """What the last program on it left behind."""
        while select.select([self.into], [], [], 0)[0]:
            os.read(self.into, 65536)
        self.have = b""

    def send(self, text):
        os.write(self.out, text.encode() + b"\n")

    def receive(self, late_s=LATE_S):
        until = time.monotonic() + late_s
        while b"\n" not in self.have:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.into], [], [], left)[0]:
                raise TimeoutError(f"nothing came for {late_s} s; so far: {self.have!r}")
            self.have += os.read(self.into, 65536)
        line, self.have = self.have.split(b"\n", 1)
        return line.decode().strip("\r")


class Node:
    def __init__(self, work, name, wires, memory_mb=256, disk=None):
        """wires: (address within, our end of a socket pair) for each interface."""
        self.work, self.name, self.wires = pathlib.Path(work), name, wires
        self.memory_mb, self.disk = memory_mb, disk
        self.process = None
        self.lines = []
        self.living = None  # all processes of the node have the other end

    def start(self):
        shutil.rmtree(self.work / self.name, ignore_errors=True)  # its pid file: that pid is another's now
        self.lines = [Line() for _ in range(LINES)]
        fds = [fd for line in self.lines for fd in (line.inside_in, line.inside_out)]
        fds += [end.fileno() for _, end in self.wires]
        args = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
                "linux.uml", f"mem={self.memory_mb}M", "rootfstype=hostfs", "rootflags=/", "rw",
                f"init={HERE}/init", f"uml_dir={self.work}", f"umid={self.name}", "quiet",
                "con=null", "con0=null,fd:1", f"ucmt_node={self.name}", f"ucmt_work={self.work}",
                "ucmt_net=" + ",".join(address for address, _ in self.wires)]
        args += [f"ssl{i}=fd:{line.inside_in},fd:{line.inside_out}"
                 for i, line in enumerate(self.lines)]
        for i, (_, end) in enumerate(self.wires):
            mac = f"02:00:00:00:{i:02x}:{sum(self.name.encode()) % 256:02x}"
            args.append(f"vec{i}:transport=fd,fd={end.fileno()},depth=128,mac={mac}")
        if self.disk:
            args.append(f"ubd0={self.disk}")
        self.living, lives = os.pipe()
        with open(self.work / f"{self.name}.console", "ab") as log:
            self.process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            pass_fds=[*fds, lives], preexec_fn=end_with_parent)
        os.close(lives)

    def await_ready(self):
        if self.lines[0].receive() != "ready":
            raise Gone(f"{self.name} did not start: {self.console()}")

    def console(self):
        return (self.work / f"{self.name}.console").read_text(errors="replace")[-4000:]

    def run(self, command, late_s=LATE_S):
        """Carries out a line of shell; its status and what it said."""
        self.lines[0].send(command)
        status, _, text = self.lines[0].receive(late_s).partition(" ")
        return int(status), base64.b64decode(text).decode(errors="replace")

    def sure(self, command, late_s=LATE_S):
        status, text = self.run(command, late_s)
        if status:
            raise RuntimeError(f"{self.name}: {command}: status {status}: {text}")
        return text

    def kill(self):
        """As a power cut does: at once, nothing written back."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
            if not select.select([self.living], [], [], LATE_S)[0]:
                raise TimeoutError(f"{self.name} does not die")
            os.close(self.living)
            for line in self.lines:
                line.close()
            self.lines = []


class Agent:
    """A store in a process on a node, told what to do line by line."""

    def __init__(self, node, line, directory, **options):
        self.node, self.number, self.line = node, line, node.lines[line]
        self.log = f"/run/agent{line}"
        given = {"store_pipeline": "Posix", "storage_backends": directory, "shard_size": 32768,
                 "block_size": 65536, "posix_segment_mb": 1, "@entries": 64,
                 "lookup_timeout_ms": 20000, "timeout_ms": 60000, "posix_stall_ms": 60000}
        given.update(options)
        text = "".join(f"{key}={value}\n" for key, value in given.items())
        path = node.work / f"{node.name}.{line}.options"
        path.write_text(text)
        self.line.drain()
        self.alive = True
        self.pid = int(node.sure(
            f"setsid {BUILD}/tests/support/agent \"$(cat {path})\" "
            f"</dev/ttyS{line} >/dev/ttyS{line} 2>{self.log} & echo $!"))
        self.opened = self.line.receive()

    def ask(self, text, late_s=LATE_S):
        self.line.send(text)
        return self.line.receive(late_s)

    def said(self):
        return self.node.sure(f"cat {self.log}")

    def quit(self):
        answer = self.ask("quit")
        if answer != "bye":
            raise Gone(f"{self.node.name}: an agent said {answer!r}: {self.said()}")
        self.alive = False

    def metric(self, name):
        return int(self.ask(f"metric {name}"))

    def kill(self):
        self.alive = False
        if self.node.process:
            self.node.sure(f"kill -9 {self.pid}; while [ -e /proc/{self.pid} ]; do sleep 0.05; done")


class Cluster:
    """A server with a disk of its own, which outlives it, and two clients."""

    def __init__(self, work):
        self.work = pathlib.Path(work)
        (self.work / "root/lib").mkdir(parents=True)
        (self.work / "root/lib/modules").symlink_to("/usr/lib/uml/modules")
        disk = self.work / "export.img"
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        self.server = Node(work, "server", [(f"10.0.{i}.1", pair[0]) for i, pair in enumerate(pairs)],
                           disk=disk)
        self.clients = [Node(work, name, [(f"10.0.{i}.2", pairs[i][1])])
                        for i, name in enumerate("ab")]
        self.nodes = self.server, *self.clients
        self.mounted = [set(), set()]
        self.clean = False

    def start(self):
        """All of it anew."""
        self.stop()
        with open(self.server.disk, "wb") as f:
            f.truncate(512 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.server.disk], check=True)
        for mounted in self.mounted:
            mounted.clear()
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.await_ready()
        for node in self.clients:
            self.set_up_client(node)
        self.serve()
        self.clean = True

    def set_up_client(self, node):
        node.sure(f"for m in nfs nfsv3 nfsv4; do modprobe -d {self.work}/root $m; done; "
                  "rpcbind && rpc.statd --no-notify")

    def serve(self):
        for command in (*DISK, *SERVER.start):
            self.server.sure(command.format(work=self.work))

    def mount(self, client, version, options=""):
        """Where the export is, on that client."""
        node = self.clients[client]
        at = f"/mnt/{version}{options}".replace(",", "_").replace("=", "")
        if at not in self.mounted[client]:
            path = "/" if version.startswith("4") else "/mnt/exp/share"
            node.sure(f"mkdir -p {at} && mount -t nfs -o vers={version},tcp{options and ',' + options} "
                      f"10.0.{client}.1:{path} {at}")
            self.mounted[client].add(at)
        return at

    def restart_server(self):
        """The same computer, after a power cut."""
        self.server.start()
        self.server.await_ready()
        self.serve()

    def restart_client(self, client):
        node = self.clients[client]
        self.mounted[client].clear()
        node.start()
        node.await_ready()
        self.set_up_client(node)

    def mend(self):
        """Starts what a test has killed, or all if it has failed."""
        if not self.clean:
            self.start()
        self.clean = False
        if not self.server.process:
            self.restart_server()
        for i, node in enumerate(self.clients):
            if not node.process:
                self.restart_client(i)
        self.clean = True

    def stop(self):
        for node in self.nodes:
            node.kill()
