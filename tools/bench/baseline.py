"""Prints the resident bytes of a process that imports the server's libraries, loads both graphs and does nothing else.

Imports nothing of this project: `python tools/bench/baseline.py BUNDLE`.
"""

import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import grpc  # noqa: F401
import lmdb  # noqa: F401
import onnxruntime as ort
import psutil

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
sessions = [
    ort.InferenceSession(f"{sys.argv[1]}/{graph}.onnx", options, providers=["CPUExecutionProvider"])
    for graph in ("segment_encoder", "memory_abstraction")
]
print(psutil.Process().memory_info().rss)
