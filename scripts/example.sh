#!/usr/bin/env bash
# The quick start, command by command, as the README teaches it. SHORT=1 makes a few clips and trains a few steps.
set -euo pipefail

started=$(date +%s.%N)
media=output/example-media
recipe=recipes/example.yaml
run=output/example
small=()
if [ -n "${SHORT:-}" ]; then
  recipe=recipes/example_short.yaml
  media=output/example_short-media
  run=output/example_short
  small=(--small)
fi

mmaudio-hf example-media "$media" "${small[@]}"
mmaudio-hf extract-video "$recipe"
mmaudio-hf partition "$recipe"
mmaudio-hf extract-audio "$recipe"
accelerate launch --config_file accelerate_configs/cpu.yaml train.py "$recipe"
mmaudio-hf generate --run "$run" --video "$(ls "$media"/videos/test_*.mp4 | head -n 1)" --out "$run/samples/first.mp4"
mmaudio-hf report --run "$run" --events "$media/events.json" --started "$started"
