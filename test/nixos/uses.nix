# Modules to add to the control plane's configuration that are right. What is found wrong shows
# only half of an evaluation: what NixOS takes has to be taken, and to mean the same.
{
  "mkForce wins over a plain value, and mkDefault loses to it" =
    { lib, ... }:
    {
      networking.hostName = lib.mkForce "beta";
      time.timeZone = lib.mkDefault "Europe/Paris";
    };
  "mkBefore and mkAfter order what mkMerge and mkIf put together" =
    { lib, ... }:
    {
      boot.kernelModules = lib.mkMerge [
        (lib.mkAfter [ "last" ])
        (lib.mkIf true (lib.mkBefore [ "first" ]))
        (lib.mkIf false [ "never" ])
      ];
    };
  "what mkIf turns off is not there" =
    { lib, ... }:
    {
      systemd.services.mine = lib.mkIf false { description = "never"; };
    };
  "a command is made from the configuration" =
    { config, pkgs, ... }:
    {
      systemd.services.mine.serviceConfig.ExecStart =
        "${pkgs.curl}/bin/curl http://${config.networking.hostName}/";
    };
}
