#!/bin/bash
# All that runs on @HOST; ends it all when it is ended. Written by generate.py.
set -eu
cd "$(dirname "$0")"
trap 'exit 1' INT TERM
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

@STARTS

wait
