#!/bin/bash
# Two Slurm nodes and their controller, each with its own network, host name, processes and shared memory, inside of
# one namespace: when its first process ends, everything in it ends. Run by conftest.py as: unshare … pair.sh FOLDER
set -eu
folder=$1
export SLURM_CONF=$folder/slurm.conf
hostname controller
mount --bind "$folder/hosts" /etc/hosts
ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.77.0.254/24 dev bridge0
ip link set bridge0 up
for i in 1 2; do
    mkdir -p "$folder/spool-n$i"
    # bash stays the first process of each node: it reaps orphans, which slurmd would not
    unshare --net --pid --mount --uts --ipc --fork --kill-child --mount-proc bash -c "
        hostname n$i
        mount -t tmpfs tmpfs /dev/shm
        ip link set lo up
        until ip addr add 10.77.0.$i/24 dev eth0 2>/dev/null; do sleep 0.05; done
        ip link set eth0 up
        slurmd -D -N n$i & wait" >"$folder/node-n$i.out" 2>&1 &
    node=$!
    while [ "$(readlink /proc/$node/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link add veth$i type veth peer name eth0 netns $node
    ip link set veth$i master bridge0 up
done
slurmctld -D >"$folder/controller.out" 2>&1 &
wait
