#!/usr/bin/env bash
# Run a training command as a job that a scheduler may stop and start again:
#   bash scripts/job.sh deepspeed train.py ... --save_state_step 200 --resume auto
# SIGTERM, SIGINT (Ctrl-C) and SIGHUP to this script reach the training processes alone, so that they finish the step,
# save a state and leave with exit code 75. (The deepspeed launcher itself answers a signal with exit code 1, and kills
# after 30 s.) The launcher's own lines are left out, since the last of them reads like a failure; give it a --log_level
# to see them. What it alone would say, that a process was killed, is said here.
# Slurm: #SBATCH --signal=B:TERM@300 and, after this line, [ $? = 75 ] && scontrol requeue $SLURM_JOB_ID
set -m # the command gets a process group of its own: Ctrl-C reaches this script only

case "${1:-}" in
    deepspeed | */deepspeed) launcher_says_less=yes && set -- "$1" --log_level critical "${@:2}" ;;
esac
"$@" &
command=$!

ask_to_leave() {
    # deepspeed starts a process that starts the training processes. Otherwise the command gets the signal: python
    # train.py is the training process, and on several hosts deepspeed sends it on.
    local launcher
    launcher=$(pgrep -P "$command" -f '^[^ ]*python.* deepspeed\.launcher\.launch ')
    if [ -n "$launcher" ]; then pkill "-$1" -P "$launcher"; else kill "-$1" "$command"; fi
}
for name in TERM INT HUP; do
    trap "ask_to_leave $name" "$name"
done

while kill -0 "$command" 2>/dev/null; do # a signal ends `wait`, not the command
    wait "$command"
done
wait "$command" # which bash remembers, also of one that ended before it was asked
code=$?
if [ "$code" -gt 128 ]; then # 128 + the signal; 256 - the signal where the launcher passed it on
    signal=$((code > 192 ? 256 - code : code - 128))
    echo "job.sh: a training process was ended by signal $signal ($(kill -l "$signal"))$(
        [ "$signal" = 9 ] && echo ': out of memory? look at: dmesg')" >&2
fi
if [ "$code" = 0 ] && [ "${launcher_says_less:-}" ]; then
    # deepspeed ends with 0 where the process that it starts was killed; what the run itself wrote last counts.
    folder='' name=''
    for word in "$@"; do
        case "$name:$word" in
            *:--output_dir=*) folder=${word#*=} ;;
            --output_dir:*) folder=$word ;;
        esac
        name=$word
    done
    if [ -d "$folder" ] && ! tail -n 1 "$folder/events.jsonl" 2>/dev/null | grep -q '"event": "done"'; then
        echo "job.sh: the launcher ended as if all were well, but the run in $folder is not done: a process was killed:" \
            "out of memory? end what is left of it (pkill -f train.py) and start again with --resume auto" >&2
        exit 1
    fi
fi
exit "$code"
