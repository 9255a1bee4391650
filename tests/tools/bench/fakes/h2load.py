"""A stand-in for h2load, with the options that the benchmark gives it: one client, a log, and how much came back."""

from __future__ import annotations

import argparse
import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import grpc

p = argparse.ArgumentParser()
p.add_argument("--version", action="version", version="a stand-in for h2load")
p.add_argument("--h1", action="store_true")
p.add_argument("--clients")
p.add_argument("--duration", type=lambda text: int(text.removesuffix("ms")) / 1e3)
p.add_argument("--data", type=Path)
p.add_argument("--log-file", type=Path)
p.add_argument("--header", action="append")
p.add_argument("url")
arguments = p.parse_args()
url, body = urlsplit(arguments.url), arguments.data.read_bytes()
headers = dict(line.split(": ", 1) for line in arguments.header)

if arguments.h1:
    connection = http.client.HTTPConnection(url.netloc)

    def send() -> tuple[int, bytes]:
        connection.request("POST", url.path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()

else:
    call = grpc.insecure_channel(url.netloc).unary_unary(url.path)

    def send() -> tuple[int, bytes]:
        try:
            return 200, bytes(5) + call(body[5:])
        except grpc.RpcError:
            return 200, b""


end, received = time.monotonic() + arguments.duration, 0
with arguments.log_file.open("w") as log:
    while time.monotonic() < end:
        began, at = time.perf_counter(), time.time_ns() // 1000
        status, content = send()
        received += len(content)
        log.write(f"{at}\t{status}\t{round((time.perf_counter() - began) * 1e6)}\n")
print(f"traffic: {received}B ({received}) total, 0B (0) headers (space savings 0.00%), {received}B ({received}) data")
