# ---- From here on the script is the same for every stage (slurm/templates/stage.sh) ----

say() { printf '[hsa %s] %s\n' "$(date -u +%FT%TZ)" "$*"; }

# USR1 can come at any time from here on; until training is there to be told, the wish is remembered.
stop_asked=
trap 'stop_asked=1' USR1

set -e
setup
set +e

restart=${SLURM_RESTART_COUNT:-0}
marker=$run_dir/slurm/requeue.$SLURM_JOB_ID
history=$run_dir/slurm/starts.$SLURM_JOB_ID

# Rendezvous: every task finds rank 0 here and takes its rank from SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID.
# The port depends on the job alone, lies below the ephemeral range, and differs between jobs that share a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
say "job $SLURM_JOB_ID, restart $restart, nodes $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"

# A run that is requeued again and again without a new checkpoint would burn its nodes for ever.
latest=$run_dir/checkpoints/latest
checkpoint=$(readlink "$latest" || cat "$latest" 2>/dev/null || echo none)
printf '%s\n' "$checkpoint" >>"$history"
starts_without_progress=$(tail -n $((max_restarts_without_progress + 1)) "$history" | grep -cxF -e "$checkpoint")
if [ "$starts_without_progress" -gt "$max_restarts_without_progress" ]; then
    say "stopped: $max_restarts_without_progress restarts brought no checkpoint after '$checkpoint';" \
        "read the end of this log, mend the cause, and submit the run again"
    exit 1
fi

# The marker of an attempt that was cut off before it could act on it is void.
rm -f "$marker"

# Slurm signals this script only (--signal=B:...), so the script hands USR1 on: through srun to every task, and again
# every 10 s, because a task that is still importing has nothing to catch it with. It must never be deadly: srun ignores
# it until it forwards signals, hence the pause before the first, and a task until the trainer installs its handler.
hand_on() {
    say "USR1: training is asked to save and stop"
    trap '' USR1
    (
        sleep 2
        while kill -USR1 "$step" 2>/dev/null; do sleep 10; done
    ) &
    repeater=$!
}

(
    trap '' USR1
    exec srun --kill-on-bad-exit=1 "${srun_options[@]}" bash -c 'trap "" USR1; exec "$@"' hsa "${command[@]}"
) &
step=$!
repeater=
trap hand_on USR1
[ -z "$stop_asked" ] || hand_on

# A trap interrupts `wait`; srun's own status is what `wait` gives once srun has ended.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
trap '' USR1
wait "$step"
status=$?
[ -z "$repeater" ] || kill "$repeater" 2>/dev/null

# The trainer leaves the marker when it has stopped with a checkpoint and wants to go on. Its exit status cannot say so:
# Slurm may replace it by that of a task which --kill-on-bad-exit ended.
if [ -e "$marker" ]; then
    rm -f "$marker"
    say "stopped with a checkpoint: requeued"
    for pause in 1 5 30 60; do
        scontrol requeue "$SLURM_JOB_ID" && exit "$status"
        sleep "$pause"
    done
    say "Slurm refused to requeue job $SLURM_JOB_ID: submit the run again, it goes on from its last checkpoint"
    exit 1
fi
say "training ended with status $status"
exit "$status"
