# On the control plane: the former data directory in its place again, however far the swap came.
# A swap whose connection was cut goes on, and ends.
exec 9>"$DATA_DIR.lock"
flock --timeout 600 9
systemctl stop $LAST_FIRST
if [ -e "$FORMER" ]; then
  rm -rf "$DATA_DIR"
  mv -T "$FORMER" "$DATA_DIR"
fi
rm -rf "$WORK"
# Without data, etcd would begin with none, as if all were well.
[ -e "$DATA_DIR/member" ] || { echo "there are no data in $DATA_DIR" >&2; exit 1; }
sync
systemctl start --no-block $UNITS
