#!/usr/bin/env bash
# Tests and benchmarks on GPUs, with a Python that already has a CUDA build of torch. Downloads
# nothing.
#
#   tools/gpu_test.sh              build, then the gpu tests, and the multi_gpu ones if there are two
#   tools/gpu_test.sh sanitize     build, then kernels under compute-sanitizer, on one GPU
#   tools/gpu_test.sh bench        build, then every `dualpipe bench`; rows into $OUT
#
# PYTHON           the Python with torch (python3)
# OUT              folder of the logs (build/gpu)
# DUALPIPE_COMMIT  what the rows of a benchmark shall call this tree, if it came without its history
# PREBUILT=1       take the CUDA core that lies in dualpipe_ext/ already, and build nothing
set -euo pipefail
cd "$(dirname "$0")/.."

base=${PYTHON:-python3}
out=${OUT:-build/gpu}
venv=build/gpu-venv
mkdir -p "$out"

# Multicast over NVLink is not used by anything here; some hosts do not stand it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1

# Some images name a compiler that links libstdc++ statically into extensions; two copies of it in
# one process crash in std::regex and locale code.
if [[ -x /usr/bin/g++ ]]; then export CC=/usr/bin/gcc CXX=/usr/bin/g++; fi

gpus=$("$base" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
  echo "expected a GPU that $base's torch can use, got none" >&2
  exit 2
fi

# An environment on top of that Python's packages: nothing is installed into them. A path file
# rather than --system-site-packages, which would skip the packages if $base is itself in a venv.
"$base" -m venv --clear --without-pip "$venv"
python=$PWD/$venv/bin/python
"$base" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
  >"$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
build=1
[[ -n ${PREBUILT:-} ]] && build=0
DUALPIPE_CUDA=$build "$base" -m pip --python "$python" --disable-pip-version-check install --quiet \
  --no-build-isolation --no-deps --no-index -e . 2>&1 | tee "$out/build.log"
"$python" -m dualpipe_ext doctor 2>&1 | tee "$out/doctor.log"

status=0
run() {  # run NAME COMMAND...: its output also goes to NAME.log
  local name=$1
  shift
  "$@" 2>&1 | tee "$out/$name.log" || status=1
}

# together NAME COMMAND... [-- NAME COMMAND...]...: all at once, each into its log, and a line about
# each at the end. Commands that share a GPU are slower, and right all the same.
together() {
  local -a names=() pids=()
  while (($#)); do
    local name=$1 command=()
    shift
    while (($#)) && [[ $1 != -- ]]; do
      command+=("$1")
      shift
    done
    (($#)) && shift
    "${command[@]}" >"$out/$name.log" 2>&1 &
    names+=("$name") pids+=($!)
  done
  for i in "${!pids[@]}"; do
    if wait "${pids[$i]}"; then
      echo "${names[$i]}: passed"
    else
      status=1
      echo "${names[$i]}: failed, see $out/${names[$i]}.log"
      grep -E '^(FAILED|ERROR)' "$out/${names[$i]}.log" || tail -5 "$out/${names[$i]}.log"
    fi
  done
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
pytest=("$python" -m pytest -p no:cacheprovider -rs --tb=short)
transports=tests/ep/test_transports.py

tests() {
  local -a on=()
  for i in 0 1 2; do on[i]="CUDA_VISIBLE_DEVICES=$((i % gpus))"; done
  local gpu=("${pytest[@]}" -m gpu)
  together \
    gpu-virtual-1-2 env "${on[0]}" "${gpu[@]}" $transports -k "virtual-1 or virtual-2" -- \
    gpu-virtual-more env "${on[1]}" "${gpu[@]}" $transports -k "not virtual-1 and not virtual-2" -- \
    gpu-calls env "${on[2]}" "${gpu[@]}" tests/gpu/test_ep.py -- \
    gpu-planner env "${on[0]}" "${gpu[@]}" tests/gpu/test_eplb_planner.py tests/gpu/test_core.py -- \
    gpu-others env "${on[1]}" "${gpu[@]}" tests --ignore $transports --ignore tests/gpu/test_ep.py \
    --ignore tests/gpu/test_eplb_planner.py --ignore tests/gpu/test_core.py
  if ((gpus < 2)); then return; fi
  local multi=("${pytest[@]}" -m multi_gpu)
  together \
    multi-nvlink "${multi[@]}" $transports -k "nvlink-" -- \
    multi-copy-engine "${multi[@]}" $transports -k "copy_engine-" -- \
    multi-low-latency "${multi[@]}" $transports -k "low_latency-" -- \
    multi-nccl "${multi[@]}" $transports -k "nccl-"
  # One at a time: they watch time-outs and what overlaps.
  run multi-others "${multi[@]}" tests --ignore $transports
}

sanitize() {
  # A plan by node, one in pairs, one with 16 GPUs to a lane: every path of the planner.
  local planner=tests/gpu/test_eplb_planner.py
  local plans=("$planner::test_replica_ranks")
  for sizes in 256-sizes1 160-sizes5; do
    plans+=("$planner::test_real_shapes_and_limits[$sizes-lognormal]")
  done
  local tool=(compute-sanitizer --error-exitcode 9 --target-processes all --tool)
  # Two virtual ranks: one launch acts for both, so the sanitizer sees all that they do.
  local ranks=("${pytest[@]}" -m gpu $transports -k)
  together \
    memcheck "${tool[@]}" memcheck "${pytest[@]}" tests/gpu/test_core.py "${plans[@]}" -- \
    racecheck "${tool[@]}" racecheck "${pytest[@]}" tests/gpu/test_core.py "${plans[@]}" -- \
    memcheck-ep "${tool[@]}" memcheck "${ranks[@]}" \
    "(test_forward or test_sizes or test_groups) and virtual-2" -- \
    memcheck-mistakes "${tool[@]}" memcheck "${ranks[@]}" "test_mistakes and virtual-2" -- \
    racecheck-ep "${tool[@]}" racecheck "${ranks[@]}" "test_sizes and virtual-2"
  grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$out"/*check*.log
}

bench() {  # one after the other: they measure
  local dualpipe=("$python" -m dualpipe_ext bench)
  run bench-ep "${dualpipe[@]}" ep --sms 8,16,24,64,128 --output "$out/ep.csv" \
    --picture "$out/ep.png"
  run bench-eplb "${dualpipe[@]}" eplb --output "$out/eplb.csv"
  run bench-memory "${dualpipe[@]}" memory --output "$out/memory.csv"
  run bench-gemm "${dualpipe[@]}" gemm --output "$out/gemm.csv"
  # Two layers: with four, the weights of 256 experts nearly fill two GPUs.
  run bench-pipeline "${dualpipe[@]}" pipeline --layers 2 --rounds 3 --output "$out/pipeline.csv" \
    --picture "$out/pair.png"
  # As many experts' rows to an expert as where experts are spread over many GPUs.
  run bench-pair "${dualpipe[@]}" pipeline --parts pair --experts 32 --layers 4 --rounds 3 \
    --transports copy_engine --output "$out/pipeline.csv" --picture "$out/pair-32.png"
  # Which number of SMs packs best depends on the link.
  run bench-pack "${dualpipe[@]}" pipeline --parts pair --layers 2 --rounds 3 \
    --transports copy_engine --pack-sms 4,8,16 --output "$out/pipeline.csv" \
    --picture "$out/pack.png"
  run bench-decode "$python" benchmarks/decode.py
  cp benchmarks/results/decode.csv "$out" || status=1
  if "$python" -c 'import megatron.core' 2>/dev/null; then
    run bench-megatron "$python" benchmarks/megatron_dispatcher.py
    cp benchmarks/results/megatron.csv "$out" || status=1
  fi
  run bench-curves "$python" benchmarks/loss_curves.py --steps 200 --comm-sms 0 --batch 128
  cp benchmarks/results/loss_curves.csv build/benchmarks/loss-curves/loss-curves.png "$out" || status=1
}

case ${1:-test} in
  test) tests ;;
  sanitize) sanitize ;;
  bench) bench ;;
  *)
    echo "expected test, sanitize or bench, got $1" >&2
    exit 2
    ;;
esac
exit $status
