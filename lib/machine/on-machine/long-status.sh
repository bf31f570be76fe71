# On a machine: how a command that was started is doing. First line: the boot id; second: running,
# its exit status, or "cut off" if it ended without one; then the end of what it said.
cd "$FOLDER"
cat /proc/sys/kernel/random/boot_id
if ! flock --nonblock lock true; then
  echo running
elif [ -e status ]; then
  cat status
else
  echo 'cut off'
fi
tail -n 200 log
