# On a machine: starts a command that goes on by itself, whatever becomes of the connection, and
# holds the folder's lock as long as it is at work. Prints the boot id.
mkdir -p "$FOLDER"
cd "$FOLDER"
exec 9>lock
flock --nonblock 9 || { echo 'the last change is still at work' >&2; exit 1; }
rm -f status
: >log
setsid --fork bash -c '
  code=0
  bash -euo pipefail -c "$0" >log 2>&1 </dev/null || code=$?
  echo $code >status.new
  mv status.new status
' "$COMMAND" >/dev/null 2>&1 </dev/null
cat /proc/sys/kernel/random/boot_id
