# SPDX-License-Identifier: Apache-2.0
#
# The entry points. `make` tells what they are.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# One target folder for all that cargo builds, wherever the scripts call it from.
export CARGO_TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))

# Laid out like an install prefix.
DIST := target/dist
ASSETS := $(DIST)/lib/runvm

PREFIX ?= /usr/local
DESTDIR ?=
PURPOSES := build run

.PHONY: help
help: ## show this
	@echo 'runvm: an OCI runtime that gives every container a virtual machine of its own.'
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'New here? Run `make demo` as root: it installs what it needs from the distribution,'
	@echo 'builds everything and starts a program in a virtual machine through Docker.'

.PHONY: demo
demo: PURPOSES += demo
demo: build ## see a program run in a virtual machine under a private Docker daemon
	@packaging/demo.sh

.PHONY: test
test: PURPOSES += lint test
test: build ## pass the lints, the unit tests and the suites on real engines
	@packaging/test.sh

.PHONY: soak
soak: PURPOSES += fuzz test
soak: build ## start 500 containers in a row, and fuzz the devices for ten minutes each or FUZZ_SECONDS
	@RUNVM_LIFECYCLES=$(or $(RUNVM_LIFECYCLES),500) cargo test --locked --package conformance --test leaks --test docker -- many::
	@FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) vmm/fuzz/fuzz.sh

.PHONY: bench
bench: PURPOSES += test bench
bench: build ## measure runc, crun, runsc and runvm side by side
	@cargo run --release --locked --package conformance --bin bench

.PHONY: build
build: kernel agent runtime shim ## make everything and lay it out in target/dist
	@echo 'runvm is built: $(DIST)/bin/runvm'

.PHONY: dependencies
dependencies:
	@packaging/dependencies.sh $(PURPOSES)

.PHONY: kernel
kernel: dependencies
	@kernel/build.sh $(ASSETS)

.PHONY: agent
agent: dependencies
	@guest-agent/build.sh $(ASSETS)

.PHONY: runtime
runtime: dependencies
	@install -C -D -m 755 "$$(packaging/cargo-static.sh runvm)" $(DIST)/bin/runvm

.PHONY: shim
shim: dependencies
	@install -C -D -m 755 "$$(packaging/cargo-static.sh containerd-shim-runvm-v2)" $(DIST)/bin/containerd-shim-runvm-v2

.PHONY: install
install: build ## copy it to PREFIX (/usr/local), below DESTDIR
	@packaging/install.sh '$(DIST)' '$(DESTDIR)$(PREFIX)'
	@sed 's,@PREFIX@,$(PREFIX),' packaging/installed.txt

.PHONY: uninstall
uninstall: ## remove what `make install` copied
	rm -f '$(DESTDIR)$(PREFIX)/bin/runvm' '$(DESTDIR)$(PREFIX)/bin/containerd-shim-runvm-v2'
	rm -rf '$(DESTDIR)$(PREFIX)/lib/runvm'

.PHONY: deb
deb: build ## make a Debian package in target/
	@packaging/deb.sh '$(DIST)' target

.PHONY: image
image: build ## make an image in target/ that installs runvm on the nodes of a Kubernetes cluster
	@packaging/image.sh '$(DIST)' target

.PHONY: clean
clean: ## remove target/; the cache of kernels and images stays
	rm -rf target '$(CARGO_TARGET_DIR)'
