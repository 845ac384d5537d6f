# SPDX-License-Identifier: Apache-2.0
"""ucm-proxy between engines that fail in every way, and clients that do too.
usage: test_proxy.py UCM_PROXY [unittest arguments]"""
import asyncio
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import unittest
from pathlib import Path

from fakes import PATIENCE, PROXY, Engine, Proxy, Request, echo, read_body, read_head

ROOT = Path(__file__).resolve().parents[2]
LONG = "word " * 2000  # longer than any block
PROMPT = {"model": "m", "prompt": LONG, "max_tokens": 20}
CHAT = {"model": "m", "messages": [{"role": "user", "content": LONG}], "max_completion_tokens": 20}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def dies_when_told():
    """An engine that begins a stream and dies in its middle, and the event that lets it."""
    ready = asyncio.Event()

    async def dies(request):
        await request.begin()
        await request.chunk(b"data: 0\n\n")
        await ready.wait()
        request.cut()
    return dies, ready


class Words(unittest.TestCase):
    def says(self, status, text, *words):
        done = subprocess.run([PROXY, *words], capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(done.returncode, status, done)
        self.assertIn(text, done.stdout + done.stderr)

    def test_help_names_every_documented_flag(self):
        for flag in ("--pd-disaggregation", "--prefiller-hosts", "--decoder-ports", "--worker-hosts"):
            self.says(0, flag, "--help")
        self.says(0, "ucm-proxy 0.", "--version")

    def test_counts_that_differ(self):
        for role in ("prefiller", "decoder", "worker"):
            self.says(2, f"Number of {role} hosts must match number of {role} ports: 2 hosts, 1 ports",
                      f"--{role}-hosts", "127.0.0.1", "127.0.0.1", f"--{role}-ports", "1")

    def test_words_that_make_no_sense(self):
        self.says(2, "did you mean --decoder-hosts?", "--decodr-hosts", "a")
        self.says(2, "see `ucm-proxy --help`", "--frobnicate")
        self.says(2, "needs a value", "--decoder-hosts")
        self.says(2, "--transfer by-foot: not params", "--transfer", "by-foot")
        self.says(2, "not a port", "--worker-ports", "http")
        self.says(2, "not both", "--pd-disaggregation", "--worker-ports", "1")
        self.says(2, "is there already", "--worker-hosts", "127.0.0.1", "127.0.0.1", "--worker-ports", "1", "1")
        self.says(2, "seconds, sizes and counts", "--client-seconds", "0")

    def test_a_port_of_somebody_else(self):
        with socket.create_server(("127.0.0.1", 0)) as other:  # on ::1 it would be free
            self.says(2, "in use", "--host", "localhost", "--port", str(other.getsockname()[1]))


class Toy(unittest.TestCase):
    """ucm/pd/toy_proxy_server.py, as documented: from its folder."""

    def run_toy(self, proxy, *words):
        return subprocess.run([sys.executable, "toy_proxy_server.py", *words], cwd=ROOT / "ucm" / "pd",
                              env={**os.environ, "UCM_PROXY": str(proxy)}, capture_output=True, text=True,
                              timeout=PATIENCE)

    def test_it_is_the_proxy(self):
        done = self.run_toy(PROXY, "--prefiller-hosts", "a", "b", "--prefiller-port", "1", "--decoder-host", "c",
                            "--decoder-port", "2", "--pd-disaggregation")
        self.assertEqual(done.returncode, 2)
        self.assertIn("Number of prefiller hosts must match number of prefiller ports", done.stderr)
        self.assertEqual(self.run_toy(PROXY, "--help").stdout[:16], "usage: ucm-proxy")

    def test_it_says_where_it_looked(self):
        done = self.run_toy("/nowhere/ucm-proxy", "--help")
        self.assertEqual(done.returncode, 1)
        self.assertIn("\n  /nowhere/ucm-proxy\n", done.stderr)


class Case(unittest.IsolatedAsyncioTestCase):
    """engines(...) and pd(...) or mixed(...) begin a test; the end checks that the proxy ended well."""

    PATIENCE = PATIENCE

    def run(self, result=None):
        inner = getattr(self, self._testMethodName)

        async def bounded():
            asyncio.get_running_loop().set_debug(False)
            await asyncio.wait_for(inner(), self.PATIENCE)
        setattr(self, self._testMethodName, bounded)
        return super().run(result)

    async def engines(self, *serves):
        return [await Engine(serve).start() for serve in serves]

    async def start(self, *words, **options):
        proxy = await Proxy().start("--drain-seconds", "0", *words, **options)

        async def end():
            status = await proxy.end()
            self.assertEqual(status, 0, "".join(proxy.log))
        self.addAsyncCleanup(end)
        return proxy

    @staticmethod
    def words(role, engines):
        return [f"--{role}-hosts", *["127.0.0.1"] * len(engines), f"--{role}-ports", *[e.port for e in engines]]

    async def pd(self, prefillers, decoders, *words, **options):
        return await self.start("--pd-disaggregation", *self.words("prefiller", prefillers),
                                *self.words("decoder", decoders), "--health-seconds", "1000", *words, **options)

    async def mixed(self, workers, *words):
        return await self.start(*self.words("worker", workers), "--health-seconds", "1000", *words)

    async def p1d1(self, prefill=echo, decode=echo, *words, **options):
        p, d = await self.engines(prefill, decode)
        return p, d, await self.pd([p], [d], *words, **options)


class Protocol(Case):
    async def test_prefill_is_the_same_request_for_one_token(self):
        p, d, proxy = await self.p1d1()
        asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "n": 3, "best_of": 3,
                 "min_tokens": 5, "logprobs": True, "tools": [{"type": "function"}], "temperature": 0.1}
        answer = await proxy.ask("POST", CHATS, asked)
        self.assertEqual(answer.body, b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
        self.assertEqual(answer.fields["content-type"], "text/event-stream")
        self.assertEqual(d.bodies, [asked])
        want = {**asked, "stream": False, "max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1, "n": 1}
        del want["stream_options"], want["best_of"]
        got = p.bodies[0]
        self.assertEqual(got.pop("kv_transfer_params")["do_remote_decode"], True)
        self.assertEqual(got, want)
        self.assertNotIn("accept-encoding", p.seen[0].fields)

    async def test_the_decoder_gets_the_clients_bytes(self):
        _, d, proxy = await self.p1d1()
        body = b'{ "prompt":"%s",\n "max_tokens" : 20,"x":1e400 }' % LONG.encode()
        await proxy.ask("POST", COMPLETIONS, body.replace(b"1e400", b"1.50"))
        self.assertEqual(d.seen[0].body, body.replace(b"1e400", b"1.50"))
        await proxy.ask("POST", COMPLETIONS, body)  # no number for us: theirs to judge
        self.assertEqual(d.seen[1].body, body)

    async def test_fields_are_kept(self):
        async def decode(request):
            await request.answer(Connection="x-hop", X_Hop="1", X_Kept="2")
        p, d, proxy = await self.p1d1(echo, decode, environment={"OPENAI_API_KEY": "sk-ours"})
        answer = await proxy.ask("POST", COMPLETIONS, PROMPT, Authorization="Bearer sk-theirs", X_Request_Id="id-1",
                                 Accept_Encoding="gzip", Connection="x-hop", X_Hop="1", X_Other="2")
        self.assertEqual((answer.fields["x-request-id"], answer.fields["x-kept"]), ("id-1", "2"))
        self.assertNotIn("x-hop", answer.fields)
        for engine in p, d:
            fields = engine.seen[0].fields
            self.assertEqual((fields["authorization"], fields["x-request-id"], fields["x-other"], fields["host"]),
                             ("Bearer sk-theirs", "id-1", "2", engine.name))
            self.assertNotIn("x-hop", fields)
        self.assertEqual(d.seen[0].fields["accept-encoding"], "gzip")
        self.assertNotIn("accept-encoding", p.seen[0].fields)
        answer = await proxy.ask("POST", COMPLETIONS, PROMPT)
        one, other = p.seen[1].fields, d.seen[1].fields
        self.assertEqual(one["authorization"], "Bearer sk-ours")
        self.assertTrue(one["x-request-id"] == other["x-request-id"] == answer.fields["x-request-id"] != "id-1")

    async def test_transfer_params_go_from_the_prefiller_to_the_decoder(self):
        params = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_block_ids": [[1, 2]]}

        async def prefill(request):
            await request.answer(body={"choices": [], "kv_transfer_params": params})
        _, d, proxy = await self.p1d1(prefill)
        await proxy.ask("POST", COMPLETIONS, {**PROMPT, "kv_transfer_params": {"remote_host": "evil"}})
        self.assertEqual(d.bodies, [{**PROMPT, "kv_transfer_params": params}])

    async def test_a_clients_own_transfer_params_are_dropped(self):
        for how in "params", "none":
            p, d, proxy = await self.p1d1(echo, echo, "--transfer", how)
            await proxy.ask("POST", COMPLETIONS, {**PROMPT, "kv_transfer_params": {"remote_host": "evil"}})
            self.assertEqual(d.bodies, [PROMPT])
            self.assertNotIn("evil", p.seen[0].body.decode())
        self.assertNotIn("kv_transfer_params", p.bodies[0])

    async def test_mooncake_names_the_transfer_and_asks_who_the_prefiller_is(self):
        async def bootstrap(request):
            await request.answer(body={"0": {"engine_id": "engine-7", "worker_addr": {}}})
        p, d, b = await self.engines(echo, echo, bootstrap)
        proxy = await self.pd([p], [d], "--transfer", "mooncake", "--prefiller-bootstrap-ports", b.port)
        await proxy.ask("POST", COMPLETIONS, PROMPT)
        self.assertEqual([(r.method, r.target) for r in b.seen], [("GET", "/query")])
        ours, theirs = p.bodies[0]["kv_transfer_params"], d.bodies[0]["kv_transfer_params"]
        self.assertEqual(ours, {"do_remote_decode": True, "do_remote_prefill": False,
                                "transfer_id": ours["transfer_id"]})
        self.assertEqual(theirs, {"do_remote_prefill": True, "do_remote_decode": False,
                                  "remote_engine_id": "engine-7", "remote_bootstrap_addr": f"http://{b.name}",
                                  "transfer_id": ours["transfer_id"]})
        b.stop()  # what is left of it still answers on the connection kept; a new proxy cannot ask
        p, d = await self.engines(echo, echo)
        proxy = await self.pd([p], [d], "--transfer", "mooncake", "--prefiller-bootstrap-ports", b.port)
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)
        self.assertEqual((p.seen, d.bodies), ([], [PROMPT]))

    async def test_events_are_passed_on_as_they_come(self):
        read = asyncio.Queue()

        async def decode(request):
            await request.begin()
            for i in range(20):
                await request.chunk(b"data: %d\n\n" % i)
                await read.get()  # the next only when the client has this one
            await request.end()
        _, _, proxy = await self.p1d1(echo, decode)
        client = await proxy.connect()
        await client.send("POST", COMPLETIONS, {**PROMPT, "stream": True})
        self.assertEqual((await client.head()).fields["content-type"], "text/event-stream")
        for i in range(20):
            self.assertEqual(await client.reader.readuntil(b"\n\n\r\n"), b"%x\r\ndata: %d\n\n\r\n" % (9 + (i > 9), i))
            read.put_nowait(None)
        self.assertEqual(await client.reader.readexactly(5), b"0\r\n\r\n")

    async def test_short_prompts_go_to_the_decoder_at_once(self):
        p, d, proxy = await self.p1d1()
        for body in ({"prompt": "hello"}, {"prompt": [1] * 127}, {"prompt": [[1] * 60, [2] * 60]}):
            await proxy.ask("POST", COMPLETIONS, body)
        await proxy.ask("POST", CHATS, {"messages": [{"role": "user", "content": "hello"}]})
        self.assertEqual((len(p.seen), len(d.seen)), (0, 4))
        for body in ({"prompt": [1] * 128}, {"prompt": ["hello " * 50] * 3}):
            await proxy.ask("POST", COMPLETIONS, body)
        image = [{"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {"url": "x"}}]
        await proxy.ask("POST", CHATS, {"messages": [{"role": "user", "content": image}]})
        self.assertEqual((len(p.seen), len(d.seen)), (3, 7))
        self.assertEqual((await proxy.metrics())["prefills_skipped_total"], 4)

    async def test_the_rest_goes_to_a_decoder(self):
        p, d, proxy = await self.p1d1()
        self.assertEqual((await proxy.ask("GET", "/v1/models?a=b")).json["target"], "/v1/models?a=b")
        self.assertEqual((await proxy.ask("POST", "/tokenize", PROMPT)).json["got"], PROMPT)
        client = await proxy.connect()
        await client.send("HEAD", "/v1/models")
        self.assertEqual((await client.answer(is_head=True)).status, 200)
        self.assertEqual((await client.ask("GET", "/v1/models")).status, 200)
        self.assertEqual((len(p.seen), len(d.seen)), (0, 4))

    async def test_mixed(self):
        w, = await self.engines(echo)
        proxy = await self.mixed([w])
        asked = {**PROMPT, "kv_transfer_params": {"a": 1}}
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, asked)).json["got"], asked)
        self.assertEqual((await proxy.ask("GET", "/healthcheck")).json, {
            "status": "ok", "mode": "pd-mixed", "worker_instances": 1, "request_num": 0})

    async def test_flags_of_the_example_proxy_of_vllm_ascend(self):
        p, d = await self.engines(echo, echo)
        proxy = await self.start(*self.words("prefiller", [p]), *self.words("decoder", [d]), "--max-retries", "3",
                                 "--retry-delay", "0.001", "--max-waiting-retries", "3", "--waiting-retry-interval",
                                 "10", "--workers", "1", "--log-level", "INFO")
        self.assertIn("--pd-disaggregation is meant", "".join(proxy.log))
        self.assertIn("[PD Mode] Initialized 1 prefillers and 1 decoders.", "".join(proxy.log))
        await proxy.ask("POST", COMPLETIONS, PROMPT)
        self.assertEqual((len(p.seen), len(d.seen)), (1, 1))


class Pages(Case):
    async def test_healthcheck(self):
        _, _, proxy = await self.p1d1()
        self.assertEqual((await proxy.ask("GET", "/healthcheck")).json, {
            "status": "ok", "mode": "pd-disaggregation", "prefill_instances": 1, "decode_instances": 1,
            "request_num": 0})

    async def test_metrics(self):
        p, d, proxy = await self.p1d1()
        await proxy.ask("POST", COMPLETIONS, PROMPT)
        m = await proxy.metrics()
        self.assertEqual((m["prefills_total"], m["prefill_seconds_count"], m["first_byte_seconds_count"],
                          m['answers_total{code="200"}'], m["requests_in_flight"]), (1, 1, 1, 1, 0))
        for role, engine in ("prefill", p), ("decode", d):
            label = f'{{role="{role}",instance="{engine.name}"}}'
            self.assertEqual((m["instance_up" + label], m["instance_tokens" + label],
                              m["instance_calls_total" + label]), (1, 0, 1))

    async def test_instances_come_and_go(self):
        hold = asyncio.Event()

        async def slow(request):
            await hold.wait()
            await echo(request)
        p, d, proxy = await self.p1d1(echo, slow)
        extra, = await self.engines(echo)

        async def change(verb, instances, status=200, type="decode"):
            answer = await proxy.ask("POST", f"/instances/{verb}", {"type": type, "instances": instances})
            self.assertEqual(answer.status, status, answer.body)
            return answer.json
        under_way = asyncio.create_task(proxy.ask("POST", COMPLETIONS, PROMPT))
        await proxy.until(f'instance_requests{{role="decode",instance="{d.name}"}}', 1)
        self.assertEqual((await change("add", extra.name))["current_decode_instances"], [d.name, extra.name])
        await change("drain", [d.name])
        listed = (await proxy.ask("GET", "/instances")).json["instances"]
        self.assertEqual([(i["type"], i["instance"], i["state"], i["requests"]) for i in listed],
                         [("prefill", p.name, "up", 0), ("decode", d.name, "drained", 1),
                          ("decode", extra.name, "up", 0)])
        await proxy.ask("POST", COMPLETIONS, PROMPT)
        self.assertEqual((len(d.seen), len(extra.seen)), (1, 1))
        self.assertEqual((await change("remove", d.name))["current_decode_instances"], [extra.name])
        hold.set()  # what was under way there ends as it would
        self.assertEqual((await under_way).status, 200)
        self.assertEqual((await change("add", d.name))["current_decode_instances"], [extra.name, d.name])
        await change("drain", extra.name)
        await change("drain", d.name)
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 503)
        self.assertEqual((await proxy.ask("GET", "/healthcheck")).status, 503)
        await change("add", d.name)
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)
        for wrong in ("nowhere:1", "localhost", "x:y:z", 7, [], "127.0.0.1:0"):
            await change("add", wrong, 400)
        await change("remove", "127.0.0.1:1", 400)
        await change("add", d.name, 400, "other")
        await change("add", d.name, 400, "worker")
        self.assertEqual((await proxy.ask("GET", "/instances/add")).status, 405)

    async def test_instances_are_for_this_machine(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                s.connect(("192.0.2.1", 9))  # nothing is sent: where from would it be?
            except OSError as e:
                self.skipTest(f"no address but the loopback's: {e}")
            address = s.getsockname()[0]
        for words, status in ((), 403), (("--remote-instances",), 200):
            w, = await self.engines(echo)
            proxy = await self.mixed([w], "--host", "0.0.0.0", *words)
            self.assertEqual((await proxy.ask("GET", "/instances")).status, 200)
            client = await proxy.connect(address)
            self.assertEqual((await client.ask("GET", "/instances")).status, status)
            self.assertEqual((await client.ask("GET", "/healthcheck")).status, 200)
            client.close()


class Balance(Case):
    async def test_a_prompts_beginning_decides(self):
        engines = await self.engines(*[echo] * 4)
        proxy = await self.mixed(engines)
        for n in range(2):
            for who in range(80):
                await proxy.ask("POST", COMPLETIONS, {"prompt": f"user {who} " + LONG + "and then " * n})
        seen = [{r.json["prompt"][:7] for r in e.seen} for e in engines]
        self.assertEqual(sum(map(len, seen)), 80)  # each at one engine only
        self.assertGreater(min(map(len, seen)), 0)

    async def test_not_all_go_to_one(self):
        hold, all_there = asyncio.Event(), asyncio.Barrier(13)

        async def slow(request):
            await all_there.wait()
            await hold.wait()
            await echo(request)
        engines = await self.engines(*[slow] * 2)
        proxy = await self.mixed(engines, "--affinity-tokens", "4000")
        asked = [asyncio.create_task(proxy.ask("POST", COMPLETIONS, PROMPT)) for _ in range(12)]
        await all_there.wait()
        # Each holds 2521 tokens: the one they go to first gets no more when it has 1.25 * 15126 + 4000.
        self.assertEqual(min(len(e.seen) for e in engines), 3)
        hold.set()
        await asyncio.gather(*asked)

    async def test_what_is_never_shared_need_not_be_together(self):
        engines = await self.engines(*[echo] * 4)
        proxy = await self.mixed(engines)
        for apart in "model", "cache_salt":
            for who in range(40):
                await proxy.ask("POST", COMPLETIONS, {"prompt": LONG, apart: f"{who}"})
            self.assertGreater(min(sum(apart in r.json for r in e.seen) for e in engines), 0)

    async def test_tokens_to_come_are_in_flight(self):
        arrived, hold = asyncio.Queue(), asyncio.Event()

        async def slow(request):
            arrived.put_nowait(request)
            await hold.wait()
            await echo(request)
        engines = await self.engines(*[slow] * 2)
        proxy = await self.mixed(engines)
        asked = []
        for tokens in 1000, 10, 10, 10:
            asked.append(asyncio.create_task(proxy.ask("POST", COMPLETIONS, {"prompt": "hello", "max_tokens": tokens})))
            await arrived.get()
        self.assertEqual(sorted(len(e.seen) for e in engines), [1, 3])
        hold.set()
        await asyncio.gather(*asked)

    async def test_short_prompts_take_turns(self):
        engines = await self.engines(*[echo] * 3)
        proxy = await self.mixed(engines)
        for _ in range(9):
            await proxy.ask("POST", COMPLETIONS, {"prompt": "hello"})
        self.assertEqual([len(e.seen) for e in engines], [3, 3, 3])


class Faults(Case):
    """What engines do to us.  `bad` is the first decoder asked, whichever that is."""

    async def decoders(self, bad, *words, stream=False, body=None):
        """Two decoders, the first that is asked is bad -> the answer, who was asked"""
        asked = []

        async def serve(request):
            asked.append(request)
            await (bad if len(asked) == 1 else echo)(request)
        p, a, b = await self.engines(echo, serve, serve)
        proxy = await self.pd([p], [a, b], *words)
        answer = await proxy.ask("POST", COMPLETIONS, body or {**PROMPT, "stream": stream})
        return answer, asked, p, proxy

    async def test_failures_before_the_first_byte_are_tried_elsewhere(self):
        async def dies(request):
            request.cut()

        async def dies_after_its_head(request):
            await request.begin()
            request.cut()

        async def busy(request):
            await request.answer(503, {"error": "busy"})

        async def garbled(request):
            await request.send(b"SSH-2.0-OpenSSH\r\n\r\n")

        async def garbled_chunks(request):
            await request.begin()
            await request.send(b"zzz\r\n")

        async def nothing(request):
            await request.answer(200, b"")

        async def no_chunks(request):
            await request.begin()
            await request.end()

        async def endless_head(request):
            await request.send(b"HTTP/1.1 200 OK\r\nA: " + b"x" * (65 << 10))

        async def two_lengths(request):
            await request.send(request.head(Content_Length=2, content_length=2) + b"{}")
        for bad in (dies, dies_after_its_head, busy, garbled, garbled_chunks, nothing, no_chunks, endless_head,
                    two_lengths):
            with self.subTest(bad.__name__):
                answer, asked, p, proxy = await self.decoders(bad, stream=True)
                self.assertEqual((answer.status, len(asked), len(p.seen)), (200, 2, 1))
                self.assertTrue(answer.body.endswith(b"[DONE]\n\n"))
                self.assertEqual((await proxy.metrics())["retries_total"], 1)

    async def test_an_engine_that_is_not_there(self):
        p, d, gone = await self.engines(echo, echo, echo)
        gone.stop()
        proxy = await self.pd([gone, p], [d, gone])
        up = [f'instance_up{{role="{role}",instance="{gone.name}"}}' for role in ("prefill", "decode")]
        asked, m = 0, {}
        while any(m.get(u, 1) for u in up):  # until a prompt has its place there
            body = {**PROMPT, "prompt": f"{asked} {LONG}"}
            self.assertEqual((await proxy.ask("POST", COMPLETIONS, body)).status, 200)
            asked, m = asked + 1, await proxy.metrics()
        self.assertEqual((len(p.seen), len(d.seen)), (asked, asked))

    async def test_where_there_is_no_other_the_error_is_an_error(self):
        async def busy(request):
            await request.answer(503, {"error": "busy"}, Retry_After=3)

        async def nothing(request):
            await request.answer(200, b"")

        async def dies(request):
            request.cut()
        for serve, status, text in (busy, 503, b"busy"), (nothing, 502, b"empty"), (dies, 502, b"closed the conn"):
            _, d, proxy = await self.p1d1(echo, serve)
            answer = await proxy.ask("POST", COMPLETIONS, PROMPT)
            self.assertEqual(answer.status, status)
            self.assertIn(text, answer.body)
        _, d, proxy = await self.p1d1()
        d.stop()
        answer = await proxy.ask("POST", COMPLETIONS, PROMPT)
        self.assertEqual((answer.status, answer.json["error"]["code"]), (503, 503))
        self.assertIn("refused", answer.json["error"]["message"])

    async def test_as_many_are_tried_as_there_may_be(self):
        async def busy(request):
            await request.answer(503, {"error": "busy"})
        ps, ds = await self.engines(*[busy] * 3), await self.engines(*[busy] * 3)
        proxy = await self.pd(ps, ds, "--max-retries", "1")
        answer = await proxy.ask("POST", COMPLETIONS, PROMPT)
        self.assertEqual((answer.status, answer.json), (503, {"error": "busy"}))  # its own
        self.assertEqual([sum(len(e.seen) for e in es) for es in (ps, ds)], [2, 2])

    async def test_what_may_change_something_is_sent_once(self):
        async def dies(request):
            if request.method == "GET":
                return await echo(request)
            request.cut()
        a, b, gone = await self.engines(dies, dies, dies)
        gone.stop()
        proxy = await self.mixed([a, b, gone])
        for _ in range(3):
            await proxy.ask("GET", "/v1/models")  # leaves connections that may end while a request is on its way
        for n in range(6):
            self.assertEqual((await proxy.ask("POST", "/reset_prefix_cache")).status, 502)
            self.assertEqual(sum(r.method == "POST" for e in (a, b) for r in e.seen), n + 1)
        self.assertEqual((await proxy.metrics())["stale_total"], 0)

    async def test_a_transfer_is_for_one_decoder(self):
        asked = []

        async def prefill(request):
            await request.answer(body={"kv_transfer_params": {"remote_block_ids": [1]}})

        async def decode(request):
            if request.method == "GET":
                return await echo(request)
            asked.append(request.json)
            if len(asked) > 1:
                return await echo(request)
            request.cut() if fails == "cut" else await request.answer(503)
        for fails in "cut", "503":
            asked.clear()
            p, a, b = await self.engines(prefill, decode, decode)
            proxy = await self.pd([p], [a, b])
            # Connections to be used again, of both: a request that fails on one of those may have been read.
            await asyncio.gather(*(proxy.ask("GET", "/v1/models") for _ in range(8)))
            self.assertTrue(a.connections and b.connections)
            self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)
            self.assertEqual(["kv_transfer_params" in body for body in asked], [True, False])  # the first may have taken it

    async def test_what_nobody_asked_for_is_no_answer(self):
        answered, sent = asyncio.Event(), asyncio.Event()

        async def talks(request):
            await request.answer(body="mine")
            if not sent.is_set():
                await answered.wait()
                await request.answer(body="nobody's")
                sent.set()
        w, = await self.engines(talks)
        proxy = await self.mixed([w])
        self.assertEqual((await proxy.ask("GET", "/v1/models")).json, "mine")
        answered.set()
        await sent.wait()
        await proxy.metrics()  # it has come to that
        self.assertEqual((await proxy.ask("GET", "/v1/models")).json, "mine")
        self.assertEqual(w.connections, 2)

    async def test_three_failures_in_a_row_are_too_many(self):
        good = False

        async def dies(request):
            await echo(request) if good else request.cut()
        w, = await self.engines(dies)
        proxy = await self.mixed([w])
        up = f'instance_up{{role="worker",instance="{w.name}"}}'
        for good, is_up in (False, 1), (False, 1), (True, 1), (False, 1), (False, 1), (False, 0), (True, 1):
            await proxy.ask("POST", "/tokenize", PROMPT)
            self.assertEqual((await proxy.metrics())[up], is_up)

    async def test_an_engine_that_reads_late_and_answers_early(self):
        size = 16 << 20  # more than sockets hold

        async def serve(reader, writer):
            _, fields = await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n")
            await asyncio.sleep(1.5)  # longer than it may take to connect
            body = await read_body(reader, fields)
            writer.write(b"1\r\n]\r\n0\r\n\r\n" if json.loads(body)["prompt"] == "x" * size else b"?")
        async with await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20) as server:
            port = server.sockets[0].getsockname()[1]
            proxy = await self.start("--worker-ports", port, "--health-seconds", "1000", "--connect-seconds", "1")
            self.assertEqual((await proxy.ask("POST", COMPLETIONS, {"prompt": "x" * size})).json, [])

    async def test_what_is_wrong_with_a_request_the_decoder_says(self):
        async def refuses(request):
            await request.answer(400, {"error": "bad request"})
        *ps, d = await self.engines(refuses, refuses, refuses)
        proxy = await self.pd(ps, [d])
        for body in PROMPT, b"{not json", b"", b"[1]", b'"' + b"[" * 100000:
            answer = await proxy.ask("POST", COMPLETIONS, body)
            self.assertEqual((answer.status, answer.json), (400, {"error": "bad request"}))
        self.assertEqual(sum(len(p.seen) for p in ps), 1)  # another would do no better

    async def test_prefillers_that_fail_cost_time_and_nothing_else(self):
        async def fails(request):
            await request.answer(500)
        a, b, d = await self.engines(fails, fails, echo)
        proxy = await self.pd([a, b], [d])
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).json["got"], PROMPT)
        self.assertEqual((len(a.seen), len(b.seen)), (1, 1))
        self.assertEqual((await proxy.metrics())["prefills_failed_total"], 1)

    async def test_prefillers_that_are_down_are_not_waited_for(self):
        p, d, proxy = await self.p1d1()
        p.stop()
        for _ in range(3):
            self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)
        m = await proxy.metrics()
        self.assertEqual((m["prefills_total"], m["prefills_failed_total"]), (1, 3))

    async def test_a_prefiller_that_is_silent(self):
        async def silent(request):
            await request.gone()
        _, d, proxy = await self.p1d1(silent, echo, "--timeout-seconds", "1")
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)

    async def test_a_decoder_that_is_silent(self):
        asked = []

        async def silent(request):
            asked.append(request)
            await (echo if len(asked) == 1 else Request.gone)(request)
        p, a, b = await self.engines(echo, silent, silent)
        proxy = await self.pd([p], [a, b], "--timeout-seconds", "1")
        answers = [await proxy.ask("POST", COMPLETIONS, PROMPT) for _ in range(2)]
        # Nobody else is asked, nor the same again because the connection had been used before.
        self.assertEqual(([a.status for a in answers], len(asked)), ([200, 504], 2))

    async def test_an_engine_that_accepts_nobody(self):
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
            d, = await self.engines(echo)
            ports = full.getsockname()[1], d.port
            proxy = await self.start("--worker-hosts", *["127.0.0.1"] * 2, "--worker-ports", *ports,
                                     "--connect-seconds", "1", "--health-seconds", "1000")
            for _ in range(2):
                self.assertEqual((await proxy.ask("POST", "/tokenize", PROMPT)).status, 200)

    async def test_a_proxy_that_stood_still_does_not_blame_the_engine(self):
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
            name = "127.0.0.1:%d" % full.getsockname()[1]
            proxy = await self.start("--worker-hosts", "127.0.0.1", "--worker-ports", full.getsockname()[1],
                                     "--connect-seconds", "1", "--health-seconds", "1000")
            answer = asyncio.create_task(proxy.ask("GET", "/v1/models"))
            await proxy.until(f'instance_requests{{role="worker",instance="{name}"}}', 1)
            proxy.process.send_signal(signal.SIGSTOP)
            full.accept()[0].close()
            await asyncio.to_thread(select.select, [full], [], [])  # connected, by the kernel's second attempt
            await asyncio.sleep(0.5)
            proxy.process.send_signal(signal.SIGCONT)
            with full.accept()[0] as engine:
                engine.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                self.assertEqual((await answer).status, 200)

    async def test_a_name_of_several_addresses(self):
        async def serve(reader, writer):
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        names = {a[4][0] for a in socket.getaddrinfo("localhost", None)}
        if "::1" not in names:
            self.skipTest(f"localhost is {names} here")
        async with await asyncio.start_server(serve, "::1", 0) as server:
            proxy = await self.start("--worker-ports", server.sockets[0].getsockname()[1], "--health-seconds", "1000")
            self.assertEqual((await proxy.ask("GET", "/v1/models")).json, {})

    async def test_a_stream_longer_than_the_longest_silence(self):
        async def slow(request):
            await request.begin()
            for _ in range(12):
                await request.chunk(b"data: 0\n\n")
                await asyncio.sleep(0.25)
            await request.end()
        answer, asked, _, proxy = await self.decoders(slow, "--timeout-seconds", "2", stream=True)
        self.assertEqual((answer.body, len(asked)), (b"data: 0\n\n" * 12, 1))

    async def test_death_in_the_middle_of_a_stream_is_seen(self):
        dies, ready = dies_when_told()

        async def falls_silent(request):
            await request.begin()
            await request.chunk(b"data: 0\n\n")
            await request.gone()
        for decode, why in (dies, b"closed the connection"), (falls_silent, b"silent for too long"):
            _, _, proxy = await self.p1d1(echo, decode, "--timeout-seconds", "1")
            client = await proxy.connect()
            await client.send("POST", COMPLETIONS, {**PROMPT, "stream": True})
            self.assertEqual((await client.head()).status, 200)
            await client.reader.readuntil(b"data: 0\n\n\r\n")
            ready.set()
            rest = await client.reader.read()
            self.assertIn(b'data: {"error": {"message": "', rest)
            self.assertIn(why, rest)
            self.assertFalse(rest.endswith(b"0\r\n\r\n"))
            self.assertEqual((await proxy.metrics())["broken_streams_total"], 1)

    async def test_a_body_that_is_too_short_is_too_short_for_the_client(self):
        async def short(request):
            await request.send(request.head(200, "application/json", Content_Length=100) + b'{"half":')
            request._writer.close()
        _, _, proxy = await self.p1d1(echo, short)
        client = await proxy.connect()
        await client.send("POST", COMPLETIONS, PROMPT)
        self.assertEqual((await client.head()).fields["content-length"], "100")
        self.assertEqual(await client.reader.read(), b'{"half":')

    async def test_an_end_that_would_look_whole_is_none(self):
        dies, ready = dies_when_told()
        w, = await self.engines(dies)
        proxy = await self.mixed([w])
        client = await proxy.connect()
        await client.raw(f"GET {COMPLETIONS} HTTP/1.0\r\n\r\n".encode())
        await client.reader.readuntil(b"data: 0\n\n")
        ready.set()
        with self.assertRaises(ConnectionResetError):
            await client.reader.read()

    async def test_a_body_that_ends_with_the_connection(self):
        async def old(request):
            await request.send(request.head(200, "application/json") + b'{"a": 1}')
            request._writer.close()
        _, _, proxy = await self.p1d1(echo, old)
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).json, {"a": 1})
        client = await proxy.connect()
        body = json.dumps(PROMPT)
        await client.raw(f"POST {COMPLETIONS} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        self.assertTrue((await client.reader.read()).endswith(b'\r\n\r\n{"a": 1}'))

    async def test_a_connection_closed_while_idle_is_no_failure(self):
        seen = []

        async def once(request):
            seen.append(request)
            if len(seen) % 2 == 0:
                request.cut()  # as if it had timed out while the request was on its way
            else:
                await echo(request)
        w, = await self.engines(once)
        proxy = await self.mixed([w])
        for _ in range(3):
            self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)
        m = await proxy.metrics()
        self.assertEqual((m["stale_total"], m["retries_total"], len(seen)), (2, 0, 5))

    async def test_connections_are_used_again(self):
        p, d, proxy = await self.p1d1()
        for _ in range(5):
            await proxy.ask("POST", COMPLETIONS, {**PROMPT, "stream": True})
        self.assertEqual((p.connections, d.connections), (1, 1))

    async def test_health_checks_take_an_engine_out_and_back_in(self):
        a, b = await self.engines(echo, echo)
        proxy = await self.start(*self.words("worker", [a, b]), "--health-seconds", "1")
        up = f'instance_up{{role="worker",instance="{a.name}"}}'
        a.health = 503
        await proxy.until(up, 0)
        for n in range(6):
            await proxy.ask("POST", COMPLETIONS, {"prompt": f"{n} " + LONG})
        self.assertEqual((len(a.seen), len(b.seen)), (0, 6))
        a.health = 404  # no such page: alive all the same
        await proxy.until(up, 1)

    async def test_an_engine_that_is_down_is_better_than_none(self):
        w, = await self.engines(echo)
        w.health = 503
        proxy = await self.start(*self.words("worker", [w]), "--health-seconds", "1")
        await proxy.until(f'instance_up{{role="worker",instance="{w.name}"}}', 0)
        answer = await proxy.ask("GET", "/healthcheck")
        self.assertEqual((answer.status, answer.json["status"]), (503, "no instance is up"))
        self.assertEqual((await proxy.ask("POST", COMPLETIONS, PROMPT)).status, 200)


class Clients(Case):
    """What clients do to us."""

    async def test_a_client_that_leaves_takes_its_request_with_it(self):
        for where in "prefill", "decode", "stream", "half":
            began, ended = asyncio.Event(), asyncio.Event()

            async def hangs(request):
                if where == "stream":
                    await request.begin()
                    await request.chunk(b"data: 0\n\n")
                began.set()
                await request.gone()
                ended.set()
            _, _, proxy = await self.p1d1(*(hangs, echo) if where == "prefill" else (echo, hangs))
            client = await proxy.connect()
            await client.send("POST", COMPLETIONS, {**PROMPT, "stream": True})
            await began.wait()
            client.writer.write_eof() if where == "half" else client.close()
            await ended.wait()
            m = await proxy.metrics()
            self.assertEqual((m["cancelled_total"], m["requests_in_flight"], m["failed_total"]), (1, 0, 0), where)
            self.assertEqual(sum(v for k, v in m.items() if k.startswith("instance_tokens")), 0)

    async def test_heads_that_are_refused(self):
        w, = await self.engines(echo)
        proxy = await self.mixed([w], "--max-header-bytes", "4K", "--max-body-bytes", "1000")
        post = "POST /tokenize HTTP/1.1\r\n"
        for head, status in (
                ("GET / HTTP/1.1\n\n\r\n\r\n", 400), ("GET /\r\n\r\n", 400), ("G(T / HTTP/1.1\r\n\r\n", 400),
                ("GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400), ("GET /\xe9 HTTP/1.1\r\n\r\n", 400), ("GET / HTTP/2.0\r\n\r\n", 505),
                ("GET / HTTP/1.1\r\nA b: c\r\n\r\n", 400), ("GET / HTTP/1.1\r\n folded\r\n\r\n", 400),
                ("GET / HTTP/1.1\r\nA: b\rc\r\n\r\n", 400), ("GET / HTTP/1.1\r\nA: b\0c\r\n\r\n", 400),
                ("GET / HTTP/1.1\r\nA: b\nC: d\r\n\r\n", 400), ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
                (post + "Content-Length: -1\r\n\r\n", 400), (post + "Content-Length: 1 1\r\n\r\n", 400),
                (post + "Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
                (post + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
                (post + "Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
                (post + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
                (post + "Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", 400),
                (post + "Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
                (post + "Transfer-Encoding: chunked\r\n\r\n1" + "0" * 16 + "\r\n", 400),
                (post + "Transfer-Encoding: chunked\r\n\r\n1;" + "x" * 1100, 400),
                (post + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + "A: b\r\n" * 1400, 400),
                (post + "Content-Length: 1001\r\n\r\n", 413),
                (post + "Transfer-Encoding: chunked\r\n\r\n" + "3e8\r\n" + "x" * 1000 + "\r\n1\r\nx\r\n", 413),
                ("GET / HTTP/1.1\r\nA: " + "x" * 5000 + "\r\n\r\n", 431), ("GET / HTTP/1.1\r\nA: " + "x" * 5000, 431),
                ("GET / HTTP/1.1\r\n" + "A: b\r\n" * 101 + "\r\n", 431)):
            with self.subTest(head[:60]):
                client = await proxy.connect()
                await client.raw(head.encode())
                answer = await client.answer()
                self.assertEqual(answer.status, status)
                self.assertEqual(answer.json["error"]["code"], status)
                self.assertEqual(await client.reader.read(), b"")  # closed: where the next begins nobody knows
                client.close()
        self.assertEqual(w.seen, [])

    async def test_the_answer_to_a_body_too_long_arrives(self):
        w, = await self.engines(echo)
        proxy = await self.mixed([w], "--max-body-bytes", "1000")
        client = await proxy.connect()
        await client.send("POST", "/tokenize", b"x" * 5_000_000)  # much of it unread when it is refused
        self.assertEqual((await client.answer()).status, 413)

    async def test_a_request_that_takes_too_long_to_come(self):
        w, = await self.engines(echo)
        proxy = await self.mixed([w], "--client-seconds", "1")

        async def begins(begun, more):
            client = await proxy.connect()
            await client.raw(begun)
            answer = asyncio.create_task(client.answer())
            while more and not answer.done():
                await client.raw(b"x")
                await asyncio.sleep(0.1)
            self.assertEqual((await answer).status, 408)

        async def is_silent():
            client = await proxy.connect()
            self.assertEqual(await client.reader.read(), b"")  # closed
        head = b"POST /tokenize HTTP/1.1\r\nContent-Length: 1000\r\n"
        await asyncio.gather(is_silent(), *(begins(begun, more) for begun in (head, head + b"\r\n12345")
                                           for more in (False, True)))

    async def test_what_comes_before_its_turn_waits(self):
        began, hold = asyncio.Event(), asyncio.Event()

        async def slow(request):
            began.set()
            await hold.wait()
            await echo(request)
        w, = await self.engines(slow)
        proxy = await self.mixed([w])
        client = await proxy.connect()
        await client.send("GET", "/v1/models")
        await began.wait()
        client.writer.write(bytes(32 << 20))
        left = None
        while left != (left := client.writer.transport.get_write_buffer_size()):  # until it reads no more
            for _ in range(20):
                await proxy.metrics()
        self.assertGreater(left, 8 << 20)
        hold.set()
        self.assertEqual((await client.answer()).status, 200)
        client.reset()

    async def test_a_client_that_does_not_read_stops_its_engine(self):
        size, sent, ended = 256 << 20, 0, asyncio.Event()

        async def floods(request):
            nonlocal sent
            await request.begin()
            try:
                while sent < size:
                    await request.chunk(b"x" * 65536)
                    sent += 65536
            finally:
                ended.set()
        w, = await self.engines(floods)
        proxy = await self.mixed([w], "--client-seconds", "1")
        before = proxy.peak_mib()
        client = await proxy.connect(limit=1 << 16)
        await client.send("POST", COMPLETIONS, PROMPT)
        await ended.wait()  # cut after a second without progress
        self.assertLess(sent, 64 << 20)  # what sockets hold, and a megabyte here
        self.assertLess(proxy.peak_mib() - before, 16)
        client.reset()

    async def test_a_slow_client_gets_everything(self):
        async def much(request):
            await request.begin()
            for i in range(400):
                await request.chunk(bytes([i % 256]) * 30000)
            await request.end()
        w, = await self.engines(much)
        proxy = await self.mixed([w])
        client = await proxy.connect(limit=1 << 12)
        await client.send("POST", COMPLETIONS, PROMPT)
        answer = await client.answer()
        self.assertEqual(answer.body, b"".join(bytes([i % 256]) * 30000 for i in range(400)))

    async def test_more_connections_than_there_may_be_wait(self):
        w, = await self.engines(echo)
        proxy = await self.mixed([w], "--max-connections", "2")
        first, second, third = [await proxy.connect() for _ in range(3)]
        await third.send("GET", "/healthcheck")
        for _ in range(3):
            answer = await second.ask("GET", "/metrics")
            self.assertIn(b"\nucm_proxy_connections 2\n", answer.body)
        first.close()
        self.assertEqual((await third.answer()).status, 200)
        second.close()
        third.close()

    async def test_no_more_connections_than_there_are_files_for(self):
        p, d, proxy = await self.p1d1(files=100)
        self.assertIn("--max-connections 22: more are too many for 100 open files", "".join(proxy.log))
        answers = await asyncio.gather(*(proxy.ask("POST", COMPLETIONS, PROMPT) for _ in range(100)))
        self.assertEqual(({a.status for a in answers}, len(p.seen), len(d.seen)), ({200}, 100, 100))

    async def test_requests_one_after_the_other_on_a_connection(self):
        _, _, proxy = await self.p1d1()
        client = await proxy.connect()
        body = json.dumps({**PROMPT, "stream": True})
        one = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        await client.raw((one + "GET /healthcheck HTTP/1.1\r\n\r\n" * 500 + one).encode())
        answers = [await client.answer() for _ in range(502)]
        self.assertEqual({a.status for a in answers}, {200})
        self.assertEqual({a.body for a in answers[::501]}, {answers[0].body})
        self.assertIn(b"[DONE]", answers[0].body)

    async def test_bodies_in_chunks_and_after_continue(self):
        w, = await self.engines(echo)
        proxy = await self.mixed([w])
        client = await proxy.connect()
        await client.raw(b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\n{\"a\":\r\n"
                         b"3\r\n 1}\r\n0\r\nX-Trailer: t\r\n\r\n")
        self.assertEqual((await client.answer()).json["got"], {"a": 1})
        self.assertEqual(w.seen[0].fields["content-length"], "8")
        await client.raw(b"POST /tokenize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        self.assertEqual((await client.head()).status, 100)
        await client.raw(b"{}")
        self.assertEqual((await client.answer()).status, 200)

    async def test_any_bytes_at_all(self):
        async def answers(request):
            await request.answer()
        w, = await self.engines(answers)
        proxy = await self.mixed([w], "--max-header-bytes", "4K", "--client-seconds", "5")
        rng = random.Random(7)
        good = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        for _ in range(300):
            data = bytearray(good * rng.randint(1, 3))
            for _ in range(rng.randint(0, 6)):
                at = rng.randrange(len(data))
                data[at:at + rng.randint(0, 3)] = rng.choice((b"\r\n", b"\0", b":", b" ", rng.randbytes(3)))
            client = await proxy.connect()
            try:
                await client.raw(data)
                client.writer.write_eof()
                await client.reader.read()
            except ConnectionError:
                pass
            client.close()
        self.assertEqual((await proxy.ask("GET", "/healthcheck")).json["status"], "ok")

    async def test_any_answer_at_all(self):
        rng = random.Random(7)
        good = Request.head(Transfer_Encoding="chunked") + b"2\r\n{}\r\n0\r\n\r\n"

        async def answers(request):
            data = bytearray(good)
            for _ in range(rng.randint(0, 4)):
                at = rng.randrange(len(data))
                data[at:at + rng.randint(0, 3)] = rng.choice((b"\r\n", b"\0", b":", b"9", rng.randbytes(3), good))
            await request.send(data)
            rng.choice((request.cut, request._writer.close, request._writer.close))()
        p, *ds = await self.engines(*[answers] * 3)
        proxy = await self.pd([p], ds)
        statuses = set()
        for _ in range(300):
            client = await proxy.connect()
            await client.send("POST", COMPLETIONS, PROMPT, Connection="close")
            answer = await client.reader.read()  # whole, cut or an error, but an end
            self.assertEqual(answer[:9], b"HTTP/1.1 ")
            statuses.add(answer[9:12])
            client.close()
        self.assertLessEqual({b"200", b"502"}, statuses)
        m = await proxy.metrics()
        self.assertEqual(sum(v for k, v in m.items() if k.startswith(("instance_tokens", "instance_requests"))), 0)

    async def test_any_body_at_all_reaches_the_decoder_as_it_is(self):
        async def answers(request):
            await request.answer()
        _, d, proxy = await self.p1d1(answers, answers)
        rng = random.Random(7)
        client = await proxy.connect()
        for _ in range(300):
            good = json.dumps(rng.choice((PROMPT, {**CHAT, "n": 2}, {"prompt": [[1, 2], "x", 3.5, None] * 40})))
            body = bytearray(good.encode())
            for _ in range(rng.randint(0, 4)):
                at = rng.choice((rng.randrange(len(body)), rng.randrange(30)))
                body[at:at + rng.randint(0, 2)] = rng.choice((b"[", b"}", b'"', b"1e999", b"null", rng.randbytes(2)))
            target = rng.choice((COMPLETIONS, CHATS))
            self.assertEqual((await client.ask("POST", target, bytes(body))).status, 200)
            self.assertEqual(d.seen[-1].body, body)

    async def test_many_streams_at_once(self):
        async def paced(request):
            await request.begin()
            for i in range(20):
                await request.chunk(b"data: %s %d\n\n" % (request.json["who"].encode(), i))
                await asyncio.sleep(0)
            await request.end()
        p, *ds = await self.engines(echo, paced, paced)
        proxy = await self.pd([p], ds)

        async def one(who):
            answer = await proxy.ask("POST", COMPLETIONS, {**PROMPT, "who": who, "stream": True})
            self.assertEqual(answer.body.decode(), "".join(f"data: {who} {i}\n\n" for i in range(20)))
        await asyncio.gather(*(one(f"client{i}") for i in range(100)))

    async def test_the_end_waits_for_what_is_under_way(self):
        began, go = asyncio.Event(), asyncio.Event()

        async def slow(request):
            await request.begin()
            await request.chunk(b"data: 0\n\n")
            began.set()
            await go.wait()
            await request.end()
        _, _, proxy = await self.p1d1(echo, slow, "--drain-seconds", "60")
        client, idle = await proxy.connect(), await proxy.connect()
        await client.send("POST", COMPLETIONS, {**PROMPT, "stream": True})
        await began.wait()
        proxy.terminate()
        self.assertEqual(await idle.reader.read(), b"")
        with self.assertRaises(ConnectionRefusedError):
            await proxy.connect()
        go.set()
        self.assertEqual((await client.answer()).body, b"data: 0\n\n")
        client.close()
        self.assertEqual(await proxy.process.wait(), 0)

    async def test_the_end_does_not_wait_for_ever(self):
        for drain, signals in ("60", 2), ("1", 1):
            began = asyncio.Event()

            async def hangs(request):
                await request.begin()
                await request.chunk(b"data: 0\n\n")
                began.set()
                await request.gone()
            _, _, proxy = await self.p1d1(echo, hangs, "--drain-seconds", drain)
            client, idle = await proxy.connect(), await proxy.connect()
            await client.send("POST", COMPLETIONS, {**PROMPT, "stream": True})
            await began.wait()
            for _ in range(signals):
                proxy.terminate()
                await idle.reader.read()  # the first has come
            self.assertEqual(await proxy.process.wait(), 0)
            self.assertFalse((await client.reader.read()).endswith(b"0\r\n\r\n"))
            client.close()


class Many(Case):
    """As many requests as a node may see, all under way before the first ends.  A half of them gets all of its stream;
    of the others `fate` says what becomes of them."""

    PATIENCE = 4 * PATIENCE
    CLIENTS, EVENTS, PER_WRITE = 512, 4000, 250
    FATES = "read", "left", "read", "broken", "read", "left early", "read", "read late"

    def setUp(self):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        self.there = self.gone = 0
        self.all_there, self.go, self.all_gone, self.quick_ended = (asyncio.Event() for _ in range(4))

    def asked(self, who):
        return {**PROMPT, "stream": True, "who": who, "fate": self.FATES[who % len(self.FATES)]}

    def events(self, asked):
        padding = b"x" * (500 if asked["fate"] == "read late" else 0)  # more than sockets hold: 2 MB
        return [b"data: %d of %d%s\n\n" % (i, asked["who"], padding) for i in range(self.EVENTS)]

    async def arrive(self):
        self.there += 1
        if self.there == self.CLIENTS:
            self.all_there.set()
        await self.go.wait()

    async def leave(self, request):
        await request.gone()
        self.gone += 1
        if self.gone == self.CLIENTS // 4:
            self.all_gone.set()

    async def prefill(self, request):
        if request.json["fate"] != "left early":
            return await echo(request)
        await self.arrive()
        await self.leave(request)

    async def decode(self, request):
        fate, events = request.json["fate"], self.events(request.json)
        chunks = [b"%x\r\n%s\r\n" % (len(e), e) for e in events]
        await request.begin()
        await request.send(chunks[0])
        await self.arrive()
        if fate == "left":
            return await self.leave(request)
        end = self.EVENTS // 2 if fate == "broken" else self.EVENTS
        for at in range(1, end, self.PER_WRITE):
            await request.send(b"".join(chunks[at:min(at + self.PER_WRITE, end)]))
        if fate == "broken":
            await request.send(chunks[end][:-3])
            return request.cut()
        await request.end()

    async def client(self, proxy, asked):
        fate, events = asked["fate"], self.events(asked)
        client = await proxy.connect(limit=1 << 12 if fate == "read late" else 1 << 16)
        await client.send("POST", COMPLETIONS, asked)
        await self.go.wait()
        if fate == "read late":
            await self.quick_ended.wait()
        if fate != "left early":
            head = await client.head()
        if fate == "left":
            await client.reader.readuntil(events[0])
        elif fate == "broken":
            rest = await client.reader.read()
            self.assertIn(b'data: {"error": {"message": "', rest)
            self.assertFalse(rest.endswith(b"0\r\n\r\n"))
        elif fate.startswith("read"):
            self.assertEqual(await read_body(client.reader, head.fields), b"".join(events))
        client.reset() if asked["who"] % 16 < 8 else client.close()

    async def test_512_at_once(self):
        p, *ds = await self.engines(self.prefill, self.decode, self.decode)
        proxy = await self.pd([p], ds)
        tasks = {"read late": [], "quick": []}
        for asked in map(self.asked, range(self.CLIENTS)):
            tasks.get(asked["fate"], tasks["quick"]).append(asyncio.create_task(self.client(proxy, asked)))
        await self.all_there.wait()
        self.assertEqual((await proxy.metrics())["requests_in_flight"], self.CLIENTS)
        self.go.set()
        await asyncio.gather(*tasks["quick"])
        self.quick_ended.set()
        await asyncio.gather(*tasks["read late"])
        await self.all_gone.wait()
        await proxy.until("requests_in_flight", 0)
        m = await proxy.metrics()
        self.assertEqual([m[f"{name}_total"] for name in ("cancelled", "broken_streams", "failed", "retries", "prefills")],
                         [self.CLIENTS // 4, self.CLIENTS // 8, 0, 0, self.CLIENTS])
        self.assertEqual(sum(v for k, v in m.items() if k.startswith(("instance_tokens", "instance_requests"))), 0)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]], warnings="ignore")
