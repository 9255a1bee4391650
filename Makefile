# Exactly two commands on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export ORT_DISABLE_TELEMETRY := 1

# A process per core; one that is idle takes tests from another.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

.PHONY: demo test check fast lint proto docs bench soak report clean

# torch first and by itself: the pinned version is the CPU build, and nothing later may replace it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## train, export, serve, update, recommend and score on generated data
	$(BIN)/python -m tools.demo

test: $(STAMP)  ## all tests
	$(PYTEST)

check: $(STAMP)  ## lint and the fast tests side by side, in about two minutes
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint fast

fast: $(STAMP)
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: $(STAMP)  ## regenerate the committed gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		protos/dman/v1/dman.proto protos/dman/v1/admin.proto

docs: $(STAMP)  ## write docs/options.md from the code, and the tables of docs/scale.md from the reports
	$(BIN)/python -m tools.options_page
	$(BIN)/python -m tools.scale.plan

bench: $(STAMP)  ## measure the bundle in bundle/ and write reports/performance.md
	$(BIN)/python -m tools.bench

soak: $(STAMP)  ## attack servers for half an hour and more, and write reports/faults.md
	$(BIN)/python -m tools.soak

report: $(STAMP)  ## build reports/accuracy.md and reports/paper.md from reports/records.parquet
	$(BIN)/python -m tools.report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
