# Shared by the scripts beside it: where things are, and one line per step with its time.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/domicile}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}
# What setup may have installed a moment ago.
export PATH=$PATH:$HOME/.cargo/bin:/usr/local/go/bin
VERSION=${VERSION:-$(sed -n '/workspace.package/,/^version/s/^version = "\(.*\)"/\1/p' Cargo.toml)}
IMAGE=${IMAGE:-domicile:$VERSION}
CLUSTER=${CLUSTER:-testbed}
TARGET=$(uname -m)-unknown-linux-gnu
ARCHIVE=target/domicile-image.tar

# Cargo tells sources of two checkouts apart by neither path nor content, only by time: with one target folder for
# all, a checkout could be given what another one built. So what is ours is built anew when the checkout changes;
# dependencies, which are most of the work, stay.
if [[ -d $CARGO_TARGET_DIR && $(cat "$CARGO_TARGET_DIR/checkout" 2>/dev/null) != "$PWD" ]]; then
  cargo clean --quiet --package domicile --package e2e
  cargo clean --quiet --release --package e2e
  cargo clean --quiet --release --target "$TARGET" --package domicile
fi
mkdir -p "$CARGO_TARGET_DIR"
printf '%s\n' "$PWD" >"$CARGO_TARGET_DIR/checkout"

say() { printf '%s\n' "$*"; }
die() { printf 'FAIL  %s\n' "$*" >&2; exit 1; }

# step WHAT COMMAND…: runs it quietly; says how long it took, or all it printed if it failed.
step() {
  local what=$1 begin=$EPOCHREALTIME log status=0
  shift
  log=$(mktemp)
  "$@" >"$log" 2>&1 || status=$?
  if [[ $status -ne 0 ]]; then
    printf 'FAIL  %s\n' "$what" >&2
    cat "$log" >&2
    rm -f "$log"
    exit "$status"
  fi
  rm -f "$log"
  awk -v w="$what" -v b="$begin" -v e="$EPOCHREALTIME" 'BEGIN { printf "ok    %-60s %8.1f s\n", w, e - b }'
}

# loud WHAT COMMAND…: the same for what a person should see while it runs.
loud() {
  local what=$1 begin=$EPOCHREALTIME status=0
  shift
  printf '\n----  %s\n' "$what"
  "$@" || status=$?
  [[ $status -eq 0 ]] || die "$what"
  awk -v w="$what" -v b="$begin" -v e="$EPOCHREALTIME" 'BEGIN { printf "ok    %-60s %8.1f s\n", w, e - b }'
}

testbed() { "$CARGO_TARGET_DIR/debug/testbed" "$@"; }

# The program as it is shipped. --target, so that build scripts and procedural macros are not linked statically too.
PROGRAM=$CARGO_TARGET_DIR/$TARGET/release/domicile
build_static() {
  RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --quiet --locked --release --target "$TARGET" --package domicile --bin domicile
}

build_testbed() { cargo build --quiet --locked --package e2e --bin testbed; }

# use_testbed: kubectl and helm are the test bed's own, of the cluster's version.
use_testbed() {
  KUBECONFIG=$(testbed kubeconfig)
  export KUBECONFIG
  PATH=$(dirname "$KUBECONFIG")/bin:$PATH
}
