PYTHON ?= python3
PORT ?= 8000
# Tests at a time: real engines take some gigabytes and a core each.
JOBS ?= 2
MODEL ?= smollm2-135m
BIN := .venv/bin

.PHONY: help serve demo test check format clean

help:
	@echo "make serve   set up everything (vLLM included) and serve SmolLM2-135M on port $(PORT)"
	@echo "             (MODEL=tiny: a tiny model of random weights; or MODEL=a model's folder)"
	@echo "make demo    serve it under traffic that rises, flips and falls, some five minutes: look at the page"
	@echo "make test    set up everything and run all checks and tests, real engines among them"
	@echo "make test-nodes      more of several hosts than make test has; some 15 minutes, as root"
	@echo "make test-backends   install servers of other make and hold them to the contract; some 15 minutes"
	@echo "make test-vllm       vLLM's own tests of its API, bare and through OServe; four long runs"
	@echo "make check   format, lint, types, import contracts and fast tests: under a minute"

# At least two shapes: what is served here is also the demonstration. Set planning.min_shapes=1 in
# ARGS for the plan that carries most.
serve:
	@set -e; model=$$($(PYTHON) tools/setup.py --engine --page --model '$(MODEL)'); set --; \
	if [ -d "$$model-int8" ]; then set -- --set "engines.variants={int8: $$model-int8}"; fi; \
	exec $(BIN)/oserve serve "$$model" --port $(PORT) "$$@" --set planning.min_shapes=2 $(ARGS)

demo:
	@set -e; model=$$($(PYTHON) tools/setup.py --engine --page --model '$(MODEL)'); \
	exec $(BIN)/python tools/demo.py "$$model" --port $(PORT) $(ARGS)

test:
	@$(PYTHON) tools/setup.py --dev --engine --forecast --ray --page --browser --model smollm2-135m
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		-m "not hosts and not alone"
	$(BIN)/python -m pytest -m "alone and not hosts"

check:
	@$(PYTHON) tools/setup.py --dev
	@$(MAKE) --no-print-directory -j2 lint fast

.PHONY: lint fast
# Short runs are over before the simulator's kernel would be compiled.
fast:
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -n auto --dist worksteal --hypothesis-profile=quick \
		-m "not engine and not extra and not slow"

.PHONY: test-nodes
test-nodes:
	@$(PYTHON) tools/setup.py --dev --engine --ray
	$(BIN)/python -m pytest -m hosts

.PHONY: test-backends
test-backends:
	@$(PYTHON) tools/setup.py --dev
	@$(PYTHON) tools/backends.py
	$(BIN)/python -m pytest -m backend

.PHONY: test-vllm
test-vllm:
	@set -e; model=$$($(PYTHON) tools/setup.py --dev --engine --page --model smollm2-135m); \
	exec $(BIN)/python benchmarks/clients/vllm_tests.py "$$model" --folder .oserve/vllm-tests $(ARGS)

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
