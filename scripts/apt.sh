# Installing Debian packages; sourced by scripts that have say and die.
# shellcheck shell=bash

as_root() {
  if [[ $EUID -eq 0 ]]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "this step needs root: $*"
  fi
}

apt_updated=
apt_install() { # packages…: installs them without starting the services they bring
  export DEBIAN_FRONTEND=noninteractive
  local policy=/usr/sbin/policy-rc.d made=
  if [[ -z $apt_updated ]]; then as_root apt-get update -qq; apt_updated=1; fi
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    made=1
  fi
  local status=0
  as_root apt-get install -y -qq --no-install-recommends "$@" >/tmp/domicile-setup.$$.log 2>&1 || status=$?
  [[ -n $made ]] && as_root rm -f "$policy"
  if [[ $status -ne 0 ]]; then
    tail -n 20 /tmp/domicile-setup.$$.log >&2
    die "apt-get install $* failed (all of its output: /tmp/domicile-setup.$$.log)"
  fi
  rm -f /tmp/domicile-setup.$$.log
}
