#!/usr/bin/env bash
# golden_verify must refuse a well-formed file of a family that it does not know. usage: golden_unknown_family.sh [EMULATOR...] GOLDEN_VERIFY
set -euo pipefail

file=$(mktemp --suffix=.safetensors)
trap 'rm -f "$file"' EXIT
header='{"__metadata__":{"case":"no_such_family_dev"},"input/x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
printf "\\x$(printf %02x ${#header})\\0\\0\\0\\0\\0\\0\\0%s\\0\\0\\0\\0\\0\\0\\0\\0" "$header" >"$file"

status=0
output=$("$@" "$file" 2>&1) || status=$?
printf '%s\n' "$output"
if [ "$status" -ne 1 ] || [[ $output != *FAIL* ]]; then
  echo "exit status $status, expected 1 and a line with FAIL"
  exit 1
fi
