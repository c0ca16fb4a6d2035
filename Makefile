# Thin names for common commands. Every target works from a fresh clone; nothing is done twice.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SCENES := datasets/synth/synth.json

.PHONY: setup demo compare test lint bench clean

setup: $(READY)

$(READY): pyproject.toml requirements.txt $(wildcard d2ctx/install/*.py)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[d2,seg,dev]'
	$(PY) -m d2ctx.install
	touch $@

test: $(READY)
	$(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo compare output/demo/%/results.json: export DETECTRON2_DATASETS := datasets

# Synthetic scenes, a training run, pictures and curves: see configs/d2/demo.
demo: output/demo/a2fpn_lite/results.json
	$(PY) -m d2ctx.visualize output/demo/a2fpn_lite
	$(PY) -m d2ctx.report output/demo/a2fpn_lite

compare: output/demo/a2fpn_lite/results.json output/demo/fpn/results.json
	$(PY) -m d2ctx.visualize output/demo/fpn
	$(PY) -m d2ctx.report output/demo/fpn output/demo/a2fpn_lite --out output/demo/compare.png

# An interrupted run goes on where it stopped.
output/demo/%/results.json: configs/d2/demo/%.yaml $(SCENES) | $(READY)
	$(PY) projects/train_net.py --config-file $< --resume OUTPUT_DIR $(@D)

$(SCENES): | $(READY)
	$(PY) -m segtrain data synth --out $(@D) --format coco --num 900 --val-fraction 0.1 --seed 1

bench: $(VENV)/.bench
	$(PY) -m benchmarks.ops

# The baselines are packages that nothing else needs.
$(VENV)/.bench: $(READY)
	$(PY) -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info output datasets/synth .pytest_cache .ruff_cache .mypy_cache
