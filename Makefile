# Two commands are all a newcomer needs: `make demo` and `make test`.

GO      ?= go
TOOL    := $(GO) tool -modfile=tools/go.mod
CACHE   := $(CURDIR)/.cache
BIN     := $(CURDIR)/bin/strongroom
FUZZ    ?= 5s
export STRONGROOM_CACHE ?= $(CACHE)
# Binaries run in guests and on hosts without a compiler.
export CGO_ENABLED ?= 1

# Packages with tests that the race detector's run leaves out or thins out: those
# of !race, and the faults and allocations of blockdevtest.
RACELESS = $(shell grep -rlE '^//go:build !race|block/blockdev/blockdevtest\"' --include='*_test.go' internal client | xargs -n1 dirname | sort -u | sed 's|^|./|')

.PHONY: help demo test setup build check unit norace race purego arm64 fuzz e2e bench generate tidy clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: setup build ## show the main job on real QEMU guests, in under two minutes (KEEP=1 leaves it running)
	@STRONGROOM=$(BIN) KEEP=$(KEEP) $(GO) run ./test/demo

test: setup build check norace race purego arm64 fuzz ## everything: what .ci/run runs

setup:
	@scripts/setup.sh

build: ## bin/strongroom, and beside it what loads an HSM's library
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/strongroom
	$(GO) build -trimpath -o $(dir $(BIN)) ./cmd/strongroom-pkcs11

check: ## format, vet, staticcheck, generated files
	@out=$$($(TOOL) gofumpt -l $$(git ls-files --cached --others --exclude-standard '*.go' ':!*.pb.go' ':!*.connect.go')); \
	 if [ -n "$$out" ]; then echo "not formatted (run: make tidy):"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(TOOL) staticcheck ./...
	@scripts/generated.sh

unit: ## all tests, real peers and guests included: quicker than what `make test` does in two parts
	$(GO) test -timeout 40m ./...

norace: ## what the next leaves out: commands, end to end, allocations and times
	$(GO) test -timeout 40m $$($(GO) list ./... | grep -vE '^strongroom/(internal/|client)') $(RACELESS)

race: ## all packages of the product, under the race detector
	$(GO) test -race -timeout 20m ./internal/... ./client/...

purego: ## the data path without assembly
	$(GO) test -timeout 20m -tags purego ./internal/crypto/... ./internal/block/volume/...

arm64: ## the cipher for arm64, in an emulator
	CGO_ENABLED=0 GOARCH=arm64 $(GO) vet ./internal/crypto/...
	CGO_ENABLED=0 GOARCH=arm64 $(GO) test -exec qemu-aarch64 ./internal/crypto/xts

fuzz: ## every fuzzer for $(FUZZ)
	@scripts/fuzz.sh $(FUZZ)

bench: setup build ## ours and its peers in turn; writes docs/reference/performance.md
	@STRONGROOM=$(BIN) $(GO) run ./test/bench

generate: ## regenerate what is generated
	$(GO) generate ./...

tidy: ## format, go.mod
	$(TOOL) gofumpt -w $$(git ls-files '*.go' ':!*.pb.go' ':!*.connect.go')
	$(GO) mod tidy

clean:
	rm -rf bin .cache
