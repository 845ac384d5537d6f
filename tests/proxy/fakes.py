# SPDX-License-Identifier: Apache-2.0
"""Engines that do as they are told, a client that sees every byte, and the proxy between them."""
import asyncio
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path

PROXY = Path(sys.argv[1]).resolve()
PATIENCE = 30  # seconds after which something hangs


async def read_head(reader):
    """-> first line, fields (lower case)"""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return head[0], {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:-2])}


async def read_chunk(reader):
    size = int(await reader.readuntil(b"\r\n"), 16)
    data = await reader.readexactly(size + 2)
    return data[:-2]


async def read_body(reader, fields):
    if fields.get("transfer-encoding") == "chunked":
        chunks = []
        while chunk := await read_chunk(reader):
            chunks.append(chunk)
        return b"".join(chunks)
    return await reader.readexactly(int(fields.get("content-length", 0)))


class Request:
    def __init__(self, line, fields, body, writer, reader):
        self.method, self.target, _ = line.split(" ")
        self.fields, self.body, self._writer, self._reader = fields, body, writer, reader

    @property
    def json(self):
        return json.loads(self.body)

    async def answer(self, status=200, body=b"{}", type="application/json", **fields):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        await self.send(self.head(status, type, **{"Content-Length": len(body), **fields}) + body)

    @staticmethod
    def head(status=200, type="text/event-stream", **fields):
        lines = [f"HTTP/1.1 {status} Status", f"Content-Type: {type}"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in fields.items()]
        return "\r\n".join(lines + ["", ""]).encode()

    async def send(self, data):
        self._writer.write(data)
        await self._writer.drain()

    async def begin(self, **fields):
        await self.send(self.head(Transfer_Encoding="chunked", **fields))

    async def chunk(self, data):
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self):
        await self.send(b"0\r\n\r\n")

    async def gone(self):
        """Until the proxy has closed the connection."""
        try:
            while await self._reader.read(1 << 16):
                pass
        except ConnectionError:
            pass

    def cut(self):
        self._writer.transport.abort()


class Engine:
    """An HTTP server: `serve(request)` answers all but GET /health; what came is in `seen`."""

    def __init__(self, serve=None, health=200):
        self.serve, self.health, self.seen, self.checked = serve or echo, health, [], asyncio.Event()
        self.connections = 0

    async def start(self):
        self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]
        self.name = f"127.0.0.1:{self.port}"
        return self

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while True:
                line, fields = await read_head(reader)
                request = Request(line, fields, await read_body(reader, fields), writer, reader)
                if request.target == "/health":
                    await request.answer(self.health)
                    self.checked.set()
                    continue
                self.seen.append(request)
                await self.serve(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def stop(self):
        self.server.close()

    @property
    def bodies(self):
        return [r.json for r in self.seen]


async def echo(request):
    """A prefiller or decoder without faults."""
    body = request.json if request.body else {}
    if body.get("stream"):
        await request.begin()
        for i in range(3):
            await request.chunk(b"data: %d\n\n" % i)
        await request.chunk(b"data: [DONE]\n\n")
        await request.end()
    else:
        await request.answer(body={"target": request.target, "got": body})


class Answer:
    def __init__(self, line, fields, body=b""):
        self.status, self.fields, self.body = int(line.split(" ")[1]), fields, body

    @property
    def json(self):
        return json.loads(self.body)


class Client:
    """A connection to the proxy."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def send(self, method, target, body=None, **fields):
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        lines = [f"{method} {target} HTTP/1.1", "Host: proxy"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in fields.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        await self.raw("\r\n".join(lines + ["", ""]).encode() + (body or b""))

    async def raw(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def head(self):
        return Answer(*await read_head(self.reader))

    async def answer(self, is_head=False):
        answer = await self.head()
        if not is_head:
            answer.body = await read_body(self.reader, answer.fields)
        return answer

    async def ask(self, method, target, body=None, **fields):
        await self.send(method, target, body, **fields)
        return await self.answer()

    def close(self):
        self.writer.close()

    def reset(self):
        self.writer.transport.abort()


class Proxy:
    """The program under test."""

    async def start(self, *words, environment=None, files=None):
        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        env = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
        self.process = await asyncio.create_subprocess_exec(
            PROXY, "--host", "127.0.0.1", "--port", "0", *map(str, words), stderr=asyncio.subprocess.PIPE,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, env={**env, **(environment or {})},
            preexec_fn=limit if files else None)
        self.log = []
        while not (found := re.search(r"listening on http://.*:(\d+)", self.log[-1] if self.log else "")):
            line = (await self.process.stderr.readline()).decode()
            if not line:
                raise AssertionError("".join(self.log))
            self.log.append(line)
        self.port = int(found[1])
        self._reading = asyncio.create_task(self._read_log())
        return self

    async def _read_log(self):
        async for line in self.process.stderr:
            self.log.append(line.decode())

    async def connect(self, address="127.0.0.1", **options):
        return Client(*await asyncio.open_connection(address, self.port, **options))

    async def ask(self, method, target, body=None, **fields):
        client = await self.connect()
        try:
            return await client.ask(method, target, body, **fields)
        finally:
            client.close()

    async def metrics(self):
        text = (await self.ask("GET", "/metrics")).body.decode()
        return {k: float(v) for k, _, v in (line.removeprefix("ucm_proxy_").rpartition(" ")
                                            for line in text.splitlines() if line[0] != "#")}

    async def until(self, name, value):
        """Asks /metrics again and again: there is no other way to see from outside."""
        while (got := (await self.metrics()).get(name)) != value:
            await asyncio.sleep(0.01)
        return got

    def peak_mib(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    async def end(self):
        """Its exit status; 0 unless a sanitizer has something to say."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), 10)
            except asyncio.TimeoutError:
                self.process.kill()
        await self._reading
        return await self.process.wait()
