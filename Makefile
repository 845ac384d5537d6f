# SPDX-License-Identifier: Apache-2.0
# The door to ucm.  `make help` says what there is; the work is done by meson and by tools/.
VENV  ?= .venv
BUILD ?= build
export PATH := $(abspath $(VENV))/bin:$(PATH)

C     := $(shell find include src tools tests bench examples ucm -name '*.[ch]')
MESON := $(VENV)/bin/meson
# A hang is found all the same, but later; a busy machine is no failure.
TESTS := $(MESON) test --print-errorlogs --no-rebuild --timeout-multiplier 5

.DEFAULT_GOAL := build
.PHONY: build demo demo-pd test check test-c test-devices test-python test-contract test-e2e test-vllm test-pd test-versions test-nfs asan tsan fuzz model campaign stress soak coverage bench bench-gpu docs fmt wheel clean help

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- set-up: Debian packages (as root; otherwise says which are missing), Python tools from PyPI ----

$(VENV)/.tools: tools/setup-apt tools/setup-venv
	tools/setup-apt
	tools/setup-venv $(VENV) tools
	@touch $@

$(VENV)/.engine: $(VENV)/.tools
	tools/setup-venv $(VENV) engine
	@touch $@

$(VENV)/.transfer: $(VENV)/.engine
	tools/setup-apt libibverbs1 librdmacm1 libnuma1 libcurl4
	tools/setup-venv $(VENV) transfer
	@touch $@

# ---- build ----

build: $(BUILD)/build.ninja ## libucm.so, the tool `ucm`, the tests
	@ninja -C $(BUILD)

build/build.ninja: $(VENV)/.tools
	$(MESON) setup build -Dpython=false

build-asan/build.ninja: $(VENV)/.tools
	$(MESON) setup build-asan -Dpython=false -Db_sanitize=address,undefined -Db_lundef=false

build-tsan/build.ninja: $(VENV)/.tools
	$(MESON) setup build-tsan -Dpython=false -Db_sanitize=thread -Db_lundef=false

build-fuzz/build.ninja: $(VENV)/.tools
	tools/setup-apt clang
	CC=clang $(MESON) setup build-fuzz -Dpython=false -Dfuzz=true -Db_sanitize=address,undefined -Db_lundef=false

build-coverage/build.ninja: $(VENV)/.tools
	$(MESON) setup build-coverage -Dpython=false -Db_coverage=true --buildtype=debug

$(VENV)/.package: $(VENV)/.tools $(shell find include src tools ucm -name '*.[chy]*') meson.build pyproject.toml
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps .
	@touch $@

# ---- the main job ----

demo: $(VENV)/.engine $(VENV)/.package ## set up, then prefix caching in a real vLLM: cold, with ucm, restarted
	$(VENV)/bin/python tools/demo/demo.py $(DEMO)
demo-pd: $(VENV)/.engine $(VENV)/.package ## prefill and decode apart: four real vLLM servers behind ucm-proxy, 1p1d then 2p2d
	$(VENV)/bin/python tools/demo/demo_pd.py

# ---- tests ----

test: check test-c asan tsan test-python test-contract test-e2e ## set up and run all tests
check: build ## include rules, lengths, the header by itself
	tools/check-layers
test-c: build ## C tests
	$(TESTS) -C build
DEVICE_TESTS = tests/dev/test_device tests/dev/test_stacks tests/fake/fakes.stamp
test-devices: build build-asan/build.ninja build-tsan/build.ninja ## every device by every case, against fakes of the vendors' libraries and PoCL, also under the sanitizers: a table
	tools/setup-apt ocl-icd-libopencl1 pocl-opencl-icd
	ninja -C build-asan $(DEVICE_TESTS) && ninja -C build-tsan $(DEVICE_TESTS)
	tests/dev/table $(BUILD) build-asan build-tsan
asan: build-asan/build.ninja ## C tests under AddressSanitizer and UBSan
	ninja -C build-asan && $(TESTS) -C build-asan
tsan: build-tsan/build.ninja ## C tests under ThreadSanitizer
	ninja -C build-tsan && $(TESTS) -C build-tsan
test-python: $(VENV)/.package ## the extension and the package
	$(VENV)/bin/pytest -q tests/python
test-contract: $(VENV)/.engine $(VENV)/.package ## the connector against the interfaces of vLLM 0.17 to 0.32, from their wheels
	$(VENV)/bin/pytest -q tests/versions
test-e2e: $(VENV)/.engine $(VENV)/.package ## a real vLLM: restart, damage, kills, preemption
	$(VENV)/bin/pytest -q -n 2 --dist worksteal tests/e2e
test-vllm: $(VENV)/.engine $(VENV)/.package ## the same and the matrix: models, modes, eager and compiled; ends with a table
	$(VENV)/bin/pytest -q -n 2 --dist worksteal -o python_files='test_*.py matrix.py' tests/e2e
test-pd: $(VENV)/.transfer $(VENV)/.package ## real vLLM servers, prefill and decode, behind ucm-proxy: their deaths, Mooncake, NIXL; minutes
	$(VENV)/bin/pytest -q tests/pd

ENGINES ?= 0.27.1 0.30.0
test-versions: $(VENV)/.engine $(VENV)/.package ## the connector in engines of vLLM 0.27, 0.30 and 0.32; writes docs/versions.md
	set -e; for v in $(ENGINES); do tools/setup-venv $(VENV) $$v; done
	$(VENV)/bin/python tests/versions/table.py $(VENV)
NFS_SERVERS ?= kernel ganesha
test-nfs: build ## two clients of each of NFS_SERVERS (kernel ganesha), v3 and v4.2, in User-mode Linux: 30 minutes, root
	tools/setup-apt user-mode-linux kmod e2fsprogs iproute2 nfs-kernel-server nfs-common rpcbind nfs-ganesha nfs-ganesha-vfs
	failed=; for s in $(NFS_SERVERS); do UCM_BUILD=$(BUILD) UCM_NFS_SERVER=$$s $(VENV)/bin/pytest -q tests/nfs || failed="$$failed $$s"; done; test -z "$$failed"

FUZZ_SECONDS ?= 30
fuzz: build-fuzz/build.ninja ## each fuzz target for FUZZ_SECONDS (30)
	ninja -C build-fuzz && tests/fuzz/run build-fuzz $(FUZZ_SECONDS)
MODEL_SECONDS ?= 600
model: build ## random work by several processes against a dictionary, MODEL_SECONDS (600)
	$(BUILD)/tests/store/model --seconds $(MODEL_SECONDS)
CAMPAIGN_KILLS ?= 1000
CAMPAIGN_BLOCKS ?= 100000
campaign: build ## kill -9, CAMPAIGN_KILLS (1000) times over CAMPAIGN_BLOCKS (100000) blocks; ends with JSON
	UC_LOGGER_LEVEL=$(or $(UC_LOGGER_LEVEL),error) $(BUILD)/tests/store/campaign --kills $(CAMPAIGN_KILLS) --blocks $(CAMPAIGN_BLOCKS)
STRESS_SECONDS ?= 600
stress: build ## failing storage, failing memory and crashes over all engines and tiers, STRESS_SECONDS (600); ends with JSON
	UC_LOGGER_LEVEL=$(or $(UC_LOGGER_LEVEL),error) $(BUILD)/tests/fault/stress --seconds $(STRESS_SECONDS)
SOAK_SECONDS ?= 300
soak: build ## every crash, every failing operation; the tests of whole stacks, SOAK_SECONDS (300) for each random one
	UCM_TEST_EVERY=1 $(TESTS) -C $(BUILD) -t 20 --verbose test_crash_points test_posix_faults
	UCM_TEST_SECONDS=$(SOAK_SECONDS) UCM_TEST_ROUNDS=20000 $(TESTS) -C $(BUILD) --suite store -t 20
coverage: build-coverage/build.ninja ## line coverage of src/store and src/base by the C tests
	ninja -C build-coverage && $(TESTS) -C build-coverage
	gcovr -r . build-coverage --filter 'src/(store|base)/' --print-summary --fail-under-line 85

# ---- the rest ----

bench: build ## the figures of bench/README.md, against fio and memcpy in the same run
	bench/run $(BUILD)
DEVICE ?= cuda
bench-gpu: build ## copies to and from a DEVICE (cuda): bandwidth, calls, CPU; where there is one
	$(BUILD)/bench/gpu --device $(DEVICE) --json $(BUILD)/bench-gpu.json
docs: build ## docs/options.md from the option tables
	$(BUILD)/tools/ucm help options --markdown >docs/options.md
fmt: ## clang-format everything
	tools/setup-apt clang-format
	clang-format -i $(C)
wheel: $(VENV)/.tools ## dist/ucm-*.whl, one for all Pythons from 3.11 on
	$(VENV)/bin/python -m pip wheel -q --no-deps --no-build-isolation -w dist .
clean: ## remove what was built (the set-up stays)
	rm -rf build build-asan build-tsan build-fuzz build-coverage dist $(VENV)/.package
