#!/usr/bin/env bash
# Proof on a machine with a GPU: builds the wheel and the C++ library, runs the GPU tests, the
# sanitizers and the benchmarks.
#
#   benchmarks/gpu_check.sh            every stage that has not passed yet, in order
#   benchmarks/gpu_check.sh STAGE...   these, again
#
# Each stage ends within eight minutes; those of a PART are for the linears of one model:
#
#   build, cpp                         the wheel; the C++ library, its tests and its benchmarks
#   test, test_linear_24               the ops against the CPU; linear_24 against fp64
#   memcheck, racecheck                compute-sanitizer on a part of test
#   memcheck_linear_24, racecheck_linear_24                         and of test_linear_24
#   tune_PART                          finds the fastest kernels, by which later stages run
#   linear_24_PART, linear_24_cpp      linear_24 against dense and torch's own 2:4; every kernel
#   test_bitmap, memcheck_bitmap, racecheck_bitmap                  the bitmap ops, likewise
#   linear_bitmap_PART                 linear_bitmap against dense and linear_24
#   decode_MODEL, prefill_MODEL        whole models, dense and packed
#   rows, groups, pack, statistics, prune_pack, prune_model         pruning
#
# Needs nvcc, cmake, cuBLAS (the toolkit's or torch's), torch with CUDA, and what pyproject.toml builds
# and tests with; no network, if CUTLASS is there (CUTLASS_DIR, or third_party/cutlass). OUT (default
# build/gpu_check) receives STAGE.log and STAGE.json of each, and cache/wanda_ext/dispatch.json, what
# was tuned; the benchmarks' numbers are also in benchmarks/results/. PYTHON is the interpreter;
# WANDA_EXT_CUDA_ARCHS what to compile for, by default this GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(mkdir -p "${OUT:-$root/build/gpu_check}" && cd "${OUT:-$root/build/gpu_check}" && pwd)
python=${PYTHON:-python3}
limit=480  # seconds of a stage
results=$root/benchmarks/results
parts=(7b 13b 70b 8b unfused)
stages=(build test memcheck racecheck test_linear_24 memcheck_linear_24 racecheck_linear_24)
stages+=(test_bitmap memcheck_bitmap racecheck_bitmap)
stages+=("${parts[@]/#/tune_}" "${parts[@]/#/linear_24_}" cpp linear_24_cpp prune_pack)
stages+=("${parts[@]/#/linear_bitmap_}")
stages+=(decode_7b prefill_7b decode_8b prefill_8b rows groups pack statistics prune_model)
export XDG_CACHE_HOME=$out/cache  # of the dispatch table: this run's own

# What the sanitizers see: each kernel and each way to hold a row, with ties, and bad rows.
reduced='(ties and bfloat16 and not 28672 and not 131071 and not 131072)'
reduced+=' or (sumsq and bfloat16 and 900) or bad_rows or graph'
# Each kernel and splits of it, for few rows and for more than a tile.
reduced_linear_24='every_kernel and 520x2064 and (m5 or m33 or m300)'

# Every kernel shape, pieces of several CTAs, the surplus; both ways to load and store a tile.
reduced_bitmap='random_shapes or (packs and (4097 or 592)) or (prunes and 4096)'

# gpu_tests FILE COMMAND...: the tests of one file, or of all but those of the products.
gpu_tests() {
  local tests=("$root/python_tests/$1")
  [[ $1 == all ]] && tests=("$root/python_tests" --ignore "$root/python_tests/test_gpu_linear_24.py"
    --ignore "$root/python_tests/test_gpu_bitmap.py")
  (cd "$out" && PYTHONPATH=$out/site "${@:2}" -m pytest -c "$root/pyproject.toml" \
    --rootdir "$root" -p no:cacheprovider -q "${tests[@]}" -m gpu "${selection[@]}")
}

# sanitize TOOL FILE SELECTION
sanitize() {
  selection=(-k "$3")
  # torch's own allocator would hide what lies beyond a tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 gpu_tests "$2" compute-sanitizer --tool "$1" \
    --error-exitcode 9 --target-processes all "$python"
}

installed_python() { (cd "$out" && PYTHONPATH=$out/site:$root/benchmarks "$python" "$@"); }
benchmark() { installed_python "$root/benchmarks/$1" "${@:2}"; }
bench() { benchmark bench_prune_cuda.py --only "$1" --seconds 1; }
capability() {
  "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'
}

selection=()
stage_build() {
  rm -rf "$out/site" "$out"/*.whl
  export WANDA_EXT_CUDA=1 WANDA_EXT_CUDA_ARCHS=${WANDA_EXT_CUDA_ARCHS:-$(capability)}
  "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$out" "$root"
  "$python" -m pip install --no-deps --target "$out/site" "$out"/wanda_ext-*.whl
  (cd "$out" && PYTHONPATH=$out/site "$python" -m wanda_ext.info)
}
stage_test() { gpu_tests all "$python"; }
stage_memcheck() { sanitize memcheck test_gpu.py "$reduced"; }
stage_racecheck() { sanitize racecheck test_gpu.py "$reduced"; }
stage_test_linear_24() { gpu_tests test_gpu_linear_24.py "$python"; }
stage_memcheck_linear_24() { sanitize memcheck test_gpu_linear_24.py "$reduced_linear_24"; }
stage_racecheck_linear_24() { sanitize racecheck test_gpu_linear_24.py "$reduced_linear_24"; }
stage_test_bitmap() { gpu_tests test_gpu_bitmap.py "$python"; }
stage_memcheck_bitmap() { sanitize memcheck test_gpu_bitmap.py "$reduced_bitmap"; }
stage_racecheck_bitmap() { sanitize racecheck test_gpu_bitmap.py "$reduced_bitmap"; }
stage_rows() { bench rows; }
stage_groups() { bench groups; }
stage_pack() { bench pack; }
stage_statistics() { bench statistics; }
stage_cpp() {
  local cublas
  cublas=$("$python" - <<'PYTHON'
import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("nvidia")
packages = spec.submodule_search_locations if spec else []
headers = [h for p in packages for h in Path(p).glob("*/include/cublas_v2.h")]
print(headers[0].parents[1] if headers else "")
PYTHON
  )
  cmake -S "$root" -B "$out/cmake" -DWANDA_EXT_CUDA=ON -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CUDA_ARCHITECTURES="$(capability)" ${cublas:+"-DCUBLAS_DIR=$cublas"}
  cmake --build "$out/cmake" --parallel "$(nproc)"
  ctest --test-dir "$out/cmake" --output-on-failure --parallel "$(nproc)"
}
stage_linear_24_cpp() {
  mkdir -p "$results"
  "$out/cmake/benchmarks/cpp/linear_24" --all-kernels --json "$results/linear_24_cpp.json"
}
stage_prune_pack() {
  mkdir -p "$results"
  "$out/cmake/benchmarks/cpp/prune_pack_24" 4096 4096 12288 4096 22016 4096 4096 11008 8192 28672 |
    tee "$results/prune_pack_24.jsonl"
}
stage_prune_model() {
  benchmark bench_model_cuda.py --sparsity 0.5
  benchmark bench_model_cuda.py --sparsity 2:4
}
stage_tune() {
  installed_python - "$1" <<'PYTHON'
import sys

import shapes
from wanda_ext import bench

tuning = bench.tune(shapes.PARTS[sys.argv[1]], seconds=0.1, progress=False)
print(tuning)
sys.exit(bool(tuning.problems))
PYTHON
}

inside() {
  case $1 in
    tune_*) stage_tune "${1#tune_}" ;;
    linear_24_cpp) stage_linear_24_cpp ;;
    linear_24_*) benchmark bench_linear_24.py --part "${1#linear_24_}" ;;
    linear_bitmap_*) benchmark bench_linear_bitmap.py --part "${1#linear_bitmap_}" ;;
    decode_* | prefill_*) benchmark bench_model.py --model "${1#*_}" --work "${1%_*}" ;;
    *) "stage_$1" ;;
  esac
}

run_stage() {
  local stage=$1 start=$SECONDS rc=0
  printf '\n=== %s\n' "$stage"
  rm -f "$out/$stage.json"
  # As a program of its own, so that the limit ends all of it.
  timeout "$limit" "${BASH_SOURCE[0]}" --inside "$stage" 2>&1 | tee "$out/$stage.log" ||
    rc=${PIPESTATUS[0]}
  printf '{"stage": "%s", "rc": %d, "seconds": %d, "gpu": "%s", "commit": "%s"}\n' "$stage" "$rc" \
    $((SECONDS - start)) "$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 || true)" \
    "$(git -C "$root" describe --always --dirty 2>/dev/null || true)" | tee "$out/$stage.json"
  return "$rc"
}

if [[ ${1:-} == --inside ]]; then
  inside "$2"
  exit
fi
for stage in "$@"; do
  [[ " ${stages[*]} " == *" $stage "* ]] && continue
  echo "no stage $stage; expected some of: ${stages[*]}" >&2
  exit 2
done
failed=()
if (($# > 0)); then
  for stage in "$@"; do run_stage "$stage" || failed+=("$stage"); done
else
  for stage in "${stages[@]}"; do
    grep -qs '"rc": 0' "$out/$stage.json" && continue
    run_stage "$stage" || failed+=("$stage")
    [[ $stage == build && ${#failed[@]} -gt 0 ]] && break  # the others need it
  done
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}; see $out" >&2; exit 1; }
