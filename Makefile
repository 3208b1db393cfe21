VENV := .venv
PY := $(VENV)/bin/python

.PHONY: test lint
$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -c .ci/constraints.txt -e '.[dev]'
	touch $@

test: $(VENV)/.ready
	$(PY) -m pytest

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check elasticd tests
	$(VENV)/bin/mypy
