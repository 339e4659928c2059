"""What clients of the scoring service get under load, and what the load costs in memory.

    python benchmarks/serve_reward.py --output benchmarks/results [--note "beside other work"]

One process with all clients sends requests to `serve_reward.py reward=length` on the same machine,
so the numbers are those of HTTP, JSON and the queue, and not of a model. Memory is the peak of the
service's anonymous memory. In the last load the service is killed and started again while clients
buy labels; each client repeats its request until it has an answer. The command writes
serve-reward.json and serve-reward.md, and prints the table.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.placement import ROOT, machine, own_memory

PAIRS, CHARACTERS = 8, 1000  # texts of a request, characters of a response
LARGE = 8_000_000  # bytes of a large body
ROUNDS = 40  # labelled by each client of the last load
COLUMNS = ("load", "answers/s", "median", "p99", "statuses", "peak memory", "remarks")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for serve-reward.json")
    parser.add_argument("--note", default="", help="about the machine, for the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = asyncio.run(measure_all(Path(work)))
    here = machine() | {"note": arguments.note}
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"machine": here, "loads": rows}, indent=1) + "\n"
    (arguments.output / "serve-reward.json").write_text(content, encoding="utf-8")
    text = table(rows, here)
    (arguments.output / "serve-reward.md").write_text(text, encoding="utf-8")
    print(text)


async def measure_all(work: Path) -> list[dict]:
    service = Service(work / "state")
    try:
        await service.start()
        return [
            await measure(service, "one client, 5 s", scoring(1, 5)),
            await measure(service, "32 clients, 10 s", scoring(32, 10)),
            await measure(service, "200 clients, 20 s", scoring(200, 20)),
            await measure(service, "200 half-open connections beside 8 clients, 20 s", half_open),
            await measure(service, "200 connections with bodies of 8 MB, 20 s", large_bodies),
            await measure(service, "32 clients buy labels; killed, started again", restarted),
        ]
    finally:
        service.kill()


class Service:
    """A service as users start it, and the peak of its memory."""

    def __init__(self, folder: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.peak = folder, 0
        self.command = [
            sys.executable, str(ROOT / "serve_reward.py"), "reward=length", f"port={self.port}",
            f"local_run_dir={folder}",
        ]  # fmt: skip

    async def start(self) -> None:
        self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"{' '.join(self.command)} ended with {self.process.returncode}")
            with contextlib.suppress(OSError):
                await Connection(self.port).open()
                return
            await asyncio.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def watch(self) -> None:
        self.peak = 0
        while True:
            self.peak = max(self.peak, own_memory(self.process.pid))
            await asyncio.sleep(0.02)


@dataclass
class Load:
    """What the clients of a load saw. seconds: of each answer; statuses: how many of each."""

    service: Service
    seconds: list[float] = field(default_factory=list)
    statuses: collections.Counter = field(default_factory=collections.Counter)
    remarks: str = ""

    async def ask(self, connection: "Connection", request: bytes) -> dict:
        began = time.perf_counter()
        status, answer = await connection.ask(request)
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(time.perf_counter() - began)
        return answer


class Connection:
    """A connection that is opened when it is needed."""

    def __init__(self, port: int):
        self.port, self.reader, self.writer = port, None, None

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> tuple[int, dict]:
        """Status and body of the answer. Raises OSError or EOFError where there is none."""
        if self.writer is None:
            await self.open()
        try:
            self.writer.write(request)
            await self.writer.drain()
            head = await self.reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split()[0])
            return int(head.split()[1]), json.loads(await self.reader.readexactly(size))
        except (OSError, EOFError):
            self.writer.close()
            self.writer = None
            raise


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def scores_of(n: int) -> bytes:
    texts = {"prompts": ["a prompt"] * n, "responses": ["x" * CHARACTERS] * n}
    return post("/predict", json.dumps(texts).encode())


async def measure(service: Service, name: str, run) -> dict:
    load, watch = Load(service), asyncio.create_task(service.watch())
    began = time.perf_counter()
    await run(load)
    seconds = time.perf_counter() - began
    watch.cancel()
    waits = sorted(load.seconds)
    row = {
        "load": name,
        "answers_per_second": len(waits) / seconds,
        "median_seconds": statistics.median(waits) if waits else None,
        "p99_seconds": waits[int(0.99 * len(waits))] if waits else None,
        "statuses": dict(load.statuses),
        "peak_mib": round(service.peak / 2**20),
        "remarks": load.remarks,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def scoring(n_clients: int, seconds: float):
    """A load of clients that ask for scores, one request after the other."""

    async def run(load: Load) -> None:
        end, request = time.perf_counter() + seconds, scores_of(PAIRS)

        async def client() -> None:
            connection = Connection(load.service.port)
            while time.perf_counter() < end:
                try:
                    await load.ask(connection, request)
                except (OSError, EOFError):
                    load.statuses["lost"] += 1

        await asyncio.gather(*(client() for _ in range(n_clients)))

    return run


async def half_open(load: Load) -> None:
    """Connections that send part of a request, and clients beside them."""
    n_closed = 0

    async def begin(part: bytes) -> None:
        nonlocal n_closed
        connection = Connection(load.service.port)
        await connection.open()
        connection.writer.write(part)
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(connection.reader.read(1), 20)
        n_closed += connection.reader.at_eof() or connection.reader.exception() is not None

    request = scores_of(PAIRS)
    parts = [b"", request[:10], request[:70], request[:1000]]
    await asyncio.gather(*(begin(parts[i % 4]) for i in range(200)), scoring(8, 20)(load))
    load.remarks = f"{n_closed} of 200 closed"


async def large_bodies(load: Load) -> None:
    """Connections that send large bodies: half of them long texts, the others empty lists."""
    n = LARGE // 100_000
    texts = {"prompts": ["a"] * n, "responses": ["x" * 100_000] * n}
    lists = {"prompts": [[]] * (LARGE // 4), "responses": []}
    requests = [post("/predict", json.dumps(body).encode()) for body in (texts, lists)]
    end = time.perf_counter() + 20

    async def client(request: bytes) -> None:
        connection = Connection(load.service.port)
        while (left := end - time.perf_counter()) > 0:
            try:
                await asyncio.wait_for(load.ask(connection, request), left)
            except TimeoutError:
                load.statuses["not sent in time"] += 1
            except (OSError, EOFError):
                load.statuses["lost"] += 1

    await asyncio.gather(*(client(requests[i % 2]) for i in range(200)))


async def restarted(load: Load) -> None:
    """Clients that buy labels from a service that is killed in between."""
    answers = {}

    async def client(number: int) -> None:
        connection = Connection(load.service.port)
        for round_ in range(ROUNDS):
            body = {
                "id": f"{number}-{round_}",
                "round": round_,
                "prompts": [f"{number}"],
                "responses": [["x" * (round_ + 1), "y" * (number + 1)]],
            }
            request, answer = post("/train", json.dumps(body).encode()), None
            while answer is None:
                try:
                    answer = await load.ask(connection, request)
                except (OSError, EOFError):
                    load.statuses["lost"] += 1
                    await asyncio.sleep(0.2)
            answers[body["id"]] = answer

    async def kill() -> None:
        while len(answers) < 16 * ROUNDS:
            await asyncio.sleep(0.01)
        load.service.kill()
        await load.service.start()

    await asyncio.gather(*(client(number) for number in range(32)), kill())
    lines = (load.service.folder / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    bought = collections.Counter(tuple(json.loads(line)["responses"]) for line in lines)
    load.remarks = (
        f"{len(answers)} of {32 * ROUNDS} requests answered,"
        f" {sum(bought.values()) - len(bought)} labels bought twice"
    )


def table(rows: list[dict], here: dict) -> str:
    def milliseconds(seconds: float | None) -> str:
        return "" if seconds is None else f"{1000 * seconds:,.0f} ms"

    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        statuses = ", ".join(f"{n:,} x {status}" for status, n in row["statuses"].items())
        cells = [
            row["load"],
            f"{row['answers_per_second']:,.0f}",
            milliseconds(row["median_seconds"]),
            milliseconds(row["p99_seconds"]),
            statuses,
            f"{row['peak_mib']:,} MiB",
            row["remarks"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = f", {here['note']}" if here["note"] else ""
    where = f"{here['cores']} cores of an {here['processor']}, clients and service{note}."
    return "\n".join([*lines, "", where, ""])


if __name__ == "__main__":
    main()
