PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint proofs clean

# Train on the embedded corpus for a minute, then write with the model.
demo: $(READY)
	rm -rf runs/demo
	$(BIN)/accelerate launch --config_file accelerate_config.yaml --num_processes 1 recipes/train_charlm.py --output_dir runs/demo --max_minutes 1 --evaluations 4
	$(BIN)/genkit generate "The " "An expression " --model runs/demo --temperature 0.5 --seed 1

# The gate: minutes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything else: hours. Run it before a release.
proofs: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 7200 --durations 25

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
