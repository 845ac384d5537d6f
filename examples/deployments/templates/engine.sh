#!/bin/bash
# @NAME on @HOST. Written by generate.py: change the deployment's YAML, not this.
set -eu
cd "$(dirname "$0")"

@EXPORTS

exec vllm serve @ARGUMENTS
