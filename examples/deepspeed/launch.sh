#!/usr/bin/env bash
# Ways to start a run on several processes; copy the line that you need. From the repository's root:
#
#     examples/deepspeed/launch.sh cpu examples/spam/run.yaml --overwrite
#
# What follows the way goes to `hybrid-opt train`. Every process reads the same run file; rank 0 shows the progress and writes the
# run folder, which all machines must see. Ctrl-C ends the step, saves, and stops: both launchers give the processes 30 seconds for
# that, so where steps and checkpoints take longer set training.checkpoint_every.
set -euo pipefail
way=$1 run=$2
shift 2
zero=(engine.type=zero engine.zero_stage="${STAGE:-3}")  # or write the section `engine` in the run file
port=${PORT:-29500} hosts=${HOSTS:-examples/deepspeed/hostfile}

case $way in
gpu)  # one machine, a process for each of two GPUs
    deepspeed --num_gpus 2 --master_port "$port" --module hybrid_opt train "$run" "${zero[@]}" "$@" ;;
cpu)  # one machine without a GPU, two processes
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / 2))}"
    deepspeed --num_accelerators 2 --master_port "$port" --module hybrid_opt train "$run" "${zero[@]}" "$@" ;;
torchrun)  # the same with torch's launcher
    torchrun --nproc_per_node 2 --master_port "$port" -m hybrid_opt train "$run" "${zero[@]}" "$@" ;;
offload)  # settings from a DeepSpeed file: ZeRO-3, optimizer and parameters in main memory
    deepspeed --num_gpus 2 --master_port "$port" --module hybrid_opt train "$run" engine.type=zero engine.zero_stage=3 \
        engine.deepspeed_config=examples/deepspeed/ds_config.json "$@" ;;
nodes)  # two machines that reach each other by ssh (and pdsh): on the first of them alone
    deepspeed --hostfile "$hosts" --module hybrid_opt train "$run" "${zero[@]}" "$@" ;;
node)  # two machines without ssh: on each, with NODE=0 on the first and NODE=1 on the second, and MASTER the name of the first
    deepspeed --hostfile "$hosts" --no_ssh --node_rank "$NODE" --master_addr "$MASTER" --master_port "$port" \
        --module hybrid_opt train "$run" "${zero[@]}" "$@" ;;
torchrun-node)  # the same with torch's launcher
    torchrun --nnodes 2 --node_rank "$NODE" --master_addr "$MASTER" --master_port "$port" \
        --nproc_per_node "${SLOTS:-4}" -m hybrid_opt train "$run" "${zero[@]}" "$@" ;;
*)
    echo "launch.sh: no way $way; write gpu, cpu, torchrun, offload, nodes, node or torchrun-node" >&2
    exit 2 ;;
esac
