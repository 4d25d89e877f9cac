# make demo    train on the built-in scenes, evaluate, and show where the results are
# make test    linters and fast tests; make test-slow: the other tests
# make test-torch, make test-topology   tests with PyTorch; tests with compilers for TPUs and GPUs
# make bench   the quick benchmark; BENCHMARKS=context for the other one, which trains six networks
# Each sets up .venv first. It takes the Python that PYTHON names, or python3 if it is 3.11 to 3.13,
# or python3.13, python3.12 or python3.11. It uses .venv again until the requirements change.

SHELL := /bin/bash
RUN := .venv/bin/python
BENCHMARKS := conv_gradient

.PHONY: demo test test-slow test-torch test-topology bench lint clean

demo: .venv/requirements.txt
	$(RUN) -m psp_jax.main --config configs/scenes.py --workdir runs/scenes
	@echo
	@echo 'Metrics: runs/scenes/eval/metrics.json'
	@echo "Predictions: $$(ls -t runs/scenes/eval/*/panels.png | head -n 1)"

test: lint
	$(RUN) -m pytest -m 'not slow and not torch and not topology' -n 2 --dist loadfile --durations=10

test-slow: .venv/requirements-test.txt
	$(RUN) -m pytest -m 'slow and not torch and not topology' -n 2 --dist load --durations=10

# Compares with PyTorch, torchvision, timm and mmsegmentation.
test-torch: .venv/requirements-torch.txt
	$(RUN) -m pytest -m torch -n 2 --dist load

# Uses an environment of its own, because JAX warns about missing devices if their compilers are
# installed.
test-topology: .venv-topology/requirements-topology.txt
	JAX_PLATFORMS=cpu .venv-topology/bin/python -m pytest -m topology --durations=10

lint: .venv/requirements-test.txt
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	.venv/bin/lint-imports

bench: .venv/requirements.txt
	@for name in $(BENCHMARKS); do echo "== $$name"; $(RUN) -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv .venv-topology

.venv/bin/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	        2>/dev/null && found="$$python" && break; \
	done; \
	if [ -z "$$found" ]; then \
	    echo 'psp_jax: error: $(or $(PYTHON),python3) is not Python 3.11, 3.12 or 3.13; install one of' \
	        'them, or name it: make PYTHON=/path/to/python3.12 ...' >&2; \
	    exit 1; \
	fi; \
	echo "$$("$$found" --version): setting up .venv"; "$$found" -m venv .venv || { rm -rf .venv; exit 1; }

# The copies in .venv show which requirements are installed there.
.venv/requirements.txt: requirements.txt .venv/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@cp requirements.txt $@

.venv/requirements-test.txt: requirements-test.txt .venv/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@cp requirements-test.txt $@

# mmsegmentation requires a second OpenCV, which would overwrite ours, so it is installed without its
# requirements.
.venv/requirements-torch.txt: requirements-torch.txt .venv/requirements-test.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
	    mmsegmentation==1.2.2 mmcv-lite==2.1.0 mmengine==0.10.7
	@cp requirements-torch.txt $@

.venv-topology/requirements-topology.txt: requirements-topology.txt requirements-test.txt requirements.txt \
        .venv/bin/python
	$(RUN) -m venv .venv-topology
	.venv-topology/bin/python -m pip install --quiet --disable-pip-version-check \
	    -r requirements-test.txt -r requirements-topology.txt
	@cp requirements-topology.txt $@
