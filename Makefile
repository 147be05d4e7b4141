# The first `make demo` or `make test` sets up .venv; later ones install nothing until
# setup.cfg, pyproject.toml or constraints.txt changes.

PYTHON = python3
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
REQUIREMENTS = setup.cfg pyproject.toml constraints.txt

.PHONY: demo test slow mutants lint docs venv clean

demo: .venv/.installed
	.venv/bin/python -m evoplan.experiments.demo

test: .venv/.installed-test
	.venv/bin/python -m pytest -m "not slow and not gpu" -n 2 --dist worksteal

slow: .venv/.installed-test
	.venv/bin/python -m pytest -m "slow or property" --hypothesis-profile=all -s

mutants: .venv/.installed-test
	.venv/bin/python -m tests.mutants

lint: .venv/.installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# Into site/, to be read from the disk: site/index.html.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

venv: .venv/.installed-test

.venv/.installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "evoplan needs Python 3.11 or later as $(PYTHON); name another: make PYTHON=..." >&2; exit 1; }
	@test -e .venv || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	    echo "$(PYTHON) cannot make virtual environments; install its venv module" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	    echo ".venv has no working pip; remove .venv and install pip's support for $(PYTHON) -m venv" >&2; exit 1; }
	@echo "Installing torch, then evoplan and what it needs, into .venv"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "Installing the test tools and openfold3 (the oracle) into .venv"
	@$(PIP) -e '.[test]'
	@$(PIP) --no-deps openfold3 boltz
	@touch $@

.venv/.installed-docs: .venv/.installed
	@echo "Installing mkdocs into .venv"
	@$(PIP) -e '.[docs]'
	@touch $@

# Keeps .venv.
clean:
	rm -rf build site demo pytorch_profiles flops_analysis scaling_study_* *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
