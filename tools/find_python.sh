#!/bin/sh
# Prints the first Python 3.10 to 3.14 that can make a virtual environment. torch has wheels for
# those. PYTHON=... in the environment is then the only candidate.
tried=
for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python3.10 python3.14 python}; do
  version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
    if [ -n "$PYTHON" ]; then tried="$tried $candidate (does not run)"; fi
    continue
  }
  tried="$tried $candidate ($version)"
  case $version in 3.1[0-4]) ;; *) continue ;; esac
  if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
    command -v "$candidate"
    exit 0
  fi
  tried="$tried (no venv module: on Debian, apt install python3-venv)"
done
echo "expected a Python 3.10 to 3.14 with its venv module (PYTHON=/path/to/python chooses one)," \
  "got:${tried:- none on PATH}" >&2
exit 2
