# Two commands need nothing before them but Python 3.10+, its venv module and (for the C++ kernels) a compiler:
#   make demo    environment, install, and the main job on the bundled real data
#   make test    environment, install, and the tests
PYTHON ?= python3
VENV   ?= .venv
STEPS  ?=
MEDIA  ?= .media

# Without EXTRAS, an environment that exists keeps the extras it was installed with, which its stamp names; a new one
# gets dev.
EXTRAS ?= $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*) dev))

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRAS)

.PHONY: demo test lint cuda-check release-check sanitize sanitize-full fuzz soak docs gpu install unpinned media clean

install: $(INSTALLED)

# torch first, and no build isolation, so that the extension compiles against the torch it will run with.
$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip<27" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet "torch>=2.10" numpy
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	rm -f $(VENV)/.installed-*
	touch $@

# Packages whose own requirements would put numpy back below 2, or add much that is not used; their tests skip without.
unpinned: install
	$(BIN)/pip install --quiet --no-deps aisfx==0.1.2 laion-clap torchlibrosa panns-inference==0.1.1
	$(BIN)/pip install --quiet torchvision transformers librosa h5py pandas webdataset wget ftfy

demo: install
	$(BIN)/diffgap demo $(if $(STEPS),--steps $(STEPS))

# A file's tests stay in one process, as they share what takes long to make.
WORKERS ?= 2

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, in build/site; a warning is an error. Live while writing: .venv/bin/python -m mkdocs serve
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Compiles the CUDA kernels for every chip and examines their machine code; needs nvcc, but no GPU.
cuda-check: install
	$(BIN)/python scripts/cuda_check.py

# Builds and installs in every way users do, in clean environments (14 GB in TMPDIR, half an hour); then the versions of
# docs/install.md with CHECK=compat.
CHECK ?= builds

release-check:
	$(PYTHON) scripts/release_check.py $(CHECK)

# The ops' tests on C++ kernels that are compiled with sanitizers: some kernels in two minutes, of which one sanitizer
# has another one every day, or all of them on every instruction set.
SHORT := --turn --kernels random silu_mul similarity_topk linear_gradients --tests tests/ops/test_random.py \
    tests/ops/test_silu_mul.py tests/ops/test_linear.py tests/ops/test_similarity.py -k "native and not compile"

sanitize: install
	$(BIN)/python scripts/sanitize.py address $(SHORT)
	$(BIN)/python scripts/sanitize.py thread $(SHORT)

sanitize-full: install
	$(BIN)/python scripts/sanitize.py address --isa widest avx512 avx2 baseline
	$(BIN)/python scripts/sanitize.py thread

# New cases of every op, loss and reader for this many seconds; the tests hold a fixed few. DIFFGAP_FUZZ_SEED repeats them.
SECONDS_OF_FUZZING ?= 600

fuzz: install
	DIFFGAP_FUZZ_SECONDS=$(SECONDS_OF_FUZZING) $(BIN)/python -m pytest tests/fuzz

# Ten thousand steps, twenty kills, full disks.
soak: install
	$(BIN)/python scripts/soak.py

# On a machine with a GPU: its tests, all benchmarks against the peers that are installed, and the modelled times beside
# the measured ones, into benchmarks/results. EXTRAS=dev,bench installs the peers.
gpu: install
	$(BIN)/python scripts/gpu_check.py

# The pictures and recordings behind the bundled embeddings (160 MB, Debian and Ubuntu), for the tests that embed them
# again: make media && DIFFGAP_STAMPS_MEDIA=.media make test EXTRAS=dev,offline
media: $(MEDIA)/usr

$(MEDIA)/usr:
	mkdir -p $(MEDIA)
	cd $(MEDIA) && apt-get download tuxpaint-stamps-default=2022.06.04-1 && dpkg-deb -x tuxpaint-stamps-default_*.deb .

clean:
	rm -rf build dist *.egg-info diffgap/_C_*.so diffgap/_C_*.missing .pytest_cache .mypy_cache .ruff_cache demo-run
