# Thin names for common commands. Every target works from a fresh clone.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo compare test lint bench clean

setup: $(READY)

# The stamp makes every target depend on one installation that is done once per change of its inputs.
$(READY): pyproject.toml requirements.txt $(wildcard d2ctx/install/*.py)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[d2,coco,dev]'
	$(PY) -m d2ctx.install
	touch $@

test: $(READY)
	$(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: $(READY)
	$(PY) -m d2ctx.demo --neck a2fpn-lite

compare: $(READY)
	$(PY) -m d2ctx.demo --neck a2fpn-lite --neck fpn

bench: $(READY)
	$(PY) -m benchmarks.reassembly

clean:
	rm -rf $(VENV) build dist *.egg-info output .pytest_cache .ruff_cache .mypy_cache
