#!/usr/bin/env bash
# Everything that needs a GPU, in one go: two NCCL ranks (on one GPU where NCCL allows it) and one rank against native.
# usage: tests/gpu/run.sh [claims] [rows] [one_gpu] [two_ranks]      results in $OUT (default: .)
# Two ranks on one GPU need NCCL >= 2.30 preloaded and NCCL_MULTI_RANK_GPU_ENABLE=1.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OUT=${OUT:-$PWD}
python=${PYTHON:-python3}

claims() { $python -m pytest -q -m gpu tests/gpu -c /dev/null --rootdir .; }

rows() { $python tests/gpu/rows.py; }

one_gpu() {
    for arm in native moe_accel native moe_accel; do
        $python tests/gpu/one_gpu.py $arm 2>>"$OUT/one_gpu.err" | tee -a "$OUT/one_gpu.jsonl"
    done
    $python tests/gpu/one_gpu.py moe_accel --profile 2>&1 | tail -n 40
}

two_ranks() {
    for name in stock ep1 ep2; do
        $python -m moe_accel.launch --config tests/gpu/$name.yaml tests/gpu/train_steps.py $name 2>"$OUT/$name.err" ||
            tail -n 40 "$OUT/$name.err"
    done
    $python -m moe_accel.launch --config tests/gpu/ep2.yaml tests/gpu/train_steps.py ep2_checkpointing --checkpointing \
        2>"$OUT/ep2_checkpointing.err" || tail -n 40 "$OUT/ep2_checkpointing.err"
    grep -h -A5 "^moe-accel" "$OUT/ep2.err"
}

for what in ${@:-claims rows one_gpu two_ranks}; do $what; done
