VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-fast campaign lint bench clean
$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -c .ci/constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready ## three nodes, a real etcd, a byte GPT, two killed nodes; about a minute
	$(PY) -m elasticd.cli demo

# Drills need both processors of a small machine for themselves; the rest waits half of the time, for imports and the like.
test: $(VENV)/.ready ## all of it; what a machine cannot do is skipped, and says why
	$(PY) -m pytest tests/chaos; drills=$$?; \
	$(PY) -m pytest --ignore tests/chaos -n 2 --dist loadfile --no-loadscope-reorder && exit $$drills

test-fast: $(VENV)/.ready ## the core and what else needs seconds
	$(PY) -m pytest -m "not net and not slow"

RUNS ?= 50
SEED ?= 1
campaign: $(VENV)/.ready ## the same curve under random faults, run after run; 20 to 90 seconds each, stops at the first that differs
	$(PY) -m pytest -m campaign
	rm -rf out/campaign
	$(PY) -m elasticd.testing.campaign --runs $(RUNS) --seed $(SEED)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check elasticd tests dashboards
	$(VENV)/bin/mypy

bench: $(VENV)/.ready ## side by side with torchrun; about an hour
	$(PY) -m elasticd.bench

clean:
	rm -rf $(VENV) out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
