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

.PHONY: build demo test bench lint base judge

build: $(FETCHED)
	$(CARGO) build

demo: build
	$(BINARY) demo

# Tests run side by side; libtorch's threads would spin for each other on processors that others want. Without these
# variables the program would start itself again (src/torch/environment.rs).
test: $(FETCHED)
	GOMP_SPINCOUNT=1000 GLIBC_TUNABLES=glibc.malloc.hugetlb=0 $(CARGO) test

# PALETTIST_PEERS=PYTHON make bench: beside the peers, where that Python has torch, diffusers and coremltools.
bench: $(FETCHED)
	$(CARGO) bench --profile dev --benches

# Trains the base that the demo starts from, examples/base-256, from nothing: autoencoder, then UNet and text encoder. What is
# drawn for it stays in runs/.
base: build
	$(CARGO) run --example draw_dataset -- --free runs/free --side 256
	$(CARGO) run --example draw_dataset -- --scenes runs/scenes --side 256
	$(CARGO) run --example base_tokenizer -- runs/scenes/train/metadata.jsonl examples/base-256/tokenizer
	$(BINARY) train configs/base-autoencoder.toml
	cp runs/base-autoencoder/model/vae/* examples/base-256/vae/
	$(BINARY) train configs/base-autoencoder-whole.toml
	cp runs/base-autoencoder-whole/model/vae/* examples/base-256/vae/
	mkdir -p runs/drawn && cp -r runs/free/train runs/drawn/free && cp -r runs/scenes/train runs/drawn/scenes
	$(BINARY) train configs/base-decoder.toml
	cp runs/base-decoder/model/vae/* examples/base-256/vae/
	$(BINARY) train configs/base.toml
	cp runs/base/model/unet/* examples/base-256/unet/
	cp runs/base/model/text_encoder/* examples/base-256/text_encoder/

# Draws pictures with labels and trains a small CLIP on them, which says what drawn pictures show: runs/judge.
judge: build
	$(CARGO) run --example draw_dataset -- --judged runs/judged
	$(CARGO) run --example train_judge -- runs/judge --train runs/judged/train \
	    --validation runs/judged/validation datasets/sketchbook/validation

lint: $(FETCHED)
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

.libtorch/flavour: scripts/libtorch.py
	$(PYTHON) scripts/libtorch.py $(if $(filter 1,$(CUDA)),--cuda) $(if $(filter 0,$(CUDA)),--cpu)
	@touch $@
