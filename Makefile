# make demo: from nothing to a trained and evaluated Gated BLIP-2 on a laptop. make demo-all: every other stage after it.
# make look: a page to ask about paintings. make test: all checks. make quick: ruff and the tests that find most, in a minute.
# All make .venv first.
PYTHON ?= python3
PY = .venv/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: setup look small demo demo-all test quick lint
setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

look: .venv/gradio
	$(PY) demo.py --open

.venv/gradio: .venv/installed
	$(PY) -m pip install -q "gradio>=6,<7"
	touch $@

# SmolLM2, EfficientNet-Lite2 and a MiniLM as a BLIP-2 in models/small: 200 MB are fetched, once
small: .venv/gguf
	$(PY) tools/make_small.py

.venv/gguf: .venv/installed
	$(PY) -m pip install -q "gguf>=0.10,<1"
	touch $@

demo: setup
	rm -rf runs/demo
	$(PY) tools/make_sample.py
	$(PY) train_gated.py --data data/artquest --blip2 tiny --accumulation 1 --batch-size 32 --lr 1e-3 --epochs 5 --cache runs/demo-cache \
	    --out runs/demo
	$(PY) eval_gated.py --checkpoint runs/demo --split test --cache runs/demo-cache --predictions runs/demo/test.json
	@echo "best.pt, curves.png, training_log.csv, test.json and test.csv are in runs/demo"

demo-all: demo
	rm -rf runs/demo-style runs/demo-caption runs/demo-qformer runs/demo-gated2 runs/demo-cir
	$(PY) efficientnet_pretrain.py --data data/artquest --arch test_efficientnet --size 112 --epochs 12 --batch-size 16 --lr 1e-2 \
	    --cutmix 0 --dropout 0 --out runs/demo-style
	$(PY) train_blip_caption.py --data data/artquest --blip tiny --lr 2e-3 --epochs 4 --batch-size 16 --cases 6 --out runs/demo-caption
	$(PY) tools/make_sample.py --cirr
	$(PY) pretrain_qformer.py --data drawn=data/artquest --blip2 tiny --lr 1e-3 --epochs 20 --batch-size 32 --out runs/demo-qformer
	$(PY) train_gated.py --data data/artquest --blip2 tiny --qformer runs/demo-qformer/hf --accumulation 1 --batch-size 32 --lr 1e-3 \
	    --epochs 1 --out runs/demo-gated2
	$(PY) train_cir.py --data data/cirr --blip2 tiny --qformer runs/demo-qformer/hf --lr 1e-3 --epochs 3 --out runs/demo-cir
	$(PY) train_cir.py --data data/cirr --checkpoint runs/demo-cir/best.pt --gate-maps runs/demo-cir/maps --submit runs/demo-cir/submission

lint: setup
	$(PY) -m ruff check -q

# optional packages (see requirements.txt) whose files are tested where they are there: Excel's and Parquet's tables
.venv/tested: .venv/installed
	$(PY) -m pip install -q "openpyxl>=3.1,<4" "pyarrow>=17"
	touch $@

# the models, answers, stored outputs of the original code, metrics, rows, the frame of a training, and one training, evaluated;
# without BLIP-2's full sizes and WordNet, which take long to build and to read
QUICK = $(addprefix tests/,test_core.py test_answers.py test_golden.py test_metrics.py data/test_rows.py engine/test_run.py) \
    $(addprefix tests/test_scripts.py::test_,run_folder eval_needs_only_the_checkpoint checkpoint_gives_the_same_numbers_after_loading \
        accumulation_equals_the_large_batch epoch_plan_is_pure_and_complete cosine_lr_values golden_loss_curve)
quick: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -k "not full_size and not meteor_of_nltk" $(QUICK)

test: lint .venv/tested
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile
