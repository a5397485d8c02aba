#!/usr/bin/env bash
# Proof on a machine with a GPU: builds the wheel, runs the GPU tests, the sanitizers and the
# benchmarks.
#
#   benchmarks/gpu_check.sh            every stage that has not passed yet, in order
#   benchmarks/gpu_check.sh STAGE...   these, again
#
# Stages: build test memcheck racecheck rows groups pack statistics prune_pack model. Each ends
# within eight minutes. Needs nvcc, torch with CUDA, and what pyproject.toml builds and tests with; no
# network, if CUTLASS is there (CUTLASS_DIR, or third_party/cutlass). OUT (default build/gpu_check)
# receives STAGE.log and STAGE.json of each; the benchmarks' numbers are also in benchmarks/results/.
# PYTHON is the interpreter; WANDA_EXT_CUDA_ARCHS what to compile for, by default this GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(mkdir -p "${OUT:-$root/build/gpu_check}" && cd "${OUT:-$root/build/gpu_check}" && pwd)
python=${PYTHON:-python3}
limit=480  # seconds of a stage
stages=(build test memcheck racecheck rows groups pack statistics prune_pack model)

# What the sanitizers see: each kernel and each way to hold a row, with ties, and bad rows.
reduced='(ties and bfloat16 and not 28672 and not 131071 and not 131072)'
reduced+=' or (sumsq and bfloat16 and 900) or bad_rows or graph'

gpu_tests() {
  (cd "$out" && PYTHONPATH=$out/site "$@" -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider -q "$root/python_tests" -m gpu "${selection[@]}")
}

sanitize() {
  selection=(-k "$reduced")
  # torch's own allocator would hide what lies beyond a tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 gpu_tests compute-sanitizer --tool "$1" --error-exitcode 9 \
    --target-processes all "$python"
}

benchmark() {
  (cd "$out" && PYTHONPATH=$out/site:$root/benchmarks "$python" "$root/benchmarks/$1" "${@:2}")
}
bench() { benchmark bench_prune_cuda.py --only "$1" --seconds 1; }

selection=()
stage_build() {
  rm -rf "$out/site" "$out"/*.whl
  local capability
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export WANDA_EXT_CUDA=1 WANDA_EXT_CUDA_ARCHS=${WANDA_EXT_CUDA_ARCHS:-$capability}
  "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$out" "$root"
  "$python" -m pip install --no-deps --target "$out/site" "$out"/wanda_ext-*.whl
  (cd "$out" && PYTHONPATH=$out/site "$python" -m wanda_ext.info)
}
stage_test() { gpu_tests "$python"; }
stage_memcheck() { sanitize memcheck; }
stage_racecheck() { sanitize racecheck; }
stage_rows() { bench rows; }
stage_groups() { bench groups; }
stage_pack() { bench pack; }
stage_statistics() { bench statistics; }
stage_prune_pack() {
  mkdir -p "$root/benchmarks/results"
  nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=native -I"$root/csrc" \
    -I"$root/csrc/include" "$root/benchmarks/cpp/prune_pack_24.cu" \
    "$root/csrc/core/cuda/pack_24.cu" -o "$out/prune_pack"
  "$out/prune_pack" 4096 4096 12288 4096 22016 4096 4096 11008 8192 28672 |
    tee "$root/benchmarks/results/prune_pack_24.jsonl"
}
stage_model() {
  benchmark bench_model_cuda.py --sparsity 0.5
  benchmark bench_model_cuda.py --sparsity 2:4
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
  "stage_$2"
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
