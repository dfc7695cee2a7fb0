# Everything here builds its own .venv first; a machine needs only make and Python 3.11 or newer.

VENV   := .venv
PYTHON ?=
BIN    := $(VENV)/bin
DEMO   := build/quickstart
NOISE  := build/noise-demo
LENS   := build/lens
EVAL   := build/eval
# the browser of the page's tests; another one:  make test CHROMIUM=google-chrome
export CHROMIUM ?= chromium

# more of qtarget's flags for the demo:  make demo DEMO_ARGS="--max_steps 2"
DEMO_ARGS  ?=
# more of pytest's flags:  make test TEST_ARGS="-k presets -x"
TEST_ARGS  ?=
# a test file at a time on each of two cores, in the order of their names: else files of a few long tests come last, on
# one core; one after the other:  make test WORKERS=
WORKERS    ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=
SOAK_ARGS  ?=

.DEFAULT_GOAL := help
.PHONY: help env demo noise-demo lens-demo teachers-demo test test-full study study-report study-quick browser check format bench clean clean-all real-model real-model-quick real-model-large soak house docs-tree docs docs-settings notebook locks test-lowest test-latest test-distributed eval-demo audit gpu-bench gpu-check vllm-check release-check

help: ## this list
	@printf 'qtarget: supervised fine-tuning toward a target you choose\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-17s %s\n", $$1, $$2 }'
	@printf '\nDEMO_ARGS, TEST_ARGS and BENCH_ARGS pass flags on: make demo DEMO_ARGS="--max_steps 2"\n'

env: $(VENV)/.ready ## build .venv (other targets do it by themselves)

# Installed again whenever the project's metadata or the lock changes.
$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup_env.sh
	@PYTHON="$(PYTHON)" sh scripts/setup_env.sh

demo: $(VENV)/.ready ## train a small real model toward a target, see what it learned
	@start=$$(date +%s) && \
	rm -rf $(DEMO)/run && \
	$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(BIN)/qtarget train --config recipes/quickstart.yaml $(DEMO_ARGS) && \
	$(BIN)/python examples/answer.py --model $(DEMO)/run --data $(DEMO)/data/test.jsonl && \
	printf '\ndemo: %s s after the environment was ready; model in %s\n' "$$(($$(date +%s) - start))" "$(DEMO)/run"

# Five seeds, and what docs/first-run.md shows of them:  make noise-demo DEMO_ARGS="--seeds 5 --record"
noise-demo: $(VENV)/.ready ## three objectives on demonstrations of which 15 % are wrong, from nothing: about a minute
	@start=$$(date +%s) && \
	$(BIN)/python recipes/noise_demo.py --out $(NOISE) $(DEMO_ARGS) && \
	printf '\nnoise-demo: %s s after the environment was ready\n' "$$(($$(date +%s) - start))"

# The teacher is the same model after two steps of plain SFT on these problems.
lens-demo: $(VENV)/.ready ## capture what targets teach a real model, and write the page build/lens/lens.html
	@start=$$(date +%s) && \
	rm -rf $(LENS) && \
	$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(BIN)/qtarget train --config recipes/quickstart.yaml --target sft --learning_rate 1e-4 --max_steps 2 \
	    --dataset_test_split none --output_dir $(LENS)/teacher && \
	$(BIN)/qtarget lens capture --config recipes/quickstart.yaml --teacher_model_name_or_path $(LENS)/teacher \
	    --per_device_eval_batch_size 2 --rows 24 --top_k 32 -o $(LENS)/capture && \
	$(BIN)/qtarget lens report $(LENS)/capture -o $(LENS)/lens.html && \
	$(BIN)/qtarget lens advise $(LENS)/capture && \
	printf '\nlens-demo: %s s after the environment was ready; open %s in a browser\n' \
	    "$$(($$(date +%s) - start))" "$(LENS)/lens.html"

# A cache of the whole vocabulary trains as the live teacher does; one of 64 tokens within its bound.
teachers-demo: $(VENV)/.ready ## ask a teacher once, check the cache, train from it, compare with the live teacher
	@start=$$(date +%s) && \
	$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(BIN)/python recipes/teachers_demo.py --demo $(DEMO) --out build/teachers $(DEMO_ARGS) && \
	printf '\nteachers-demo: %s s after the environment was ready\n' "$$(($$(date +%s) - start))"

# One thread: what a training run gives depends on it in the last digits, and the cells on record were made so.
REAL_MODEL = OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -m real_model

real-model: $(VENV)/.ready ## four targets on a real model, clean and noisy labels, 3 seeds: about 2 hours, resumable
	@$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(REAL_MODEL).run && $(REAL_MODEL).report

real-model-quick: $(VENV)/.ready ## the same with two steps and four problems, to see that it works
	@$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(REAL_MODEL).run --quick

# Pieces of eight minutes: the same command goes on. The page, of whole seeds:  python -m real_model.report --large
real-model-large: $(VENV)/.ready ## longer sums, two kinds of teacher, 5 seeds, for a GPU: BENCH_ARGS="--device cuda --minutes 8"
	@$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(REAL_MODEL).run --large $(BENCH_ARGS)

# Strict wants the mark that was asked for, lenient takes the last number: which of them moved is the point.
eval-demo: $(VENV)/.ready ## after `make demo`: did it help? ask the model before and after, and compare
	@start=$$(date +%s) && \
	{ test -f $(DEMO)/run/model.safetensors || { echo "$(DEMO)/run holds no model: make demo"; exit 2; }; } && \
	rm -rf $(EVAL) && \
	$(BIN)/python recipes/eval_demo.py --out $(EVAL)/sums.jsonl && \
	for arm in before:$(DEMO)/SmolLM2-135M-Instruct after:$(DEMO)/run; do \
	    $(BIN)/qtarget eval --model $${arm#*:} --tasks $(EVAL)/sums.jsonl --verifier math --n 4 --max_new_tokens 40 \
	        --batch_size 50 --instruction "End with #### and the number." -o $(EVAL)/$${arm%%:*} || exit; \
	done && \
	$(BIN)/qtarget compare before=$(EVAL)/before after=$(EVAL)/after -o $(EVAL)/report && \
	printf '\neval-demo: %s s after the environment was ready; open %s in a browser\n' \
	    "$$(($$(date +%s) - start))" "$(EVAL)/report/compare.html"

# The page is tested in a real browser: where there is none and none can be installed, those tests are left out, and said.
test: $(VENV)/.ready ## check, then the fast tests
	@start=$$(date +%s) && \
	$(MAKE) --no-print-directory check && \
	{ $(MAKE) --no-print-directory browser || echo "no browser: the page's browser tests are left out"; } && \
	$(BIN)/python -m pytest $(WORKERS) --durations=15 \
	    -m "not full$$(command -v $(CHROMIUM) >/dev/null || echo ' and not browser')" $(TEST_ARGS) && \
	printf 'make test: %s s\n' "$$(($$(date +%s) - start))"

test-full: $(VENV)/.ready ## check, then every test, those that take minutes too
	@start=$$(date +%s) && \
	$(MAKE) --no-print-directory check browser && \
	$(BIN)/python -m pytest $(WORKERS) --durations=15 -m "full or not full" $(TEST_ARGS) && \
	printf 'make test-full: %s s\n' "$$(($$(date +%s) - start))"

# The trainer against an environment of its own, build/lowest or build/latest, from locks/; results are committed.
VERSION_TESTS = $(addprefix tests/training/test_trainer_,trl.py saving.py lora.py gradients.py layouts.py)

test-lowest: ## the trainer's tests at the lowest versions of pyproject.toml: benchmarks/results/versions.json
	@$(or $(PYTHON),python3) scripts/versions.py lowest $(VERSION_TESTS)

test-latest: ## the same at the latest versions within its bounds; another Python goes on record too: PYTHON=python3.13
	@$(or $(PYTHON),python3) scripts/versions.py latest $(VERSION_TESTS)

locks: ## locks/lowest.txt and locks/latest.txt, from the bounds of pyproject.toml
	@$(or $(PYTHON),python3) scripts/lock.py

release-check: ## build wheel and sdist of the last commit, install each elsewhere, run it: minutes; PYTHON=python3.13
	@$(or $(PYTHON),python3) scripts/release_check.py

# part of make test, too
test-distributed: $(VENV)/.ready ## the tests that start several processes: DDP, FSDP2, the head in pieces
	@$(BIN)/python -m pytest --durations=5 -m distributed $(TEST_ARGS)

browser: ## install a chromium for the page's tests, where there is none (Debian and Ubuntu, as root)
	@command -v $(CHROMIUM) >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }

check: $(VENV)/.ready ## lint, format, types, and the limits of make house
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python scripts/house.py

house: $(VENV)/.ready ## code-structure counts against their limits: reaches into the trainer, duplicated descriptions, cycles, lengths
	@$(BIN)/python scripts/house.py

docs-tree: $(VENV)/.ready ## the tree in docs/architecture.md, from the first lines of the modules' docstrings
	@$(BIN)/python scripts/docs_tree.py

# pip-audit lives in an environment of its own, and asks an advisory service about the names and versions of the lock.
audit: ## known vulnerabilities of the locked dependencies (asks pypi.org and its advisory service)
	@sh scripts/audit.sh

# MkDocs lives in an environment of its own, build/docs-env.
docs: $(VENV)/.ready ## the documentation site, build/site/index.html: strict, and every link of it followed
	@sh scripts/docs_site.sh && \
	QTARGET_SITE=build/site $(BIN)/python -m pytest -q tests/docs_site \
	    -m "full$$(command -v $(CHROMIUM) >/dev/null || echo ' and not browser')" $(TEST_ARGS)

# Cells run one after the other in one process, without Jupyter; make test compares what they give with what is stored.
notebook: $(VENV)/.ready ## run examples/first_look.ipynb and store its outputs
	@$(BIN)/python docs/site/run_notebook.py

docs-settings: $(VENV)/.ready ## the table of settings in docs/training.md, from QTargetConfig's docstring
	@$(BIN)/python scripts/docs_settings.py

format: $(VENV)/.ready ## let ruff fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.ready ## run benchmarks/*.py
	@ls benchmarks/*.py >/dev/null 2>&1 || { echo "there is no benchmarks/*.py"; exit 1; }
	@set -e; for script in $(filter-out benchmarks/soak.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do \
	    printf '== %s\n' "$$script"; $(BIN)/python "$$script" $(BENCH_ARGS); \
	done

# Without a CUDA device both say so, and run and compile the kernels as far as a CPU can.
gpu-bench: $(VENV)/.ready ## the engine on a GPU: is it right, and how fast? ten minutes at most; benchmarks/results/gpu.json
	@$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

gpu-check: $(VENV)/.ready ## is the engine right on this GPU? every published case, host reads, memory checker
	@$(BIN)/python benchmarks/gpu.py --check $(BENCH_ARGS)

# Some four hours on two cores in all; interrupted, it goes on where it was. BENCH_ARGS="--minutes 60" stops by itself.
study: $(VENV)/.ready ## the controlled study of docs/study.md: what is not on record yet, then the page
	$(BIN)/python benchmarks/study/run.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/study/report.py

study-report: $(VENV)/.ready ## docs/study.md and its pictures from the results on record
	$(BIN)/python benchmarks/study/report.py

study-quick: $(VENV)/.ready ## a small form of the study, also of further arms: make study-quick STUDY_ARMS="idft kd+jsd"
	rm -rf build/study-quick
	$(BIN)/python benchmarks/study/run.py --quick
	$(BIN)/python benchmarks/study/report.py --quick

# vLLM wants another Transformers: it gets an environment of its own.
vllm-check: $(VENV)/.ready ## a real vLLM server beside Transformers: cache, greedy answers, samples; benchmarks/results/vllm_check.json
	@$(BIN)/python recipes/prepare_quickstart.py --out $(DEMO) && \
	$(BIN)/python scripts/vllm_check.py --demo $(DEMO) $(BENCH_ARGS)

soak: $(VENV)/.ready ## an hour of training: are memory, files and logs bounded?  SOAK_ARGS="--minutes 5"
	@$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

clean: ## delete what runs and tools wrote (.venv stays)
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache
	find src tests recipes examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

clean-all: clean ## delete .venv too
	rm -rf $(VENV)
