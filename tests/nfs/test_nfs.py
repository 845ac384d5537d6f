# SPDX-License-Identifier: Apache-2.0
"""Two computers on one directory of an NFS server, with default mount options."""

import random
import time

import pytest

from nodes import BUILD, LATE_S, SERVER

MANY = 64


def dots(n):
    return "." * n


def sees(reader, figures, what, first, n, there=None):
    """The first question after STORED finds all, and the first load brings it right.  there: what
    the owner finds, where that may be less than all: what it has just evicted others may still find."""
    there = there or "1" * n
    since = time.monotonic()
    found = reader.ask(f"lookup {first} {n}")
    loaded = reader.ask(f"load {first} {n}")
    figures.note(what, since)
    assert len(found) == len(loaded) == n
    for has, f, l in zip(there, found, loaded):
        assert (f, l) == ("1", ".") if has == "1" else l in ".-", f"{there}\n{found}\n{loaded}"


def until(so, late_s=LATE_S):
    """What comes by itself some time."""
    deadline = time.monotonic() + late_s
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def harmless(letters):
    """Right, absent, or refused because storage, or the file, is away: nothing else may come of a fault."""
    return not letters.strip(".-aits")


# ---- what is stored is there for others ----


def test_first_block_of_a_namespace(share, figures):
    a, b = share.agent(0), share.agent(1)
    for _ in range(3):  # it has looked for lanes that are not there
        assert b.ask("lookup 0 8") == "0" * 8
    assert a.ask("dump 0 8") == dots(8)
    sees(b, figures, "the first block of a namespace", 0, 8)


def test_first_namespace_of_a_directory(share, figures):
    """Neither client has had the directory before, one may only read it."""
    share.cluster.clients[1].sure(f"ls -la {share.at(1)}")
    a = share.agent(0)
    b = share.agent(1)
    assert a.ask("dump 0 8") == dots(8)
    sees(b, figures, "the first block of a namespace", 0, 8)


def test_lanes_come_up_in_any_order(share, figures):
    b = share.agent(1)
    for i in range(3):
        a = share.agent(0)  # each has a lane of its own
        assert b.ask(f"lookup {i} 1") == "0"
        assert a.ask(f"dump {i} 1") == "."
        sees(b, figures, "the first block of a lane", i, 1)
    assert len(share.lanes()) >= 3  # the reader has one to tell what it has used


def test_both_write_and_read(share, figures):
    both = share.agent(0), share.agent(1)
    for i in range(20):
        writer, reader = both[i % 2], both[1 - i % 2]
        assert writer.ask(f"dump {8 * i} 8") == dots(8)
        sees(reader, figures, "the next blocks", 8 * i, 8)


def test_segments_are_added(share, figures):
    a, b = share.agent(0), share.agent(1)
    for i in range(6):  # 15 blocks fill a segment
        assert a.ask(f"dump {MANY * i} {MANY}") == dots(MANY)
        sees(b, figures, "blocks in new segments", MANY * i, MANY)


def test_slots_are_used_again_and_journals_compacted(share, figures):
    """The reader has had every slot in its hands before, with other blocks in it."""
    a = share.agent(0, posix_capacity_gb=12 / 1024)
    b = share.agent(1)
    for i in range(40):
        assert a.ask(f"dump {MANY * i} {MANY}") == dots(MANY), a.said()
        there = a.ask(f"load {MANY * i} {MANY}").translate({ord("."): "1", ord("-"): "0"})
        assert there.count("1") > MANY // 2  # the last to come are of one age, and some may go
        sees(b, figures, "blocks in slots used before", MANY * i, MANY, there)
    assert a.metric("disk_compacted_total") >= 1
    assert a.metric("disk_evicted_total") > 1000
    assert b.metric("disk_bad_total") == 0


def test_segments_come_again_under_the_same_name(share, figures):
    """Those of a lane that shrank are gone for its reader, and are there again later."""
    b = share.agent(1)
    for round_, capacity in enumerate((16, 2, 16)):
        a = share.agent(0, posix_capacity_gb=capacity / 1024)
        for i in range(2):
            first = 1000 * round_ + MANY * i
            letters = a.ask(f"dump {first} {MANY}")
            assert not letters.strip(".f"), letters
            there = a.ask(f"load {first} {MANY}").translate({ord("."): "1", ord("-"): "0"})
            sees(b, figures, "blocks in segments made again", first, MANY, there)
        a.quit()
    assert b.metric("disk_bad_total") == 0


# ---- owners that are not what they seem ----


def test_owner_without_locks_lets_go(share):
    """Locks are local to each client, and the owner has seemed silent for a minute: both believe
    that the lane is theirs, until the epoch tells."""
    lock = "local_lock=all" if share.version == "3" else "nosharecache"
    a, b = share.agent(0, lock), share.agent(1, lock)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    if share.version != "3":
        share.do("rm ucm/*/r*/lock")  # v4 has no local locks
    share.seem_silent()
    assert b.ask(f"dump 1000 {MANY}") == dots(MANY)
    assert b.metric("disk_lanes_adopted_total") == 1
    letters = a.ask(f"dump 2000 {MANY}")  # it does not know yet
    assert harmless(letters), letters
    assert a.metric("disk_lanes_lost_total") == 1
    until(lambda: a.ask(f"dump 3000 {MANY}") == dots(MANY))  # in a lane of its own, after a pause
    for reader in (a, b):
        # What was on its way when the lane changed hands may have met what came in its place.
        for first, sure in ((0, True), (1000, False), (2000, False), (3000, True)):
            letters = reader.ask(f"load {first} {MANY}")
            assert not letters.strip(".-!"), letters
            assert not sure or letters == dots(MANY), (first, letters)
    assert len(share.lanes()) == 2


def test_owner_that_was_stopped(share):
    """The same, of an owner that was stopped for long: it asks before it writes anything."""
    lock = "local_lock=all" if share.version == "3" else "nosharecache"
    a, b = share.agent(0, lock), share.agent(1, lock)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    share.cluster.clients[0].sure(f"kill -STOP {a.pid}; sleep 16")  # longer than between its beats
    if share.version != "3":
        share.do("rm ucm/*/r*/lock")
    share.seem_silent()
    assert b.ask(f"dump 1000 {MANY}") == dots(MANY)
    assert b.metric("disk_lanes_adopted_total") == 1
    share.cluster.clients[0].sure(f"kill -CONT {a.pid}")
    assert harmless(a.ask(f"dump 2000 {MANY}"))
    assert a.metric("disk_lanes_lost_total") == 1
    for reader in (a, b):
        for first in (0, 1000):
            assert reader.ask(f"load {first} {MANY}") == dots(MANY)


@pytest.mark.parametrize("share", ["3"], indirect=True)  # v4 has no locks that are local
def test_two_owners_at_a_time(share):
    """Lanes change hands again and again while both write: no byte is wrong whoever loses."""
    both = [share.agent(i, "local_lock=all", posix_capacity_gb=8 / 1024) for i in (0, 1)]
    rnd = random.Random(7)
    for i in range(1, 30):
        for agent in both:
            agent.line.send(f"dump {MANY * rnd.randrange(i)} {MANY}")
        share.seem_silent()
        for agent in both:
            letters = agent.line.receive()
            assert harmless(letters.replace("f", "i")), letters
        for agent in both:
            agent.line.send(f"load {MANY * rnd.randrange(i)} {MANY}")
        for agent in both:
            letters = agent.line.receive()
            assert not letters.strip(".-!"), letters
    assert sum(agent.metric("disk_lanes_lost_total") for agent in both) > 0


def test_killed_client(share):
    """Its blocks are there for others at once; its lane is theirs after a silent minute, or ten
    where the server keeps the locks of the dead (NFS v3)."""
    a, b = share.agent(0), share.agent(1)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    (lane,) = share.lanes()
    assert b.ask(f"load 0 {MANY}") == dots(MANY)
    until(lambda: len(share.lanes()) == 2)  # b has one to tell what it has used, so it needs no other
    a.line.send(f"dump 1000 {MANY}")
    share.cluster.clients[0].kill()
    a.alive = False
    assert b.ask(f"load 0 {MANY}") == dots(MANY)
    letters = b.ask(f"load 1000 {MANY}")
    assert not letters.strip(".-"), letters
    lock = f"{share.at(1)}/ucm/{lane.split('/ucm/')[1]}/lock"

    def locked():
        return share.cluster.clients[1].run(
            f"python3 -c 'import fcntl, os; f = os.open(\"{lock}\", os.O_WRONLY); "
            "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)'")[0]

    if share.version == "3":
        assert locked()
        share.seem_silent(11)
    else:
        until(lambda: not locked())  # its lease is over
        share.seem_silent()
    c = share.agent(1)
    assert c.ask("dump 2000 1") == "."
    assert c.metric("disk_lanes_adopted_total") == 1
    assert lane.split("/")[-1] in c.said()
    for reader in (b, c):
        assert reader.ask(f"load 0 {MANY}") == dots(MANY)
    share.cluster.restart_client(0)
    a = share.agent(0)
    assert a.ask(f"load 0 {MANY}") == dots(MANY)
    assert a.ask("load 2000 1") == "."


@pytest.mark.skipif(not SERVER.leases, reason="this server lends nothing")
@pytest.mark.parametrize("share", ["4.2"], indirect=True)
def test_no_lock_is_lent(share):
    """A server lends files (delegations).  Had it lent a lock to who dies, those who open it next
    would stand still until the lease is over."""
    small = {"posix_capacity_gb": 4 / 1024}  # so they see whether others want room, too
    agents = [share.agent(i % 2, **small) for i in range(3)]
    for i, agent in enumerate(agents):
        for first in range(0, 3 * MANY, MANY):
            letters = agent.ask(f"dump {1000 * i + first} {MANY}")
            assert not letters.strip(".f"), letters
            assert harmless(agent.ask(f"load {first} {MANY}"))
    lent = share.cluster.server.sure(f"{SERVER.leases} | grep 'type: deleg' || true")
    assert '/lock"' not in lent, lent


# ---- owners that sleep ----


def test_idle_owner_gives_room(share):
    """It has all there is, does nothing, and lives on another node than the one that needs some."""
    a, b = (share.agent(i, posix_capacity_gb=12 / 1024) for i in (0, 1))
    for first in range(0, 4 * MANY, MANY):
        assert a.ask(f"dump {first} {MANY}") == dots(MANY)

    def has_room():
        letters = b.ask("dump 5000 8")
        assert not letters.strip(".f"), letters
        return b.ask("load 5000 8") == dots(8)

    until(has_room)
    assert b.metric("disk_lanes_adopted_total") == 0


def test_idle_owner_answers_the_tool(share):
    """Asked from another node."""
    a = share.agent(0)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    share.cluster.clients[1].sure(f"{BUILD}/tools/ucm rm --all --timeout-s 80 {share.at(1)}")
    assert a.ask(f"load 0 {MANY}") == "-" * MANY


# ---- a server that goes and comes ----


def test_server_restarts_under_load(share):
    """Hard mounts, the default: what was STORED before is there after, also from who waited."""
    both = [share.agent(i) for i in (0, 1)]
    for i, agent in enumerate(both):
        assert agent.ask(f"dump {1000 * i} {MANY}") == dots(MANY)
    stored = []
    for i in range(4):
        for n, agent in enumerate(both):
            agent.line.send(f"dump {1000 * n + MANY * (i + 1)} {MANY}")
        if i == 1:
            share.cluster.server.kill()
            share.cluster.restart_server()
        for n, agent in enumerate(both):
            letters = agent.line.receive(200)
            assert harmless(letters), letters
            stored += [1000 * n + MANY * (i + 1) + k for k, c in enumerate(letters) if c == "."]
    assert len(stored) >= 2 * MANY
    for reader in both:
        for first in (0, 1000):
            assert reader.ask(f"load {first} {MANY}", 200) == dots(MANY)
        for key in random.Random(1).sample(stored, 32):
            assert reader.ask(f"load {key} 1") == ".", key


def until_done(agent, question, answer, late_s=90):
    """A server that has just come back takes its time, locks most of all."""
    def done():
        said = agent.ask(question)
        assert harmless(said), said
        return said == answer

    until(done, late_s)


@pytest.mark.parametrize("share", ["3"], indirect=True)  # v4 waits, soft or not: docs/reliability.md
def test_soft_mount_whose_server_is_away(share):
    """Calls end with errors; the store goes on without, and with it again when it is back."""
    soft = "soft,timeo=20,retrans=1"
    a, b = (share.agent(i, soft, timeout_ms=5000, lookup_timeout_ms=500, posix_stall_ms=1000)
            for i in (0, 1))
    until_done(a, f"dump 0 {MANY}", dots(MANY))
    until_done(b, f"load 0 {MANY}", dots(MANY))
    share.cluster.server.sure(SERVER.stop)
    for agent in (a, b):
        for verb in ("lookup", "load", "dump", "load", "lookup"):
            letters = agent.ask(f"{verb} 0 {MANY}")
            assert verb == "lookup" or harmless(letters), letters
        letters = agent.ask("dump 5000 4")
        assert harmless(letters) and "." not in letters, letters
    share.cluster.server.sure(SERVER.go_on)
    for agent in (a, b):
        until_done(agent, f"load 0 {MANY}", dots(MANY))
    for agent, first in ((a, 6000), (b, 7000)):
        until_done(agent, f"dump {first} {MANY}", dots(MANY))
    until_done(b, f"load 6000 {MANY}", dots(MANY))
    until_done(a, f"load 7000 {MANY}", dots(MANY))


# ---- files that go ----


def test_lane_removed_on_the_server(share):
    """ESTALE wherever it is met is a miss, and a new lane is made."""
    a, b = share.agent(0), share.agent(1)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    assert b.ask(f"load 0 {MANY}") == dots(MANY)
    share.do("rm -rf ucm/*/r*")
    for agent in (b, a):
        letters = agent.ask(f"load 0 {MANY}")
        assert not letters.strip(".-i"), letters
    until_done(a, f"dump 1000 {MANY}", dots(MANY), 60)
    assert b.ask(f"lookup 1000 {MANY}") == "1" * MANY
    assert b.ask(f"load 1000 {MANY}") == dots(MANY)
    assert b.ask(f"lookup 0 {MANY}") == "0" * MANY


def test_namespace_removed_on_the_server(share):
    a, b = share.agent(0), share.agent(1)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    assert b.ask(f"load 0 {MANY}") == dots(MANY)
    share.do("rm -rf ucm")
    until_done(a, f"dump 1000 {MANY}", dots(MANY), 60)
    assert b.ask(f"lookup 1000 {MANY}") == "1" * MANY
    assert b.ask(f"load 1000 {MANY}") == dots(MANY)


def test_silly_renames(share):
    """A file that is removed on the client that has it open stays for a while as .nfs*: it is no
    lane, no segment, and gone in the end."""
    a, a2, b = share.agent(0), share.agent(0), share.agent(1)
    assert a.ask(f"dump 0 {MANY}") == dots(MANY)
    for reader in (a2, b):
        assert reader.ask(f"load 0 {MANY}") == dots(MANY)
    share.cluster.clients[0].sure(f"rm {share.at(0)}/ucm/*/r*/seg-000001 {share.at(0)}/ucm/*/r*/journal")
    assert ".nfs" in share.cluster.server.sure(f"ls -a {share.path}/ucm/*/r*")
    for agent in (a2, b, a):
        letters = agent.ask(f"load 0 {MANY}")
        assert not letters.strip(".-i"), letters
    until_done(a, f"dump 1000 {MANY}", dots(MANY), 60)
    assert b.ask(f"lookup 1000 {MANY}") == "1" * MANY
    assert b.ask(f"load 1000 {MANY}") == dots(MANY)
    for agent in (a, a2, b):
        agent.quit()
    assert ".nfs" not in share.cluster.server.sure(f"ls -aR {share.path}")


# ---- what is asked of the mount ----


@pytest.mark.parametrize("options, said, warned", [
    ("", "hard", False), ("soft", "soft", False), ("nolock", "nolock", True),
    ("local_lock=all", "local_lock=all", True)])
def test_stat_sees_the_mount(share, options, said, warned):
    if share.version != "3" and "lock" in options:
        options, said, warned = "nosharecache", "local_lock=none", False  # v4 always locks
    share.agent(0, options).quit()
    text = share.cluster.clients[0].sure(f"{BUILD}/tools/ucm stat {share.at(0, options)}")
    assert f"vers={share.version}" in text
    assert said in text or "local_lock=all" in text, text  # nolock is told as the other
    assert ("locks are local" in text) == warned, text


# ---- everything at once ----


def test_random_work_on_both(share):
    """Random dumps, loads and lookups by four processes, some of them killed: never a wrong byte,
    never a block that nobody dumped, and what was STORED before a question was asked is found."""
    rnd = random.Random(1)
    workers = [share.agent(i % 2) for i in range(4)]
    stored, tried = set(), set()
    asked = {}

    def ask(i):
        verb = rnd.choice(["dump", "load", "load", "lookup"])
        first, n = 8 * rnd.randrange(60), rnd.randrange(1, 9)
        keys = range(first, first + n)
        asked[i] = verb, keys, {k for k in keys if k in stored}
        if verb == "dump":
            tried.update(keys)
        workers[i].line.send(f"{verb} {first} {n}")

    def judge(i):
        verb, keys, sure = asked.pop(i)
        letters = workers[i].line.receive()
        for key, c in zip(keys, letters, strict=True):
            if verb == "lookup":
                assert c == "1" or key not in sure, (i, verb, key, letters)
            else:
                assert c in (".-" if verb == "load" else "."), (i, verb, key, letters)
                assert c == "." or key not in sure, (i, verb, key, letters)
            assert c in "-0" or key in tried, (i, verb, key, letters)
            if verb == "dump" and c == ".":
                stored.add(key)

    for step in range(400):
        i = step % 4
        if i in asked:
            judge(i)
        ask(i)
        if step % 100 == 99:
            workers[i].kill()
            del asked[i]
            workers[i] = share.agent(i % 2)
    for i in list(asked):
        judge(i)
    assert len(stored) > 200
