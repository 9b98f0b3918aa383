# `make train` and `make test` set everything up first; the second time the set-up costs nothing.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help train test study gpu docs lint format clean

help:  ## say what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

train: $(READY)  ## train the bundled model on composition; ends with a table and a report
	@$(BIN)/python -m cluster.train shapes-nft

# The tests of a file share a process, its Ray node and its models. Files start in the order of their names, so that
# the last ones are short. Each process needs some 3 GB, hence at most four.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint  ## lint, type check, and run the tests with coverage
	@echo "==> tests"
	@$(BIN)/python -m pytest -q $(PARALLEL) --cov --cov-report=term --cov-fail-under=90

SDE := flowgrpo,flowgrpo_4u,noise_margin_2x,random_2x,prompt_filter_2x,flowgrpo_early,screened_4x_margin_2x_early
NFT := nft,nft_random_2x,nft_margin_2x,nft_sol_rl,nft_fast,nft_fast_random,nft_fast_sol_rl
OTHERS := nft_margin_4x,nft_adaptive_2x,nft_drafts_4x_margin_2x,nft_all_2x
VARIED := nft_margin_2x_own_noise,nft_margin_2x_pairs,nft_margin_2x_ranks,nft_margin_2x_group,nft_margin_2x_clip5
TRIED := awm,awm_random_2x,awm_margin_2x,dpo,dpo_random_2x,dpo_margin_2x

# Objectives on the forward process run for about half of FlowGRPO's compute, and are evaluated more often.
study: $(READY)  ## run the whole study on the bundled tasks (hours; it resumes) and remake RESULTS.md
	@for task in "shapes 60 40" "words 40 28" "preference 60 40"; do set -- $$task; \
	    ode="--rollout.dynamics ode --learner.objective.name nft --learner.threads 1"; \
	    for measure in variance preview; do \
	        $(BIN)/python -m cluster.study $$measure $$1 --learner.threads 1 && \
	        $(BIN)/python -m cluster.study $$measure $$1 $$ode || exit 1; done; \
	    compare="$(BIN)/python -m cluster.study compare $$1 --learner.threads 1 --rates 1.5e-4,3e-4,6e-4,1e-3" && \
	    $$compare --steps $$2 --eval_every 4 --arms $(SDE) --seeds 10 && \
	    $$compare --steps $$3 --eval_every 2 --arms $(NFT) --seeds 10 && \
	    $$compare --steps $$3 --eval_every 2 --arms $(OTHERS),$(VARIED),$(TRIED) --seeds 5 || exit 1; done
	@$(BIN)/python -m cluster.study report

gpu: $(READY)  ## show what works on this GPU, how fast, and what limits it (8 minutes); writes gpu.json
	@$(BIN)/python -m cluster bench gpu --json gpu.json

docs: $(VENV)/.docs  ## build the documentation into site/, which opens offline
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict && echo "site/index.html"

lint: $(READY)  ## check style, format and types
	@echo "==> style, format, types"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy

format: $(READY)  ## bring the code into shape
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

clean:  ## remove the environment and every cache; runs stay
	@rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python that is new enough; uv installs in seconds, and pip takes over where uv finds no index.
$(READY): pyproject.toml constraints.txt
	@python=; for candidate in python3 python3.13 python3.12 python3.11 python3.14; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "NoiseMargin needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || true)" >&2; exit 1; fi; \
	echo "==> setting up $(VENV) with $$($$python --version) (once; about 7 GB)"; \
	$$python -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
	    -r pyproject.toml --extra dev \
	    || { echo "==> uv could not install; trying pip" >&2; \
	         $(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt; }
# paddleocr asks for the OpenCV that draws windows, which shares its folder; the headless one, put there last, wins.
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --reinstall --constraint constraints.txt \
	    opencv-python-headless 2>/dev/null \
	    || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
	        --constraint constraints.txt opencv-python-headless
	@touch $@

# Only what the documentation needs besides; the constraints keep everything else as it is.
$(VENV)/.docs: $(READY)
	@echo "==> adding what builds the documentation"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
	    -r pyproject.toml --extra docs \
	    || $(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	@touch $@
