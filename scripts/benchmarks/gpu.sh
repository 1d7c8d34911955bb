#!/usr/bin/env bash
# What one GPU does: a line of JSON a benchmark, with hardware and versions, for LOG.md. It should take under nine
# minutes; it was not run on a GPU yet.
#
#   bash scripts/benchmarks/gpu.sh > results.jsonl        PYTHON=… names another Python than python3
#
# Needs the packages of a step (jax for the GPU, flax, optax, numpy, jaxtyping), and PyTorch for the last line.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=.
bench() { "${PYTHON:-python3}" "scripts/benchmarks/$1.py" --config="configs/$2.py:$3" "${@:4}"; }
vit_l14=(--config.model.vision.{patch_size=14,width=1024,layers=24,heads=16,ffn=4096})  # at 224 pixels
bench train pretrain d12 --steps=10
bench train pretrain d20 --steps=10
bench train vision_pretrain d20 --steps=10 "${vit_l14[@]}"
bench train vision_instruct d20 --steps=10 "${vit_l14[@]}"
bench decode sft d20
bench train pretrain d20 --config.data.batch_size=32 --steps=10 --peer=torch
