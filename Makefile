# Thin names for common commands. Every target works from a fresh clone; nothing is done twice.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SCENES := datasets/synth/synth.json
SEG_RUN := output/seg_tiny_instant
SEG_SCENES := datasets/scenes
SEG_CONFIG := configs/seg/segmenter/seg_tiny_instant.yaml

.PHONY: setup demo compare demo-seg test stress lint bench clean

setup: $(READY)

$(READY): pyproject.toml requirements.txt $(wildcard d2ctx/install/*.py)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[d2,seg,dev]'
	$(PY) -m d2ctx.install
	touch $@

test: $(READY)
	$(PY) -m pytest

# Runs that are killed, disks that are full, thousands of broken inputs: minutes.
stress: $(READY)
	$(PY) -m pytest -m stress

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

# The same for semantic segmentation, with a Segmenter from random weights.
demo-seg: $(SEG_RUN)/scores.json
	$(PY) -m segtrain predict $(SEG_RUN) $(SEG_SCENES)/images/val --out $(SEG_RUN)/predictions
	$(PY) -m segtrain runs plot $(SEG_RUN)

# An interrupted run goes on where it stopped. One that has ended is kept, whatever the configuration
# says by now: remove its folder to train anew.
$(SEG_RUN)/scores.json: | $(SEG_SCENES)/synth.json
	if test -e $(@D)/checkpoints/last.pt; then $(PY) -m segtrain resume $(@D); \
	else $(PY) -m segtrain train --config $(SEG_CONFIG); fi
	$(PY) -m segtrain eval $(@D) --out $@

$(SEG_SCENES)/synth.json: | $(READY)
	$(PY) -m segtrain data synth --out $(@D) --format folder --num 1000 --size 128 --val-fraction 0.1 --seed 1
	$(PY) -m segtrain data check $(SEG_CONFIG)

bench: $(VENV)/.bench
	$(PY) -m benchmarks.ops

# The baselines are packages that nothing else needs.
$(VENV)/.bench: $(READY)
	$(PY) -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info output datasets/synth datasets/scenes .pytest_cache .ruff_cache .mypy_cache
