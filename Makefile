# `make serve` and `make test` set up what they need in .venv; the second time there is nothing to do.
.PHONY: serve test check clean

# The kernels are compiled when Octavo is installed: a change of their source makes an installation old.
SETUP := pyproject.toml constraints.txt scripts/install setup.py octavo/kernels/builds.py $(wildcard octavo/kernels/csrc/*)

serve: .venv/.installed
	.venv/bin/octavo serve

test: .venv/.installed-dev
	scripts/test

check: .venv/.installed-dev
	scripts/check

.venv/.installed: $(SETUP)
	scripts/install

.venv/.installed-dev: $(SETUP)
	scripts/install dev

clean:
	rm -rf .venv .venv-clients build *.egg-info
