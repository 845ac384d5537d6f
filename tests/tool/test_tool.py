# SPDX-License-Identifier: Apache-2.0
"""The program ucm as a user meets it: what it prints, its exit statuses, its errors.
usage: test_tool.py UCM MAKE_STORE EXAMPLE OPTIONS_MD HANG FAKES LOADED [unittest arguments]"""
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

UCM, MAKE_STORE, EXAMPLE, OPTIONS_MD, HANG, FAKES, LOADED = (Path(p).resolve() for p in sys.argv[1:8])
GOOD, BAD, CANNOT = 0, 1, 2
BLOCKS, HEADER, BLOCK = 20, 4096, 65536
VENDORS = ("cuda", "ascend", "musa", "maca", "hip", "cudart")


def ucm(*words, cwd=None, **environment):
    env = dict(os.environ, UC_LOGGER_LEVEL="error", **environment)
    return subprocess.run([UCM, *map(str, words)], capture_output=True, text=True, env=env, timeout=120, cwd=cwd)


class Tool(unittest.TestCase):
    def ends(self, done, status, out="", err=""):
        said = f"{done.args}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.assertEqual(done.returncode, status, said)
        self.assertIn(out, done.stdout, said)
        self.assertIn(err, done.stderr, said)
        return done


class Example(Tool):
    """examples/round_trip.c"""

    def run_on(self, backend):
        return subprocess.run([EXAMPLE, backend], capture_output=True, text=True, timeout=120)

    def test_it_does_what_it_says(self):
        with tempfile.TemporaryDirectory() as backend:
            self.ends(self.run_on(backend), GOOD, out="3 of 3 blocks can be loaded")
            self.ends(ucm("verify", backend), GOOD, out="3 blocks")

    def test_its_errors_are_the_stores(self):
        self.ends(self.run_on("/nowhere"), 1, err="storage_backends: /nowhere: No such file or directory; make")


class Words(Tool):
    def test_no_verb_prints_the_verbs_and_fails(self):
        self.ends(ucm(), CANNOT, err="verify")

    def test_help_lists_every_verb(self):
        for verb in ("bench", "ls", "stat", "verify", "rm", "pin", "unpin", "gc", "doctor", "plan", "help"):
            self.ends(ucm("help"), GOOD, out=f"\n  {verb} ")
            self.ends(ucm("help", verb), GOOD, out=f"usage: ucm {verb}")

    def test_plan_is_handed_to_python(self):
        with tempfile.TemporaryDirectory() as place:
            Path(place, "ucm").mkdir()
            Path(place, "ucm/__init__.py").write_text("")
            Path(place, "ucm/plan.py").write_text("def main():\n    import sys\n    print(sys.argv[1:])\n    return 1\n")
            env = dict(os.environ, PYTHONPATH=place)
            done = subprocess.run([UCM, "plan", "--rate", "4", "a b"], capture_output=True, text=True, env=env, timeout=120)
            self.ends(done, 1, out="['--rate', '4', 'a b']")
            beside = Path(place, "bin")
            beside.mkdir()
            shutil.copy(UCM, beside)
            (beside / "python3").write_text("#!/bin/sh\necho beside it\n")
            (beside / "python3").chmod(0o755)
            done = subprocess.run([beside / "ucm", "plan"], capture_output=True, text=True, env=env, timeout=120)
            self.ends(done, GOOD, out="beside it")
            Path(place, "ucm/plan.py").unlink()
            done = subprocess.run([UCM, "plan"], capture_output=True, text=True, env=env, timeout=120)
            self.ends(done, CANNOT, err="pip install .")

    def test_help_as_an_option_is_the_same_text(self):
        self.assertEqual(ucm("ls", "--help").stdout, ucm("help", "ls").stdout)
        self.assertEqual(ucm("--help").stdout, ucm("help").stdout)

    def test_version(self):
        self.ends(ucm("--version"), GOOD, out="ucm 0.")

    def test_doctor_says_why_a_device_is_not_there(self):
        self.ends(ucm("doctor", "devices"), GOOD, out="always there")
        devices = {d["device"]: d for d in json.loads(ucm("doctor", "devices", "--json").stdout)["devices"]}
        self.assertEqual(devices["host"]["count"], 1)
        self.assertIn("libcuda.so.1", devices["cuda"]["by"])
        straight = {d["device"]: d for d in json.loads(ucm("doctor", "devices", "--json").stdout)["direct"]}
        self.assertEqual(list(straight), ["cuda"])
        self.assertIn("libcufile.so.0", straight["cuda"]["by"])
        self.ends(ucm("doctor", "teeth"), CANNOT, err="ucm doctor devices")

    def test_doctor_finds_each_vendors_library_and_leaves_nothing_behind(self):
        """libcufile, if it is not told otherwise, writes a log where it is called."""
        with tempfile.TemporaryDirectory() as cwd, tempfile.TemporaryDirectory() as logs:
            done = self.ends(ucm("doctor", "devices", "--json", cwd=cwd, LD_LIBRARY_PATH=str(FAKES)), GOOD)
            found = {d["device"]: d["count"] for d in json.loads(done.stdout)["devices"]}
            self.assertEqual(found, {"host": 1, "sim": 1} | dict.fromkeys(VENDORS, 2))
            self.assertEqual([d["there"] for d in json.loads(done.stdout)["direct"]], [1])
            self.assertEqual(os.listdir(cwd), [])
            log = Path(logs, "log")
            self.ends(ucm("doctor", "devices", cwd=cwd, LD_LIBRARY_PATH=str(FAKES), CUFILE_LOGFILE_PATH=str(log)),
                      GOOD, out="copies in batches")
            self.assertTrue(log.exists())

    def test_no_vendors_library_is_linked(self):
        done = subprocess.run(["ldd", UCM], capture_output=True, text=True, check=True)
        linked = {line.split()[0] for line in done.stdout.splitlines()}
        self.assertIn("libc.so.6", linked)
        vendors = re.compile("cu(da|file)|ascend|musa|mcruntime|amdhip|opencl", re.I)
        self.assertEqual([name for name in linked if vendors.search(name)], [])

    def test_doctor_prefers_the_library_that_is_loaded(self):
        """By whatever name: another copy would not know the engine's events."""
        done = ucm("doctor", "devices", "--json", LD_LIBRARY_PATH=str(FAKES), LD_PRELOAD=str(LOADED),
                   ASAN_OPTIONS="verify_asan_link_order=0", CUFILE_LOGFILE_PATH="/dev/null")
        by = {d["device"]: d["by"] for d in json.loads(done.stdout)["devices"]}
        self.assertEqual(by["cudart"], f"{LOADED.name}, copies one by one")

    def test_unknown_verb_names_the_nearest(self):
        self.ends(ucm("verfy", "."), CANNOT, err="did you mean `ucm verify`?")
        self.ends(ucm("help", "bnch"), CANNOT, err="did you mean `ucm bench`?")
        self.ends(ucm("xylophone"), CANNOT, err="see `ucm help`")

    def test_unknown_option_names_the_nearest(self):
        self.ends(ucm("ls", "--jsno", "."), CANNOT, err="no option --jsno; did you mean --json?")
        self.ends(ucm("ls", "--frobnicate", "."), CANNOT, err="no option --frobnicate; see `ucm help ls`")

    def test_option_without_its_value(self):
        self.ends(ucm("bench", "--block"), CANNOT, err="--block needs a value")

    def test_values_that_do_not_parse(self):
        for value in ("", "4Q", "64K,", "64K;1M", "-1", "99999999999T"):
            self.ends(ucm("bench", f"--block={value}"), CANNOT, err=f"--block {value}: not a SIZE")

    def test_links_below_a_backend_are_not_followed(self):
        with tempfile.TemporaryDirectory() as backend, tempfile.TemporaryDirectory() as elsewhere:
            Path(elsewhere, "ucm").mkdir()
            Path(backend, "ucm").symlink_to(Path(elsewhere, "ucm"))
            for verb in ("ls", "stat", "verify"):
                self.ends(ucm(verb, backend), CANNOT, err="links below a backend are not followed")

    def test_operands_missing_or_too_many(self):
        self.ends(ucm("ls"), CANNOT, err="something is missing")
        self.ends(ucm("ls", "a", "b"), CANNOT, err="too many words")

    def test_output_that_cannot_be_written_is_an_error(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([UCM, "help"], stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, CANNOT)
        self.assertIn("No space left", done.stderr)


class Options(Tool):
    def test_every_option_is_shown_with_owner_and_default(self):
        done = self.ends(ucm("help", "options"), GOOD, out="\nstore\n")
        self.assertIn("store_pipeline  (", done.stdout)

    def test_docs_are_what_the_tables_say(self):
        now = ucm("help", "options", "--markdown").stdout
        self.assertEqual(OPTIONS_MD.read_text(), now, "docs/options.md is not what the option tables say: run `make docs`")


class Errors(Tool):
    def test_a_directory_that_is_not_there(self):
        for verb in ("ls", "stat", "verify"):
            self.ends(ucm(verb, "/nowhere/at/all"), CANNOT, err="ucm: /nowhere/at/all: No such file")

    def test_a_file_in_its_place(self):
        self.ends(ucm("ls", UCM), CANNOT, err="not a directory")

    def test_a_directory_of_something_else(self):
        with tempfile.TemporaryDirectory() as folder:
            for verb in ("ls", "stat", "verify"):
                self.ends(ucm(verb, folder), CANNOT, err="not a storage backend of ucm")


class Store(Tool):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = Path(self.temporary.name)
        subprocess.run([MAKE_STORE, self.dir, str(BLOCKS)], check=True)

    def blocks(self):
        return json.loads(ucm("ls", "--blocks", "--json", self.dir).stdout)["blocks"]

    def damage(self, at, value):
        """Changes a byte of slot 0 of segment 0; returns the key that was there."""
        segment = next(self.dir.glob("ucm/*/*/seg-000000"))
        with open(segment, "r+b") as file:
            file.seek(at)
            old = file.read(1)[0]
            file.seek(at)
            file.write(bytes([old ^ value]))
        return next(b["key"] for b in self.blocks() if b["segment"] == 0 and b["slot"] == 0)

    def test_ls(self):
        lanes = json.loads(self.ends(ucm("ls", "--json", self.dir), GOOD).stdout)["lanes"]
        self.assertEqual(len(lanes), 1)
        lane = lanes[0]
        self.assertEqual((lane["state"], lane["rank"], lane["ranks"]), ("dead", 0, 1))
        self.assertEqual((lane["blocks"], lane["block_size"]), (BLOCKS, BLOCK))
        self.assertTrue((self.dir / "ucm" / lane["namespace"] / lane["lane"]).is_dir())
        self.assertGreaterEqual(lane["slots"], BLOCKS)
        self.assertGreaterEqual(lane["bytes"], BLOCKS * (HEADER + BLOCK))
        self.ends(ucm("ls", self.dir), GOOD, out="64 KiB")

    def test_ls_of_blocks(self):
        blocks = self.blocks()
        wanted = {f"{i:04x}" + 28 * "0": i for i in range(BLOCKS)}
        self.assertEqual({b["key"]: b["depth"] for b in blocks}, wanted)
        self.assertEqual(len({(b["segment"], b["slot"]) for b in blocks}), BLOCKS)

    def test_stat(self):
        stat = json.loads(self.ends(ucm("stat", "--json", self.dir), GOOD).stdout)
        self.assertEqual((stat["namespaces"], stat["lanes"], stat["live"], stat["blocks"]), (1, 1, 0, BLOCKS))
        self.assertIn("tests of the tool", stat["by_namespace"][0]["text"])
        self.assertEqual(stat["by_namespace"][0]["shard_size"], BLOCK // 4)
        self.ends(ucm("stat", self.dir), GOOD, out="tests of the tool")
        kind = subprocess.run(["stat", "-f", "-c", "%T", self.dir], capture_output=True, text=True).stdout
        if stat["fs_type"] in ("ext4", "xfs", "tmpfs"):
            self.assertIn(stat["fs_type"][:3], kind)
            self.assertEqual((stat["fs_options"], stat["fs_warning"]), ("", ""))

    def test_bytes_are_what_the_disk_says(self):
        files = [p for p in self.dir.rglob("*") if p.is_file()]
        stat = json.loads(ucm("stat", "--json", self.dir).stdout)
        on_disk = sum(p.stat().st_blocks * 512 for p in files if p.name.startswith(("seg-", "journal")))
        self.assertEqual(stat["bytes"], on_disk)

    def test_verify_good(self):
        self.ends(ucm("verify", self.dir), GOOD, out=f"{BLOCKS} blocks")
        done = json.loads(ucm("verify", "--json", self.dir).stdout)
        self.assertEqual((done["blocks"], done["bad"], done["unreadable"]), (BLOCKS, 0, 0))

    def test_verify_names_a_block_with_a_flipped_bit(self):
        for at in (HEADER, HEADER + BLOCK // 2, HEADER + BLOCK - 1, 8):
            with self.subTest(at=at):
                key = self.damage(at, 0x10)
                self.ends(ucm("verify", self.dir), BAD, out=key)
                done = json.loads(ucm("verify", "--json", self.dir).stdout)
                self.assertEqual([b["key"] for b in done["bad_blocks"]], [key])
                self.assertEqual((done["blocks"], done["bad"]), (BLOCKS, 1))
                self.damage(at, 0x10)
                self.ends(ucm("verify", self.dir), GOOD)

    def test_verify_of_a_truncated_segment(self):
        segment = next(self.dir.glob("ucm/*/*/seg-000000"))
        os.truncate(segment, HEADER + BLOCK + HEADER)
        done = self.ends(ucm("verify", "--json", self.dir), BAD)
        self.assertEqual(json.loads(done.stdout)["bad"], BLOCKS - 1)

    def test_verify_repairs(self):
        key = self.damage(HEADER + 5, 0x10)
        done = json.loads(self.ends(ucm("verify", "--repair", "--json", self.dir), GOOD).stdout)
        self.assertEqual((done["bad"], done["dropped"], done["left"]), (1, 1, 0))
        self.ends(ucm("verify", self.dir), GOOD, out=f"{BLOCKS - 1} blocks")
        self.assertNotIn(key, {b["key"] for b in self.blocks()})
        self.ends(ucm("verify", "--repair", self.dir), GOOD, out="0 dropped, 0 left")

    def test_verify_repairs_a_truncated_segment_and_a_damaged_journal(self):
        os.truncate(next(self.dir.glob("ucm/*/*/seg-000000")), HEADER + BLOCK + HEADER)
        self.ends(ucm("verify", "--repair", self.dir), GOOD, out=f"{BLOCKS - 1} dropped, 0 left")
        self.ends(ucm("verify", self.dir), GOOD, out="1 blocks")
        subprocess.run([MAKE_STORE, self.dir, str(BLOCKS)], check=True)
        journal = next(self.dir.glob("ucm/*/*/journal"))
        with open(journal, "r+b") as file:
            file.write(b"?")
        self.ends(ucm("verify", self.dir), BAD, out="1 files could not be read")
        self.ends(ucm("verify", "--repair", self.dir), GOOD)
        self.ends(ucm("verify", self.dir), GOOD, out="0 blocks")
        self.assertEqual(list(self.dir.glob("ucm/*/r*")), [])

    def test_rm_by_key_and_all(self):
        self.ends(ucm("rm", "--key", "0003", self.dir), GOOD, out="1 blocks dropped")
        self.assertEqual(len(self.blocks()), BLOCKS - 1)
        done = json.loads(self.ends(ucm("rm", "--key", "000", "--older-than", "1h", "--json", self.dir), GOOD).stdout)
        self.assertEqual((done["chosen"], done["done"], done["left"], done["lanes"]), (0, 0, 0, []))
        done = json.loads(self.ends(ucm("rm", "--all", "--json", self.dir), GOOD).stdout)
        self.assertEqual((done["chosen"], done["done"], done["left"]), (BLOCKS - 1, BLOCKS - 1, 0))
        self.assertEqual([r["state"] for r in done["lanes"]], ["dead"])
        self.assertEqual(list(self.dir.glob("ucm/*/r*")), [])

    def test_rm_by_namespace(self):
        namespace = json.loads(ucm("stat", "--json", self.dir).stdout)["by_namespace"][0]
        self.ends(ucm("rm", "--namespace", "0123456789", self.dir), CANNOT, err="--namespace 0123456789: there is none")
        self.ends(ucm("rm", "--namespace", namespace["namespace"][:4], self.dir), CANNOT, err="there is none")
        self.assertEqual(len(self.blocks()), BLOCKS)
        self.ends(ucm("rm", "--key", "0001", "--namespace", namespace["text"], self.dir), GOOD, out="1 blocks dropped")
        self.ends(ucm("rm", "--namespace", namespace["namespace"][:12], self.dir), GOOD, out=f"{BLOCKS - 1} blocks dropped")

    def test_pin_and_unpin(self):
        def pinned():
            return {b["key"]: b["pinned"] for b in self.blocks() if b["pinned"]}
        before = time.time()
        self.ends(ucm("pin", "--key", "000", "--for", "2h", self.dir), GOOD, out="16 blocks pinned")
        self.assertEqual(len(pinned()), 16)
        self.assertTrue(all(before + 7199 <= at <= time.time() + 7232 for at in pinned().values()))
        self.ends(ucm("rm", "--older-than", "1s", "--key", "000", self.dir), GOOD, out="0 blocks dropped")
        self.ends(ucm("unpin", "--key", "0004", self.dir), GOOD, out="1 blocks unpinned")
        self.assertEqual(len(pinned()), 15)
        self.ends(ucm("unpin", "--all", self.dir), GOOD, out="15 blocks unpinned")
        self.assertEqual(pinned(), {})
        self.ends(ucm("verify", self.dir), GOOD, out=f"{BLOCKS} blocks")

    def test_gc(self):
        self.ends(ucm("gc", "--capacity-gb", "100", self.dir), GOOD, out="0 blocks dropped")
        self.assertEqual(len(self.blocks()), BLOCKS)
        ucm("pin", "--key", "0004", "--for", "1h", self.dir)
        self.ends(ucm("gc", "--capacity-gb", "0", self.dir), BAD, out="is pinned")
        ucm("unpin", "--all", self.dir)
        done = json.loads(self.ends(ucm("gc", "--capacity-gb", "0.001", "--json", self.dir), GOOD).stdout)
        self.assertLess(done["bytes"], 0.001 * (1 << 30))
        self.assertEqual((done["done"], self.blocks()), (BLOCKS, []))

    def test_several_directories(self):
        with tempfile.TemporaryDirectory() as other:
            subprocess.run([MAKE_STORE, other, str(BLOCKS)], check=True)
            done = json.loads(self.ends(ucm("rm", "--key", "0005", "--json", self.dir, other), GOOD).stdout)
            self.assertEqual((done["done"], [r["backend"] for r in done["lanes"]]), (2, [str(self.dir), other]))

    def test_changes_want_to_be_told_what(self):
        for verb in ("rm", "pin", "unpin"):
            self.ends(ucm(verb, self.dir), CANNOT, err="which blocks?")
            self.ends(ucm(verb, "--all", "--key", "00", self.dir), CANNOT, err="exclude each other")
            self.ends(ucm(verb, "--key", "xyz", self.dir), CANNOT, err="--key xyz: not at most 32 hex digits")
        for value in ("", "7", "d", "7y", "7dd", "-7d", "0s"):
            self.ends(ucm("rm", f"--older-than={value}", self.dir), CANNOT, err=f"--older-than {value}: not a TIME")
        self.ends(ucm("pin", "--all", self.dir), CANNOT, err="for how long?")
        self.ends(ucm("gc", self.dir), CANNOT, err="to what size?")
        self.ends(ucm("gc", "--capacity-gb", "many", self.dir), CANNOT, err="--capacity-gb many: not a number of GiB")
        self.ends(ucm("rm", "--all", "/nowhere"), CANNOT, err="/nowhere: No such file")
        self.assertEqual(len(self.blocks()), BLOCKS)

    def test_looking_changes_nothing(self):
        def state():
            return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in self.dir.rglob("*")}
        before = state()
        for words in (("ls", "--blocks"), ("stat",), ("verify",)):
            ucm(*words, self.dir)
        self.assertEqual(state(), before)


class Hanging(Tool):
    """Storage of which a name cannot be opened, for ever or for a while (hang.c)."""

    def setUp(self):
        self.dir = Path(self.enterContext(tempfile.TemporaryDirectory()))
        subprocess.run([MAKE_STORE, self.dir, str(BLOCKS)], check=True)

    def look(self, verb, name, *options, **environment):
        return ucm(verb, *options, self.dir, UCM_TEST_HANGS=name, LD_PRELOAD=str(HANG),
                   ASAN_OPTIONS="verify_asan_link_order=0", **environment)

    def more_lanes(self, n):
        (lane,) = self.dir.glob("ucm/*/r*")
        for i in range(n):
            shutil.copytree(lane, lane.with_name(f"r7-{i}"), ignore=shutil.ignore_patterns("seg-*"))

    def test_who_looks_says_that_it_does_not_answer(self):
        for verb, name in (("stat", "ucm"), ("ls", "journal"), ("verify", "seg-000000")):
            done = self.ends(self.look(verb, name, "--timeout-s", 1), CANNOT,
                             err=f"{self.dir}: the storage does not answer")
            self.assertEqual(done.stdout, "")

    def test_stat_waits_for_what_answers_slowly(self):
        """Longer than it waits for any one answer."""
        self.more_lanes(3)
        self.ends(self.look("stat", "journal", "--timeout-s", 2, UCM_TEST_MS="700"), GOOD, out="lanes        4")

    def test_a_reader_who_takes_his_time_is_no_storage_that_does_not_answer(self):
        """More rows than all pipes hold, unread for longer than the storage may be silent."""
        self.more_lanes(60)
        words = [UCM, "ls", "--blocks", "--json", "--timeout-s", "1", str(self.dir)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reader:
            select.select([reader.stdout], [], [])
            time.sleep(1.5)
            self.assertEqual(len(json.loads(reader.stdout.read())["blocks"]), 61 * BLOCKS)
        self.assertEqual(reader.returncode, GOOD)


class Sealed(Tool):
    """With integrity_key_file."""
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir, self.key = Path(self.temporary.name, "backend"), Path(self.temporary.name, "key")
        self.dir.mkdir()
        self.key.write_bytes(bytes(range(32)))
        self.key.chmod(0o600)
        env = dict(os.environ, UCM_INTEGRITY_KEY_FILE=str(self.key))
        done = subprocess.run([MAKE_STORE, self.dir, str(BLOCKS)], env=env, capture_output=True, text=True)
        if "not in this build" in done.stderr:
            self.skipTest("built without libcrypto, so nothing can be sealed")
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_with_the_key_all_is_as_ever(self):
        key = ("--integrity-key-file", self.key)
        self.ends(ucm("ls", *key, self.dir), GOOD, out="64 KiB")
        self.ends(ucm("stat", *key, self.dir), GOOD, out="tests of the tool")
        self.ends(ucm("verify", *key, self.dir), GOOD, out=f"{BLOCKS} blocks")
        env = dict(os.environ, UCM_INTEGRITY_KEY_FILE=str(self.key))
        done = subprocess.run([UCM, "verify", self.dir], env=env, capture_output=True, text=True)
        self.ends(done, GOOD, out=f"{BLOCKS} blocks")
        self.ends(ucm("pin", *key, "--all", "--for", "2h", self.dir), GOOD, out=f"{BLOCKS} blocks pinned")
        self.ends(ucm("rm", *key, "--all", self.dir), GOOD, out=f"{BLOCKS} blocks dropped")

    def test_without_it_nothing_is_told_or_changed(self):
        for verb, status in (("ls", GOOD), ("stat", GOOD), ("verify", BAD)):
            self.ends(ucm(verb, self.dir), status, err="1 lanes are sealed with a key that was not given")
            self.assertEqual(json.loads(ucm(verb, "--json", self.dir).stdout).get("locked", 1), 1)
        for words in (("rm", "--all"), ("pin", "--all", "--for", "1h"), ("gc", "--capacity-gb", "0")):
            self.ends(ucm(*words, self.dir), BAD, out="sealed with a key that was not given: --integrity-key-file")
        self.ends(ucm("verify", "--repair", self.dir), BAD)
        self.ends(ucm("verify", "--integrity-key-file", self.key, self.dir), GOOD, out=f"{BLOCKS} blocks")

    def test_a_key_that_cannot_be_used(self):
        self.key.chmod(0o644)
        for words in (("ls",), ("verify",), ("rm", "--all")):
            self.ends(ucm(*words, "--integrity-key-file", self.key, self.dir), CANNOT,
                      err=f"integrity_key_file: {self.key}: others than its owner may use it; chmod 600 it")


class Bench(Tool):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = Path(self.temporary.name)

    def bench(self, *words):
        return ucm("bench", "--dir", self.dir, "--no-fio", "--repeat", 1, *words)

    def test_moves_blocks_and_leaves_nothing(self):
        done = self.ends(self.bench("--ops", "dump,load", "--block", "64K,96K", "--total", "4M", "--json"), GOOD)
        rows = json.loads(done.stdout)["storage"]
        self.assertEqual([(r["op"], r["block"]) for r in rows],
                         [("dump", 65536), ("load", 65536), ("dump", 98304), ("load", 98304)])
        self.assertTrue(all(r["gbps"] > 0 and r["fio_ratio"] is None for r in rows))
        self.assertEqual(list(self.dir.iterdir()), [])

    def test_shards_and_lookups(self):
        done = self.ends(self.bench("--ops", "load,lookup", "--block", "64K", "--shards", 16, "--total", "2M",
                                    "--count", 300, "--keys", "1,128,1024", "--json"), GOOD)
        said = json.loads(done.stdout)
        self.assertEqual(len(said["storage"]), 1)
        self.assertEqual([(r["blocks"], r["keys"]) for r in said["lookup"]], [(300, 1), (300, 128)])
        self.assertEqual(said["restart"][0]["blocks"], 300)

    def test_dram(self):
        done = self.ends(self.bench("--ops", "hot", "--block", "64K", "--shards", 16, "--total", "2M", "--json"), GOOD)
        rows = json.loads(done.stdout)["dram"]
        self.assertEqual([r["block"] for r in rows], [65536])
        self.assertTrue(all(r["gbps"] > 0 and r["memcpy_ratio"] > 0 for r in rows))

    def test_a_pipeline_that_keeps_nothing_cannot_be_loaded_from(self):
        done = self.bench("--ops", "load", "--pipeline", "Empty", "--block", "64K", "--total", "1M")
        self.ends(done, CANNOT, err="blocks could not be loaded")

    def test_errors_name_the_option(self):
        self.ends(self.bench("--set", "posix_capcity_gb=1", "--ops", "dump"), CANNOT, err="posix_capacity_gb")
        self.ends(self.bench("--set", "nothing", "--ops", "dump"), CANNOT, err="not KEY=VALUE")
        self.ends(self.bench("--ops", "dmp"), CANNOT, err='no op "dmp"')
        self.ends(self.bench("--block", "100"), CANNOT, err="--block 100")
        self.ends(self.bench("--pipeline", "Psix", "--ops", "dump"), CANNOT, err="Psix")
        self.ends(ucm("bench", "--dir", "/nowhere"), CANNOT, err="--dir /nowhere: No such file")
        self.assertEqual(list(self.dir.iterdir()), [])


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[8:]])
