# Everything sets itself up: `make demo`, `make test`, `make lint` create .venv when it is missing.
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

.PHONY: demo test lint clean install
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/scantly demo --out $(DEMO_OUT)

# One torch thread per process: two of them on one core each are faster than one on two.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
