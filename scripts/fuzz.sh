#!/usr/bin/env bash
# Runs every fuzzer of the module for the time given (default 5s), as many at a
# time as there are processors, each on one. Fails if one finds something, and
# shows what.
set -euo pipefail
cd "$(dirname "$0")/.."
export FUZZTIME=${1:-5s}

one() {
	local pkg=$1 fuzzer=$2 out
	if out=$(go test "$pkg" -run='^$' -fuzz="^$fuzzer\$" -fuzztime="$FUZZTIME" -fuzzminimizetime=20x -parallel=1 2>&1 </dev/null); then
		echo "ok   $pkg $fuzzer $(grep -o 'execs: [0-9]*' <<<"$out" | tail -n 1)"
	elif grep -q 'context deadline exceeded' <<<"$out" && ! grep -q 'Failing input written' <<<"$out"; then
		# The time was up in the middle of a slow input: go reports that as a
		# failure, but found nothing.
		echo "ok   $pkg $fuzzer (time was up in mid-input)"
	else
		printf '%s\nFAIL %s %s\n' "$out" "$pkg" "$fuzzer"
		return 255 # ends xargs
	fi
}
export -f one

grep -rlE --include='*_test.go' '^func Fuzz[A-Z]' internal client api test | sort | while read -r file; do
	sed -n "s|^func \(Fuzz[A-Za-z0-9_]*\)(.*|./$(dirname "$file") \1|p" "$file"
done | sort -u | xargs -P "$(nproc)" -L 1 bash -c 'one "$@"' _
