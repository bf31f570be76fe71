# The files that NixOS would write for a configuration, as text, where they would lie.
{
  config,
  lib,
  pkgs,
}:

let
  inherit (import ./store.nix) storePath;
  inherit (builtins)
    concatMap
    isAttrs
    isBool
    isList
    map
    toJSON
    ;

  lines = lib.concatMapStringsSep "" (line: "${line}\n");
  file = text: {
    inherit text;
    mode = "0644";
  };
  # { name = value; } to { "/etc/folder/name.end" = file; }
  filesOf =
    folder: end: text:
    lib.mapAttrs' (name: value: lib.nameValuePair "${folder}/${name}${end}" (file (text name value)));

  # ── systemd's files: sections of settings; a list is as many lines ──
  setting = value: if isBool value then (if value then "true" else "false") else toString value;
  keyValues =
    settings:
    concatMap (name: map (value: "${name}=${setting value}") (lib.flatten [ settings.${name} ])) (
      lib.attrNames settings
    );
  section = name: entries: lib.optionals (entries != [ ]) ([ "[${name}]" ] ++ entries ++ [ "" ]);

  # ── Units ──
  # The path that each service has beside its own (nixos/modules/system/boot/systemd.nix).
  basicPath = [
    pkgs.coreutils
    pkgs.findutils
    pkgs.gnugrep
    pkgs.gnused
    pkgs.systemd
  ];
  environmentOf =
    service:
    let
      folders = folder: map (package: "${package}/${folder}") (service.path ++ basicPath);
      given = lib.filterAttrs (_: value: value != null) service.environment;
    in
    { PATH = lib.concatStringsSep ":" (folders "bin" ++ folders "sbin"); }
    // lib.mapAttrs (_: toString) given;

  unitText =
    name: service:
    let
      named = {
        After = service.after;
        Before = service.before;
        Description = [ service.description ];
        Documentation = service.documentation;
        Requires = service.requires;
        Wants = service.wants;
      };
      joined = lib.mapAttrs (_: lib.concatStringsSep " ") named;
      triggers = toString (lib.flatten service.restartTriggers);
      unit =
        lib.filterAttrs (_: value: value != "") joined
        // lib.optionalAttrs (service.startLimitIntervalSec != null) {
          StartLimitIntervalSec = service.startLimitIntervalSec;
        }
        // lib.optionalAttrs (triggers != "") {
          X-Restart-Triggers = storePath "X-Restart-Triggers-${name}" triggers;
        }
        // service.unitConfig;
      environment = lib.mapAttrsToList (
        variable: value: "Environment=${toJSON "${variable}=${value}"}"
      ) (environmentOf service);
    in
    lines (
      section "Unit" (keyValues unit)
      ++ section "Service" (environment ++ keyValues service.serviceConfig)
    );

  timerText =
    _: timer:
    lines (
      section "Unit" (keyValues { Description = timer.description; })
      ++ section "Timer" (keyValues timer.timerConfig)
    );

  # ── networkd and udev ──
  linkText =
    _: link:
    lines (section "Match" (keyValues link.matchConfig) ++ section "Link" (keyValues link.linkConfig));
  networkText =
    _: network:
    let
      addresses = map (address: "Address=${address}") network.address;
    in
    lines (
      section "Match" (keyValues network.matchConfig)
      ++ section "Network" (keyValues network.networkConfig ++ addresses)
      ++ concatMap (route: section "Route" (keyValues route)) network.routes
    );

  # ── containerd: tables of TOML, the values of each before the tables in it ──
  toml =
    prefix: set:
    let
      values = lib.filterAttrs (_: value: !isAttrs value) set;
      tables = lib.filterAttrs (_: isAttrs) set;
      show =
        value: if isList value then "[${lib.concatMapStringsSep ", " show value}]" else toJSON value;
      table =
        name: inner:
        let
          path = prefix ++ [ (toJSON name) ];
        in
        [ "[${lib.concatStringsSep "." path}]" ] ++ toml path inner;
    in
    lib.mapAttrsToList (name: value: "${toJSON name} = ${show value}") values
    ++ builtins.concatLists (lib.mapAttrsToList table tables);
  containerdText = lines (toml [ ] config.virtualisation.containerd.settings);
  containerdConfig = {
    path = storePath "containerd-config-checked.toml" containerdText;
    text = containerdText;
  };

  # ── The rest of /etc ──
  etcFiles = lib.mapAttrs' (
    name: etc:
    lib.nameValuePair "/etc/${name}" (
      if etc.text == null then
        { link = etc.source; }
      else
        {
          inherit (etc) text;
          mode = if etc.mode == "symlink" then "0444" else etc.mode;
        }
    )
  ) config.environment.etc;

  ssh = config.services.openssh;
  yesNo = value: if value then "yes" else "no";
  sshdConfig = [
    "UsePAM yes"
    "Port 22"
    "AuthorizedKeysFile %h/.ssh/authorized_keys /etc/ssh/authorized_keys.d/%u"
    "PermitRootLogin ${ssh.settings.PermitRootLogin}"
    "PasswordAuthentication ${yesNo ssh.settings.PasswordAuthentication}"
    "KbdInteractiveAuthentication ${yesNo ssh.settings.KbdInteractiveAuthentication}"
  ]
  ++ map (key: "HostKey ${key.path}") ssh.hostKeys;
  keysOf = user: user.openssh.authorizedKeys.keys;
  usersWithKeys = lib.filterAttrs (_: user: keysOf user != [ ]) config.users.users;

  hosts = lib.filterAttrs (_: names: names != [ ]) config.networking.hosts;
  sysctls = lib.filterAttrs (_: value: value != null) config.boot.kernel.sysctl;
  number = value: if value == false then "0" else toString value;
  fstab =
    mountPoint: fs:
    lib.concatStringsSep " " [
      fs.device
      mountPoint
      fs.fsType
      (lib.concatStringsSep "," fs.options)
      "0"
      (if mountPoint == "/" then "1" else "2")
    ];
in
{
  inherit containerdConfig environmentOf;

  files =
    etcFiles
    // filesOf "/etc/systemd/system" ".service" unitText config.systemd.services
    // filesOf "/etc/systemd/system" ".timer" timerText config.systemd.timers
    // filesOf "/etc/systemd/network" ".link" linkText config.systemd.network.links
    // filesOf "/etc/systemd/network" ".network" networkText config.systemd.network.networks
    // filesOf "/etc/ssh/authorized_keys.d" "" (_: user: lines (keysOf user)) usersWithKeys
    // lib.optionalAttrs config.virtualisation.containerd.enable {
      ${containerdConfig.path} = file containerdConfig.text;
    }
    // lib.optionalAttrs ssh.enable { "/etc/ssh/sshd_config" = file (lines sshdConfig); }
    // lib.mapAttrs (_: list: file (lines list)) {
      "/etc/hostname" = [ config.networking.hostName ];
      "/etc/hosts" = lib.mapAttrsToList (address: names: toString ([ address ] ++ names)) hosts;
      "/etc/fstab" = lib.mapAttrsToList fstab config.fileSystems;
      "/etc/modules-load.d/nixos.conf" = config.boot.kernelModules;
      "/etc/sysctl.d/60-nixos.conf" = lib.mapAttrsToList (
        name: value: "${name}=${number value}"
      ) sysctls;
      "/etc/systemd/system.conf" = section "Manager" (keyValues config.systemd.settings.Manager);
      "/etc/systemd/networkd.conf" = section "Network" (
        keyValues config.systemd.network.config.networkConfig
      );
      "/etc/tmpfiles.d/00-nixos.conf" = config.systemd.tmpfiles.rules;
    };
}
