# Sourced by the scripts here: where things are, how progress is said.
# shellcheck shell=bash disable=SC2034 # those who source this use them
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${FORKD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/forkd}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
export GOCACHE=${GOCACHE:-$cache/go-build}
mkdir -p "$cache"

started=$SECONDS
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi

# say TEXT: one line of progress, with the seconds since the script began.
say() { printf '%s%4ds%s %s\n' "$dim" $((SECONDS - started)) "$plain" "$*"; }
# die TEXT [TRY]: what failed and what to do about it.
die() {
  printf 'error: %s\n' "$1" >&2
  [ -z "${2:-}" ] || printf 'try: %s\n' "$2" >&2
  exit 1
}
# need COMMAND... : the toolchains that no script here installs.
need() {
  local command
  for command; do
    command -v "$command" >/dev/null || die "$command is missing" "install $command and run this again"
  done
}
# packages NAME... : installs Debian packages that are missing.
packages() {
  local missing=() name
  for name; do dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "these packages are missing: ${missing[*]}" "install them with your package manager"
  say "installing ${missing[*]}"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${missing[@]}"; } \
    >"$cache/apt.log" 2>&1 || die "apt-get could not install ${missing[*]}" "see $cache/apt.log"
}
