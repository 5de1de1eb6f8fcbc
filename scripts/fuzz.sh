#!/usr/bin/env bash
# Runs every fuzzer of the module for the time given (default 10s), one after
# another, and fails with the first that finds something.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}
grep -rlE --include='*_test.go' '^func Fuzz[A-Z]' internal client api test 2>/dev/null | sort | while read -r file; do
	pkg=./$(dirname "$file")
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file" | while read -r fuzzer; do
		echo "fuzz $pkg $fuzzer $time"
		go test "$pkg" -run='^$' -fuzz="^$fuzzer\$" -fuzztime="$time" -fuzzminimizetime=5s </dev/null | grep -vE '^fuzz: elapsed' || exit 1
	done
done
