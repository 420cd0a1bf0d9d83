# troupe: `make help` lists what there is. Two commands set up everything on a fresh Debian machine: `make serve`, `make test`.
comma := ,
BUILD ?= build
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
SANITIZER ?=
ifneq ($(SANITIZER),)
BUILD := $(BUILD)/sanitize-$(subst $(comma),-,$(SANITIZER))
endif
PACKAGES := libzmq libprotobuf-c libmicrohttpd jansson yaml-0.1 libpcre2-8 hwloc sqlite3 ncursesw

ARCH := $(shell uname -m)
CFLAGS_BASE := -std=gnu17 -O2 -g -fno-omit-frame-pointer -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Wshadow \
  -Wstrict-prototypes -Wmissing-prototypes -Wno-unused-parameter -Werror
CPPFLAGS := -I. -I$(BUILD) -I$(BUILD)/proto -D_GNU_SOURCE $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
LDLIBS := $(shell pkg-config --libs $(PACKAGES) 2>/dev/null) -lpthread -lm
ifneq ($(SANITIZER),)
# GCC warns of uninitialised reads that are none when it instruments code.
CFLAGS_BASE += -fsanitize=$(SANITIZER) -fno-sanitize-recover=all -Wno-maybe-uninitialized
LDFLAGS += -fsanitize=$(SANITIZER)
endif

# CUDA where it is (nvcc on the PATH or under CUDA_HOME; CUDA=0: leave it out) and NCCL beside it. Sanitizers do without.
CUDA ?= 1
ifneq ($(CUDA)$(SANITIZER),0$(SANITIZER))
ifeq ($(SANITIZER),)
NVCC ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
endif
endif
ifneq ($(NVCC),)
CUDA_ROOT := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_LIBRARIES := $(firstword $(patsubst %/libcudart_static.a,%,$(wildcard $(addprefix $(CUDA_ROOT)/,lib64/libcudart_static.a lib/libcudart_static.a targets/*/lib/libcudart_static.a))))
NCCL_HEADER := $(firstword $(wildcard $(addsuffix /nccl.h,$(NCCL_HOME)/include $(CUDA_ROOT)/include /usr/include)))
endif

FOLDERS := actors actors/gateway actors/host bench config coordinator engine kernels kernels/reference model proto router simulator
ifeq ($(ARCH),x86_64)
FOLDERS += kernels/x86
endif
ifneq ($(NVCC),)
FOLDERS += kernels/cuda engine/cuda
endif
SOURCES := $(foreach folder,$(FOLDERS),$(wildcard $(folder)/*.c))
ifneq ($(ARCH),x86_64)
SOURCES := $(filter-out %_sse42.c %_avx512.c %_amx.c,$(SOURCES))
endif
MAIN := actors/host/main.c
LIBRARY_SOURCES := $(filter-out $(MAIN) $(if $(NCCL_HEADER),%_without_cuda.c,%_with_cuda.c),$(SOURCES))
KERNELS_CUDA := $(sort $(wildcard kernels/cuda/*.cu))
# What includes headers of CUDA; they are a library's, with warnings of their own.
WITH_CUDA := $(if $(NCCL_HEADER),$(patsubst %.c,$(BUILD)/%.o,$(filter %_with_cuda.c,$(LIBRARY_SOURCES))))
$(WITH_CUDA): CPPFLAGS += -isystem $(CUDA_ROOT)/include -isystem $(dir $(NCCL_HEADER))
ifneq ($(NVCC),)
LDLIBS += $(CUDA_LIBRARIES)/libcudart_static.a -ldl -lrt -lstdc++
endif
ifneq ($(NCCL_HEADER),)
LDFLAGS += $(addprefix -Wl$(comma)-rpath$(comma),$(firstword $(patsubst %/libnccl.so.2,%,$(wildcard $(dir $(NCCL_HEADER))../lib/libnccl.so.2 $(CUDA_LIBRARIES)/libnccl.so.2))))
endif
CUDA_OBJECTS := $(if $(NVCC),$(KERNELS_CUDA:%.cu=$(BUILD)/%.o))
# The kernels as plain C++ for the emulator of the tests, and the C that calls them.
EMULATED_C := $(wildcard kernels/cuda/*.c engine/cuda/*.c)
EMULATED := $(KERNELS_CUDA:%.cu=$(BUILD)/emulated/%.o) $(BUILD)/emulated/cuda_emulator.o $(BUILD)/emulated/cuda_emulator_ptx.o \
  $(BUILD)/emulated/cuda_emulator_faults.o $(BUILD)/emulated/cuda_emulator_streams.o $(EMULATED_C:%.c=$(BUILD)/emulated/%.o)
OBJECTS := $(LIBRARY_SOURCES:%.c=$(BUILD)/%.o) $(BUILD)/proto/troupe.pb-c.o $(BUILD)/web/page.o
TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
CUDA_TESTS := $(patsubst tests/gpu/%.c,$(BUILD)/tests/%,$(wildcard tests/gpu/test_*.c))
TEST_SUPPORT := $(patsubst %.c,$(BUILD)/%.o,$(wildcard tests/support/*.c))

.PHONY: all help deps serve test format tidy clean
all: $(BUILD)/troupe ## build build/troupe

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

deps: ## install the Debian packages that are missing
	@sh config/install-packages.sh

serve: deps ## install what is missing, build, serve the demo model on CPU until Ctrl-C
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	$(BUILD)/troupe serve --model models/demo $(ARGS)

test: deps ## build and run every test
	@$(MAKE) --no-print-directory $(BUILD)/troupe tests-built $(if $(NVCC),cuda)
	@sh tests/run.sh $(BUILD)

.PHONY: test-web
test-web: deps ## the live view in headless Chromium, troupe top in tmux (installs them; PICTURES=DIR keeps screenshots)
	@sh config/install-packages.sh nodejs chromium tmux
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	TROUPE=$(BUILD)/troupe node tests/web/terminal.mjs $(if $(PICTURES),$(PICTURES)/top.png)
	TROUPE=$(BUILD)/troupe node tests/web/check.mjs $(PICTURES)

.PHONY: test-metrics
test-metrics: deps ## Prometheus' own tool on the metrics and the alerting rules (installs Debian's prometheus for it)
	@sh config/install-packages.sh prometheus
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	@TROUPE_BUILD=$(BUILD) sh tests/promtool.sh

.PHONY: bench-web bench-view
bench-web: deps ## script time of the page with 320 processes and 58 x 256 experts from the simulator (ARGS='--seconds 30')
	@sh config/install-packages.sh nodejs chromium
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	TROUPE=$(BUILD)/troupe node tests/web/large.mjs $(ARGS)

bench-view: deps ## throughput with one page's feed open against with nobody looking, in turns (ARGS='--pairs 30 --mode traced')
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	python3 bench/view_cost.py --troupe $(BUILD)/troupe $(ARGS)

.PHONY: bench
bench: deps ## measure decode, prefill and mixed load on the demo model (MODEL=DIR for another, ARGS=... for options)
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	$(BUILD)/troupe bench --model $(or $(MODEL),models/demo) --json $(BUILD)/bench.json $(ARGS)

.PHONY: bench-peers
bench-peers: deps ## beside llama.cpp on the same weights, in turns, with targets (MODEL=DIR, e.g. /tmp/bench-1b: made if missing; PEER=bf16|q8_0)
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	@sh bench/peers/run.sh $(BUILD)/troupe $(or $(MODEL),models/demo) "$(PEER)" $(ARGS)

.PHONY: tests-built
tests-built: $(TESTS) $(CUDA_TESTS)

$(BUILD)/troupe: $(BUILD)/actors/host/main.o $(BUILD)/libtroupe.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/libtroupe.a: $(OBJECTS) $(CUDA_OBJECTS)
	@rm -f $@
	@ar qcs $@ $^

$(BUILD)/proto/troupe.pb-c.c $(BUILD)/proto/troupe.pb-c.h &: proto/troupe.proto
	@mkdir -p $(BUILD)/proto
	protoc-c --c_out=$(BUILD)/proto -Iproto proto/troupe.proto

# The live view's page becomes one string of C, a line of it for each line.
$(BUILD)/web/page.c: web/index.html Makefile
	@mkdir -p $(@D)
	@{ echo '#include "actors/gateway/page.h"'; echo 'const char page_html[] ='; \
	  sed -e 's/[\\"]/\\&/g' -e 's/^/"/' -e 's/$$/\\n"/' $<; \
	  echo ';'; echo 'const size_t page_html_bytes = sizeof page_html - 1;'; } >$@

$(BUILD)/web/page.o: $(BUILD)/web/page.c
	@$(CC) $(CPPFLAGS) $(CFLAGS_BASE) $(CFLAGS) -MMD -MP -c -o $@ $<

# Which commit was built, for reports of failures; rewritten only when it changes.
$(BUILD)/commit.h: always
	@mkdir -p $(BUILD)
	@echo '#define TROUPE_COMMIT "'$$(git describe --always --dirty 2>/dev/null || echo unknown)'"' >$@.new
	@cmp -s $@ $@.new && rm $@.new || mv $@.new $@
.PHONY: always
$(BUILD)/actors/host/command_sim.o: $(BUILD)/commit.h

$(BUILD)/proto/troupe.pb-c.o: $(BUILD)/proto/troupe.pb-c.c
	@$(CC) $(CPPFLAGS) -std=gnu17 -O2 -g $(if $(SANITIZER),-fsanitize=$(SANITIZER)) -c -o $@ $<

# Files for one instruction set carry it in their name and are compiled for it; everything else runs on any machine of its kind.
ISA_FLAGS = $(if $(findstring _avx512.c,$<),-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mavx2,)$(if $(findstring _amx.c,$<),-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mgfni -mprfchw -mamx-tile -mamx-bf16,)$(if $(findstring _sse42.c,$<),-msse4.2,)

$(BUILD)/%.o: %.c | $(BUILD)/proto/troupe.pb-c.h
	@mkdir -p $(@D)
	@echo "  CC $<"
	@$(CC) $(CPPFLAGS) $(CFLAGS_BASE) $(ISA_FLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

# ---- GPU: kernels/cuda by nvcc, and by the C++ compiler for the emulator ----
NVCCFLAGS := -std=c++17 -O3 -fmad=false -ftz=true -prec-div=true -prec-sqrt=true -I. -Werror all-warnings \
  -gencode=arch=compute_90a,code=sm_90a -Xcompiler -Wall,-Wextra,-Werror,-fno-strict-aliasing -Xptxas -v
EMULATED_FLAGS := -std=gnu++17 -O2 -g $(shell grep -qsw fma /proc/cpuinfo && echo -mfma) -ffp-contract=off -fno-strict-aliasing -I. -DTROUPE_EMULATED -Wall -Wextra \
  -Wno-unknown-pragmas -Wno-psabi -Werror $(if $(SANITIZER),-fsanitize=$(SANITIZER) -fno-sanitize-recover=all -Wno-maybe-uninitialized)

# Instructions of sm_90a alone (WGMMA, setmaxnreg): these have no PTX for newer cards; all others carry some.
SM_90A_ONLY := gemm mla_absorbed mla_expanded
PTX = $(if $(filter $*,$(SM_90A_ONLY)),,-gencode=arch=compute_90,code=compute_90)

# What ptxas says of registers and spills stays beside the object; tests/cuda_spills.sh reads it.
$(BUILD)/kernels/cuda/%.o: kernels/cuda/%.cu
	@mkdir -p $(@D)
	@echo "  NVCC $<"
	@$(NVCC) $(NVCCFLAGS) $(PTX) -MD -MP -MF $(@:.o=.d) -c -o $@ $< 2>$(@:.o=.ptxas) || { cat $(@:.o=.ptxas) >&2; exit 1; }

$(EMULATED_C:%.c=$(BUILD)/emulated/%.o): $(BUILD)/emulated/%.o: %.c | $(BUILD)/proto/troupe.pb-c.h
	@mkdir -p $(@D)
	@echo "  CC $< (emulated)"
	@$(CC) $(CPPFLAGS) $(CFLAGS_BASE) $(CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/emulated/kernels/cuda/%.o: kernels/cuda/%.cu
	@mkdir -p $(@D)
	@echo "  CXX $<"
	@$(CXX) $(EMULATED_FLAGS) -MMD -MP -x c++ -c -o $@ $<

$(BUILD)/emulated/%.o: tests/support/%.cc
	@mkdir -p $(@D)
	@echo "  CXX $<"
	@$(CXX) $(EMULATED_FLAGS) -MMD -MP -c -o $@ $<

MODEL_SUPPORT := $(BUILD)/tests/support/one_process.o $(BUILD)/tests/support/model_files.o
$(CUDA_TESTS): $(BUILD)/tests/%: $(BUILD)/tests/gpu/%.o $(MODEL_SUPPORT) $(EMULATED) $(BUILD)/libtroupe.a
	@echo "  LD $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcmocka -lstdc++

# The same tests on a card.
GPU_TESTS := $(patsubst tests/gpu/%.c,$(BUILD)/tests-gpu/%,$(wildcard tests/gpu/test_cuda_*.c))

$(BUILD)/tests-gpu/gpu_card.o: tests/support/gpu_card.cc
	@mkdir -p $(@D)
	@echo "  CXX $<"
	@$(CXX) -std=gnu++17 -O2 -g -I. -I$(CUDA_ROOT)/include -Wall -Wextra -Werror -MMD -MP -c -o $@ $<

$(GPU_TESTS): $(BUILD)/tests-gpu/%: $(BUILD)/tests/gpu/%.o $(BUILD)/tests-gpu/gpu_card.o $(MODEL_SUPPORT) $(BUILD)/libtroupe.a
	@echo "  LD $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcmocka

# cuBLASLt to measure beside, where it is installed.
CUBLASLT := $(firstword $(wildcard $(addsuffix /libcublasLt.so,$(CUDA_LIBRARIES) $(CUDA_ROOT)/lib)))
BENCH_GPU := $(if $(CUBLASLT),$(BUILD)/bench-gpu)
$(BUILD)/bench/gpu/bench_gpu.o: bench/gpu/bench_gpu.cc
	@mkdir -p $(@D)
	@echo "  CXX $<"
	@$(CXX) -std=gnu++17 -O2 -g -I. -I$(CUDA_ROOT)/include -Wall -Wextra -Werror -MMD -MP -c -o $@ $<

$(BUILD)/bench-gpu: $(BUILD)/bench/gpu/bench_gpu.o $(CUDA_OBJECTS)
	@echo "  LD $@"
	@$(CXX) -o $@ $^ $(CUBLASLT) -Wl,-rpath,$(dir $(CUBLASLT)) $(CUDA_LIBRARIES)/libcudart_static.a -ldl -lrt -lpthread

# The resident step: needs no other library.
BENCH_STEP := $(if $(NVCC),$(BUILD)/bench-gpu-step)
$(BUILD)/tests/bench/gpu_step.o: CPPFLAGS += -isystem $(CUDA_ROOT)/include
$(BUILD)/bench-gpu-step: $(BUILD)/tests/bench/gpu_step.o $(BUILD)/libtroupe.a
	@echo "  LD $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

.PHONY: cuda test-gpu bench-gpu
bench-gpu: $(BENCH_GPU) $(BENCH_STEP) ## measure the kernels on a card, beside cuBLASLt, and the decode step with and without graphs
	@$(if $(BENCH_GPU),$(BENCH_GPU),echo "this needs nvcc and cuBLASLt" >&2; exit 1)
	@$(BENCH_STEP)

.PHONY: bench-gpu-peers
bench-gpu-peers: $(BENCH_GPU) ## the same beside DeepGEMM and FlashMLA, where their wheels are installed (ARGS=--help)
	python3 bench/gpu/peers.py --bench $(BUILD)/bench-gpu $(ARGS)

cuda: $(CUDA_OBJECTS) $(if $(NVCC),$(GPU_TESTS) $(BENCH_GPU) $(BENCH_STEP)) ## build everything for the GPU (needs nvcc, no card)
	@$(if $(NVCC),true,echo "there is no nvcc: set CUDA_HOME or put it on the PATH" >&2; exit 1)

test-gpu: cuda ## run the kernel tests on a card
	@for test in $(GPU_TESTS); do echo "$$test"; $$test || exit 1; done

-include $(EMULATED:.o=.d) $(CUDA_OBJECTS:.o=.d) $(CUDA_TESTS:$(BUILD)/tests/%=$(BUILD)/tests/gpu/%.d) $(BUILD)/tests-gpu/gpu_card.d $(BUILD)/bench/gpu/bench_gpu.d $(BUILD)/tests/bench/gpu_step.d

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(TEST_SUPPORT) $(BUILD)/libtroupe.a
	@echo "  LD $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcmocka

.SECONDARY:
-include $(OBJECTS:.o=.d) $(TESTS:=.d) $(BUILD)/actors/host/main.d $(TEST_SUPPORT:.o=.d)

SEEDS ?= 1..2000
JOBS ?= $(shell nproc)
.PHONY: sim sim-mutants
chaos: deps ## real processes, one fault after the other: detection, repair, longest gap (PLAN=FILE for one plan, SEED=N)
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	@sh tests/chaos.sh $(BUILD) "$(PLAN)" $(or $(SEED),1)

.PHONY: chaos storm
storm: deps ## ten minutes with a fault every 2 s under 32 streams (SEED=N)
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	$(BUILD)/troupe chaos --plan config/faults/live-storm.plan --seed $(or $(SEED),1) --html $(BUILD)/storm.html --journal $(BUILD)/chaos.db

.PHONY: bench-cost
bench-cost: deps ## processor time per token with checksums, hedging and heartbeats on and off, in turns (ARGS=--audit for audits)
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	python3 bench/fault_cost.py --troupe $(BUILD)/troupe $(ARGS)

sim: $(BUILD)/troupe ## simulate clusters with faults: SEEDS=1..2000 JOBS=2, or SEED=17
	$(BUILD)/troupe sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --jobs $(JOBS)) --shrink $(ARGS)

sim-mutants: ## introduce each deliberate bug of tests/mutants alone; the simulator must catch it
	@CC="$(CC)" MAKE="$(MAKE)" sh tests/mutants/run.sh $(BUILD) $(SEEDS) $(JOBS) $(MUTANTS)

.PHONY: soak-elastic soak-cycles
SECONDS ?= 60
CYCLES ?= 200
soak-elastic: $(BUILD)/troupe $(BUILD)/tests/test_live_elastic ## grow and shrink under 32 streams for SECONDS, print what clients noticed
	TROUPE_BUILD=$(BUILD) $(BUILD)/tests/test_live_elastic soak $(SECONDS)

soak-cycles: $(BUILD)/troupe $(BUILD)/tests/test_live_elastic ## scale up and down CYCLES times: nothing may be left behind
	TROUPE_BUILD=$(BUILD) $(BUILD)/tests/test_live_elastic cycles $(CYCLES)

.PHONY: bench-mtp
bench-mtp: deps ## one stream with guessed tokens against without, in turns (ARGS='--pairs 25 TEXT...')
	@$(MAKE) --no-print-directory $(BUILD)/troupe
	python3 bench/mtp.py --troupe $(BUILD)/troupe $(ARGS)

.PHONY: bench-kernels
bench-kernels: $(BUILD)/tests/bench/kernels ## one operation at a time, as shares of the machine's limits (ARGS='--threads 2 --filter fp8')
	$< $(ARGS)

.PHONY: bench-planner
bench-planner: $(BUILD)/tests/bench/planner ## the placement planner against EPLB on recorded loads (TRACES=FILES)
	$< $(or $(TRACES),$(wildcard ../shared/traces/*.safetensors))

.PHONY: study-shift
study-shift: $(BUILD)/troupe $(BUILD)/tests/study/shift ## balance of the live demo model while the text's domain changes (TEXT=DIR, ROUNDS=N, PROCESSES=N, SPARE=N)
	TROUPE_BUILD=$(BUILD) $(BUILD)/tests/study/shift models/demo $(or $(TEXT),../shared/text) $(or $(OUT),docs/shift.svg) \
	  $(or $(ROUNDS),6) $(or $(PROCESSES),4) $(or $(SPARE),8)

.PHONY: bench-balance
bench-balance: $(BUILD)/troupe $(BUILD)/tests/bench/balance_cost ## throughput with statistics and automatic rebalancing against without, in turn (PAIRS=N, STREAMS=N)
	TROUPE_BUILD=$(BUILD) $(BUILD)/tests/bench/balance_cost models/demo $(or $(PAIRS),20) $(or $(STREAMS),32) $(if $(ARGS),"$(ARGS)")

format: ## clang-format every source
	clang-format -i $(filter-out $(BUILD)/%,$(shell git ls-files '*.c' '*.h' '*.cc' '*.cu' '*.cuh'))

tidy: ## clang-tidy
	clang-tidy $(LIBRARY_SOURCES) -- $(CPPFLAGS) -std=gnu17

clean: ## remove build/
	rm -rf build
