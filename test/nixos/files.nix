# The files that NixOS would write for a configuration, as text, where they would lie.
{ config, lib, pkgs }:

let
  inherit (import ./store.nix) storePath;
  inherit (builtins) concatMap isAttrs isBool isList map toJSON;

  lines = list: lib.concatStringsSep "" (map (line: "${line}\n") list);
  setting = value: if isBool value then (if value then "true" else "false") else toString value;

  # systemd's files: a section is a set of settings; a list is as many lines.
  keyValues =
    settings:
    concatMap (name: map (value: "${name}=${setting value}") (lib.flatten [ settings.${name} ])) (lib.attrNames settings);
  section = name: entries: lib.optionals (entries != [ ]) ([ "[${name}]" ] ++ entries ++ [ "" ]);

  # ── Units ──
  # What is on the path of each service, as nixos/lib/systemd-lib.nix has it.
  pathOf =
    service:
    let
      packages = service.path ++ [ pkgs.coreutils pkgs.findutils pkgs.gnugrep pkgs.gnused pkgs.systemd ];
      folders = folder: map (package: "${package}/${folder}") packages;
    in
    lib.concatStringsSep ":" (folders "bin" ++ folders "sbin");

  environmentOf =
    service:
    lib.filterAttrs (_: value: value != null) (
      { PATH = pathOf service; } // lib.mapAttrs (_: value: if value == null then null else toString value) service.environment
    );

  unitText =
    name: service:
    lines (
      section "Unit" (
        keyValues (
          lib.filterAttrs (_: value: value != [ ] && value != "") {
            After = lib.concatStringsSep " " service.after;
            Before = lib.concatStringsSep " " service.before;
            Description = service.description;
            Documentation = lib.concatStringsSep " " service.documentation;
            Requires = lib.concatStringsSep " " service.requires;
            Wants = lib.concatStringsSep " " service.wants;
          }
          // lib.optionalAttrs (service.startLimitIntervalSec != null) {
            StartLimitIntervalSec = service.startLimitIntervalSec;
          }
          // lib.optionalAttrs (service.restartTriggers != [ ]) {
            X-Restart-Triggers = storePath "X-Restart-Triggers-${name}" (toString (lib.flatten service.restartTriggers));
          }
          // service.unitConfig
        )
      )
      ++ section "Service" (
        lib.mapAttrsToList (variable: value: "Environment=${toJSON "${variable}=${value}"}") (environmentOf service)
        ++ keyValues service.serviceConfig
      )
    );

  # ── containerd ──
  toml =
    prefix: set:
    let
      tables = lib.filterAttrs (_: isAttrs) set;
      values = lib.filterAttrs (_: value: !isAttrs value) set;
      scalar = value: if isList value then "[${lib.concatMapStringsSep ", " scalar value}]" else toJSON value;
      path = name: prefix ++ [ (toJSON name) ];
    in
    lib.mapAttrsToList (name: value: "${toJSON name} = ${scalar value}") values
    ++ concatMap (
      name: [ "" "[${lib.concatStringsSep "." (path name)}]" ] ++ toml (path name) tables.${name}
    ) (lib.attrNames tables);
  containerdText = lines (toml [ ] config.virtualisation.containerd.settings);
  containerdConfig = {
    path = storePath "containerd-config-checked.toml" containerdText;
    text = containerdText;
  };

  file = text: { inherit text; mode = "0644"; };

  networkFiles =
    lib.mapAttrs' (
      name: link:
      lib.nameValuePair "/etc/systemd/network/${name}.link" (
        file (lines (section "Match" (keyValues link.matchConfig) ++ section "Link" (keyValues link.linkConfig)))
      )
    ) config.systemd.network.links
    // lib.mapAttrs' (
      name: network:
      lib.nameValuePair "/etc/systemd/network/${name}.network" (
        file (
          lines (
            section "Match" (keyValues network.matchConfig)
            ++ section "Network" (keyValues network.networkConfig ++ map (address: "Address=${address}") network.address)
            ++ concatMap (route: section "Route" (keyValues route)) network.routes
          )
        )
      )
    ) config.systemd.network.networks
    // {
      "/etc/systemd/networkd.conf" = file (lines (section "Network" (keyValues config.systemd.network.config.networkConfig)));
    };

  sysctl = lib.filterAttrs (_: value: value != null) config.boot.kernel.sysctl;
  yesNo = value: if value then "yes" else "no";
  ssh = config.services.openssh;
  usersWithKeys = lib.filterAttrs (_: user: user.openssh.authorizedKeys.keys != [ ]) config.users.users;

  etcFiles = lib.mapAttrs' (
    name: etc:
    lib.nameValuePair "/etc/${name}" (
      if etc.text != null then { inherit (etc) text; mode = if etc.mode == "symlink" then "0444" else etc.mode; } else { link = etc.source; }
    )
  ) config.environment.etc;
in
{
  inherit containerdConfig environmentOf unitText;

  files =
    etcFiles
    // networkFiles
    // lib.mapAttrs' (
      name: service: lib.nameValuePair "/etc/systemd/system/${name}.service" (file (unitText name service))
    ) config.systemd.services
    // lib.mapAttrs' (
      name: user: lib.nameValuePair "/etc/ssh/authorized_keys.d/${name}" (file (lines user.openssh.authorizedKeys.keys))
    ) usersWithKeys
    // lib.optionalAttrs config.virtualisation.containerd.enable {
      ${containerdConfig.path} = file containerdConfig.text;
    }
    // lib.optionalAttrs ssh.enable {
      "/etc/ssh/sshd_config" = file (
        lines (
          [
            "UsePAM yes"
            "Port 22"
            "AuthorizedKeysFile %h/.ssh/authorized_keys /etc/ssh/authorized_keys.d/%u"
            "PermitRootLogin ${ssh.settings.PermitRootLogin}"
            "PasswordAuthentication ${yesNo ssh.settings.PasswordAuthentication}"
            "KbdInteractiveAuthentication ${yesNo ssh.settings.KbdInteractiveAuthentication}"
          ]
          ++ map (key: "HostKey ${key.path}") ssh.hostKeys
        )
      );
    }
    // {
      "/etc/hostname" = file "${config.networking.hostName}\n";
      "/etc/hosts" = file (
        lines (
          lib.mapAttrsToList (address: names: "${address} ${lib.concatStringsSep " " names}") (
            lib.filterAttrs (_: names: names != [ ]) config.networking.hosts
          )
        )
      );
      "/etc/fstab" = file (
        lines (
          lib.mapAttrsToList (
            mountPoint: fs:
            "${fs.device} ${mountPoint} ${fs.fsType} ${lib.concatStringsSep "," fs.options} 0 ${
              if mountPoint == "/" then "1" else "2"
            }"
          ) config.fileSystems
        )
      );
      "/etc/modules-load.d/nixos.conf" = file (lines config.boot.kernelModules);
      "/etc/sysctl.d/60-nixos.conf" = file (
        lines (lib.mapAttrsToList (name: value: "${name}=${if value == false then "0" else toString value}") sysctl)
      );
      "/etc/tmpfiles.d/00-nixos.conf" = file (lines config.systemd.tmpfiles.rules);
    };
}
