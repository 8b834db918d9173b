#!/bin/sh
# Pretrain CAE v2 on the demo data; then kNN and linear accuracy of its encoder, beside the floor (random weights) and
# the teacher. Everything lands in runs/.
set -ex
cd "$(dirname "$0")/.."
accelerate launch train.py --dataset demo
python probe.py linear --dataset demo --cache-features --log-every 1000 --random-init nano
python probe.py linear --dataset demo --cache-features --log-every 1000 --checkpoint demo/clip_teacher
python probe.py linear --dataset demo --cache-features --log-every 1000 --checkpoint runs/cae-v2-nano-demo \
    --beside runs/linear-random-nano-demo runs/linear-demo-clip_teacher
