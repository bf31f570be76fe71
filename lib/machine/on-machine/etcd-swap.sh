# On the control plane: stops it, keeps its data directory aside, puts the prepared one in its place
# and starts it again. systemctl begins with the first that it is given, before systemd knows of the
# others: without its etcd, the API server would not end in a minute.
exec 9>"$DATA_DIR.lock"
flock --timeout 600 9
systemctl stop $LAST_FIRST
if [ -e "$DATA_DIR" ]; then mv -T "$DATA_DIR" "$FORMER"; fi
mv -T "$WORK/data" "$DATA_DIR"
rm -rf "$WORK"
sync
systemctl start --no-block $UNITS
