# A machine of the cluster: the base that all of them share, and its role. This file and the
# modules are the same on every machine; what differs stands in cluster.json beside them.
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
