#!/bin/sh
# Runs the image as it is meant: read-only, without a capability, with a stop that waits for running answers.
exec podman run --name edge --read-only --cap-drop all --security-opt no-new-privileges \
  --stop-timeout 145 --ulimit nofile=65536:65536 \
  --publish 8080:8080 --publish 127.0.0.1:9090:9090 \
  --volume ./routes.toml:/etc/edge/routes.toml:ro --volume edge:/var/lib/edge \
  edge
