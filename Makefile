# `make demo` and `make test` are all that a newcomer needs; both set up what they need first.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test check format proto bench bench-full parity-full memory invariance serve chart check-helm check-images train evaluate clean

demo: .venv/.ready ## Start a real Triton and the server, write images from prompts, stop everything.
	$(BIN)/python examples/demo.py

test: .venv/.ready ## Run the tests.
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

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

bench: .venv/.ready ## Measure speed and memory, against diffusers, request-level batching and bounds; a quarter of an hour.
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.server_costs
	$(BIN)/python -m benchmarks.encoding
	$(BIN)/python -m benchmarks.one_image
	$(BIN)/python -m benchmarks.clip_guidance
	$(BIN)/python -m benchmarks.block_cache
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.server_alone
	$(BIN)/python -m benchmarks.scheduling
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.capacity

bench-full: .venv/.ready ## Measure a step of SD 2.1's own UNet, with random weights; 12 GB of memory.
	$(BIN)/python -m benchmarks.full_size

parity-full: .venv/.ready ## SD 2.1 at full size with random weights: our picture against diffusers'; 8 GB of memory.
	PYTHONPATH=tests $(BIN)/python -m benchmarks.parity_full

memory: .venv/.ready ## What the models of SD 2.1 take of memory, loading and at work; 6 GB of it.
	$(BIN)/python -m benchmarks.memory

invariance: .venv/.ready ## Compare 420 files with those that were made alone: not a byte may differ. Let 1,000 callers leave.
	INVARIANCE_CASES=420 RANDOM_CANCELS=1000 $(BIN)/python -m pytest tests/test_batch_invariance.py tests/test_random_cancels.py

serve: .venv/.ready ## Run Triton and the server until Ctrl-C.
	$(BIN)/sdserver up

chart: .venv/.ready ## Write what follows from the Helm chart: its golden files, and the table in its README.
	$(BIN)/python tests/charts.py

check-helm: .venv/.ready .venv/checkov/.ready ## The chart, further than `make test`: operators' definitions, random values, checkov.
	npm ci --prefix tests/custom_resources
	CHECK_HELM=1 $(BIN)/python -m pytest tests/test_helm_*.py
	.venv/checkov/bin/checkov --directory helm/golden --config-file helm/checkov.yaml

check-images: .venv/.ready ## The server's image, by the steps of its Dockerfile in a folder of its own.
	CHECK_IMAGES=1 $(BIN)/python -m pytest -s tests/test_images_install.py

train: .venv/.ready ## Make an engine from nothing: world, autoencoder, CLIP, UNet, evaluation, card. Hours; resumes.
	OMP_WAIT_POLICY=PASSIVE nice -n 19 $(BIN)/python -m training

evaluate: .venv/.ready ## Measure the engine that is being made, and write its card.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training.classifier
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training.evaluate
	$(BIN)/python -m training.card

.venv/.ready: pyproject.toml scripts/setup
	PYTHON="$(PYTHON)" scripts/setup

# In an environment of its own: it wants older versions of what the tests need.
.venv/checkov/.ready: .venv/.ready
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/python -m pip install --quiet --disable-pip-version-check 'checkov==3.3.30'
	touch $@

clean: ## Remove what the other targets made.
	rm -rf .venv out
