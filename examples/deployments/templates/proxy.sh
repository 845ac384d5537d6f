#!/bin/bash
# The address of clients. Written by generate.py: change the deployment's YAML, not this.
set -eu

exec ucm-proxy @ARGUMENTS
