#!/bin/sh
# Triton compiles the launchers of its kernels with a C compiler where they first run: CUDA images need one, CPU ones not.
set -eu

case $1 in
    cpu) ;;
    cuda)
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends gcc libc6-dev
        rm -rf /var/lib/apt/lists/*
        ;;
    *) echo "variant '$1': expected cpu or cuda" >&2; exit 2 ;;
esac
