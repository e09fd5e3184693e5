# `make serve` and `make test` set up what they need in .venv; the second time there is nothing to do.
.PHONY: serve test check clean

serve: .venv/.installed
	.venv/bin/octavo serve

test: .venv/.installed-dev
	scripts/test

check: .venv/.installed-dev
	scripts/check

.venv/.installed: pyproject.toml constraints.txt scripts/install
	scripts/install

.venv/.installed-dev: pyproject.toml constraints.txt scripts/install
	scripts/install dev

clean:
	rm -rf .venv build *.egg-info
