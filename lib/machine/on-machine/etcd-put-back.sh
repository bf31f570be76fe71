# On the control plane: the former data directory in its place again, however far the swap came.
systemctl stop $LAST_FIRST
if [ -e "$FORMER" ]; then
  rm -rf "$DATA_DIR"
  mv -T "$FORMER" "$DATA_DIR"
fi
rm -rf "$WORK"
sync
systemctl start --no-block $UNITS
