#!/bin/sh
# Usage: ptxas_gate.sh nvcc ... -o OBJECT ...
# Runs nvcc with -Xptxas -v, leaves ptxas's report in OBJECT.ptxas, and fails where wgmma was serialised. Silent, unless
# something is wrong.
set -u

object=
previous=
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
report=$object.ptxas

fail() {
  echo "ptxas gate: $1 (-DFLASH_MLA_PTXAS_GATE=OFF builds all the same)" >&2
  rm -f "$object"
  exit 1
}

if ! "$@" 2>"$report"; then
  cat "$report" >&2
  if grep -q '^ptxas error' "$report"; then fail "ptxas rejects $object"; fi
  exit 1
fi
if grep 'wgmma.mma_async instructions are serialized' "$report" >&2; then fail "serialised wgmma in $object"; fi
grep -v -E '^ptxas info|^ +[0-9]+ bytes stack frame' "$report" >&2
exit 0
