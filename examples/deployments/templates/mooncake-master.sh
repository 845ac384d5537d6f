#!/bin/bash
# Once, on @HOST. Written by generate.py: change the deployment's YAML, not this.
set -eu
export LD_LIBRARY_PATH=/usr/local/lib:${LD_LIBRARY_PATH-}

exec mooncake_master @ARGUMENTS
