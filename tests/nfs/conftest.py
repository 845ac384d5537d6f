# SPDX-License-Identifier: Apache-2.0
"""One server and two clients for all tests, and what tests do with them."""

import itertools
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from nodes import LINES, Agent, Cluster  # noqa: E402

FIGURES = {}  # what was measured, for the end of the run


@pytest.fixture(scope="session")
def cluster():
    work = tempfile.mkdtemp(prefix="ucm-nfs-")
    c = Cluster(work)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # then what is below is done, too
    try:
        yield c
    finally:
        c.stop()
        shutil.rmtree(work, ignore_errors=True)


class Share:
    """A fresh directory of the server, as the clients have it mounted, and agents on it."""

    numbers = itertools.count()

    def __init__(self, cluster, version):
        self.cluster, self.version = cluster, version
        self.name = f"t{next(self.numbers)}"
        self.path = f"/mnt/exp/share/{self.name}"  # on the server
        self.agents = []
        cluster.server.sure(f"mkdir -m 777 {self.path}")

    def at(self, client, options=""):
        return self.cluster.mount(client, self.version, options) + "/" + self.name

    def agent(self, client, mount="", **options):
        node = self.cluster.clients[client]
        used = {a.number for a in self.agents if a.alive and a.node is node}
        line = next(i for i in range(1, LINES) if i not in used)
        a = Agent(node, line, self.at(client, mount), **options)
        assert a.opened == "open", a.opened
        self.agents.append(a)
        return a

    def lanes(self):
        return self.cluster.server.sure(f"ls -d {self.path}/ucm/*/r*-* 2>/dev/null; true").split()

    def do(self, command):
        """As a third client would: a server need not notice what is done to its disk directly."""
        self.cluster.clients[1].sure(f"cd {self.at(1, 'nosharecache,noac')} && {command}")

    def seem_silent(self, minutes=2):
        """So much time passes for all lanes, as far as their journals tell."""
        self.do(f"touch -c -d '{minutes} minutes ago' ucm/*/r*-*/journal")

    def close(self):
        for a in self.agents:
            if a.alive:
                a.kill()
        self.cluster.server.sure(f"rm -rf {self.path}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    item.passed = call.when == "call" and not call.excinfo
    return (yield)


@pytest.fixture(params=["3", "4.2"])
def share(request, cluster):
    cluster.mend()
    cluster.clean = False  # until this test has passed, and left nothing behind
    s = Share(cluster, request.param)
    yield s
    if request.node.passed:
        s.close()
        cluster.clean = True


class Timer:
    """From now until it is told, into the table at the end."""

    def __init__(self, share):
        self.share = share

    def note(self, what, since):
        row = FIGURES.setdefault((what, self.share.version), [])
        row.append(1000 * (time.monotonic() - since))


@pytest.fixture
def figures(share):
    return Timer(share)


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.write_line(f"{'from STORED on one client to':52} NFS   times   median      worst")
    for (what, version), v in sorted(FIGURES.items()):
        v = sorted(v)
        terminalreporter.write_line(f"{what:52} {version:5} {len(v):5} {v[len(v) // 2]:6.1f} ms {v[-1]:7.1f} ms")
