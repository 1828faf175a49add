# Everything sets itself up: `make demo`, `make test`, `make campaign`, `make lint` create .venv when it is missing.
#
#   PYTHON   the interpreter the virtual environment is made from (3.11 or newer)
#   TORCH    what pip installs for PyTorch. The default is the pinned release as PyPI has it (on Linux with CUDA).
#            Without a GPU, PyTorch's CPU build is ten times smaller:
#                make demo TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-output
WORKERS ?= 2

.PHONY: demo test campaign lint clean install
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/scantly demo --out $(DEMO_OUT)

# Random search in the property tests, N examples of each; says how to repeat it.
N ?= 1000
ifndef SEED
SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
endif

# One torch thread per process: two of them on one core each are faster than one on two.
test: install
	OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

campaign: install
	@echo "random search, $(N) examples of each property; to repeat it: make campaign N=$(N) SEED=$(SEED)"
	OMP_NUM_THREADS=1 SCANTLY_CAMPAIGN=$(N) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m hypothesis \
		--hypothesis-seed=$(SEED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
