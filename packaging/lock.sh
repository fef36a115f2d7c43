#!/bin/sh
# Writes the pinned requirement files, with hashes and without the address of any package index. Called by `make lock`.
set -eu
cd "$(dirname "$0")/.."
compile() {
    # PIP_TOOLS' header names the command; ours is the same on every machine.
    CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options "$@" pyproject.toml
}
# The largest first: the others are cuts of it, so that one machine can have them all.
compile --extra demo --extra dev --output-file requirements-dev.txt
compile --constraint requirements-dev.txt --extra demo --output-file requirements-demo.txt
compile --constraint requirements-dev.txt --output-file requirements.txt
