# make build | demo | test | bench: each fetches what it needs first (libtorch, once) and needs nothing
# installed but Rust, a C++ compiler, make and Python 3 with pip.
#
#   CUDA=1 make build   takes the CUDA build of libtorch (the default where nvidia-smi is found)
#   CUDA=0 make build   takes the small CPU build in any case
#   LIBTORCH=DIR make   uses a libtorch 2.11 of your own; nothing is downloaded

PYTHON ?= python3
CARGO  ?= cargo
# One profile for everything: torch-sys and our own C++ are compiled once.
BINARY  = target/debug/palettist

ifdef LIBTORCH
FETCHED =
else
FETCHED = .libtorch/flavour
endif

.PHONY: build demo test bench lint

build: $(FETCHED)
	$(CARGO) build

demo: build
	$(BINARY) demo

test: $(FETCHED)
	$(CARGO) test

bench: $(FETCHED)
	$(CARGO) bench --profile dev

lint: $(FETCHED)
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

.libtorch/flavour: scripts/libtorch.py
	$(PYTHON) scripts/libtorch.py $(if $(filter 1,$(CUDA)),--cuda) $(if $(filter 0,$(CUDA)),--cpu)
	@touch $@
