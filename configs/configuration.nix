# A machine of the cluster: the base that all machines share, and its role. This file and the
# modules are the same on every machine; what differs is in cluster.json in the same folder.
let
  cluster = builtins.fromJSON (builtins.readFile ./cluster.json);
in
{
  imports = [
    ./nixos-base.nix
    (if cluster.role == "control-plane" then ./control-plane.nix else ./worker.nix)
  ];

  _module.args = { inherit cluster; };
}
