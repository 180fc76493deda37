#!/usr/bin/env bash
# Lessons stand alone: a lesson of one file includes the library and the standard one only, so that it compiles wherever it is
# copied to.
#     lessons.sh ROOT
set -euo pipefail
cd "${1:?usage: lessons.sh ROOT}/examples"
if grep -nE '^ *# *include' 0[0-69]_*.cpp | grep -vE '<(moxie/[a-z0-9_/]+\.hpp|Eigen/[A-Za-z]+|[a-z_]+)>'; then
  echo "these files of the repository are not there where a lesson is copied to" >&2
  exit 1
fi
