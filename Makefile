# What people type. Each target says what it does in `make help`; the work is in scripts/ and in the
# programs themselves. Everything built or downloaded is kept outside the clone, in $(CACHE).

CACHE        ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/domicile
export CACHE
export CARGO_TARGET_DIR ?= $(CACHE)/target
VERSION      := $(shell sed -n '/workspace.package/,/^version/s/^version = "\(.*\)"/\1/p' Cargo.toml)
export VERSION
IMAGE        ?= domicile:$(VERSION)
export IMAGE
# testbed (default): a cluster of several regions on this machine; current: the one of your kubeconfig.
CLUSTER      ?= testbed
export CLUSTER

.DEFAULT_GOAL := help
.PHONY: checkout help setup demo down test image plugin generate fmt lint bench-create bench-commit bench-failover \
        bench-failover-patroni bench-residency bench-rights break status

# Keeps what another checkout has built from being taken for this one's; see scripts/lib.sh.
checkout:
	@bash -c 'source scripts/lib.sh'

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what the machine lacks (as root, on Debian)
	@scripts/setup

demo: setup ## See it work: cluster, operator, store, rows across regions, a refusal
	@scripts/demo

down: ## Take down everything that demo and test put up
	@scripts/down

test: setup ## All tests, from formatting to the cluster of several regions
	@scripts/test

image: setup ## Build the image into target/domicile-image.tar, without a container engine
	@scripts/image

plugin: setup ## Build kubectl-domicile into target/kubectl-domicile
	@scripts/plugin

generate: checkout ## Write crds/ from the types, and the copies that chart and kustomize carry
	@cargo run --quiet --bin domicile -- crds --dir crds
	@cp crds/domicile.dev_*.yaml charts/domicile/files/crds/
	@cp crds/domicile.dev_*.yaml config/crds/
	@for f in config/admission/*.yaml; do [ $${f##*/} = kustomization.yaml ] || cp $$f charts/domicile/files/admission/; done
	@cp config/rbac/user-roles.yaml charts/domicile/files/

fmt: ## Format
	@cargo fmt --all

lint: checkout ## Formatting and lints, warnings denied
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

bench-create: setup ## Seconds from apply to Ready, for 1 and for 10 stores (RUNS=n)
	@scripts/bench create

bench-failover: setup ## What a failover costs (RUNS=n, CASES=…, LATENCY="0 40", FRESH=1); goes on where it stopped
	@scripts/bench failover

bench-residency: setup ## How soon copies outside are found and stopped (RUNS=n, CASES=…, FAILOVERS=n, FRESH=1); goes on where it stopped
	@scripts/bench residency

bench-rights: setup ## What rights requests cost (RUNS=n, BATCH=n, CASES=…): accepted, erased, drained, memory; beside pgbench
	@scripts/bench rights

break: ## Cut the demo's primary off before your eyes, and let it come home
	@scripts/break

bench-commit: setup ## Commit rate of a store against the same PostgreSQLs configured by hand (RUNS=n pairs)
	@scripts/bench commit

bench-failover-patroni: setup ## Failover under Debian's Patroni and etcd, installed by this (RUNS=n; takes the test bed's place)
	@scripts/bench-failover-patroni
