#!/usr/bin/env bash
# Fails if a generated file differs from what its generator makes now.
set -euo pipefail
cd "$(dirname "$0")/.."
sum() { git ls-files --cached --others --exclude-standard -z | xargs -0 sha256sum 2>/dev/null | sort; }
before=$(sum)
go generate ./...
after=$(sum)
if [ "$before" != "$after" ]; then
	echo "generated files are not current; run: make generate" >&2
	diff <(echo "$before") <(echo "$after") | sed -n 's/^[<>] [0-9a-f]*  /  /p' | sort -u >&2
	exit 1
fi
