#!/usr/bin/env bash
# Names what is missing on this machine, a line each. Usage: prerequisites.sh PYTHON
set -uo pipefail
python=${1:-python3}
missing=0

need() {
  printf 'precast needs %s\n' "$1" >&2
  missing=1
}

if ! command -v "$python" >/dev/null; then
  need "Python 3.11 or newer: $python is not on PATH (Debian: apt-get install python3 python3-venv)"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  need "Python 3.11 or newer: $python is $("$python" -V 2>&1) (make PYTHON=/path/to/python3.11)"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  need "Python's venv module (Debian: apt-get install python3-venv)"
fi
cxx=${CXX:-g++}
command -v "$cxx" >/dev/null || need "a C++ compiler: $cxx is not on PATH (Debian: apt-get install g++)"
exit "$missing"
