#!/usr/bin/env bash
# A headless Chromium opens reports and moves their sliders; report_browser.js says what has to happen.
#
#   report_browser.sh DIT_TESTS     exits with 77 where there is no Chromium or no Vega
set -euo pipefail
tests=${1:?usage: report_browser.sh DIT_TESTS}
probe=$(cd "$(dirname "$0")" && pwd)/report_browser.js

browser=""
for name in chromium chromium-browser google-chrome; do
  browser=${browser:-$(command -v "$name" || true)}
done
if [ -z "$browser" ]; then
  echo "skipped: no chromium, chromium-browser or google-chrome"
  exit 77
fi
if [ ! -d /usr/share/javascript/vega ]; then
  echo "skipped: libjs-vega is not installed"
  exit 77
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
MOXIE_REPORTS=$folder "$tests" --test-case='report: pages for the browser' >"$folder/log" || { cat "$folder/log"; exit 1; }

failures=0
for report in "$folder"/*.html; do
  # Before the policy of the page, which the probe has to obey all the same.
  sed -e "/<meta charset/{a <script>" -e "r $probe" -e "a </script>" -e "}" "$report" >"$folder/probed"
  mv "$folder/probed" "$report"
  verdict=$("$browser" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir="$folder/profile" \
      --virtual-time-budget=60000 --dump-dom "file://$report" 2>"$folder/log" |
    grep -o '<html[^>]*data-verdict="[^"]*"' | sed 's/.*data-verdict=//') || true
  name=$(basename "$report" .html)
  echo "$name: ${verdict:-no verdict: $(tail -n 5 "$folder/log")}"
  [[ $verdict == "\"good: ${name%%-*} sliders, "* ]] || failures=$((failures + 1))
done
exit $((failures > 0))
