"""What TLS, tokens, limits and metrics cost together: two servers that take turns."""

from __future__ import annotations

import functools
import hashlib
import random
import secrets
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import Operation, Plan, clean, rate_ratios, run_in_processes
from tools.bench.report import BLOCK_HEADS, Claim, Section, block_rows
from tools.bench.servers import connect
from tools.faults.attacks import update
from tools.faults.servers import free_port
from tools.soak.setting import Soak

PLAIN, GUARDED = "plain", "guarded"
MIN_RATIO = 0.85
THREADS, PROCESSES, USERS, CALL_SECONDS = 8, 2, 100, 10.0
UPDATE_SHARE = 0.2


@dataclass(frozen=True)
class Sides:
    """What a client process needs for both servers; picklable."""

    addresses: dict[str, str]
    certificate: bytes  # PEM
    token: str
    items: Sequence[str]

    def channel(self, side: str) -> grpc.Channel:
        if side == PLAIN:
            return connect(self.addresses[side])
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
        return grpc.secure_channel(self.addresses[side], grpc.ssl_channel_credentials(self.certificate), options)

    def metadata(self, side: str) -> tuple[tuple[str, str], ...]:
        return () if side == PLAIN else (("authorization", f"Bearer {self.token}"),)


def overhead(soak: Soak) -> Section:
    """Throughput with TLS, tokens, limits and metrics by throughput without."""
    token, authority = secrets.token_urlsafe(32), trustme.CA()
    options = _guarded_options(soak.scratch, token, authority)
    with soak.server(PLAIN) as plain, soak.server(GUARDED, *options) as guarded:
        sides = Sides({PLAIN: plain.address, GUARDED: guarded.address}, authority.cert_pem.bytes(), token, soak.items())
        calls = soak.effort.overhead_calls * soak.effort.overhead_rounds
        plan = Plan({PLAIN: calls, GUARDED: calls}, concurrency=THREADS, rounds=soak.effort.overhead_rounds)
        blocks = clean(run_in_processes(plan, functools.partial(_operations, sides), PROCESSES))
    ratio = rate_ratios(blocks[GUARDED], blocks[PLAIN])
    return Section(
        "What access control and metrics cost",
        f"Two servers of the same bundle take turns under {THREADS} clients, four recommendations to one update. "
        "The guarded one has TLS, a token for each call, limits that are never reached, and metrics.",
        [
            Claim(
                "throughput with TLS, tokens, limits and metrics by without",
                str(ratio),
                f">= {MIN_RATIO:g}",
                ratio.median >= MIN_RATIO,
            )
        ],
        BLOCK_HEADS,
        block_rows(blocks),
    )


def _guarded_options(scratch: Path, token: str, authority: trustme.CA) -> list[str]:
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    chain, key, tokens = (scratch / name for name in ("server.pem", "server.key", "tokens"))
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    tokens.write_text(f"soak  read,write  sha256:{hashlib.sha256(token.encode()).hexdigest()}\n")
    for secret in (key, tokens):
        secret.chmod(0o600)
    paths = {"--tls-cert": chain, "--tls-key": key, "--tokens": tokens}
    limits = ["--caller-requests 1000000", "--caller-events 1000000000", f"--metrics-port {free_port()}"]
    return [*(f"{name} {shlex.quote(str(path))}" for name, path in paths.items()), *limits]


def _operations(sides: Sides, stack: ExitStack, thread: int, names: Sequence[str]) -> list[Operation]:
    """The same calls to both servers, by one client thread with its own connections."""
    return [_operation(sides, stack.enter_context(sides.channel(side)), side, thread) for side in names]


def _operation(sides: Sides, channel: grpc.Channel, side: str, thread: int) -> Operation:
    chooser, stub, metadata = random.Random(thread), RecommenderStub(channel), sides.metadata(side)

    def request() -> pb.UpdateRequest | pb.RecommendRequest:
        user = f"user {thread} {chooser.randrange(USERS)}"
        if chooser.random() < UPDATE_SHARE:
            return update(user, [chooser.choice(sides.items)], f"{thread} {chooser.random()}")
        return pb.RecommendRequest(user_id=user, k=10)

    def send(message: pb.UpdateRequest | pb.RecommendRequest) -> object:
        if isinstance(message, pb.UpdateRequest):
            return stub.Update(message, timeout=CALL_SECONDS, metadata=metadata)
        return stub.Recommend(message, timeout=CALL_SECONDS, metadata=metadata)

    return Operation(side, request, send)
