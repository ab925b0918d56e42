PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
READY := $(VENV)/ready
SITE := $(VENV)/site
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint proofs site clean

# Train a small character model for 300 steps, a minute or two, then write with it.
demo: $(INSTALLED)
	@rm -rf runs/demo
	@echo "Training a character model on Python's own documentation: 300 steps, a minute or two"
	$(BIN)/genkit train charlm --output_dir runs/demo --max_steps 300 --evaluations 3 --compile no
	@echo "Writing with the model"
	$(BIN)/genkit generate "The " --model runs/demo --temperature 0.5 --seed 1
	@echo
	@echo "Next:"
	@echo "  source $(BIN)/activate"
	@echo "  genkit explain \"The \" --model runs/demo            # how likely each next character is"
	@echo "  genkit train charlm --text book.txt                # the same on a text of yours"
	@echo "  genkit train vae --max_steps 300                   # images: digits"
	@echo "  genkit sample runs/vae --output digits.png"
	@echo "  genkit --help"

# The gate: minutes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything else: hours. Run it before a release.
proofs: $(READY) $(SITE)
	$(BIN)/python -m pytest -m slow --timeout 7200 --durations 25

# The documentation as a site, in build/site: open build/site/index.html.
site: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a user needs; then what a developer needs besides.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing genkit and its dependencies into $(VENV): several minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(READY): $(INSTALLED)
	@echo "Installing the developers' tools into $(VENV)"
	$(PIP) -e ".[dev]"
	@touch $@

$(SITE): $(INSTALLED) mkdocs.yml
	@echo "Installing what builds the site into $(VENV)"
	$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
