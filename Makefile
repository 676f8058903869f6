PYTHON ?= python3
PORT ?= 8000
MODEL ?= .oserve/models/tiny-llama
BIN := .venv/bin

.PHONY: help serve test check format clean

help:
	@echo "make serve   set up everything (vLLM included) and serve a tiny model on port $(PORT)"
	@echo "make test    set up everything and run all checks and tests, real engines among them"
	@echo "make test-backends   install servers of other make and hold them to the contract; some 15 minutes"
	@echo "make check   format, lint, types, import contracts and fast tests: under a minute"

serve:
	@$(PYTHON) tools/setup.py --engine --model $(MODEL)
	@$(BIN)/oserve serve $(MODEL) --port $(PORT) --set 'engines.variants={int8: $(MODEL)-int8}' \
		--set planning.slo_ttft_ms=4000 --set planning.slo_tpot_ms=200 $(ARGS)

test:
	@$(PYTHON) tools/setup.py --dev --engine --forecast
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not engine"
	$(BIN)/python -m pytest -m engine

check:
	@$(PYTHON) tools/setup.py --dev
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n auto --dist worksteal --hypothesis-profile=quick \
		-m "not engine and not extra and not slow"

.PHONY: test-backends
test-backends:
	@$(PYTHON) tools/setup.py --dev
	@$(PYTHON) tools/backends.py
	$(BIN)/python -m pytest -m backend

.PHONY: lint
lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .oserve
