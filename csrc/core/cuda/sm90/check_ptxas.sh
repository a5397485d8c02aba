#!/bin/sh
# Runs a CUDA compiler, and fails where ptxas serialised wgmma: every instruction then waits for the
# one before it. ptxas mentions that (C7510, C7515 and others) and goes on.
#
#   sh check_ptxas.sh [CCACHE] NVCC ARGUMENTS...
said=$("$@" 2>&1)
status=$?
[ -z "$said" ] || printf '%s\n' "$said" >&2
case $status$said in
  0*'wgmma.mma_async instructions are serialized'*) ;;
  *) exit $status ;;
esac
echo "error: ptxas serialised wgmma, see above; change the kernel, or compile with -DNDEBUG" >&2
while [ $# -gt 1 ]; do  # make would take the object for a good one
  [ "$1" != -o ] || rm -f "$2"
  shift
done
exit 1
