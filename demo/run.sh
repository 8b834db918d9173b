#!/bin/sh
# Pretrain CAE v2 on the demo data; then kNN and linear accuracy of random weights, of the teacher and of the encoder just
# pretrained, in one table at the end. Everything lands in runs/.
set -e
trap 'exit 130' INT # Ctrl-C ends the script, too, not only the command that it is at
cd "$(dirname "$0")/.."
mkdir -p runs

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

probe() { # NAME FLAGS...: a linear probe and kNN; what it prints goes to runs/NAME.txt, its bars to the terminal
    output=runs/$1.txt
    shift
    printf '\n$ %s\n' "python probe.py linear --dataset demo --cache-features --log-every 1000 $* > $output"
    python probe.py linear --dataset demo --cache-features --log-every 1000 "$@" > "$output"
}

run accelerate launch --config_file demo/accelerate.yaml train.py --dataset demo
probe probe-random --random-init nano
probe probe-teacher --checkpoint demo/clip_teacher
probe probe-pretrained --checkpoint runs/cae-v2-nano-demo --beside runs/linear-random-nano-demo runs/linear-demo-clip_teacher
printf '\nkNN and linear accuracy on the 1,000 test images:\n\n'
sed -n '/^top-1 /,/result\.json:$/ { s/:$//; p; }' runs/probe-pretrained.txt
