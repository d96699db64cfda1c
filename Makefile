# make demo: from nothing to a trained and evaluated model on a laptop. make test: all checks. Both make .venv first.
PYTHON ?= python3
PY = .venv/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test
setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

demo: setup
	rm -rf runs/demo
	$(PY) data/make_sample.py
	$(PY) make_tiny.py
	$(PY) train_gated.py --data data/artquest --blip2 tiny --accumulation 1 --batch-size 32 --lr 1e-3 --epochs 5 --out runs/demo
	$(PY) eval_gated.py --checkpoint runs/demo/best.pt --split test --predictions runs/demo/test.json
	@echo "best.pt, curves.png, training_log.csv, test.json and test.csv are in runs/demo"

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile
