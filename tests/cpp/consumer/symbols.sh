#!/bin/sh
# Usage: symbols.sh LIBRARY SONAME
# The shared library has this soname, is there by that name, and shows the public functions and nothing else.
set -eu
library=$1
soname=$2

fail() {
  echo "$library: $1" >&2
  exit 1
}

readelf -d "$library" | grep -q "SONAME.*\[$soname\]" || fail "its soname is not $soname"
[ -e "$(dirname "$library")/$soname" ] || fail "no $soname beside it"

symbols=$(nm -D --defined-only "$library" | awk '{ print $3 }')
for name in flash_mla_dense_decode flash_mla_merge_states '_ZN9flash_mla12dense_decodeE' '_ZTIN9flash_mla11UnsupportedE'; do
  echo "$symbols" | grep -q "^$name" || fail "does not show $name"
done
foreign=$(echo "$symbols" | grep -v -E '^(flash_mla_|_Z(T[ISV])?N9flash_mla)' || true)
[ -z "$foreign" ] || fail "shows what is not the library's: $foreign"
internal=$(echo "$symbols" | grep -E '^_ZN9flash_mla(3cpu|4cuda|6checks|7combine|9scheduler|18check_dense_decode)' || true)
[ -z "$internal" ] || fail "shows what is internal: $internal"
