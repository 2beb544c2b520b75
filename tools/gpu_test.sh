#!/usr/bin/env bash
# Tests on GPUs, with a Python that already has a CUDA build of torch. Downloads nothing.
#
#   tools/gpu_test.sh              build, then the gpu tests, and the multi_gpu ones if there are two
#   tools/gpu_test.sh sanitize     build, then the CUDA core's tests under compute-sanitizer
#
# PYTHON  the Python with torch (python3)       OUT  folder of the logs (build/gpu)
set -euo pipefail
cd "$(dirname "$0")/.."

base=${PYTHON:-python3}
out=${OUT:-build/gpu}
venv=build/gpu-venv
mkdir -p "$out"

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
DUALPIPE_CUDA=1 "$base" -m pip --python "$python" --disable-pip-version-check install --quiet \
  --no-build-isolation --no-deps --no-index -e . 2>&1 | tee "$out/build.log"
"$python" -m dualpipe_ext doctor 2>&1 | tee "$out/doctor.log"

run() {  # run NAME COMMAND...: its output also goes to NAME.log
  local name=$1
  shift
  "$@" 2>&1 | tee "$out/$name.log"
}

status=0
if [[ ${1:-test} == sanitize ]]; then
  # A plan by node, one in pairs, one with 16 GPUs to a lane: every path of the planner.
  planner=tests/gpu/test_eplb_planner.py
  plans=("$planner::test_replica_ranks")
  for sizes in 256-sizes1 160-sizes5; do
    plans+=("$planner::test_real_shapes_and_limits[$sizes-lognormal]")
  done
  for tool in memcheck racecheck; do
    run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -p no:cacheprovider tests/gpu/test_core.py "${plans[@]}" || status=1
    # Two virtual ranks: one launch acts for both, so the sanitizer sees all that they do.
    run "$tool-ep" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -p no:cacheprovider -m gpu tests/ep/test_transports.py \
      -k "(test_forward or test_mistakes or test_sizes) and virtual-2" || status=1
  done
else
  run gpu "$python" -m pytest -p no:cacheprovider -rs -m gpu tests || status=1
  if ((gpus >= 2)); then
    run multi_gpu "$python" -m pytest -p no:cacheprovider -rs -m multi_gpu tests || status=1
  fi
fi
exit $status
