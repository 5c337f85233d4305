# `make demo` and `make test` are all that a newcomer needs; both set up what they need first.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test check format proto bench serve train evaluate clean

demo: .venv/.ready ## Start a real Triton and the server, write images from prompts, stop everything.
	$(BIN)/python examples/demo.py

test: .venv/.ready ## Run the tests.
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.ready ## Lint, types, contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/baseline.binpb
	$(BIN)/buf format --diff --exit-code

format: .venv/.ready ## Format the code and the contract.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

proto: .venv/.ready ## Generate the stubs from the contract.
	$(BIN)/python scripts/generate_stubs.py proto

bench: .venv/.ready ## Measure import time, the cost of the server and of files, and one image against a diffusers pipeline.
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.server_costs
	$(BIN)/python -m benchmarks.encoding
	$(BIN)/python -m benchmarks.one_image
	$(BIN)/python -m benchmarks.clip_guidance

serve: .venv/.ready ## Run Triton and the server until Ctrl-C.
	$(BIN)/sdserver up

train: .venv/.ready ## Make an engine from nothing: world, autoencoder, CLIP, UNet, evaluation, card. Hours; resumes.
	OMP_WAIT_POLICY=PASSIVE nice -n 19 $(BIN)/python -m training

evaluate: .venv/.ready ## Measure the engine that is being made, and write its card.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training.classifier
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training.evaluate
	$(BIN)/python -m training.card

.venv/.ready: pyproject.toml scripts/setup
	PYTHON="$(PYTHON)" scripts/setup

clean: ## Remove what the other targets made.
	rm -rf .venv out
