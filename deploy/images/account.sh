#!/bin/sh
# Makes the account that processes run as, and the folders they may write to. Runs once, as root, while an image is built.
set -eu

id=10001
echo "kvpilot:x:$id:$id:kvpilot:/var/cache/kvpilot:/usr/sbin/nologin" >> "${ROOT:-}/etc/passwd"
echo "kvpilot:x:$id:" >> "${ROOT:-}/etc/group"
# models: weights, brought by a volume. cache: compiled kernels, blocks on disk, profiles, fetched models and bundles.
mkdir -p "${ROOT:-}/models" "${ROOT:-}/var/cache/kvpilot"
chown "$id:$id" "${ROOT:-}/var/cache/kvpilot"
