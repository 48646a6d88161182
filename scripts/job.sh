#!/usr/bin/env bash
# Run a training command as a job that a scheduler may stop and start again:
#   bash scripts/job.sh deepspeed train.py ... --save_state_step 200 --resume auto
# SIGTERM and SIGINT to this script reach the training processes alone, so that they finish the step, save a state and
# leave with exit code 75. (The deepspeed launcher itself answers a signal with exit code 1, and kills after 30 s.)
# Slurm: #SBATCH --signal=B:TERM@300 and, after this line, [ $? = 75 ] && scontrol requeue $SLURM_JOB_ID
set -m # the command gets a process group of its own: Ctrl-C reaches this script only

"$@" &
command=$!

ask_to_leave() {
    # deepspeed starts a process that starts the training processes. Otherwise the command gets the signal: python
    # train.py is the training process, and on several hosts deepspeed sends it on.
    local launcher
    launcher=$(pgrep -P "$command" -f '^[^ ]*python.* deepspeed\.launcher\.launch ')
    if [ -n "$launcher" ]; then pkill -TERM -P "$launcher"; else kill -TERM "$command"; fi
}
trap ask_to_leave TERM INT

while kill -0 "$command" 2>/dev/null; do # a signal ends `wait`, not the command
    wait "$command"
    code=$?
done
exit "$code"
